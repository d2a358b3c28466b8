"""Gradient SHAP, or expected gradients.

Lundberg and Lee, "A unified approach to interpreting model predictions", 2017; Erion et al., "Improving performance of
deep learning models with axiomatic attribution priors and expected gradients", 2021.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from MedXAILib.engines.input_gradients import each_gradient
from MedXAILib.explainer import Question, Taxonomy, backpropagation
from MedXAILib.visual.background import AgainstBackground, Compare


class GradientSHAP(AgainstBackground):
    """How does each voxel's change from a whole set of other scans add up to the change of the decision?

    Integrated gradients, averaged over the baselines and estimated from gradients at random points between them and the
    scan. Every baseline has as many points, one in each equal part of its way to the scan, and no two baselines have
    theirs at the same depth of a part: the map varies about half as much as with points drawn without this order.
    """

    id: ClassVar[str] = "gradient_shap"
    title: ClassVar[str] = "Gradient SHAP"
    paper: ClassVar[str] = "Lundberg 2017"
    taxonomy: ClassVar[Taxonomy] = backpropagation(
        strengths="does not hang on a single baseline; full resolution, any differentiable network",
        limits="an estimate that varies with the seed; depends on the background; tens of gradients",
    )
    unaccounted: ClassVar[str] = (
        "take more samples, or another background if the score hardly differs between it and the scan"
    )

    samples: int = Field(
        40, ge=1, le=10000, description="random points to average over, rounded up to as many for each baseline"
    )
    noise: float = Field(
        0.0, ge=0, le=1, description="noise added to the points, as a fraction of each channel's range of values"
    )

    def comparing(self, question: Question) -> tuple[list[Tensor], Compare]:
        with torch.no_grad():
            return question.values(question.x), lambda start, index, count: self._against(question, start, index, count)

    def _against(self, question: Question, start: Tensor, index: int, count: int) -> list[tuple[Tensor, Tensor]]:
        x, each = question.x, -(-self.samples // count)
        difference, flat = x - start, x.flatten(2)
        spread = (flat.amax(2) - flat.amin(2)).reshape(*x.shape[:2], *[1] * (x.ndim - 2))
        sums = [torch.zeros_like(x) for _ in question.targets]
        place = int(torch.randperm(count, generator=question.run.generator(count * each))[index])

        def make(i: int) -> Tensor:
            # One draw serves every sample of a batch, so that a sample's map does not depend on its place there.
            generator = question.run.generator(index * each + i)
            depth = ((place + i) % count + float(torch.rand((), generator=generator))) / count
            point = start + difference * ((i + depth) / each)
            if self.noise:
                point = point + self.noise * spread * torch.randn(x.shape[1:], generator=generator).to(x)
            return point

        def take(gradients: list[Tensor]) -> None:
            for total, gradient in zip(sums, gradients, strict=True):
                total += gradient

        with torch.no_grad():
            at_start = question.values(start)
        each_gradient(question, range(each), make, take, f"{self.title}: baseline {index + 1} of {count}")
        return [(difference * total / each, value) for total, value in zip(sums, at_start, strict=True)]
