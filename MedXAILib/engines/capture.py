"""Activations of layers and the gradients there: one forward, and a backward through the tail only."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from MedXAILib.engines.receptive_field import Following, Geometry, geometry_of
from MedXAILib.errors import MedXAIError
from MedXAILib.explainer import Question

Hook = Callable[[nn.Module, Any, Any], Any]

# A layer is worth a map when at least this part of its units can change the target.
_REACHED = 0.05


@dataclass(frozen=True)
class Captured:
    """A layer's raw output, and how to read it as a grid of units over an input of `size`."""

    raw: Tensor
    size: tuple[int, ...]
    followed: Geometry | None
    grids: Mapping[int, tuple[tuple[int, ...], Geometry]]

    def grid(self, tensor: Tensor) -> Tensor | None:
        """`tensor`, shaped as the layer's output, as (N, C, *grid); None when it has no spatial layout."""
        rank = len(self.size)
        if tensor.ndim == rank + 2:
            first, last = self._misfit(tensor.shape[2:]), self._misfit(tensor.shape[1:-1])
            if self.followed is None and min(first, last) > math.log(2):
                return None
            return tensor.movedim(-1, 1) if self.followed is None and last < first else tensor
        if tensor.ndim == 3 and rank > 1:
            return self._tokens(tensor)
        return None

    def place(self, maps: Tensor) -> Tensor:
        """Maps (N, K, *grid) on the network's input grid, each unit where it looks."""
        return self._geometry(tuple(maps.shape[2:])).place(maps, self.size)

    def _geometry(self, grid: tuple[int, ...]) -> Geometry:
        if self.followed is not None:
            return self.followed
        size, geometry = self.grids.get(math.prod(grid), (None, None))
        return geometry if geometry is not None and size == grid else Geometry.spanning(grid, self.size)

    def _misfit(self, grid: Sequence[int]) -> float:
        """How far `grid` is from the shape of the input: channels-last layers fit with their channels at the end."""
        ratios = [math.log(max(g, 1) / s) for g, s in zip(grid, self.size, strict=True)]
        return max(ratios) - min(ratios)

    def _tokens(self, tensor: Tensor) -> Tensor | None:
        """Transformer tokens (N, T, C) as (N, C, *grid); a class token in front is left out."""
        count = tensor.shape[1]
        cubes = {math.prod(g): g for p in range(1, max(self.size) + 1) if all(g := tuple(s // p for s in self.size))}
        for cells in (count, count - 1):
            grid = self.grids[cells][0] if cells in self.grids else cubes.get(cells)
            if grid is not None:
                return tensor[:, count - cells :].movedim(-1, 1).reshape(tensor.shape[0], tensor.shape[2], *grid)
        return None


def capture(question: Question, layers: Sequence[str]) -> tuple[list[Tensor], dict[str, Captured]]:
    """Each target's value, and the `layers`, from one forward in which only what comes after them is recorded.

    Raises:
        MedXAIError: when there is no such layer, or it gives no tensor.
    """
    rank = question.x.ndim - 2
    size = tuple(question.x.shape[2:])
    taken: dict[str, Captured] = {}

    def take(name: str) -> Hook:
        def hook(_module: nn.Module, _inputs: object, output: object) -> Tensor:
            if not isinstance(output, Tensor):
                raise MedXAIError(
                    f"Layer '{name}' gives {type(output).__name__}, not a tensor: choose a layer inside it."
                )
            raw = output if output.requires_grad else output.detach().requires_grad_()
            taken[name] = Captured(raw, size, geometry_of(output), following.grids)
            # What follows may work in place, so it gets a copy and the activation stays as it was.
            return raw.clone()

        return hook

    following, handles = Following(rank), []
    try:
        for name in dict.fromkeys(layers):
            handles.append(question.model.layer(name).register_forward_hook(take(name)))
        with following:
            values = question.values(following.start(question.x.detach().view_as(question.x)))
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name in layers if name not in taken]
    if missing:
        raise MedXAIError(f"Layer '{missing[0]}' takes no part in the forward: choose one that does.")
    return values, taken


def suggest_layer(question: Question) -> str:
    """The layer whose class activation map says most: the last that still has a spatial layout.

    Every unit of it must be able to change the target (the last tokens of a transformer with a class token are not).
    For an image of labels, the last that is coarser than that image.
    """
    model = question.model
    if model.layers:
        return model.layers[0]
    key = (tuple(question.x.shape[1:]), tuple(t.layer for t in question.targets))
    if key not in model._suggested:
        model._suggested[key] = _find_layer(question)
    return model._suggested[key]


def _find_layer(question: Question) -> str:
    model = question.model
    if model.scripted:
        model.layer("")
    order: dict[str, None] = {}

    def finished(name: str) -> Hook:
        def hook(_module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
            order.pop(name, None)
            if not isinstance(output, Tensor) or len(output) != len(question.x):
                return
            # Of a transformer only what keeps the tokens' width, not the queries, keys and values inside a block.
            kept = bool(inputs) and isinstance(inputs[0], Tensor) and inputs[0].shape == output.shape
            if output.ndim == question.x.ndim or (output.ndim == 3 and kept):
                order[name] = None

        return hook

    handles = [m.register_forward_hook(finished(n)) for n, m in model.network.named_modules() if n]
    try:
        with torch.no_grad():
            # Anew: what is remembered of the samples went through no hook.
            question.values(question.x.view_as(question.x))
    finally:
        for handle in handles:
            handle.remove()
    candidates = list(order)
    values, taken = capture(question, candidates)
    finest = max((t.raw[0, 0].numel() for t in taken.values() if t.raw.ndim == question.x.ndim), default=0)
    found = None
    for name in reversed(candidates):
        grid = taken[name].grid(taken[name].raw)
        if grid is None or grid[0, 0].numel() < 2 or (model.task == "segmentation" and grid[0, 0].numel() >= finest):
            continue
        gradient = taken[name].grid(question.gradients(values[0], [taken[name].raw], keep=True)[0])
        if gradient is None or not bool((gradient != 0).any(1).flatten(1).float().mean() > _REACHED):
            continue
        found = found or name
        if not averages_out(gradient):
            return name
    if found is None:
        raise MedXAIError(
            f"{model.name} has no layer with a spatial layout before its decision: use gradient or "
            "integrated_gradients."
        )
    return found


def averages_out(gradient: Tensor) -> bool:
    """Whether a gradient (N, K, *grid) sums to nothing over space, as it must where a normalisation follows."""
    flat = gradient.flatten(2)
    return bool((flat.mean(2).abs().amax(1) <= 1e-4 * flat.abs().mean(2).amax(1)).any())
