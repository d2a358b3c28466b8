"""How large a nodule in lung is, by its density alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage  # type: ignore[import-untyped]

_DENSE = 0.2857
"""-600 HU, where -1000..400 are 0..1: denser than lung, and no denser than ground glass."""
_NEAR = 4.0
"""Voxels by which what is measured may miss the middle."""


def diameter(image: np.ndarray, spacing: Sequence[float]) -> float:
    """The diameter in mm of the ball that is as large as what is dense around the middle of `image` (D, H, W), which is
    0..1 for -1000..400 HU; vessels that it hangs on are cut off. 0 where there is none."""
    dense = ndimage.binary_opening(image > _DENSE, ndimage.generate_binary_structure(3, 1))
    parts, count = ndimage.label(dense)
    if not count:
        return 0.0
    middle = [(size - 1) / 2 for size in image.shape]
    away = np.sqrt(sum((axis - m) ** 2 for axis, m in zip(np.indices(image.shape), middle, strict=True)))
    nearest = int(np.where(dense, away, np.inf).argmin())
    if away.flat[nearest] > _NEAR:
        return 0.0
    voxels = int((parts == parts.flat[nearest]).sum())
    return float((6 * voxels * np.prod(spacing) / np.pi) ** (1 / 3))
