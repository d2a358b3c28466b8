"""The gradient of a network whose weights do not change, with a tenth of what PyTorch keeps for it.

A ReLU keeps a byte for each voxel, a convolution and a fixed normalisation nothing, max pooling where its maxima are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from MedXAILib.engines.operators import POOLING
from MedXAILib.engines.rules import Call, Composite, Rule, send


@dataclass(frozen=True)
class Plain(Rule):
    """The gradient as PyTorch has it."""

    title: ClassVar[str] = "gradient"

    def __call__(self, call: Call) -> Any:
        return call.plain()


@dataclass(frozen=True)
class Rectified(Rule):
    """ReLU: where its input was positive."""

    title: ClassVar[str] = "gradient"

    def __call__(self, call: Call) -> Tensor:
        # A byte multiplies faster than a bool.
        return send(call.value(), (call.x, (call.x.detach() > 0).view(torch.uint8), 0.0), call=call)


@dataclass(frozen=True)
class Pooled(Rule):
    """Max pooling: to the first maximum."""

    title: ClassVar[str] = "gradient"

    def __call__(self, call: Call) -> Any:
        _, index = pooled(call, call.x.detach())
        return answer(call, taken(call.x, index, rank(call)), index)


def pooled(call: Call, x: Tensor) -> tuple[Tensor, Tensor]:
    """A max pooling of `x`, and where its maxima are (as max_unpool takes it)."""
    pool = getattr(F, f"{call.name}{rank(call)}d")
    # The last of seven positional arguments is whether to return the places too.
    y, index = pool(x, *call.args[1:6], **{**call.kwargs, "return_indices": True})
    return y, index


def rank(call: Call) -> int:
    """The number of spatial dimensions of a pooling, whose input may have no N."""
    return int(call.func.__name__.partition("pool")[2][0])


def taken(x: Tensor, index: Tensor, rank: int) -> Tensor:
    """The values of `x` (..., *spatial) at the places `index` (..., *grid)."""
    return x.flatten(-rank).gather(-1, index.flatten(-rank)).reshape(index.shape)


def answer(call: Call, y: Tensor, index: Tensor) -> Any:
    """What a max pooling returns: the maxima, and their places where it was asked for them."""
    return (y, index) if call.kwargs.get("return_indices") or call.args[6:] else y


GRADIENT = Composite((("relu", Rectified()), (POOLING, Pooled())), strict=False)
