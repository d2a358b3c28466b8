"""A place in a scan, as a person says it: a mask or a box, in the scanner's space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from MedXAILib.grid import resample, transform
from MedXAILib.model import Prepared
from MedXAILib.volume import Volume


def mask_on(seen: Prepared, within: Any, shape: Sequence[int]) -> Tensor:
    """Which voxels of a grid of `shape` that spans what the network sees lie `within` a mask (the non-zero voxels of a
    `Volume`) or a box ((x0, y0, z0), (x1, y1, z1)) in RAS mm: (*shape)."""
    scale = np.array(seen.x.shape[1:]) / np.array(shape)
    affine = seen.affine @ np.diag([*scale, 1.0])
    affine[:-1, -1] = transform(seen.affine, (scale - 1) / 2)
    if isinstance(within, Volume):
        mask = (within.data != 0).any(0, keepdim=True).float()
        return resample(mask, within.affine, shape, affine, nearest=True)[0] > 0
    box = np.sort(np.asarray(within, dtype=np.float64), axis=0)
    points = transform(affine, np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1))
    return torch.from_numpy(((points >= box[0]) & (points <= box[1])).all(-1))
