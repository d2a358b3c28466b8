"""Hot spots: the voxels that hold most of what speaks for the target. Without PyTorch, for Slicer's own process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SHARES = (0.5, 0.25, 0.1)
"""The parts of all positive values together that the hot spots hold."""


@dataclass(frozen=True)
class HotSpot:
    """The smallest set of voxels that holds `share` of the positive values: those of at least `threshold`.

    `mask` is the box around them, whose first voxel is `corner` (k, j, i).
    """

    share: float
    threshold: float
    corner: tuple[int, int, int]
    mask: np.ndarray
    voxels: int
    mean: float
    maximum: float

    @property
    def name(self) -> str:
        """What it is called."""
        return f"{self.share:.0%} of what speaks for it"


def find(array: np.ndarray, shares: Sequence[float] = SHARES) -> list[HotSpot]:
    """The hot spots of an array (D, H, W), on any thread. One without positive values has empty ones."""
    places = np.nonzero(array > 0)
    values = array[places]
    falling = np.sort(values)[::-1]
    held = np.cumsum(falling, dtype=np.float64)
    found = []
    for share in shares:
        if not values.size:
            found.append(HotSpot(share, np.inf, (0, 0, 0), np.zeros((0, 0, 0), bool), 0, 0.0, 0.0))
            continue
        threshold = falling[np.searchsorted(held, share * held[-1])]
        inside = values >= threshold
        where = np.stack([axis[inside] for axis in places])
        corner = where.min(axis=1)
        mask = np.zeros(where.max(axis=1) + 1 - corner, bool)
        mask[tuple(where - corner[:, None])] = True
        in_it = values[inside]
        found.append(
            HotSpot(
                share,
                float(threshold),
                tuple(corner.tolist()),
                mask,
                in_it.size,
                float(in_it.mean(dtype=np.float64)),
                float(in_it.max()),
            )
        )
    return found
