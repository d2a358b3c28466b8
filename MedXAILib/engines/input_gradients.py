"""Gradients at the network's input, for many versions of it, within the memory there is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from MedXAILib.engines.rules import Interception, Unseen, intercepting
from MedXAILib.explainer import Question
from MedXAILib.rules.gradient import GRADIENT


def input_gradients(question: Question, x: Tensor) -> list[Tensor]:
    """The gradient of each target with respect to `x` (M, C, *spatial): M gradients from one forward."""
    leaf, values, _ = _recorded(question, x)
    last = len(values) - 1
    return [question.gradients(value, [leaf], keep=i < last)[0] for i, value in enumerate(values)]


def _recorded(question: Question, x: Tensor) -> tuple[Tensor, list[Tensor], int]:
    """An input like `x`, and each target's value (M,), with no more kept than frozen weights need; and the bytes of the
    largest result on the way."""
    mode = Interception(GRADIENT)
    try:
        with intercepting(question.model, mode):
            leaf = mode.start(x)
            return leaf, question.values(leaf), mode.book.largest
    except Unseen:
        # PyTorch knows the way back through what cannot be seen.
        leaf = x.detach().clone().requires_grad_()
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


def fitting(question: Question) -> int:
    """How many versions fit at once, from what one needs (activations; the parameters are there anyway)."""
    if question.fitting:
        return question.fitting
    kept: list[int] = []
    parameters = {p.untyped_storage().data_ptr() for p in question.model.network.parameters()}

    def count(tensor: Tensor) -> None:
        # No backward follows, so nothing is really kept; a tensor handed back here would outlive its graph in a cycle.
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept.append(storage.nbytes())

    with torch.autograd.graph.saved_tensors_hooks(count, lambda never: never):
        *_, largest = _recorded(question, question.x)
    # In the backward, what comes back to a result and what goes on from it are there at the same time.
    bytes_each = sum(kept) + 2 * largest
    voxels = len(question.x) * question.x[0, 0].numel()
    question.fitting = question.run.fitting(bytes_each, voxels, question.x.device)
    return question.fitting
