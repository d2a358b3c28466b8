"""Where in the input does a unit of a layer look?

The geometry is followed analytically, operator by operator, while the forward runs (Araujo et al., "Computing
receptive fields of convolutional neural networks", Distill 2019), so functional calls, skips and concatenations are
seen as they are. Stretching a class activation map to the input's corners instead puts it up to half a stride off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from MedXAILib.engines.operators import operator, option, tensors


@dataclass(frozen=True)
class Geometry:
    """Unit i of a layer sees the input voxels from low + jump * i to high + jump * i, along each spatial axis."""

    jump: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    @classmethod
    def identity(cls, rank: int) -> Geometry:
        """That of the input itself."""
        return cls((1.0,) * rank, (0.0,) * rank, (0.0,) * rank)

    @classmethod
    def spanning(cls, grid: Sequence[int], size: Sequence[int]) -> Geometry:
        """That of a `grid` of units that tile an input of `size` voxels, as a transformer's patches do."""
        jump = tuple(s / g for s, g in zip(size, grid, strict=True))
        return cls(jump, (0.0,) * len(jump), tuple(j - 1 for j in jump))

    @property
    def centre(self) -> tuple[float, ...]:
        """Where unit 0 is centred, in voxels."""
        return tuple((a + b) / 2 for a, b in zip(self.low, self.high, strict=True))

    def scaled(self, stride: Sequence[float], first: Sequence[float], last: Sequence[float]) -> Geometry:
        """That of a layer on top whose unit i looks at units first + stride * i to last + stride * i of this one."""
        edges = [
            (lo + j * a, hi + j * b) if j > 0 else (lo + j * b, hi + j * a)
            for lo, hi, j, a, b in zip(self.low, self.high, self.jump, first, last, strict=True)
        ]
        jump = tuple(j * s for j, s in zip(self.jump, stride, strict=True))
        return Geometry(jump, tuple(e[0] for e in edges), tuple(e[1] for e in edges))

    def union(self, other: Geometry) -> Geometry:
        """That of two branches that meet."""
        return Geometry(
            self.jump,
            tuple(min(pair) for pair in zip(self.low, other.low, strict=True)),
            tuple(max(pair) for pair in zip(self.high, other.high, strict=True)),
        )

    def place(self, maps: Tensor, size: Sequence[int]) -> Tensor:
        """Maps (N, K, *grid) on the input's `size`: each unit at its receptive field's centre, linear between them."""
        for length, jump, centre in zip(size, self.jump, self.centre, strict=True):
            count = maps.shape[2]
            unit = ((torch.arange(length, dtype=torch.float64) - centre) / jump).clamp(0, count - 1)
            # How much of each unit a voxel takes: a hat of width 1 around the unit.
            share = (1 - (unit[:, None] - torch.arange(count)).abs()).clamp_min(0).to(maps)
            maps = torch.tensordot(maps, share, dims=([2], [1]))
        return maps


# Operators that can keep the shape of a grid while its units change places.
_MOVING = {"permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "roll", "rot90", "matmul", "bmm"}


class Following(TorchFunctionMode):
    """While this is on, every tensor made from a `started` one knows where it looks (see `geometry_of`)."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.grids: dict[int, tuple[tuple[int, ...], Geometry]] = {}
        """The last grid seen of each number of units: what a transformer's tokens were cut from."""

    def start(self, x: Tensor) -> Tensor:
        """An input (N, C, *spatial) to follow from here on."""
        return _mark(x, Geometry.identity(self.rank))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [t for t in tensors(args) if geometry_of(t) is not None and t.ndim == self.rank + 2]
        # In-place operators may change the shape their geometry was read from.
        before = [(geometry_of(t), tuple(t.shape)) for t in given]
        result = func(*args, **kwargs)
        if before and isinstance(result, Tensor) and result.ndim == self.rank + 2:
            found = geometry_after(func, before, args, kwargs, tuple(result.shape[2:]))
            if found is not None:
                _mark(result, found)
                size = tuple(result.shape[2:])
                self.grids[math.prod(size)] = size, found
        return result


def geometry_of(tensor: Tensor) -> Geometry | None:
    """Where the units of `tensor` look, or None when it was not followed so far."""
    return getattr(tensor, "_medxai_geometry", None)


def _mark(tensor: Tensor, geometry: Geometry) -> Tensor:
    tensor._medxai_geometry = geometry  # type: ignore[attr-defined]
    return tensor


def geometry_after(func: Any, before: Any, args: Any, kwargs: Any, size: tuple[int, ...]) -> Geometry | None:
    """The geometry of what `func` made, a grid of `size`, from inputs whose (geometry, shape) were `before`."""
    name, _ = operator(func)
    source, shape = before[0]
    old = shape[2:]
    rank = len(size)

    def each(position: int, key: str, default: Any) -> list[Any]:
        return option(args, kwargs, position, key, default, rank)

    if name == "conv":
        kernel = list(args[1].shape[2:])
        stride, pad, dilation = each(3, "stride", 1), each(4, "padding", 0), each(5, "dilation", 1)
        reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        if pad[0] in ("same", "valid"):
            pad = [r // 2 if pad[0] == "same" else 0 for r in reach]
        return source.scaled(stride, [-p for p in pad], [r - p for r, p in zip(reach, pad, strict=True)])
    if name in ("max_pool", "avg_pool"):
        kernel = each(1, "kernel_size", 1)
        stride, pad = each(2, "stride", kernel), each(3, "padding", 0)
        dilation = each(4, "dilation", 1) if name == "max_pool" else [1] * rank
        last = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, pad, strict=True)]
        return source.scaled(stride, [-p for p in pad], last)
    if name == "conv_transpose":
        kernel = list(args[1].shape[2:])
        stride, pad, dilation = each(3, "stride", 1), each(4, "padding", 0), each(7, "dilation", 1)
        # Output o comes from the inputs i with o = i * stride - padding + tap * dilation, for the taps of the kernel.
        reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        first = [(p - r) / s for p, r, s in zip(pad, reach, stride, strict=True)]
        last = [p / s for p, s in zip(pad, stride, strict=True)]
        return source.scaled([1 / s for s in stride], first, last)
    if name in ("interpolate", "upsample", "adaptive_avg_pool", "adaptive_max_pool"):
        corners = bool(kwargs.get("align_corners") or (len(args) > 4 and args[4]))
        if corners and name in ("interpolate", "upsample"):
            step = [(o - 1) / max(s - 1, 1) for o, s in zip(old, size, strict=True)]
            return source.scaled(step, [0.0] * rank, [0.0] * rank)
        step = [o / s for o, s in zip(old, size, strict=True)]
        middle = [(s - 1) / 2 for s in step]
        half = [max(m, 0.0) for m in middle]
        return source.scaled(
            step, [m - h for m, h in zip(middle, half, strict=True)], [m + h for m, h in zip(middle, half, strict=True)]
        )
    if name == "pad":
        widths = list(args[1] if len(args) > 1 else kwargs["pad"])
        before_axis = [widths[2 * (rank - 1 - a)] if 2 * (rank - 1 - a) < len(widths) else 0 for a in range(rank)]
        return source.scaled([1] * rank, [-w for w in before_axis], [-w for w in before_axis])
    if name == "flip":
        flipped = {d % (rank + 2) - 2 for d in _flat(args[1:] or [kwargs["dims"]])}
        ends = [old[a] - 1 if a in flipped else 0 for a in range(rank)]
        return source.scaled([-1 if a in flipped else 1 for a in range(rank)], ends, ends)
    if name in _MOVING:
        return None
    # Everything else leaves units where they are, or loses track of them; a gate broadcast over the grid moves nothing.
    same = [g for g, s in before if s[2:] == size]
    if not same:
        return None
    merged = same[0]
    for other in same[1:]:
        merged = merged.union(other)
    return merged


def _flat(values: Sequence[Any]) -> list[int]:
    return [v for value in values for v in (value if isinstance(value, (tuple, list)) else (value,))]
