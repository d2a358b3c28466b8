"""Time and memory of one call, so that they can be compared across machines and moments."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

Work = Callable[[], object]


@dataclass(frozen=True)
class Seconds:
    """What a call took: processor time of the process, which a busy machine does not lengthen, and wall-clock time."""

    cpu: float
    wall: float

    @classmethod
    def of(cls, work: Work) -> Seconds:
        gc.collect()
        cpu, wall = time.process_time(), time.perf_counter()
        work()
        return cls(time.process_time() - cpu, time.perf_counter() - wall)


def interleaved(works: Mapping[str, Work], repetitions: int) -> dict[str, list[Seconds]]:
    """Each of `works` `repetitions` times, in turn, so that whatever disturbs the machine disturbs them all alike."""
    found: dict[str, list[Seconds]] = {name: [] for name in works}
    for _ in range(repetitions):
        for name, work in works.items():
            found[name].append(Seconds.of(work))
    return found


@contextmanager
def growth(peak: list[int]) -> Iterator[None]:
    """Append to `peak` by how many bytes the process grew, at most, over what it held at the start."""
    process, over = psutil.Process(), threading.Event()
    before = process.memory_info().rss
    highest = before

    def watch() -> None:
        nonlocal highest
        while not over.wait(0.001):
            highest = max(highest, process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        peak.append(max(highest, process.memory_info().rss) - before)


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)` in a new process, whose memory nothing else has touched.

    Raises:
        concurrent.futures.process.BrokenProcessPool: when the process dies, as when the system runs out of memory.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def resumed(parts: Mapping[str, Callable[[], Any]], results: Path) -> dict[str, Any]:
    """What each of `parts` measures, kept in `results` as soon as it is there; what is there already is not measured
    again."""
    found = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {"machine": machine()}
    for name, measure in parts.items():
        if name not in found:
            found[name] = measure()
            results.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(name, flush=True)
    return found


def machine() -> dict[str, Any]:
    """What this is measured on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30),
        "system": platform.platform(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()
