"""Grad-CAM++.

Chattopadhyay et al., "Grad-CAM++: generalized gradient-based visual explanations for deep convolutional networks",
2018.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from MedXAILib.explainer import Taxonomy, backpropagation
from MedXAILib.visual.cam_family import GradientCAM, space


class GradCAMPlusPlus(GradientCAM):
    """Grad-CAM whose channel weights let several separate findings of one class count alike."""

    id: ClassVar[str] = "gradcam_plus_plus"
    title: ClassVar[str] = "Grad-CAM++"
    paper: ClassVar[str] = "Chattopadhyay 2018"
    taxonomy: ClassVar[Taxonomy] = backpropagation(
        strengths="as fast as Grad-CAM; several findings of one class all show",
        limits="as coarse as the layer; sees only what speaks for the class",
    )

    def weighted(self, activation: Tensor, gradient: Tensor) -> Tensor:
        # alpha = g^2 / (2 g^2 + sum(A) g^3), divided through by g^2 so that small gradients do not drown in an epsilon.
        below = 2 + activation.sum(space(activation), keepdim=True) * gradient
        alpha = torch.where((gradient != 0) & (below != 0), 1 / below, torch.zeros_like(below))
        weights = (alpha * gradient.relu()).sum(space(gradient), keepdim=True)
        return (weights * activation).sum(1, keepdim=True)
