"""Attention rollout.

Abnar and Zuidema, "Quantifying attention flow in transformers", 2020.
"""

from __future__ import annotations

from typing import ClassVar

from MedXAILib.engines.rules import multipliers
from MedXAILib.errors import MedXAIError
from MedXAILib.explainer import Attribution, Explainer, Question, Taxonomy, backpropagation
from MedXAILib.rules.rollout import ATTENTION, ROLLOUT, Softmax
from MedXAILib.target import CaptionTarget, SegmentationTarget


class AttentionRollout(Explainer):
    """Which voxels does a transformer's attention come to, layer upon layer?"""

    id: ClassVar[str] = "attention_rollout"
    title: ClassVar[str] = "Attention rollout"
    paper: ClassVar[str] = "Abnar 2020"
    taxonomy: ClassVar[Taxonomy] = backpropagation(
        strengths="one forward and one backward; shows what could reach the answer through attention",
        limits="the same for every class: it says where the network looks, not what for",
    )

    @property
    def signed(self) -> bool:
        return False

    def attribute(self, question: Question) -> list[Attribution]:
        if any(isinstance(t, SegmentationTarget) and t.measure != "logit" for t in question.targets):
            raise MedXAIError(
                f"{self.title} starts at an output, and has none for a volume or Dice: use measure='logit'."
            )
        if any(isinstance(t, CaptionTarget) for t in question.targets):
            raise MedXAIError(f"{self.title} is not of words: ask visual_captioning where a network looks for each.")
        found = multipliers(question, question.x, ROLLOUT)
        if not {ATTENTION, Softmax.title} <= set(question.run.operators):
            raise MedXAIError(f"{question.model.name} has no attention: use gradcam.")
        return [Attribution(back.m.abs().sum(1, keepdim=True)) for back in found]
