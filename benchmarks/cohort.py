"""`python -m benchmarks.cohort` explains 200 computed nodules by three methods with one worker and with two, and once
more while workers and the driver are killed: does a second worker halve the time, does memory stay flat, and does the
same come out?

`python -m benchmarks.cohort --seconds` takes units of seconds, one worker and two in turn, and beside them as many
processes without a driver or a scheduler, which is what the machine itself gains by a second core."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import SimpleITK as sitk
import torch
import typer

from benchmarks.measure import machine
from MedXAILib.cohort.plan import Subject, make_plan, read_plan
from MedXAILib.cohort.reduce import reduce
from MedXAILib.cohort.state import state
from MedXAILib.cohort.work import RECEIPTS, receipt
from MedXAILib.loading import load_model
from MedXAILib.resources import path
from MedXAILib.synthetic.lung_nodules import SPACING_MM, Backgrounds, synthesise
from MedXAILib.volume import Volume, load_volume

RESULTS = Path(__file__).resolve().parent / "results" / "cohort.json"
MODEL = path("Models/lung_nodule")
SCANS, METHODS = 200, ("gradient", "hirescam", "gradcam")
# Units of some three seconds each, and how often each number of workers takes its turn.
LONG, LONG_SCANS, TURNS = {"rise": {"samples": 800}}, 16, 4
KILLS = 5
_REDUCED = ("mean", "variance")

_DRIVER = """
import sys
from MedXAILib.cohort.engine import compute
if __name__ == "__main__":
    workers, *shard = map(int, sys.argv[2:])
    compute(sys.argv[1], workers, shard=tuple(shard) or None)
"""


def scans(folder: Path, count: int = SCANS) -> list[Subject]:
    """Computed nodules as files, in Hounsfield units."""
    found = []
    # Patches have the axes (R, A, S), volumes (S, A, R).
    affine = np.diag([SPACING_MM, SPACING_MM, SPACING_MM, 1.0])[[2, 1, 0, 3]]
    for i, image in enumerate(synthesise(Backgrounds.training(), count, seed=11).images):
        file = folder / f"nodule-{i:03d}.nrrd"
        sitk.WriteImage(Volume(image.permute(0, 3, 2, 1) * 1400 - 1000, affine).to_sitk(), str(file), True)
        found.append(Subject(file.stem, (str(file),)))
    return found


def driver(folder: Path, workers: int, *shard: int) -> subprocess.Popen[bytes]:
    """A process that computes the plan, or a part of it, each worker on one core."""
    script = folder / "driver.py"
    script.write_text(_DRIVER, encoding="utf-8")
    args = [sys.executable, str(script), str(folder), *map(str, (workers, *shard))]
    return subprocess.Popen(args, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)


def workers_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The workers of a driver that are alive."""
    found = []
    for one in psutil.Process(process.pid).children(recursive=True):
        try:
            if "spawn_main" in " ".join(one.cmdline()):
                found.append(one)
        except psutil.Error:
            continue
    return found


def undisturbed(folder: Path, workers: int) -> dict[str, Any]:
    """Units a second from the first receipt to the last, and the memory of a worker at a quarter and at the end."""
    memory: list[tuple[int, float]] = []
    process = driver(folder, workers)
    while process.poll() is None:
        done = len(list((folder / RECEIPTS).glob("*.json")))
        sizes = [one.memory_info().rss / 1e6 for one in workers_of(process)]
        if done and sizes:
            memory.append((done, max(sizes)))
        time.sleep(0.5)
    times = sorted(file.stat().st_mtime for file in (folder / RECEIPTS).glob("*.json"))
    quarter = next(mb for done, mb in memory if done >= len(times) / 4)
    return {
        "units_per_second": (len(times) - 1) / (times[-1] - times[0]),
        "memory_mb": {"at a quarter": round(quarter), "at the end": round(memory[-1][1])},
    }


def disturbed(folder: Path) -> dict[str, int]:
    """Kill workers at random, and the driver with all it started once, and begin again until all is done."""
    draw, killed, drivers = random.Random(0), 0, 0
    while True:
        process = driver(folder, 2)
        while process.poll() is None:
            time.sleep(draw.uniform(4, 8))
            alive = workers_of(process) if process.poll() is None else []
            if not alive or not any((folder / RECEIPTS).glob("*.json")):
                continue
            if killed == KILLS // 2 and not drivers:
                for one in [psutil.Process(process.pid), *alive]:
                    one.kill()
                drivers += 1
            elif killed < KILLS:
                draw.choice(alive).kill()
                killed += 1
        if process.returncode == 0:
            return {"workers killed": killed, "drivers killed": drivers}


def digests(folder: Path) -> list[str | None]:
    """What each unit says."""
    return [(receipt(folder, unit.key) or {}).get("digest") for unit in read_plan(folder).units()]


def rate(folder: Path) -> float:
    """Units a second, from when the first was begun to when the last was done."""
    ends = {file: file.stat().st_mtime for file in (folder / RECEIPTS).glob("*.json")}
    begun = min(end - json.loads(file.read_text(encoding="utf-8"))["seconds"] for file, end in ends.items())
    return len(ends) / (max(ends.values()) - begun)


def of_seconds() -> dict[str, Any]:
    """How much faster two are than one with units of seconds: workers of a driver, and processes without one."""
    ways = {
        "one worker": [(1,)],
        "two workers": [(2,)],
        "one process": [(0,)],
        "two processes": [(0, 0, 2), (0, 1, 2)],
    }
    rates: dict[str, list[float]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as place:
        here = Path(place)
        plan = make_plan(str(MODEL), load_model(MODEL).fingerprint, LONG, scans(here, LONG_SCANS))
        for turn in range(TURNS):
            for way, drivers in ways.items():
                folder = here / f"{way} {turn}"
                folder.mkdir()
                plan.save(folder)
                running = [driver(folder, *asked) for asked in drivers]
                if any(process.wait() for process in running):
                    raise RuntimeError(f"{way}, turn {turn}: not all was done.")
                rates[way].append(rate(folder))
                print(way, rates[way][-1], flush=True)
    gains = {
        who: [b / a / 2 for a, b in zip(rates[f"one {who}"], rates[f"two {many}"], strict=True)]
        for who, many in (("worker", "workers"), ("process", "processes"))
    }
    return {"units": LONG_SCANS, "method": LONG, "units_per_second": rates, "efficiency": gains}


def of_moments() -> dict[str, Any]:
    """Units of some 60 ms: how fast, how large, and whether the same comes out whatever is killed."""
    with tempfile.TemporaryDirectory() as place:
        here = Path(place)
        subjects = scans(here)
        plan = make_plan(str(MODEL), load_model(MODEL).fingerprint, {method: {} for method in METHODS}, subjects)
        folders = {name: here / name for name in ("one", "two", "killed")}
        for folder in folders.values():
            folder.mkdir()
            plan.save(folder)
        one, two = undisturbed(folders["one"], 1), undisturbed(folders["two"], 2)
        kills = disturbed(folders["killed"])
        template = load_volume(subjects[0].volume[0])
        first, last = (reduce(folders[name], template) for name in ("one", "killed"))
        pairs = [(getattr(a, name), getattr(b, name)) for a, b in zip(first, last, strict=True) for name in _REDUCED]
        return {
            "machine": machine(),
            "units": SCANS * len(METHODS),
            "states": {name: dict(state(folder).counts) for name, folder in folders.items()},
            "one worker": one,
            "two workers": two,
            "efficiency": two["units_per_second"] / one["units_per_second"] / 2,
            **kills,
            "results equal": digests(folders["one"]) == digests(folders["two"]) == digests(folders["killed"]),
            "reduced maps equal": all(torch.equal(a, b) for a, b in pairs),
        }


def main(seconds: bool = False) -> None:
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    found = {**found, "units of seconds": of_seconds()} if seconds else {**found, **of_moments()}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    typer.run(main)
