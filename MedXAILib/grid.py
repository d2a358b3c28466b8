"""Bringing an array from one voxel grid to another, through millimetres."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


def corners(shape: Sequence[int]) -> np.ndarray:
    """The outer corners of a grid of `shape` as array indices, (2 ** rank, rank); voxels reach half a step out."""
    sides = [[-0.5, size - 0.5] for size in shape]
    return np.stack(np.meshgrid(*sides, indexing="ij"), -1).reshape(-1, len(shape))


def transform(affine: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points (..., rank) through an affine matrix."""
    return points @ affine[:-1, :-1].T + affine[:-1, -1]


def middle(shape: Sequence[int], affine: np.ndarray) -> np.ndarray:
    """The middle of a grid of `shape`, in RAS mm, (rank,)."""
    return transform(affine, (np.array(shape) - 1) / 2)


def shifted(affine: np.ndarray, start: np.ndarray) -> np.ndarray:
    """The affine of the part of a grid that begins at array index `start`."""
    moved = affine.copy()
    moved[:-1, -1] = transform(affine, np.asarray(start, dtype=np.float64))
    return moved


def resample(data: Tensor, affine: np.ndarray, shape: Sequence[int], onto: np.ndarray, nearest: bool = False) -> Tensor:
    """`data` (C, *spatial) of grid `affine`, on the grid of `shape` and affine `onto`; zero where it says nothing.

    Only the part of the target grid that the source covers is computed, so a small map costs little in a large scan.
    """
    part, where = resample_part(data, affine, shape, onto, nearest)
    return part if part.shape[1:] == tuple(shape) else pasted(part, where, shape)


def pasted(part: Tensor, where: tuple[slice, ...], shape: Sequence[int]) -> Tensor:
    """`part` (C, *box) in its place in a grid of `shape`; zero elsewhere."""
    whole = part.new_zeros((len(part), *shape))
    whole[(slice(None), *where)] = part
    return whole


def resample_part(
    data: Tensor, affine: np.ndarray, shape: Sequence[int], onto: np.ndarray, nearest: bool = False
) -> tuple[Tensor, tuple[slice, ...]]:
    """What `resample` gives where it is not zero, and which part of the target grid that is."""
    size = np.array(data.shape[1:])
    if tuple(data.shape[1:]) == tuple(shape) and np.allclose(affine, onto, atol=1e-6):
        return data, tuple(slice(0, s) for s in shape)
    landed = transform(np.linalg.inv(onto) @ affine, corners(data.shape[1:]))
    low = np.maximum(np.ceil(landed.min(0) - 1e-6).astype(int), 0)
    high = np.minimum(np.floor(landed.max(0) + 1e-6).astype(int) + 1, np.array(shape))
    if (high <= low).any():
        return data.new_zeros((data.shape[0], *[0] * len(shape))), (slice(0, 0),) * len(shape)
    axes = [np.arange(a, b) for a, b in zip(low, high, strict=True)]
    index = transform(np.linalg.inv(affine) @ onto, np.stack(np.meshgrid(*axes, indexing="ij"), -1))
    # Within the outermost half voxel the nearest value holds; beyond it there is nothing.
    covered = ((index > -0.5 - 1e-6) & (index < size - 0.5 + 1e-6)).all(-1)
    unit = torch.from_numpy((2 * index / np.maximum(size - 1, 1) - 1)[..., ::-1].copy())
    values = functional.grid_sample(
        data.double().cpu()[None],
        unit[None],
        mode="nearest" if nearest else "bilinear",
        padding_mode="border",
        align_corners=True,
    )[0]
    where = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    return (values * torch.from_numpy(covered)).to(data), where


def to_4x4(affine: np.ndarray) -> np.ndarray:
    """An affine as MONAI keeps it, 4x4 also for plain images."""
    rank = len(affine) - 1
    full = np.eye(4)
    full[np.ix_([*range(rank), 3], [*range(rank), 3])] = affine
    return full


def from_4x4(affine: np.ndarray, rank: int) -> np.ndarray:
    """The reverse of `to_4x4`."""
    return np.asarray(affine, dtype=np.float64)[np.ix_([*range(rank), 3], [*range(rank), 3])]
