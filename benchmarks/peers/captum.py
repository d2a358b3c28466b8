"""captum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import captum.attr
import torch
from captum._utils.models.linear_model import SkLearnLinearRegression
from torch import Tensor, nn

from benchmarks.cases import background, cubes
from benchmarks.peers import Peer
from benchmarks.peers.monai import stretched


class GradCAM(Peer):
    """LayerGradCam, and LayerAttribution.interpolate to the size of the scan."""

    def __call__(self, x: Tensor) -> Tensor:
        explainer = captum.attr.LayerGradCam(self.network, self.network.get_submodule(self.layer))
        maps = [explainer.attribute(x, target=c, relu_attributions=True) for c in self.classes]
        return torch.cat([captum.attr.LayerAttribution.interpolate(m, x.shape[2:], "trilinear") for m in maps]).detach()

    def expected(self, right: Tensor, size: Sequence[int]) -> Tensor:
        return stretched(right, size)


class Gradient(Peer):
    """Saliency, signed."""

    def __call__(self, x: Tensor) -> Tensor:
        return captum.attr.Saliency(self.network).attribute(x.clone(), target=self.classes[0], abs=False)


class IntegratedGradients(Peer):
    """IntegratedGradients from a baseline of zero; `setting` as captum calls it."""

    def __init__(self, network: nn.Module, layer: str, classes: Sequence[int], **setting: Any) -> None:
        super().__init__(network, layer, classes)
        self.setting = setting

    def __call__(self, x: Tensor) -> Tensor:
        explainer = captum.attr.IntegratedGradients(self.network)
        return explainer.attribute(x, target=self.classes[0], **self.setting).float().detach()


class LRP(Peer):
    """LRP, with epsilon everywhere, its default."""

    def __call__(self, x: Tensor) -> Tensor:
        return captum.attr.LRP(self.network).attribute(x.clone(), target=self.classes[0]).detach()


class GuidedBackprop(Peer):
    def __call__(self, x: Tensor) -> Tensor:
        return captum.attr.GuidedBackprop(self.network).attribute(x.clone(), target=self.classes[0])


class DeconvNet(Peer):
    def __call__(self, x: Tensor) -> Tensor:
        return captum.attr.Deconvolution(self.network).attribute(x.clone(), target=self.classes[0])


class DeepLift(Peer):
    """DeepLift from a baseline of zero."""

    def __call__(self, x: Tensor) -> Tensor:
        return captum.attr.DeepLift(self.network).attribute(x.clone(), target=self.classes[0]).detach()


class DeepSHAP(Peer):
    """DeepLiftShap, all baselines in one batch: it has no other way."""

    def __init__(self, network: nn.Module, layer: str, classes: Sequence[int], count: int) -> None:
        super().__init__(network, layer, classes)
        self.count = count

    def __call__(self, x: Tensor) -> Tensor:
        explainer = captum.attr.DeepLiftShap(self.network)
        return explainer.attribute(x.clone(), background(x, self.count), target=self.classes[0]).detach()


class GradientSHAP(Peer):
    """GradientShap without noise, all `samples` in one batch: it has no other way. The mean over some `calls`."""

    def __init__(
        self, network: nn.Module, layer: str, classes: Sequence[int], count: int, samples: int, calls: int = 1
    ) -> None:
        super().__init__(network, layer, classes)
        self.count, self.samples, self.calls = count, samples, calls

    def __call__(self, x: Tensor) -> Tensor:
        explainer, total = captum.attr.GradientShap(self.network), torch.zeros_like(x)
        for _ in range(self.calls):
            among = background(x, self.count)
            total += explainer.attribute(x.clone(), among, n_samples=self.samples, target=self.classes[0]).detach()
        return total / self.calls


class Occlusion(Peer):
    """Occlusion with zero; `setting` as captum calls it."""

    def __init__(
        self, network: nn.Module, layer: str, classes: Sequence[int], window: int, stride: int, **setting: Any
    ) -> None:
        super().__init__(network, layer, classes)
        self.setting = {"sliding_window_shapes": (1, *[window] * 3), "strides": (1, *[stride] * 3), **setting}

    def __call__(self, x: Tensor) -> Tensor:
        return captum.attr.Occlusion(self.network).attribute(x, target=self.classes[0], **self.setting)


class Shapley(Peer):
    """Shapley values of cubes of `size` voxels by `estimator`, from a baseline of zero; the same draws each time."""

    def __init__(
        self, network: nn.Module, layer: str, classes: Sequence[int], size: int, estimator: str, **setting: Any
    ) -> None:
        super().__init__(network, layer, classes)
        self.explainer, self.size, self.setting = getattr(captum.attr, estimator)(network), size, setting

    def __call__(self, x: Tensor) -> Tensor:
        torch.manual_seed(0)
        found = self.explainer.attribute(x, target=self.classes[0], feature_mask=cubes(x, self.size), **self.setting)
        return found.detach()


class LIME(Shapley):
    """Lime as it comes, or with the `same_fit` as MedXAI: least squares, and weights by how many cubes are kept."""

    def __init__(
        self, network: nn.Module, layer: str, classes: Sequence[int], size: int, same_fit: bool = False, **setting: Any
    ) -> None:
        super().__init__(network, layer, classes, size, "Lime", **setting)
        if same_fit:
            self.explainer = captum.attr.Lime(network, SkLearnLinearRegression(), _likeness)


def _likeness(_scan: Tensor, _changed: Tensor, kept: Tensor, **_: Any) -> Tensor:
    return torch.exp(-0.5 * ((1 - kept.float().mean().sqrt()) / 0.25).square())
