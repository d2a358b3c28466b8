"""How good are the cases that are found, and do they stay when the scan hardly changes?

Measures as in Manning, Raghavan and Schütze, "Introduction to information retrieval", 2008, chapter 8, and Järvelin and
Kekäläinen, "Cumulated gain-based evaluation of IR techniques", 2002 (linear gain, as in trec_eval and scikit-learn).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from MedXAILib.cases.space import Space
from MedXAILib.errors import MedXAIError
from MedXAILib.model import Model
from MedXAILib.trust.stability import NOISE

DRAWS = 2000
"""Of the bootstrap."""


def ranking(similarity: np.ndarray, relevance: np.ndarray, excluded: np.ndarray | None = None) -> list[np.ndarray]:
    """For each of Q queries the relevance of the cases that may be found, the most similar first; of equal similarities
    the first case first.

    Args:
        similarity: (Q, N), of each query with each case.
        relevance: (Q, N), 0 for what is not relevant, more for what is more so.
        excluded: (Q, N) bool, the cases that do not count, such as those of the same patient.

    Raises:
        MedXAIError: when they do not fit, or a similarity is NaN or a relevance negative.
    """
    shape = similarity.shape
    allowed = np.ones(shape, dtype=bool) if excluded is None else ~np.asarray(excluded, dtype=bool)
    if not similarity.ndim == 2 or relevance.shape != shape or allowed.shape != shape:
        raise MedXAIError(f"Similarity, relevance and what is excluded are all (queries, cases): {shape} is not.")
    if np.isnan(similarity).any() or not (relevance >= 0).all():
        raise MedXAIError("A similarity is NaN or a relevance negative: check the vectors and the labels.")
    order = np.argsort(-similarity, axis=1, kind="stable")
    return [relevance[q, o[allowed[q, o]]] for q, o in enumerate(order)]


def measured(found: Sequence[np.ndarray], k: int = 10, least: float = 1) -> dict[str, np.ndarray]:
    """All measures of each query (Q,), from the relevance of what was `found` in its order, of all that could be found.

    What is at least of relevance `least` counts as relevant, but nDCG is of the relevance itself. NaN for a query of
    which nothing is relevant.
    """
    rows = []
    for relevance in found:
        hits = relevance >= least
        rows.append(
            {
                f"P@{k}": precision(hits, k),
                f"recall@{k}": recall(hits, k),
                "R-precision": precision(hits, int(hits.sum())),
                "mAP": average_precision(hits),
                "MRR": reciprocal_rank(hits),
                f"nDCG@{k}": ndcg(relevance, k),
            }
            if hits.any()
            else {}
        )
    names = (f"P@{k}", f"recall@{k}", "R-precision", "mAP", "MRR", f"nDCG@{k}")
    return {name: np.array([row.get(name, np.nan) for row in rows]) for name in names}


def precision(hits: np.ndarray, k: int) -> float:
    """The share of the first `k` that is relevant. What was not found counts as not relevant."""
    return float(hits[:k].sum() / k)


def recall(hits: np.ndarray, k: int) -> float:
    """The share of the relevant that is among the first `k`."""
    return float(hits[:k].sum() / hits.sum())


def average_precision(hits: np.ndarray) -> float:
    """The mean of the precision at each of the relevant."""
    ranks = np.flatnonzero(hits) + 1
    return float((np.arange(1, len(ranks) + 1) / ranks).mean())


def reciprocal_rank(hits: np.ndarray) -> float:
    """One over the rank of the first that is relevant."""
    return float(1 / (np.flatnonzero(hits)[0] + 1))


def ndcg(relevance: np.ndarray, k: int) -> float:
    """The discounted cumulated gain of the first `k`, as a share of that of the best order."""

    def gain(ranked: np.ndarray) -> float:
        return float((ranked[:k] / np.log2(np.arange(2, len(ranked[:k]) + 2))).sum())

    return gain(relevance) / gain(np.sort(relevance)[::-1])


def interval(values: np.ndarray, patients: Sequence[str] | None = None, seed: int = 0) -> tuple[float, float, float]:
    """The mean of `values` (Q,), NaN aside, and its 95 % interval: what it would be with other queries, or with other
    `patients` where several queries are of one (bootstrap)."""
    groups = np.arange(len(values)) if patients is None else np.unique(np.asarray(patients), return_inverse=True)[1]
    known = ~np.isnan(values)
    count = groups.max() + 1
    totals, sizes = np.bincount(groups[known], values[known], count), np.bincount(groups[known], minlength=count)
    drawn = np.random.default_rng(seed).integers(count, size=(DRAWS, count))
    sums = sizes[drawn].sum(1)
    means = totals[drawn].sum(1)[sums > 0] / sums[sums > 0]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(values[known].mean()), float(low), float(high)


def stratified(values: Mapping[str, np.ndarray], strata: Sequence[str]) -> dict[str, dict[str, float]]:
    """The mean of each measure over the queries of each stratum (their class, their scanner ...), NaN aside."""
    of = np.asarray(strata)
    return {
        str(one): {
            name: float(np.nanmean(v[of == one])) for name, v in values.items() if not np.isnan(v[of == one]).all()
        }
        for one in np.unique(of)
    }


def same(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The share of two sets of cases (Q, k each) that both have (Jaccard), for each query (Q,)."""
    shared = (first[:, :, None] == second[:, None, :]).any(2).sum(1)
    return np.asarray(shared / (first.shape[1] + second.shape[1] - shared))


@torch.no_grad()
def consistency(
    space: Space, model: Model, x: Tensor, library: np.ndarray, k: int = 10, seed: int = 0
) -> dict[str, np.ndarray]:
    """The share (Q,) of the first `k` cases of a `library` (N, K) that stays when what the network sees, `x`
    (Q, C, *spatial), gets faint noise, or moves by a voxel."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x)
    spread = x.flatten(1).std(1)[(...,) + (None,) * (x.ndim - 1)]
    first = _nearest(space, model, x, library, k)
    changed = {"noise": x + NOISE * spread * noise, "shift": x.roll(1, -1)}
    return {name: same(first, _nearest(space, model, other, library, k)) for name, other in changed.items()}


def _nearest(space: Space, model: Model, x: Tensor, library: np.ndarray, k: int) -> np.ndarray:
    similarity = space.similarity(space.embed(model, x).numpy(), library)
    return np.argsort(-similarity, axis=1, kind="stable")[:, :k]
