"""Permutation SHAP: Shapley values by walks from an empty scan to the whole one.

Castro, Gomez and Tejada, "Polynomial calculation of the Shapley value based on sampling", 2009; each order is also
walked backwards, as in Mitchell et al., "Sampling permutations for Shapley value estimation", 2022.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from MedXAILib.engines.boxes import cut, put
from MedXAILib.engines.incremental import Chain, Incremental
from MedXAILib.engines.perturbation import Evaluator, changed, evaluator
from MedXAILib.engines.shapley import EXACT, Shares, mean_shares
from MedXAILib.explainer import Question, Taxonomy, perturbation
from MedXAILib.infills.infill import Infill
from MedXAILib.supervoxels import Supervoxels
from MedXAILib.visual.shapley_method import ByShares, estimates_of
from MedXAILib.visual.supervoxel_method import Estimate


class PermutationSHAP(ByShares):
    """How is the decision shared out fairly among the supervoxels? Shapley values, by walks that put them back.

    A walk starts with none of the supervoxels and puts them back in a random order; each has what the decision changes
    when it comes. Every order is walked both ways. Up to 12 supervoxels are asked in all their coalitions, exactly.
    """

    id: ClassVar[str] = "permutation_shap"
    title: ClassVar[str] = "Permutation SHAP"
    paper: ClassVar[str] = "Castro 2009"
    taxonomy: ClassVar[Taxonomy] = perturbation(
        strengths="fair shares with axioms behind them, that add up; unbiased; good with few forwards",
        limits="two forwards for each supervoxel and order; scans with half of them missing look odd",
    )

    permutations: int = Field(5, ge=1, description="orders to walk, each forwards and backwards")
    tolerance: float = Field(
        0.0, ge=0, description="ends when the 95 % intervals are within this share of the score's change; 0 walks all"
    )

    def estimates(self, question: Question, supervoxels: Supervoxels, infill: Infill) -> list[Estimate]:
        if supervoxels.count <= EXACT and not infill.random:
            return self.regressed(question, supervoxels, infill, 0)
        asked = evaluator(question, supervoxels.one_by_one(question.x), infill)
        walks = _Walks(question, supervoxels, infill, self.title, asked)
        generator = question.run.generator()
        orders = torch.stack([torch.randperm(supervoxels.count, generator=generator) for _ in range(self.permutations)])

        def work(start: int, stop: int) -> None:
            walks.go(start, orders[start:stop], self.permutations)
            shares = walks.shares()
            question.show(lambda: supervoxels.painted(shares.values[:, 0]))
            if shares.half is not None and bool((shares.half <= self.tolerance * shares.change.abs()).all()):
                raise _Ended

        size = asked.size
        if isinstance(asked, Incremental):
            # Each walk has its own scan, of which as much is kept.
            size = min(size, question.run.fitting(asked.looked.nbytes, 1, question.x.device))
        with suppress(_Ended):
            question.run.chunks(self.permutations, size // 2).map(work, self.title, anytime=True)
        return estimates_of(walks.shares())


class _Ended(Exception):
    """It is enough."""


class _Walks:
    """Several walks side by side, and what each supervoxel brought in those that are done."""

    def __init__(
        self, question: Question, supervoxels: Supervoxels, infill: Infill, title: str, asked: Evaluator
    ) -> None:
        self.question, self.supervoxels, self.infill, self.title = question, supervoxels, infill, title
        self.chain = partial(Chain, together=asked.together) if isinstance(asked, Incremental) else _Chain
        self.whole = _stacked(asked.at_sample)
        self.empty: Tensor | None = None
        self.brought: list[Tensor] = []
        self.changes: list[Tensor] = []
        self.begun: tuple[Tensor, list[Tensor]] | None = None

    def shares(self) -> Shares:
        """The mean over the orders that were walked both ways; if there is none yet, over what was walked."""
        if not self.brought and self.begun is not None:
            return _begun(*self.begun, self.whole)
        return mean_shares(torch.cat(self.brought), torch.cat(self.changes))

    def go(self, first: int, orders: Tensor, total: int) -> None:
        """Walk `orders` (n, count), of which `first` is the number of the first, both ways.

        Raises:
            _Ended: when somebody said that it is enough.
        """
        count, both = orders.shape[1], torch.cat([orders, orders.flip(1)])
        absent = torch.ones(both.shape, dtype=torch.bool)
        draws = [*range(first, first + len(orders))] * 2
        # A random infill is drawn once for a walk, so that nothing but the supervoxels changes on the way.
        start = changed(self.question.x, self.supervoxels.masks(absent, self.question.x), self.infill, draws)
        chain, values = self.chain(self.question, start), [self._at(start)]
        for k in range(count - 1):
            done, of = first * count + k * len(orders), total * count
            self.question.run.step(done, of, self.title)
            if (k or first) and self.question.run.stops(done, of, self.title):
                raise _Ended
            values.append(self._step(chain, start, absent, both[:, k]))
            if not first:
                self.begun = both, values
                self.question.show(lambda: self.supervoxels.painted(self.shares().values[:, 0]))
        values.append(self.whole.expand(len(both), -1))
        brought = torch.stack(values).diff(dim=0).transpose(0, 1)
        mine = torch.zeros_like(brought).scatter_(1, both[:, :, None].expand_as(brought), brought)
        self.brought.append((mine[: len(orders)] + mine[len(orders) :]) / 2)
        self.changes.append(self.whole - values[0][: len(orders)])

    def _at(self, start: Tensor) -> Tensor:
        """The values (M, T) of empty scans, which are all the same unless the infill is random."""
        pairs = len(start) // 2
        if self.infill.random:
            return _stacked(self.question.values(start[:pairs])).repeat(2, 1)
        if self.empty is None:
            self.empty = _stacked(self.question.values(start[:1]))
        return self.empty.expand(len(start), -1)

    def _step(self, chain: Chain | _Chain, start: Tensor, absent: Tensor, players: Tensor) -> Tensor:
        """Put back one supervoxel, `players` (M,), in each walk; its values (M, T)."""
        absent[torch.arange(len(players)), players] = False
        (box, low), x = self.supervoxels.boxes(players), self.question.x
        masks = self.supervoxels.masks_in(box, low, absent, x)
        patches = torch.lerp(cut(x, low, box), cut(start, low, box), masks.share)
        return _stacked(chain.step(patches, low))


class _Chain:
    """As `Chain`, for networks of which all is computed again."""

    def __init__(self, question: Question, start: Tensor) -> None:
        self.question, self.now = question, start.clone()

    def step(self, patches: Tensor, low: Tensor) -> list[Tensor]:
        """Put `patches` (M, C, *box) at `low` (M, rank); each target's value (M,) then."""
        put(self.now, torch.zeros_like(low), patches, low)
        return self.question.values(self.now)


def _stacked(values: list[Tensor]) -> Tensor:
    return torch.stack(values, 1).double().cpu()


def _begun(both: Tensor, values: list[Tensor], whole: Tensor) -> Shares:
    """What the supervoxels brought that came first, from the `values` (steps + 1) x (M, T) of walks `both` (M, P)."""
    came, brought = both[:, : len(values) - 1].T.flatten(), torch.stack(values).diff(dim=0).flatten(0, 1)
    count = both.shape[1]
    total = torch.zeros(count, brought.shape[1], dtype=brought.dtype).index_add_(0, came, brought)
    often = came.bincount(minlength=count).clamp_min(1)[:, None]
    return Shares(total / often, None, (whole - values[0]).mean(0))
