"""What of a sample is replaced: shares of voxels within boxes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Masks:
    """M ways to replace voxels of a sample: the `share` (M, 1, *box) of each voxel, 0 to 1, in a box that begins at
    `low` (M, rank), which lies on the CPU."""

    low: Tensor
    share: Tensor

    def __len__(self) -> int:
        return len(self.low)

    @property
    def box(self) -> tuple[int, ...]:
        """The size of the boxes, (*box)."""
        return tuple(self.share.shape[2:])

    @classmethod
    def everywhere(cls, share: Tensor) -> Masks:
        """Masks (M, 1, *spatial) of whole samples."""
        return cls(torch.zeros(len(share), share.ndim - 2, dtype=torch.long), share)

    @classmethod
    def boxes(cls, low: Tensor, box: Sequence[int], like: Tensor) -> Masks:
        """All of boxes (*box) that begin at `low` (M, rank)."""
        return cls(low, like.new_ones(1, 1, *[1] * len(box)).expand(len(low), 1, *box))


@dataclass(frozen=True)
class Stream:
    """`count` masks, made as they are needed: `make` gives those from one number up to another."""

    count: int
    box: tuple[int, ...]
    make: Callable[[int, int], Masks]
