"""One unit of a cohort's work, done in whatever process on whatever machine: results first, then a receipt."""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import shutil
import sys
import uuid
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from MedXAILib import __version__
from MedXAILib.cohort.inputs import fingerprints
from MedXAILib.cohort.plan import Plan, Unit, unit_of
from MedXAILib.durable import write_durably
from MedXAILib.errors import MedXAIError, OutOfMemory
from MedXAILib.explanation import MANIFEST, Explanation
from MedXAILib.loading import load_model
from MedXAILib.model import Model
from MedXAILib.request import tell
from MedXAILib.run import Run
from MedXAILib.volume import Volume, load_volume

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
    model = _model(plan.model, plan.trust, plan.code)
    if model.fingerprint != plan.fingerprint:
        raise MedXAIError(f"'{plan.model}' is not the network of the plan any more: plan anew, in another folder.")
    # Before it is read: what is replaced while it is read looks replaced.
    told: dict[str, Any] = {"scan": stamp(unit.subject.volume)}
    try:
        volume = load_volume(unit.subject.volume)
        told["volume"] = volume.fingerprint
        try:
            found = _explained(plan, unit, model, volume, device)
        except OutOfMemory:
            if device in (None, "cpu"):
                raise
            told["note"] = f"Out of memory on {device}: computed on the CPU."
            found = _explained(plan, unit, model, volume, "cpu")
    except MedXAIError as error:
        refused = {"status": "refused", "reason": str(error), "attempt": attempt}
        return write_receipt(Path(folder), unit, told | refused)
    # Another program may have done the same in the meantime: its result has a receipt, and stays.
    if receipt(Path(folder), key) is not None:
        return "done"
    place = found.save(Path(folder) / RESULTS / f".{key}-{uuid.uuid4().hex[:8]}")
    made = found.provenance
    told |= {
        "status": "done",
        "digest": digest(place),
        "target": made.target_label,
        "files": fingerprints(unit.method, made.parameters),
        "device": made.device,
        "seconds": round(made.seconds, 3),
        "peak_memory": made.peak_memory,
        "versions": {"medxai": __version__, "python": platform.python_version(), "torch": torch.__version__},
        "attempt": attempt,
    }
    _put(place, Path(folder) / RESULTS / key)
    return write_receipt(Path(folder), unit, told)


def _put(fresh: Path, place: Path) -> None:
    """Move a folder to `place`, whatever is there and whoever does the same."""
    while True:
        try:
            fresh.rename(place)
            return
        except OSError:
            if not place.exists():
                raise
        # Left over and perhaps damaged, or the same by a program that is about to write its receipt.
        aside = place.with_name(f"{fresh.name}-aside")
        with contextlib.suppress(FileNotFoundError):
            place.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def _explained(plan: Plan, unit: Unit, model: Model, volume: Volume, device: str | None) -> Explanation:
    asked = unit.subject.target
    target = int(asked) if asked is not None and asked.isdecimal() else asked
    run = Run(device=device, seed=plan.seed)
    return tell(model, volume, unit.method, target, unit.subject.region, run, **unit.parameters)


@lru_cache(maxsize=1)
def _model(path: str, trust: bool, code: str | None) -> Model:
    if code is not None and code not in sys.path:
        sys.path.append(code)
    return load_model(path, trust=trust)


def stamp(files: Sequence[str]) -> str | None:
    """A hash of the names, sizes and times of a scan's files: what is cheap to know of it. None when one is missing."""
    said = []
    try:
        for path in map(Path, files):
            for file in sorted(path.iterdir()) if path.is_dir() else [path]:
                said.append((file.name, file.stat().st_size, file.stat().st_mtime_ns))
    except OSError:
        return None
    return hashlib.sha256(repr(said).encode()).hexdigest()[:20]


def replaced(unit: Unit, known: dict[str, Any]) -> bool:
    """Whether the scan is another now than when the receipt `known` was written. It is read only if its stamp is
    another, too. A scan that is gone was not replaced."""
    now = stamp(unit.subject.volume)
    if now in (None, known.get("scan", now)):
        return False
    return _fingerprint(unit.subject.volume, now) != known.get("volume")


@cache
def _fingerprint(files: Sequence[str], _stamp: str | None) -> str | None:
    """That of the scan in `files`, read once for all that is asked of it; None of one that cannot be read."""
    try:
        return load_volume(files).fingerprint
    except MedXAIError:
        return None


def digest(place: Path) -> str:
    """A hash of what an explanation says; the same whenever and wherever it was computed alike."""
    found = hashlib.sha256()
    manifest = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
    found.update(json.dumps({k: v for k, v in manifest.items() if k != "provenance"}, sort_keys=True).encode())
    # A page that was written of it later is not part of it.
    later = ".html", ".png", ".pdf"
    for name in sorted(path.name for path in place.iterdir() if path.name != MANIFEST and path.suffix not in later):
        found.update(name.encode() + (place / name).read_bytes())
    return found.hexdigest()[:32]


def receipt(folder: Path, key: str) -> dict[str, Any] | None:
    """What is known of a unit that was done, refused or given up; None of one that is still to do, or whose receipt
    cannot be read."""
    try:
        known: dict[str, Any] = json.loads((folder / RECEIPTS / f"{key}.json").read_text(encoding="utf-8"))
        return known if known["unit"] == key and known["status"] in get_args(Status) else None
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        return None


def write_receipt(folder: Path, unit: Unit, told: dict[str, Any]) -> Status:
    """Say what became of a unit, unless another program has said it; from then on it is not computed again."""
    what = receipt(folder, unit.key)
    if what is None:
        what = {"unit": unit.key, "case": unit.subject.uid, "method": unit.method, **told}
        write_durably(folder / RECEIPTS / f"{unit.key}.json", json.dumps(what, indent=1, ensure_ascii=False))
    status: Status = what["status"]
    return status
