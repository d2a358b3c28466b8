"""Windows all over a volume: how large, where, in which order, and what they say added up voxel by voxel."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from MedXAILib.errors import MedXAIError

# Without a size, a window is this part of the shortest side.
_PART = 6


def windows(
    size: Sequence[int], spacing: Sequence[float], window: Sequence[float], stride: Sequence[float]
) -> tuple[tuple[int, ...], Tensor]:
    """The size of a window in voxels, and where the windows of a grid `size` begin (M, rank), coarsely spread ones
    first.

    `window` and `stride` are in mm, for all axes or each; empty, they are a sixth of the shortest side, and the window.

    Raises:
        MedXAIError: when there are neither one length nor as many as axes.
    """
    auto = min(n * step for n, step in zip(size, spacing, strict=True)) / _PART
    box = tuple(min(w, n) for w, n in zip(voxels(window or (auto,), spacing), size, strict=True))
    step = voxels(stride, spacing) if stride else box
    counts = [-(-(n - w) // s) + 1 for n, w, s in zip(size, box, step, strict=True)]
    index = sorted(product(*map(range, counts)), key=lambda place: -min(_level(i) for i in place))
    # The last windows end where the volume does.
    return box, (torch.tensor(index) * torch.tensor(step)).minimum(torch.tensor(size) - torch.tensor(box))


def voxels(mm: Sequence[float], spacing: Sequence[float]) -> tuple[int, ...]:
    """Lengths in mm, one for each axis or for all, as voxels of a grid, at least one.

    Raises:
        MedXAIError: when there are neither one nor as many as axes.
    """
    return tuple(max(1, round(m / step)) for m, step in zip(each(mm, len(spacing)), spacing, strict=True))


def each(sizes: Sequence[float], rank: int) -> tuple[float, ...]:
    """Sizes, one for each of `rank` axes or for all, as one for each.

    Raises:
        MedXAIError: when there are neither one nor as many as axes.
    """
    if len(sizes) not in (1, rank):
        raise MedXAIError(f"{len(sizes)} sizes for {rank} axes: give one, or one for each axis.")
    return tuple(sizes) * (rank // len(sizes))


def add(total: Tensor, low: Tensor, box: Sequence[int], values: Tensor) -> None:
    """Add `values` (M,) to the boxes (*box) of `total` (1, 1, *spatial) that begin at `low` (M, rank)."""
    for start, value in zip(low.tolist(), values.tolist(), strict=True):
        total[0, 0][tuple(slice(a, a + b) for a, b in zip(start, box, strict=True))] += value


def _level(index: int) -> int:
    """How often an index can be halved: 0 most of all."""
    return 32 if index == 0 else (index & -index).bit_length() - 1
