"""Integrated gradients.

Sundararajan, Taly, Yan, "Axiomatic attribution for deep networks", 2017; in the survey used by Papanastopoulos 2020.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from MedXAILib.engines.input_gradients import each_gradient
from MedXAILib.explainer import Attribution, Question, Taxonomy, backpropagation
from MedXAILib.visual.baseline import Baseline, baseline, completeness
from MedXAILib.visual.smoothing import Smoothable

# A completeness residual beyond this is said in words.
_COMPLETE = 0.05


class IntegratedGradients(Smoothable):
    """How does each voxel's change from a baseline add up to the change of the decision?

    The path integral is a midpoint rule whose points are kept when it is refined (n, 3n, 9n …), because a network of
    ReLUs is not smooth enough for Gauss-Legendre to pay. It stops when refining no longer changes the map: the sum
    alone (completeness) can be right long before the map is.
    """

    id: ClassVar[str] = "integrated_gradients"
    title: ClassVar[str] = "Integrated gradients"
    paper: ClassVar[str] = "Sundararajan 2017"
    taxonomy: ClassVar[Taxonomy] = backpropagation(
        strengths="the map adds up to the decision (completeness), at full resolution",
        limits="depends on the baseline; tens of gradients",
    )

    baseline: Baseline = "zero"
    steps: int = Field(5, ge=1, le=1000, description="points on the path to begin with")
    max_steps: int = Field(135, ge=1, le=10000, description="points on the path at most")
    tolerance: float = Field(
        0.03,
        ge=0,
        le=1,
        description="stop when the map's estimated error is below this fraction; 0 goes to the maximum",
    )

    def maps(self, question: Question, x: Tensor) -> list[Attribution]:
        start = baseline(question, self.baseline).repeat(len(x) // len(question.x), *[1] * (x.ndim - 1))
        with torch.no_grad():
            at_sample, at_start = question.values(x), question.values(start)
        difference = x - start
        sums = [torch.zeros_like(x) for _ in question.targets]
        steps = self.steps
        self._add(question, start, difference, steps, range(steps), sums)
        means = [s / steps for s in sums]
        # Each sample stops by itself, so that its map does not depend on its company in a batch.
        unsettled = [torch.ones(len(x), dtype=torch.bool, device=x.device) for _ in sums]
        # Of copies with noise, their mean is shown instead.
        alone = x is question.x
        while any(u.any() for u in unsettled) and 3 * steps <= self.max_steps:
            if alone:
                question.show(lambda: self.finish(question, means[0] * difference))
            steps *= 3
            # Every third midpoint of the finer rule is one of the coarser rule.
            self._add(question, start, difference, steps, [i for i in range(steps) if i % 3 != 1], sums)
            for t, total in enumerate(sums):
                finer = total / steps
                error = self._error(means[t], finer, difference)
                means[t][unsettled[t]] = finer[unsettled[t]]
                unsettled[t] &= error > self.tolerance
        found = []
        for mean, top, bottom in zip(means, at_sample, at_start, strict=True):
            values, change = mean * difference, top - bottom
            otherwise = (
                "the score jumps or hardly differs between scan and baseline; try another baseline, such as 'blur'"
            )
            found.append(Attribution(values, completeness(question, values, change, _COMPLETE, otherwise)))
        return found

    def _add(
        self,
        question: Question,
        start: Tensor,
        difference: Tensor,
        steps: int,
        points: range | list[int],
        sums: list[Tensor],
    ) -> None:
        def take(gradients: list[Tensor]) -> None:
            for total, gradient in zip(sums, gradients, strict=True):
                total += gradient

        each_gradient(
            question, points, lambda i: start + difference * ((i + 0.5) / steps), take, f"{self.title}: {steps} steps"
        )

    @staticmethod
    def _error(coarse: Tensor, fine: Tensor, difference: Tensor) -> Tensor:
        """The estimated relative error (M,) of the finer map.

        At the kinks of a network the errors of n and of 3n points are nearly independent, and the latter a third of the
        former: the change is their root sum of squares, the square root of 10 times what is left. Against 400 to 2000
        points that was right to within a quarter.
        """
        change = ((fine - coarse) * difference).flatten(1).norm(dim=1)
        return change / (fine * difference).flatten(1).norm(dim=1).clamp_min(1e-12) / math.sqrt(10)
