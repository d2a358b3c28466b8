"""Where a map peaks, and how well it meets a segmentation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from MedXAILib.errors import MedXAIError
from MedXAILib.explanation import SaliencyMap
from MedXAILib.grid import resample, transform
from MedXAILib.volume import Volume

_EMPTY = "{} is empty: give one with at least one voxel that is not zero."


@dataclass(frozen=True)
class Localisation:
    """How well what speaks for a target meets a segmentation.

    `peak` is the map's peak in RAS mm, `hit` whether it lies in the segmentation (the pointing game of Zhang et al.,
    "Top-down neural attention by excitation backprop", 2018), `distance` from there to the segmentation in mm. `mass`
    is the share of the positive relevance inside, `chance` the share that a map has which is even over where this one
    is not zero.
    """

    peak: tuple[float, ...]
    hit: bool
    distance: float
    mass: float
    chance: float

    def words(self, what: str = "segmentation") -> list[str]:
        """The same in sentences; `what` names what was segmented."""
        where = f"lies in the {what}" if self.hit else f"is {self.distance:.0f} mm away from the {what}"
        times = f", {self.mass / self.chance:.0f} times as much as chance" if self.chance else ""
        return [
            f"{'Hit' if self.hit else 'Miss'}: the peak of the map {where}.",
            f"{self.mass:.0%} of what speaks for the target lies in the {what}, which fills {self.chance:.1%} of the "
            f"space that the map covers{times}.",
        ]


def evidence(explanation: SaliencyMap) -> Tensor:
    """What a map (of one scan) says for the target, summed over its channels: (D, H, W), zero or more."""
    return explanation.data.sum(0).clamp_min(0)


def highest(values: Tensor) -> tuple[int, ...]:
    """The index of the highest of `values`; of several that are as high, as in a supervoxel, the one nearest to their
    middle."""
    top = (values == values.max()).nonzero()
    return tuple(top[(top - top.double().mean(0)).square().sum(1).argmin()].tolist())


def peak(explanation: SaliencyMap) -> tuple[float, ...]:
    """The point in RAS mm that speaks most for the target; where nothing does, that with the largest absolute value."""
    values = evidence(explanation)
    if not bool(values.any()):
        values = explanation.data.sum(0).abs()
    return tuple(float(v) for v in transform(explanation.affine, np.array(highest(values))))


def centre(segmentation: Volume) -> tuple[float, ...]:
    """The centre in RAS mm of the non-zero voxels.

    Raises:
        MedXAIError: when there are none.
    """
    marked = torch.nonzero((segmentation.data != 0).any(0)).double()
    if not len(marked):
        raise MedXAIError(_EMPTY.format(segmentation.source or "The segmentation"))
    return tuple(float(v) for v in segmentation.to_point(marked.mean(0).tolist()))


def extent(data: Tensor) -> tuple[slice, ...] | None:
    """The box (*spatial) outside which a map (C, *spatial) is zero; None when it is zero everywhere."""
    inside = (data != 0).any(0)
    if not bool(inside.any()):
        return None
    along = [inside.movedim(axis, 0).flatten(1).any(1).nonzero()[:, 0] for axis in range(inside.ndim)]
    return tuple(slice(int(i[0]), int(i[-1]) + 1) for i in along)


def localise(explanation: SaliencyMap, segmentation: Volume) -> Localisation:
    """Compare the map with `segmentation`, whose non-zero voxels say where it should be; on any grid.

    Raises:
        MedXAIError: when the segmentation is empty, or has no voxel in the scan.
    """
    mask = on_grid(explanation, segmentation)
    values = evidence(explanation)
    where = peak(explanation)
    points = transform(explanation.affine, torch.nonzero(mask).numpy().astype(float))
    distances = np.linalg.norm(points - np.array(where), axis=1)
    inside = float(values[mask].double().sum() / values.double().sum().clamp_min(1e-30))
    box = extent(explanation.data)
    chance = 0.0 if box is None else float(mask[box].double().mean())
    hit = bool(distances.min() < 1e-3)
    return Localisation(where, hit, 0.0 if hit else float(distances.min()), inside, chance)


def on_grid(explanation: SaliencyMap, segmentation: Volume) -> Tensor:
    """The non-zero voxels of `segmentation` on the grid of the map, (D, H, W)."""
    name = segmentation.source or "The segmentation"
    marked = (segmentation.data != 0).any(0, keepdim=True).float()
    if not bool(marked.any()):
        raise MedXAIError(_EMPTY.format(name))
    mask = resample(marked, segmentation.affine, explanation.data.shape[1:], explanation.affine, nearest=True)[0] > 0
    if not bool(mask.any()):
        raise MedXAIError(f"{name} has no voxel in the scan: check that both are of one examination.")
    return mask
