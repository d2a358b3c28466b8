"""shap. It explains every class, so it is given a network of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import shap
import torch
from torch import Tensor, nn

from benchmarks.cases import background, cubes
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


class Shapley(Peer):
    """PermutationExplainer or KernelExplainer over which cubes of `size` voxels are kept, the others being zero: 16
    scans at a time, the same draws each time. `setting` as shap calls it."""

    def __init__(
        self, network: nn.Module, layer: str, classes: Sequence[int], size: int, estimator: str, **setting: Any
    ) -> None:
        super().__init__(network, layer, classes)
        self.size, self.estimator, self.setting = size, estimator, setting

    def __call__(self, x: Tensor) -> Tensor:
        labels = cubes(x, self.size)[0, 0]
        count = int(labels.max()) + 1
        none, every = np.zeros((1, count)), np.ones((1, count))

        def scores(kept: np.ndarray) -> np.ndarray:
            found = []
            with torch.inference_mode():
                for some in torch.from_numpy(np.asarray(kept)).float().split(16):
                    found.append(self.network(x * some[:, labels][:, None])[:, self.classes[0]])
            return torch.cat(found).numpy()

        # shap draws from this one.
        np.random.seed(0)  # noqa: NPY002
        if self.estimator == "kernel":
            values = shap.KernelExplainer(scores, none).shap_values(every, silent=True, **self.setting)
        else:
            explainer = shap.PermutationExplainer(scores, shap.maskers.Independent(none), seed=0)
            values = explainer(every, silent=True, **self.setting).values
        return torch.from_numpy(values[0]).float()[labels][None, None]
