"""DeepLIFT.

Shrikumar, Greenside, Kundaje, "Learning important features through propagating activation differences", 2017.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from MedXAILib.engines.rules import Record, multipliers, record
from MedXAILib.explainer import Attribution, Question, Taxonomy, backpropagation
from MedXAILib.rules.deeplift import DEEPLIFT
from MedXAILib.visual.baseline import Baseline, baseline, completeness
from MedXAILib.visual.smoothing import Smoothable

# A completeness residual beyond this is said in words.
_COMPLETE = 0.01


class DeepLIFT(Smoothable):
    """How does each voxel's difference from a baseline add up to the difference of the score, operator by operator?"""

    id: ClassVar[str] = "deeplift"
    title: ClassVar[str] = "DeepLIFT"
    paper: ClassVar[str] = "Shrikumar 2017"
    taxonomy: ClassVar[Taxonomy] = backpropagation(
        strengths="the map adds up to the change of the score exactly, for about two gradients",
        limits="depends on the baseline",
    )

    baseline: Baseline = "zero"

    def maps(self, question: Question, x: Tensor) -> list[Attribution]:
        start = baseline(question, self.baseline).repeat(len(x) // len(question.x), *[1] * (x.ndim - 1))
        return contributions(question, start, x, *record(question, x, DEEPLIFT))


def contributions(
    question: Question, start: Tensor, x: Tensor, seen: Record, at_sample: list[Tensor]
) -> list[Attribution]:
    """What the difference of `x` from `start` (M, C, *spatial) adds to each target, what the operators have `seen` of x
    and each target's value being given, so that they serve many baselines."""
    found = []
    for back, top in zip(multipliers(question, start, DEEPLIFT, seen), at_sample, strict=True):
        values, change = back.m * (x - start), top - back.value
        otherwise = (
            "the network selects other values for the baseline than for the scan, or its score hardly changes; try "
            "another baseline"
        )
        found.append(Attribution(values, completeness(question, values, change, _COMPLETE, otherwise)))
    return found
