"""Which part of a scan a patch network looks at: a centre or a box in RAS mm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn import functional

from MedXAILib.errors import MedXAIError
from MedXAILib.grid import corners, shifted, transform

Region = Sequence[Any]
"""A centre (x, y, z), or a box ((x0, y0, z0), (x1, y1, z1)), in RAS mm."""


def cut(x: Tensor, affine: np.ndarray, region: Region, patch_size: Sequence[int] | None) -> tuple[Tensor, np.ndarray]:
    """The voxels of `x` (C, *spatial) in `region`, and the affine of the part.

    A centre takes `patch_size` voxels around it. Where the part reaches past the scan it is filled with the scan's
    smallest value (air, background).

    Raises:
        MedXAIError: when the region is not one, lies outside the scan, or a centre is given without a patch size.
    """
    try:
        points = np.asarray(region, dtype=np.float64)
    except (TypeError, ValueError):
        points = np.zeros(0)
    low, high = _corners(points, affine, x.shape[1:], patch_size)
    size = np.array(x.shape[1:])
    if (high <= 0).any() or (low >= size).any():
        raise MedXAIError(
            f"The region {_said(region)} lies outside the scan, which covers {_extent(affine, x.shape[1:])}."
        )
    inside = tuple(slice(max(0, a), min(int(s), b)) for a, b, s in zip(low, high, size, strict=True))
    margin = [(max(0, -a), max(0, b - int(s))) for a, b, s in zip(low, high, size, strict=True)]
    part = x[(slice(None), *inside)]
    if any(map(any, margin)):
        part = functional.pad(part, [int(m) for pair in reversed(margin) for m in pair], value=float(x.min()))
    return part, shifted(affine, low)


def _corners(
    region: np.ndarray, affine: np.ndarray, size: Sequence[int], patch_size: Sequence[int] | None
) -> tuple[np.ndarray, np.ndarray]:
    rank = len(size)
    inverse = np.linalg.inv(affine)
    if region.shape == (rank,) and np.isfinite(region).all():
        if patch_size is None:
            raise MedXAIError("A centre needs a network with a patch size: give a box ((x0, y0, z0), (x1, y1, z1)).")
        centre = transform(inverse, region)
        if (centre < -0.5).any() or (centre > np.array(size) - 0.5).any():
            raise MedXAIError(f"The point {_said(region)} lies outside the scan, which covers {_extent(affine, size)}.")
        # An even patch has no middle voxel: lean the same way on every axis, whatever the rounding of the affine.
        low = np.floor(centre - (np.array(patch_size) - 1) / 2 + 0.5 + 1e-6).astype(int)
        return low, low + np.array(patch_size)
    if region.shape == (2, rank) and np.isfinite(region).all():
        choice = np.stack(np.meshgrid(*[[0, 1]] * rank, indexing="ij"), -1).reshape(-1, rank)
        indices = transform(inverse, region[choice, np.arange(rank)])
        low = np.ceil(indices.min(0) - 1e-6).astype(int)
        high = np.floor(indices.max(0) + 1e-6).astype(int) + 1
        if (high <= low).any():
            raise MedXAIError(f"The box {_said(region)} holds no voxel: make it larger.")
        return low, high
    raise MedXAIError(
        "A region is a centre (x, y, z) or a box ((x0, y0, z0), (x1, y1, z1)) of finite numbers in RAS mm, "
        f"not {_said(region)}."
    )


def _said(region: Any) -> str:
    return str(region.tolist() if isinstance(region, np.ndarray) else region)


def _extent(affine: np.ndarray, size: Sequence[int]) -> str:
    reach = transform(affine, corners(size))
    pairs = zip("RAS", reach.min(0), reach.max(0), strict=False)
    return ", ".join(f"{axis} {low:.0f} to {high:.0f}" for axis, low, high in pairs) + " mm (RAS)"
