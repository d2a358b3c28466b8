"""The part of a case that is shown."""

from __future__ import annotations

import numpy as np

from MedXAILib.grid import corners, shifted, transform
from MedXAILib.model import Prepared
from MedXAILib.volume import Volume


def part(scan: Volume, seen: Prepared) -> Volume:
    """The part of a scan that a network sees, in its own voxels."""
    reach = transform(np.linalg.inv(scan.affine) @ seen.affine, corners(seen.x.shape[1:]))
    low = np.maximum(np.ceil(reach.min(0) - 1e-6), 0).astype(int)
    high = np.minimum(np.floor(reach.max(0) + 1e-6).astype(int) + 1, scan.shape)
    inside = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    return Volume(scan.data[(slice(None), *inside)].clone(), shifted(scan.affine, low), scan.source)
