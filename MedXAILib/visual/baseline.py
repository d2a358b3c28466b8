"""What a scan is compared with: an input that says nothing about the target."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, PlainSerializer, PlainValidator, WithJsonSchema
from torch import Tensor
from torch.nn import functional

from MedXAILib.errors import unknown
from MedXAILib.explainer import Question
from MedXAILib.grid import resample
from MedXAILib.volume import Volume, load_volume

KINDS = ("zero", "minimum", "mean", "blur")

_BLUR_MM = 6.0


def _valid(value: Any) -> str | Volume:
    if isinstance(value, (str, Path)) and str(value) not in KINDS and not Path(value).exists():
        raise ValueError(str(unknown("baseline or file", value, KINDS)))
    if not isinstance(value, (str, Path, Volume)):
        raise ValueError(f"a baseline is one of {', '.join(KINDS)}, a file, or a Volume")
    return value if isinstance(value, Volume) else str(value)


Baseline = Annotated[
    Any,
    PlainValidator(_valid),
    PlainSerializer(lambda b: b if isinstance(b, str) else f"volume {b.fingerprint}", return_type=str),
    WithJsonSchema({"type": "string", "examples": list(KINDS)}),
    Field(
        description="what the scan is compared with: zero, its minimum, its mean, itself blurred (6 mm), or a scan "
        "such as a mean or healthy atlas in the same space"
    ),
]


def baseline(question: Question, kind: str | Volume) -> Tensor:
    """The baseline of `question`'s samples, (N, C, *spatial)."""
    x = question.x
    if kind == "zero":
        return torch.zeros_like(x)
    if kind == "minimum":
        return x.flatten(2).amin(2).reshape(*x.shape[:2], *[1] * (x.ndim - 2)).expand_as(x).clone()
    if kind == "mean":
        return x.flatten(2).mean(2).reshape(*x.shape[:2], *[1] * (x.ndim - 2)).expand_as(x).clone()
    if kind == "blur":
        return torch.stack([blurred(one, seen.spacing) for one, seen in zip(x, question.seen, strict=True)])
    volume = kind if isinstance(kind, Volume) else load_volume(kind)
    whole = question.model.preprocess(volume)
    return torch.stack([resample(whole.x, whole.affine, s.x.shape[1:], s.affine) for s in question.seen]).to(x)


def completeness(question: Question, values: Tensor, change: Tensor, within: float, otherwise: str) -> dict[str, float]:
    """By how much `values` (M, C, *spatial) miss the `change` of the score (M,) from a baseline, relative to it (the
    worst sample's). More than `within` is said, and what it comes from or what to do, `otherwise`."""
    missed = float(((values.flatten(1).sum(1) - change).abs() / change.abs().clamp_min(1e-12)).max())
    if missed > within:
        question.run.note(f"{missed:.0%} of the change of the score is not accounted for: {otherwise}.")
    return {"completeness": missed}


def blurred(x: Tensor, spacing: tuple[float, ...], sigma_mm: float = _BLUR_MM) -> Tensor:
    """`x` (C, *spatial) smoothed by a Gaussian of `sigma_mm`, the border value held beyond the border."""
    for axis, step in enumerate(spacing, start=1):
        radius = max(1, min(round(3 * sigma_mm / step), x.shape[axis] - 1))
        tap = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device) * step
        kernel = torch.exp(-0.5 * (tap / sigma_mm) ** 2)
        rows = x.movedim(axis, -1)
        padded = functional.pad(rows.reshape(-1, 1, rows.shape[-1]), (radius, radius), mode="replicate")
        smooth = functional.conv1d(padded, (kernel / kernel.sum())[None, None])
        x = smooth.reshape(rows.shape).movedim(-1, axis)
    return x
