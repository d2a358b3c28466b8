"""What is measured of maps: where they are, and how alike two of them are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import mean

import torch
from torch import Tensor

from MedXAILib.report.localisation import highest

STRONGEST = 0.05
"""The share of the voxels whose overlap counts."""


def located(maps: Tensor, masks: Tensor) -> dict[str, float]:
    """How often the `peak` of maps (N, ...) lies in their masks, and the mean share of their positive `mass` there.

    As `MedXAILib.report.localisation` has it: where nothing is positive, the peak is that of the absolute value. A map
    of zeros has none.
    """
    flat, inside = maps.flatten(1), masks.flatten(1)
    positive = flat.clamp_min(0)
    peaked = torch.where(positive.any(1, keepdim=True), positive, flat.abs()).reshape(maps.shape)
    hits = [
        bool(one.any()) and bool(mask[highest(one)])
        for one, mask in zip(peaked, masks.reshape(maps.shape), strict=True)
    ]
    mass = (positive * inside).sum(1) / positive.sum(1).clamp_min(1e-30)
    return {
        "peak": mean(hits),
        "mass": float(mass.mean()),
    }


@dataclass(frozen=True)
class Looks:
    """Maps as they are compared, each (N, voxels): their values, the ranks of their sizes, and where they are
    strongest."""

    values: Tensor
    ranks: Tensor
    strongest: Tensor

    @classmethod
    def of(cls, maps: Tensor) -> Looks:
        """Of maps (N, ...)."""
        flat = maps.flatten(1).double()
        top = flat.abs().topk(round(STRONGEST * flat.shape[1]), dim=1).indices
        # Where fewer voxels than that are not zero, the rest was picked at random.
        strongest = torch.zeros_like(flat, dtype=torch.bool).scatter(1, top, True) & (flat != 0)
        return cls(flat, torch.stack([_ranks(one.abs()) for one in flat]), strongest)


def likeness(one: Looks, other: Looks) -> dict[str, float]:
    """How alike maps are, on average: 1 when they are the same, 0 when one is even and says nothing.

    `signed` is Pearson's correlation, `correlation` its absolute value: whether it is the same picture, be it with
    other signs. `rank` is Spearman's correlation of the absolute values, as Adebayo et al. have it. `overlap` is the
    share of the strongest voxels that both have in common.
    """
    signed = _correlation(one.values, other.values)
    shared = (one.strongest & other.strongest).sum(1) / round(STRONGEST * one.values.shape[1])
    return {
        "signed": float(signed.mean()),
        "correlation": float(signed.abs().mean()),
        "rank": float(_correlation(one.ranks, other.ranks).mean()),
        "overlap": float(shared.mean()),
    }


def between(several: Sequence[Looks]) -> dict[str, float]:
    """The mean likeness of each two of them."""
    found = [likeness(one, other) for one, other in combinations(several, 2)]
    return {key: mean(pair[key] for pair in found) for key in found[0]}


def _correlation(one: Tensor, other: Tensor) -> Tensor:
    pairs = zip(one, other, strict=True)
    return torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs]).nan_to_num(0.0)


def _ranks(values: Tensor) -> Tensor:
    """From 1; those that are equal share their mean rank."""
    _, group, count = values.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2).double()[group]
