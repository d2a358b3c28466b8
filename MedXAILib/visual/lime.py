"""LIME.

Ribeiro, Singh and Guestrin, "'Why should I trust you?': explaining the predictions of any classifier", 2016.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from MedXAILib.engines.linear_fit import explained, linear_fit
from MedXAILib.explainer import Question, Taxonomy, perturbation
from MedXAILib.infills.infill import Infill
from MedXAILib.supervoxels import Supervoxels
from MedXAILib.visual.supervoxel_method import BySupervoxels, Estimate

# Less than this share of what coalitions say, foreseen by the fit that does not know them, is not an explanation.
_POOR = 0.5


class LIME(BySupervoxels):
    """Which linear rule does the network follow near this scan? It is fitted to scans with supervoxels taken away.

    Each sample keeps a random half of the supervoxels. The fit is weighted least squares; a sample counts as much as it
    is like the scan: exp(-d² / (2 width²)), where d is the cosine distance between what is kept and all of it.
    """

    id: ClassVar[str] = "lime"
    title: ClassVar[str] = "LIME"
    paper: ClassVar[str] = "Ribeiro 2016"
    taxonomy: ClassVar[Taxonomy] = perturbation(
        strengths="any network; says how well its linear rule fits, and how sure each value is",
        limits="one linear rule, seldom a good fit; depends on supervoxels, infill and width",
    )

    samples: int = Field(
        1000, ge=2, description="scans to ask about; all there are, if they are no more and not random"
    )
    kernel_width: float = Field(0.25, gt=0, description="how unlike the scan a sample may be and still count")
    ridge: float = Field(0.0, ge=0, description="penalty on the squared values; the original program takes 1")

    def estimates(self, question: Question, supervoxels: Supervoxels, infill: Infill) -> list[Estimate]:
        present = self._present(supervoxels.count, question.run.generator(), infill.random)

        def so_far(values: Tensor) -> Tensor:
            return self._fit(present, values[:, :1], infill.random)[0].values

        found = self._fit(present, self.ask(question, supervoxels, infill, present, so_far), infill.random)
        foreseen = 1 - max(one.residual["unforeseen"] for one in found)
        if foreseen < _POOR:
            question.run.note(
                f"The linear fit foresees {max(foreseen, 0):.0%} of what the network says of scans it does not know: "
                "take more samples, fewer supervoxels, or a Shapley method."
            )
        return found

    def _present(self, count: int, generator: torch.Generator, random: bool) -> Tensor:
        """Which supervoxels each sample keeps, (M, count); the first keeps all."""
        if not random and count < 31 and 2**count <= self.samples:
            # Drawn without putting back, so that the first of them are a fair sample.
            codes = torch.cat([torch.tensor([2**count - 1]), torch.randperm(2**count - 1, generator=generator)])
            return ((codes[:, None] >> torch.arange(count)) & 1).bool()
        drawn = torch.rand(self.samples - 1, count, generator=generator) < 0.5
        return torch.cat([torch.ones(1, count, dtype=torch.bool), drawn])

    def _fit(self, present: Tensor, values: Tensor, random: bool) -> list[Estimate]:
        """What the first of the samples say, whose `values` (m, T) are known."""
        kept = present[: len(values)].double()
        distance = 1 - kept.mean(1).sqrt()
        weights = torch.exp(-0.5 * (distance / self.kernel_width).square())
        rows = torch.cat([kept, torch.ones_like(kept[:, :1])], 1)
        ridge = torch.full((rows.shape[1],), self.ridge, dtype=torch.float64)
        # What is said of nothing costs nothing.
        ridge[-1] = 0
        fit = linear_fit(rows, values, weights, ridge)
        missed, foreseen = explained(values, fit.missed, weights), explained(values, fit.left_out, weights)
        all_of_them = not random and len(values) == 2 ** kept.shape[1]
        return [
            Estimate(
                fit.coefficients[:-1, t],
                None if all_of_them else fit.half[:-1, t],
                {"unexplained": 1 - float(missed[t]), "unforeseen": 1 - float(foreseen[t])},
            )
            for t in range(values.shape[1])
        ]
