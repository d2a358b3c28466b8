"""MedXAI itself, through the same door as its peers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import MedXAILib as mx
from benchmarks.cases import background
from benchmarks.peers import Peer
from MedXAILib import registry
from MedXAILib.engines.capture import Captured
from MedXAILib.explainer import Question


class Explain(Peer):
    """`mx.explain`, with everything that comes with it: checks, fingerprints, provenance, cost."""

    method: str

    def __init__(self, network: nn.Module, layer: str, classes: Sequence[int], **parameters: Any) -> None:
        super().__init__(network, layer, classes)
        self.model, self.parameters = mx.Model(network), parameters

    def __call__(self, x: Tensor) -> Tensor:
        maps = mx.explain(self.model, x, self.method, target=self.classes, **self.parameters)
        return torch.cat([m.data for m in maps])


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
            seen = [self.model.prepare(mx.Volume(x[0], torch.eye(4).numpy()))]
            question = Question(self.model, x, seen, [mx.ClassTarget(c) for c in self.classes])
            found = registry.make(self.method, {"layers": (self.layer,)}).attribute(question)
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
