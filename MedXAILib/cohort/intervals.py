"""How sure a mean over the cases of a cohort is: what is the same patient's is no independent case."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from scipy.stats import binomtest  # type: ignore[import-untyped]

from MedXAILib.cohort.plan import Subject

_DRAWS = 1000
_ENDS = (2.5, 97.5)


def whose(subject: Subject) -> str:
    """Whose a case is, by the columns `patient` or `participant` of the plan; without, each is another patient's."""
    return next((subject.meta[name] for name in ("patient", "participant") if subject.meta.get(name)), subject.uid)


def spread(values: Sequence[float], patients: Sequence[str], share: bool = False) -> tuple[float, float, float]:
    """The mean of `values` and its 95 % interval: by a bootstrap over `patients`; of a `share` by Wilson, of as many
    patients, where that is wider, as a bootstrap knows no doubt of what is always so. NaN of nothing, and the interval
    of a single patient."""
    if not values:
        return math.nan, math.nan, math.nan
    _, of = np.unique(np.asarray(patients), return_inverse=True)
    sums = np.stack([np.bincount(of, values), np.bincount(of)], axis=1)
    mean = float(sums[:, 0].sum() / len(values))
    if len(sums) < 2:
        return mean, math.nan, math.nan
    drawn = _draws(len(sums)) @ sums
    low, high = np.percentile(drawn[:, 0] / drawn[:, 1], _ENDS)
    if share:
        exact = binomtest(round(mean * len(sums)), len(sums)).proportion_ci(method="wilson")
        low, high = min(low, exact.low), max(high, exact.high)
    return mean, float(low), float(high)


@lru_cache(maxsize=8)
def _draws(count: int) -> np.ndarray:
    """How often each of `count` is drawn (draws, count)."""
    return np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), _DRAWS)
