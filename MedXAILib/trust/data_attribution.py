"""Do influences say what the network would have learnt without a case, or from other cases?

What an influence claims can be seen by learning again: without each case (Koh and Liang 2017), from half of the cases
(the linear datamodelling score of Park et al., "TRAK: attributing model behavior at scale", 2023), without those that
matter most; and mislabelled cases are to be found by them. What needs no influence is the measure: the neighbours of a
case, and their Shapley values (Jia et al., "Efficient task-specific data valuation for nearest neighbor algorithms",
2019).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import pearsonr, rankdata, spearmanr  # type: ignore[import-untyped]

from MedXAILib.errors import MedXAIError

Learn = Callable[[np.ndarray], np.ndarray]
"""From which cases (N,) bool to learn to what is then said of the queries (M,)."""


def left_out(influences: np.ndarray, which: Sequence[int], learn: Learn) -> dict[str, float]:
    """How far `influences` (N, M) of cases on queries agree with what learning again without each of the cases `which`
    changes: the correlation over cases, its mean and lowest over queries."""
    everything = np.ones(len(influences), dtype=bool)
    whole = learn(everything)
    changes = np.array([whole - learn(everything & (np.arange(len(influences)) != i)) for i in which])
    pearson = [pearsonr(*pair).statistic for pair in zip(influences[which].T, changes.T, strict=True)]
    spearman = [spearmanr(*pair).statistic for pair in zip(influences[which].T, changes.T, strict=True)]
    return {
        "pearson": float(np.mean(pearson)),
        "pearson_lowest": float(np.min(pearson)),
        "spearman": float(np.mean(spearman)),
        "spearman_lowest": float(np.min(spearman)),
    }


def halves(cases: int, count: int, seed: int = 0) -> np.ndarray:
    """`count` random halves of so many `cases`, (count, cases) bool."""
    random = np.random.default_rng(seed)
    return np.array([random.permutation(cases) < cases // 2 for _ in range(count)])


def datamodelling_scores(influences: np.ndarray, parts: np.ndarray, said: np.ndarray) -> np.ndarray:
    """The linear datamodelling score (LDS) of each query (M,): the rank correlation, over `parts` (S, N) bool of the
    cases, of the summed `influences` (N, M) with what a network that learnt from that part alone `said` (S, M)."""
    expected = parts.astype(float) @ influences
    return np.array([spearmanr(*pair).statistic for pair in zip(expected.T, said.T, strict=True)])


def found_by(scores: np.ndarray, mislabelled: np.ndarray) -> float:
    """The area under the ROC curve of `scores` (N,) for telling the `mislabelled` (N,) bool: how often one of them has
    the higher score than a case labelled rightly.

    Raises:
        MedXAIError: when all cases are of one kind.
    """
    many, few = int((~mislabelled).sum()), int(mislabelled.sum())
    if not many or not few:
        raise MedXAIError("Mislabelled cases are told from others: mark some, and not all.")
    return float((rankdata(scores)[mislabelled].sum() - few * (few + 1) / 2) / (few * many))


def removal_curve(influences: np.ndarray, shares: Sequence[float], learn: Learn, query: int = 0) -> list[float]:
    """What is said of a query after learning without these `shares` of all cases, the most helpful by `influences`
    (N,) first."""
    place = np.argsort(np.argsort(-influences, kind="stable"))
    return [float(learn(place >= round(share * len(place)))[query]) for share in shares]


def neighbour_votes(alike: np.ndarray, same: np.ndarray) -> np.ndarray:
    """What neighbours would say: likeness (N, M) of cases to queries, counted for a query where the case is of the
    `same` (N, M) class as is asked about, and against it elsewhere."""
    return np.where(same, alike, -alike)


def neighbour_shapley(alike: np.ndarray, same: np.ndarray, k: int = 5) -> np.ndarray:
    """The Shapley values (N, M) of cases for a vote of the `k` nearest: the exact recursion of Jia et al. (2019)."""
    order = np.argsort(-alike, axis=0, kind="stable")
    right = np.take_along_axis(same, order, 0).astype(float)
    n = len(alike)
    rank = np.arange(1, n)[:, None]
    steps = (right[:-1] - right[1:]) / k * np.minimum(k, rank) / rank
    last = right[-1:] * min(k, n) / (k * n)
    ordered = np.concatenate([np.cumsum(steps[::-1], axis=0)[::-1] + last, last])
    values = np.empty_like(ordered)
    np.put_along_axis(values, order, ordered, 0)
    return values
