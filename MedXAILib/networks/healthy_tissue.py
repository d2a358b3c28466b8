"""What healthy lung could stand in a place that cannot be seen: a conditional variational autoencoder.

A plain autoencoder of whole patches knows what lung looks like but not how the vessels and walls around *this* place
go on; this one reads the surroundings and fills the hidden place only. Its latent variables hold what the surroundings
do not tell, so that every draw is another lung that could be there.

Sohn, Lee and Yan, "Learning structured output representation using deep conditional generative models", 2015.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

MULTIPLE = 8
"""The sides of what the network sees are multiples of so many voxels."""
CELL = 4
"""Voxels along each side of the cells that have latent variables of their own."""

_LUNG = 0.1
_SCALE = 0.1
"""What the surroundings do not tell is of this size, in units of the image."""


class HealthyTissue(nn.Module):
    """Image (N, 1, D, H, W) in 0..1 and below 0 where it is hidden -> the same, with healthy tissue there.

    It learns what is to be added to a smooth interpolation. A latent variable says how a cell differs from what is
    likely there; by how much it may is for the surroundings to say.
    """

    def __init__(self, width: int = 16, latent: int = 4) -> None:
        super().__init__()
        self.latent = latent
        self.fine = nn.Sequential(_block(2, width, kernel=4, stride=2), _block(width, width))
        self.middle = nn.Sequential(_block(width, 2 * width, stride=2), _block(2 * width, 2 * width))
        self.coarse = nn.Sequential(
            _block(2 * width, 4 * width, stride=2), _block(4 * width, 4 * width), nn.Conv3d(4 * width, 2 * width, 1)
        )
        self.joined = nn.Sequential(_block(2 * width, 2 * width), nn.Conv3d(2 * width, width, 1))
        self.healthy = nn.Sequential(_block(width, width), nn.ConvTranspose3d(width, 1, 4, stride=2, padding=1))
        # What it has not learnt yet is left smooth.
        for last in self.healthy[1].parameters():
            nn.init.zeros_(last)
        self.told = nn.Sequential(nn.Conv3d(2, 32, CELL, stride=CELL), nn.ReLU(), nn.Conv3d(32, 2 * latent, 1))
        self.freedom = nn.Conv3d(2 * width, latent, 1)
        self.drawn = nn.ConvTranspose3d(latent, 1, 2 * CELL, stride=CELL, padding=CELL // 2, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        """With the most likely draw in the hidden places."""
        return torch.where(image < 0, self.fill(image, image.new_zeros(self.noise_shape(image))), image)

    def noise_shape(self, image: Tensor) -> tuple[int, ...]:
        """Of the latent variables, which are standard normal: (N, latent, D / 4, H / 4, W / 4)."""
        return (len(image), self.latent, *(size // CELL for size in image.shape[2:]))

    def fill(self, image: Tensor, noise: Tensor, start: Tensor | None = None) -> Tensor:
        """What is healthy, hidden or not, (N, 1, D, H, W); `noise` is of `noise_shape`, `start` is `smoothed(image)` if
        that is known."""
        start = smoothed(image) if start is None else start
        fine = self.fine(torch.cat([start, (image < 0).to(image)], dim=1))
        middle = self.middle(fine)
        middle = middle + _twice(self.coarse(middle))
        likely: Tensor = self.healthy(fine + _twice(self.joined(middle)))
        free = noise * 2 * self.freedom(middle).sigmoid() * self.cells(image)
        return start + likely + _SCALE * self.drawn(free)

    def cells(self, image: Tensor) -> Tensor:
        """Which cells have something hidden (1), and so latent variables that matter: (N, 1, D / 4, H / 4, W / 4)."""
        return functional.max_pool3d((image < 0).to(image), CELL)

    def posterior(self, image: Tensor, truth: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of the latent variables, both of `noise_shape`, when it is known what
        hides in `image`: `truth`."""
        hidden = (image < 0).to(image)
        missed = (truth - start) * hidden / _SCALE
        mean, log_variance = self.told(torch.cat([missed, hidden], dim=1)).chunk(2, dim=1)
        return mean, log_variance.clamp(-8, 4) - 2


@torch.no_grad()
def smoothed(image: Tensor) -> Tensor:
    """`image` with what is below 0 interpolated from ever coarser averages of the rest (Gortler et al. 1996, The
    lumigraph)."""
    visible = (image >= 0).to(image)
    values, shares = [image * visible], [visible]
    # The coarsest is smoothed, too, for which it needs three voxels.
    while all(size % 2 == 0 and size >= 6 for size in values[-1].shape[2:]):
        values.append(functional.avg_pool3d(values[-1], 2))
        shares.append(functional.avg_pool3d(shares[-1], 2))
    value, share = (part.mean((2, 3, 4), keepdim=True) for part in (values[-1], shares[-1]))
    # Lung, where nothing is visible.
    filled = torch.where(share > 0, value / share.clamp_min(1e-6), _LUNG).expand_as(values[-1])
    for value, share in zip(reversed(values), reversed(shares), strict=True):
        filled = value + (1 - share) * functional.interpolate(filled, size=value.shape[2:], mode="trilinear")
        for _ in range(3):
            around = functional.avg_pool3d(filled, 3, stride=1, padding=1, count_include_pad=False)
            filled = value + (1 - share) * around
    return filled


def _twice(features: Tensor) -> Tensor:
    """At twice the resolution."""
    return functional.interpolate(features, scale_factor=2.0, mode="nearest")


def _block(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(inputs, outputs, kernel, stride, padding=1, bias=False),
        nn.BatchNorm3d(outputs),
        nn.ReLU(inplace=True),
    )
