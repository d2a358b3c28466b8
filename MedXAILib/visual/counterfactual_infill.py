"""What if this region were something else, such as healthy?

Chang et al., "Explaining image classifiers by counterfactual generation", 2019; Lenis et al., "Domain aware medical
image classifier interpretation by counterfactual impact analysis", 2020.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field, PlainSerializer, PlainValidator, WithJsonSchema
from torch import Tensor

from MedXAILib.engines.boxes import put
from MedXAILib.engines.masks import Masks, Stream
from MedXAILib.engines.perturbation import perturb
from MedXAILib.engines.shapley import student
from MedXAILib.errors import MedXAIError
from MedXAILib.explainer import Attribution, Question, Taxonomy, perturbation
from MedXAILib.infills.choice import InfillChoice, infill
from MedXAILib.infills.local_mean import dilated
from MedXAILib.visual.log_odds import log_odds
from MedXAILib.visual.perturbing import Perturbing
from MedXAILib.volume import Volume, load_volume
from MedXAILib.within import mask_on


def _place(value: Any) -> str | Volume | tuple[tuple[float, ...], ...]:
    if value is None or isinstance(value, Volume) or (isinstance(value, str) and not value):
        return value or ""
    if isinstance(value, (str, Path)) and Path(value).exists():
        return str(value)
    try:
        numbers = [float(n) for n in value.split(",")] if isinstance(value, str) else value
        box = np.asarray(numbers, dtype=np.float64).reshape(2, -1)
    except (TypeError, ValueError):
        box = np.full((2, 0), np.nan)
    if box.shape[1] not in (2, 3) or not np.isfinite(box).all():
        raise ValueError("a place is the file of a mask, a Volume, or a box ((x0, y0, z0), (x1, y1, z1)) in RAS mm")
    return tuple(tuple(corner) for corner in box.tolist())


Place = Annotated[
    Any,
    PlainValidator(_place),
    PlainSerializer(lambda place: f"volume {place.fingerprint}" if isinstance(place, Volume) else place),
    WithJsonSchema({"type": "string", "format": "region"}),
    Field(description="what to replace: a mask in the space of the scan, or a box x0,y0,z0,x1,y1,z1 in RAS mm"),
]


class CounterfactualInfill(Perturbing):
    """What would the decision be if this region were something else, such as what is around it, or healthy?

    The whole region gets how much of the score is lost without it.
    """

    id: ClassVar[str] = "counterfactual_infill"
    title: ClassVar[str] = "What if this region were replaced"
    paper: ClassVar[str] = "Chang 2019"
    taxonomy: ClassVar[Taxonomy] = perturbation(
        strengths="the plainest question there is, answered at once, about a region one has a reason to ask about",
        limits="says nothing about other regions; only as good as what is put there",
    )

    within: Place = ""
    margin: float = Field(
        0.0, ge=0, description="by how much to grow the region, in mm: what is left at its rim tells what was there"
    )
    infill: InfillChoice = "inpaint"
    samples: int = Field(10, ge=1, le=1000, description="draws of what is put there, if it is random")

    def of_sample(self, question: Question) -> list[Attribution]:
        masks = replaced(question, self.within, self.margin)
        putting = infill(question, self.infill)
        samples = self.samples if putting.random else 1
        odds = log_odds(question)
        likely = [target for target in odds if target is not None]
        asked = replace(question, targets=[*question.targets, *likely], bound=[]) if likely else question
        said: list[Tensor] = []

        def take(_start: int, _masks: Masks, values: list[Tensor]) -> None:
            said.append(torch.stack(values).double().cpu())

        stream = Stream(samples, masks.box, lambda start, stop: _repeated(masks, stop - start))
        at_sample, _ = perturb(asked, stream, putting, take, self.title)
        before, after = torch.stack(at_sample).double().cpu(), torch.cat(said, 1)
        rows = iter(range(len(odds), len(asked.targets)))
        for t, (bound, of_target) in enumerate(zip(question.bound, odds, strict=True)):
            row = t if of_target is None else next(rows)
            question.run.note(_said(bound.label, before[row], after[row], of_target is not None))
        count = after.shape[1]
        half = student(count - 1) * after.std(1) / count**0.5 if count > 1 else None
        return [
            Attribution(
                _painted(question.x, masks, lost), {}, None if half is None else _painted(question.x, masks, half[t])
            )
            for t, lost in enumerate((before - after).mean(1)[: len(odds)])
        ]


def replaced(question: Question, within: Any, margin: float) -> Masks:
    """The mask of the voxels of `question`'s one sample that are to be replaced, in the box around them: those `within`
    a place and at most `margin` mm from one that is, along each axis.

    Raises:
        MedXAIError: when it is not said which, or there are none.
    """
    if not isinstance(within, Volume) and not within:
        raise MedXAIError(
            "Say what to replace: within= a mask (a file or a Volume), or a box ((x0, y0, z0), (x1, y1, z1)) in RAS mm."
        )
    x, seen = question.x, question.seen[0]
    place = load_volume(within) if isinstance(within, str) else within
    axes = len(place.shape) if isinstance(place, Volume) else len(place[0])
    if axes != x.ndim - 2:
        raise MedXAIError(f"What to replace has {axes} axes and the scan {x.ndim - 2}: draw it in the scan.")
    there = mask_on(seen, place, x.shape[2:])
    if not there.any():
        raise MedXAIError(
            "There is nothing to replace: the mask is empty, or the place lies outside of what the network sees, or "
            "between its voxels. Draw it in this scan, or move the region that the network looks at."
        )
    if margin:
        reach = [int(margin / step + 1e-6) for step in seen.spacing]
        there = dilated(there[None, None].float(), reach)[0, 0] > 0
    voxels = there.nonzero()
    low, high = voxels.amin(0), voxels.amax(0) + 1
    part = there[tuple(slice(a, b) for a, b in zip(low.tolist(), high.tolist(), strict=True))]
    return Masks(low[None], part[None, None].to(x))


def _repeated(masks: Masks, count: int) -> Masks:
    return Masks(masks.low.expand(count, -1), masks.share.expand(count, *masks.share.shape[1:]))


def _painted(x: Tensor, masks: Masks, value: Tensor) -> Tensor:
    """`value` where the mask is in a map (1, 1, *spatial) of a sample `x`, else zero."""
    painted = torch.zeros_like(x[:, :1])
    put(painted, torch.zeros_like(masks.low), masks.share * value.to(x), masks.low)
    return painted


def _said(label: str, before: Tensor, after: Tensor, odds: bool) -> str:
    """In words what was `before` (1,), and is `after` (M,) on average, of log-odds or of a score."""
    if odds:
        was, now = (f"{float(value.sigmoid().mean()):.2f}" for value in (before, after))
    else:
        was, now = (f"{float(value.mean()):.3g}" for value in (before, after))
    drawn = f" (the mean of {len(after)} draws)" if len(after) > 1 else ""
    return f"{label}: {was} → {now} with this region replaced{drawn}."
