"""What the network says when parts of a sample are replaced: one loop for occlusion, LIME, Shapley values, RISE and
prediction difference, which differ in their masks, in what is put there, and in what they make of the answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from MedXAILib.engines.boxes import cut, put
from MedXAILib.engines.masks import Masks, Stream
from MedXAILib.explainer import Question
from MedXAILib.infills.infill import Infill

# For fewer masks it is not worth looking for a cheaper way to ask.
_MANY = 16

Take = Callable[[int, Masks, list[Tensor]], None]
"""Takes the number of the first of M masks, the masks, and each target's value (M,) under them."""


class Evaluator(ABC):
    """What the network says of one sample with boxes of it replaced. `at_sample` holds each target's value (1,)."""

    at_sample: list[Tensor]
    size: int
    """How many boxes to ask at a time."""

    @abstractmethod
    def values(self, patches: Tensor, low: Tensor) -> list[Tensor]:
        """Each target's value (M,) where `patches` (M, C, *box) stand at `low` (M, rank)."""


class Plain(Evaluator):
    """Asks the network about whole samples."""

    def __init__(self, question: Question) -> None:
        self.question, x = question, question.x
        self.at_sample = question.values(x)
        # Without gradients a forward holds little more than a few layers: count the input sixteen times.
        self.size = question.run.fitting(64 * x.numel(), x[:, 0].numel(), x.device)

    def values(self, patches: Tensor, low: Tensor) -> list[Tensor]:
        return self.question.values(filled(self.question.x, patches, low))


def filled(x: Tensor, patches: Tensor, low: Tensor) -> Tensor:
    """A sample `x` (1, C, *spatial) with `patches` (M, C, *box) at `low` (M, rank), (M, C, *spatial)."""
    if patches.shape[2:] == x.shape[2:]:
        return patches
    whole = x.repeat(len(low), *[1] * (x.ndim - 1))
    put(whole, torch.zeros_like(low), patches, low)
    return whole


def evaluator(question: Question, stream: Stream, infill: Infill) -> Evaluator:
    """The cheapest way to ask about the masks of a `stream` with an `infill`."""
    from MedXAILib.engines.by_window import ByWindow
    from MedXAILib.engines.incremental import incremental
    from MedXAILib.engines.whole_scan import WholeScan

    if isinstance(question, WholeScan):
        return ByWindow(question, stream.box)
    if stream.box == tuple(question.x.shape[2:]) or stream.count < _MANY:
        return Plain(question)
    return incremental(question, stream, infill)


def changed(x: Tensor, masks: Masks, infill: Infill, draws: Sequence[int]) -> Tensor:
    """The boxes of `masks` in a sample `x` (1, C, *spatial), changed: (M, C, *box)."""
    return torch.lerp(cut(x, masks.low, masks.box), infill.patches(masks, draws), masks.share)


def perturb(question: Question, stream: Stream, infill: Infill, take: Take, message: str) -> tuple[list[Tensor], int]:
    """Ask about every mask of `stream`, and let `take` have the answers, until somebody says that it is enough.

    Returns each target's value (1,) of the sample as it is, and how many masks were asked.
    """
    with torch.no_grad():
        asked = evaluator(question, stream, infill)

        def work(start: int, stop: int) -> None:
            masks = stream.make(start, stop)
            patches = changed(question.x, masks, infill, range(start, stop))
            take(start, masks, asked.values(patches, masks.low))

        done = question.run.chunks(stream.count, asked.size).map(work, message, anytime=True)
    return asked.at_sample, done
