"""Shapley values as a regression over coalitions.

Lundberg and Lee, "A unified approach to interpreting model predictions", 2017: the linear game that is nearest to a
game, coalitions weighted by the Shapley kernel and both ends kept, has the game's Shapley values.

Musco and Witter, "Provably accurate Shapley value estimation via leverage score sampling", 2025: to draw every size as
often as any other serves that regression better than to draw by the kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations, islice

import torch
from torch import Tensor

from MedXAILib.engines.linear_fit import linear_fit

# Student's t of 95 % confidence for 1, 2, ... degrees of freedom.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)

# So many players or fewer are asked in all their coalitions.
EXACT = 12


@dataclass(frozen=True)
class Coalitions:
    """Which coalitions of players to ask about: `present` (M, P), first `empty` times none, then all, then each before
    its complement. The first `complete` of them are all there are of their sizes; the others are drawn. `weights`
    (M,) is what each counts: the Shapley kernel, divided by how often it is drawn."""

    present: Tensor
    weights: Tensor
    empty: int
    complete: int

    @property
    def exhaustive(self) -> bool:
        """Whether nothing is left to chance."""
        return self.complete == len(self.present)


def kernel(players: int, size: int) -> float:
    """The weight of all coalitions of one size together."""
    return (players - 1) / (size * (players - size))


def coalitions(players: int, samples: int, generator: torch.Generator, empty: int = 1) -> Coalitions:
    """About `samples` coalitions: all of the smallest and largest sizes as far as drawing as many would ask each once;
    the others drawn, every size as often as any other. All there are of few players. `empty` says how often to ask
    about none: once, unless answers are random."""
    sizes = list(range(1, players // 2 + 1))
    left = samples - 1 - empty
    whole = 2**players <= max(samples, 2**EXACT if empty == 1 else 0)
    rows, weights = [torch.zeros(empty, players), torch.ones(1, players)], [0.0] * (empty + 1)
    while sizes:
        size = sizes[0]
        count = math.comb(players, size) * _sides(players, size)
        if not whole and left * _sides(players, size) < count * sum(_sides(players, s) for s in sizes):
            break
        sizes.remove(size)
        rows.append(_all(players, size))
        weights += [kernel(players, size) * _sides(players, size) / count] * count
        left -= count
    if not sizes and empty > 1:
        # Where answers are random, all coalitions are asked as often as can be.
        again = max(0, left) // max(1, 2**players - 2)
        rows += rows[2:] * again
        weights += weights[empty + 1 :] * again
    complete = len(weights)
    if sizes and left > 1:
        pairs = left // 2
        sides = torch.tensor([float(_sides(players, s)) for s in sizes])
        drawn = torch.tensor(sizes)[torch.multinomial(sides, pairs, True, generator=generator)]
        place = torch.rand(pairs, players, generator=generator).argsort(1).argsort(1)
        rows.append(_with_complements(place < drawn[:, None]))
        each = [kernel(players, s) * float(sides.sum()) / (2 * pairs) for s in drawn.tolist()]
        weights += [weight for weight in each for _ in range(2)]
    return Coalitions(torch.cat([r.bool() for r in rows]), torch.tensor(weights, dtype=torch.float64), empty, complete)


@dataclass(frozen=True)
class Shares:
    """The Shapley `values` (P, T) of T games whose outcomes differ by `change` (T,) between all players and none.
    `half` is half the width of their 95 % confidence intervals; None when they are exact, or too little is known."""

    values: Tensor
    half: Tensor | None
    change: Tensor

    @property
    def inefficiency(self) -> Tensor:
        """By how much the values do not add up to the change, relative to it, (T,)."""
        return (self.values.sum(0) - self.change).abs() / self.change.abs().clamp_min(1e-12)


def shapley_fit(asked: Coalitions, outcomes: Tensor) -> Shares:
    """The shares in games whose `outcomes` (m, T) are known for the first m of the coalitions. They add up."""
    players, ends = asked.present.shape[1], asked.empty + 1
    if len(outcomes) < ends:
        return Shares(torch.zeros(players, outcomes.shape[1]).to(outcomes), None, torch.zeros_like(outcomes.sum(0)))
    start = outcomes[: asked.empty].mean(0)
    change = outcomes[asked.empty] - start
    equal = (change / players).expand(players, -1)
    known = ends + (len(outcomes) - ends) // 2 * 2
    if known == ends or players == 1:
        return Shares(equal, None, change)
    present, weights = asked.present[ends:known].double(), asked.weights[ends:known].clone()
    drawn = max(0, known - asked.complete)
    if drawn:
        # The draws so far stand for all the coalitions that are not asked one by one.
        weights[-drawn:] *= (len(asked.present) - asked.complete) / drawn
    # To an equal share of the change comes what is nothing in the sum: what `free` spans.
    every = torch.eye(players, dtype=torch.float64)
    free = torch.linalg.qr(torch.cat([torch.ones_like(every[:, :1]), every[:, 1:]], 1)).Q[:, 1:]
    rest = outcomes[ends:known] - start - present @ equal
    fit = linear_fit(present @ free, rest, weights, torch.zeros(players - 1), group=2)
    values = equal + free @ fit.coefficients
    # Where answers are random, so are those to coalitions that are all asked.
    chance = (known - ends if asked.empty > 1 else drawn) // 2
    if not chance or known < 2 * players:
        return Shares(values, None, change)
    variance = (free @ fit.influence[-chance:]).square().sum(0)
    if asked.empty > 1:
        variance += outcomes[: asked.empty].var(0) / asked.empty / players**2
    return Shares(values, 1.96 * variance.sqrt(), change)


def mean_shares(drawn: Tensor, change: Tensor) -> Shares:
    """The shares of which each of `drawn` (n, P, T) is an unbiased draw, whose changes are `change` (n, T)."""
    half = None
    if len(drawn) > 1:
        half = student(len(drawn) - 1) * drawn.std(0) / len(drawn) ** 0.5
    return Shares(drawn.mean(0), half, change.mean(0))


def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t distribution."""
    if freedom <= len(_STUDENT):
        return _STUDENT[freedom - 1]
    return 1.95996 + 2.37227 / freedom + 2.82250 / freedom**2


def _sides(players: int, size: int) -> int:
    """How many sizes coalitions of a size and their complements have."""
    return 1 if 2 * size == players else 2


def _all(players: int, size: int) -> Tensor:
    """All coalitions (count, P) of a size, and their complements."""
    found = combinations(range(players), size)
    # The complements of half of the halves are the other half.
    count = math.comb(players, size) * _sides(players, size) // 2
    members = torch.tensor(list(islice(found, count)))
    return _with_complements(torch.zeros(count, players).scatter_(1, members, 1.0).bool())


def _with_complements(present: Tensor) -> Tensor:
    return torch.stack([present, ~present], 1).flatten(0, 1)
