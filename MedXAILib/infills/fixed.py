"""Infills that are one volume, wherever the mask is: a baseline, or the scan smoothed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from MedXAILib.engines.boxes import cut
from MedXAILib.engines.masks import Masks
from MedXAILib.explainer import Question
from MedXAILib.infills.infill import Infill


class Fixed(Infill):
    """`volume` (1, C, *spatial), whatever is asked."""

    def __init__(self, question: Question, volume: Tensor) -> None:
        super().__init__(question)
        self.volume = volume

    def patches(self, masks: Masks, draws: Sequence[int]) -> Tensor:
        if masks.box == tuple(self.volume.shape[2:]):
            return self.volume.expand(len(masks), *self.volume.shape[1:])
        return cut(self.volume, masks.low, masks.box)
