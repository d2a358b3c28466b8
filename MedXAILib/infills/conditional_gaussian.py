"""What could be in the masked voxels, given what surrounds them: draws from a Gaussian field like the scan.

Zintgraf et al., "Visualizing deep neural network decisions: prediction difference analysis", 2017; Seo et al.,
"Regional multi-scale approach for visually pleasing explanations of deep neural networks", 2020. Both fit a Gaussian to
patches. Here patches are alike everywhere: their covariance is one function of the distance, and a free draw is a
Fourier transform (Dietrich and Newsam 1997). The surroundings then pull it to where it meets them (Hoffman and Ribak
1991), which gives the conditional distribution, exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from math import pi, prod
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from MedXAILib.engines.boxes import cut
from MedXAILib.engines.masks import Masks
from MedXAILib.explainer import Question
from MedXAILib.infills.infill import Infill

# Voxels from each other at which nothing is related any more; correlations fade out towards it.
_REACH = 40

# So many voxels, masked ones and those around them, pull on each other as they have to. Of more, the pull is found on a
# coarser grid; what is drawn is on the scan's own in any case.
_MOST = 2048

# How many voxels of that grid around a box count.
_AROUND = 2

# What a voxel has to itself, of its variance and at least, so that the equations have a solution.
_OWN, _LEAST = 1e-6, 1e-20


class ConditionalGaussian(Infill):
    """Draws from N(m2 + S21 S11⁻¹ (x1 - m1), S22 - S21 S11⁻¹ S12): masked voxels (2), given those around them (1).

    Means and covariances are those of the scan, or of `scans` (K, C, *spatial) on its grid, each a channel's own after
    the channels were made uncorrelated. The formula holds exactly up to 2048 voxels; for larger masks the mean of each
    block of voxels is conditioned on those of the blocks around. Where a mask leaves nothing, nothing conditions.
    """

    random: ClassVar[bool] = True

    def __init__(self, question: Question, scans: Tensor | None = None) -> None:
        super().__init__(question)
        known = (question.x if scans is None else scans).detach().cpu().double()
        flat = known.transpose(0, 1).flatten(1)
        self.mean = flat.mean(1)
        self.axes = torch.linalg.eigh(torch.cov(flat, correction=0).reshape(len(flat), len(flat)))[1]
        parts = torch.einsum("dc,kd...->kc...", self.axes, known - _shaped(self.mean, known))
        self.covariance = torch.stack([_autocovariance(part) for part in parts]).mean(0)
        """Of two voxels, by how far one is from the other along each axis: (C, *lags), no distance in the middle."""
        middle = self.covariance.flatten(1)[:, self.covariance[0].numel() // 2]
        middle += _OWN * middle + _LEAST
        # What is computed is computed where the sample is, in single precision at least.
        self._like = torch.zeros(
            (), device=question.x.device, dtype=torch.promote_types(question.x.dtype, torch.float32)
        )
        # Of functions that know nothing of this object, or it would refer to itself and outlive its last use.
        self._spectrum = lru_cache(maxsize=4)(partial(_spectrum, self._like, self.covariance))
        self._coarse = lru_cache(maxsize=4)(partial(_coarse, self.covariance))
        self._pull = lru_cache(maxsize=32)(partial(_pull, self._like, self._coarse))

    def patches(self, masks: Masks, draws: Sequence[int]) -> Tensor:
        x, box = self.question.x, masks.box
        factor = self._factor(box)
        margin = self._margin(box, factor)
        # Whole coarse voxels.
        outer = tuple(-(-(b + 2 * m) // f) * f for b, m, f in zip(box, margin, factor, strict=True))
        low = masks.low - torch.tensor(margin)
        kept = cut(torch.ones_like(x[:, :1]), low, outer)
        inner = (slice(None), slice(None), *(slice(m, m + b) for m, b in zip(margin, box, strict=True)))
        kept[inner] *= masks.share <= 0
        axes, mean = self.axes.to(self._like), _shaped(self.mean.to(self._like), x)
        free = torch.stack([self._free(outer, draw) for draw in draws])
        away = torch.einsum("dc,md...->mc...", axes, cut(x, low, outer).to(self._like) - mean) - free
        pull = self._pulled(away, kept.to(self._like), factor)
        return (torch.einsum("cd,md...->mc...", axes, (free + pull)[inner]) + mean).to(x.dtype)

    def _factor(self, box: Sequence[int]) -> tuple[int, ...]:
        """By how much the grid is coarsened for a box: first along the axes where voxels are close."""
        factor, spacing = [1] * len(box), self.question.seen[0].spacing
        while (
            prod(-(-(b + 2 * m) // f) for b, m, f in zip(box, self._margin(box, factor), factor, strict=True)) > _MOST
        ):
            factor[min(range(len(box)), key=lambda a: factor[a] * spacing[a])] += 1
        return tuple(factor)

    def _margin(self, box: Sequence[int], factor: Sequence[int]) -> list[int]:
        return [_AROUND * f if b < n else 0 for b, f, n in zip(box, factor, self.question.x.shape[2:], strict=True)]

    def _free(self, size: tuple[int, ...], draw: int) -> Tensor:
        """A draw that nothing conditions, (C, *size), of the channels made uncorrelated."""
        root, torus = self._spectrum(size)
        noise = torch.randn(len(root), *torus, generator=self.question.run.generator(draw)).to(root)
        axes = tuple(range(1, noise.ndim))
        drawn = torch.fft.irfftn(torch.fft.rfftn(noise, dim=axes) * root, torus, dim=axes)
        return drawn[(slice(None), *(slice(0, n) for n in size))]

    def _pulled(self, away: Tensor, kept: Tensor, factor: tuple[int, ...]) -> Tensor:
        """By how much the surroundings, `away` (M, C, *outer) from a draw where `kept` (M, 1, *outer), change it."""
        weight = _pooled(kept, factor)
        mean = _pooled(away * kept, factor) / weight.clamp_min(1e-12)
        result = mean.flatten(2)
        # A block of which most is left says what it is; of another the blocks around do.
        known = (weight > 0.5 - 1e-3).flatten(1).cpu().numpy()
        alike: dict[bytes, list[int]] = {}
        for m, of_mask in enumerate(known):
            alike.setdefault(of_mask.tobytes(), []).append(m)
        for pattern, members in alike.items():
            there = torch.from_numpy(np.frombuffer(pattern, dtype=bool).copy()).to(away.device)
            weights = self._pull(factor, tuple(mean.shape[2:]), pattern)
            some = result[members]
            some[:, :, ~there] = torch.einsum("cij,mcj->mci", weights, some[:, :, there])
            result[members] = some
        coarse = result.reshape(mean.shape)
        if prod(factor) == 1:
            return coarse
        mode = "trilinear" if len(factor) == 3 else "bilinear"
        return functional.interpolate(coarse, away.shape[2:], mode=mode, align_corners=False)


def _pull(
    like: Tensor,
    coarse: Callable[[tuple[int, ...]], Tensor],
    factor: tuple[int, ...],
    grid: tuple[int, ...],
    pattern: bytes,
) -> Tensor:
    """S21 S11⁻¹, (C, unknown, known), of the voxels of a grid of which a pattern tells those that are known."""
    covariance = coarse(factor)
    known = np.frombuffer(pattern, dtype=bool).reshape(grid)
    one, two = (torch.from_numpy(np.argwhere(which)) for which in (known, ~known))
    factored = torch.linalg.cholesky(_between(covariance, one, one))
    return torch.cholesky_solve(_between(covariance, one, two), factored).mT.to(like)


def _coarse(covariance: Tensor, factor: tuple[int, ...]) -> Tensor:
    """The covariance of the means of blocks of `factor` voxels."""
    for axis, f in enumerate(factor, start=1):
        rows = covariance.movedim(axis, -1)
        reach = rows.shape[-1] // 2
        steps = -(-(reach + f - 1) // f)
        kernel = (f - (torch.arange(2 * f - 1) - (f - 1)).abs()).to(rows) / f**2
        padded = functional.pad(rows.reshape(-1, 1, rows.shape[-1]), [steps * f + f - 1 - reach] * 2)
        means = functional.conv1d(padded, kernel[None, None], stride=f)
        covariance = means.reshape(*rows.shape[:-1], -1).movedim(-1, axis)
    return covariance


def _spectrum(like: Tensor, covariance: Tensor, size: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
    """The root of the covariance's spectrum on a torus on which a box of `size` does not meet itself."""
    torus = tuple(_quick(n + r // 2) for n, r in zip(size, covariance.shape[1:], strict=True))
    around = covariance
    for axis, n in enumerate(torus, start=1):
        reach = around.shape[axis] // 2
        place = (torch.arange(-reach, reach + 1)) % n
        shape = [*around.shape[:axis], n, *around.shape[axis + 1 :]]
        around = around.new_zeros(shape).index_add_(axis, place, around)
    spectrum = torch.fft.rfftn(around, dim=tuple(range(1, around.ndim))).real.clamp_min(0).sqrt()
    return spectrum.to(like), torus


def _shaped(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(1, -1, *[1] * (like.ndim - 2))


def _autocovariance(x: Tensor) -> Tensor:
    """Of each channel of `x` (C, *spatial) of mean zero, (C, *lags).

    To stay a covariance it must not divide by the number of pairs there are at a distance. Voxels near the border count
    less instead, which changes it little over short distances; over long ones it fades out by a Parzen window.
    """
    size, axes = x.shape[1:], tuple(range(1, x.ndim))
    reach = [min(n, _REACH) for n in size]
    faded = x
    for axis, n in zip(axes, size, strict=True):
        weight = ((torch.arange(n).to(x) + 0.5) * (pi / n)).sin()
        faded = faded * _along(weight, axis, x)
    padded = [_quick(n + r) for n, r in zip(size, reach, strict=True)]
    found = torch.fft.irfftn(torch.fft.rfftn(faded, padded, dim=axes).abs() ** 2, padded, dim=axes)
    for axis, r, n in zip(axes, reach, size, strict=True):
        lags = torch.arange(1 - r, r)
        far = lags.abs().to(x) / r if n > r else torch.zeros(len(lags)).to(x)
        window = torch.where(far <= 0.5, 1 - 6 * far**2 + 6 * far**3, 2 * (1 - far) ** 3)
        found = found.index_select(axis, lags % found.shape[axis]) * _along(window, axis, x)
    variance = found.flatten(1).amax(1).clamp_min(1e-300)
    return found * _shaped(x.flatten(1).square().mean(1) / variance, found[None])[0]


def _along(values: Tensor, axis: int, like: Tensor) -> Tensor:
    return values.reshape([-1 if a == axis else 1 for a in range(like.ndim)])


def _between(covariance: Tensor, one: Tensor, two: Tensor) -> Tensor:
    """The covariances (C, N, M) of voxels at `one` (N, rank) with those at `two` (M, rank)."""
    # What lies farther apart than the covariance reaches finds a zero.
    padded = functional.pad(covariance, [1] * 2 * (covariance.ndim - 1))
    index = torch.zeros((), dtype=torch.long)
    for axis, n in enumerate(padded.shape[1:]):
        apart = two[None, :, axis] - one[:, None, axis] + n // 2
        index = index * n + apart.clamp_(0, n - 1)
    return padded.flatten(1)[:, index]


def _pooled(x: Tensor, factor: tuple[int, ...]) -> Tensor:
    """The means of blocks of `factor` voxels."""
    if prod(factor) == 1:
        return x
    return functional.avg_pool3d(x, factor) if len(factor) == 3 else functional.avg_pool2d(x, factor)


def _quick(n: int) -> int:
    """The next number that a Fourier transform is quick for: with no prime factor above five."""
    while True:
        rest = n
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return n
        n += 1
