"""Occlusion sensitivity.

Zeiler and Fergus, "Visualizing and understanding convolutional networks", 2014.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from MedXAILib.engines.masks import Masks, Stream
from MedXAILib.engines.perturbation import perturb
from MedXAILib.engines.windows import add, windows
from MedXAILib.explainer import Attribution, Question, Taxonomy, perturbation
from MedXAILib.infills.choice import infill
from MedXAILib.visual.perturbing import Perturbing


class Occlusion(Perturbing):
    """How much of the decision is lost when a small window of the scan is covered? Every place is tried.

    A voxel gets the mean loss over the windows that cover it. Windows come coarsely spread first, so that the map is
    there early and then refines.
    """

    id: ClassVar[str] = "occlusion"
    title: ClassVar[str] = "Occlusion sensitivity"
    paper: ClassVar[str] = "Zeiler & Fergus 2014"
    taxonomy: ClassVar[Taxonomy] = perturbation(
        strengths="plain meaning, any network, no gradients",
        limits="as coarse as its windows; misses what only several places together change; covered scans look odd",
    )

    window: tuple[float, ...] = Field(
        (), description="size of the window in mm, for all axes or each; a sixth of the shortest side if empty"
    )
    stride: tuple[float, ...] = Field((), description="step between windows in mm; the window's own size if empty")

    def of_sample(self, question: Question) -> list[Attribution]:
        x = question.x
        box, low = windows(x.shape[2:], question.seen[0].spacing, self.window, self.stride)
        totals, covered = [torch.zeros_like(x[:, :1]) for _ in question.targets], torch.zeros_like(x[:, :1])

        def take(start: int, masks: Masks, values: list[Tensor]) -> None:
            for total, of_sample, value in zip(totals, at_sample, values, strict=True):
                add(total, masks.low, box, of_sample - value)
            add(covered, masks.low, box, torch.ones(len(masks)))
            question.show(lambda: totals[0] / covered.clamp_min(1))

        with torch.no_grad():
            at_sample = question.values(x)
        stream = Stream(len(low), box, lambda start, stop: Masks.boxes(low[start:stop], box, x))
        perturb(question, stream, infill(question, self.infill), take, self.title)
        return [Attribution(total / covered.clamp_min(1)) for total in totals]
