"""How alike the maps of networks are that have nothing in common but how they are built, as they become wider.

Nie, Zhang, Patel, "A theoretical explanation for perplexing behaviors of backpropagation-based visualizations", 2018.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

import MedXAILib as mx
from benchmarks.sanity import patches, rows
from benchmarks.sanity.patches import STAGES, Patches
from MedXAILib.networks.lung_nodule import LungNoduleClassifier
from MedXAILib.trust.likeness import Looks, between, likeness
from MedXAILib.trust.randomisation import with_statistics

METHODS = ("gradient", "deconvnet", "guided_backprop")
WIDTHS = (16, 64, 192)
"""Filters in the first layer; the demo network has 16, of 4 x 4 x 4 voxels."""
NETWORKS, PATCHES = 3, 4
DESCRIBED = {"widths": list(WIDTHS), "networks": NETWORKS, "patches": PATCHES}
"""What the result begins with. A result that begins otherwise is out of date."""


def measured() -> dict[str, Any]:
    """For each width and method the likeness of two maps, and that of a map and the scan."""
    some = patches.synthetic(patches.demo_model())[:PATCHES]
    return {"found": list(_each(some))}


def _each(some: Patches) -> Iterator[dict[str, Any]]:
    scan = Looks.of(some.images)
    for width in WIDTHS:
        models = [_untrained(width, seed, some) for seed in range(NETWORKS)]
        for method in METHODS:
            looks = [Looks.of(rows.asked(method, {})(model, some.images, some.labels)) for model in models]
            like_scan = sum(likeness(look, scan)["correlation"] for look in looks) / len(looks)
            yield {"width": width, "method": method, "scan": like_scan, **between(looks)}


def _untrained(width: int, seed: int, some: Patches) -> mx.Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = LungNoduleClassifier(width=width).eval()
    return mx.Model(with_statistics(network, STAGES, some.images))
