"""How sure the values of a map are that was estimated, in a line; without PyTorch."""

from __future__ import annotations

import numpy as np


def in_words(values: np.ndarray, half: np.ndarray) -> str:
    """A line about a map and half the widths of its 95 % confidence intervals, of one shape; empty where both are zero
    everywhere."""
    there = (values != 0) | (half != 0)
    if not there.any():
        return ""
    strongest, median = half.flat[np.abs(values).argmax()], np.median(half[there])
    return f"95 % interval: {_width(strongest)} at the strongest voxel, {_width(median)} in the median"


def _width(half: np.floating) -> str:
    return f"± {half:.2g}" if np.isfinite(half) else "unknown"
