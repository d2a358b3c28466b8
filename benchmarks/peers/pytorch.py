"""Plain PyTorch: the limit of what automatic differentiation costs, and the loops a person would write by hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from benchmarks.cases import windows
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


class SomeWindows(Peer):
    """The losses when windows are filled with zero, `batch` whole scans at a time; of `count` windows, or all."""

    def __init__(
        self,
        network: nn.Module,
        layer: str,
        classes: Sequence[int],
        window: int,
        stride: int,
        batch: int,
        count: int | None = None,
    ) -> None:
        super().__init__(network, layer, classes)
        self.window, self.stride, self.batch, self.count = window, stride, batch, count

    def places(self, x: Tensor) -> list[tuple[slice, ...]]:
        """The windows of one scan (1, D, H, W)."""
        found = windows(x, self.window, self.stride, self.count)
        return [(slice(None), *(slice(n, n + self.window) for n in low)) for low in found]

    def __call__(self, x: Tensor) -> Tensor:
        places, values = self.places(x), []
        with torch.inference_mode():
            for first in range(0, len(places), self.batch):
                some = places[first : first + self.batch]
                covered = x.repeat(len(some), 1, 1, 1, 1)
                for scan, place in zip(covered, some, strict=True):
                    scan[place] = 0
                values.append(self.network(covered)[:, self.classes[0]])
            return (self.network(x)[0, self.classes[0]] - torch.cat(values))[None, None]


class Strongest(SomeWindows):
    """The same, as the truth of which windows are strongest."""


class Occlusion(SomeWindows):
    """The map: a voxel has the mean of its windows' losses."""

    def __call__(self, x: Tensor) -> Tensor:
        total, often = torch.zeros_like(x), torch.zeros_like(x)
        for place, loss in zip(self.places(x), super().__call__(x).flatten(), strict=True):
            total[0][place] += loss
            often[0][place] += 1
        return total / often
