"""Which infill: the parameter that every perturbation method has. A new infill is a file of its own and a line here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PlainSerializer, PlainValidator, WithJsonSchema

from MedXAILib.errors import unknown
from MedXAILib.explainer import Question
from MedXAILib.infills.fixed import Fixed
from MedXAILib.infills.infill import Infill
from MedXAILib.visual.baseline import KINDS as BASELINES
from MedXAILib.visual.baseline import baseline
from MedXAILib.volume import Volume


def _baseline(kind: str) -> Callable[[Question], Infill]:
    return lambda question: Fixed(question, baseline(question, kind))


INFILLS: dict[str, Callable[[Question], Infill]] = {kind: _baseline(kind) for kind in BASELINES}


def _valid(value: Any) -> str | Volume:
    if isinstance(value, (str, Path)) and str(value) not in INFILLS and not Path(value).exists():
        raise ValueError(str(unknown("infill or file", value, INFILLS)))
    if not isinstance(value, (str, Path, Volume)):
        raise ValueError(f"an infill is one of {', '.join(INFILLS)}, a file, or a Volume")
    return value if isinstance(value, Volume) else str(value)


InfillChoice = Annotated[
    Any,
    PlainValidator(_valid),
    PlainSerializer(lambda b: b if isinstance(b, str) else f"volume {b.fingerprint}", return_type=str),
    WithJsonSchema({"type": "string", "examples": list(INFILLS)}),
    Field(description="what stands in for the voxels that are taken away"),
]


def infill(question: Question, choice: str | Volume) -> Infill:
    """The infill that a person chose, for `question`'s one sample."""
    if isinstance(choice, str) and choice in INFILLS:
        return INFILLS[choice](question)
    return Fixed(question, baseline(question, choice))
