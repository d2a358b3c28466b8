"""Gradients at the network's input, for many versions of it, within the memory there is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from MedXAILib.explainer import Question


def input_gradients(question: Question, x: Tensor) -> list[Tensor]:
    """The gradient of each target with respect to `x` (M, C, *spatial): M gradients from one forward."""
    leaf = x.detach().clone().requires_grad_()
    values = question.values(leaf)
    last = len(values) - 1
    return [question.gradients(value, [leaf], keep=i < last)[0] for i, value in enumerate(values)]


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
    """How many versions fit at once, from what autograd keeps of one (activations; the parameters are there anyway)."""
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
        question.values(question.x.detach().clone().requires_grad_())
    # What two operators keep together counts twice, which covers the gradients that backward holds beside it.
    voxels = len(question.x) * question.x[0, 0].numel()
    question.fitting = question.run.fitting(sum(kept), voxels, question.x.device)
    return question.fitting
