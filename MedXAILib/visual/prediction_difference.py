"""Prediction difference analysis.

Robnik-Šikonja and Kononenko, "Explaining classifications for individual instances", 2008; Zintgraf et al., "Visualizing
deep neural network decisions: prediction difference analysis", 2017; Seo et al., "Regional multi-scale approach for
visually pleasing explanations of deep neural networks", 2020.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import log
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from MedXAILib.engines.masks import Masks, Stream
from MedXAILib.engines.parts import Parts, supervoxel_parts, window_parts
from MedXAILib.engines.perturbation import perturb
from MedXAILib.engines.shapley import student
from MedXAILib.explainer import Attribution, Question, Taxonomy, perturbation
from MedXAILib.infills.choice import InfillChoice, infill
from MedXAILib.infills.infill import Later
from MedXAILib.target import Target
from MedXAILib.visual.log_odds import LogOdds, log_odds
from MedXAILib.visual.perturbing import Perturbing


class PredictionDifference(Perturbing):
    """How much less likely would the decision be if a part of the scan were not known?

    What could be there is drawn many times, given what is around it, and the probabilities averaged. A voxel gets the
    mean over the parts that hold it, and over the sizes of parts. Weight of evidence is how many bits the odds of the
    class lose; so that certainty does not make it infinite, a probability p is taken as (p N + 1) / (N + K), with N
    training examples and K classes.
    """

    id: ClassVar[str] = "prediction_difference"
    title: ClassVar[str] = "Prediction difference"
    paper: ClassVar[str] = "Zintgraf 2017"
    taxonomy: ClassVar[Taxonomy] = perturbation(
        strengths="asks what is not known instead of what is covered: what stands in is plausible; in bits of evidence",
        limits="many forwards; what is predictable from its surroundings counts for nothing; only as good as its draws",
    )

    infill: InfillChoice = "gaussian"
    window: tuple[float, ...] = Field(
        (),
        description="sizes of the parts in mm; the maps of several are averaged; a sixth of the shortest side if empty",
    )
    parts: Literal["windows", "supervoxels"] = Field(
        "windows", description="what is taken away at a time: cubes, or supervoxels along the edges of the scan (SLIC)"
    )
    stride: float = Field(0.0, ge=0, description="step between windows in mm; 0 is the window's own size")
    samples: int = Field(10, ge=1, le=1000, description="draws of what could be in a part")
    difference: Literal["weight_of_evidence", "probability", "score"] = Field(
        "weight_of_evidence", description="what is compared: bits of evidence, the probability, or the score (logit)"
    )
    training_size: int = Field(
        10_000,
        ge=1,
        description="training examples of the network, which say how sure it may be (Laplace's correction)",
    )

    def of_sample(self, question: Question) -> list[Attribution]:
        asked = self._asked(question)
        drawing = infill(question, self.infill)
        samples = self.samples if drawing.random else 1
        found: list[_Drawn] = []

        def so_far(target: int) -> Attribution:
            at = at_sample[target].double().cpu()
            return _mean([self._map(asked.bound[target].target, at, drawn, target) for drawn in found])

        with torch.no_grad():
            at_sample = asked.values(asked.x)
            every, first = self._parts(asked), 0
            for parts in every:
                found.append(_Drawn(parts, samples, len(at_sample)))
                stream = Stream(parts.count * samples, parts.box, _masks(parts, samples))
                title = self.title if len(every) == 1 else f"{self.title}, size {len(found)} of {len(every)}"

                def take(start: int, _masks: Masks, values: list[Tensor]) -> None:
                    pairs = zip(asked.bound, values, strict=True)
                    found[-1].take(start, torch.stack([_likely(bound.target, value) for bound, value in pairs]))
                    question.show(lambda: so_far(0).values)

                perturb(asked, stream, Later(drawing, first), take, title)
                first += stream.count
                if question.run.unfinished:
                    break
        maps = [so_far(target) for target in range(len(at_sample))]
        return [Attribution(m.values.to(question.x), {}, m.interval if samples > 1 else None) for m in maps]

    def _asked(self, question: Question) -> Question:
        """`question` about probabilities where there are any, unless it is the score that is wanted."""
        if self.difference == "score":
            return question
        odds = log_odds(question)
        for bound, likely in zip(question.bound, odds, strict=True):
            if likely is None:
                question.run.note(f"There is no probability of {bound.label}: the map is the change of its score.")
        if not any(odds):
            return question
        targets = [likely or bound.target for likely, bound in zip(odds, question.bound, strict=True)]
        return replace(question, targets=targets, bound=[])

    def _map(self, target: Target, at_sample: Tensor, drawn: _Drawn, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """The sum at each voxel over the parts that hold it of what each makes out, of the squares of the half widths
        of their 95 % confidence intervals, and how many parts there are."""
        known, mean, half = drawn.known, drawn.mean(index), drawn.half(index)
        at = _likely(target, at_sample)
        if isinstance(target, LogOdds) and self.difference == "weight_of_evidence":
            n, k = self.training_size, target.classes
            surely, at = ((p * n + 1) / (n + k) for p in (mean, at))
            half = half * n / (n + k) / (surely * (1 - surely) * log(2))
            values = at.logit() / log(2) - surely.logit() / log(2)
        else:
            values = at - mean
        paint = drawn.parts.paint
        return paint(values * known), paint(half.square() * known), paint(known.double())

    def _parts(self, question: Question) -> list[Parts]:
        """What is taken away at a time, for each of the sizes."""
        x, spacing = question.x, question.seen[0].spacing
        if self.parts == "supervoxels":
            return [supervoxel_parts(x, spacing, size) for size in self.window or (None,)]
        stride = (self.stride,) if self.stride else ()
        sides: list[tuple[float, ...]] = [(size,) for size in self.window] or [()]
        return [window_parts(x, spacing, side, stride) for side in sides]


def _masks(parts: Parts, samples: int) -> Callable[[int, int], Masks]:
    """Every part `samples` times, one after the other."""
    return lambda start, stop: parts.masks(torch.arange(start, stop) // samples)


class _Drawn:
    """What was said of each of some `parts`, draw by draw."""

    def __init__(self, parts: Parts, samples: int, targets: int) -> None:
        self.parts, self.samples = parts, samples
        self._said = torch.zeros(targets, parts.count * samples, dtype=torch.float64)
        self._counts = torch.zeros(parts.count, dtype=torch.long)

    def take(self, start: int, values: Tensor) -> None:
        """The values (T, M) of draws from number `start`."""
        stop = start + values.shape[1]
        self._said[:, start:stop] = values
        self._counts = (stop - torch.arange(self.parts.count) * self.samples).clamp(0, self.samples)

    @property
    def known(self) -> Tensor:
        """Of which parts there is more than one draw, if there should be: (count,)."""
        return self._counts >= min(2, self.samples)

    def mean(self, target: int) -> Tensor:
        """The mean over the draws of each part, (count,)."""
        return self._said[target].reshape(-1, self.samples).sum(1) / self._counts.clamp_min(1)

    def half(self, target: int) -> Tensor:
        """Half the width of the 95 % confidence interval of each mean, (count,)."""
        draws, counts = self._said[target].reshape(-1, self.samples), self._counts.clamp_min(2)
        away = (draws - self.mean(target)[:, None]) * (torch.arange(self.samples) < self._counts[:, None])
        error = (away.square().sum(1) / (counts - 1) / counts).sqrt()
        wide = {n: student(n - 1) for n in set(counts.tolist())}
        return error * torch.tensor([wide[n] for n in counts.tolist()], dtype=torch.float64)


def _likely(target: Target, value: Tensor) -> Tensor:
    """A probability where that is what was asked for, else the value itself."""
    value = value.double().cpu()
    return value.sigmoid() if isinstance(target, LogOdds) else value


def _mean(maps: list[tuple[Tensor, Tensor, Tensor]]) -> Attribution:
    """The mean over parts, and then over the sizes of parts, of their sums, squared half widths and numbers."""
    totals, squares, counts = (torch.stack(of_sizes) for of_sizes in zip(*maps, strict=True))
    sizes = (counts > 0).sum(0).clamp_min(1)
    values = (totals / counts.clamp_min(1)).sum(0) / sizes
    half = (squares / counts.clamp_min(1).square()).sum(0).sqrt() / sizes
    return Attribution(values, {}, half)
