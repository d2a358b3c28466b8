"""shap. It explains every class, so it is given a network of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import shap
import torch
from torch import Tensor, nn

from benchmarks.cases import background
from benchmarks.peers import Peer


class _OneClass(nn.Module):
    def __init__(self, network: nn.Module, index: int) -> None:
        super().__init__()
        self.network, self.index = network, index

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)[:, [self.index]]


class DeepLift(Peer):
    """DeepExplainer with one baseline, zero. It refuses a map that does not add up to the score, unless told not to."""

    def __init__(self, network: nn.Module, layer: str, classes: Sequence[int], check: bool = True) -> None:
        super().__init__(_OneClass(network, classes[0]), layer, classes)
        self.check = check

    def baselines(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    def __call__(self, x: Tensor) -> Tensor:
        explainer = shap.DeepExplainer(self.network, self.baselines(x))
        return torch.from_numpy(explainer.shap_values(x.clone(), check_additivity=self.check)[..., 0])


class DeepSHAP(DeepLift):
    """DeepExplainer with some scans."""

    def __init__(self, network: nn.Module, layer: str, classes: Sequence[int], count: int, check: bool = True) -> None:
        super().__init__(network, layer, classes, check)
        self.count = count

    def baselines(self, x: Tensor) -> Tensor:
        return background(x, self.count)


class GradientSHAP(Peer):
    """GradientExplainer; `setting` as shap calls it."""

    def __init__(
        self, network: nn.Module, layer: str, classes: Sequence[int], count: int, samples: int, **setting: Any
    ) -> None:
        super().__init__(_OneClass(network, classes[0]), layer, classes)
        self.count, self.samples, self.setting = count, samples, setting

    def __call__(self, x: Tensor) -> Tensor:
        explainer = shap.GradientExplainer(self.network, background(x, self.count), **self.setting)
        return torch.from_numpy(explainer.shap_values(x.clone(), nsamples=self.samples)[..., 0]).float()
