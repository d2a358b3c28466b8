"""What is to be computed for a cohort: every case by every method. The plan is a file, and all else follows from it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from MedXAILib.cohort.inputs import settled
from MedXAILib.durable import write_durably
from MedXAILib.errors import MedXAIError, unknown
from MedXAILib.loading import is_code

PLAN = "plan.json"


@dataclass(frozen=True)
class Subject:
    """A case: its scan (one file or folder, or several as channels), where the network looks (RAS mm), what is asked of
    it (None: what is predicted), the `transform` (a file) from the template to it, the `anatomy` (a mask's file) in
    which lies what should matter, and what else is known of it."""

    uid: str
    volume: tuple[str, ...]
    region: tuple[float, float, float] | None = None
    target: str | None = None
    transform: str | None = None
    anatomy: str | None = None
    meta: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Unit:
    """One case by one method. Its `key` is a hash of all that is asked; of the scan it has the path."""

    key: str
    subject: Subject
    method: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class Plan:
    """`model` is a path or shipped name, `fingerprint` that of the network it was planned with; `methods` their
    parameters by id. `code` is the folder that a model in Python is imported from, unless it is installed."""

    model: str
    fingerprint: str
    methods: Mapping[str, Mapping[str, Any]]
    subjects: tuple[Subject, ...]
    seed: int = 0
    trust: bool = False
    code: str | None = None

    def units(self) -> Iterator[Unit]:
        """All units, those of one method after each other."""
        for method, parameters in self.methods.items():
            for subject in self.subjects:
                what = [self.fingerprint, method, dict(parameters), self.seed]
                told = [subject.volume, subject.region, subject.target, *what]
                key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:20]
                yield Unit(key, subject, method, parameters)

    def save(self, folder: Path) -> Path:
        """Write it to `folder`, where its results will be.

        Raises:
            MedXAIError: when there is another plan, or the folder cannot be written.
        """
        path = folder / PLAN
        text = json.dumps({"format": 1, **asdict(self)}, indent=1, ensure_ascii=False)
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise MedXAIError(f"'{folder}' holds another plan: go on with that one, or choose another folder.")
        write_durably(path, text)
        return path


def make_plan(
    model: str,
    fingerprint: str,
    methods: Mapping[str, Mapping[str, Any]],
    subjects: Sequence[Subject],
    seed: int = 0,
    trust: bool = False,
) -> Plan:
    """A plan whose methods exist and whose cases are told apart.

    Raises:
        MedXAIError: for an unknown method or parameter, two cases of one name, and when there is nothing to do.
    """
    methods = {method: settled(method, parameters) for method, parameters in methods.items()}
    for uid, count in Counter(subject.uid for subject in subjects).items():
        if count > 1:
            raise MedXAIError(f"{count} cases are called '{uid}': give each a uid of its own.")
    if not subjects or not methods:
        raise MedXAIError("There is nothing to compute: give at least one case and one method.")
    # It may be computed from elsewhere.
    model = str(Path(model).resolve()) if Path(model).exists() else model
    return Plan(model, fingerprint, methods, tuple(subjects), seed, trust, _code(model))


def read_plan(folder: str | Path) -> Plan:
    """The plan in `folder`.

    Raises:
        MedXAIError: when there is none, or a damaged one.
    """
    path = Path(folder) / PLAN
    try:
        text = path.read_text(encoding="utf-8")
        if json.loads(text)["format"] != 1:
            raise ValueError("made by a newer MedXAI")
        return TypeAdapter(Plan).validate_json(text)
    except OSError as error:
        raise MedXAIError(f"'{folder}' holds no plan of a cohort: 'medxai cohort plan' makes one.") from error
    except ValidationError as error:
        first = error.errors()[0]
        wrong = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise MedXAIError(f"'{path}' is damaged ({wrong}): make the plan again.") from error
    except (ValueError, LookupError, TypeError) as error:
        raise MedXAIError(f"'{path}' is damaged ({error}): make the plan again.") from error


@lru_cache(maxsize=2)
def units_of(folder: str) -> dict[str, tuple[Plan, Unit]]:
    """The units of the plan in `folder` by key, each with the plan; read once by a process."""
    plan = read_plan(folder)
    return {unit.key: (plan, unit) for unit in plan.units()}


def unit_of(folder: str, key: str) -> tuple[Plan, Unit]:
    """A unit of the plan in `folder`.

    Raises:
        MedXAIError: when it has none of that key.
    """
    units = units_of(folder)
    if key not in units:
        raise unknown("unit", key, units)
    return units[key]


def _code(model: str) -> str | None:
    """The current folder, if it is from there that `model`, "package.module:function", is imported."""
    here = Path.cwd()
    if not is_code(model):
        return None
    top = find_spec(model.partition(":")[0].partition(".")[0])
    places = [] if top is None else [top.origin, *(top.submodule_search_locations or ())]
    return str(here) if any(place and Path(place).parent == here for place in places) else None
