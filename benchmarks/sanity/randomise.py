"""Networks that have forgotten what they learnt, layer by layer from the output back.

Adebayo et al., "Sanity checks for saliency maps", 2018.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

STAGES = ("class_head", "evidence", "shape.1", "shape.0", "texture", "stem")
"""The demo classifier's, from the output back. Its attribute head has no part in the classes."""


def cascade(network: nn.Module, stages: Sequence[str], x: Tensor, seed: int) -> Iterator[nn.Module]:
    """Copies of `network` of which the first one, two, … of `stages` have weights as before any training.

    Each stage has a seed of its own, made of `seed` and its place. Batch normalisation, which is nothing without
    statistics, takes those of `x` (N, C, *spatial), as the first step of a training would.
    """
    network = deepcopy(network).eval()
    for i, stage in enumerate(stages):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1000 * seed + i)
            for module in network.get_submodule(stage).modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
        yield with_statistics(network, stages[: i + 1], x)


def with_statistics(network: nn.Module, stages: Sequence[str], x: Tensor) -> nn.Module:
    """A copy of `network` in which the batch normalisations of `stages` have the statistics of `x`."""
    network = deepcopy(network)
    for stage in stages:
        for module in network.get_submodule(stage).modules():
            if isinstance(module, _BatchNorm):
                module.momentum = 1.0
                module.train()
    with torch.no_grad():
        network(x)
    return network.eval()
