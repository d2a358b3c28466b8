"""MedXAI itself, through the same door as its peers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import MedXAILib as mx
from benchmarks.cases import background, windows
from benchmarks.peers import Peer
from MedXAILib import registry
from MedXAILib.engines.capture import Captured
from MedXAILib.engines.masks import Masks, Stream
from MedXAILib.engines.screening import strongest
from MedXAILib.explainer import Question
from MedXAILib.infills.fixed import Fixed


class Explain(Peer):
    """`mx.explain`, with everything that comes with it: checks, fingerprints, provenance, cost."""

    method: str

    def __init__(self, network: nn.Module, layer: str, classes: Sequence[int], **parameters: Any) -> None:
        super().__init__(network, layer, classes)
        self.model, self.parameters = mx.Model(network), parameters

    def __call__(self, x: Tensor) -> Tensor:
        maps = mx.explain(self.model, x, self.method, target=self.classes, **self.parameters)
        return torch.cat([m.data for m in maps])

    def question(self, x: Tensor) -> Question:
        """What an engine is asked, without what `mx.explain` does around it."""
        seen = [self.model.prepare(mx.Volume(x[0], torch.eye(4).numpy()))]
        return Question(self.model, x, seen, [mx.ClassTarget(c) for c in self.classes])


class Gradient(Explain):
    method = "gradient"


class IntegratedGradients(Explain):
    method = "integrated_gradients"


class GradCAM(Explain):
    method = "gradcam"

    def __init__(self, network: nn.Module, layer: str, classes: Sequence[int], find_layer: bool = False) -> None:
        super().__init__(network, layer, classes, layers=() if find_layer else (layer,))

    def at_layer(self, x: Tensor) -> Tensor:
        """The maps at the layer's own resolution, before they are brought to where its units look."""
        with self.model.ready(), patch.object(Captured, "place", lambda _self, maps: maps):
            found = registry.make(self.method, {"layers": (self.layer,)}).attribute(self.question(x))
        return torch.cat([attribution.values.detach() for attribution in found])


class LRP(Explain):
    method = "lrp"


class GuidedBackprop(Explain):
    method = "guided_backprop"


class DeconvNet(Explain):
    method = "deconvnet"


class AttentionRelevance(Explain):
    method = "attention_relevance"


class DeepLift(Explain):
    method = "deeplift"


class Against(Explain):
    """A method that compares the scan with `count` others."""

    def __init__(self, network: nn.Module, layer: str, classes: Sequence[int], count: int, **parameters: Any) -> None:
        super().__init__(network, layer, classes, **parameters)
        self.count = count

    def __call__(self, x: Tensor) -> Tensor:
        scans = [mx.Volume(scan, torch.eye(4).numpy()) for scan in background(x, self.count)]
        maps = mx.explain(self.model, x, self.method, target=self.classes, background=scans, **self.parameters)
        return torch.cat([m.data for m in maps])


class DeepSHAP(Against):
    method = "deep_shap"


class GradientSHAP(Against):
    method = "gradient_shap"


class Occlusion(Explain):
    """Windows filled with zero; `window` and `stride` in voxels, which are mm here."""

    method = "occlusion"

    def __init__(
        self, network: nn.Module, layer: str, classes: Sequence[int], window: int, stride: int, **parameters: Any
    ) -> None:
        size = {"window": (window,), "stride": (stride,)}
        super().__init__(network, layer, classes, infill="zero", **size, **parameters)


class Strongest(Explain):
    """The losses of all windows of which `occlusion` asks exactly for the `top` strongest, and zero of the others."""

    def __init__(
        self, network: nn.Module, layer: str, classes: Sequence[int], window: int, stride: int, top: int
    ) -> None:
        super().__init__(network, layer, classes)
        self.window, self.stride, self.top = window, stride, top

    def __call__(self, x: Tensor) -> Tensor:
        low, box = torch.tensor(windows(x, self.window, self.stride)), (self.window,) * 3
        with self.model.ready():
            (question,) = self.question(x).alone()
            stream = Stream(len(low), box, lambda start, stop: Masks.boxes(low[start:stop], box, x))
            zero = Fixed(question, torch.zeros_like(x))
            found = strongest(question, stream, zero, self.top, lambda *_: None, "occlusion")
        assert found is not None
        return (found.lost[:, 0] * found.asked).to(x)[None, None]


class _Cubes(Explain):
    """A method whose supervoxels are cubes of `size` voxels, filled with zero; seed `seed`."""

    def __init__(
        self, network: nn.Module, layer: str, classes: Sequence[int], size: int, seed: int = 0, **parameters: Any
    ) -> None:
        cubes = {"supervoxels": "grid", "size_mm": size, "infill": "zero"}
        super().__init__(network, layer, classes, **cubes, **parameters)
        self.seed = seed

    def __call__(self, x: Tensor) -> Tensor:
        run = mx.Run(seed=self.seed)
        maps = mx.explain(self.model, x, self.method, target=self.classes, run=run, **self.parameters)
        return torch.cat([m.data for m in maps])


class Shapley(_Cubes):
    """Shapley values by `estimator`."""

    def __init__(
        self, network: nn.Module, layer: str, classes: Sequence[int], size: int, estimator: str, **parameters: Any
    ) -> None:
        super().__init__(network, layer, classes, size, **parameters)
        self.method = estimator


class LIME(_Cubes):
    method = "lime"
