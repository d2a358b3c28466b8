"""Losses that ask for an order of distances: who shares more must be nearer.

The cues of N cases are numbers (N, C), the cue that matters most first, NaN where unknown. Two cases share a cue when
its numbers differ by no more than its tolerance: 0 for a class, some millimetres for a size. Distances are Euclidean,
between embeddings (N, K) of length 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

MARGIN = 0.2
_EPSILON = 1e-12


def batch_hard(embeddings: Tensor, same: Tensor, other: Tensor, margin: float = MARGIN) -> Tensor:
    """How far the farthest case that is the `same` lies beyond the nearest `other` and the margin: the mean of the
    anchors that have both; (N, N) bool says who is what to whom.

    Hermans, Beyer and Leibe, "In defense of the triplet loss for person re-identification", 2017.
    """
    distance = distances(embeddings)
    anchors = same.any(1) & other.any(1)
    farthest = distance.masked_fill(~same, -torch.inf).amax(1)[anchors]
    nearest = distance.masked_fill(~other, torch.inf).amin(1)[anchors]
    return (farthest - nearest + margin).clamp_min(0).sum() / anchors.sum().clamp_min(1)


def batch_all(embeddings: Tensor, same: Tensor, other: Tensor, margin: float = MARGIN) -> Tensor:
    """The same of all triplets in place of the worst of each anchor: the mean of those that are too far.

    For when the worst are mistakes of the network below, from which there is nothing to learn.
    """
    distance = distances(embeddings)
    too_far = (distance[:, :, None] - distance[:, None] + margin).clamp_min(0)
    too_far = too_far.where(same[:, :, None] & other[:, None], 0)
    return too_far.sum() / (too_far > 0).sum().clamp_min(1)


Triplets = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""`batch_hard` or `batch_all`."""


def hierarchical(
    embeddings: Tensor,
    cues: Tensor,
    tolerances: Sequence[float],
    triplets: Triplets = batch_hard,
    margin: float = MARGIN,
) -> Tensor:
    """The mean, over the cues, of the loss of `triplets` where the same are those that share it and all before it, and
    the others those that do not: 0 only when who shares more of the leading cues is nearer, by the margin at least.

    The order is that of the sequences of Yan et al., "Deep lesion graphs in the wild", 2018; here all of a batch count.
    """
    levels = [triplets(embeddings, same, other, margin) for same, other in leading(cues, tolerances)]
    return torch.stack(levels).mean()


def leading(cues: Tensor, tolerances: Sequence[float]) -> Iterator[tuple[Tensor, Tensor]]:
    """By the number of leading cues, who shares all of those and who does not, both (N, N) bool. Neither holds where an
    unknown cue decides."""
    same = ~torch.eye(len(cues), dtype=torch.bool, device=cues.device)
    other = torch.zeros_like(same)
    for shares, differs in by_cue(cues, tolerances):
        other = other | (same & differs)
        same = same & shares
        yield same, other


def by_cue(cues: Tensor, tolerances: Sequence[float]) -> Iterator[tuple[Tensor, Tensor]]:
    """By cue, who shares it and who does not, both (N, N) bool; a case has nothing to do with itself."""
    apart = (cues[:, None] - cues).abs()
    elsewhere = ~torch.eye(len(cues), dtype=torch.bool, device=cues.device)
    for each, tolerance in zip(apart.unbind(-1), tolerances, strict=True):
        yield (each <= tolerance) & elsewhere, (each > tolerance) & elsewhere


def distances(embeddings: Tensor) -> Tensor:
    """The distance of each two embeddings (N, K) of length 1, (N, N)."""
    # The square root of 0 has no gradient.
    return (2 - 2 * embeddings @ embeddings.T).clamp_min(_EPSILON).sqrt()


def violations(apart: Tensor, same: Tensor, other: Tensor) -> float:
    """The share of triplets in which the one that is the `same` is not nearer than the `other`, by distances (N, N);
    NaN when there is no triplet."""
    each = zip(apart, same, other, strict=True)
    wrong = sum(int((far[is_same, None] >= far[is_other]).sum()) for far, is_same, is_other in each)
    triplets = int((same.sum(1) * other.sum(1)).sum())
    return wrong / triplets if triplets else math.nan
