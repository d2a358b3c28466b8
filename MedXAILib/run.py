"""How a request is carried out: device, seed, memory, progress and cancel, and what it cost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import psutil
import torch
from torch import Tensor

from MedXAILib.errors import Cancelled, OutOfMemory
from MedXAILib.grid import pasted

# Somebody who looks on sees at most so often how far a map is, and that takes at most this share of the time.
_GLIMPSE_SECONDS = 1.0
_GLIMPSE_SHARE = 0.05

# Voxels per step beyond which a CPU, or a GPU, gains no more speed from a larger batch.
_BUSY_VOXELS = (96**3 * 3 // 4, 16 * 96**3)


Precision = Literal["float16", "bfloat16"]


@dataclass(frozen=True)
class Progress:
    """Where a run stands: `done` of `total` steps, what it is doing, and the seconds it still needs (None at first)."""

    done: int
    total: int
    message: str
    seconds_left: float | None


@dataclass(frozen=True)
class Partial:
    """A map that is not finished: `part` (C or 1, ...) is where in a volume of `shape`; it is zero elsewhere."""

    part: Tensor
    where: tuple[slice, ...]
    shape: tuple[int, ...]

    @property
    def data(self) -> Tensor:
        """All of it, (C or 1, D, H, W)."""
        return pasted(self.part, self.where, self.shape)


@dataclass
class Cost:
    """What a run used. Forwards and backwards are counted per sample; memory is the growth over the start, in bytes."""

    forwards: int = 0
    backwards: int = 0
    seconds: float = 0.0
    peak_memory: int = 0


@dataclass
class Run:
    """One execution of a request.

    `device` is where the network runs (default: where its parameters are); `memory_budget` in bytes bounds how much is
    computed at once (default: half of what is free); `progress` is called with a `Progress`; `cancel` is asked between
    steps and stops the run when it returns True; so is `enough`, by methods that can end early, which then give what
    they have. `partial` is called now and then with the first target's map as it is so far (a `Partial`). `precision`
    is what the network computes in, if not in its own. The rest is filled in while it runs.
    """

    device: str | torch.device | None = None
    seed: int = 0
    memory_budget: int | None = None
    progress: Callable[[Progress], None] | None = None
    cancel: Callable[[], bool] | None = None
    enough: Callable[[], bool] | None = None
    partial: Callable[[Partial], object] | None = None
    precision: Precision | None = None
    cost: Cost = field(default_factory=Cost, init=False)
    notes: list[str] = field(default_factory=list, init=False)
    unfinished: bool = field(default=False, init=False)
    """Whether it ended early because that was `enough`."""
    operators: dict[str, dict[str, int]] = field(default_factory=dict, init=False)
    """Of a method that has rules for operators: which rule met which, how often."""
    settled: dict[str, Any] = field(default_factory=dict, init=False)
    """Parameters that were left open, and what they became, such as the version of a library of cases: with them, the
    same is computed again."""
    _started: dict[str, float] = field(default_factory=dict, init=False, repr=False)
    _glimpse: float = field(default_factory=lambda: time.monotonic() + _GLIMPSE_SECONDS, init=False, repr=False)

    def step(self, done: int, total: int, message: str) -> None:
        """Report `done` of `total` steps of the work called `message`.

        Raises:
            Cancelled: when the person asked to stop.
        """
        if self.cancel is not None and self.cancel():
            raise Cancelled(f"Cancelled at step {done} of {total} ({message}); nothing was written.")
        started = self._started.setdefault(message, time.monotonic())
        if self.progress is not None:
            left = (time.monotonic() - started) / done * (total - done) if done else None
            self.progress(Progress(done, total, message, left))

    def stops(self, done: int, total: int, message: str) -> bool:
        """Whether `done` of `total` steps of the work called `message` are enough; if so, the reader will know."""
        if self.enough is None or not self.enough():
            return False
        self.unfinished = True
        self.note(f"Stopped early, at step {done} of {total} ({message}): the map is partial.")
        return True

    def glimpse(self, show: Callable[[], object]) -> None:
        """Call `show`, unless it is too early for that again. What it lacks memory for, it leaves out."""
        started = time.monotonic()
        if started < self._glimpse:
            return
        try:
            show()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        now = time.monotonic()
        self._glimpse = now + max(_GLIMPSE_SECONDS, (now - started) / _GLIMPSE_SHARE)

    def note(self, text: str) -> None:
        """Say something about this run that the reader of its result must know (once)."""
        if text not in self.notes:
            self.notes.append(text)

    def generator(self, draw: int = 0) -> torch.Generator:
        """The random generator of draw number `draw`: on the CPU, so that every device draws the same numbers."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + draw)

    def budget(self, device: torch.device) -> int:
        """Bytes this run may use on `device`."""
        if self.memory_budget is not None:
            return self.memory_budget
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
        return free // 2

    def chunks(self, total: int, size: int) -> Chunks:
        """`total` equal pieces of work, `size` at a time."""
        return Chunks(self, total, max(1, min(total, size)))

    def fitting(self, bytes_each: int, voxels_each: int, device: torch.device) -> int:
        """How many samples to compute at once: as many as the budget holds, but no more than keep `device` busy."""
        useful = -(-_BUSY_VOXELS[device.type == "cuda"] // max(1, voxels_each))
        return max(1, min(max(2, useful), self.budget(device) // max(1, bytes_each)))

    @contextmanager
    def measured(self, device: torch.device) -> Iterator[None]:
        """Fill in `cost.seconds` and `cost.peak_memory` for the work done inside."""
        started = time.perf_counter()
        with _peak_memory(self.cost, device):
            yield
        self.cost.seconds = time.perf_counter() - started


class Chunks:
    """Ranges of work that fit in memory; a chunk that did not fit after all is halved and tried again."""

    def __init__(self, run: Run, total: int, size: int) -> None:
        self.run, self.total, self.size = run, total, size

    def map(self, work: Callable[[int, int], object], message: str, anytime: bool = False) -> int:
        """Call `work(start, stop)` over the whole range, or `anytime` until that is enough, but once at least. Returns
        how far it came. `work` must leave no trace of a call that raised."""
        done = 0
        self.run.step(done, self.total, message)
        while done < self.total and not (anytime and done and self.run.stops(done, self.total, message)):
            stop = min(done + self.size, self.total)
            try:
                work(done, stop)
            except (RuntimeError, MemoryError, OutOfMemory) as error:
                if not out_of_memory(error):
                    raise
                self._shrink(error)
                continue
            done = stop
            self.run.step(done, self.total, message)
        return done

    def _shrink(self, error: BaseException) -> None:
        if self.size == 1:
            raise OutOfMemory(
                "Out of memory with a single sample: choose a smaller region, a coarser spacing or a larger machine."
            ) from error
        self.size //= 2
        self.run.note(f"Out of memory: went on with {self.size} at a time.")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` is memory running out, in any of the ways PyTorch says so on CPU and GPU."""
    text = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError, OutOfMemory)) or (
        "out of memory" in text or "can't allocate memory" in text or "not enough memory" in text
    )


@contextmanager
def _peak_memory(cost: Cost, device: torch.device) -> Iterator[None]:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield
        cost.peak_memory = torch.cuda.max_memory_allocated(device) - before
        return
    # The CPU allocator keeps no peak, and only some systems do: watch the process instead.
    process, over = psutil.Process(), threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        while not over.wait(0.05):
            cost.peak_memory = max(cost.peak_memory, process.memory_info().rss - before)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        cost.peak_memory = max(cost.peak_memory, process.memory_info().rss - before)
