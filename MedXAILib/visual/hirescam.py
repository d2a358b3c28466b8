"""HiResCAM.

Draelos, Carin, "Use HiResCAM instead of Grad-CAM for faithful explanations of convolutional neural networks", 2020.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from MedXAILib.explainer import Taxonomy, backpropagation
from MedXAILib.visual.cam_family import GradientCAM


class HiResCAM(GradientCAM):
    """What does each place of a layer, with its own gradient, contribute to the decision?

    At the last convolution before pooling and a linear layer the signed map sums to the class score less its bias.
    """

    id: ClassVar[str] = "hirescam"
    title: ClassVar[str] = "HiResCAM"
    paper: ClassVar[str] = "Draelos 2020"
    taxonomy: ClassVar[Taxonomy] = backpropagation(
        strengths="one forward; lights only what the network used; sums to the score at a last pooled layer",
        limits="as coarse as the layer",
    )

    def weighted(self, activation: Tensor, gradient: Tensor) -> Tensor:
        return (gradient * activation).sum(1, keepdim=True)
