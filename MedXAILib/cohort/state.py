"""How far a cohort is, whether its results are still what they were, and what to try again."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from MedXAILib.cohort.plan import Subject, Unit, read_plan
from MedXAILib.cohort.work import RECEIPTS, RESULTS, digest, receipt, replaced, stamp
from MedXAILib.durable import write_durably
from MedXAILib.errors import MedXAIError
from MedXAILib.explanation import Explanation, load_explanation
from MedXAILib.run import Run


@dataclass(frozen=True)
class State:
    """How many units there are of each status ("waiting" have none yet), the receipts of those that were refused or
    failed, the seconds that those done took, and of how many the scan was replaced since."""

    counts: Counter[str]
    troubles: tuple[dict[str, Any], ...]
    seconds: float
    replaced: int = 0


def state(folder: str | Path) -> State:
    """How far the plan in `folder` is, by its receipts."""
    folder = Path(folder)
    units = list(read_plan(folder).units())
    found = [receipt(folder, unit.key) for unit in units]
    known = [(unit, one) for unit, one in zip(units, found, strict=True) if one is not None]
    counts = Counter("waiting" if one is None else one["status"] for one in found)
    troubles = tuple(one for _, one in known if one["status"] != "done")
    seconds = sum(one.get("seconds", 0.0) for _, one in known)
    return State(counts, troubles, seconds, sum(replaced(unit, one) for unit, one in known))


def verify(folder: str | Path, run: Run | None = None) -> list[str]:
    """The keys of the units whose results are gone, not what they were when their receipt was written, or of a scan
    that was replaced since. Their receipts are taken back, so that they are computed again."""
    folder, run = Path(folder), run or Run()
    units = list(read_plan(folder).units())
    wrong = outdated(folder, units)
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


def outdated(folder: Path, units: Sequence[Unit]) -> list[str]:
    """The keys of those of `units` whose scan was replaced since, or whose receipt cannot be read. Their receipts are
    taken back."""
    wrong = []
    for unit in units:
        known, path = receipt(folder, unit.key), folder / RECEIPTS / f"{unit.key}.json"
        if (known is None and path.exists()) or (known is not None and replaced(unit, known)):
            wrong.append(unit.key)
            _forget(folder, unit.key)
        elif known is not None and (now := stamp(unit.subject.volume)) not in (None, known.get("scan", now)):
            # The same scan, written again: it need not be read the next time.
            write_durably(path, json.dumps(known | {"scan": now}, indent=1, ensure_ascii=False))
    return wrong


def explained(folder: Path) -> list[Unit]:
    """The units of the plan in `folder` that are done, in its order."""
    return [unit for unit in read_plan(folder).units() if (receipt(folder, unit.key) or {}).get("status") == "done"]


def results(folder: str | Path, run: Run | None = None) -> Iterator[tuple[Subject, Explanation]]:
    """What was explained, in the order of the plan, each with its case.

    Raises:
        MedXAIError: when nothing was, or a result is damaged.
    """
    folder, run = Path(folder), run or Run()
    done = explained(folder)
    if not done:
        raise MedXAIError(f"'{folder}' holds no explanation yet: compute it first ('medxai cohort run').")
    for i, unit in enumerate(done):
        run.step(i, len(done), "Writing")
        yield unit.subject, load_explanation(folder / RESULTS / unit.key)


def retry(folder: str | Path) -> int:
    """Let what was refused or failed be tried again: how many units."""
    troubles = state(folder).troubles
    for one in troubles:
        _forget(Path(folder), one["unit"])
    return len(troubles)


def _forget(folder: Path, key: str) -> None:
    (folder / RECEIPTS / f"{key}.json").unlink(missing_ok=True)
