"""The mean of what surrounds a mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from MedXAILib.engines.boxes import cut
from MedXAILib.engines.masks import Masks
from MedXAILib.engines.windows import voxels
from MedXAILib.explainer import Question
from MedXAILib.infills.infill import Infill

# How far what surrounds a mask reaches.
_SHELL_MM = 5.0


class LocalMean(Infill):
    """Each channel's mean over the voxels that lie within 5 mm of a mask's, along each axis, and that it leaves alone;
    that of the scan for a mask that leaves none."""

    def __init__(self, question: Question) -> None:
        super().__init__(question)
        x = question.x
        self.reach = voxels((_SHELL_MM,), question.seen[0].spacing)
        self.mean = x.flatten(2).mean(2).reshape(1, -1, *[1] * (x.ndim - 2))

    def patches(self, masks: Masks, draws: Sequence[int]) -> Tensor:
        x = self.question.x
        reach = [min(r, n) for r, n in zip(self.reach, x.shape[2:], strict=True)]
        low = masks.low - torch.tensor(reach)
        outer = [b + 2 * r for b, r in zip(masks.box, reach, strict=True)]
        # Boxes that are taken whole are all alike: one of them is enough.
        share = masks.share if masks.share.stride(0) else masks.share[:1]
        taken = functional.pad((share > 0).to(x), [r for r in reversed(reach) for _ in range(2)])
        near = dilated(taken, reach)
        shell = (near - taken) * cut(torch.ones_like(x[:, :1]), low, outer)
        count = shell.flatten(2).sum(2)
        total = (cut(x, low, outer) * shell).flatten(2).sum(2)
        mean = (total / count.clamp_min(1)).reshape(*total.shape, *[1] * (x.ndim - 2))
        found = torch.where(count.reshape(-1, 1, *[1] * (x.ndim - 2)) > 0, mean, self.mean)
        return found.expand(len(masks), x.shape[1], *masks.box)


def dilated(mask: Tensor, reach: Sequence[int]) -> Tensor:
    """Which voxels of (M, 1, *spatial) are at most `reach` from one of `mask`, along each axis."""
    for axis, r in enumerate(reach, start=2):
        rows = mask.movedim(axis, -1)
        wide = functional.max_pool1d(rows.reshape(-1, 1, rows.shape[-1]), 2 * r + 1, stride=1, padding=r)
        mask = wide.reshape(rows.shape).movedim(-1, axis)
    return mask
