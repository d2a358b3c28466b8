"""Who sees what, in which order: by the seed alone, the same on every machine, and balanced."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from MedXAILib.errors import unknown
from MedXAILib.study.design import Case, Study


@dataclass(frozen=True)
class Trial:
    """A case that a reader sees in one arm. `index` counts the reader's trials; those to practise on come first, in the
    session before the first."""

    index: int
    session: int
    arm: str
    case: Case


def trials(study: Study, reader: str) -> list[Trial]:
    """What `reader` sees, in order.

    In a crossover the arms of a reader follow a row of a Williams square: over all rows every arm is as often in each
    place, and after each other arm. In a split the arms are dealt out over the cases of each stratum in turn, beginning
    one further for each reader: within a reader every arm has as many cases of each stratum (give or take one), and
    over as many readers as there are arms every case is seen once in each.

    Raises:
        MedXAIError: for a reader whom the design does not name.
    """
    design = study.design
    if reader not in design.readers:
        raise unknown("reader", reader, design.readers)
    number = design.readers.index(reader)
    practice = [(0, design.arms[i % len(design.arms)], case) for i, case in enumerate(study.training)]
    if design.kind == "crossover":
        square = williams(len(design.arms))
        row = [design.arms[i] for i in square[number % len(square)]]
        seen = [
            (session, arm, case)
            for session, arm in enumerate(row, 1)
            for case in _shuffled(study.cases, design.seed, reader, session)
        ]
    else:
        seen = [(1, arm, case) for arm, case in _dealt(study, reader, number)]
    return [Trial(i, *known) for i, known in enumerate((*practice, *seen))]


def williams(count: int) -> list[list[int]]:
    """Rows of 0 to `count` - 1 in which each follows each other equally often (Williams 1949): `count` rows, or twice
    as many where it is odd and greater than 1."""
    first = [(i + 1) // 2 if i % 2 else -(i // 2) for i in range(count)]
    rows = [[(value + row) % count for value in first] for row in range(count)]
    return rows if count % 2 == 0 or count == 1 else rows + [row[::-1] for row in rows]


def imbalances(study: Study) -> list[str]:
    """What keeps the study from being balanced, in sentences; none where it is."""
    design = study.design
    arms, readers = len(design.arms), len(design.readers)
    crossover = design.kind == "crossover"
    rows = len(williams(arms)) if crossover else arms
    found = []
    if readers % rows:
        uneven = "orders of the arms are not read" if crossover else "cases are not seen in every arm"
        found.append(f"{readers} readers are no multiple of {rows}: {uneven} equally often.")
    if not crossover:
        for (truth, right), count in sorted(Counter(case.stratum for case in study.cases).items()):
            if count < arms:
                about = f"{count} '{truth}' about which the network is {'right' if right else 'wrong'}"
                found.append(f"There are {arms} arms and {about}: no reader sees one of these in every arm.")
    return found


def _dealt(study: Study, reader: str, number: int) -> list[tuple[str, Case]]:
    arms, seed = study.design.arms, study.design.seed
    # The same for all readers, so that over them each case meets every arm.
    ordered = sorted(_shuffled(study.cases, seed), key=lambda case: case.stratum)
    of_arm: list[list[Case]] = [[] for _ in arms]
    for i, case in enumerate(ordered):
        of_arm[(i + number) % len(arms)].append(case)
    mixed = [_shuffled(cases, seed, reader) for cases in of_arm]
    # In blocks of one case of each arm, so that no arm comes late, when the reader is tired.
    blocks = [[(arm, case) for arm, case in zip(arms, block, strict=True) if case] for block in zip_longest(*mixed)]
    return [pair for i, block in enumerate(blocks) for pair in sorted(block, key=lambda p: _key(seed, reader, i, p[0]))]


def _shuffled(cases: Iterable[Case], *salt: object) -> list[Case]:
    return sorted(cases, key=lambda case: _key(*salt, case.uid))


def _key(*parts: object) -> str:
    """A hash, because no random generator is promised to stay the same."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()


def table(study: Study) -> tuple[Sequence[str], list[Sequence[object]]]:
    """The allocation as a table, for those who run the study and nobody else: its heads, and a row for each trial."""
    heads = ("reader", "trial", "session", "arm", "case", "truth", "answer")
    rows: list[Sequence[object]] = [
        (reader, t.index, t.session, t.arm, t.case.uid, t.case.truth, t.case.answer)
        for reader in study.design.readers
        for t in trials(study, reader)
    ]
    return heads, rows
