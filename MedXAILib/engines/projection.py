"""Long vectors made short so that their inner products stay, on average, what they are.

Kane and Nelson, "Sparser Johnson-Lindenstrauss transforms", 2014: every number goes, with random signs, to a few random
places. That takes no matrix, which for the gradients of a network would be far larger than the network.
"""

from __future__ import annotations

import torch
from torch import Tensor

_PLACES = 4


def projected(vectors: Tensor, length: int, seed: int = 0) -> Tensor:
    """Vectors (N, D) as (N, `length`), the same for the same `seed` on every machine; as they are where D is no more
    than that, or `length` is 0. An inner product is off by about (2 / `length`) ** 0.5 times both vectors' lengths."""
    size = vectors.shape[1]
    if not 0 < length < size:
        return vectors
    generator = torch.Generator().manual_seed(seed)
    short = vectors.new_zeros(len(vectors), length)
    for _ in range(_PLACES):
        places = torch.randint(length, (size,), generator=generator, dtype=torch.int32)
        signs = torch.randint(2, (size,), generator=generator, dtype=torch.int8) * 2 - 1
        short.index_add_(1, places.to(vectors.device), vectors * signs.to(vectors.device))
    return short / _PLACES**0.5
