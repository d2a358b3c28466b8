"""Deep SHAP.

Lundberg and Lee, "A unified approach to interpreting model predictions", 2017.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from torch import Tensor

from MedXAILib.engines.rules import multipliers, record
from MedXAILib.explainer import Question, Taxonomy, backpropagation
from MedXAILib.rules.deeplift import DEEPLIFT
from MedXAILib.visual.background import AgainstBackground, Compare


class DeepSHAP(AgainstBackground):
    """What does each voxel add to the decision, beyond what it is for a whole set of other scans?

    The mean of DeepLIFT over the baselines: an approximation of Shapley values that is exact for a sum of functions of
    single voxels.
    """

    id: ClassVar[str] = "deep_shap"
    title: ClassVar[str] = "Deep SHAP"
    paper: ClassVar[str] = "Lundberg 2017"
    taxonomy: ClassVar[Taxonomy] = replace(
        backpropagation(
            strengths="the map adds up to the decision (completeness) and does not hang on a single baseline",
            limits="approximates Shapley values; depends on the background; a DeepLIFT for every baseline",
        ),
        scope=("local", "global"),
    )
    unaccounted: ClassVar[str] = "take another background if the score hardly differs between it and the scan"

    def comparing(self, question: Question) -> tuple[list[Tensor], Compare]:
        x = question.x
        # What the operators make of the scan serves every baseline.
        seen, at_sample = record(question, x, DEEPLIFT)

        def compare(start: Tensor, index: int, count: int) -> list[tuple[Tensor, Tensor]]:
            question.run.step(index, count, f"{self.title}: baselines")
            return [(back.m * (x - start), back.value) for back in multipliers(question, start, DEEPLIFT, seen)]

        return at_sample, compare
