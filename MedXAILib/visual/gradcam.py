"""Grad-CAM.

Selvaraju et al., "Grad-CAM: visual explanations from deep networks via gradient-based localization", 2017; for
segmentation Vinogradova, Dibrov, Myers, "Seg-Grad-CAM", 2020.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from MedXAILib.explainer import Taxonomy, backpropagation
from MedXAILib.visual.cam_family import GradientCAM, space


class GradCAM(GradientCAM):
    """Which features of a layer, each weighted by its mean gradient, speak for the decision, and where?"""

    id: ClassVar[str] = "gradcam"
    title: ClassVar[str] = "Grad-CAM"
    paper: ClassVar[str] = "Selvaraju 2017"
    taxonomy: ClassVar[Taxonomy] = backpropagation(
        strengths="one forward; specific to the class; any network with a spatial layer",
        limits="as coarse as the layer; the mean gradient can light up places the network did not use",
    )

    averaging: ClassVar[bool] = True

    def weighted(self, activation: Tensor, gradient: Tensor) -> Tensor:
        return (gradient.mean(space(gradient), keepdim=True) * activation).sum(1, keepdim=True)
