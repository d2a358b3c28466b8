"""zennit, at PyTorch's modules.

The composites are registered once, as a person with many scans would.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from monai.networks.nets.resnet import ResNetBlock
from torch import Tensor, nn

from benchmarks.peers import Peer
from benchmarks.peers.grad_cam import import_torchvision

import_torchvision()

from zennit import canonizers, composites, core, layer, rules, torchvision, types  # noqa: E402


class _Composite(Peer):
    """One forward and one backward under a composite.

    `rewritten` by "zennit" is with its own canonizer of ResNets, which knows no block of MONAI's. "by hand" is with the
    parts below: additions that it can see, batch norms merged into the convolutions that they follow, and the epsilon
    rule for the other batch norms.
    """

    def __init__(self, network: nn.Module, layer: str, classes: Sequence[int], name: str, rewritten: str = "") -> None:
        super().__init__(network, layer, classes)
        made = _epsilon() if name == "epsilon" else composites.COMPOSITES[name]()
        if rewritten == "zennit":
            made.canonizers = [torchvision.ResNetCanonizer()]
        elif rewritten == "by hand":
            made.canonizers = [_Merged(), _Additions()]
            made.layer_map = [(types.BatchNorm, rules.Epsilon(1e-6)), *made.layer_map]
        made.register(network)
        network.requires_grad_(False)

    def start(self, score: Tensor) -> Tensor:
        """What goes backward from the score of a class."""
        return torch.ones_like(score)

    def __call__(self, x: Tensor) -> Tensor:
        leaf = x.detach().clone().requires_grad_()
        score = self.network(leaf)[0, self.classes[0]]
        return torch.autograd.grad(score, leaf, self.start(score))[0]


class LRP(_Composite):
    """Relevance: a composite of LRP, from the score itself."""

    def start(self, score: Tensor) -> Tensor:
        return score.detach()


class GuidedBackprop(_Composite):
    def __init__(self, network: nn.Module, layer: str, classes: Sequence[int]) -> None:
        super().__init__(network, layer, classes, "guided_backprop")


class DeconvNet(_Composite):
    def __init__(self, network: nn.Module, layer: str, classes: Sequence[int]) -> None:
        super().__init__(network, layer, classes, "deconvnet")


def _epsilon() -> Any:
    """The epsilon rule everywhere, for which zennit has parts and no name."""
    return composites.LayerMapComposite([(types.Linear, rules.Epsilon(1e-6)), *composites.layer_map_base()])


class _Merged(canonizers.SequentialMergeBatchNorm):
    """Batch norms merged where they follow a convolution. zennit takes the next module for the next step, and fails
    where a concatenation lies between, as in a DenseNet."""

    def apply(self, root_module: nn.Module) -> list[Any]:
        made = []
        for before, norm in pairwise(core.collect_leaves(root_module)):
            both = isinstance(before, nn.Conv3d) and isinstance(norm, nn.BatchNorm3d)
            if both and before.out_channels == norm.num_features:
                made.append(self.copy())
                made[-1].register((before,), norm)
        return made


class _Additions(canonizers.AttributeCanonizer):
    """The additions of MONAI's ResNet blocks as a module, which is the only way for zennit to see them."""

    def __init__(self) -> None:
        super().__init__(self._attributes)

    @classmethod
    def _attributes(cls, _name: str, module: nn.Module) -> dict[str, Any] | None:
        if not isinstance(module, ResNetBlock):
            return None
        return {"forward": _forward.__get__(module), "canonizer_sum": layer.Sum()}


def _forward(block: Any, x: Tensor) -> Tensor:
    out = block.bn2(block.conv2(block.act(block.bn1(block.conv1(x)))))
    skip = x if block.downsample is None else block.downsample(x)
    return block.act(block.canonizer_sum(torch.stack([out, skip], -1)))
