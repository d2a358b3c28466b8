"""LXT. It knows some transformers by name and MONAI's ViT is not one of them, so its parts are put into that by hand.

Only those parts are imported: the list of transformers it knows needs packages that nothing here uses.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import MethodType, ModuleType

import torch
from monai.networks.blocks.selfattention import SABlock
from torch import Tensor, nn

from benchmarks.peers import Peer
from benchmarks.peers.grad_cam import import_torchvision

import_torchvision()
_known = ModuleType("lxt.efficient.models")
_known.get_default_map = None  # type: ignore[attr-defined]
sys.modules.setdefault(_known.__name__, _known)

from lxt.efficient.patches import layer_norm_forward, non_linear_forward, patch_method  # noqa: E402
from lxt.efficient.rules import divide_gradient  # noqa: E402


class AttentionRelevance(Peer):
    """AttnLRP: gradient times input of a network whose gradients are the rules."""

    def __init__(self, network: nn.Module, layer: str, classes: Sequence[int]) -> None:
        super().__init__(network.requires_grad_(False), layer, classes)
        for module in list(network.modules()):
            if isinstance(module, nn.GELU):
                patch_method(MethodType(non_linear_forward, module), module, keep_original=True)
            elif isinstance(module, nn.LayerNorm):
                patch_method(MethodType(layer_norm_forward, module), module)
            elif isinstance(module, SABlock):
                module.input_rearrange = nn.Sequential(module.input_rearrange, _Shares())

    def __call__(self, x: Tensor) -> Tensor:
        leaf = x.detach().clone().requires_grad_()
        return leaf.detach() * torch.autograd.grad(self.network(leaf)[0, self.classes[0]], leaf)[0]


class _Shares(nn.Module):
    """What queries, keys and values get of the relevance of the two products they are in."""

    def forward(self, qkv: Tensor) -> Tensor:
        return torch.stack([divide_gradient(part, by) for part, by in zip(qkv, (4, 4, 2), strict=True)])
