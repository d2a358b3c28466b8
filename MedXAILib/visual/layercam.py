"""LayerCAM.

Jiang et al., "LayerCAM: exploring hierarchical class activation maps for localization", 2021.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from MedXAILib.explainer import Taxonomy, backpropagation
from MedXAILib.visual.cam_family import GradientCAM


class LayerCAM(GradientCAM):
    """What speaks for the decision at each place of a layer? Made for earlier, finer layers and for fusing several."""

    id: ClassVar[str] = "layercam"
    title: ClassVar[str] = "LayerCAM"
    paper: ClassVar[str] = "Jiang 2021"
    taxonomy: ClassVar[Taxonomy] = backpropagation(
        strengths="one forward; useful at fine layers; several layers can be fused",
        limits="fine layers show texture; sees only what speaks for the class",
    )

    def weighted(self, activation: Tensor, gradient: Tensor) -> Tensor:
        return (gradient.relu() * activation).sum(1, keepdim=True)
