"""Supervoxels: the parts of a scan that LIME, Shapley values and ablation take away whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor
from torch.nn import functional

from MedXAILib.engines.masks import Masks, Stream

# Pieces smaller than this share of a supervoxel's own size join a neighbour.
_LEAST = 0.125


@dataclass(frozen=True)
class Supervoxels:
    """Parts of one grid: `labels` (*spatial), 0 to `count` - 1, and `count` where nothing is ever taken away."""

    labels: Tensor
    count: int

    def painted(self, values: Tensor) -> Tensor:
        """A map (1, 1, *spatial) of one value for each supervoxel (count,), zero elsewhere."""
        known = torch.cat([values, values.new_zeros(1)]).to(self.labels.device, torch.float32)
        return known[self.labels][None, None]

    def sizes(self) -> Tensor:
        """How many voxels each has, (count,)."""
        return self.labels.flatten().bincount(minlength=self.count + 1)[: self.count]

    def masks(self, absent: Tensor, like: Tensor) -> Masks:
        """Masks of the whole grid that take away the supervoxels `absent` (M, count), for a sample `like`."""
        taken = self._with_rest(absent, like).index_select(1, self.labels.flatten())
        return Masks.everywhere(taken.reshape(len(absent), 1, *self.labels.shape))

    def masks_in(self, box: Sequence[int], low: Tensor, absent: Tensor, like: Tensor) -> Masks:
        """As `masks`, but only what they take away in boxes (*box) from `low` (M, rank)."""
        parts = [self.labels[tuple(slice(a, a + b) for a, b in zip(at, box, strict=True))] for at in low.tolist()]
        taken = self._with_rest(absent, like).gather(1, torch.stack(parts).flatten(1))
        return Masks(low, taken.reshape(len(absent), 1, *box))

    def alone(self, which: Tensor, like: Tensor) -> Masks:
        """Masks that each take away one of them, `which` (M,), in boxes of one size."""
        box, low = self.boxes()
        absent = functional.one_hot(which, self.count).to(self.labels.device)
        return self.masks_in(box, low[which], absent, like)

    def one_by_one(self, like: Tensor) -> Stream:
        """All of them, `alone`."""
        return Stream(self.count, self.boxes()[0], lambda start, stop: self.alone(torch.arange(start, stop), like))

    @staticmethod
    def _with_rest(absent: Tensor, like: Tensor) -> Tensor:
        return functional.pad(absent.to(like), (0, 1))

    def boxes(self, which: Tensor | None = None) -> tuple[tuple[int, ...], Tensor]:
        """The size of a box that any of them fits into, or any of some (M,), and where each one's begins, (M, rank) on
        the CPU."""
        first, last = self._extents if which is None else (side[which] for side in self._extents)
        box = (last - first).amax(0) + 1
        return tuple(box.tolist()), first.minimum(torch.tensor(self.labels.shape) - box)

    @cached_property
    def _extents(self) -> tuple[Tensor, Tensor]:
        """The first and the last voxel of each along each axis, (count, rank)."""
        labels, none = self.labels.flatten().cpu(), torch.zeros(self.count + 1, dtype=torch.long)
        sides: dict[str, list[Tensor]] = {"amin": [], "amax": []}
        for axis, size in enumerate(self.labels.shape):
            shape = [-1 if a == axis else 1 for a in range(self.labels.ndim)]
            place = torch.arange(size).reshape(shape).expand(self.labels.shape).flatten()
            for side, found in sides.items():
                found.append(none.scatter_reduce(0, labels, place, side, include_self=False)[: self.count])
        return torch.stack(sides["amin"], 1), torch.stack(sides["amax"], 1)


def automatic_size(spatial: Sequence[int], spacing: Sequence[float], share: float, count: int = 200) -> float:
    """The size in mm of about `count` supervoxels that fill this share of a grid. Axes shorter than a supervoxel, as of
    a single slice, do not count."""
    sides = sorted(n * step for n, step in zip(spatial, spacing, strict=True))
    for i in range(len(sides)):
        size = float(np.prod(sides[i:]) * share / count) ** (1 / (len(sides) - i))
        if size <= sides[i]:
            break
    return size


def _pieces(spatial: Sequence[int], spacing: Sequence[float], size_mm: float) -> list[int]:
    """In how many pieces of about `size_mm` each axis falls."""
    return [min(n, max(1, round(n * step / size_mm))) for n, step in zip(spatial, spacing, strict=True)]


def grid(spatial: Sequence[int], spacing: Sequence[float], size_mm: float) -> np.ndarray:
    """Boxes as near to cubes of `size_mm` as fill the grid evenly, as labels (*spatial)."""
    labels = np.zeros(tuple(spatial), dtype=np.int64)
    for axis, (size, pieces) in enumerate(zip(spatial, _pieces(spatial, spacing, size_mm), strict=True)):
        cell = ((np.arange(size) + 0.5) * pieces / size).astype(np.int64)
        labels = labels * pieces + cell.reshape([-1 if a == axis else 1 for a in range(len(spatial))])
    return labels


def slic(x: np.ndarray, spacing: Sequence[float], size_mm: float, compactness: float, inside: np.ndarray) -> np.ndarray:
    """Supervoxels of about `size_mm` that follow the edges of `x` (C, *spatial), as labels (*spatial). Each is
    connected within `inside` (*spatial); those outside mean nothing.

    Achanta et al., "SLIC superpixels compared to state-of-the-art superpixel methods", 2012. Distances along an axis
    are relative to the supervoxel's size there, those of channels to their standard deviation.
    """
    spatial = x.shape[1:]
    deviation = x[:, inside].std(1).reshape(-1, *[1] * len(spatial)) * len(x) ** 0.5
    scaled = (x / np.where(deviation > 0, deviation, 1)).astype(np.float32)
    # SimpleITK makes as many as fit whole: choose the length that gives the number nearest to the one wanted.
    wanted = zip(spatial, _pieces(spatial, spacing, size_mm), strict=True)
    cell = [min((n // p, -(-n // p)), key=lambda c: abs(n // c - p)) for n, p in wanted]
    made = sitk.SLICImageFilter()
    made.SetSuperGridSize(cell[::-1])
    made.SetSpatialProximityWeight(compactness)
    # Several threads would add up in an order that is not always the same.
    made.SetNumberOfWorkUnits(1)
    labels = sitk.GetArrayFromImage(made.Execute(sitk.GetImageFromArray(np.moveaxis(scaled, 0, -1), isVector=True)))
    return _connected(labels.astype(np.int32), inside, int(np.prod(cell) * _LEAST))


def numbered(labels: np.ndarray, inside: np.ndarray) -> Supervoxels:
    """Supervoxels of `labels` (*spatial) without gaps in their numbers; only those `inside` (*spatial)."""
    known, place = np.unique(labels[inside], return_inverse=True)
    found = np.full(labels.shape, len(known), dtype=np.int64)
    found[inside] = place.reshape(-1)
    return Supervoxels(torch.from_numpy(found), len(known))


def _connected(labels: np.ndarray, inside: np.ndarray, least: int) -> np.ndarray:
    """`labels` with the pieces of each apart, `inside` only; pieces smaller than `least` voxels join a neighbour that
    is not, where they have one."""
    image = sitk.GetImageFromArray(np.where(inside, labels + 1, 0).astype(np.int32))
    pieces = sitk.GetArrayFromImage(sitk.ScalarConnectedComponent(image, 0.0, False)).astype(np.int64)
    settled = inside & (np.bincount(pieces.ravel()) >= least)[pieces]
    waiting = -1
    while waiting != (waiting := int((inside & ~settled).sum())):
        for axis, way in product(range(labels.ndim), (1, -1)):
            piece, known, here = (np.moveaxis(a, axis, 0)[::way] for a in (pieces, settled, inside))
            joins = here[1:] & ~known[1:] & known[:-1]
            piece[1:][joins] = piece[:-1][joins]
            known[1:][joins] = True
    return pieces
