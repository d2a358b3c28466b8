"""MONAI's visualize."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import monai.visualize
import torch
from monai.visualize.class_activation_maps import default_normalizer
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.peers import Peer


def stretched(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps (M, 1, *grid) stretched to the corners of `size`, as most packages do."""
    return functional.interpolate(maps, tuple(size), mode="trilinear", align_corners=False)


class GradCAM(Peer):
    """GradCAM with its own normaliser, which turns the map upside down, or without any."""

    def __init__(self, network: nn.Module, layer: str, classes: Sequence[int], normalise: bool = True) -> None:
        super().__init__(network, layer, classes)
        self.finish: Callable[[Any], Any] = default_normalizer if normalise else lambda maps: maps
        self.explainer = monai.visualize.GradCAM(network, layer, postprocessing=self.finish)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([self.explainer(x, class_idx=c).detach() for c in self.classes])

    def expected(self, right: Tensor, size: Sequence[int]) -> Tensor:
        return self.finish(stretched(right, size))


class Gradient(Peer):
    """VanillaGrad. It adds to the gradient of a scan it has seen before, so it gets a copy each time."""

    def __init__(self, network: nn.Module, layer: str, classes: Sequence[int], freeze: bool = False) -> None:
        super().__init__(network.requires_grad_(not freeze), layer, classes)
        self.explainer = monai.visualize.VanillaGrad(network)

    def __call__(self, x: Tensor) -> Tensor:
        return self.explainer(x.clone(), index=self.classes[0])


class GuidedBackprop(Peer):
    """GuidedBackpropGrad, which also gets a copy each time."""

    def __init__(self, network: nn.Module, layer: str, classes: Sequence[int]) -> None:
        super().__init__(network, layer, classes)
        self.explainer = monai.visualize.GuidedBackpropGrad(network)

    def __call__(self, x: Tensor) -> Tensor:
        return self.explainer(x.clone(), index=self.classes[0])
