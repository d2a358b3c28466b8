"""The rows of the table: every method in the settings worth telling apart, and what they are compared with."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import MedXAILib as mx
from benchmarks.sanity import patches
from MedXAILib.visual.perturbing import Perturbing

LUNG = "five patches of lung without a nodule"
"""Stands for them among the parameters."""

SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "gradient": {"": {}, "absolute": {"form": "absolute"}, "times input": {"form": "times_input"}},
    # The quick settings of the slow ones.
    "smoothgrad": {"8 copies": {"samples": 8}},
    "vargrad": {"8 copies": {"samples": 8}},
    "integrated_gradients": {"15 steps": {"steps": 15, "max_steps": 15}},
    "scorecam": {"16 clusters": {"clusters": 16}},
    "hirescam": {"": {}, "signed": {"positive": False}},
    "lrp": {
        "epsilon": {"composite": "epsilon"},
        "gamma": {"composite": "gamma"},
        "z+": {"composite": "alpha_beta"},
        "alpha-beta, beta 1": {"composite": "alpha_beta", "beta": 1.0},
        "epsilon-plus": {"composite": "epsilon_plus"},
        "epsilon-plus-flat": {"composite": "epsilon_plus_flat"},
    },
    "deep_shap": {LUNG: {"background": LUNG}},
    # These ask the network about a hundred scans for each map.
    "occlusion": {"windows of 10 mm": {"window": [10.0]}},
    "supervoxel_ablation": {"10 mm": {"size_mm": 10.0}},
    "lime": {"12.5 mm, 128 samples": {"size_mm": 12.5, "samples": 128}},
    "kernel_shap": {"12.5 mm, 128 samples": {"size_mm": 12.5, "samples": 128}},
    "permutation_shap": {"12.5 mm, one order": {"size_mm": 12.5, "permutations": 1}},
    "rise": {"128 masks": {"samples": 128, "tolerance": 0.0}},
    "prediction_difference": {"windows of 12.5 mm, one draw": {"window": [12.5], "samples": 1}},
    "meaningful_perturbation": {"8 steps": {"steps": 8}},
    "gradient_shap": {f"20 points, {LUNG}": {"background": LUNG, "samples": 20}},
}
"""For a method its settings by name; a method that is not here has one row, with its defaults."""

OF_ONE_REGION = frozenset({"counterfactual_infill"})
"""These answer about the region that they are asked about: where their maps are says nothing of the network."""

Maps = Callable[[mx.Model, Tensor, Tensor], Tensor]
"""From a model, patches (N, C, *spatial) and the classes (N,) to maps (N, *spatial)."""


@dataclass(frozen=True)
class Row:
    """A way to make maps: `method` with `parameters`, or a reference that knows nothing of the network."""

    name: str
    maps: Maps
    method: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def slow(self) -> bool:
        """Whether it asks the network about many scans for each map."""
        return bool(self.method) and issubclass(mx.methods()[self.method], Perturbing)

    @property
    def slug(self) -> str:
        """Its name as that of a file."""
        return re.sub(r"[^a-z0-9+]+", "-", self.name.lower()).strip("-")

    @property
    def described(self) -> dict[str, Any]:
        """What its result begins with. A result that begins otherwise is out of date."""
        return {"name": self.name, "method": self.method, "parameters": dict(self.parameters)}


def every() -> Iterator[Row]:
    """The references, then every method there is, but those of one region."""
    yield from REFERENCES
    for method, kind in mx.methods("SaliencyMap").items():
        if method in OF_ONE_REGION:
            continue
        for setting, parameters in SETTINGS.get(method, {"": {}}).items():
            name = f"{kind.title}, {setting}" if setting else kind.title
            yield Row(name, asked(method, parameters), method, parameters)


def asked(method: str, parameters: Mapping[str, Any]) -> Maps:
    """The maps of a method, for the classes it is asked about."""

    def maps(model: mx.Model, x: Tensor, labels: Tensor) -> Tensor:
        return mx.explain(model, x, method, mx.ClassTarget(tuple(labels.tolist())), **meant(parameters)).data.sum(1)

    return maps


def meant(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters with the patches that `LUNG` stands for."""
    return {key: patches.lung() if value == LUNG else value for key, value in parameters.items()}


def _centre(model: mx.Model, x: Tensor, labels: Tensor) -> Tensor:
    away = [torch.arange(size) - (size - 1) / 2 for size in x.shape[2:]]
    squares = torch.stack(torch.meshgrid(*away, indexing="ij")).square().sum(0)
    return torch.exp(-squares / (2 * 8**2)).expand(len(x), *x.shape[2:])


def _brightness(model: mx.Model, x: Tensor, labels: Tensor) -> Tensor:
    return x.sum(1)


def _edges(model: mx.Model, x: Tensor, labels: Tensor) -> Tensor:
    return torch.stack(torch.gradient(x.sum(1), dim=tuple(range(1, x.ndim - 1)))).norm(dim=0)


EDGES = Row("Edge detector", _edges)
"""How steep the scan is. It cannot know the weights, so it must fail when they are re-drawn."""
REFERENCES = (Row("Centre of the patch", _centre), Row("Brightness of the scan", _brightness), EDGES)
