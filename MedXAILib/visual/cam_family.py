"""What class activation maps have in common: activations of a layer, weighted by what they mean for the target."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from MedXAILib.engines.capture import Captured, averages_out, capture, suggest_layer
from MedXAILib.errors import MedXAIError
from MedXAILib.explainer import Attribution, Explainer, Names, Question

Fuse = Literal["mean", "max", "product"]


class LayerMap(Explainer):
    """A map made at one or several layers and brought to where their units look in the scan."""

    layered: ClassVar[bool] = True
    stitching: ClassVar[Literal["sum", "blend"] | None] = "blend"

    layers: Names = Field(
        (), description="layers to read, by their names in the network; the last with a spatial layout when left out"
    )
    fuse: Fuse = Field(
        "mean", description="how the maps of several layers, each scaled to a largest value of 1, become one"
    )
    positive: bool = Field(True, description="keep only what speaks for the target (ReLU)")

    @property
    def signed(self) -> bool:
        return not self.positive

    def attribute(self, question: Question) -> list[Attribution]:
        layers = self.layers or (suggest_layer(question),)
        return [Attribution(fused(maps, self.fuse)) for maps in self.maps(question, layers)]

    @abstractmethod
    def maps(self, question: Question, layers: tuple[str, ...]) -> list[list[Tensor]]:
        """For each target, the map (N, 1, *spatial) of each of `layers` on the network's input grid."""

    def placed(self, captured: Captured, layer_map: Tensor) -> Tensor:
        """A layer's map (N, 1, *grid) on the input grid."""
        return captured.place(layer_map.relu() if self.positive else layer_map)


class GradientCAM(LayerMap):
    """A layer map made from activations and the target's gradient there."""

    averaging: ClassVar[bool] = False
    """Whether it weighs a channel by its mean gradient."""

    def maps(self, question: Question, layers: tuple[str, ...]) -> list[list[Tensor]]:
        values, taken = capture(question, layers)
        raws = [taken[name].raw for name in layers]
        found = []
        for value in values:
            gradients = question.gradients(value, raws, keep=value is not values[-1])
            found.append([self._map(question, n, taken[n], g) for n, g in zip(layers, gradients, strict=True)])
        return found

    @abstractmethod
    def weighted(self, activation: Tensor, gradient: Tensor) -> Tensor:
        """From the activation and the gradient, both (N, K, *grid), to the map (N, 1, *grid)."""

    def _map(self, question: Question, name: str, captured: Captured, gradient: Tensor) -> Tensor:
        activations = spatial(name, captured)
        gradient = captured.grid(gradient)  # type: ignore[assignment]
        if self.averaging and averages_out(gradient):
            question.run.note(
                f"The gradient at layer '{name}' averages to nothing because a normalisation follows it directly, so "
                "this map is rounding noise: use hirescam, or another layer."
            )
        return self.placed(captured, self.weighted(activations, gradient))


def fused(maps: list[Tensor], how: Fuse) -> Tensor:
    """Several maps (N, 1, *spatial), each scaled to a largest value of 1, as one; a single one is left as it is."""
    if len(maps) == 1:
        return maps[0]
    scaled = torch.stack(
        [m / m.abs().flatten(1).amax(1).clamp_min(1e-12).reshape(-1, *[1] * (m.ndim - 1)) for m in maps]
    )
    if how == "product":
        return scaled.prod(0)
    return scaled.amax(0) if how == "max" else scaled.mean(0)


def spatial(name: str, captured: Captured) -> Tensor:
    """The activations of a layer as (N, K, *grid).

    Raises:
        MedXAIError: when it has no spatial layout.
    """
    grid = captured.grid(captured.raw.detach())
    if grid is None or grid[0, 0].numel() < 2:
        raise MedXAIError(
            f"Layer '{name}' has no spatial layout (its output is {tuple(captured.raw.shape)}): choose an earlier one, "
            "or leave the layer out."
        )
    return grid


def space(tensor: Tensor) -> tuple[int, ...]:
    """The spatial dimensions of (N, K, *grid)."""
    return tuple(range(2, tensor.ndim))
