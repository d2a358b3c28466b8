"""How similar vectors are."""

from __future__ import annotations

from typing import Literal

import numpy as np

Metric = Literal["cosine", "dot"]


def similarities(vectors: np.ndarray, others: np.ndarray, metric: Metric) -> np.ndarray:
    """Of `vectors` (M, K) to `others` (N, K), (M, N): inner products, or the cosines of the angles between them; to a
    vector that is zero it is zero."""
    if metric == "dot":
        return vectors @ others.T
    return unit(vectors) @ unit(others).T


def late_interaction(regions: np.ndarray, others: np.ndarray) -> float:
    """The mean over `regions` (R, K) of the cosine with the nearest of `others` (S, K) (Khattab and Zaharia, "ColBERT",
    2020)."""
    return float(similarities(regions, others, "cosine").max(1).mean())


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors (N, K) of length one; those of length zero as they are."""
    vectors = vectors.astype(np.result_type(vectors, np.float32), copy=False)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-30)
