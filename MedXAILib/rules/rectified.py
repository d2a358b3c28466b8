"""Deconvolution and guided backpropagation: activations send back only what speaks for the target.

Zeiler and Fergus, "Visualizing and understanding convolutional networks", 2014; Springenberg et al., "Striving for
simplicity: the all convolutional net", 2015. Both are said for ReLU; m is what comes back to an activation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from MedXAILib.engines.rules import Call, Composite, Rule, send
from MedXAILib.rules.gradient import GRADIENT, Rectified

RECTIFIERS = (
    "relu relu6 leaky_relu prelu rrelu elu selu celu gelu silu mish softplus hardswish hardtanh softsign softshrink "
    "hardshrink threshold"
).split()


class _Positive(torch.autograd.Function):
    """y; of what comes back, the positive part goes on."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0].clamp(min=0)


@dataclass(frozen=True)
class Guided(Rule):
    """The positive part of m, times the activation's own derivative."""

    title: ClassVar[str] = "guided"

    def __call__(self, call: Call) -> Tensor:
        y: Tensor = _Positive.apply(Rectified()(call) if call.name == "relu" else call.plain())
        return y


@dataclass(frozen=True)
class Deconvolved(Rule):
    """The positive part of m, whatever the activation's input was."""

    title: ClassVar[str] = "deconvolution"

    def __call__(self, call: Call) -> Tensor:
        y: Tensor = _Positive.apply(send(call.value(), (call.x, 1.0, 0.0), call=call))
        return y


def rectified(rule: Rule) -> Composite:
    """`rule` for every rectifying activation, and the gradient for the rest."""
    return Composite((*((name, rule) for name in RECTIFIERS), *GRADIENT.rules), strict=False)
