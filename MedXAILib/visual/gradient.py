"""Gradient of the target with respect to the voxels.

Simonyan, Vedaldi, Zisserman, "Deep inside convolutional networks", 2013.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from MedXAILib.engines.input_gradients import input_gradients
from MedXAILib.explainer import Attribution, Question, Taxonomy, backpropagation
from MedXAILib.visual.smoothing import Smoothable


class Gradient(Smoothable):
    """Which voxels, changed a little, change the decision most?"""

    id: ClassVar[str] = "gradient"
    title: ClassVar[str] = "Gradient"
    paper: ClassVar[str] = "Simonyan 2013"
    taxonomy: ClassVar[Taxonomy] = backpropagation(
        strengths="as fast as one training step, at full resolution, for any differentiable network",
        limits="noisy; says where the decision is sensitive, not what it rests on",
    )

    form: Literal["signed", "absolute", "times_input"] = Field(
        "signed", description="the gradient itself, its absolute value (largest channel), or its product with the scan"
    )

    @property
    def signed(self) -> bool:
        return super().signed and self.form != "absolute"

    def maps(self, question: Question, x: Tensor) -> list[Attribution]:
        return [Attribution(g) for g in input_gradients(question, x)]

    def finish(self, question: Question, values: Tensor) -> Tensor:
        if self.form == "absolute":
            values = values.abs()
            return values if self.per_channel else values.amax(1, keepdim=True)
        return super().finish(question, values * question.x if self.form == "times_input" else values)


class SmoothGrad(Gradient):
    """The gradient, averaged over noisy copies of the scan."""

    id: ClassVar[str] = "smoothgrad"
    title: ClassVar[str] = "SmoothGrad"
    paper: ClassVar[str] = "Smilkov 2017"
    taxonomy: ClassVar[Taxonomy] = backpropagation(
        strengths="the gradient without most of its noise",
        limits="as many gradients as copies; the noise level is a choice that changes the map",
    )

    samples: int = Field(16, ge=1, le=1000, description="noisy copies to average over")


class VarGrad(SmoothGrad):
    """How much the gradient varies over noisy copies of the scan."""

    id: ClassVar[str] = "vargrad"
    title: ClassVar[str] = "VarGrad"
    paper: ClassVar[str] = "Adebayo 2018"
    taxonomy: ClassVar[Taxonomy] = backpropagation(
        strengths="clean maps of where the network reacts at all",
        limits="unsigned; does not tell for from against; as many gradients as copies",
    )

    statistic: Literal["mean", "variance", "squared"] = Field(
        "variance", description="over the copies: mean (SmoothGrad), variance (VarGrad) or mean square (SquareGrad)"
    )
