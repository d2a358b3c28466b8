"""A classifier of lung patches whose last layer is a capsule for each thing that a radiologist would name.

LaLonde et al., "Encoding visual attributes in capsules for explainable medical diagnoses", 2020 (X-Caps), in 3-D. It
decides by the lengths of the capsules, which are the attributes, where theirs decides by their vectors: so nothing
passes beside what has a name.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from MedXAILib.networks.lung_nodule import LungNoduleClassifier
from MedXAILib.networks.semantic import ATTRIBUTES, Decision

_PRIMARIES, _PRIMARY_SIZE = 8, 8
_SIZE = 16
_BEGIN = 0.007
_TINY = 1e-12
_SIDE = 16
_DRAWN = 0.2
"""Above this intensity something is drawn."""


class CapsuleLungNodule(LungNoduleClassifier):
    """Image (N, 1, D, H, W), at least 24 voxels a side -> class logits (N, classes).

    Each place of `evidence` has 8 capsules of 8 numbers, at `primary`; `capsules` routes them to K of 16, one for each
    of the first K `ATTRIBUTES`. `degrees` reads their lengths, in the units of the attributes, and the logits are
    linear in these and see nothing else. `decoder` draws the nodule again from all K capsules.
    """

    attribute_layer = "degrees"
    primary_layer = "primary"

    def __init__(self, classes: int = 3, attributes: int = len(ATTRIBUTES), width: int = 16) -> None:
        super().__init__(classes, 0, width)
        self.attributes = ATTRIBUTES[:attributes]
        self.primary = nn.Conv3d(4 * width, _PRIMARIES * _PRIMARY_SIZE, 1, bias=False)
        self.capsules = Capsules(_PRIMARIES, _PRIMARY_SIZE, attributes, _SIZE)
        self.degrees = Lengths(attributes)
        self.class_head: Decision = Decision(attributes, classes)
        self.decoder = decoder(attributes * _SIZE, width // 2)

    @property
    def reference(self) -> Tensor:
        """The attributes (K,) that speak for nothing: the mean of the training."""
        return self.class_head.offset

    def forward(self, image: Tensor) -> Tensor:
        features = self.features(image)
        return self.decide(self.named(features), features)

    def features(self, image: Tensor) -> Tensor:
        """The attribute capsules (N, K, 16), each shorter than 1."""
        evidence = self.evidence(self.shape(self.texture(self.stem(image))), F.avg_pool3d(image, 4))
        capsules: Tensor = self.capsules(self.primary(evidence))
        return capsules

    def named(self, features: Tensor) -> Tensor:
        """The attributes (N, K) by the capsules, in their units."""
        degrees: Tensor = self.degrees(features)
        return degrees

    def decide(self, degrees: Tensor, features: Tensor) -> Tensor:
        """Class logits by attributes (N, K)."""
        logits: Tensor = self.class_head(degrees)
        return logits

    def routed(self, primary: Tensor) -> Tensor:
        """What each place of `primary` adds to the length of each capsule, (N, K, *grid); the sum is that length."""
        return self.capsules.routed(primary)

    def redrawn(self, features: Tensor) -> Tensor:
        """The nodule as the capsules (N, K, 16) hold it, in the middle of nothing: (N, 1, 16, 16, 16), 0..1, as far
        apart as those of `around`.

        Move one of the 16 numbers of a capsule to see what it stands for.
        """
        drawn: Tensor = self.decoder(features.flatten(1))
        return drawn

    def drawn_off(self, image: Tensor, primary: Tensor) -> Tensor:
        """How far, on average, the nodule as it is drawn again is off the image (N, 1, D, H, W), both 0..1: (N,), NaN
        where none is drawn. It is held against the image about the middle of where the first capsule comes from."""
        drawn = self.redrawn(self.capsules(primary))
        parts = self.routed(primary)[:, :1].clamp_min(0)
        axes = [torch.arange(size, device=image.device) for size in parts.shape[2:]]
        cells = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
        middle = (parts[:, 0, ..., None] * cells).sum((1, 2, 3)) / parts.sum((1, 2, 3, 4))[:, None]
        there = drawn > _DRAWN
        off = ((drawn - around(image, 4 * middle + 1.5)).abs() * there).sum((1, 2, 3, 4))
        return off / there.sum((1, 2, 3, 4))


class Capsules(nn.Module):
    """Primary capsules (N, P * Q, ...), P of Q numbers at each place -> capsules (N, K, D), each shorter than 1.

    A capsule is the squashed sum of votes: linear in a primary capsule, by the same matrix everywhere. Votes count the
    more, the better they agree with the sum of all (routing by agreement, Sabour et al. 2017). How much one counts for
    a capsule is a sigmoid, as in X-Caps, and not a share of 1: what is seen may speak for several attributes, or none.
    """

    def __init__(self, primaries: int, inputs: int, capsules: int, size: int, iterations: int = 3) -> None:
        super().__init__()
        self.iterations = iterations
        # Of the sum of a thousand votes, capsules are to begin neither short nor long.
        self.vote = nn.Parameter(_BEGIN * torch.randn(primaries, capsules, size, inputs))

    def forward(self, primary: Tensor) -> Tensor:
        return squashed(self._route(self._primary(primary))[1])

    def _primary(self, features: Tensor) -> Tensor:
        """Primary capsules (N, P, Q, places)."""
        primaries, _, _, inputs = self.vote.shape
        return squashed(features.flatten(2).unflatten(1, (primaries, inputs)), 2)

    def _route(self, primary: Tensor) -> tuple[Tensor, Tensor]:
        """How much each primary capsule counts for each capsule (N, P, K, places), and the sums of votes (N, K, D)."""
        agreement = torch.zeros((), device=primary.device, dtype=primary.dtype)
        agreement = agreement.expand(len(primary), *self.vote.shape[:2], primary.shape[-1])
        for left in range(self.iterations - 1, -1, -1):
            counts = agreement.sigmoid()
            # The sum of votes is the vote of the sum, and votes are many.
            total = torch.einsum("pkdq,npkq->nkd", self.vote, torch.einsum("npkx,npqx->npkq", counts, primary))
            if left:
                agreement = agreement + self._along(primary, squashed(total))
        return counts, total

    def _along(self, primary: Tensor, directions: Tensor) -> Tensor:
        """The votes (N, P, K, places) along `directions` (N, K, D)."""
        return torch.einsum("npkq,npqx->npkx", torch.einsum("pkdq,nkd->npkq", self.vote, directions), primary)

    def routed(self, features: Tensor) -> Tensor:
        """What each place adds to the length of each capsule, (N, K, ...)."""
        primary = self._primary(features)
        counts, total = self._route(primary)
        size = total.square().sum(-1, keepdim=True)
        # Along the sum of votes, and as much shorter as squashing makes it.
        parts = (counts * self._along(primary, total / (1 + size))).sum(1)
        return parts.unflatten(-1, features.shape[2:])


def squashed(vectors: Tensor, axis: int = -1) -> Tensor:
    """`vectors` along `axis`, in their direction, of a length s as s² / (1 + s²)."""
    size = vectors.square().sum(axis, keepdim=True)
    return vectors * (size + _TINY).sqrt() / (1 + size)


class Lengths(nn.Module):
    """Capsules (N, K, D) -> attributes (N, K): no length is `low` (K,), one of 1 is `high`, kept with the weights."""

    low: Tensor
    high: Tensor

    def __init__(self, attributes: int) -> None:
        super().__init__()
        self.register_buffer("low", torch.zeros(attributes))
        self.register_buffer("high", torch.ones(attributes))

    def forward(self, capsules: Tensor) -> Tensor:
        # A length of nothing has no gradient.
        length = (capsules.square().sum(-1) + _TINY).sqrt()
        return self.low + (self.high - self.low) * length


def around(images: Tensor, centres: Tensor) -> Tensor:
    """What is in `images` (N, 1, D, H, W) about `centres` (N, 3), in voxels: (N, 1, 16, 16, 16), every 2 voxels, zero
    outside."""
    axis = 2.0 * torch.arange(_SIDE, device=images.device) - (_SIDE - 1)
    offsets = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1)
    voxels = centres.reshape(-1, 1, 1, 1, 3) + offsets
    size = torch.tensor(images.shape[2:], device=images.device)
    return F.grid_sample(F.avg_pool3d(images, 2), ((2 * voxels + 1) / size - 1).flip(-1), align_corners=False)


def decoder(inputs: int, width: int) -> nn.Sequential:
    """Numbers (N, inputs) -> images (N, 1, 16, 16, 16), 0..1, at first nearly black."""
    last = nn.ConvTranspose3d(width, 1, 4, 2, padding=1)
    nn.init.constant_(last.bias, -4.0)  # type: ignore[arg-type]
    return nn.Sequential(
        nn.Linear(inputs, width * 4**3),
        nn.ReLU(inplace=True),
        nn.Unflatten(1, (width, 4, 4, 4)),
        nn.ConvTranspose3d(width, width, 4, 2, padding=1),
        nn.ReLU(inplace=True),
        last,
        nn.Sigmoid(),
    )
