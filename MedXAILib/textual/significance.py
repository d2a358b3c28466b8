"""Whether a number could be chance: held-out folds, random draws, and many tests at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import t as student  # type: ignore[import-untyped]

FOLDS = 5


def folds(patients: Sequence[Any], random: np.random.Generator) -> list[np.ndarray]:
    """`FOLDS` masks (N,) of what is held out in turn: all of a patient at once, if there are as many patients."""
    names, of = np.unique(np.asarray(patients), return_inverse=True)
    if len(names) < FOLDS:
        of = np.arange(len(of))
    fold = random.permutation(of.max() + 1) % FOLDS
    return [fold[of] == k for k in range(FOLDS)]


def shuffled(known: np.ndarray, patients: Sequence[Any], random: np.random.Generator) -> np.ndarray:
    """`known` (N,), dealt out anew at random. What is the same for all scans of a patient stays so."""
    _, first, of = np.unique(np.asarray(patients), return_index=True, return_inverse=True)
    if len(first) >= FOLDS and np.array_equal(known, known[first][of]):
        return random.permutation(known[first])[of]
    return random.permutation(known)


def exceeded(value: float, drawn: Sequence[float] | np.ndarray) -> float:
    """The p of a permutation test: how often chance, `drawn`, gives `value` or more."""
    return float((1 + (np.asarray(drawn) >= value).sum()) / (1 + len(drawn)))


def among(value: float, drawn: np.ndarray) -> float:
    """The two-sided p of `value` being one more of those `drawn` by chance, by Student's t of a new observation."""
    spread = drawn.std(ddof=1) * np.sqrt(1 + 1 / len(drawn))
    if spread == 0:
        return 1.0
    return float(2 * student.sf(abs(value - drawn.mean()) / spread, len(drawn) - 1))


def benjamini_hochberg(p: Sequence[float]) -> np.ndarray:
    """The q of each p: the share of false discoveries among those at least as small (Benjamini and Hochberg 1995)."""
    values = np.asarray(p, dtype=float)
    order = np.argsort(values)
    raised = values[order] * len(values) / np.arange(1, len(values) + 1)
    q = np.empty_like(values)
    q[order] = np.minimum.accumulate(raised[::-1])[::-1].clip(max=1)
    return q
