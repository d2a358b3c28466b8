"""Does a network lean on what it should not, such as the site? The checks, and what they say together."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from MedXAILib.audit import clusters, counterexamples, neighbours, outside, probes, transplant
from MedXAILib.audit.cohort import Cohort
from MedXAILib.audit.groups import Groups
from MedXAILib.audit.outcome import Outcome, Picture, Test
from MedXAILib.durable import write_durably
from MedXAILib.errors import Cancelled, MedXAIError, OutOfMemory, unknown
from MedXAILib.run import Run
from MedXAILib.table import write_rows
from MedXAILib.trust.finding import COLOURS, Finding, Light

ALPHA = 0.01
"""Of all that one audit asks, how often any is found by chance at most: an audit that cries wolf is not read."""

WORDS: dict[Light | None, tuple[str, str]] = {
    "poor": ("alarm", COLOURS["poor"][1]),
    "fair": ("warning", COLOURS["fair"][1]),
    None: ("cannot say", COLOURS[None][1]),
    "good": ("no sign", COLOURS["good"][1]),
}
"""What a light means here, and its colour; the gravest first."""


@dataclass(frozen=True)
class Check:
    """A check `make` of a cohort's groups, and the question that is its `title`."""

    title: str
    make: Callable[[Cohort, Groups, Run], Outcome]


CHECKS: dict[str, Check] = {
    "outside": Check(outside.TITLE, outside.check),
    "clusters": Check(clusters.TITLE, clusters.check),
    "probes": Check(probes.TITLE, probes.check),
    "neighbours": Check(neighbours.TITLE, neighbours.check),
    "transplant": Check(transplant.TITLE, transplant.check),
    "counterexamples": Check(counterexamples.TITLE, counterexamples.check),
}
"""A new check is a file of its own and a line here."""


@dataclass(frozen=True, eq=False)
class Audit:
    """What was found ("poor" is an alarm, "fair" a warning), what was `left_out` and why, the tables and pictures by
    check and column ("outside:site"), and how many cases there were."""

    findings: tuple[Finding, ...]
    left_out: Mapping[str, str]
    tables: Mapping[str, Sequence[Mapping[str, Any]]]
    pictures: Mapping[str, Sequence[Picture]]
    cases: int

    @property
    def alarm(self) -> bool:
        """Whether anything alarms."""
        return any(found.light == "poor" for found in self.findings)

    def save(self, folder: Path, made: Mapping[str, Any]) -> None:
        """Write `audit.json`, with what is `made` known of where it comes from, and a table for each check and
        column."""
        folder.mkdir(parents=True, exist_ok=True)
        said = {
            "format": 1,
            "alarm": self.alarm,
            "cases": self.cases,
            "findings": [found.to_json() for found in self.findings],
            "left_out": dict(self.left_out),
            "provenance": dict(made),
        }
        write_durably(folder / "audit.json", json.dumps(said, indent=2, ensure_ascii=False))
        for key, rows in self.tables.items():
            heads = list(dict.fromkeys(name for row in rows for name in row))
            cells = [[row.get(head, "") for head in heads] for row in rows]
            write_rows(folder / (re.sub(r"[^\w-]+", "-", key) + ".csv"), heads, cells)


def audit(
    cohort: Cohort,
    by: Sequence[str] = ("site",),
    within: Sequence[str] = (),
    seed: int = 0,
    run: Run | None = None,
    checks: Sequence[str] | None = None,
    draws: int | None = None,
) -> Audit:
    """Whether the network of `cohort` leans on its columns `by`.

    Cases are compared within their class (the known one, or the predicted one where none is known; then nothing
    alarms) and within the columns `within`. What is not known of a case leaves it out. Chance is measured by `draws`
    permutations: if not said 4999, or as many as the correction for so many columns needs.

    Raises:
        MedXAIError: for an unknown check or column.
        Cancelled: when the person asked to stop.
    """
    run, checks = run or Run(), tuple(CHECKS) if checks is None else checks
    draws = max(4999, 1000 * len(by)) if draws is None else draws
    for name in checks:
        if name not in CHECKS:
            raise unknown("check", name, CHECKS)
    for column in (*by, *within):
        if column not in cohort.columns:
            raise unknown("column", column, cohort.columns)
    known, said = any(cohort.labels), cohort.output.isfinite().all(1).tolist()
    if silent := [uid for uid, one in zip(cohort.uids, said, strict=True) if not one]:
        run.note(f"The network's answer is not a number for {len(silent)} cases, which are left out: {_some(silent)}.")
    cohort = cohort.taken([i for i, label in enumerate(cohort.labels) if said[i] and (label or not known)])
    outcomes: dict[str, Outcome] = {}
    left_out: dict[str, str] = {}
    asked = [(column, name) for column in by for name in checks]
    for done, (column, name) in enumerate(asked):
        run.step(done, len(asked), f"Auditing: {name} by {column}")
        key = f"{name}:{column}"
        try:
            own = cohort.taken([i for i in range(len(cohort)) if all(cohort.columns[c][i] for c in (column, *within))])
            groups = _groups(own, column, within, seed, draws)
            if few := np.asarray(groups.names)[~groups.compared].tolist():
                run.note(
                    f"Of '{column}', these have too few cases to compare with others of their class: {_some(few)}."
                )
            outcomes[key] = CHECKS[name].make(own, groups, run)
        except (Cancelled, OutOfMemory):
            raise
        except MedXAIError as error:
            left_out[key] = str(error)
    return Audit(
        tuple(_findings(outcomes, known)),
        left_out,
        {key: outcome.rows for key, outcome in outcomes.items()},
        {key: outcome.pictures for key, outcome in outcomes.items()},
        len(cohort),
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")


def _groups(cohort: Cohort, column: str, within: Sequence[str], seed: int, draws: int) -> Groups:
    classes = cohort.labels if any(cohort.labels) else cohort.said
    told = zip(classes, *(cohort.columns[name] for name in within), strict=True)
    strata = np.unique(["\t".join(one) for one in told], return_inverse=True)[1]
    return Groups.of(column, cohort.columns[column], strata, seed, draws)


def _findings(outcomes: Mapping[str, Outcome], known: bool) -> list[Finding]:
    """The findings, with p corrected for all that was asked."""
    tests = [test for outcome in outcomes.values() for test in outcome.tests]
    corrected = dict(zip(map(id, tests), holm([test.p for test in tests]).tolist(), strict=True))
    strictest = 1 - ALPHA / max(1, len(tests))
    found = []
    for key, outcome in outcomes.items():
        qs = [corrected[id(test)] for test in outcome.tests]
        lights = [_light(test, q, strictest, known) for test, q in zip(outcome.tests, qs, strict=True)]
        values = dict(outcome.values)
        said = []
        for test, q in zip(outcome.tests, qs, strict=True):
            of = "" if test.alarms or len(outcome.tests) == 1 else "visible: "
            numbers = {"effect": test.effect, "least": test.least, "p": test.p, "q": q}
            numbers["detectable"] = float(np.quantile(test.null, strictest))
            values |= {of + name: value for name, value in numbers.items()}
            said.append(f"{test.says} (corrected p = {q:.2g})")
        text = "; ".join(said)
        found.append(
            Finding(key, CHECKS[key.partition(":")[0]].title, text[0].upper() + text[1:] + ".", _worst(lights), values)
        )
    return found


def _light(test: Test, q: float, strictest: float, known: bool) -> Light | None:
    """Poor or fair for what is neither chance nor small; good when what is not small would have been seen."""
    if test.effect < test.least:
        return "good" if np.quantile(test.null, strictest) <= test.least else None
    if q > ALPHA:
        return None
    return "poor" if test.alarms and known else "fair"


def _worst(lights: Sequence[Light | None]) -> Light | None:
    return min(lights, key=list(WORDS).index)


def holm(p: Sequence[float]) -> np.ndarray:
    """The corrected p of each: that any at least as small is chance at most so often (Holm, "A simple sequentially
    rejective multiple test procedure", 1979)."""
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values)
    raised = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)) if len(values) else values
    found = np.empty_like(values)
    found[order] = raised.clip(max=1)
    return found
