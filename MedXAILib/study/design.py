"""A reader study: who reads which scans, and what of the network's answer and its explanations they are shown."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from MedXAILib.errors import MedXAIError, unknown
from MedXAILib.table import Row, read_rows

PARTS = ("none", "ai", "map", "text", "cases", "prototypes", "placebo")
"""What an arm may show: nothing, the network's answer, its map, words, similar cases, prototypes, or the map of another
scan in the place of its own. An arm is one of them, or several with + between, as "ai+map"."""

_COLUMNS = ("uid", "volume", "truth", "answer")
_OF_PART = {"map": "map", "text": "text", "cases": "cases", "prototypes": "prototypes", "placebo": "placebo"}

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,32}$")]


class Case(BaseModel):
    """A scan of the study: its file, what is true of it, what the network answers with which score (0 to 1), and the
    folders of the explanations that arms show."""

    model_config = ConfigDict(frozen=True)

    uid: str
    volume: Path
    truth: str
    answer: str
    score: float | None = None
    training: bool = False
    explanations: dict[str, Path] = {}

    @property
    def stratum(self) -> tuple[str, bool]:
        """What has to be as frequent in every arm: the truth, and whether the network is right."""
        return self.truth, self.answer == self.truth


class Design(BaseModel):
    """What a study asks, of whom, and in which arms.

    In a "crossover" every reader sees every case in every arm, an arm at a time, `washout_days` apart; in a "split"
    every reader sees every case once, in one of the arms. `answers` are what readers choose from; the last one is that
    which is to be found. At least `wrong` of the cases are such that the network is wrong about them: otherwise nobody
    can see whether readers rely on it too much.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    question: str
    answers: Annotated[tuple[str, ...], Field(min_length=2)]
    arms: Annotated[tuple[str, ...], Field(min_length=1)]
    readers: Annotated[tuple[Name, ...], Field(min_length=1)]
    cases: Path
    kind: Literal["crossover", "split"] = "crossover"
    seed: int = 0
    washout_days: Annotated[float, Field(ge=0)] = 28
    wrong: Annotated[float, Field(ge=0, le=1)] = 0.25
    seconds: Annotated[float | None, Field(gt=0)] = None
    localise: bool = False


class Study:
    """A design with its cases, and where it came from."""

    def __init__(self, path: Path, design: Design, cases: Sequence[Case]) -> None:
        self.path, self.design = path, design
        self.training = [case for case in cases if case.training]
        self.cases = [case for case in cases if not case.training]

    @property
    def fingerprint(self) -> str:
        """Of all that decides who sees what, and when."""
        told = [self.design.model_dump_json(exclude={"cases"})]
        told += [case.model_dump_json(exclude={"volume", "explanations"}) for case in (*self.training, *self.cases)]
        return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]


def read_study(path: str | Path) -> Study:
    """The study of a design file (JSON, with the fields of `Design`) and its table of cases (CSV, a row for each scan).

    The columns of the table are `uid`, `volume`, `truth`, the network's `answer`, and if wanted its `score`, `training`
    ("yes" for what readers practise on), and `map`, `text`, `cases`, `prototypes` and `placebo`: the folders of saved
    explanations that the arms show. Paths begin where the file is that names them.

    Raises:
        MedXAIError: naming what is wrong in the design or the table, and what would be right.
    """
    path = Path(path)
    try:
        design = Design(**json.loads(path.read_text(encoding="utf-8-sig")))
    except OSError as error:
        raise MedXAIError(f"'{path}' cannot be read ({error.strerror}): give the design of a study.") from error
    except (ValueError, TypeError) as error:
        raise MedXAIError(f"'{path}' is no design of a study: {_first(error)}.") from error
    _check_names(path, design)
    rows = read_rows(path.parent / design.cases)
    study = Study(path, design, [_case(row, design) for row in rows])
    _check_cases(study)
    return study


def parts(arm: str) -> tuple[str, ...]:
    """What an arm shows."""
    return tuple(part for part in arm.split("+") if part != "none")


def _first(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"


def _check_names(path: Path, design: Design) -> None:
    for what in ("answers", "arms", "readers"):
        # Readers are files, and on many disks R1 is r1.
        names = [name.lower() if what == "readers" else name for name in getattr(design, what)]
        name, count = Counter(names).most_common(1)[0]
        if count > 1:
            raise MedXAIError(f"'{path}': '{name}' is twice among the {what}: name each once.")
    for arm in design.arms:
        for part in arm.split("+"):
            if part not in PARTS:
                raise unknown(f"part of the arm '{arm}'", part, PARTS)


def _case(row: Row, design: Design) -> Case:
    for column in _COLUMNS:
        if not row[column]:
            raise row.wrong(column, "it is empty: fill it in.")
    for column in ("truth", "answer"):
        if row[column] not in design.answers:
            raise row.wrong(column, str(unknown("answer", row[column], design.answers)))
    shown: dict[str, Path] = {}
    for part in sorted({part for arm in design.arms for part in parts(arm) if part in _OF_PART}):
        folder = row.file(_OF_PART[part])
        if folder is None:
            raise row.wrong(_OF_PART[part], "it is empty, and an arm shows it: give the folder of the explanation.")
        shown[part] = folder
    own, placebo = row.file("map"), shown.get("placebo")
    if own and placebo and _explained(own) == _explained(placebo):
        raise row.wrong("placebo", "it is of the same scan as the map: give the map of another scan.")
    return Case(
        uid=row["uid"],
        volume=row.volume,
        truth=row["truth"],
        answer=row["answer"],
        score=row.number_in("score") if row["score"] else None,
        training=row["training"].lower() in ("yes", "true", "1"),
        explanations=shown,
    )


def _explained(folder: Path) -> str:
    """Which scan an explanation is of; where that is not said, the folder itself."""
    try:
        made = json.loads((folder / "explanation.json").read_text(encoding="utf-8"))["provenance"]
        return str(made["volume"]["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return str(folder.resolve())


def _check_cases(study: Study) -> None:
    table = study.path.parent / study.design.cases
    uid, count = Counter(case.uid for case in (*study.cases, *study.training)).most_common(1)[0]
    if count > 1:
        raise MedXAIError(f"'{table}': {count} cases are called '{uid}': give each a uid of its own.")
    if not study.cases:
        raise MedXAIError(f"'{table}' has no case beside those to practise on: add some.")
    wrong = sum(case.truth != case.answer for case in study.cases) / len(study.cases)
    if wrong < study.design.wrong and any("ai" in parts(arm) for arm in study.design.arms):
        raise MedXAIError(
            f"The network is wrong about {wrong:.0%} of the cases in '{table}', and the design wants "
            f"{study.design.wrong:.0%}: add cases about which it is wrong, or lower 'wrong'."
        )
