"""How much of what is truly nearest a search finds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from MedXAILib.cases.similarity import Metric, similarities

BEST = 10
"""Recall is of so many."""

_TOLERANCE = 1e-5


@dataclass(frozen=True, eq=False)
class Sample:
    """Vectors (M, K) of cases, and for each the similarity (M, up to 1 + `BEST`) of the nearest cases, itself one of
    them, the greatest first."""

    vectors: np.ndarray
    nearest: np.ndarray

    @classmethod
    def of(cls, vectors: np.ndarray, batches: Iterable[np.ndarray], metric: Metric) -> Sample:
        """All cases, in `batches` (N, K), are compared with `vectors`."""
        nearest = np.empty((len(vectors), 0))
        for batch in batches:
            found = np.concatenate([nearest, similarities(vectors, batch, metric)], 1)
            nearest = -np.sort(-found, 1)[:, : BEST + 1]
        return cls(vectors, nearest)

    def recall(self, search: Callable[[np.ndarray], Sequence[float]]) -> float:
        """The share of the nearest that `search` finds, which gives the similarity of 1 + `BEST` cases to a vector
        (K,). To find the case itself is no merit."""
        if len(self.nearest) == 0 or self.nearest.shape[1] < 2:
            return 1.0
        shares = []
        for vector, nearest in zip(self.vectors, self.nearest, strict=True):
            enough = nearest[-1] - _TOLERANCE * max(1.0, float(abs(nearest).max()))
            found = sum(similarity >= enough for similarity in search(vector))
            shares.append((found - 1) / (len(nearest) - 1))
        return float(np.mean(shares))
