"""Methods compared over a set of cases: every map explained and checked, kept as it is done, and summed up."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from MedXAILib.durable import write_durably
from MedXAILib.engines.shapley import student
from MedXAILib.errors import Cancelled, MedXAIError, OutOfMemory, unknown
from MedXAILib.model import Model
from MedXAILib.region import Region
from MedXAILib.registry import make
from MedXAILib.report.case import PAGE
from MedXAILib.report.evaluation import page
from MedXAILib.report.localisation import centre
from MedXAILib.request import explain
from MedXAILib.run import Run
from MedXAILib.table import Row, read_rows
from MedXAILib.trust.card import CHECKS, trust_card
from MedXAILib.trust.judged import Judged
from MedXAILib.volume import Volume, load_volume

COLUMNS = ("volume", "segmentation", "target", "region")
"""Of a table of cases; all but the first may be left out or empty."""


@dataclass(frozen=True)
class Asked:
    """A case of a set: a scan, where its explanation should be, what to explain and where to look, if that is known.
    Scans may be files, to be read when it is their turn."""

    name: str
    volume: Volume | Path
    segmentation: Volume | Path | None = None
    target: str | int | None = None
    region: Region | None = None


def read_cases(table: Path) -> list[Asked]:
    """The cases of a CSV file with the columns `COLUMNS`. Paths are relative to it, a region is "x y z" in RAS mm.

    Raises:
        MedXAIError: naming the row and the column that is wrong.
    """
    rows = read_rows(table)
    strange = sorted(set(rows[0].cells) - set(COLUMNS))
    if strange:
        raise MedXAIError(f"'{table}' has columns that mean nothing here: {', '.join(strange)}.")
    return [_case(row) for row in rows]


def _case(row: Row) -> Asked:
    target = row["target"]
    which = int(target) if target.isdecimal() else target or None
    return Asked(row["volume"], row.volume, row.file("segmentation"), which, row.point("region"))


def evaluate(
    model: Model,
    cases: Sequence[Asked],
    methods: Mapping[str, Mapping[str, Any]],
    out: Path,
    run: Run | None = None,
    checks: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Explain and check each of `cases` by each of `methods` (with their parameters), and sum up. What was interrupted
    goes on where it was.

    Returns:
        The rows of the table: for each method the mean of every number, half the width of its 95 % confidence interval
        over cases, and how many cases it is of. They are in `out`/table.csv, too, and in plots in `out`/index.html.
    """
    found = results(model, cases, methods, out, run, checks)
    rows = [summary(method, of_method) for method, of_method in found.items()]
    _write_table(out / "table.csv", rows)
    (out / PAGE).write_text(page(model.name, rows, found), encoding="utf-8")
    return rows


def results(
    model: Model,
    cases: Sequence[Asked],
    methods: Mapping[str, Mapping[str, Any]],
    out: Path,
    run: Run | None = None,
    checks: Sequence[str] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """What `evaluate` sums up: for each method a result of each case, which says why where it was refused. Each is a
    file in `out`, kept as soon as it is there."""
    run = run if run is not None else Run()
    chosen = tuple(CHECKS) if checks is None else tuple(checks)
    for method, parameters in methods.items():
        technique = make(method, parameters)
        if technique.kind != "SaliencyMap":
            raise MedXAIError(f"{technique.title} answers without a map, and only maps are compared: leave it out.")
    for check in chosen:
        if check not in CHECKS:
            raise unknown("check", check, CHECKS)
    (out / "cases").mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
    for number, case in enumerate(cases):
        identity = [model.fingerprint, _known(case.volume), _known(case.segmentation), case.target, case.region]
        for method, parameters in methods.items():
            told = json.dumps([*identity, method, dict(parameters), chosen, run.seed], default=str)
            path = out / "cases" / f"{number:04d}-{method}-{hashlib.sha256(told.encode()).hexdigest()[:16]}.json"
            if not path.exists():
                run.step(number, len(cases), f"Case {number + 1}: {method}")
                measured = _measured(model, case, method, parameters, chosen, run)
                write_durably(path, json.dumps(measured, indent=1, ensure_ascii=False))
            found[method].append(json.loads(path.read_text(encoding="utf-8")))
    return found


def _measured(
    model: Model, case: Asked, method: str, parameters: Mapping[str, Any], checks: Sequence[str], run: Run
) -> dict[str, Any]:
    volume, mask = _loaded(case.volume), _loaded(case.segmentation)
    assert volume is not None
    region = case.region
    if region is None and mask is not None and not model.takes_whole:
        region = centre(mask)
    quiet = Run(device=run.device, seed=run.seed, memory_budget=run.memory_budget, cancel=run.cancel)
    try:
        explanation = explain(model, volume, method, case.target, region, quiet, **parameters)
        card = trust_card(Judged(explanation, model, volume, mask, quiet), checks)
    except (Cancelled, OutOfMemory):
        raise
    except MedXAIError as error:
        return {"case": case.name, "refused": str(error)}
    made = explanation.provenance
    cost = {"forwards": made.forwards, "backwards": made.backwards, "seconds": made.seconds}
    return {"case": case.name, "cost": cost | {"peak_memory": made.peak_memory}, **card.to_json()}


def _loaded(scan: Volume | Path | None) -> Volume | None:
    return load_volume(scan) if isinstance(scan, Path) else scan


def _known(scan: Volume | Path | None) -> Any:
    """What tells a scan from others, without reading a file."""
    if not isinstance(scan, Path):
        return None if scan is None else scan.fingerprint
    return [str(scan.resolve()), scan.stat().st_mtime_ns]


def numbers(result: Mapping[str, Any]) -> dict[str, float]:
    """Every number of a result of one case, by check and name."""
    found = {f"{f['check']}: {name}": float(v) for f in result.get("findings", ()) for name, v in f["values"].items()}
    return found | {f"cost: {name}": float(value) for name, value in result.get("cost", {}).items()}


def summary(method: str, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A row of the table: how many cases were not refused, and the `means` of their numbers."""
    return {"method": method, "cases": sum("refused" not in r for r in results)} | means(list(map(numbers, results)))


def means(cases: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each number over the cases that have it, and half its 95 % confidence interval (Student's t)."""
    columns: dict[str, list[float]] = {}
    for case in cases:
        for name, value in case.items():
            columns.setdefault(name, []).append(value)
    found = {}
    for name, values in columns.items():
        count = len(values)
        found[name] = mean(values)
        found[f"{name} ±"] = student(count - 1) * stdev(values) / math.sqrt(count) if count > 1 else math.nan
    return found


def _write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
