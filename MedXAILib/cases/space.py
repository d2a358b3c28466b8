"""What a space is in which scans are compared, and what each place of a scan adds to its vector there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from MedXAILib.cases.similarity import Metric, similarities
from MedXAILib.engines.capture import Captured
from MedXAILib.model import Model


class Space(ABC):
    """From scans to vectors, by a network. A `version` tells vectors from those that an older MedXAI made."""

    name: ClassVar[str]
    title: ClassVar[str]
    metric: ClassVar[Metric] = "cosine"
    version: ClassVar[int] = 1

    @abstractmethod
    def embed(self, model: Model, x: Tensor, labels: Sequence[str] | None = None) -> Tensor:
        """The vectors (N, K), float32 on the CPU, of what the network sees, `x` (N, C, *spatial). `labels` is what is
        known of each, for spaces that learn from it.

        Raises:
            MedXAIError: when the network has no such space, or the labels are missing.
        """

    def similarity(self, vectors: np.ndarray, others: np.ndarray) -> np.ndarray:
        """(Q, N), of each of `vectors` (Q, K) with each of `others` (N, K), by the metric of this space."""
        return similarities(vectors, others, self.metric)


@dataclass(frozen=True, eq=False)
class Places:
    """What each place of a network's grid adds to the vectors of N scans.

    `values` (N, K, *grid), float64, sum to the vectors; of a network that does not say, they are on a single place.
    `captured` knows where in the scan the places are.
    """

    values: Tensor
    captured: Captured

    @property
    def mapped(self) -> bool:
        """Whether there is more than one place."""
        return self.values[0, 0].numel() > 1

    @property
    def vectors(self) -> Tensor:
        """(N, K)."""
        return self.values.flatten(2).sum(2)

    def alike(self, others: Tensor) -> Tensor:
        """What each place adds to the cosine between the vectors and `others` (N or 1, K): (N, *grid), which sums to it
        (Stylianou, Souvenir and Pless, "Visualizing deep similarity networks", 2019)."""
        others = others.to(self.values)
        length = self.vectors.norm(dim=1, keepdim=True) * others.norm(dim=1, keepdim=True)
        return torch.einsum("nk...,nk->n...", self.values, (others / length.clamp_min(1e-30)).expand_as(self.vectors))

    def placed(self, maps: Tensor) -> Tensor:
        """Maps (N, *grid) on the input grid, (N, 1, *spatial): each place where it looks, and linear between them, so
        that voxels no longer sum to what the places did."""
        return self.captured.place(maps[:, None])
