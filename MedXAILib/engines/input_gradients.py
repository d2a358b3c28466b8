"""Gradients at the network's input, for many versions of it, within the memory there is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from MedXAILib.engines.checkpointing import Kept, checkpointed
from MedXAILib.engines.rules import ran
from MedXAILib.engines.seeing import Unseen
from MedXAILib.explainer import Question
from MedXAILib.rules.gradient import GRADIENT

# For a backward a network keeps some ten to hundred times its input; with less than this, it is measured.
_NEAR = 1000


def input_gradients(question: Question, x: Tensor) -> list[Tensor]:
    """The gradient of each target with respect to `x` (M, C, *spatial): M gradients from one forward."""
    leaf, values, _ = _recorded(question, x)
    last = len(values) - 1
    return [question.gradients(value, [leaf], keep=i < last)[0] for i, value in enumerate(values)]


def _recorded(question: Question, x: Tensor) -> tuple[Tensor, list[Tensor], int]:
    """An input like `x`, and each target's value (M,), with no more kept than frozen weights need; and the bytes of the
    largest result on the way."""
    try:
        mode, leaf, values = ran(question, x, GRADIENT)
        return leaf, values, mode.book.largest
    except Unseen:
        # PyTorch knows the way back through what cannot be seen.
        leaf = x.detach().clone().requires_grad_()
        with checkpointed(question.recomputed):
            return leaf, question.values(leaf), 0


def each_gradient(
    question: Question,
    versions: Sequence[int],
    make: Callable[[int], Tensor],
    take: Callable[[list[Tensor]], None],
    message: str,
) -> None:
    """The gradients at many versions of the input, as many at a time as fit.

    `make(i)` gives version i (M, C, *spatial); `take` receives, in order, each target's gradient (M, C, *spatial).
    """

    def work(begin: int, end: int) -> None:
        gradients = input_gradients(question, torch.cat([make(i) for i in versions[begin:end]]))
        for parts in zip(*(g.chunk(end - begin) for g in gradients), strict=True):
            take(list(parts))

    question.run.chunks(len(versions), fitting(question)).map(work, message)


def fit(question: Question) -> None:
    """Have parts of the network computed again in the backward, when one sample needs more than the memory budget."""
    if question.run.budget(question.x.device) < _NEAR * question.x.nbytes:
        fitting(question)


def fitting(question: Question) -> int:
    """How many versions fit at once, from what one needs (activations; the parameters are there anyway).

    When not even one does, `question.recomputed` is chosen so that it does, or nearly.
    """
    if question.fitting:
        return question.fitting
    largest = 0

    def forward() -> None:
        nonlocal largest
        *_, largest = _recorded(question, question.x)

    kept, budget = Kept(question.model.network, forward), question.run.budget(question.x.device)
    # In the backward, what comes back to a result and what goes on from it are there at the same time.
    beside = 2 * largest
    voxels = len(question.x) * question.x[0, 0].numel()
    question.fitting = question.run.fitting(kept.bytes + beside, voxels, question.x.device)
    if kept.bytes + beside > budget:
        question.recomputed = kept.blocks(budget - beside, several=len(question.targets) > 1)
    if question.recomputed:
        question.run.note(
            "Memory does not hold all that a backward needs: parts of the network were computed twice, which takes "
            "longer and gives the same map."
        )
    return question.fitting
