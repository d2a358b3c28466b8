"""torchcam."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torchcam.methods
from torch import Tensor, nn

from benchmarks.peers import Peer


class GradCAM(Peer):
    """GradCAM, all classes from one forward. It leaves the map at the layer's resolution."""

    def __init__(self, network: nn.Module, layer: str, classes: Sequence[int]) -> None:
        super().__init__(network, layer, classes)
        self.explainer = torchcam.methods.GradCAM(network, layer)

    def __call__(self, x: Tensor) -> Tensor:
        scores = self.network(x)
        keep = len(self.classes) > 1
        maps = [self.explainer(c, scores, normalized=False, retain_graph=keep)[0] for c in self.classes]
        return torch.stack(maps)
