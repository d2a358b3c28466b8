"""RISE, as the covariance of the decision with what is kept.

Petsiuk, Das, Saenko, "RISE: randomized input sampling for explanation of black-box models", 2018.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from MedXAILib.engines.masks import Masks, Stream
from MedXAILib.engines.perturbation import perturb
from MedXAILib.engines.smooth_masks import SmoothMasks
from MedXAILib.explainer import Attribution, Question, Taxonomy, perturbation
from MedXAILib.infills.choice import infill
from MedXAILib.infills.infill import Later
from MedXAILib.visual.perturbing import Perturbing

# Cells along each side, unless their size is given.
_PER_SIDE = 7

# Masks are looked at after so many, and then whenever there are that much more.
_FIRST, _MORE = 100, 1.25

# Draws of masks are far from those of random infills, which would otherwise be made of the same numbers.
_DRAWS = 500_000

# Of so many voxels at most a percentile is found.
_LOOKED_AT = 100_000


class RISE(Perturbing):
    """How much higher is the decision when a voxel is kept than when it is not, whatever else is kept?

    Random cells of a coarse grid, randomly shifted, are kept, and the map is E[score | kept] - E[score | removed], a
    voxel being kept with the probability that is its mask. It is found as the covariance of mask and score, which is
    centred: the published mean of the score weighted by the mask has the same pattern, on a constant that makes it ten
    times as noisy. Masks are independent; pairs of a mask and its complement tell the same thing twice where the score
    is nearly additive, and took 1.8 times as many forwards for the same noise.
    """

    id: ClassVar[str] = "rise"
    title: ClassVar[str] = "RISE"
    paper: ClassVar[str] = "Petsiuk 2018"
    taxonomy: ClassVar[Taxonomy] = perturbation(
        strengths="any network, no gradients; sees what places do together; says how sure it is of every voxel",
        limits="hundreds of forwards; as coarse as its cells; scans with holes look odd",
    )

    cell: tuple[float, ...] = Field(
        (), description="size of the grid's cells in mm, for all axes or each; a seventh of a side if empty"
    )
    keep: float = Field(0.5, gt=0, lt=1, description="probability that a cell is kept")
    samples: int = Field(8000, ge=2, le=100_000, description="masks at most")
    tolerance: float = Field(
        0.1,
        ge=0,
        le=1,
        description="stop when 95 % of the voxels are known to within this fraction of the map's range; 0 goes to the "
        "maximum",
    )

    def of_sample(self, question: Question) -> list[Attribution]:
        smooth = SmoothMasks.of(question, self.cell, _PER_SIDE)
        chosen = infill(question, self.infill)
        found = _Covariance(question.x[:, :1], len(question.targets), self.keep)

        def take(_start: int, masks: Masks, values: list[Tensor]) -> None:
            found.add(1 - masks.share, values)
            question.show(lambda: found.attribution(0).values)

        until = 0.0
        while True:
            until = min(max(_FIRST, until * _MORE), self.samples)
            more = self._stream(question, smooth, found.count, int(until) - found.count)
            perturb(question, more, Later(chosen, found.count), take, f"{self.title}: {int(until)} masks")
            maps = [found.attribution(t) for t in range(len(question.targets))]
            if found.count == self.samples or self._settled(maps) or question.run.unfinished:
                break
            if question.run.stops(found.count, self.samples, self.title):
                break
        if self.tolerance and not self._settled(maps) and not question.run.unfinished:
            question.run.note(
                f"After {found.count} masks the map is known only to within {max(map(_unsure, maps)):.0%} of its "
                "range: ask for more samples, or larger cells."
            )
        return maps

    def _stream(self, question: Question, smooth: SmoothMasks, first: int, count: int) -> Stream:
        """`count` masks from number `first` on."""
        x = question.x
        rank = len(smooth.size)

        def make(start: int, stop: int) -> Masks:
            numbers = []
            for number in range(first + start, first + stop):
                generator = question.run.generator(_DRAWS + number)
                shift = torch.rand(rank, generator=generator) - 0.5
                numbers.append((torch.rand(smooth.nodes, generator=generator) < self.keep, shift))
            kept, shifts = (torch.stack(column) for column in zip(*numbers, strict=True))
            return Masks.everywhere(1 - smooth(kept[:, None].to(x), shifts.to(x)).clamp(0, 1))

        return Stream(count, smooth.size, make)

    def _settled(self, maps: Sequence[Attribution]) -> bool:
        return max(map(_unsure, maps)) < self.tolerance


def _unsure(found: Attribution) -> float:
    """The 95th percentile of the intervals of a map, as a fraction of its range."""
    low, high = found.values.aminmax()
    assert found.interval is not None
    half = found.interval.flatten()
    return float(half[:: -(-len(half) // _LOOKED_AT)].quantile(0.95) / (high - low).clamp_min(1e-30))


class _Covariance:
    """Of masks and scores, as they come: sums over masks (C) and scores (a), each voxel's."""

    def __init__(self, like: Tensor, targets: int, keep: float) -> None:
        self.keep, self.count = keep, 0
        self.c, self.cc = torch.zeros_like(like), torch.zeros_like(like)
        # For each target: the first score, from which the others are counted so that they are small; their sum; and
        # the sums of a * c, a * c², a² * c².
        self.first: list[Tensor] = []
        self.a = [0.0] * targets
        self.sums = [[torch.zeros_like(like) for _ in range(3)] for _ in range(targets)]

    def add(self, kept: Tensor, scores: Sequence[Tensor]) -> None:
        """Masks (M, 1, *spatial), and each target's scores (M,)."""
        c = kept - self.keep
        cc = c.square()
        self.first = self.first or [score[0] for score in scores]
        self.count += len(kept)
        self.c += c.sum(0)
        self.cc += cc.sum(0)
        for t, score in enumerate(scores):
            a = (score - self.first[t]).to(c)
            self.a[t] += float(a.sum(dtype=torch.float64))
            ac, acc, aacc = self.sums[t]
            for total, factor, of in ((ac, a, c), (acc, a, cc), (aacc, a.square(), cc)):
                total += torch.tensordot(factor, of, 1)

    def attribution(self, t: int) -> Attribution:
        """Of target `t`: the difference of the means of the score, and how sure it is."""
        n, mean = self.count, self.a[t] / self.count
        ac, acc, aacc = self.sums[t]
        covariance = (ac - mean * self.c) / max(1, n - 1)
        square = (aacc - 2 * mean * acc + mean**2 * self.cc) / n
        half = 1.96 * ((square - covariance.square()).clamp_min(0) / n).sqrt()
        scale = self.keep * (1 - self.keep)
        return Attribution(covariance / scale, interval=half / scale)
