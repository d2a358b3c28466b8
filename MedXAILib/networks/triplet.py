"""A network that puts lung patches near those that share what matters, and nearest those that share most of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from MedXAILib.networks.lung_nodule import LungNoduleClassifier


class TripletEmbedding(nn.Module):
    """Image (N, 1, D, H, W), at least 24 voxels a side -> embedding (N, K) of length 1.

    The embedding is linear in the mean and the maximum of the `evidence` of `LungNoduleClassifier` over its grid, so
    that the part of each place is known exactly, and with it where two cases are alike (`contributions`). Likeness has
    several cues, such as class, size and place (Yan et al., "Deep lesion graphs in the wild", 2018): the K numbers are
    `blocks` for each of them, the cue that matters most first. A block can be searched by itself (`split`), or the
    first before the whole (`coarse_to_fine`).
    """

    def __init__(self, blocks: Sequence[int] = (32, 16, 16), width: int = 16) -> None:
        super().__init__()
        self.blocks = tuple(blocks)
        trunk = LungNoduleClassifier(width=width)
        self.stem, self.texture, self.shape, self.evidence = trunk.stem, trunk.texture, trunk.shape, trunk.evidence
        self.head = nn.Linear(8 * width, sum(self.blocks))

    def forward(self, image: Tensor) -> Tensor:
        seen = self.seen(image)
        return F.normalize(self.head(torch.cat([seen.mean((2, 3, 4)), seen.amax((2, 3, 4))], dim=1)))

    def seen(self, image: Tensor) -> Tensor:
        """The evidence (N, 4 * width, *grid)."""
        found: Tensor = self.evidence(self.shape(self.texture(self.stem(image))), F.avg_pool3d(image, 4))
        return found

    def contributions(self, image: Tensor) -> Tensor:
        """What each place adds to the embedding before it is normalised: (N, K, *grid), which sums to it. What no place
        adds, the bias, is shared out evenly."""
        seen = self.seen(image)
        highest = (seen == seen.amax((2, 3, 4), keepdim=True)).to(seen)
        # Places that are equally high share what the maximum adds.
        parts = torch.cat([seen / seen[0, 0].numel(), seen * highest / highest.sum((2, 3, 4), keepdim=True)], dim=1)
        return F.conv3d(parts, self.head.weight[..., None, None, None], self.head.bias / seen[0, 0].numel())

    def split(self, embedding: Tensor) -> list[Tensor]:
        """The part of an embedding (N, K) that is for each cue, (N, k) of length 1."""
        return [F.normalize(block) for block in embedding.split(self.blocks, dim=1)]

    def coarse_to_fine(self, queries: Tensor, cases: Tensor, first: int = 100) -> Tensor:
        """The cosine similarity of queries (N, K) and cases (M, K), (N, M), where only the `first` cases that are
        nearest by the leading cue are compared as a whole; that of the others is minus infinity."""
        coarse = self.split(queries)[0] @ self.split(cases)[0].T
        kept = coarse.topk(min(first, len(cases)), dim=1).indices
        return torch.full_like(coarse, -torch.inf).scatter(1, kept, (queries @ cases.T).gather(1, kept))
