"""Boxes of one size at several places of a volume: cutting them out, and putting them in.

On a CPU each is a few copies of rows; elsewhere all are gathered at once, because a copy there costs more to start than
to do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def cut(volume: Tensor, low: Tensor, box: Sequence[int], outside: float = 0.0, into: Tensor | None = None) -> Tensor:
    """Boxes (M, C, *box) of `volume` (1 or M, C, *spatial), each from its `low` (M, rank); `outside` is what there is
    beyond the border. They are written `into` a tensor, if there is one."""
    out = volume.new_empty(len(low), volume.shape[1], *box) if into is None else into
    if volume.device.type == "cpu":
        for m, start in enumerate(low.tolist()):
            source = volume[m if len(volume) > 1 else 0]
            there, here = _overlap(start, box, [0] * len(box), volume.shape[2:])
            if here != tuple(slice(0, b) for b in box):
                out[m].fill_(outside)
            out[m][(slice(None), *here)] = source[(slice(None), *there)]
        return out
    found, inside = _gathered(volume, low, box)
    return out.copy_(torch.where(inside, found, outside))


def put(into: Tensor, at: Tensor, patches: Tensor, low: Tensor) -> None:
    """Put `patches` (M, C, *box), whose places are `low` (M, rank), into boxes `into` (M, C, *other) at `at` (M, rank),
    as far as they overlap."""
    if into.device.type == "cpu":
        for m, (start, other) in enumerate(zip(low.tolist(), at.tolist(), strict=True)):
            there, here = _overlap(other, into.shape[2:], start, patches.shape[2:])
            into[m][(slice(None), *here)] = patches[m][(slice(None), *there)]
        return
    found, inside = _gathered(patches, at - low, into.shape[2:])
    torch.where(inside, found, into, out=into)


def _overlap(
    start: Sequence[int], box: Sequence[int], other: Sequence[int], size: Sequence[int]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where a box of `box` voxels at `start` and one of `size` at `other` overlap: in the other, and in itself."""
    low = [max(s, o) for s, o in zip(start, other, strict=True)]
    high = [min(s + b, o + n) for s, b, o, n in zip(start, box, other, size, strict=True)]
    high = [max(h, a) for h, a in zip(high, low, strict=True)]
    if any(h == a for h, a in zip(high, low, strict=True)):
        return ((slice(0, 0),) * len(box),) * 2
    theirs = tuple(slice(a - o, h - o) for a, h, o in zip(low, high, other, strict=True))
    return theirs, tuple(slice(a - s, h - s) for a, h, s in zip(low, high, start, strict=True))


def _gathered(volume: Tensor, low: Tensor, box: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Boxes of `volume` with its border held beyond it, (M, C, *box), and which voxels are inside, (M, 1, *box)."""
    device, rank = volume.device, len(box)
    low = low.to(device)
    first = torch.arange(len(low), device=device) if len(volume) > 1 else torch.zeros_like(low[:, 0])
    index: list[Tensor | slice] = [first.reshape(-1, *[1] * rank), slice(None)]
    inside = torch.ones(len(low), 1, *[1] * rank, dtype=torch.bool, device=device)
    for axis, (length, size) in enumerate(zip(box, volume.shape[2:], strict=True)):
        shape = [-1 if a == axis else 1 for a in range(rank)]
        place = low[:, axis, None] + torch.arange(length, device=device)
        inside = inside & ((place >= 0) & (place < size)).reshape(len(low), 1, *shape)
        index.append(place.clamp(0, size - 1).reshape(len(low), *shape))
    return volume[tuple(index)].movedim(-1, 1), inside
