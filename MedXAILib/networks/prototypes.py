"""A classifier of lung patches that decides by what they look like: prototypes, each a part of a case of the training.

Chen et al., "This looks like that: deep learning for interpretable image recognition", 2019; Wei, Tam and Tang,
"MProtoNet: a case-based interpretable model for brain tumor classification with 3D multi-parametric MRI", 2023, of
which the soft masks are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from MedXAILib.networks.lung_nodule import LungNoduleClassifier

GREYS = 255
"""A crop is kept in so many steps above 0, finer than its noise; a prototype is what is found in what is kept."""


@dataclass(frozen=True)
class Origin:
    """Where a prototype of class `of` comes from: the case `uid`, whose first voxel is at `corner` (RAS mm).

    `meta` is what is known of the case by name. There is no `uid` before prototypes are projected on cases.
    """

    of: int
    uid: str = ""
    corner: tuple[float, float, float] = (0.0, 0.0, 0.0)
    meta: Mapping[str, float] = field(default_factory=dict)


class Looked(NamedTuple):
    """Where each of P prototypes looks (N, P, *grid), as shares that sum to 1, what is there (N, P, K), and its
    similarity to the prototype (N, P)."""

    masks: Tensor
    found: Tensor
    similarities: Tensor


class PrototypeLungNodule(nn.Module):
    """Image (N, 1, D, H, W), at least 24 voxels a side -> class logits (N, classes).

    Each prototype looks at a soft mask of its own over the grid of `LungNoduleClassifier`, 4 voxels a unit. What is
    found there is compared with the prototype by the cosine, and a logit is the sum of the similarities to the
    prototypes of its class, times their weights, none of which is negative: the points. There is no bias.

    `origins` are the prototypes, as dictionaries of the fields of `Origin`. `crops` (P, 1, size, size, size) are the
    cases they come from, as the network sees them, in `GREYS` steps: of `spacing_mm`, with `intensities` (low, high) as
    0 and 1. A crop has a similarity of 1 to its prototype.
    """

    crops: Tensor

    def __init__(
        self,
        classes: int,
        origins: Sequence[Mapping[str, Any]],
        width: int = 16,
        parts: int = 32,
        size: int = 40,
        spacing_mm: float = 1.25,
        intensities: Sequence[float] = (-1000.0, 400.0),
    ) -> None:
        super().__init__()
        self.origins = tuple(Origin(**known) for known in origins)
        self.spacing_mm, self.intensities = spacing_mm, (intensities[0], intensities[1])
        trunk = LungNoduleClassifier(classes, 0, width)
        self.stem, self.texture, self.shape, self.evidence = trunk.stem, trunk.texture, trunk.shape, trunk.evidence
        seen, count = 7 * width, len(self.origins)
        self.norm = nn.BatchNorm3d(seen)
        self.parts = nn.Sequential(nn.Conv3d(seen, parts, 1), nn.ReLU())
        self.places = nn.Conv3d(seen, count, 1)
        self.prototypes = Prototypes(count, parts)
        self.class_head = Points(classes, [origin.of for origin in self.origins])
        self.register_buffer("crops", torch.zeros((count, 1, *(size,) * 3), dtype=torch.uint8))

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.class_head(self.looked(image).similarities)
        return logits

    def looked(self, image: Tensor) -> Looked:
        """Where in the image (N, 1, D, H, W) the prototypes look, and how alike that is."""
        shape = self.shape(self.texture(self.stem(image)))
        seen = self.norm(torch.cat([shape, self.evidence(shape, F.avg_pool3d(image, 4))], dim=1))
        places = self.places(seen)
        shares = places.flatten(2).softmax(2)
        found = shares @ self.parts(seen).flatten(2).mT
        return Looked(shares.reshape(places.shape), found, self.prototypes(found))

    def cases(self) -> Tensor:
        """The crops as images (P, 1, size, size, size)."""
        return self.crops.to(self.class_head.weight) / GREYS

    def train(self, mode: bool = True) -> PrototypeLungNodule:
        """A trunk that is frozen stays as it is, batch normalisation included."""
        super().train(mode)
        for part in (self.stem, self.texture, self.shape, self.evidence):
            if not any(parameter.requires_grad for parameter in part.parameters()):
                part.eval()
        return self

    @torch.no_grad()
    def keep(self, which: Sequence[int]) -> None:
        """Forget all prototypes but `which`."""
        self.origins = tuple(self.origins[i] for i in which)
        rows = list(which)
        for module, name in (
            (self.places, "weight"),
            (self.places, "bias"),
            (self.prototypes, "weight"),
            (self.class_head, "weight"),
        ):
            setattr(module, name, nn.Parameter(getattr(module, name)[rows]))
        self.places.out_channels = len(rows)
        self.class_head.of, self.crops = self.class_head.of[rows], self.crops[rows]


class Prototypes(nn.Module):
    """What was found where each prototype looks (N, P, K) -> its cosine with that prototype, a row of `weight`."""

    def __init__(self, count: int, parts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, parts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.weight)

    def forward(self, found: Tensor) -> Tensor:
        return F.cosine_similarity(found, self.weight, dim=2)


class Points(nn.Module):
    """Similarities (N, P) -> logits (N, classes): the sum, over the prototypes `of` a class, of what each adds."""

    of: Tensor

    def __init__(self, classes: int, of: Sequence[int]) -> None:
        super().__init__()
        self.classes = classes
        self.weight = nn.Parameter(torch.empty(len(of)))
        self.register_buffer("of", torch.tensor(of, dtype=torch.long))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 3.0)

    @property
    def each(self) -> Tensor:
        """What a similarity of 1 to each prototype adds to each logit, (classes, P)."""
        return F.one_hot(self.of, self.classes).T * self.weight.clamp_min(0)

    def forward(self, similarities: Tensor) -> Tensor:
        return similarities @ self.each.T
