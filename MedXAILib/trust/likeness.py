"""How alike two maps are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import mean

import torch
from torch import Tensor

from MedXAILib.report import localisation

STRONGEST = 0.05
"""The share of the voxels whose overlap counts."""


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
        return cls(flat, torch.stack([_ranks(one.abs()) for one in flat]), _strongest(flat))


def likeness(one: Looks, other: Looks) -> dict[str, float]:
    """How alike maps are, on average: 1 when they are the same, 0 when one is even and says nothing.

    `signed` is Pearson's correlation, `correlation` its absolute value: whether it is the same picture, be it with
    other signs. `rank` is Spearman's correlation of the absolute values, as Adebayo et al. have it. `overlap` is the
    share of the strongest voxels that both have in common.
    """
    signed = _correlation(one.values, other.values)
    return {
        "signed": float(signed.mean()),
        "correlation": float(signed.abs().mean()),
        "rank": float(_correlation(one.ranks, other.ranks).mean()),
        "overlap": float(_shared(one.strongest, other.strongest).mean()),
    }


def between(several: Sequence[Looks]) -> dict[str, float]:
    """The mean likeness of each two of them."""
    found = [likeness(one, other) for one, other in combinations(several, 2)]
    return {key: mean(pair[key] for pair in found) for key in found[0]}


def correlation(one: Tensor, other: Tensor) -> float:
    """The `signed` likeness of two maps of one shape, without the ranks, which take long for a whole scan."""
    return float(_correlation(one.double().reshape(1, -1), other.double().reshape(1, -1)))


def overlap(one: Tensor, other: Tensor) -> float:
    """The `overlap` of two maps of one shape."""
    return float(_shared(_strongest(one.reshape(1, -1)), _strongest(other.reshape(1, -1))))


def extent(data: Tensor) -> tuple[slice, ...] | None:
    """The box outside which a map (C, *spatial) is zero, with all channels; None when the map is the same everywhere in
    it, so that no other could be more or less like it."""
    covered = localisation.extent(data)
    if covered is None:
        return None
    box = (slice(None), *covered)
    low, high = data[box].aminmax()
    return box if low < high else None


def _correlation(one: Tensor, other: Tensor) -> Tensor:
    found = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(one, other, strict=True)])
    # The mean of what is even may be off by rounding, which would correlate.
    even = (one.amin(1) == one.amax(1)) | (other.amin(1) == other.amax(1))
    return found.where(~even, 0.0)


def _strongest(flat: Tensor) -> Tensor:
    top = flat.abs().topk(_count(flat), dim=1).indices
    # Where fewer voxels than that are not zero, the rest was picked at random.
    return torch.zeros_like(flat, dtype=torch.bool).scatter(1, top, True) & (flat != 0)


def _shared(one: Tensor, other: Tensor) -> Tensor:
    return (one & other).sum(1) / _count(one)


def _count(flat: Tensor) -> int:
    return max(1, round(STRONGEST * flat.shape[1]))


def _ranks(values: Tensor) -> Tensor:
    """From 1; those that are equal share their mean rank."""
    _, group, count = values.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2).double()[group]
