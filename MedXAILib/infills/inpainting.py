"""What is smoothest given the surroundings: classical inpainting.

Bertalmio et al., "Image inpainting", 2000; the harmonic equation is its linear form (Chan and Shen 2002).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from MedXAILib.engines.boxes import cut
from MedXAILib.engines.masks import Masks
from MedXAILib.explainer import Question
from MedXAILib.infills.infill import Infill

# Conjugate gradients end when what is left is this small against the spread of the scan, or after so many steps.
_RESIDUAL, _STEPS = 1e-6, 1000


class Inpainting(Infill):
    """The solution of Laplace's equation, in millimetres, with the voxels that a mask leaves alone as boundary; nothing
    flows across the border of the scan. The scan's mean for a mask that leaves none."""

    def __init__(self, question: Question) -> None:
        super().__init__(question)
        x = question.x
        values = x.flatten(2)
        self.mean = values.mean(2).reshape(1, -1, *[1] * (x.ndim - 2))
        self.spread = values.amax(2) - values.amin(2)
        finest = min(question.seen[0].spacing)
        self.weights = [(finest / step) ** 2 for step in question.seen[0].spacing]

    def patches(self, masks: Masks, draws: Sequence[int]) -> Tensor:
        x = self.question.x
        rank = len(masks.box)
        low, outer = masks.low - 1, [b + 2 for b in masks.box]
        inside = cut(torch.ones_like(x[:, :1]), low, outer)
        taken = functional.pad((masks.share > 0).to(x), [1] * 2 * rank).expand_as(inside)
        kept = inside - taken
        values = cut(x, low, outer)
        some = kept.flatten(1).any(1).reshape(-1, *[1] * (rank + 1))
        # A mask that leaves nothing has no solution, and nothing to solve.
        unknown = taken * some
        start = torch.where(taken > 0, torch.where(some, _filled(values, kept), self.mean), values)
        found = _solved(start, inside, unknown, self.weights, _RESIDUAL * self.spread)
        return found[(slice(None), slice(None), *[slice(1, -1)] * rank)]


def _solved(u: Tensor, inside: Tensor, unknown: Tensor, weights: Sequence[float], enough: Tensor) -> Tensor:
    """`u` (M, C, *box) with its `unknown` voxels (M, 1, *box) made harmonic, to a residual of `enough` (1, C), by
    conjugate gradients: each of the M on its own, so that none depends on the others."""
    shape = (*u.shape[:2], *[1] * (u.ndim - 2))
    degree = _neighbours(inside, weights) * unknown

    def left(v: Tensor) -> Tensor:
        return degree * v - _neighbours(v, weights) * unknown

    scale = torch.where(unknown > 0, 1 / degree.clamp_min(1e-12), 0)
    residual = -left(u)
    z = scale * residual
    way, slope = z, (residual * z).flatten(2).sum(2)
    going = z.abs().flatten(2).amax(2) > enough
    for _ in range(_STEPS):
        if not going.any():
            break
        along = left(way)
        length = slope / (way * along).flatten(2).sum(2)
        length = torch.where(going, length, 0).reshape(shape)
        u = u + length * way
        residual = residual - length * along
        z = scale * residual
        before, slope = slope, (residual * z).flatten(2).sum(2)
        going = going & (z.abs().flatten(2).amax(2) > enough)
        way = z + torch.where(going, slope / before, 0).reshape(shape) * way
    return u


def _neighbours(v: Tensor, weights: Sequence[float]) -> Tensor:
    """The weighted sum over the neighbours of each voxel of (M, C, *box)."""
    total = torch.zeros_like(v)
    for axis, weight in enumerate(weights, start=2):
        length = v.shape[axis] - 1
        total.narrow(axis, 1, length).add_(v.narrow(axis, 0, length), alpha=weight)
        total.narrow(axis, 0, length).add_(v.narrow(axis, 1, length), alpha=weight)
    return total


def _filled(values: Tensor, kept: Tensor) -> Tensor:
    """A first guess everywhere: the mean of what is `kept` (M, 1, *box) of `values` (M, C, *box) nearby, found on ever
    coarser grids."""
    total = values * kept
    if min(values.shape[2:]) < 2:
        return (
            (total.flatten(2).sum(2) / kept.flatten(2).sum(2).clamp_min(1))
            .reshape(*values.shape[:2], *[1] * (values.ndim - 2))
            .expand_as(values)
        )
    half = [-(-n // 2) for n in values.shape[2:]]
    odd = [n % 2 for n in reversed(values.shape[2:])]
    pad = [p for o in odd for p in (0, o)]
    pool = functional.avg_pool3d if values.ndim == 5 else functional.avg_pool2d
    weight = pool(functional.pad(kept, pad), 2)
    mean = pool(functional.pad(total, pad), 2) / weight.clamp_min(1e-12)
    coarse = _filled(mean, (weight > 0).to(kept))
    mode = "trilinear" if values.ndim == 5 else "bilinear"
    fine = functional.interpolate(coarse, [2 * h for h in half], mode=mode, align_corners=False)
    fine = fine[(slice(None), slice(None), *(slice(0, n) for n in values.shape[2:]))]
    return torch.where(kept > 0, values, fine)
