"""Attention rollout as something that is sent back: every token's share goes to the tokens it attends to.

Abnar and Zuidema, "Quantifying attention flow in transformers", 2020. What comes back is a share, not a multiplier, and
is spread evenly over channels, so that heads are averaged; a skip gets half. Windows, their shifts, merged patches and
convolutions need no book-keeping: a share goes where a value came from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

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
)
from MedXAILib.engines.rules import Call, Composite, Rule, send, trace
from MedXAILib.rules.gradient import Plain

ATTENTION = "attention"
"""What a product with a gate is counted as."""

_BY_ELEMENT = ("mul", "multiply", "rmul")


@dataclass(frozen=True)
class Evenly(Rule):
    """To all that a result sees, evenly."""

    title: ClassVar[str] = "evenly"

    def __call__(self, call: Call) -> Tensor:
        assert call.affine is not None and call.result is not None
        with torch.no_grad():
            seen = call.affine(torch.ones_like(call.x[:1]), None, torch.ones_like)
        return send(call.result, (call.affine(call.x, None, torch.ones_like), 1 / seen.clamp_min(1), 0.0), call=call)


@dataclass(frozen=True)
class Kept(Rule):
    """To the value in the same place, whatever its sign."""

    title: ClassVar[str] = "kept"

    def __call__(self, call: Call) -> Tensor:
        return send(call.value(), (call.x, 1.0, 0.0), call=call)


@dataclass(frozen=True)
class Halved(Rule):
    """Of two summands or factors, half to each."""

    title: ClassVar[str] = "halved"

    def __call__(self, call: Call) -> Tensor:
        y = call.value()
        return send(y, *((t.expand_as(y), 1 / len(call.given), 0.0) for t in call.given), call=call)


@dataclass(frozen=True)
class Scaled(Rule):
    """A factor that was learnt, or is a number, changes no share; one that chooses, as a mask does, does."""

    title: ClassVar[str] = "scaled"

    def __call__(self, call: Call) -> Any:
        chooses = any(isinstance(a, Tensor) and not isinstance(a, nn.Parameter) and trace(a) is None for a in call.args)
        return call.plain() if chooses or len(call.given) > 1 else Kept()(call)


@dataclass(frozen=True)
class Attended(Rule):
    """To what is attended to, as much as it is; what made the attention gets nothing."""

    title: ClassVar[str] = "attended"

    def __call__(self, call: Call) -> Any:
        if len(call.given) < 2:
            return Scaled()(call)
        if (through := call.gated()) is not None:
            call.book.count(ATTENTION, call.name)
            return through
        # Of queries and keys nothing comes; the branches of a gated layer are as good as one another.
        return Halved()(call) if call.name in _BY_ELEMENT else call.value()


@dataclass(frozen=True)
class Softmax(Kept):
    """As any activation, when it is not attention."""

    title: ClassVar[str] = "softmax"


ROLLOUT = Composite(
    (
        (WEIGHTED, Evenly()),
        (ACTIVATION, Kept()),
        (NORMALISATION, Kept()),
        (FIXED, Kept()),
        (SOFTMAX, Softmax()),
        *((name, Halved()) for name in ("add", "radd", "sub", "subtract", "rsub")),
        *((name, Kept()) for name in ("neg", "negative")),
        *((name, Attended()) for name in (*_BY_ELEMENT, "matmul", "einsum", "bmm")),
        (PRODUCT, Attended()),
        (DIVISION, Scaled()),
        (POOLING, Plain()),
        (MAXIMUM, Plain()),
    )
)
