"""Guided backpropagation.

Springenberg et al., "Striving for simplicity: the all convolutional net", 2015.
"""

from __future__ import annotations

from typing import ClassVar

from MedXAILib.engines.rules import Rule
from MedXAILib.explainer import Taxonomy, backpropagation
from MedXAILib.rules.rectified import Guided
from MedXAILib.visual.deconvnet import DeconvNet


class GuidedBackprop(DeconvNet):
    """Which voxels speak for the decision along paths that are active and speak for it all the way?"""

    id: ClassVar[str] = "guided_backprop"
    title: ClassVar[str] = "Guided backpropagation"
    paper: ClassVar[str] = "Springenberg 2015"
    taxonomy: ClassVar[Taxonomy] = backpropagation(
        strengths="one gradient; the cleanest maps at full resolution",
        limits="clean because it restores edges of the scan: most of it stays when the upper layers are scrambled",
    )

    rule: ClassVar[Rule] = Guided()
    otherwise: ClassVar[str] = "times the derivative"
