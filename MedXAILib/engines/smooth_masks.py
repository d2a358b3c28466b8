"""Smooth masks of a volume from values on a coarse grid, whose cells have a size in millimetres."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod

import torch
from torch import Tensor

from MedXAILib.engines.windows import each
from MedXAILib.explainer import Question


@dataclass(frozen=True)
class SmoothMasks:
    """Masks of a volume of `size` voxels, `spacing` mm apart, linear between nodes that are a `cell` in mm apart along
    each axis.

    The nodes lie symmetrically about the volume's middle and reach at least half a cell beyond its outermost voxels, so
    that masks can be shifted by as much.
    """

    size: tuple[int, ...]
    spacing: tuple[float, ...]
    cell: tuple[float, ...]

    @classmethod
    def of(cls, question: Question, cell: Sequence[float], per_side: int) -> SmoothMasks:
        """Of the one sample of `question`, with cells of `cell` in mm, for all axes or each; if empty, as many as
        `per_side` along each side of a cube would be. No cell is smaller than a voxel.

        Raises:
            MedXAIError: when there are neither one nor as many lengths as axes.
        """
        size, spacing = tuple(question.x.shape[2:]), question.seen[0].spacing
        rank = len(size)
        lengths = tuple(cell) or ((prod(size) * prod(spacing)) ** (1 / rank) / per_side,)
        return cls(size, spacing, tuple(max(mm, step) for mm, step in zip(each(lengths, rank), spacing, strict=True)))

    @property
    def nodes(self) -> tuple[int, ...]:
        """How many nodes there are along each axis."""
        # A little less than it is, lest rounding adds a node.
        return tuple(
            ceil((n - 1) * step / cell - 1e-6) + 2
            for n, step, cell in zip(self.size, self.spacing, self.cell, strict=True)
        )

    def __call__(self, values: Tensor, shift: Tensor | None = None) -> Tensor:
        """The masks (M, 1, *size) of `values` (M, 1, *nodes), shifted by `shift` (M, rank) of a cell, -0.5 to 0.5."""
        out = values[:, 0]
        shift = torch.zeros(1, len(self.size)) if shift is None else shift
        for axis, (size, nodes) in enumerate(zip(self.size, self.nodes, strict=True)):
            mm = (torch.arange(size, device=out.device, dtype=out.dtype) - (size - 1) / 2) * self.spacing[axis]
            voxel = mm / self.cell[axis] + (nodes - 1) / 2
            node = torch.arange(nodes, device=out.device, dtype=out.dtype)
            apart = (voxel - node[:, None]) + shift[:, axis, None, None].to(out)
            rows = out.movedim(1, -1)
            # This axis goes to the end; after all of them each is in its place again.
            out = (rows.flatten(1, -2) @ (1 - apart.abs()).clamp_min(0)).reshape(*rows.shape[:-1], size)
        return out[:, None]

    def surface(self, values: Tensor) -> Tensor:
        """The surface of a mask of `values` (1, 1, *nodes): the faces between cells in mm², as far as these differ,
        relative to all the cells' volume in units of an average side."""
        side = prod(self.cell) ** (1 / len(self.cell))
        differ = [values.diff(dim=axis).abs().sum() for axis in range(2, values.ndim)]
        return torch.stack([d * side / mm for d, mm in zip(differ, self.cell, strict=True)]).sum() / values.numel()
