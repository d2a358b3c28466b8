"""What many explanations tell in numbers, as tables: means over all cases and over groups of them, with intervals."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest  # type: ignore[import-untyped]

from MedXAILib.cohort.plan import Subject
from MedXAILib.table import write_rows
from MedXAILib.textual.significance import benjamini_hochberg
from MedXAILib.textual.tcav import score

_DRAWS = 1000
_ENDS = (2.5, 97.5)
_EXAMPLES = 3
_HEADS = ("group", "cases", "mean", "low", "high", "target")
_COUNTED = ("word", "neighbour")
"""What is there in a case or is not: without it, a case counts as 0."""


@dataclass(frozen=True)
class Said:
    """One number that an explanation tells: the `value` of `name`, which is a `what` ("concept"), as regards `target`.

    NaN is unknown. `more` has what else is known of it, by column. `example` is how good an example of it this case is,
    and `chance` are values of `more["magnitude"]` that random concepts would have.
    """

    what: str
    name: str
    value: float
    target: str = ""
    more: Mapping[str, float | str] = field(default_factory=dict)
    example: float | None = None
    chance: tuple[float, ...] = ()


class Tables:
    """What was said of each case, by table. `by` is a column of the plan whose values are groups; None makes none."""

    def __init__(self, by: str | None = None) -> None:
        self._by = by
        self._subjects: dict[str, Subject] = {}
        self._said: dict[str, dict[tuple[str, str], dict[str, Said]]] = defaultdict(lambda: defaultdict(dict))

    def add(self, subject: Subject, said: Iterable[Said]) -> None:
        """Add what is said of a case."""
        self._subjects[subject.uid] = subject
        for one in said:
            self._said[one.what][one.target, one.name][subject.uid] = one

    def named(self) -> list[str]:
        """What there is a table of."""
        return list(self._said)

    def values(self, what: str) -> dict[str, dict[tuple[str, str], float]]:
        """By the uid of each case, the known values in a table by target and name."""
        found: dict[str, dict[tuple[str, str], float]] = {uid: {} for uid in self._subjects}
        for key, cells in self._said[what].items():
            for uid, said in cells.items():
                if not math.isnan(said.value):
                    found[uid][key] = said.value
        return found

    def rows(self, what: str) -> list[dict[str, Any]]:
        """A table, a row for each name and group; what is strongest over all cases comes first."""
        cells = ((key, group) for key in self._said[what] for group in self._groups())
        rows = [self._row(what, key, group, seen) for key, group in cells if (seen := self._seen(what, key, group))]
        tested = [row for row in rows if "p" in row]
        for row, q in zip(tested, benjamini_hochberg([row["p"] for row in tested]), strict=True):
            row["q"] = float(q)
        size = {(row["target"], row[what]): abs(row["mean"]) for row in rows if row["group"] == "all"}
        # NaN is the last, and what is as strong comes in the order in which it was told.
        rows.sort(key=lambda row: (row["target"], -np.nan_to_num(size[row["target"], row[what]], nan=-1.0)))
        return rows

    def write(self, what: str, path: Path) -> None:
        """Write a table as CSV; what is unknown is empty."""
        rows = self.rows(what)
        heads = list(dict.fromkeys([what, *_HEADS, *(column for row in rows for column in row)]))
        write_rows(path, heads, ([_cell(row.get(head, "")) for head in heads] for row in rows))

    def _groups(self) -> list[str]:
        return ["", *sorted({self._group(one) for one in self._subjects.values()} - {""})]

    def _group(self, subject: Subject) -> str:
        return subject.meta.get(self._by, "") if self._by else ""

    def _seen(self, what: str, key: tuple[str, str], group: str) -> dict[str, Said]:
        """What was said in the cases of a group."""
        cells, absent = self._said[what][key], Said(what, key[1], 0.0)
        among = [uid for uid, one in self._subjects.items() if group in ("", self._group(one))]
        return {uid: cells.get(uid, absent) for uid in among if uid in cells or what in _COUNTED}

    def _row(self, what: str, key: tuple[str, str], group: str, seen: Mapping[str, Said]) -> dict[str, Any]:
        known = {uid: said.value for uid, said in seen.items() if not math.isnan(said.value)}
        mean, low, high = spread(list(known.values()), [whose(self._subjects[uid]) for uid in known])
        row = {what: key[1], "group": group or "all", "cases": len(known), "mean": mean, "low": low, "high": high}
        row |= {"target": key[0], **_more([said.more for said in seen.values()]), **_tested(list(seen.values()))}
        ranked = sorted((-said.example, uid) for uid, said in seen.items() if said.example is not None)
        if ranked:
            row["examples"] = "; ".join(uid for _, uid in ranked[:_EXAMPLES])
        return row


def whose(subject: Subject) -> str:
    """Whose a case is, by the columns `patient` or `participant` of the plan; without, each is another patient's."""
    return next((subject.meta[name] for name in ("patient", "participant") if subject.meta.get(name)), subject.uid)


def spread(values: Sequence[float], patients: Sequence[str]) -> tuple[float, float, float]:
    """The mean of `values` and its 95 % interval: by a bootstrap over `patients`; of a share by Wilson where that is
    wider, as a bootstrap knows no doubt of what is always so. NaN of nothing, and the interval of a single patient."""
    if not values:
        return math.nan, math.nan, math.nan
    _, of = np.unique(np.asarray(patients), return_inverse=True)
    sums = np.stack([np.bincount(of, values), np.bincount(of)], axis=1)
    mean = float(sums[:, 0].sum() / len(values))
    if len(sums) < 2:
        return mean, math.nan, math.nan
    drawn = _draws(len(sums)) @ sums
    low, high = np.percentile(drawn[:, 0] / drawn[:, 1], _ENDS)
    if set(values) <= {0.0, 1.0}:
        exact = binomtest(int(sum(values)), len(values)).proportion_ci(method="wilson")
        low, high = min(low, exact.low), max(high, exact.high)
    return mean, float(low), float(high)


@lru_cache(maxsize=8)
def _draws(count: int) -> np.ndarray:
    """How often each of `count` is drawn (draws, count)."""
    return np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), _DRAWS)


def _more(known: Sequence[Mapping[str, float | str]]) -> dict[str, Any]:
    """The mean of each further column that is of numbers, and the first of those that are texts."""
    found: dict[str, Any] = {}
    for column in dict.fromkeys(name for one in known for name in one):
        cells = [one[column] for one in known if column in one]
        numbers = [cell for cell in cells if not isinstance(cell, str) and not math.isnan(cell)]
        texts = [cell for cell in cells if isinstance(cell, str)]
        found[column] = texts[0] if texts else float(np.mean(numbers)) if numbers else math.nan
    return found


def _tested(said: Sequence[Said]) -> dict[str, float]:
    """Of concepts that were compared with random ones, TCAV over these cases: the share of those whose score rises with
    the concept, and the p of its mean change being one of a random concept (Kim 2018)."""
    tested = [one for one in said if one.chance]
    if not tested:
        return {}
    found = score(np.array([one.more["magnitude"] for one in tested]), np.array([one.chance for one in tested]))
    return {"alpha_tcav": found.numbers["alpha_tcav"], "tcav": found.numbers["tcav"], "p": found.p}


def _cell(value: Any) -> Any:
    return "" if isinstance(value, float) and math.isnan(value) else value
