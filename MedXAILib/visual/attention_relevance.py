"""Relevance through attention.

Achtibat et al., "AttnLRP: attention-aware layer-wise relevance propagation for transformers", 2024.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from MedXAILib.engines.rules import multipliers
from MedXAILib.errors import MedXAIError
from MedXAILib.explainer import Attribution, Question, Taxonomy, backpropagation
from MedXAILib.rules import lrp
from MedXAILib.visual.smoothing import Smoothable


class AttentionRelevance(Smoothable):
    """How is a transformer's score shared out among the voxels, through what attends and what is attended to?"""

    id: ClassVar[str] = "attention_relevance"
    title: ClassVar[str] = "Attention relevance"
    paper: ClassVar[str] = "Achtibat 2024"
    taxonomy: ClassVar[Taxonomy] = backpropagation(
        strengths="follows values, queries and keys alike; specific to the class; about the cost of a gradient",
        limits="for networks with attention only; the tangent of a softmax leaves a share in no voxel",
    )

    epsilon: float = Field(1e-6, ge=0, le=10, description="stabiliser; larger values absorb weak, noisy relevance")

    def maps(self, question: Question, x: Tensor) -> list[Attribution]:
        rules = replace(lrp.composite("epsilon", self.epsilon, 0, 0), shared_gates=True)
        found = multipliers(question, x, rules)
        if not any("softmax" in met for met in question.run.operators.values()):
            raise MedXAIError(f"{question.model.name} has no attention: use lrp.")
        if x is question.x:
            for back in found:
                question.run.note(back.shared_out())
        return [Attribution(back.m * x, back.residual(back.m * x)) for back in found]
