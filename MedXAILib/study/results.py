"""What readers answered: a table for other programs, and what there is to say of each arm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from MedXAILib.errors import MedXAIError
from MedXAILib.study.allocation import trials
from MedXAILib.study.design import Study, parts
from MedXAILib.study.journal import read
from MedXAILib.table import write_rows

_DRAWS = 1000


@dataclass(frozen=True)
class Reading:
    """An answer of a reader. `rating` (-100 to 100) is how sure the reader is that it is what is to be found."""

    reader: str
    case: str
    arm: str
    session: int
    trial: int
    truth: str
    ai: str
    answer: str
    confidence: float
    rating: float
    seconds: float
    x: float | None
    y: float | None
    z: float | None
    looks: int
    at: str


@dataclass(frozen=True)
class Estimate:
    """A value, and the 95 % interval over other readers and other cases; NaN where it cannot be known."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return "" if np.isnan(self.value) else f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def readings(study: Study, folder: str | Path) -> list[Reading]:
    """All answers in the journals of `folder`, without those to practise on.

    Raises:
        MedXAIError: when there is none, or a journal is of another study or was changed.
    """
    found = []
    for reader in study.design.readers:
        events, _ = read(Path(folder) / f"{reader}.jsonl")
        if events and events[0].get("design") != study.fingerprint:
            raise MedXAIError(f"The journal of '{reader}' in '{folder}' is of another design, or of other cases.")
        if events and events[0].get("reader") != reader:
            raise MedXAIError(f"'{reader}.jsonl' in '{folder}' is the journal of '{events[0].get('reader')}'.")
        of = {trial.index: trial for trial in trials(study, reader)}
        looks: dict[int, int] = {}
        for event in events:
            if event["event"] == "look":
                looks[event["trial"]] = looks.get(event["trial"], 0) + 1
            if event["event"] != "answer" or of[event["trial"]].session == 0:
                continue
            trial = of[event["trial"]]
            x, y, z = event["point"] or (None, None, None)
            sure = event["confidence"]
            found.append(
                Reading(
                    reader=reader,
                    case=trial.case.uid,
                    arm=trial.arm,
                    session=trial.session,
                    trial=trial.index,
                    truth=trial.case.truth,
                    ai=trial.case.answer,
                    answer=event["answer"],
                    confidence=sure,
                    rating=sure if event["answer"] == study.design.answers[-1] else -sure,
                    seconds=event["seconds"],
                    x=x,
                    y=y,
                    z=z,
                    looks=looks.get(trial.index, 0),
                    at=event["at"],
                )
            )
    if not found:
        raise MedXAIError(f"'{folder}' holds no answer of '{study.design.name}': give the folder of the journals.")
    return found


def unfinished(study: Study, found: Sequence[Reading]) -> list[str]:
    """Which readers have not read everything, in sentences."""
    said = []
    for reader in study.design.readers:
        count = sum(trial.session > 0 for trial in trials(study, reader))
        done = sum(one.reader == reader for one in found)
        if done < count:
            said.append(f"'{reader}' has answered {done} of {count} trials.")
    return said


def summary(study: Study, found: Sequence[Reading], draws: int = _DRAWS) -> dict[str, dict[str, Estimate]]:
    """Of each arm: accuracy, the area under the ROC curve of the ratings (is it `answers[-1]`?; the mean over readers),
    over-reliance (how often readers follow a network that is wrong) and under-reliance (how often they leave one that
    is right), seconds, the agreement between readers (Krippendorff's alpha), and by how much the accuracy differs from
    that of the first arm. Intervals are of bootstraps over readers and cases at once."""
    sought = study.design.answers[-1]
    measures: dict[str, Callable[[Sequence[Reading], np.ndarray], float]] = {
        "accuracy": lambda rows, w: _share([r.answer == r.truth for r in rows], w),
        "AUC": lambda rows, w: _auc(rows, w, sought),
        "over-reliance": lambda rows, w: _followed(rows, w, right=False),
        "under-reliance": lambda rows, w: 1 - _followed(rows, w, right=True),
        "seconds": lambda rows, w: _share([r.seconds for r in rows], w),
    }
    readers, cases = sorted({r.reader for r in found}), sorted({r.case for r in found})
    weights = _weights(found, readers, cases, draws)
    table: dict[str, dict[str, Estimate]] = {}
    first: np.ndarray | None = None
    for arm in study.design.arms:
        inside = np.array([r.arm == arm for r in found])
        rows = [r for r in found if r.arm == arm]
        values = {
            name: np.array([measure(rows, w[inside]) for w in weights])
            for name, measure in measures.items()
            if "reliance" not in name or "ai" in parts(arm)
        }
        first = values["accuracy"] if first is None else first
        values[f"accuracy beyond {study.design.arms[0]}"] = values["accuracy"] - first
        table[arm] = {name: _estimate(value) for name, value in values.items()}
        agreed = alpha([[r.answer for r in rows if r.case == case] for case in cases])
        table[arm]["agreement"] = Estimate(agreed, np.nan, np.nan)
    return table


def write(study: Study, found: Sequence[Reading], folder: Path) -> None:
    """Write `readings.csv` (a row for each answer), `columns.csv` (what its columns mean), and `imrmc.csv`: the data
    frame of the R package iMRMC (FDA) for multi-reader multi-case analysis, in which the reader "truth" says what is
    true, of the modality "truth"."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(Reading.__dataclass_fields__)
    write_rows(folder / "readings.csv", names, ([getattr(row, name) for name in names] for row in found))
    write_rows(folder / "columns.csv", ["column", "meaning"], _COLUMNS.items())
    sought = study.design.answers[-1]
    truth = [("truth", case.uid, "truth", int(case.truth == sought)) for case in study.cases]
    heads = ["readerID", "caseID", "modalityID", "score"]
    write_rows(folder / "imrmc.csv", heads, [*truth, *((r.reader, r.case, r.arm, r.rating) for r in found)])


def alpha(units: Sequence[Sequence[str]]) -> float:
    """Krippendorff's alpha of nominal answers, those to each case together; NaN where nobody can agree."""
    units = [unit for unit in units if len(unit) > 1]
    names = sorted({answer for unit in units for answer in unit})
    counts = np.array([[unit.count(name) for name in names] for unit in units], float).reshape(len(units), len(names))
    of_unit = counts.sum(1, keepdims=True)
    total = counts.sum(0)
    n = total.sum()
    expected = n**2 - (total**2).sum()
    if not expected:
        return float("nan")
    observed = ((of_unit**2).sum(1) - (counts**2).sum(1)) / (of_unit[:, 0] - 1)
    return float(1 - (n - 1) * observed.sum() / expected)


def _weights(found: Sequence[Reading], readers: Sequence[str], cases: Sequence[str], draws: int) -> list[np.ndarray]:
    """How often each answer counts: once at first, then as often as its reader and its case were drawn."""
    generator = np.random.default_rng(0)
    of_reader = np.array([readers.index(r.reader) for r in found])
    of_case = np.array([cases.index(r.case) for r in found])
    drawn = [np.ones(len(found))]
    for _ in range(draws):
        a, b = (np.bincount(generator.integers(n, size=n), minlength=n) for n in (len(readers), len(cases)))
        drawn.append((a[of_reader] * b[of_case]).astype(float))
    return drawn


def _estimate(values: np.ndarray) -> Estimate:
    drawn = values[1:][~np.isnan(values[1:])]
    low, high = np.percentile(drawn, (2.5, 97.5)) if drawn.size else (np.nan, np.nan)
    return Estimate(float(values[0]), float(low), float(high))


def _share(values: Sequence[float], weights: np.ndarray) -> float:
    total = weights.sum()
    return float((np.asarray(values, float) * weights).sum() / total) if total else float("nan")


def _followed(rows: Sequence[Reading], weights: np.ndarray, right: bool) -> float:
    chosen = np.array([(r.ai == r.truth) == right for r in rows], bool)
    return _share([r.answer == r.ai for r, yes in zip(rows, chosen, strict=True) if yes], weights[chosen])


def _auc(rows: Sequence[Reading], weights: np.ndarray, sought: str) -> float:
    """A reader's ratings are compared with that reader's own only; the mean over readers, by how much they read."""
    of_reader, ratings = np.array([r.reader for r in rows]), np.array([r.rating for r in rows])
    positive = np.array([r.truth == sought for r in rows], bool)
    areas, read_by = [], []
    for reader in sorted(set(of_reader)):
        own = of_reader == reader
        yes, no = own & positive, own & ~positive
        pairs = np.outer(weights[yes], weights[no])
        if pairs.any():
            above = (1 + np.sign(np.subtract.outer(ratings[yes], ratings[no]))) / 2
            areas.append((above * pairs).sum() / pairs.sum())
            read_by.append(weights[own].sum())
    return float(np.average(areas, weights=read_by)) if areas else float("nan")


_COLUMNS = {
    "reader": "pseudonym of the reader",
    "case": "uid of the case",
    "arm": "what was shown, see the design",
    "session": "1, 2 ...: in a crossover one for each arm, in the order of the reader",
    "trial": "place in the reader's order, those to practise on counted",
    "truth": "what is true of the case",
    "ai": "what the network answers",
    "answer": "what the reader answered",
    "confidence": "how sure the reader was, 0 to 100",
    "rating": "the confidence, negative where the answer was not the one sought: -100 to 100",
    "seconds": "from seeing the case to the answer",
    "x": "where the reader pointed, RAS mm: to the right of the patient (negative: to the left)",
    "y": "where the reader pointed, RAS mm: to anterior",
    "z": "where the reader pointed, RAS mm: to superior",
    "looks": "how often the reader turned an overlay on or off",
    "at": "when it was answered, UTC",
}
