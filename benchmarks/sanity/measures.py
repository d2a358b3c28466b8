"""Where maps are."""

from __future__ import annotations

from statistics import mean

import torch
from torch import Tensor

from MedXAILib.report.localisation import highest


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
