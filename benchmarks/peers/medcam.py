"""M3d-CAM (the package medcam)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from medcam import medcam
from torch import Tensor, nn

from benchmarks.peers import Peer
from benchmarks.peers.monai import stretched


class GradCAM(Peer):
    """inject(backend="gcam"). It rescales every map to 0 … 1."""

    def __init__(self, network: nn.Module, layer: str, classes: Sequence[int], find_layer: bool = False) -> None:
        super().__init__(network, layer, classes)
        self.injected = medcam.inject(
            network, backend="gcam", layer="auto" if find_layer else layer, label=self.classes[0], return_attention=True
        )

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([self.injected(x, label=c)[1] for c in self.classes])

    def expected(self, right: Tensor, size: Sequence[int]) -> Tensor:
        low, high = right.amin((1, 2, 3, 4), keepdim=True), right.amax((1, 2, 3, 4), keepdim=True)
        return stretched((right - low) / (high - low), size)


class GuidedBackprop(Peer):
    """inject(backend="gbp"). It rescales every map to 0 … 1."""

    def __init__(self, network: nn.Module, layer: str, classes: Sequence[int]) -> None:
        super().__init__(network, layer, classes)
        self.injected = medcam.inject(network, backend="gbp", label=classes[0], return_attention=True)

    def __call__(self, x: Tensor) -> Tensor:
        return self.injected(x.clone())[1][:, :1]

    def expected(self, right: Tensor, size: Sequence[int]) -> Tensor:
        return (right - right.min()) / (right.max() - right.min())
