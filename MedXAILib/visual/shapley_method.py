"""What the methods have in common that share the decision out among supervoxels."""

from __future__ import annotations

from torch import Tensor

from MedXAILib.engines.shapley import Shares, coalitions, shapley_fit
from MedXAILib.explainer import Question
from MedXAILib.infills.infill import Infill
from MedXAILib.supervoxels import Supervoxels
from MedXAILib.visual.supervoxel_method import BySupervoxels, Estimate

# All values are measured from the scan without any supervoxel: ask so often what a random infill makes of it.
_EMPTY = 32


class ByShares(BySupervoxels):
    """An explainer whose map has the Shapley values of supervoxels."""

    def regressed(self, question: Question, supervoxels: Supervoxels, infill: Infill, samples: int) -> list[Estimate]:
        """The Shapley values by a regression over about so many coalitions; exact ones of few supervoxels."""
        empties = _EMPTY if infill.random else 1
        asked = coalitions(supervoxels.count, samples, question.run.generator(), empties)

        def so_far(values: Tensor) -> Tensor:
            return shapley_fit(asked, values[:, :1]).values[:, 0]

        return estimates_of(shapley_fit(asked, self.ask(question, supervoxels, infill, asked.present, so_far)))


def estimates_of(shares: Shares) -> list[Estimate]:
    """Shares as one estimate for each target."""
    return [
        Estimate(values, None if shares.half is None else shares.half[:, t], {"efficiency": float(missed)})
        for t, (values, missed) in enumerate(zip(shares.values.T, shares.inefficiency, strict=True))
    ]
