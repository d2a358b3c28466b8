"""pytorch-grad-cam (the package grad-cam)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.peers import Peer


def import_torchvision() -> None:
    """Import torchvision, which pytorch-grad-cam imports, even beside a PyTorch it was not built for.

    Its Python part asks for two operators of its compiled part. Nothing here calls them, so it is told that they exist.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


class GradCAM(Peer):
    """GradCAM. It rescales every map to 0 … 1 and enlarges it with a cubic spline."""

    def __init__(self, network: nn.Module, layer: str, classes: Sequence[int]) -> None:
        super().__init__(network, layer, classes)
        import_torchvision()
        import pytorch_grad_cam
        from pytorch_grad_cam.utils.image import scale_cam_image
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        self.explainer = pytorch_grad_cam.GradCAM(network, [network.get_submodule(layer)])
        self.target, self.scale = ClassifierOutputTarget, scale_cam_image

    def __call__(self, x: Tensor) -> Tensor:
        maps = [self.explainer(x, [self.target(c)]) for c in self.classes]
        return torch.from_numpy(np.stack(maps))

    def expected(self, right: Tensor, size: Sequence[int]) -> Tensor:
        maps = self.scale(right[:, 0].numpy(), tuple(size)[::-1])
        return torch.from_numpy(self.scale(np.maximum(maps, 0)))[:, None]
