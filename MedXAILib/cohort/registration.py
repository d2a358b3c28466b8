"""Registering the scans of a cohort to a template: work with receipts like any other, killed and resumed like it."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections import Counter
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import SimpleITK as sitk

from MedXAILib.cohort.engine import carry_out, given_up
from MedXAILib.cohort.fit import KINDS, fit
from MedXAILib.cohort.plan import Subject, Unit, read_plan
from MedXAILib.cohort.state import outdated
from MedXAILib.cohort.work import RECEIPTS, Status, receipt, replaced, stamp, write_receipt
from MedXAILib.durable import write_durably
from MedXAILib.errors import MedXAIError, unknown
from MedXAILib.run import Run
from MedXAILib.volume import Volume, load_volume

_FOLDER, _ASKED, _TRANSFORMS = "registration", "registration.json", "transforms"
# Of how scans are registered: another makes other transforms of the same scans.
_VERSION = 1


@dataclass(frozen=True)
class Registering:
    """Registering the cases in `folder` that have no transform of their own to the scan `template`, where its `mask`
    is; `fingerprints` are those of both files."""

    folder: str
    template: str
    mask: str | None
    fingerprints: tuple[str, ...]
    kind: str

    @property
    def place(self) -> Path:
        """Where the receipts and the transforms are."""
        return Path(self.folder) / _FOLDER

    def units(self) -> dict[str, Unit]:
        """A unit for each case, by key: a hash of the scan's path and all that is asked."""
        return _units(self)

    def transform(self, key: str) -> Path:
        """The file of a transform."""
        return self.place / _TRANSFORMS / f"{key}.{'h5' if self.kind == 'deformable' else 'tfm'}"

    def do(self, key: str, device: str | None, attempt: int) -> Status:
        """Register a case, unless it has a receipt. What does not fit is refused, with the reason."""
        known, unit = receipt(self.place, key), self.units()[key]
        if known is not None:
            status: Status = known["status"]
            return status
        template, mask = _files(self)
        told: dict[str, Any] = {"scan": stamp(unit.subject.volume), "attempt": attempt}
        try:
            scan = load_volume(unit.subject.volume)
            found = fit(scan, template, self.kind, mask)
        except MedXAIError as error:
            return write_receipt(self.place, unit, told | {"status": "refused", "reason": str(error)})
        told |= {
            "volume": scan.fingerprint,
            "quality": {name: round(value, 4) for name, value in found.quality.items()},
        }
        if found.reason:
            return write_receipt(self.place, unit, told | {"status": "refused", "reason": found.reason})
        file = self.transform(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_name(f".{uuid.uuid4().hex[:8]}-{file.name}")
        sitk.WriteTransform(found.transform, str(beside))
        beside.replace(file)
        return write_receipt(self.place, unit, told | {"status": "done"})

    def give_up(self, key: str, error: BaseException) -> Status:
        """Say so in its receipt."""
        return given_up(self.place, self.units()[key], error)


def register(
    folder: str | Path,
    template: str | Path,
    kind: str = "affine",
    mask: str | Path | None = None,
    workers: int = 0,
    scheduler: str | None = None,
    retry: bool = False,
    run: Run | None = None,
) -> Counter[str]:
    """Register the scan of each case in `folder` that has no `transform` to the scan `template`; returns how many were
    done, refused and failed. It may be killed at any time: the same call goes on from where it was.

    Args:
        kind, mask: as for `fit`; the mask is a file.
        workers, scheduler, run: as for `compute`.
        retry: whether what was refused or failed is tried again.

    Raises:
        MedXAIError: for another kind, and when there is no plan, or a file that cannot be read.
    """
    if kind not in KINDS:
        raise unknown("kind of registration", kind, KINDS)
    files = [str(Path(path).resolve()) for path in (template, mask) if path is not None]
    prints = tuple(load_volume(file).fingerprint for file in files)
    task = Registering(str(Path(folder).resolve()), files[0], files[1] if mask is not None else None, prints, kind)
    outdated(task.place, list(task.units().values()))
    write_durably(task.place / _ASKED, json.dumps({"format": 1, **asdict(task)}, indent=1, ensure_ascii=False))
    for one in troubles(folder) if retry else []:
        (task.place / RECEIPTS / f"{one['unit']}.json").unlink(missing_ok=True)
    keys = [key for key in task.units() if receipt(task.place, key) is None]
    return carry_out(task, keys, "Registering the cohort", workers, scheduler, run=run)


def registering(folder: str | Path) -> Registering | None:
    """How the cases in `folder` were registered last; None when they were not."""
    try:
        said = json.loads((Path(folder) / _FOLDER / _ASKED).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    # The folder may have been moved.
    given = {"folder": str(Path(folder).resolve()), "fingerprints": tuple(said["fingerprints"])}
    return Registering(**{name: value for name, value in said.items() if name != "format"} | given)


def registered(folder: str | Path, template: Volume) -> tuple[dict[str, str], dict[str, str]]:
    """By uid, the files of the transforms by which the cases in `folder` were registered to `template`, and the reasons
    of those that could not be. Both are empty when none was asked for.

    Raises:
        MedXAIError: when another template was asked for, or not all is done.
    """
    task = registering(folder)
    if task is None:
        return {}, {}
    if task.fingerprints[0] != template.fingerprint:
        raise MedXAIError(
            f"The cohort in '{folder}' is registered to another template, '{task.template}': give that one, or "
            "register it to this one ('medxai cohort register')."
        )
    done, refused = {}, {}
    for subject in read_plan(folder).subjects:
        if subject.transform is not None:
            continue
        unit = _unit(task, subject)
        known = receipt(task.place, unit.key)
        if known is None or replaced(unit, known):
            raise MedXAIError(
                f"'{subject.uid}' is not registered, or its scan was replaced since: 'medxai cohort register' again."
            )
        if known["status"] == "done":
            done[subject.uid] = str(task.transform(unit.key))
        else:
            refused[subject.uid] = known["reason"]
    return done, refused


def troubles(folder: str | Path) -> list[dict[str, Any]]:
    """The receipts of the cases in `folder` that could not be registered when that was asked for last."""
    task = registering(folder)
    known = [] if task is None else [receipt(task.place, key) for key in task.units()]
    return [one for one in known if one is not None and one["status"] != "done"]


def _unit(task: Registering, subject: Subject) -> Unit:
    told = [subject.volume, task.fingerprints, task.kind, _VERSION]
    key = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:20]
    return Unit(key, subject, f"{task.kind} registration", {})


@lru_cache(maxsize=2)
def _units(task: Registering) -> dict[str, Unit]:
    subjects = [one for one in read_plan(task.folder).subjects if one.transform is None]
    return {unit.key: unit for unit in (_unit(task, one) for one in subjects)}


@lru_cache(maxsize=1)
def _files(task: Registering) -> tuple[Volume, Volume | None]:
    """The template and its mask.

    Raises:
        MedXAIError: when they are not what they were.
    """
    template, mask = load_volume(task.template), None if task.mask is None else load_volume(task.mask)
    if tuple(one.fingerprint for one in (template, mask) if one is not None) != task.fingerprints:
        raise MedXAIError(f"'{task.template}' or its mask was changed meanwhile: register again.")
    return template, mask
