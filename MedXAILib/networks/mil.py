"""A whole scan as a bag of patches, some of which show why the scan has its grade.

The patches are the fields of view of a convolutional trunk, so that all of them are looked at at once. Each has a score
for every grade; pooling makes the scan's scores of theirs. Training needs the grades of scans and nothing else.

Schwab et al., "Localization of critical findings in chest X-ray without local annotations using multi-instance
learning", 2020; Araújo et al., "DR|GRADUATE: uncertainty-aware deep learning-based diabetic retinopathy grading in eye
fundus images", 2020; Ilse et al., "Attention-based deep multiple instance learning", 2018.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from MedXAILib.errors import unknown
from MedXAILib.networks.lung_nodule import Evidence, block

Pooling = Literal["noisy_or", "attention"]

CELL = 4
"""Voxels from one instance to the next along each axis."""

_LUNG = (0.02, 0.35)
"""The density of lung and its small vessels, in units of the image."""
_AROUND = 7
"""So many cells along each side (35 mm) tell whether an instance lies in lung."""
_ENOUGH = 0.25
_RARE = 10.0
"""By how much less an instance is likely to have a grade than a scan, before anything is learnt."""


class MultipleInstanceClassifier(nn.Module):
    """Image (N, 1, D, H, W), at least 24 voxels a side -> logits (N, grades) of each grade or a higher one.

    Instance i is centred at voxel 4 i + 1.5 and sees 34 voxels along each axis. `instances` gives the part that each
    has in each grade, (N, grades, D / 4, H / 4, W / 4), and `pooled` makes the logits of their sums. Only what lies in
    lung is an instance. As in `LungNoduleClassifier`, evidence counts in proportion to the tissue in an instance's own
    cell.
    """

    def __init__(self, grades: int = 2, pooling: Pooling = "noisy_or", width: int = 16) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            block(1, width, kernel=4, stride=2),
            block(width, width),
            nn.MaxPool3d(2),
            block(width, 2 * width),
            block(2 * width, 3 * width),
        )
        self.evidence = Evidence(3 * width, 4 * width)
        self.scores = OrdinalScores(4 * width, grades)
        if pooling not in get_args(Pooling):
            raise unknown("pooling", pooling, get_args(Pooling))
        self.instances = NoisyOr() if pooling == "noisy_or" else GatedAttention(4 * width)

    def forward(self, image: Tensor) -> Tensor:
        return self.pool(*self.bag(image))

    def bag(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The features (N, C, D / 4, H / 4, W / 4) of the instances, and which of them lie in lung (N, 1, ...)."""
        here = in_lung(image)
        return self.evidence(self.trunk(image), F.avg_pool3d(image, CELL)) * here, here

    def pool(self, features: Tensor, here: Tensor) -> Tensor:
        """The logits (N, grades) of a bag."""
        parts: Tensor = self.instances(self.scores(features), features, here)
        return self.pooled(parts.sum((2, 3, 4)))

    def pooled(self, total: Tensor) -> Tensor:
        """The logits (N, grades) of the summed parts of all instances, (N, grades)."""
        return self.instances.pooled(total)

    def best(self, features: Tensor) -> Tensor:
        """The scores (N, grades) of an instance that had as much of each feature as any has: what training begins with.

        Before instances are told from each other, pooling asks for the mean of thousands, in which a nodule is nothing.
        """
        return self.scores(features.amax((2, 3, 4), keepdim=True)).flatten(1)


class OrdinalScores(nn.Conv3d):
    """Features (N, C, ...) -> scores (N, grades, ...) of each grade or a higher one, so none above that before it."""

    def __init__(self, features: int, grades: int) -> None:
        super().__init__(features, grades, 1)
        with torch.no_grad():
            # Evidence speaks for a nodule, unless it is learnt that it does not.
            self.weight[0].abs_()

    def forward(self, features: Tensor) -> Tensor:
        lowest, steps = super().forward(features).split([1, self.out_channels - 1], 1)
        return torch.cat([lowest, lowest - F.softplus(steps).cumsum(1)], 1)


class NoisyOr(nn.Module):
    """A scan has a grade unless each of its instances, independently, has not.

    The part of an instance that has it with probability p is -log(1 - p), which is not negative: the sum of all parts
    is -log(1 - P) of the scan's probability P.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rare = nn.Parameter(torch.tensor(_RARE))

    def forward(self, scores: Tensor, features: Tensor, here: Tensor) -> Tensor:
        return F.softplus(scores - self.rare) * here

    def pooled(self, total: Tensor) -> Tensor:
        total = total.clamp_min(1e-12)
        return total + (-torch.expm1(-total)).log()


class GatedAttention(nn.Module):
    """The scan's logits are the mean of its instances' scores, weighted by an attention that all grades share.

    The part of an instance is its weight times its score: the sum of all parts is the logit.
    """

    def __init__(self, features: int, hidden: int = 32) -> None:
        super().__init__()
        self.content = nn.Conv3d(features, hidden, 1)
        self.gate = nn.Conv3d(features, hidden, 1)
        self.weight = nn.Conv3d(hidden, 1, 1)

    def forward(self, scores: Tensor, features: Tensor, here: Tensor) -> Tensor:
        return self.attention(features, here) * scores

    def attention(self, features: Tensor, here: Tensor) -> Tensor:
        """The weights (N, 1, ...) of the instances: they sum to 1 and are 0 where there is none."""
        told = self.weight(self.content(features).tanh() * self.gate(features).sigmoid())
        return told.masked_fill(~here, -torch.inf).flatten(1).softmax(1).reshape(told.shape)

    def pooled(self, total: Tensor) -> Tensor:
        return total


def in_lung(image: Tensor) -> Tensor:
    """Which instances of `image` (N, 1, D, H, W) lie in lung, (N, 1, D / 4, H / 4, W / 4) bool; all where none does."""
    low, high = _LUNG
    lung = F.avg_pool3d(((image > low) & (image < high)).to(image), CELL)
    # No more than the image has, of which each side is odd, so that it has a middle.
    window = [min(_AROUND, size - 1 + size % 2) for size in lung.shape[2:]]
    padding = [size // 2 for size in window]
    around = F.avg_pool3d(lung, window, stride=1, padding=padding, count_include_pad=False) > _ENOUGH
    return around | ~around.flatten(1).any(1).reshape(-1, 1, 1, 1, 1)
