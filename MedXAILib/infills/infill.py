"""What is put in the place of voxels that are taken away: one interface, so that any infill goes with any method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from MedXAILib.engines.masks import Masks
from MedXAILib.explainer import Question


class Infill(ABC):
    """What could be in the masked voxels of one sample instead.

    `question` holds one sample, x (1, C, *spatial). Making an infill may take long (fitting a distribution, blurring);
    asking it must not.
    """

    random: ClassVar[bool] = False
    """Whether another draw gives something else."""

    def __init__(self, question: Question) -> None:
        self.question = question

    @abstractmethod
    def patches(self, masks: Masks, draws: Sequence[int]) -> Tensor:
        """For each of M masks what stands in its box instead, (M, C, *box); `draws` says which draw of a random one.
        Voxels of which a mask takes nothing are of no interest."""


class Later(Infill):
    """Another infill, its draws counted from number `first` on."""

    def __init__(self, infill: Infill, first: int) -> None:
        super().__init__(infill.question)
        self.infill, self.first = infill, first

    def patches(self, masks: Masks, draws: Sequence[int]) -> Tensor:
        return self.infill.patches(masks, [self.first + draw for draw in draws])
