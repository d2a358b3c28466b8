"""A ladder of codes, of which the uppermost are two: a map of all cases, on which classes part.

Biffi et al., "Explainable anatomical shape analysis through deep hierarchical generative models", 2020; Sønderby et
al., "Ladder variational autoencoders", 2016.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from MedXAILib.networks.vae import Autoencoder, Decoder, Encoder

LEVELS = (2, 6, 16)
"""Codes of each level, from the top."""


class LadderVAE(Autoencoder):
    """A variational autoencoder whose codes have three levels: what those of a level are likely to be is for the level
    above to say. On the two of the top a small network decides between `classes`.

    A code is how far a variable is from what is likely there, in standard deviations, so that all of them together are
    standard normal; those of the top come first, and are called x and y.
    """

    def __init__(
        self,
        attributes: Sequence[str] = (),
        classes: Sequence[str] = (),
        cases: int = 0,
        width: int = 16,
        levels: Sequence[int] = LEVELS,
    ) -> None:
        super().__init__(sum(levels), ("x", "y"), attributes, classes, cases)
        self.levels = tuple(levels)
        hidden = 2 * width
        self.encoder = Encoder(hidden, 12)
        self.up = nn.ModuleList(_mlp(hidden, hidden) for _ in levels[1:])
        self.seen = nn.ModuleList(nn.Linear(hidden, 2 * size) for size in levels)
        self.likely = nn.ModuleList(_mlp(above, 2 * size, hidden) for above, size in pairwise(levels))
        self.class_head = nn.Sequential(nn.Linear(levels[0], width), nn.Tanh(), nn.Linear(width, len(classes)))
        self.decoder = Decoder(levels[-1], width)

    def evidence(self, image: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What the image says of each level, from the top: means and logarithms of variances."""
        features = [functional.relu(self.encoder(image))]
        for step in self.up:
            features.append(step(features[-1]))
        return [_gaussian(head(f)) for head, f in zip(self.seen, reversed(features), strict=True)]

    def prior(self, level: int, above: Tensor) -> tuple[Tensor, Tensor]:
        """What is likely at `level`, counted from the top, given the variables of that `above`: mean and logarithm of
        the variance."""
        return _gaussian(self.likely[level - 1](above))

    def climb(self, image: Tensor, noise: Sequence[Tensor] | None = None) -> list[Rung]:
        """The levels from the top, each with what is likely there, what it is by the image, and a variable of it: the
        mean, or drawn with `noise`."""
        rungs: list[Rung] = []
        for level, (mean, log_variance) in enumerate(self.evidence(image)):
            flat = torch.zeros_like(mean)
            prior = self.prior(level, rungs[-1][2]) if rungs else (flat, flat)
            posterior = _both(prior, (mean, log_variance))
            spread = 0 if noise is None else noise[level] * (posterior[1] / 2).exp()
            rungs.append((prior, posterior, posterior[0] + spread))
        return rungs

    def encode(self, image: Tensor) -> Tensor:
        return torch.cat([(value - p[0]) / (p[1] / 2).exp() for p, _, value in self.climb(image)], dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        value, *below = codes.split(self.levels, dim=1)
        for level, part in enumerate(below, 1):
            mean, log_variance = self.prior(level, value)
            value = mean + part * (log_variance / 2).exp()
        drawn: Tensor = self.decoder(value)
        return drawn


Rung = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]


def _mlp(inputs: int, outputs: int, hidden: int | None = None) -> nn.Sequential:
    if hidden is None:
        return nn.Sequential(nn.Linear(inputs, outputs), nn.ReLU())
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def _gaussian(said: Tensor) -> tuple[Tensor, Tensor]:
    mean, log_variance = said.chunk(2, dim=1)
    return mean, log_variance.clamp(-8, 2)


def _both(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The product of two Gaussians, each mean counting by its precision."""
    first, second = (-one[1]).exp(), (-other[1]).exp()
    return (one[0] * first + other[0] * second) / (first + second), -(first + second).log()
