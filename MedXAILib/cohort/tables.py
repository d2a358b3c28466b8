"""What many explanations tell in numbers, as tables: means over all cases and over groups of them, with intervals."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from MedXAILib.cohort.differences import differences, grouped
from MedXAILib.cohort.intervals import spread, whose
from MedXAILib.cohort.plan import Subject
from MedXAILib.cohort.typical import typical
from MedXAILib.table import without_nan, write_rows
from MedXAILib.textual.significance import benjamini_hochberg
from MedXAILib.textual.tcav import score

_EXAMPLES = 3
_HEADS = ("group", "cases", "mean", "low", "high", "by", "target")
_COUNTED = ("word", "neighbour")
"""What is there in a case or is not: without it, a case counts as 0."""
_MANY = ("neighbour",)
"""Of which there are too many to ask of each whether groups differ."""
_WEIGHTY = ("concept", "prototype", "word")
"""Of what it is known how much it counts in a case."""


@dataclass(frozen=True)
class Said:
    """One number that an explanation tells: the `value` of `name`, which is a `what` ("concept"), as regards `target`.

    NaN is unknown, and a `share` is 0 or 1. `more` has what else is known of it, by column. `example` is how good an
    example of it this case is, and `chance` are values of `more["magnitude"]` that random concepts would have.
    """

    what: str
    name: str
    value: float
    target: str = ""
    more: Mapping[str, float | str] = field(default_factory=dict)
    example: float | None = None
    share: bool = False
    chance: tuple[float, ...] = ()


class Tables:
    """What was said of each case, by table. `by` are columns of the plan that make groups, as `grouped` says."""

    def __init__(self, by: Sequence[str] = ()) -> None:
        self._by = by
        self._subjects: dict[str, Subject] = {}
        self._said: dict[str, dict[tuple[str, str], dict[str, Said]]] = defaultdict(lambda: defaultdict(dict))

    def add(self, subject: Subject, said: Iterable[Said]) -> None:
        """Add what is said of a case."""
        self._subjects[subject.uid] = subject
        for one in said:
            self._said[one.what][one.target, one.name][subject.uid] = one

    def rows(self, what: str) -> list[dict[str, Any]]:
        """A table, a row for each name and group; what is strongest over all cases comes first."""
        rows = [
            self._row(what, key, said) | {"group": group, "by": column}
            for key in self._said[what]
            for column, group, uids in self._groups()
            if (said := self._of(what, key, uids))
        ]
        rows = _with_q(rows, [row for row in rows if "p" in row])
        size = {(row["target"], row[what]): abs(row["mean"]) for row in rows if not row["by"]}
        # NaN is the last, and what is as strong comes in the order in which it was told.
        rows.sort(key=lambda row: (row["target"], -np.nan_to_num(size[row["target"], row[what]], nan=-1.0)))
        return rows

    def differences(self) -> list[dict[str, Any]]:
        """Whether groups differ in what is said, as `differences.differences` tests it; q-values are of all of it."""
        rows = []
        for what in (one for one in self._said if one not in _MANY):
            # Together are tested those of which the same cases tell.
            alike: dict[tuple[str, ...], dict[str, dict[str, float]]] = defaultdict(dict)
            for key in self._said[what]:
                known = _known(self._of(what, key, self._subjects))
                alike[(key[0], *known)][key[1]] = known
            for (target, *uids), names in alike.items():
                cells = {uid: {name: known[uid] for name, known in names.items()} for uid in uids}
                found = differences(cells, list(self._subjects.values()), self._by) if uids else []
                rows += [{**vars(one), "of": what, "target": target} for one in found]
        return _with_q(rows, [row for row in rows if not math.isnan(row["p"])])

    def typical(self) -> list[dict[str, Any]]:
        """Cases that together show most of what counts in them; `mean` is the share of it that those so far show."""
        rows = []
        for what in (one for one in self._said if one in _WEIGHTY):
            values: dict[str, dict[tuple[str, str], float]] = {uid: {} for uid in self._subjects}
            for key in self._said[what]:
                for uid, value in _known(self._of(what, key, self._subjects)).items():
                    values[uid][key] = value
            for uid, share, most in typical(values):
                shows = "; ".join(f"{name} ({target})" if target else name for target, name in most)
                row = {"case": uid, "group": "all", "cases": len(values), "mean": share, "of": what, "shows": shows}
                rows.append(row)
        return rows

    def write(self, name: str, folder: Path) -> None:
        """Write `<name>-<what>s.csv` of each table, `<name>-differences.csv` and `<name>-typical.csv`; what is unknown
        is empty."""
        folder.mkdir(parents=True, exist_ok=True)
        for what in self._said:
            _write(folder / f"{name}-{what}s.csv", (what, *_HEADS), self.rows(what))
        if apart := self.differences():
            _write(folder / f"{name}-differences.csv", ("region", *_HEADS[:-1]), apart)
        if shown := self.typical():
            _write(folder / f"{name}-typical.csv", ("case", *_HEADS), shown)

    def _groups(self) -> list[tuple[str, str, list[str]]]:
        """The column of each group, its name, and the uids of its cases."""
        found = [("", "all", list(self._subjects))]
        for column in self._by:
            of = grouped(list(self._subjects.values()), column)
            found += [(column, name, [uid for uid in of if of[uid] == name]) for name in sorted(set(of.values()))]
        return found

    def _of(self, what: str, key: tuple[str, str], uids: Iterable[str]) -> dict[str, Said]:
        """What was said in some cases."""
        cells, absent = self._said[what][key], Said(what, key[1], 0.0, share=True)
        return {uid: cells.get(uid, absent) for uid in uids if uid in cells or what in _COUNTED}

    def _row(self, what: str, key: tuple[str, str], said: Mapping[str, Said]) -> dict[str, Any]:
        known = _known(said)
        share = any(one.share for one in said.values())
        mean, low, high = spread(list(known.values()), [whose(self._subjects[uid]) for uid in known], share)
        row = {what: key[1], "cases": len(known), "mean": mean, "low": low, "high": high, "target": key[0]}
        row |= {**_more([one.more for one in said.values()]), **_tested(list(said.values()))}
        ranked = sorted((-one.example, uid) for uid, one in said.items() if one.example is not None)
        return row | ({"examples": "; ".join(uid for _, uid in ranked[:_EXAMPLES])} if ranked else {})


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


def _known(said: Mapping[str, Said]) -> dict[str, float]:
    return {uid: one.value for uid, one in said.items() if not math.isnan(one.value)}


def _with_q(rows: list[dict[str, Any]], tested: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for row, q in zip(tested, benjamini_hochberg([row["p"] for row in tested]), strict=True):
        row["q"] = float(q)
    return rows


def _write(path: Path, first: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    heads = list(dict.fromkeys([*first, *(name for row in rows for name in row)]))
    write_rows(path, heads, without_nan([row.get(head, "") for head in heads] for row in rows))
