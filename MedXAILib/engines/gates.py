"""The attention gates of a network, as they are at work: what features are multiplied by, a number for each unit.

Operators are seen instead of modules, so gates are found whatever they are called, in functional code and in place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from MedXAILib.engines.capture import Captured
from MedXAILib.engines.receptive_field import Following, Geometry, geometry_of
from MedXAILib.engines.rules import Call, Composite, Interception, Rule
from MedXAILib.engines.seeing import intercepting
from MedXAILib.explainer import Question


def read_gates(question: Question) -> list[Captured]:
    """The coefficients (N, 1, *grid) of every gate in the order of the forward, at `raw`.

    A gate is a sigmoid or softmax, at most moved, averaged or interpolated, that all channels of a layer are multiplied
    by alike, unit by unit.

    Raises:
        Unseen: when a part of the network cannot be looked into.
    """
    size = tuple(question.x.shape[2:])
    following, taken = Following(len(size)), list[tuple[Tensor, Geometry | None]]()
    mode = Interception(Composite(tuple((name, _Taken(taken)) for name in ("mul", "multiply", "rmul")), strict=False))
    with torch.no_grad(), intercepting(question.model, mode), following:
        question.values(following.start(mode.start(question.x)))
    return [Captured(gate, size, looks, following.grids) for gate, looks in taken if gate.ndim == question.x.ndim]


@dataclass(frozen=True)
class _Taken(Rule):
    title: ClassVar[str] = "read"
    taken: list[tuple[Tensor, Geometry | None]]

    def __call__(self, call: Call) -> Any:
        gate = call.gate
        if gate is not None:
            (features,) = (factor for factor in call.given if factor is not gate)
            if gate.shape[2:] == features.shape[2:] and features.shape[1] > 1 and _alike(gate):
                self.taken.append((gate[:, :1], geometry_of(features)))
        return call.plain()


def _alike(gate: Tensor) -> bool:
    """Whether all channels have the same coefficients, as in the gates of a squeeze or a swish they have not."""
    return torch.equal(gate, gate[:, :1].expand_as(gate))
