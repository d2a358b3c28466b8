"""Meaningful perturbation: a mask that is learned.

Fong and Vedaldi, "Interpretable explanations of black boxes by meaningful perturbation", 2017; Fong, Patrick, Vedaldi,
"Understanding deep networks via extremal perturbations and smooth masks", 2019 (masks of a given area); Qi, Khorram and
Li, "Visualizing deep networks by optimizing with integrated gradients", 2019 (where it starts); Uzunova et al.,
"Interpretable explanations of black box classifiers applied on medical images by meaningful perturbations using
variational autoencoders", 2019, and Lenis et al., "Domain aware medical image classifier interpretation by
counterfactual impact analysis", 2020 (infills that look like tissue).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from MedXAILib.engines.input_gradients import _recorded, fit
from MedXAILib.engines.masks import Masks
from MedXAILib.engines.smooth_masks import SmoothMasks
from MedXAILib.explainer import Attribution, Question, Taxonomy, perturbation
from MedXAILib.infills.choice import InfillChoice, infill
from MedXAILib.infills.infill import Infill
from MedXAILib.visual.perturbing import Perturbing

# Cells along each side, unless their size is given.
_PER_SIDE = 12

# How many points of the path from the scan to its infill say where the mask starts, and which parts of it are tried.
_POINTS, _PARTS = 4, (0.005, 0.02, 0.05, 0.1, 0.2, 0.4)

# The mask starts between these values, and each step changes their logarithms of odds by about so much.
_LOW, _HIGH, _RATE = 0.02, 0.9, 0.3

# An infill that depends on the mask is asked again after so many steps, for the cells of which so much is taken and
# those around them.
_RENEWED, _TAKEN = 5, 0.1

# How strongly an area is asked for, in the first step and in the last.
_AREA = (30.0, 1000.0)

# A mask of a given area is large enough when it takes away, or keeps, so much of the score.
_ENOUGH = 0.9

_STARTING = "Meaningful perturbation: where it starts"

# Draws of noise and shifts are far from those of random infills.
_DRAWS = 500_000


class MeaningfulPerturbation(Perturbing):
    """Which smallest part of the scan must be replaced to destroy the decision, or be kept to save it?

    The map is the mask, 0 to 1: how much of a voxel is replaced (deletion) or kept (preservation). It is linear between
    the nodes of a coarse grid, whose values are learned from gradients: the score, as a fraction of what it loses when
    everything is replaced, plus how much the mask takes up and how large its surface is. It starts from the cells that
    the score loses most by while everything fades into its infill; several parts of them are tried.
    """

    id: ClassVar[str] = "meaningful_perturbation"
    title: ClassVar[str] = "Meaningful perturbation"
    paper: ClassVar[str] = "Fong & Vedaldi 2017"
    taxonomy: ClassVar[Taxonomy] = perturbation(
        strengths="one connected part that matters together, tested by replacing it",
        limits="needs gradients; tens of them; depends on the infill; one of several masks that would do",
    )

    infill: InfillChoice = "blur"
    game: Literal["deletion", "preservation", "both"] = Field(
        "deletion", description="the smallest part that destroys the score when replaced, saves it when kept, or both"
    )
    cell: tuple[float, ...] = Field(
        (), description="size of the mask's cells in mm, for all axes or each; a twelfth of a side if empty"
    )
    area: tuple[float, ...] = Field(
        (),
        description="fractions of the scan that the mask must have, until one is enough; if empty it "
        "is as small as it can be",
    )
    sparsity: float = Field(
        0.3, ge=0, description="what a mask as large as the first that does half of it costs, in units of the score"
    )
    smoothness: float = Field(0.02, ge=0, description="what the surface of the mask costs, likewise")
    steps: int = Field(40, ge=1, le=1000, description="gradients to learn from, for each area")
    jitter: float = Field(0.25, ge=0, le=0.5, description="random shift of the mask in each step, in cells")
    noise: float = Field(
        0.03, ge=0, le=1, description="noise of the scan in each step, as a fraction of each channel's range of values"
    )

    @field_validator("area")
    @classmethod
    def _fractions(cls, area: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 < part < 1 for part in area):
            raise ValueError("areas are fractions of the scan, between 0 and 1")
        return tuple(sorted(area))

    @property
    def signed(self) -> bool:
        return False

    def of_sample(self, question: Question) -> list[Attribution]:
        question.bind()
        chosen = infill(question, self.infill)
        return [self._of_target(one, chosen) for one in _targets(question)]

    def _of_target(self, question: Question, chosen: Infill) -> Attribution:
        fit(question)
        score = _Score(question, chosen, self.game)
        smooth = SmoothMasks.of(question, self.cell, _PER_SIDE)
        matters = _matters(score, smooth, min(_POINTS, self.steps))
        for area in self.area or (None,):
            start, size = self._start(score, smooth, matters, _PARTS if area is None else (area,))
            nodes = self._learned(score, smooth, start, size, area)
            hard = (smooth(nodes) >= 0.5).to(nodes)
            left = score.of_hard(hard, self.steps)
            short = max(_short(deletes, one) for deletes, one in zip(score.deletes, left, strict=True))
            if question.run.unfinished or short <= 1 - _ENOUGH:
                break
        question.run.note(score.said(hard, left))
        return Attribution(smooth(nodes))

    @staticmethod
    def _start(score: _Score, smooth: SmoothMasks, matters: Tensor, parts: Sequence[float]) -> tuple[Tensor, float]:
        """The nodes (1, 1, *nodes) of the smallest of several `parts` that gets half of what is wanted, or else most of
        it, taking first what matters most; and how much of the scan that is."""
        tried: list[tuple[float, Tensor, float]] = []
        for i, part in enumerate(parts):
            score.question.run.step(len(parts) + i, 2 * len(parts), _STARTING)
            e = _part(matters, part)
            score.renew(e, smooth, 0)
            share = smooth(e)
            tried.append((score.objective(share) / len(score.deletes), e, float(share.mean())))
        enough = [one for one in tried if one[0] <= 0.5] or [min(tried, key=lambda one: one[0])]
        return enough[0][1:]

    def _penalty(self, e: Tensor, smooth: SmoothMasks, size: float, area: float | None, at: float) -> Tensor:
        """What the nodes `e` cost besides the score; `at` is how far it has come, 0 to 1."""
        share = smooth(e)
        surface = self.smoothness * smooth.surface(e) / size
        if area is None:
            return surface + self.sparsity * share.mean() / size
        ordered = share.flatten().sort(descending=True).values
        wanted = torch.zeros_like(ordered)
        wanted[: max(1, round(area * len(ordered)))] = 1
        return surface + _AREA[0] * (_AREA[1] / _AREA[0]) ** at * (ordered - wanted).square().mean()

    def _learned(self, score: _Score, smooth: SmoothMasks, start: Tensor, size: float, area: float | None) -> Tensor:
        """The nodes (1, 1, *nodes) of the best mask on the way from `start`."""
        run, flat = score.question.run, score.x.flatten(2)
        spread = (flat.amax(2) - flat.amin(2)).reshape(1, -1, *[1] * len(smooth.size))
        odds, best, lowest = torch.logit(start), start, float("inf")
        mean, square = torch.zeros_like(odds), torch.zeros_like(odds)

        def step(i: int, _: int) -> None:
            nonlocal odds, best, lowest
            generator = run.generator(_DRAWS + i)
            shift = (torch.rand(1, len(smooth.size), generator=generator) - 0.5) * 2 * self.jitter
            noise = self.noise * spread * torch.randn(score.x.shape[1:], generator=generator).to(score.x)
            leaf = odds.detach().requires_grad_()
            e = leaf.sigmoid()
            share, penalty = smooth(e, shift), self._penalty(e, smooth, size, area, i / self.steps)
            if i % _RENEWED == 0:
                score.renew(e.detach(), smooth, i)
            cost, slope = float(penalty.detach()), torch.zeros_like(share)
            for deletes, (left, steep) in zip(score.deletes, score.slopes(share.detach(), noise), strict=True):
                short = _short(deletes, left)
                cost += short
                slope += steep if short else 0
            # A mask of a given area has it in the end only.
            if cost < lowest or area is not None:
                best, lowest = e.detach(), cost
            (g,) = torch.autograd.grad([share, penalty], leaf, [slope, torch.ones_like(penalty)])
            # Adam (Kingma and Ba 2014), whose steps do not depend on how large gradients are.
            mean.lerp_(g, 0.1)
            square.lerp_(g.square(), 0.01)
            odds = odds - _RATE * (mean / (1 - 0.9 ** (i + 1))) / ((square / (1 - 0.99 ** (i + 1))).sqrt() + 1e-12)
            score.question.show(lambda: smooth(best))

        run.chunks(self.steps, 1).map(step, self.title, anytime=True)
        return best


class _Score:
    """What is left of one target's score, as a fraction: 1 of the scan as it is, 0 with everything replaced."""

    def __init__(self, question: Question, chosen: Infill, game: str) -> None:
        self.question, self.infill, self.x = question, chosen, question.x
        self.deletes = {"deletion": (True,), "preservation": (False,), "both": (True, False)}[game]
        everything = self._instead(torch.ones_like(self.x[:, :1]), 0)
        self.instead = [everything for _ in self.deletes]
        with torch.no_grad():
            self.top, self.bottom = (float(question.values(x)[0]) for x in (self.x, everything))
        # Where a network does not care what it is given, rounding is not a change.
        self.scale = max(abs(self.top - self.bottom), 1e-6 * max(1.0, abs(self.top)))
        if self.top <= self.bottom:
            question.run.note(
                f"The score ({self.top:.3g}) is no lower when everything is replaced ({self.bottom:.3g}): nothing "
                "speaks for it, compared with this infill; try another one."
            )

    def renew(self, e: Tensor, smooth: SmoothMasks, draw: int) -> None:
        """Ask the infill again, for a mask of nodes `e`: a cell beyond what is taken, so that the mask can grow."""
        taken = [e if deletes else 1 - e for deletes in self.deletes]
        self.instead = [self._instead((smooth((t > _TAKEN).to(t)) > 0).to(t), draw) for t in taken]

    def objective(self, share: Tensor) -> float:
        """What the score is short of the game's aim with a mask (1, 1, *spatial): 0 is all that is wanted."""
        return sum(_short(deletes, left) for deletes, left in self._left(share, self.instead))

    def of_hard(self, share: Tensor, draw: int) -> list[float]:
        """What is left with a mask of zeros and ones, for which the infill is asked: of each side of the game."""
        instead = [self._instead(share if deletes else 1 - share, draw) for deletes in self.deletes]
        return [left for _, left in self._left(share, instead)]

    def slopes(self, share: Tensor, noise: Tensor | float = 0.0) -> list[tuple[float, Tensor]]:
        """Of each side of the game what it is short of its aim with a mask (1, 1, *spatial), and how fast that grows
        with the mask, if it were not bounded."""
        found = []
        for deletes, instead in zip(self.deletes, self.instead, strict=True):
            x = torch.lerp(self.x, instead, share if deletes else 1 - share)
            leaf, values, _ = _recorded(self.question, x + noise)
            (g,) = self.question.gradients(values[0], [leaf])
            slope = (g * (instead - self.x)).sum(1, keepdim=True) / self.scale
            found.append((self._fraction(values[0].detach()), slope))
        return found

    def said(self, share: Tensor, left: Sequence[float]) -> str:
        """How much a hard mask does, in words."""
        of = {True: "with the mask replaced", False: "with only the mask kept"}
        scores = ", ".join(
            f"{self.top + (one - 1) * self.scale:.3g} {of[deletes]}"
            for deletes, one in zip(self.deletes, left, strict=True)
        )
        spacing, count = self.question.seen[0].spacing, float(share.sum())
        size = f"{count * prod(spacing) / 1000:.3g} mL" if len(spacing) == 3 else f"{count * prod(spacing):.3g} mm²"
        return (
            f"{self.question.bound[0].label}: score {self.top:.3g}, {scores}; the mask (0.5 and more) is "
            f"{float(share.mean()):.2%} of what the network sees, {size}."
        )

    def _left(self, share: Tensor, instead: Sequence[Tensor]) -> Iterator[tuple[bool, float]]:
        for deletes, other in zip(self.deletes, instead, strict=True):
            with torch.no_grad():
                value = self.question.values(torch.lerp(self.x, other, share if deletes else 1 - share))[0]
            yield deletes, self._fraction(value)

    def _fraction(self, value: Tensor) -> float:
        return 1 + (float(value) - self.top) / self.scale

    def _instead(self, region: Tensor, draw: int) -> Tensor:
        with torch.no_grad():
            return self.infill.patches(Masks.everywhere(region), [draw])


def _short(deletes: bool, left: float) -> float:
    """What a side of the game is short of its aim. More than destroyed, or saved, is not asked for: a network can be
    led to any score by changes that mean nothing."""
    return max(0.0, left) if deletes else max(0.0, 1 - left)


def _targets(question: Question) -> Iterator[Question]:
    """Each target as a question of its own. Whoever looks on sees the first."""
    for t, bound in enumerate(question.bound):
        look = question.look if t == 0 else None
        yield replace(question, targets=[bound.target], bound=[bound], look=look)


def _part(matters: Tensor, part: float) -> Tensor:
    """A mask's nodes, high where they matter most, for a `part` of them."""
    flat = matters.flatten()
    top = flat.topk(max(1, round(part * len(flat)))).indices
    return torch.full_like(flat, _LOW).index_fill_(0, top, _HIGH).reshape(matters.shape)


def _matters(score: _Score, smooth: SmoothMasks, points: int) -> Tensor:
    """What each node (1, 1, *nodes) has to do with the score, on the way from the scan to its infill."""
    nodes = torch.ones(1, 1, *smooth.nodes).to(score.x).requires_grad_()
    share = smooth(nodes)
    (weight,) = torch.autograd.grad(share.sum(), nodes, retain_graph=True)
    total = torch.zeros_like(share)
    for i in range(points):
        score.question.run.step(i, 2 * points, _STARTING)
        for _, slope in score.slopes(share.detach() * ((i + 0.5) / points)):
            total -= slope
    (matters,) = torch.autograd.grad(share, nodes, total)
    return matters / weight.clamp_min(1e-3 * float(weight.max()))
