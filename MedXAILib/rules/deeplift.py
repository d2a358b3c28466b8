"""DeepLIFT: multipliers of differences from a baseline, m (x - x'), that add up to the change of the target exactly.

Shrikumar, Greenside, Kundaje, "Learning important features through propagating activation differences", 2017 (rescale
rule). A product and everything made of products is split at the midpoint, which is its Shapley value (Lundberg and Lee,
"A unified approach to interpreting model predictions", 2017), so that normalisations, softmax and attention add up too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
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
from MedXAILib.engines.rules import Call, Composite, Rule, send

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
            slope = torch.where(tiny, _derivative(call), slope)
        return send(y, (x, slope, 0.0), call=call)


def _derivative(call: Call) -> Tensor:
    with torch.enable_grad():
        x = call.x.detach().requires_grad_()
        return torch.autograd.grad(call.on(x).sum(), x)[0]


@dataclass(frozen=True)
class Midpoint(_Comparing):
    """A product: each factor's difference times the mean of the other factor."""

    title: ClassVar[str] = "midpoint"

    def __call__(self, call: Call) -> Tensor:
        (a, b), (a_other, b_other) = call.given, call.others
        same = call.on(a, (b.detach() + b_other) / 2) + call.on((a.detach() + a_other) / 2, b)
        return _with(call.value(), same, call)


@dataclass(frozen=True)
class Reciprocal(_Comparing):
    """A quotient, as the product with a reciprocal, whose difference is -(b - b') / (b b')."""

    title: ClassVar[str] = "quotient"

    def __call__(self, call: Call) -> Tensor:
        over, under = call.args[:2] if not call.name.startswith("r") else (call.args[1], call.args[0])
        others = {id(t): o for t, o in zip(call.given, call.others, strict=True)}
        b, b_other = under.detach(), others[id(under)]
        slope = -1 / (b * b_other)
        if id(over) not in others:
            return _with(call.value(), under * slope * over, call)
        mean = (over.detach() + others[id(over)]) / 2
        return _with(call.value(), over * (1 / b + 1 / b_other) / 2 + under * slope * mean, call)


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
    """A softmax, as the quotient of exponentials by their sum."""

    title: ClassVar[str] = "softmax"

    def __call__(self, call: Call) -> Tensor:
        dim = call.kwargs.get("dim", call.args[1] if len(call.args) > 1 else -1)
        # In double precision, because one shift has to serve both inputs.
        x, other = call.x.double(), call.others[0].double()
        shift = torch.maximum(x.detach().amax(dim, keepdim=True), other.amax(dim, keepdim=True))
        dx = (x - other).detach()
        e, e_other = (x.detach() - shift).exp(), (other - shift).exp()
        # (e - e') / (x - x') without cancellation; where a mask says minus infinity to both, nothing.
        gap = dx.abs().nan_to_num(nan=0.0)
        near = torch.minimum(e, e_other) * torch.where(gap > 0, torch.expm1(gap.clamp(max=1)) / gap, 1)
        slope = torch.where(gap > 1, (e - e_other) / dx, near)
        q, q_other = 1 / e.sum(dim, keepdim=True), 1 / e_other.sum(dim, keepdim=True)
        raised = x * slope
        same = raised * ((q + q_other) / 2) - (e + e_other) / 2 * q * q_other * raised.sum(dim, keepdim=True)
        return _with(call.value(), same.to(call.x.dtype), call)


@dataclass(frozen=True)
class Winner(_Comparing):
    """Max pooling: to the voxel that is the maximum in x where that is larger, else to that in x'."""

    title: ClassVar[str] = "winner takes all"

    def __call__(self, call: Call) -> Any:
        (x,), (other,) = call.given, call.others
        pool = getattr(F, f"{call.name}{x.ndim - 2}d")
        options = {**call.kwargs, "return_indices": True}
        # The last of seven positional arguments is whether to return the indices.
        y, index = pool(x.detach(), *call.args[1:6], **options)
        y_other, index_other = pool(other, *call.args[1:6], **options)
        winner = torch.where(y >= y_other, index, index_other).flatten(2)
        gap = (x.detach() - other).flatten(2).gather(2, winner).reshape(y.shape)
        slope = torch.where(gap == 0, 0, (y - y_other) / torch.where(gap == 0, 1, gap))
        sent = send(y, (x.flatten(2).gather(2, winner).reshape(y.shape), slope, 0.0), call=call)
        return (sent, index) if isinstance(call.value(), tuple) else sent


@dataclass(frozen=True)
class Largest(_Comparing):
    """A maximum or minimum over dimensions, likewise, shared between equals."""

    title: ClassVar[str] = "largest"

    def __call__(self, call: Call) -> Any:
        (x,), (other,) = call.given, call.others
        y = call.value()
        sign = -1 if call.name in ("min", "amin") else 1
        dim = call.kwargs.get("dim", call.args[1] if len(call.args) > 1 else ())
        top, top_other = (sign * (sign * t).amax(dim, keepdim=True) for t in (x.detach(), other))
        ahead = sign * (top - top_other) >= 0
        winners = torch.where(ahead, x.detach() == top, other == top_other)
        gap = x.detach() - other
        slope = torch.where(winners & (gap != 0), (top - top_other) / torch.where(gap == 0, 1, gap), 0)
        slope = slope / winners.sum(dim or tuple(range(x.ndim)), keepdim=True)
        values = y[0] if isinstance(y, tuple) else y
        same = (x * slope).sum(dim or tuple(range(x.ndim)), keepdim=True)
        sent = _with(values, same.reshape(values.shape), call)
        return (sent, y[1]) if isinstance(y, tuple) else sent


DEEPLIFT = Composite(
    (
        (ACTIVATION, Secant()),
        (NORMALISATION, Normalised()),
        (SOFTMAX, Softened()),
        (PRODUCT, Midpoint()),
        (DIVISION, Reciprocal()),
        (POOLING, Winner()),
        (MAXIMUM, Largest()),
    )
)
