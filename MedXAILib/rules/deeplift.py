"""DeepLIFT: multipliers of differences from a baseline, m (x - x'), that add up to the change of the target exactly.

Shrikumar, Greenside, Kundaje, "Learning important features through propagating activation differences", 2017 (rescale
rule). A product is split at the midpoint, which is its Shapley value (Lundberg and Lee, "A unified approach to
interpreting model predictions", 2017), normalisations and quotients so that a constant baseline does no harm, and
attention adds up too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from MedXAILib.engines.operators import (
    ACTIVATION,
    DIVISION,
    MAXIMUM,
    NORMALISATION,
    POOLING,
    PRODUCT,
    SOFTMAX,
    Normalisation,
)
from MedXAILib.engines.rules import Call, Composite, Rule, send, trace
from MedXAILib.rules.gradient import answer, pooled, rank, taken

# Differences smaller than this part of the values are rounding: there the derivative stands for the quotient.
_ROUNDING = 1e-5


class _Comparing(Rule):
    compares: ClassVar[bool] = True


def _with(y: Tensor, same: Tensor, call: Call) -> Tensor:
    """The value `y`, going back as `same` does, which has other values."""
    return send(y, (same, 1.0, 0.0), call=call)


@dataclass(frozen=True)
class Secant(_Comparing):
    """An activation: (y - y') / (x - x'), the derivative where both are the same."""

    title: ClassVar[str] = "rescale"

    def __call__(self, call: Call) -> Tensor:
        (x,), (other,) = call.given, call.others
        y, y_other = call.value(), call.value(other)
        dx = x.detach() - other
        tiny = dx.abs() <= _ROUNDING * torch.maximum(x.detach().abs(), other.abs())
        slope = (y - y_other) / torch.where(tiny, 1, dx)
        if bool(tiny.any()):
            # A root has none at zero, where it has no difference to give either.
            slope = torch.where(tiny, _derivative(call).nan_to_num(0.0, 0.0, 0.0), slope)
        return send(y, (x, slope, 0.0), call=call)


def _derivative(call: Call) -> Tensor:
    with torch.enable_grad():
        x = call.x.detach().requires_grad_()
        return torch.autograd.grad(call.on(x).sum(), x)[0]


@dataclass(frozen=True)
class Midpoint(_Comparing):
    """A product: each factor's difference times the mean of the other factor, which is the gradient halfway."""

    title: ClassVar[str] = "midpoint"

    def __call__(self, call: Call) -> Tensor:
        halfway = [t + (other - t.detach()) / 2 for t, other in zip(call.given, call.others, strict=True)]
        return _with(call.value(), call.on(*halfway), call)


@dataclass(frozen=True)
class Quotient(_Comparing):
    """y = a / b: a's difference times (b + b') / (b^2 + b'^2), b's times -(b' y + b y') / (b^2 + b'^2).

    That is the product with a reciprocal, split in proportion to b^2 and b'^2 as a normalisation is, and for the same
    reason. A constant a leaves -a / (b b').
    """

    title: ClassVar[str] = "quotient"

    def __call__(self, call: Call) -> Tensor:
        over, under = call.args[:2] if not call.name.startswith("r") else (call.args[1], call.args[0])
        others = {id(t): o for t, o in zip(call.given, call.others, strict=True)}
        y, b, b_other = call.value(), under.detach(), others[id(under)]
        if id(over) not in others:
            return _with(y, under * (-1 / (b * b_other)) * over, call)
        whole = b**2 + b_other**2
        slope = -(b_other * y + b * (others[id(over)] / b_other)) / whole
        return _with(y, over * ((b + b_other) / whole) + under * slope, call)


@dataclass(frozen=True)
class Normalised(_Comparing):
    """A normalisation, as the product of the centred input d with a scale r that depends on its variance v."""

    title: ClassVar[str] = "normalisation"

    def __call__(self, call: Call) -> Any:
        n = Normalisation.of(call.name, call.args, call.kwargs)
        y = call.value()
        centred, other = n.centre(n.x), n.centre(call.others[0].reshape(n.x.shape))
        scale, scale_other = n.scale(centred.detach()), n.scale(other)
        # d r - d' r' = (d - d') (u r + u' r') + (u' d + u d') (r - r') for any u + u' = 1. In proportion to the
        # variances nothing explodes where one input is nearly constant, as a baseline is; equal ones: the midpoint.
        u = scale_other**2 / (scale**2 + scale_other**2)
        gain = u * scale + (1 - u) * scale_other
        # (r - r') / (v - v') of r = v^(-1/2), without a quotient of differences.
        slope = -((scale * scale_other) ** 2) / (scale + scale_other)
        variance = (centred * (centred.detach() + other)).mean(n.dims, keepdim=True)
        same = centred * gain + ((1 - u) * centred.detach() + u * other) * (variance * slope)
        same = same if n.weight is None else same * n.weight
        return _with(y, same.reshape(y.shape), call)


@dataclass(frozen=True)
class Softened(_Comparing):
    """A softmax, as exp(x - L) with L = log(sum(exp(x))): the rescale rule for both exponentials and the logarithm.

    Quotients of differences are then logarithmic means of what lies between 0 and 1, and of L's change no more than all
    is taken, so that nothing explodes whatever the logits.
    """

    title: ClassVar[str] = "softmax"

    def __call__(self, call: Call) -> Tensor:
        dim = call.kwargs.get("dim", call.args[1] if len(call.args) > 1 else -1)
        x, other = call.x.detach().double(), call.others[0].double()
        whole, whole_other = (t.logsumexp(dim, keepdim=True) for t in (x, other))
        # What is kept is between 0 and 1, and needs no more than single precision.
        share = (_log_mean(x, other) - _log_mean(whole, whole_other)).exp().to(call.x)
        summed = (call.x * share).sum(dim, keepdim=True)
        y = call.value()
        if call.name == "logsumexp":
            return _with(y, summed.reshape(y.shape), call)
        slope = _log_mean(x - whole, other - whole_other).exp().to(call.x)
        return _with(y, (call.x - summed) * slope, call)


def _log_mean(a: Tensor, b: Tensor) -> Tensor:
    """The logarithm of (exp(a) - exp(b)) / (a - b): minus infinity where a mask says so to either."""
    gap = (a - b).abs()
    return torch.maximum(a, b) + torch.where(gap > 0, -torch.expm1(-gap) / gap, 1).log()


@dataclass(frozen=True)
class Winner(_Comparing):
    """Max pooling: to the voxel that is the maximum in x where that is larger, else to that in x'."""

    title: ClassVar[str] = "winner takes all"

    def __call__(self, call: Call) -> Any:
        (x,), (other,) = call.given, call.others
        y, index = pooled(call, x.detach())
        y_other, index_other = pooled(call, other)
        winner = torch.where(y >= y_other, index, index_other)
        best = taken(x, winner, rank(call))
        gap = best.detach() - taken(other, winner, rank(call))
        slope = torch.where(gap == 0, 0, (y - y_other) / torch.where(gap == 0, 1, gap))
        return answer(call, send(y, (best, slope, 0.0), call=call), index)


@dataclass(frozen=True)
class Largest(_Comparing):
    """A maximum or minimum over dimensions, or of two tensors, likewise, shared between equals."""

    title: ClassVar[str] = "largest"

    def __call__(self, call: Call) -> Any:
        sign = -1 if "min" in call.name else 1
        y = call.value()
        if len(call.args) > 1 and isinstance(call.args[1], Tensor):
            left = iter(call.others)
            others = [t if trace(t) is None else next(left) for t in call.args[:2]]
            x, other = (torch.stack(torch.broadcast_tensors(*pair)) for pair in (call.args[:2], others))
            return _with(y, self._weighted(x, other, (0,), sign).reshape(y.shape), call)
        (x,), (other,) = call.given, call.others
        dims = call.kwargs.get("dim", call.args[1] if len(call.args) > 1 else ())
        same = self._weighted(x, other, dims if dims != () else tuple(range(x.ndim)), sign)
        if isinstance(y, Tensor):
            return _with(y, same.reshape(y.shape), call)
        return type(y)((_with(y[0], same.reshape(y[0].shape), call), y[1]))

    @staticmethod
    def _weighted(x: Tensor, other: Tensor, dims: Any, sign: int) -> Tensor:
        top, top_other = (sign * (sign * t).amax(dims, keepdim=True) for t in (x.detach(), other))
        ahead = sign * (top - top_other) >= 0
        winners = torch.where(ahead, x.detach() == top, other == top_other)
        gap = x.detach() - other
        slope = torch.where(winners & (gap != 0), (top - top_other) / torch.where(gap == 0, 1, gap), 0)
        return (x * (slope / winners.sum(dims, keepdim=True))).sum(dims, keepdim=True)


DEEPLIFT = Composite(
    (
        (ACTIVATION, Secant()),
        (NORMALISATION, Normalised()),
        (SOFTMAX, Softened()),
        (PRODUCT, Midpoint()),
        (DIVISION, Quotient()),
        (POOLING, Winner()),
        (MAXIMUM, Largest()),
    )
)
