"""Do the prototypes of a network look at what they should, does the answer depend on it, and do they mean one thing?

Wei, Tam and Tang, "MProtoNet", 2023 (activation precision, incremental deletion); Nauta et al., "PIP-Net: patch-based
intuitive prototypes for interpretable image classification", 2023 (purity); Huang et al., "Evaluation and improvement
of interpretability for self-explainable part-prototype networks", 2023 (whether they look at the same place again).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from MedXAILib.errors import MedXAIError

_AT_ONCE = 50


def activation_precision(maps: Tensor, masks: Tensor, active: Literal["half", "size"] = "half") -> Tensor:
    """The share of the active voxels of each of `maps` (N, D, H, W) that is in its mask (N, D, H, W): (N,).

    Active is what reaches `half` between the lowest and the highest value of the map, as in the published numbers, or
    as many of its highest voxels as the mask has (`size`). A map that is the same everywhere has no active voxel, and
    a precision of 0.

    Raises:
        MedXAIError: when a mask is empty.
    """
    flat, inside = maps.flatten(1), masks.flatten(1).bool()
    if not bool(inside.any(1).all()):
        raise MedXAIError("There is nothing to hit in an empty mask: leave cases without a lesion out.")
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    if active == "half":
        on = flat - low >= (high - low) / 2
    else:
        rank = _ranks(flat)
        on = rank < inside.sum(1, keepdim=True)
    on = on & (high > low)
    return (on & inside).sum(1) / on.sum(1).clamp_min(1)


@dataclass(frozen=True)
class Incremental:
    """How soon the right answer goes when what the maps mark goes (`deletion`, the less the sooner), and how soon it
    comes when only that is shown (`addition`, the more the sooner); both 0.5 for an answer that goes evenly."""

    deletion: float
    addition: float

    @property
    def score(self) -> float:
        """Both in one, from 0 to 1."""
        return (self.addition + 1 - self.deletion) / 2


def incremental(
    predict: Callable[[Tensor], Tensor],
    images: Tensor,
    maps: Tensor,
    labels: Tensor,
    instead: Tensor | float,
    steps: int = 50,
) -> Incremental:
    """The areas under the balanced accuracy of all `images` (N, C, D, H, W), from 0 at its lowest to 1 at its highest,
    while the highest voxels of `maps` (N, D, H, W) are replaced by `instead`, an image or one value that is none of a
    lesion, or are the only ones that are not. `predict` gives classes (M,) of images. The `steps` lie closer where
    little is replaced, because lesions are small. Both are NaN when the accuracy stays the same.
    """
    rank = _ranks(maps.flatten(1)).reshape(maps.shape)[:, None]
    shares = torch.linspace(0, 1, steps + 1, dtype=torch.float64) ** 2
    counts = (shares * maps[0].numel()).round().long().tolist()
    areas = []
    for deleted in (True, False):
        curve = []
        for count in counts:
            gone = (rank < count) == deleted
            said = torch.cat(
                [
                    predict(torch.where(gone[part], _of(instead, part), images[part]))
                    for part in torch.arange(len(images)).split(_AT_ONCE)
                ]
            )
            curve.append(balanced_accuracy(said, labels))
        values = torch.tensor(curve, dtype=torch.float64)
        low, high = values.min(), values.max()
        areas.append(float(torch.trapezoid((values - low) / (high - low), shares)))
    return Incremental(*areas)


def balanced_accuracy(said: Tensor, labels: Tensor) -> float:
    """The mean, over the classes there are, of the share of a class that is recognised."""
    right = (said == labels).double()
    return float(torch.stack([right[labels == label].mean() for label in labels.unique()]).mean())


def purity(similarities: Tensor, findings: Tensor, top: int = 10) -> Tensor:
    """By prototype and finding (P, F): how many of the `top` cases that are most similar to a prototype (N, P) share
    what most of them have, of findings (N, F) that are there or not; from 0.5 to 1.

    Raises:
        MedXAIError: when there are not so many cases.
    """
    if len(similarities) < top:
        raise MedXAIError(f"There are {len(similarities)} cases and it takes {top}: give more, or a lower `top`.")
    share = findings[similarities.topk(top, dim=0).indices].double().mean(0)
    return share.maximum(1 - share)


def places(masks: Tensor, spacing: Sequence[float] | float) -> Tensor:
    """The middle of each of `masks` (N, P, D, H, W), not negative, in mm from the first voxel: (N, P, 3)."""
    share = masks / masks.sum((2, 3, 4), keepdim=True)
    along = [
        (share.sum([axis for axis in (2, 3, 4) if axis != kept]) * torch.arange(share.shape[kept])).sum(2)
        for kept in (2, 3, 4)
    ]
    return torch.stack(along, dim=2) * torch.as_tensor(spacing)


def stays(before: Tensor, after: Tensor, within: float) -> float:
    """The share of `places` (N, P, 3) that are at most `within` mm from where they were."""
    return float(((after - before).norm(dim=2) <= within).double().mean())


def _ranks(flat: Tensor) -> Tensor:
    """The rank of each value of its row (N, voxels), from 0 for the highest."""
    return flat.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


def _of(instead: Tensor | float, part: Tensor) -> Tensor:
    return instead[part] if isinstance(instead, Tensor) else torch.tensor(instead)
