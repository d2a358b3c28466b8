"""What the tests of concepts share: networks whose layer is the scan itself, and examples whose channels are brighter
where a concept is."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

import MedXAILib as mx

CHANNELS, GRID = 4, (3, 4, 5)
WEIGHTS = torch.tensor([[0.0, 0.0, 0.0, 0.0], [2.0, 0.0, -1.0, 0.5]])


class Pooled(nn.Module):
    """Scores that are linear in the pooled channels of `features`, which is the scan."""

    def __init__(self, pool: str = "mean") -> None:
        super().__init__()
        self.features, self.pool = nn.Identity(), pool
        width = 2 * CHANNELS if pool == "both" else CHANNELS
        self.head = nn.Linear(width, 2)
        with torch.no_grad():
            self.head.weight.copy_(torch.cat([WEIGHTS, WEIGHTS.flip(1)], 1)[:, :width])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(pooled(self.features(x), self.pool))


def pooled(x: Tensor, pool: str) -> Tensor:
    """Vectors of (N, C, D, H, W), independently of MedXAI's."""
    mean, largest = x.mean((2, 3, 4)), x.amax((2, 3, 4))
    return {"mean": mean, "max": largest, "both": torch.cat([mean, largest], 1)}[pool]


def model(pool: str = "mean") -> mx.Model:
    return mx.Model(Pooled(pool), class_names=("no", "yes"), channels=CHANNELS, layers=("features",))


def drawn(count: int, seed: int, **channels: int) -> tuple[Tensor, dict[str, np.ndarray]]:
    """Scans (N, C, *GRID) of noise, and concepts: where one is, its channel is brighter by 1."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, CHANNELS, *GRID, generator=generator)
    there = {}
    for name, channel in channels.items():
        there[name] = torch.randperm(count, generator=generator) % 2
        x[:, channel] += there[name].reshape(-1, 1, 1, 1)
    return x, {name: value.numpy().astype(float) for name, value in there.items()}


def examples(x: Tensor, concepts: dict[str, np.ndarray], labels: tuple[str, ...] = ()) -> mx.Examples:
    return mx.Examples.of([mx.Volume(one, np.eye(4)) for one in x], concepts, labels)


def by_name(scores: mx.ConceptScores) -> dict[str, mx.Concept]:
    return {concept.name: concept for concept in scores.concepts}
