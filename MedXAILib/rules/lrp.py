"""Layer-wise relevance propagation: its rules, and the composites they are used in.

Bach et al., "On pixel-wise explanations for non-linear classifier decisions by layer-wise relevance propagation", 2015;
Montavon et al., "Layer-wise relevance propagation: an overview", 2019. Relevance is R = m * x. A result z = T(x, w) + b
adds up from contributions x w; w+ and w- are the positive and negative parts of w.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from MedXAILib.engines.operators import (
    ACTIVATION,
    DIVISION,
    FIXED,
    MAXIMUM,
    NORMALISATION,
    POOLING,
    PRODUCT,
    SOFTMAX,
    WEIGHTED,
    Affine,
    Change,
)
from MedXAILib.engines.rules import Call, Composite, Rule, Way, send
from MedXAILib.errors import unknown
from MedXAILib.rules.gradient import Plain
from MedXAILib.rules.relevance import Held, Linearised, Passing, Quotient, Shares, Winners

Name = Literal["epsilon", "gamma", "alpha_beta", "epsilon_plus", "epsilon_plus_flat"]
First = Literal["same", "flat", "w_square", "z_box"]

# Stands for a voxel of 0 where relevance is not in proportion to the voxel; nothing changes by so little.
_TINY = 1e-20


def nonzero(x: Tensor) -> Tensor:
    """`x`, with a value that changes nothing for 0, so that relevance can be a multiple of it."""
    return torch.where(x == 0, _TINY, x)


class _Stabilised(torch.autograd.Function):
    """The value of z; what comes back to it is multiplied by z / (z + epsilon sign z)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, value: Tensor, epsilon: float, book: Any) -> Tensor:
        ctx.epsilon, ctx.book = epsilon, book
        # With the sign of z, which the backward needs too.
        ctx.save_for_backward(value / (value.abs() + epsilon))
        # Not a view of z itself, which would live as long.
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (m,), (share,) = gradients, ctx.saved_tensors
        ctx.book.lost += ctx.epsilon * float(torch.dot(m.flatten(), share.flatten()))
        return m * share.abs(), None, None, None


@dataclass(frozen=True)
class Epsilon(Rule):
    """In proportion to the contributions: x w / (z + epsilon sign z)."""

    title: ClassVar[str] = "epsilon"
    through: ClassVar[bool] = True
    epsilon: float

    def __call__(self, call: Call) -> Tensor:
        result = _result(call)
        if not self.epsilon:
            return send(result, (result, 1.0, 0.0), call=call)
        z: Tensor = _Stabilised.apply(result, result.detach(), self.epsilon, call.book)
        return z


@dataclass(frozen=True)
class _Proportional(Rule):
    """In proportion to changed contributions, p being their sum: R / (p + epsilon sign p)."""

    epsilon: float

    def _way(self, z: Tensor, p: Tensor, share: float | Tensor = 1.0, sign: int = 1) -> Way:
        """`share` of what comes back to z, to a sum `p` whose `sign` is known."""
        total = p.detach() + sign * self.epsilon
        return p, z.detach() / total * share, sign * self.epsilon


@dataclass(frozen=True)
class AlphaBeta(_Proportional):
    """1 + beta of the relevance to the positive contributions, -beta to the negative ones."""

    title: ClassVar[str] = "alpha-beta"
    beta: float

    def __call__(self, call: Call) -> Tensor:
        z = _result(call)
        way = self._way(z, _positive(call, 1.0, 0.0), 1 + self.beta)
        if not self.beta:
            return send(z, way, call=call)
        return send(z, way, self._way(z, _negative(call, 1.0, 0.0), -self.beta, sign=-1), call=call)


@dataclass(frozen=True)
class ZPlus(AlphaBeta):
    """In proportion to the positive contributions."""

    title: ClassVar[str] = "z+"
    beta: float = 0.0


@dataclass(frozen=True)
class Gamma(_Proportional):
    """Contributions with the sign of z count 1 + gamma times."""

    title: ClassVar[str] = "gamma"
    gamma: float

    def __call__(self, call: Call) -> Tensor:
        z = _result(call)
        positive = self._way(z, _positive(call, self.gamma, 1.0), z > 0)
        negative = self._way(z, _negative(call, self.gamma, 1.0), z < 0, sign=-1)
        return send(z, positive, negative, call=call)


@dataclass(frozen=True)
class Flat(_Proportional):
    """The same to every input that z sees."""

    title: ClassVar[str] = "flat"

    def __call__(self, call: Call) -> Tensor:
        affine, ones = _affine(call), _as_one(call)
        p = affine(ones, None, torch.ones_like)
        return send(_result(call), self._way(_result(call), p), call=call)


@dataclass(frozen=True)
class WSquare(_Proportional):
    """In proportion to the squared weights."""

    title: ClassVar[str] = "w square"

    def __call__(self, call: Call) -> Tensor:
        affine, ones = _affine(call), _as_one(call)
        bias = None if affine.bias is None else call.constant(affine.bias.square())
        return send(_result(call), self._way(_result(call), affine(ones, bias, torch.square)), call=call)


@dataclass(frozen=True)
class ZBox(_Proportional):
    """In proportion to x w - low w+ - high w-, the input's values lying between low and high (of each channel)."""

    title: ClassVar[str] = "z box"

    def __call__(self, call: Call) -> Tensor:
        affine, x = _affine(call), call.x
        flat = x.detach().flatten(2)
        p = affine(x, _bias(call, None))
        for bound, sign in ((flat.amin(2), 1), (flat.amax(2), -1)):
            edge = bound.reshape(*bound.shape, *[1] * (x.ndim - 2)).expand_as(x)
            at_edge = send(edge, (x, edge / nonzero(x.detach()), 0.0), call=call)
            p = p - affine(at_edge, _bias(call, sign), partial(_part, sign=sign))
        return send(_result(call), self._way(_result(call), p), call=call)


def composite(name: str, epsilon: float, gamma: float, beta: float, first: First = "same") -> Composite:
    """A named composite.

    "epsilon" and "alpha_beta" (as Böhle et al. 2019 on MRI, beta from 0 to 1) are for all weighted operators. The
    others are for convolutions, with epsilon for linear layers: "gamma", "epsilon_plus" (z+), and "epsilon_plus_flat",
    which is flat for the first layer. `first` is another rule for the first layer.
    """
    if name not in get_args(Name):
        raise unknown("composite", name, get_args(Name))
    dense: Rule = AlphaBeta(epsilon, beta) if name == "alpha_beta" else Epsilon(epsilon)
    spatial = {"epsilon": dense, "alpha_beta": dense, "gamma": Gamma(epsilon, gamma)}.get(name, ZPlus(epsilon))
    if first == "same" and name == "epsilon_plus_flat":
        first = "flat"
    firsts = {"flat": Flat(epsilon), "w_square": WSquare(epsilon), "z_box": ZBox(epsilon)}
    opening = () if first == "same" else (("first", firsts[first]),)
    return Composite((*opening, ("linear", dense), (WEIGHTED, spatial), *OTHERS), merges=True, balanced=True)


OTHERS: tuple[tuple[str, Rule], ...] = (
    (ACTIVATION, Passing()),
    (NORMALISATION, Held()),
    (FIXED, Held()),
    (SOFTMAX, Linearised()),
    (PRODUCT, Shares()),
    (DIVISION, Quotient()),
    (POOLING, Winners()),
    (MAXIMUM, Plain()),
)
"""What relevance does elsewhere, whatever the composite."""


def _result(call: Call) -> Tensor:
    assert call.result is not None
    return call.result


def _affine(call: Call) -> Affine:
    assert call.affine is not None
    return call.affine


def _part(tensor: Tensor, sign: int) -> Tensor:
    return tensor.clamp(min=0) if sign > 0 else tensor.clamp(max=0)


def _bias(call: Call, sign: int | None) -> Tensor | None:
    bias = _affine(call).bias
    return None if bias is None else call.constant(bias if sign is None else _part(bias, sign))


def _as_one(call: Call) -> Tensor:
    """1 for each input; what comes back to it is the input's relevance."""
    x = call.x
    return send(torch.ones_like(x), (x, 1 / nonzero(x.detach()), 0.0), call=call)


def _positive(call: Call, gain: float, rest: float) -> Tensor:
    """The sum of contributions, positive ones counting rest + gain times, negative ones rest times."""
    return _summed(call, gain, rest, 1)


def _negative(call: Call, gain: float, rest: float) -> Tensor:
    """The sum of contributions, negative ones counting rest + gain times, positive ones rest times."""
    return _summed(call, gain, rest, -1)


def _summed(call: Call, gain: float, rest: float, sign: int) -> Tensor:
    affine, x = _affine(call), call.x

    def changed(sign: int) -> Change:
        return lambda tensor: _part(tensor, sign) * gain + tensor * rest

    bias = None if affine.bias is None else call.constant(changed(sign)(affine.bias))
    # After most activations nothing is negative, and half of the work falls away.
    if not bool(x.detach().amin() < 0):
        return affine(x, bias, changed(sign))
    return affine.of_both(x, bias, changed(sign), changed(-sign))
