"""Deconvolution.

Zeiler and Fergus, "Visualizing and understanding convolutional networks", 2014.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from MedXAILib.engines.rules import Rule, multipliers
from MedXAILib.errors import MedXAIError
from MedXAILib.explainer import Attribution, Question, Taxonomy, backpropagation
from MedXAILib.rules.rectified import Deconvolved, rectified
from MedXAILib.visual.smoothing import Smoothable


class DeconvNet(Smoothable):
    """What would a voxel have to be like for the decision, if activations sent back what speaks for it?"""

    id: ClassVar[str] = "deconvnet"
    title: ClassVar[str] = "Deconvolution"
    paper: ClassVar[str] = "Zeiler 2014"
    taxonomy: ClassVar[Taxonomy] = backpropagation(
        strengths="one gradient; clean maps at full resolution",
        limits="shows edges of the scan as much as the decision: much of it stays when the upper layers are scrambled",
    )

    rule: ClassVar[Rule] = Deconvolved()
    otherwise: ClassVar[str] = "unchanged"
    """What the rule makes of activations that it was not thought for."""

    def maps(self, question: Question, x: Tensor) -> list[Attribution]:
        found = [Attribution(back.m) for back in multipliers(question, x, rectified(self.rule))]
        if self.rule.title not in question.run.operators:
            raise MedXAIError(
                f"{question.model.name} has no activation such as ReLU, so that {self.title.lower()} would be its "
                "gradient: use gradient."
            )
        others = sorted(set(question.run.operators[self.rule.title]) - {"relu"})
        if others:
            question.run.note(
                f"{self.title} is defined for ReLU: of what reaches {', '.join(others)}, the part that speaks for the "
                f"target is sent back {self.otherwise}."
            )
        return found
