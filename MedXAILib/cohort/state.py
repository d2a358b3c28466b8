"""How far a cohort is, whether its results are still what they were, and what to try again."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from MedXAILib.cohort.plan import read_plan
from MedXAILib.cohort.work import RECEIPTS, RESULTS, digest, receipt
from MedXAILib.run import Run


@dataclass(frozen=True)
class State:
    """How many units there are of each status ("waiting" have none yet), the receipts of those that were refused or
    failed, and the seconds that those done took."""

    counts: Counter[str]
    troubles: tuple[dict[str, Any], ...]
    seconds: float


def state(folder: str | Path) -> State:
    """How far the plan in `folder` is, by its receipts."""
    folder = Path(folder)
    known = [receipt(folder, unit.key) for unit in read_plan(folder).units()]
    counts = Counter("waiting" if one is None else one["status"] for one in known)
    troubles = tuple(one for one in known if one is not None and one["status"] != "done")
    return State(counts, troubles, sum(one.get("seconds", 0.0) for one in known if one is not None))


def verify(folder: str | Path, run: Run | None = None) -> list[str]:
    """The keys of the units whose results are gone, or not what they were when their receipt was written. Their
    receipts are taken back, so that they are computed again."""
    folder, run, wrong = Path(folder), run or Run(), []
    units = list(read_plan(folder).units())
    for done, unit in enumerate(units):
        run.step(done, len(units), "Verifying the results")
        known = receipt(folder, unit.key)
        if known is None or known["status"] != "done":
            continue
        try:
            same = digest(folder / RESULTS / unit.key) == known["digest"]
        except (OSError, ValueError):
            same = False
        if not same:
            wrong.append(unit.key)
            _forget(folder, unit.key)
    return wrong


def retry(folder: str | Path) -> int:
    """Let what was refused or failed be tried again: how many units."""
    troubles = state(folder).troubles
    for one in troubles:
        _forget(Path(folder), one["unit"])
    return len(troubles)


def _forget(folder: Path, key: str) -> None:
    (folder / RECEIPTS / f"{key}.json").unlink(missing_ok=True)
