"""What relevance R = m * x does at the operators that have no weights.

Bach et al. 2015; for attention and products Achtibat et al., "AttnLRP: attention-aware layer-wise relevance propagation
for transformers", 2024; for gates Arras et al., "Explaining recurrent neural network predictions in sentiment
analysis", 2017.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from MedXAILib.engines.operators import KEEP_ZERO, Normalisation, option
from MedXAILib.engines.rules import Book, Call, Rule, send, trace
from MedXAILib.rules.gradient import Rectified, answer, pooled, rank, taken

# Keeps the relevance of a voxel finite whose value is 0 and whose activation is not.
_STABLE = 1e-6


# Straight lines through 0 on both sides, whose derivative is y / x.
_PIECEWISE = frozenset("leaky_relu prelu rrelu".split())


@dataclass(frozen=True)
class Passing(Rule):
    """An activation passes all relevance on: m y / x."""

    title: ClassVar[str] = "passing"

    def __call__(self, call: Call) -> Tensor:
        if call.name == "relu":
            return Rectified()(call)
        if call.name in _PIECEWISE:
            through: Tensor = call.plain()
            return through
        y, x = call.value(), call.x.detach()
        if call.name in KEEP_ZERO:
            return send(y, (call.x, torch.where(x == 0, 0, y / x), 0.0), call=call)
        away = torch.where(x < 0, -_STABLE, _STABLE).to(x)
        return send(y, (call.x, y / (x + away), away), call=call)


@dataclass(frozen=True)
class Held(Rule):
    """A normalisation whose statistics are held constant is linear."""

    title: ClassVar[str] = "statistics held"

    def __call__(self, call: Call) -> Tensor:
        n = Normalisation.of(call.name, call.args, call.kwargs)
        if n.mean is not None:
            return call.normalised()
        centred = n.centre(n.x)
        gain = n.scale(centred.detach())
        gain = gain if n.weight is None else gain * n.weight
        y = centred * gain if n.bias is None else torch.addcmul(call.constant(n.bias), centred, gain)
        return y.reshape(call.x.shape)


class _Tap(torch.autograd.Function):
    """x; the relevance that comes by is added to what is lost, or taken from it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sign: int, book: Book) -> Tensor:
        ctx.sign, ctx.book = sign, book
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (m,), (x,) = gradients, ctx.saved_tensors
        # Where a mask says minus infinity, nothing comes by.
        ctx.book.lost += ctx.sign * float(torch.where(m == 0, 0, m * x).sum(dtype=torch.float64))
        return m, None, None


@dataclass(frozen=True)
class Linearised(Rule):
    """A softmax as its tangent at these values; what that leaves of the values is lost."""

    title: ClassVar[str] = "tangent"

    def __call__(self, call: Call) -> Tensor:
        y: Tensor = _Tap.apply(call.on(_Tap.apply(call.x, -1, call.book)), 1, call.book)
        return y


@dataclass(frozen=True)
class Shares(Rule):
    """Both factors of a product get half; a gate gets nothing, where the composite says so, and lets all through."""

    title: ClassVar[str] = "shared"

    def __call__(self, call: Call) -> Any:
        if not call.composite.shared_gates and (through := call.gated()) is not None:
            return through
        # A product's gradient would give all of it to each.
        y = call.plain()
        return send(y, (y, 0.5, 0.0), call=call)


@dataclass(frozen=True)
class Quotient(Rule):
    """What is divided by sets the scale only; a constant that is divided takes all."""

    title: ClassVar[str] = "scale held"

    def __call__(self, call: Call) -> Tensor:
        over, under = call.args[:2] if not call.name.startswith("r") else (call.args[1], call.args[0])
        if not isinstance(over, Tensor):
            over = under.new_tensor(over)
        result: Tensor = (over if trace(over) else call.constant(over)) / under.detach()
        return result


class _Winners(torch.autograd.Function):
    """A max pooling y of x; what comes back goes to where the maximum is, in equal parts where it is several times."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, options: dict[str, list[int]]) -> Tensor:
        ctx.options = options
        ctx.save_for_backward(x, y)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (m,), (x, y) = gradients, ctx.saved_tensors
        margin, places = _windows(tuple(x.shape[2:]), tuple(y.shape[2:]), **ctx.options)
        padded = F.pad(x, margin, value=-torch.inf)
        m = m / sum((padded[place] == y).to(m) for place in places)
        back = torch.zeros_like(padded)
        for place in places:
            back[place] += m * (padded[place] == y)
        return F.pad(back, [-edge for edge in margin]), None, None


@dataclass(frozen=True)
class Winners(Rule):
    """Max pooling sends all to the maximum, and shares between equals."""

    title: ClassVar[str] = "winner takes all"

    def __call__(self, call: Call) -> Any:
        y, index = pooled(call, call.x.detach())
        space = tuple(range(2, y.ndim))
        if len(space) == rank(call):
            if call.name == "adaptive_max_pool" and y[0, 0].numel() == 1:
                return answer(call, call.x.amax(space, keepdim=True), index)
            options = _options(call, tuple(call.x.shape[2:]), tuple(y.shape[2:]))
            if options is not None and _tied(y, index):
                return answer(call, _Winners.apply(call.x, y, options), index)
        return answer(call, taken(call.x, index, rank(call)), index)


def _tied(y: Tensor, index: Tensor) -> bool:
    """Whether neighbouring windows have one maximum, other than 0, in different places, as in a constant region."""
    for axis in range(2, y.ndim):
        last = y.shape[axis] - 1
        (a, b), (i, j) = ((t.narrow(axis, 0, last), t.narrow(axis, 1, last)) for t in (y, index))
        if bool(((a == b) & (i != j) & (a != 0)).any()):
            return True
    return False


def _options(call: Call, size: tuple[int, ...], grid: tuple[int, ...]) -> dict[str, list[int]] | None:
    """How a pooling of an image of `size` moves; None for an adaptive one whose windows are not all alike."""
    rank = len(size)
    if call.name == "adaptive_max_pool":
        if any(s % g for s, g in zip(size, grid, strict=True)):
            return None
        step = [s // g for s, g in zip(size, grid, strict=True)]
        return {"kernel": step, "stride": step, "padding": [0] * rank, "dilation": [1] * rank}

    def each(position: int, key: str, default: Any) -> list[int]:
        return option(call.args, call.kwargs, position, key, default, rank)

    kernel = each(1, "kernel_size", 1)
    return {
        "kernel": kernel,
        "stride": each(2, "stride", kernel),
        "padding": each(3, "padding", 0),
        "dilation": each(4, "dilation", 1),
    }


def _windows(
    size: tuple[int, ...],
    grid: tuple[int, ...],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> tuple[list[int], list[tuple[slice, ...]]]:
    """How far to pad an image, and then, for each place in a window, the slices with what all windows have there."""
    along, margin = [], []
    for length, count, k, s, p, d in zip(size, grid, kernel, stride, padding, dilation, strict=True):
        span = (count - 1) * s + 1
        margin.append((p, max(0, span + d * (k - 1) - length - p)))
        along.append([slice(i * d, i * d + span, s) for i in range(k)])
    flat = [edge for pair in reversed(margin) for edge in pair]
    return flat, [(slice(None), slice(None), *place) for place in _every(along)]


def _every(along: list[list[slice]]) -> Iterable[tuple[slice, ...]]:
    return [()] if not along else [(first, *rest) for first in along[0] for rest in _every(along[1:])]
