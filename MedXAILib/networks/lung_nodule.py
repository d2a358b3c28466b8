"""A small classifier of lung patches, built so that its class evidence can be read off a 10 x 10 x 10 grid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LungNoduleClassifier(nn.Module):
    """Image (N, 1, D, H, W), at least 24 voxels a side -> class logits (N, classes).

    `stem` works at stride 2, `texture` ends at stride 4, where `shape` and `evidence` work. Both heads are one linear
    layer on the mean and the maximum of `evidence` over its grid, so a logit is a sum over units of that grid, which
    HiResCAM at `evidence` reads off exactly (Draelos and Carin 2021). The mean alone would make the older CAM exact
    too, but it learns far more slowly: a small nodule is 3 of 1000 units.
    `evidence` counts in proportion to the tissue in a unit's own cell of 4 voxels. Otherwise "small" is told as well
    from the air beside a nodule as from the nodule, and explanations show a ring around it.
    A kernel of 4 at stride 2 and pooling of 2 keep unit i centred at voxel 4 i + 1.5, so that flipping the image flips
    the grid.
    """

    def __init__(self, classes: int = 3, attributes: int = 7, width: int = 16) -> None:
        super().__init__()
        self.stem = block(1, width, kernel=4, stride=2)
        self.texture = nn.Sequential(block(width, width), nn.MaxPool3d(2))
        self.shape = nn.Sequential(block(width, 2 * width), block(2 * width, 3 * width))
        self.evidence = Evidence(3 * width, 4 * width)
        self.class_head = nn.Linear(8 * width, classes)
        self.attribute_head = AttributeHead(8 * width, attributes)

    def forward(self, image: Tensor) -> Tensor:
        features = self.features(image)
        # A bundle's network returns one tensor. The attributes are computed all the same, so that they can be read at
        # the layer `attribute_head` like any other activation.
        self.attribute_head(features)
        return self.class_head(features)

    def features(self, image: Tensor) -> Tensor:
        """What both heads see, (N, 8 * width): the means, then the maxima."""
        evidence = self.evidence(self.shape(self.texture(self.stem(image))), F.avg_pool3d(image, 4))
        return torch.cat([evidence.mean((2, 3, 4)), evidence.amax((2, 3, 4))], dim=1)


class Evidence(nn.Module):
    """Features (N, C, ...) and the density of their cells (N, 1, ...) -> evidence (N, K, ...), not negative."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.block = block(inputs, outputs)

    def forward(self, features: Tensor, density: Tensor) -> Tensor:
        found: Tensor = self.block(features) * density
        return found


class AttributeHead(nn.Linear):
    """A linear layer that answers in physical units: features (N, C) -> attributes (N, K).

    `offset` and `scale` (K,) are the mean and spread of the attributes, kept with the weights.
    """

    offset: Tensor
    scale: Tensor

    def __init__(self, features: int, attributes: int) -> None:
        super().__init__(features, attributes)
        self.register_buffer("offset", torch.zeros(attributes))
        self.register_buffer("scale", torch.ones(attributes))

    def reset_parameters(self) -> None:
        # PyTorch warns of a layer without outputs, which is what a network without attributes has.
        if self.out_features:
            super().reset_parameters()

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features) * self.scale + self.offset


def block(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution, batch normalisation and ReLU: features (N, inputs, ...) -> (N, outputs, ...), not negative."""
    return nn.Sequential(
        nn.Conv3d(inputs, outputs, kernel, stride, padding=1, bias=False),
        nn.BatchNorm3d(outputs),
        nn.ReLU(inplace=True),
    )
