"""Guided Grad-CAM.

Selvaraju et al., "Grad-CAM: visual explanations from deep networks via gradient-based localization", 2017.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from MedXAILib.explainer import Attribution, Question, Taxonomy, backpropagation
from MedXAILib.visual.gradcam import GradCAM
from MedXAILib.visual.guided_backprop import GuidedBackprop


class GuidedGradCAM(GradCAM):
    """Which fine structures does guided backpropagation show where Grad-CAM says that the evidence is?"""

    id: ClassVar[str] = "guided_gradcam"
    title: ClassVar[str] = "Guided Grad-CAM"
    paper: ClassVar[str] = "Selvaraju 2017"
    taxonomy: ClassVar[Taxonomy] = backpropagation(
        strengths="full resolution, and specific to the class",
        limits="its fine structures are those of guided backpropagation, which hardly depend on what was learnt",
    )

    # Its fine structures add up; where there is no evidence they are zero.
    stitching: ClassVar[Literal["sum", "blend"] | None] = "sum"

    @property
    def signed(self) -> bool:
        return True

    def attribute(self, question: Question) -> list[Attribution]:
        fine = GuidedBackprop.model_validate({}).attribute(question)
        return [Attribution(f.values * c.values) for f, c in zip(fine, super().attribute(question), strict=True)]
