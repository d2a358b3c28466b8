"""A cohort for an audit, from the folder of its plan and the maps that were computed there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from MedXAILib import __version__
from MedXAILib.audit.cohort import Cohort, seen
from MedXAILib.bundle import sha256
from MedXAILib.cohort import told
from MedXAILib.cohort.intervals import whose
from MedXAILib.cohort.plan import PLAN, Unit, read_plan
from MedXAILib.cohort.state import explained
from MedXAILib.cohort.work import RESULTS
from MedXAILib.errors import MedXAIError, unknown
from MedXAILib.explanation import SaliencyMap, load_explanation
from MedXAILib.grid import resample
from MedXAILib.model import Model
from MedXAILib.request import check_explained
from MedXAILib.run import Run
from MedXAILib.volume import load_volume
from MedXAILib.within import mask_on


def gather(
    folder: str | Path,
    model: Model,
    columns: Sequence[str],
    label: str = "label",
    method: str | None = None,
    run: Run | None = None,
) -> tuple[Cohort, dict[str, Any]]:
    """The cases of the plan in `folder` whose map by `method` (the first that gave maps) is computed, and where they
    come from. Of several of one patient or scan it is one, the first of which all is known: they are not independent.

    Raises:
        MedXAIError: when there is no map, no such column or method, or `model` or a scan is not what was explained.
        Cancelled: when the person asked to stop.
    """
    folder, run = Path(folder), run or Run()
    plan = read_plan(folder)
    if model.fingerprint != plan.fingerprint:
        raise MedXAIError(f"'{model.name}' is not the network of the plan any more: give the one that was explained.")
    if method is not None and method not in plan.methods:
        raise unknown("method of this plan", method, plan.methods)
    known = sorted({column for subject in plan.subjects for column in subject.meta})
    for column in columns:
        if column not in known:
            raise unknown("column of the plan", column, known)
    mapped = told.maps(folder)
    units = [unit for unit in explained(folder) if unit.method in mapped and method in (None, unit.method)]
    units = [unit for unit in units if unit.method == units[0].method]
    found: list[tuple[Unit, SaliencyMap]] = []
    for done, unit in enumerate(units):
        run.step(done, len(units), "Reading maps")
        explanation = load_explanation(folder / RESULTS / unit.key)
        assert isinstance(explanation, SaliencyMap)
        found.append((unit, explanation))
    if not found:
        raise MedXAIError(f"'{folder}' holds no map yet: compute it first ('medxai cohort run').")
    found, every = _independent(found, (label, *columns)), len(found)
    if len(found) < every:
        run.note(f"{every - len(found)} more cases of the same patients or scans are left out: one of each counts.")
    prepared, maps, anatomy = [], [], []
    for done, (unit, explanation) in enumerate(found):
        run.step(done, len(found), "Reading scans")
        volume = load_volume(unit.subject.volume)
        check_explained(explanation.provenance, model, volume)
        one = model.prepare(volume, unit.subject.region)
        shape = one.x.shape[1:]
        maps.append(resample(explanation.data.sum(0, keepdim=True), explanation.affine, shape, one.affine)[0])
        mask = unit.subject.anatomy
        anatomy.append(None if mask is None else mask_on(one, load_volume(mask), shape))
        prepared.append(one)
    subjects = [unit.subject for unit, _ in found]
    labels = [one.meta.get(label, "") for one in subjects]
    if not any(labels):
        run.note(f"No case has a '{label}': the predicted class stands for it, and nothing alarms.")
    cohort = seen(
        model,
        [one.x for one in prepared],
        maps,
        labels,
        {column: [one.meta.get(column, "") for one in subjects] for column in columns},
        anatomy,
        [one.uid for one in subjects],
        run,
        [one.affine for one in prepared],
    )
    made = {
        "plan": sha256(folder / PLAN)[:32],
        "model": {"name": model.name, "fingerprint": model.fingerprint},
        "method": found[0][0].method,
        "parameters": dict(found[0][0].parameters),
        "label": label,
        "medxai": __version__,
    }
    return cohort, made


def _independent(found: Sequence[tuple[Unit, SaliencyMap]], wanted: Sequence[str]) -> list[tuple[Unit, SaliencyMap]]:
    first: dict[Any, tuple[Unit, SaliencyMap]] = {}
    for one in sorted(found, key=lambda one: sum(not one[0].subject.meta.get(name) for name in wanted)):
        subject = one[0].subject
        patient = whose(subject)
        first.setdefault(subject.volume if patient == subject.uid else patient, one)
    kept = {id(one) for one in first.values()}
    return [one for one in found if id(one) in kept]
