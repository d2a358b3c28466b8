"""Parts of a sample that are taken away one at a time: windows, or supervoxels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from MedXAILib.engines.masks import Masks
from MedXAILib.engines.windows import add, windows
from MedXAILib.supervoxels import automatic_size, numbered, slic


@dataclass(frozen=True)
class Parts:
    """`count` parts that each fit into a `box`. `masks` makes those of some of them, by their numbers (M,), and `paint`
    the sum (1, 1, *spatial) that values (count,) of all of them have at each voxel."""

    count: int
    box: tuple[int, ...]
    masks: Callable[[Tensor], Masks]
    paint: Callable[[Tensor], Tensor]


def window_parts(x: Tensor, spacing: Sequence[float], window: Sequence[float], stride: Sequence[float]) -> Parts:
    """The windows of a sample `x` (1, C, *spatial), as `windows` lays them out."""
    box, low = windows(x.shape[2:], spacing, window, stride)

    def paint(values: Tensor) -> Tensor:
        total = torch.zeros(1, 1, *x.shape[2:], dtype=values.dtype)
        add(total, low, box, values)
        return total

    return Parts(len(low), box, lambda which: Masks.boxes(low[which], box, x), paint)


def supervoxel_parts(x: Tensor, spacing: Sequence[float], size_mm: float | None) -> Parts:
    """The supervoxels of a sample `x` (1, C, *spatial) along its edges (SLIC), of about `size_mm`; or about 200."""
    everywhere = np.ones(x.shape[2:], dtype=bool)
    size = automatic_size(x.shape[2:], spacing, 1.0) if size_mm is None else size_mm
    made = numbered(slic(x[0].float().cpu().numpy(), spacing, size, 1.0, everywhere), everywhere)
    there = replace(made, labels=made.labels.to(x.device))
    return Parts(
        made.count, made.boxes()[0], lambda which: there.alone(which, x), lambda values: values[made.labels][None, None]
    )
