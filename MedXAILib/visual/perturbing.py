"""What every method has in common that takes parts of a scan away and looks what becomes of the decision."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

import torch

from MedXAILib.explainer import Attribution, Explainer, Question
from MedXAILib.infills.choice import InfillChoice


class Perturbing(Explainer):
    """An explainer that asks about one sample at a time, with something else in the place of parts of it."""

    anytime: ClassVar[bool] = True
    stitching: ClassVar[Literal["sum", "blend"] | None] = None

    infill: InfillChoice = "mean"

    @abstractmethod
    def of_sample(self, question: Question) -> list[Attribution]:
        """Answer a question about one sample, x (1, C, *spatial)."""

    def attribute(self, question: Question) -> list[Attribution]:
        found = [self.of_sample(alone) for alone in question.alone()]
        return [_together(list(of_target)) for of_target in zip(*found, strict=True)]


def _together(of_samples: list[Attribution]) -> Attribution:
    """The attributions of several samples, one each, as one."""
    residuals, halves = [a.residual for a in of_samples], [a.interval for a in of_samples]
    return Attribution(
        torch.cat([a.values for a in of_samples]),
        {name: max(r[name] for r in residuals) for name in residuals[0]},
        torch.cat([half for half in halves if half is not None]) if halves[0] is not None else None,
    )
