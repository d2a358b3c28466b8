"""The limit: what plain automatic differentiation costs when nothing but the map is asked for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.peers import Peer


class Gradient(Peer):
    """One forward, one backward to the input, parameters frozen."""

    def __init__(self, network: nn.Module, layer: str, classes: Sequence[int]) -> None:
        super().__init__(network.requires_grad_(False), layer, classes)

    def __call__(self, x: Tensor) -> Tensor:
        leaf = x.detach().clone().requires_grad_()
        return torch.autograd.grad(self.network(leaf)[0, self.classes[0]], leaf)[0]


class LRP(Gradient):
    """Gradient times input."""

    def __call__(self, x: Tensor) -> Tensor:
        return x * super().__call__(x)
