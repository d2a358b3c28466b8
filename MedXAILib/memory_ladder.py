"""What is given up, a rung at a time, when an explanation does not fit in memory: precision, a part of the region, the
GPU. That less is computed at a time comes before all of it (`MedXAILib.run.Chunks`) and costs only time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch

from MedXAILib.errors import Cancelled, MedXAIError, OutOfMemory
from MedXAILib.explanation import Explanation
from MedXAILib.grid import corners, transform
from MedXAILib.model import Model
from MedXAILib.region import Region
from MedXAILib.run import Run, out_of_memory
from MedXAILib.volume import Volume

AnExplanation = TypeVar("AnExplanation", bound=Explanation)

# How often the region is halved along each axis.
_HALVINGS = 2


@dataclass(frozen=True)
class _Rung:
    """What is asked for instead, and what the reader of the result must know of it."""

    how: str
    region: Region | None
    run: Run
    note: str = ""
    may_fail: bool = False
    """Whether the network may refuse it for reasons of its own."""


def within_memory(
    ask: Callable[[Region | None, Run], Sequence[AnExplanation]],
    model: Model,
    volume: Volume,
    region: Region | None,
    run: Run,
    *,
    allow_smaller_region: bool = False,
    allow_cpu: bool = False,
) -> list[AnExplanation]:
    """What `ask(region, run)` gives, or the best that fits in memory; notes in its provenance say what was given up.

    A lower precision is tried without asking, because it is used only where the network says the same in it. A smaller
    region and the CPU need the person's consent.

    Raises:
        OutOfMemory: when nothing that is allowed fits, saying what could be allowed.
    """
    device = torch.device(run.device or model.device)
    smaller_region = allow_smaller_region and model.patch_size is None
    notes: list[str] = []
    for rung in _rungs(model, volume, region, run, device, smaller_region, allow_cpu):
        if notes:
            run.step(0, 1, f"Out of memory; going on {rung.how}")
        try:
            found = ask(rung.region, rung.run)
        except Cancelled:
            raise
        except (RuntimeError, MemoryError, MedXAIError) as error:
            if out_of_memory(error):
                notes.append(f"Out of memory {rung.how}.")
            elif rung.may_fail and isinstance(error, MedXAIError):
                notes.append(f"Not computed {rung.how}: {error}")
            else:
                raise
        else:
            noted = [*notes, *filter(None, [rung.note])]
            return [_noted(e, noted) if noted else e for e in found]
        # Only here, because the error held on to what filled the memory.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    raise OutOfMemory(_remedies(model, device, allow_smaller_region, allow_cpu))


def _rungs(
    model: Model,
    volume: Volume,
    region: Region | None,
    run: Run,
    device: torch.device,
    smaller_region: bool,
    cpu: bool,
) -> Iterator[_Rung]:
    yield _Rung(f"on {device}", region, run)
    if run.precision is None and model.dtype == torch.float32:
        low = replace(run, precision="float16" if device.type == "cuda" else "bfloat16")
        yield _Rung(f"in {low.precision}", region, low, may_fail=True)
    if smaller_region:
        box = _box(volume, region)
        for _ in range(_HALVINGS):
            box = _halved(box)
            said = " to ".join(f"({', '.join(f'{v:.1f}' for v in corner)})" for corner in box.tolist())
            note = f"Only {said} (RAS mm) was explained, and the rest was not looked at."
            yield _Rung("with a smaller region", box.tolist(), run, note, may_fail=True)
    if cpu and device.type != "cpu":
        yield _Rung("on the CPU", region, replace(run, device="cpu"), "Computed on the CPU.")


def _box(volume: Volume, region: Region | None) -> np.ndarray:
    """The box that is asked for, or the largest in the middle of the scan that its grid holds: corners in RAS mm."""
    if region is not None:
        return np.sort(np.asarray(region, dtype=float), axis=0)
    outline = transform(volume.affine, corners(volume.shape))
    centre, reach = outline.mean(0), np.ptp(outline, axis=0) / 2
    # A box along the body's axes sticks out of a tilted grid.
    needed = np.abs(np.linalg.inv(volume.affine)[:-1, :-1]) @ reach
    reach = reach * min(1.0, float((np.array(volume.shape) / 2 / needed).min()))
    return np.stack([centre - reach, centre + reach])


def _halved(box: np.ndarray) -> np.ndarray:
    return box.mean(0) + (box - box.mean(0)) / 2


def _noted(explanation: AnExplanation, notes: list[str]) -> AnExplanation:
    made = explanation.provenance
    return replace(explanation, provenance=made.model_copy(update={"notes": [*made.notes, *notes]}))


def _remedies(model: Model, device: torch.device, smaller_region: bool, cpu: bool) -> str:
    remedies = {
        "allow a smaller region": model.patch_size is None and not smaller_region,
        "allow the CPU, which takes longer": device.type != "cpu" and not cpu,
        "use a method that needs less": True,
    }
    where = "computer" if device.type == "cpu" else "GPU"
    allowed = ", ".join(remedy for remedy, helps in remedies.items() if helps)
    return f"The {where} has too little memory for this: {allowed}, or close other programs that use it."
