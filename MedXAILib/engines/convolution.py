"""Convolutions of a network whose weights do not change: they keep nothing for the backward but their shape.

PyTorch keeps the input of every convolution, for the gradient of weights that nobody asks for. And on a CPU the way
back through a strided convolution of a scan with one channel takes nine times its forward; as one convolution for each
of the places that a voxel has in the stride, put together again, it takes less than two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# With more input channels PyTorch's own way back is as fast.
_FEW = 8


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, options: dict[str, Any]) -> Tensor:
        # By these names, not as torch.convolution, a CPU's autocast knows it.
        kind = "conv_transpose" if options["transposed"] else "conv"
        left_out = ("transposed",) if options["transposed"] else ("transposed", "output_padding")
        given = {name: value for name, value in options.items() if name not in left_out}
        y: Tensor = getattr(F, f"{kind}{x.ndim - 2}d")(x, weight, bias, **given)
        ctx.options, ctx.size, ctx.outside, ctx.inside = options, x.shape, x.dtype, y.dtype
        ctx.save_for_backward(weight)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (m,), (weight,) = gradients, ctx.saved_tensors
        of_bias = m.sum((0, *range(2, m.ndim))) if ctx.needs_input_grad[2] else None
        if not ctx.needs_input_grad[0]:
            return None, None, of_bias, None
        # What a lower precision computed forward, it computes backward.
        back = _way_back(m.to(ctx.inside), weight.to(ctx.inside), ctx.size, ctx.options)
        return back.to(ctx.outside), None, of_bias, None


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    output_padding: int | Sequence[int] = 0,
    transposed: bool = False,
) -> Tensor:
    """`torch.conv3d`, `torch.conv_transpose3d` and their kin, of `x` (N, C, *spatial) in any dimensions."""
    rank = x.ndim - 2

    def each(value: int | Sequence[int]) -> list[int]:
        values = [value] if isinstance(value, int) else list(value)
        return values * rank if len(values) == 1 else values

    options = {
        "stride": each(stride),
        "padding": each(padding),
        "dilation": each(dilation),
        "transposed": transposed,
        "output_padding": each(output_padding),
        "groups": groups,
    }
    y: Tensor = _Convolution.apply(x, weight, bias, options)
    return y


def _way_back(m: Tensor, weight: Tensor, size: Sequence[int], o: dict[str, Any]) -> Tensor:
    few = weight.shape[1] <= _FEW and o["groups"] == 1 and not o["transposed"]
    if m.device.type == "cpu" and few and max(o["stride"]) > 1 and set(o["dilation"]) == {1}:
        return _interleaved(m, weight, size[2:], o["stride"], o["padding"])
    # Of the input, only the shape is read.
    like = m.new_empty(1).expand(size)
    found = torch.ops.aten.convolution_backward(m, like, weight, None, *o.values(), [True, False, False])
    back: Tensor = found[0]
    return back


def _interleaved(
    m: Tensor, weight: Tensor, size: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """The gradient of a strided convolution at its input of `size`, `m` being that at its output.

    Input voxel q * stride + r meets the taps r, r + stride, ... of the kernel: for each r a small convolution of m.
    """
    rank = m.ndim - 2
    axes = range(rank)
    taps = [-(-k // s) for k, s in zip(weight.shape[2:], stride, strict=True)]
    short = [t * s - k for k, s, t in zip(weight.shape[2:], stride, taps, strict=True)]
    whole = F.pad(weight, [edge for gap in reversed(short) for edge in (0, gap)])
    split = whole.reshape(*weight.shape[:2], *(n for pair in zip(taps, stride, strict=True) for n in pair))
    by_place = split.permute(1, *(3 + 2 * a for a in axes), 0, *(2 + 2 * a for a in axes)).flip(
        [2 + rank + a for a in axes]
    )
    small = by_place.reshape(-1, weight.shape[0], *taps)
    found = getattr(F, f"conv{rank}d")(m, small, padding=[t - 1 for t in taps])
    apart = found.reshape(len(m), weight.shape[1], *stride, *found.shape[2:])
    together = apart.permute(0, 1, *(n for a in axes for n in (2 + rank + a, 2 + a)))
    image = together.reshape(*apart.shape[:2], *(n * s for n, s in zip(found.shape[2:], stride, strict=True)))
    edges = [(-p, n + p - have) for p, n, have in zip(padding, size, image.shape[2:], strict=True)]
    return F.pad(image, [edge for pair in reversed(edges) for edge in pair])
