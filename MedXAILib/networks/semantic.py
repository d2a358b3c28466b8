"""A classifier of lung patches that first says what a radiologist would name, and decides by that.

Shen et al., "An interpretable deep hierarchical semantic convolutional neural network for lung nodule malignancy
classification", 2019. Without a residual it is a concept bottleneck (Koh et al. 2020).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from MedXAILib.networks.lung_nodule import LungNoduleClassifier


@dataclass(frozen=True)
class Attribute:
    """What an output of a network means.

    With a `unit` it is measured in that; without, it is the probability of a finding, and a sentence says `yes` when it
    is there and `no`, or "not `yes`", when it is not. Of the findings of one `scale` exactly one is there; they follow
    each other. `role` is the place in a sentence: "noun" is the thing that all the others are said of, an adjective
    goes "before" it, and "of" is its size.
    """

    name: str
    unit: str = ""
    yes: str = ""
    no: str = ""
    scale: str = ""
    role: Literal["noun", "before", "of", "after"] = "after"


ATTRIBUTES = (
    Attribute("nodule", yes="nodule", role="noun"),
    Attribute("diameter", "mm", role="of"),
    Attribute("solid", yes="solid", scale="solidity", role="before"),
    Attribute("part_solid", yes="part-solid", scale="solidity", role="before"),
    Attribute("ground_glass", yes="ground-glass", scale="solidity", role="before"),
    Attribute("elongation", yes="elongated", no="round", role="before"),
    Attribute("margin", yes="ill-defined", no="well-defined"),
    Attribute("lobulation", yes="lobulated"),
    Attribute("spiculation", yes="spiculated"),
    Attribute("calcification", yes="calcified"),
)
"""What the network says of a patch, in this order."""


class SemanticLungNodule(LungNoduleClassifier):
    """Image (N, 1, D, H, W), at least 24 voxels a side -> class logits (N, classes).

    `attribute_head` gives (N, K), the first K of `ATTRIBUTES`, or `attributes` of a person's own, as dictionaries of
    the fields of `Attribute`: in their unit, and log-odds; `degrees` the same with probabilities for log-odds. The
    logits are linear in `degrees`, and see nothing else unless there is a `residual`: then they are linear in the
    features, too.
    """

    attribute_layer = "degrees"

    def __init__(
        self,
        classes: int = 3,
        attributes: int | Sequence[Mapping[str, Any]] = len(ATTRIBUTES),
        width: int = 16,
        residual: bool = False,
    ) -> None:
        own = () if isinstance(attributes, int) else tuple(Attribute(**known) for known in attributes)
        count = attributes if isinstance(attributes, int) else len(own)
        super().__init__(classes, count, width)
        self.attributes = own or ATTRIBUTES[:count]
        self.degrees = Degrees(self.attributes)
        self.class_head: Decision = Decision(count, classes)
        self.residual_head = nn.Linear(8 * width, classes, bias=False) if residual else None

    @property
    def reference(self) -> Tensor:
        """The attributes (K,) that speak for nothing: the mean of the training."""
        return self.class_head.offset

    def forward(self, image: Tensor) -> Tensor:
        features = self.features(image)
        return self.decide(self.named(features), features)

    def named(self, features: Tensor) -> Tensor:
        """The attributes (N, K) by the features (N, 8 * width): in their unit, and probabilities."""
        degrees: Tensor = self.degrees(self.attribute_head(features))
        return degrees

    def decide(self, degrees: Tensor, features: Tensor) -> Tensor:
        """Class logits by attributes (N, K); the features (N, 8 * width) matter only where there is a residual."""
        logits: Tensor = self.class_head(degrees)
        return logits if self.residual_head is None else logits + self.residual_head(features)


class Degrees(nn.Module):
    """Measures and log-odds (N, K) -> measures and probabilities (N, K); those of one scale sum to 1."""

    def __init__(self, attributes: Sequence[Attribute]) -> None:
        super().__init__()
        self.runs = [(*kind, len(list(run))) for kind, run in groupby(attributes, lambda a: (a.unit, a.scale))]

    def forward(self, said: Tensor) -> Tensor:
        parts = said.split([length for *_, length in self.runs], dim=1)
        return torch.cat(
            [
                part if unit else part.softmax(1) if scale else part.sigmoid()
                for part, (unit, scale, _) in zip(parts, self.runs, strict=True)
            ],
            dim=1,
        )


class Decision(nn.Linear):
    """A linear layer on values in units of their own: attributes (N, K) -> logits (N, classes).

    `offset` and `scale` (K,) are their mean and spread, kept with the weights; at the mean the logits are the bias.
    """

    offset: Tensor
    scale: Tensor

    def __init__(self, attributes: int, classes: int) -> None:
        super().__init__(attributes, classes)
        self.register_buffer("offset", torch.zeros(attributes))
        self.register_buffer("scale", torch.ones(attributes))

    @property
    def each(self) -> Tensor:
        """What a unit of each attribute adds to each logit, (classes, K)."""
        return self.weight / self.scale

    def forward(self, attributes: Tensor) -> Tensor:
        return F.linear(attributes, self.each, self.bias - self.each @ self.offset)
