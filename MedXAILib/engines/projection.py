"""Long vectors made short so that their inner products stay, on average, what they are.

Kane and Nelson, "Sparser Johnson-Lindenstrauss transforms", 2014: every number goes, with random signs, to a few random
places. That takes no matrix, which for the gradients of a network would be far larger than the network.
"""

from __future__ import annotations

import torch
from torch import Tensor

_PLACES = 4


class Projection:
    """From vectors of `size` numbers to such of `length`, the same for the same `seed` on every machine; as they are
    where they are no longer than that, or `length` is 0. An inner product has the standard deviation
    (2 / `length`) ** 0.5 times the lengths of both vectors."""

    def __init__(self, size: int, length: int, seed: int = 0) -> None:
        self.length = length if 0 < length < size else 0
        if self.length:
            generator = torch.Generator().manual_seed(seed)
            self._places = torch.randint(self.length, (_PLACES, size), generator=generator)
            self._signs = torch.randint(2, (_PLACES, size), generator=generator, dtype=torch.int8) * 2 - 1

    def __call__(self, vectors: Tensor) -> Tensor:
        """Vectors (N, size) -> (N, length)."""
        if not self.length:
            return vectors
        short = vectors.new_zeros(len(vectors), self.length)
        for places, signs in zip(self._places.to(vectors.device), self._signs.to(vectors.device), strict=True):
            short.index_add_(1, places, vectors * signs)
        return short / _PLACES**0.5
