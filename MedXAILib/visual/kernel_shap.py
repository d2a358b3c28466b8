"""Kernel SHAP.

Lundberg and Lee, "A unified approach to interpreting model predictions", 2017.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from MedXAILib.explainer import Question, Taxonomy, perturbation
from MedXAILib.infills.infill import Infill
from MedXAILib.supervoxels import Supervoxels
from MedXAILib.visual.shapley_method import ByShares
from MedXAILib.visual.supervoxel_method import Estimate


class KernelSHAP(ByShares):
    """How is the decision shared out fairly among the supervoxels? Shapley values, by a regression over coalitions.

    The values add up to the change from a scan without any supervoxel, whatever the samples. Each coalition is asked
    with its complement. Up to 12 supervoxels are asked in all their coalitions, which is exact.
    """

    id: ClassVar[str] = "kernel_shap"
    title: ClassVar[str] = "Kernel SHAP"
    paper: ClassVar[str] = "Lundberg & Lee 2017"
    taxonomy: ClassVar[Taxonomy] = perturbation(
        strengths="fair shares with axioms behind them, that add up; any network; says how sure each value is",
        limits="many forwards: ten or more for each supervoxel; scans with half of them missing look odd",
    )

    samples: int = Field(2048, ge=4, description="scans to ask about, unless there are fewer")

    def estimates(self, question: Question, supervoxels: Supervoxels, infill: Infill) -> list[Estimate]:
        return self.regressed(question, supervoxels, infill, self.samples)
