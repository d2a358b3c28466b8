"""Occlusion sensitivity.

Zeiler and Fergus, "Visualizing and understanding convolutional networks", 2014.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from MedXAILib.engines.masks import Masks, Stream
from MedXAILib.engines.parts import window_parts
from MedXAILib.engines.perturbation import perturb
from MedXAILib.engines.screening import strongest
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

    top: int = Field(
        0,
        ge=0,
        description="ask exactly only about the windows that are likely among so many strongest; of the others the map "
        "has estimates; 0 asks about all",
    )

    def of_sample(self, question: Question) -> list[Attribution]:
        x = question.x
        parts = window_parts(x, question.seen[0].spacing, self.window, self.stride)
        lost = torch.zeros(parts.count, len(question.targets), dtype=torch.float64)
        known = torch.zeros(parts.count, dtype=torch.bool)

        def painted(lost: Tensor, known: Tensor) -> Tensor:
            return (parts.paint(lost * known) / parts.paint(known.double()).clamp_min(1)).to(x)

        def show(lost: Tensor, known: Tensor) -> None:
            question.show(lambda: painted(lost, known))

        with torch.no_grad():
            at_sample = torch.stack(question.values(x), 1).double().cpu()

        def take(start: int, masks: Masks, values: list[Tensor]) -> None:
            some = slice(start, start + len(masks))
            lost[some], known[some] = at_sample - torch.stack(values, 1).double().cpu(), True
            show(lost[:, 0], known)

        stream = Stream(parts.count, parts.box, lambda start, stop: parts.masks(torch.arange(start, stop)))
        instead = infill(question, self.infill)
        found = strongest(question, stream, instead, self.top, show, self.title) if self.top else None
        if found is not None:
            question.run.note(found.said)
            lost, known = found.lost, torch.ones_like(known)
        else:
            perturb(question, stream, instead, take, self.title)
        return [Attribution(painted(of_target, known)) for of_target in lost.T]
