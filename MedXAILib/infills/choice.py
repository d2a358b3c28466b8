"""Which infill: the parameter that every perturbation method has. A new infill is a file of its own and a line here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, PlainSerializer, PlainValidator, TypeAdapter, WithJsonSchema

from MedXAILib.errors import unknown
from MedXAILib.explainer import Question
from MedXAILib.infills.conditional_gaussian import ConditionalGaussian
from MedXAILib.infills.fixed import Fixed
from MedXAILib.infills.healthy_tissue import HealthyLung
from MedXAILib.infills.infill import Infill
from MedXAILib.infills.inpainting import Inpainting
from MedXAILib.infills.local_mean import LocalMean
from MedXAILib.infills.noise import Noise
from MedXAILib.visual.background import Background, baselines
from MedXAILib.visual.baseline import KINDS as BASELINES
from MedXAILib.visual.baseline import baseline
from MedXAILib.volume import Volume


def _baseline(kind: str) -> Callable[[Question], Infill]:
    return lambda question: Fixed(question, baseline(question, kind))


INFILLS: dict[str, Callable[[Question], Infill]] = {
    **{kind: _baseline(kind) for kind in BASELINES},
    "local_mean": LocalMean,
    "noise": Noise,
    "gaussian": ConditionalGaussian,
    "inpaint": Inpainting,
    "healthy": HealthyLung,
}

# What begins an infill that is fitted to scans; their files follow.
_FITTED = "gaussian:"


def _valid(value: Any) -> str | Volume:
    if isinstance(value, Volume):
        return value
    if not isinstance(value, (str, Path)):
        raise ValueError(f"an infill is one of {', '.join(INFILLS)}, a file, or a Volume")
    if str(value).startswith(_FITTED):
        # Only to complain about files that are not there; one that has no name is no cohort.
        TypeAdapter(Background).validate_python(str(value).removeprefix(_FITTED) or "no file")
    elif str(value) not in INFILLS and not Path(value).exists():
        raise ValueError(str(unknown("infill or file", value, INFILLS)))
    return str(value)


InfillChoice = Annotated[
    Any,
    PlainValidator(_valid),
    PlainSerializer(lambda b: b if isinstance(b, str) else f"volume {b.fingerprint}", return_type=str),
    WithJsonSchema({"type": "string", "examples": list(INFILLS)}),
    Field(
        description="what stands in for the voxels that are taken away: zero, the scan's minimum or mean, the scan "
        "blurred (6 mm), the mean of what is around them, noise, draws from a Gaussian given what is around them "
        "(fitted to the scan, or to others: gaussian:healthy/*.nii.gz), what is smoothest (inpaint), healthy lung (of "
        "lung CT only), or another scan"
    ),
]


def infill(question: Question, choice: str | Volume) -> Infill:
    """The infill that a person chose, for `question`'s one sample."""
    if isinstance(choice, str) and choice in INFILLS:
        return INFILLS[choice](question)
    if isinstance(choice, str) and choice.startswith(_FITTED):
        files = TypeAdapter(Background).validate_python(choice.removeprefix(_FITTED))
        return ConditionalGaussian(question, torch.cat([scan for _, scan in baselines(question, files, len(files))]))
    return Fixed(question, baseline(question, choice))
