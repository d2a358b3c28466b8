"""Layer-wise relevance propagation.

Bach et al., "On pixel-wise explanations for non-linear classifier decisions by layer-wise relevance propagation", 2015;
on MRI Boehle et al., "Layer-wise relevance propagation for explaining deep neural network decisions in MRI-based
Alzheimer's disease classification", 2019.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from MedXAILib.engines.capture import capture
from MedXAILib.engines.rules import Composite, Interception, came_back, multipliers
from MedXAILib.engines.seeing import intercepting
from MedXAILib.explainer import Attribution, Question, Taxonomy, backpropagation
from MedXAILib.rules import lrp
from MedXAILib.visual.cam_family import spatial
from MedXAILib.visual.smoothing import Smoothable


class LRP(Smoothable):
    """How is the score shared out, layer by layer, among the voxels it came from?"""

    id: ClassVar[str] = "lrp"
    title: ClassVar[str] = "Layer-wise relevance propagation"
    paper: ClassVar[str] = "Bach 2015"
    taxonomy: ClassVar[Taxonomy] = backpropagation(
        strengths="the map adds up to the score, less what constants of the network hold; one to four gradients",
        limits="the rules are a choice that changes the map; the share of constants is in no voxel",
    )

    composite: lrp.Name = Field(
        "epsilon_plus_flat",
        description="the rules: epsilon everywhere (exact, noisy); gamma (favours what speaks for); alpha_beta (as on "
        "brain MRI); epsilon_plus (z+ for convolutions); epsilon_plus_flat (the same, flat for the first layer)",
    )
    first: lrp.First = Field(
        "same", description="another rule for the first layer: flat, w_square, or z_box (between the scan's extremes)"
    )
    epsilon: float = Field(1e-6, ge=0, le=10, description="stabiliser; larger values absorb weak, noisy relevance")
    gamma: float = Field(0.25, ge=0, le=10, description="of gamma: how much what has the score's sign is favoured")
    beta: float = Field(0.0, ge=0, le=1, description="of alpha_beta: the weight of what speaks against")
    layer: str = Field(
        "", description="show the relevance at this layer, by its name in the network, not at the voxels"
    )

    def rules(self) -> Composite:
        """What operators send back."""
        return lrp.composite(self.composite, self.epsilon, self.gamma, self.beta, self.first)

    def attribute(self, question: Question) -> list[Attribution]:
        return self._at_layer(question) if self.layer else super().attribute(question)

    def maps(self, question: Question, x: Tensor) -> list[Attribution]:
        found = []
        for back in multipliers(question, x, self.rules()):
            relevance = back.m * lrp.nonzero(x)
            found.append(Attribution(relevance, back.residual(relevance)))
            if x is question.x:
                question.run.note(back.shared_out())
        return found

    def _at_layer(self, question: Question) -> list[Attribution]:
        mode = Interception(self.rules())
        with intercepting(question.model, mode):
            values, taken = capture(question, [self.layer])
        at, found = taken[self.layer], []
        for back in came_back(question, mode.book, values, at.raw):
            relevance = back.m * at.raw.detach()
            of_units = spatial(self.layer, replace(at, raw=relevance)).sum(1, keepdim=True)
            found.append(Attribution(at.place(of_units), back.residual(relevance)))
            question.run.note(back.shared_out())
        return found
