"""How a network made for patches takes a whole scan: through a window that slides over it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from monai.inferers import sliding_window_inference
from monai.utils import BlendMode, PytorchPadMode, ensure_tuple, fall_back_tuple
from torch import Tensor

from MedXAILib.errors import MedXAIError, unknown


@dataclass(frozen=True)
class Window:
    """What MONAI's `SlidingWindowInferer` is told.

    Args:
        roi_size: the window in voxels, for all axes or each; an axis that is not positive is taken whole.
        overlap: of neighbouring windows, as a fraction of the window, for all axes or each.
        mode: whether every voxel of a window counts the same ("constant"), or its middle most ("gaussian").
        sigma_scale: the width of the Gaussian, as a fraction of the window, for all axes or each.
        padding_mode, cval: what is around a scan that is smaller than the window.
        batch: how many windows the network is given at once when nobody looks how many fit.
    """

    roi_size: Sequence[int]
    overlap: float | Sequence[float] = 0.25
    mode: str = "constant"
    sigma_scale: float | Sequence[float] = 0.125
    padding_mode: str = "constant"
    cval: float = 0.0
    batch: int = 1

    def __post_init__(self) -> None:
        # Equal windows are equal, whether they came as lists, as numbers or as MONAI's own words.
        for f in fields(self):
            value: Any = getattr(self, f.name)
            plain = tuple(value) if isinstance(value, (list, tuple)) else str(value) if f.type == "str" else value
            object.__setattr__(self, f.name, plain)
        object.__setattr__(self, "roi_size", ensure_tuple(self.roi_size))
        for name, kinds in (("mode", BlendMode), ("padding_mode", PytorchPadMode)):
            if getattr(self, name) not in [str(kind) for kind in kinds]:
                raise unknown(name.replace("_", " "), getattr(self, name), map(str, kinds))
        if not all(0 <= part < 1 for part in ensure_tuple(self.overlap)):
            raise MedXAIError(f"Windows overlap by a fraction from 0 to less than 1, not {self.overlap}.")

    def size(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The window in a scan of `shape` (*spatial).

        Raises:
            MedXAIError: when it is of another rank.
        """
        if len(self.roi_size) not in (1, len(shape)):
            raise MedXAIError(f"A window of {len(self.roi_size)} sizes does not fit a scan of {len(shape)} axes.")
        each = self.roi_size if len(self.roi_size) == len(shape) else self.roi_size * len(shape)  # type: ignore[operator]
        return tuple(int(n) for n in fall_back_tuple(each, shape))

    def slides(self, shape: Sequence[int]) -> bool:
        """Whether a scan of `shape` (*spatial) is more than one window."""
        return any(n > r for n, r in zip(shape, self.size(shape), strict=True))

    def blended(self, network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """What `network` says of all of `x` (N, C, *spatial)."""
        found = sliding_window_inference(
            x,
            self.size(x.shape[2:]),
            self.batch,
            # A copy, because it is multiplied in place.
            lambda part: network(part).to(x.dtype, copy=True),
            self.overlap,
            self.mode,
            self.sigma_scale,
            self.padding_mode,
            self.cval,
        )
        assert isinstance(found, torch.Tensor)
        return found
