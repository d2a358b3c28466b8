"""One unit of a cohort's work, done in whatever process on whatever machine: results first, then a receipt."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch

from MedXAILib import __version__
from MedXAILib.cohort.plan import Plan, Unit, unit_of
from MedXAILib.durable import write_durably
from MedXAILib.errors import MedXAIError, OutOfMemory
from MedXAILib.explanation import MANIFEST, Explanation
from MedXAILib.loading import load_model
from MedXAILib.model import Model
from MedXAILib.request import tell
from MedXAILib.run import Run
from MedXAILib.volume import load_volume

RESULTS, RECEIPTS = "units", "receipts"

Status = Literal["done", "refused", "failed"]


def do(folder: str, key: str, device: str | None = None, attempt: int = 1) -> Status:
    """Compute the unit `key` of the plan in `folder`, unless it has a receipt; returns its status and nothing else.

    What is wrong with the scan, or asked in vain, is "refused" with the reason, and not tried again. What does not fit
    on a GPU is computed on the CPU, and the receipt says so.

    Raises:
        Exception: whatever else goes wrong; nothing is written then, and it may be tried again.
    """
    known = receipt(Path(folder), key)
    if known is not None:
        status: Status = known["status"]
        return status
    plan, unit = unit_of(folder, key)
    model = _model(plan.model, plan.trust)
    if model.fingerprint != plan.fingerprint:
        raise MedXAIError(f"'{plan.model}' is not the network of the plan any more: plan anew, in another folder.")
    told: dict[str, Any] = {}
    try:
        try:
            found = _explained(plan, unit, model, device)
        except OutOfMemory:
            if device in (None, "cpu"):
                raise
            told["note"] = f"Out of memory on {device}: computed on the CPU."
            found = _explained(plan, unit, model, "cpu")
    except MedXAIError as error:
        write_receipt(Path(folder), unit, {"status": "refused", "reason": str(error), "attempt": attempt})
        return "refused"
    # Another program may have done the same in the meantime: its result has a receipt, and stays.
    if receipt(Path(folder), key) is not None:
        return "done"
    # What is left of one without a receipt may be damaged, and would not be replaced then.
    shutil.rmtree(Path(folder) / RESULTS / key, ignore_errors=True)
    place = found.save(Path(folder) / RESULTS / key)
    made = found.provenance
    told |= {
        "status": "done",
        "digest": digest(place),
        "volume": made.volume["fingerprint"],
        "target": made.target_label,
        "device": made.device,
        "seconds": round(made.seconds, 3),
        "peak_memory": made.peak_memory,
        "versions": {"medxai": __version__, "python": platform.python_version(), "torch": torch.__version__},
        "attempt": attempt,
    }
    write_receipt(Path(folder), unit, told)
    return "done"


def _explained(plan: Plan, unit: Unit, model: Model, device: str | None) -> Explanation:
    files = unit.subject.volume
    volume = load_volume(files[0] if len(files) == 1 else list(files))
    asked = unit.subject.target
    target = int(asked) if asked is not None and asked.isdecimal() else asked
    run = Run(device=device, seed=plan.seed)
    return tell(model, volume, unit.method, target, unit.subject.region, run, **unit.parameters)


@lru_cache(maxsize=1)
def _model(path: str, trust: bool) -> Model:
    return load_model(path, trust=trust)


def digest(place: Path) -> str:
    """A hash of what an explanation says; the same whenever and wherever it was computed alike."""
    found = hashlib.sha256()
    manifest = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
    found.update(json.dumps({k: v for k, v in manifest.items() if k != "provenance"}, sort_keys=True).encode())
    for name in sorted(path.name for path in place.iterdir() if path.name != MANIFEST):
        found.update(name.encode() + (place / name).read_bytes())
    return found.hexdigest()[:32]


def receipt(folder: Path, key: str) -> dict[str, Any] | None:
    """What is known of a unit that was done, refused or given up; None of one that is still to do."""
    try:
        known: dict[str, Any] = json.loads((folder / RECEIPTS / f"{key}.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return known


def write_receipt(folder: Path, unit: Unit, told: dict[str, Any]) -> None:
    """Say what became of a unit; from then on it is not computed again."""
    what = {"unit": unit.key, "case": unit.subject.uid, "method": unit.method, **told}
    write_durably(folder / RECEIPTS / f"{unit.key}.json", json.dumps(what, indent=1, ensure_ascii=False))
