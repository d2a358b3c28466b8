"""Where the windows are that MONAI's inferer slides over a scan, and how it blends what is in them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.data.utils import compute_importance_map, dense_patch_slices
from monai.inferers.utils import _get_scan_interval
from monai.utils import ensure_tuple_rep
from torch import Tensor
from torch.nn import functional

from MedXAILib.engines.boxes import cut
from MedXAILib.window import Window


class Windows:
    """The windows of a scan (*spatial), in the order in which MONAI's inferer goes through them.

    Each is `roi` voxels large. They begin at `low` (W, rank) in a scan that is padded where it is smaller than a
    window, by `before` (rank,) voxels at its beginning, which makes it `size`.
    """

    def __init__(self, window: Window, shape: Sequence[int]) -> None:
        self.shape, self.roi, self._window = tuple(shape), window.size(shape), window
        self.size = tuple(map(max, self.shape, self.roi))
        overlap = ensure_tuple_rep(window.overlap, len(shape))
        interval = _get_scan_interval(self.size, self.roi, len(shape), overlap)
        self.places = dense_patch_slices(self.size, self.roi, interval)
        self.low = torch.tensor([[axis.start for axis in place] for place in self.places])
        missing = [s - n for s, n in zip(self.size, self.shape, strict=True)]
        self.before = torch.tensor([m // 2 for m in missing])
        self._margin = [side for m in reversed(missing) for side in (m // 2, m - m // 2)]

    def __len__(self) -> int:
        return len(self.low)

    @property
    def pads(self) -> bool:
        """Whether the scan is smaller than a window along an axis."""
        return any(self._margin)

    @property
    def mirrors(self) -> bool:
        """Whether what surrounds the scan depends on it."""
        return self.pads and self._window.padding_mode != "constant"

    def padded(self, x: Tensor) -> Tensor:
        """Scans (M, C, *spatial) with what the inferer puts around them."""
        if not self.pads:
            return x
        return functional.pad(x, self._margin, self._window.padding_mode, self._window.cval)

    def cut(self, padded: Tensor, which: Sequence[int]) -> Tensor:
        """What is in some windows of a scan (1, C, *size): (len(which), C, *roi)."""
        return cut(padded, self.low[which], self.roi)

    def grid(self, part: Sequence[int], like: Tensor) -> Grid:
        """The windows on a grid on which each has `part` (*other) voxels."""
        return Grid(self, self._window, tuple(part), like)


class Grid:
    """Windows on a grid of their own resolution, such as that of the network's outputs: their `places`, the `weight`
    (1, 1, *part) of each, the `total` (1, 1, *size) of those, and where `inside` the padding the scan is."""

    def __init__(self, windows: Windows, window: Window, part: tuple[int, ...], like: Tensor) -> None:
        zoom = [p / r for p, r in zip(part, windows.roi, strict=True)]
        both = slice(None), slice(None)
        self.places = [
            (*both, *(slice(int(axis.start * z), int(axis.stop * z)) for axis, z in zip(place, zoom, strict=True)))
            for place in windows.places
        ]
        weight = compute_importance_map(windows.roi, window.mode, window.sigma_scale, like.device, like.dtype)
        self.weight = weight.reshape(1, 1, *windows.roi)
        if part != windows.roi:
            self.weight = functional.interpolate(self.weight, part, mode="nearest-exact")
        self.total = like.new_zeros(1, 1, *(int(n * z) for n, z in zip(windows.size, zoom, strict=True)))
        for place in self.places:
            self.total[place] += self.weight
        edges = zip(windows.before.tolist(), windows.shape, zoom, strict=True)
        self.inside = (*both, *(slice(round(b * z), round((b + n) * z)) for b, n, z in edges))

    def zeros(self, channels: int) -> Tensor:
        """Nothing yet, (1, channels, *size)."""
        return self.total.new_zeros(1, channels, *self.total.shape[2:])
