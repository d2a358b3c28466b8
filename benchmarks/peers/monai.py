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


class Occlusion(Peer):
    """OcclusionSensitivity with windows of zeros side by side, and scores as they are: its own sigmoid or softmax goes
    by the channels of the scan, not by the classes, and zero must be a float. It says what is left of the score, so one
    forward more tells what is lost."""

    def __init__(
        self, network: nn.Module, layer: str, classes: Sequence[int], window: int, stride: int, **setting: Any
    ) -> None:
        super().__init__(network, layer, classes)
        self.explainer = monai.visualize.OcclusionSensitivity(
            network, window, mode=0.0, overlap=1 - stride / window, activate=False, verbose=False, **setting
        )

    def __call__(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            score = self.network(x)[0, self.classes[0]]
        return score - self.explainer(x)[0][:, self.classes]
