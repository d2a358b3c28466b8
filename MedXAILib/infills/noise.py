"""Noise that has the values of the scan, but not their order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from MedXAILib.engines.masks import Masks
from MedXAILib.infills.infill import Infill


class Noise(Infill):
    """In each voxel what there is in another one of the scan, drawn at random; the channels stay together."""

    random: ClassVar[bool] = True

    def patches(self, masks: Masks, draws: Sequence[int]) -> Tensor:
        values = self.question.x[0].flatten(1)
        found = [
            torch.randint(values.shape[1], masks.box, generator=self.question.run.generator(draw)) for draw in draws
        ]
        return values[:, torch.stack(found).to(values.device)].movedim(0, 1)
