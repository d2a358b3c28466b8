"""Do the map's values say how much of the answer each place holds?

Random places are taken away together, and what the map says they hold is compared with what the answer loses.

Ancona et al., "Towards better understanding of gradient-based attribution methods", 2018 (sensitivity-n); Yeh et al.,
"On the (in)fidelity and sensitivity of explanations", 2019 (infidelity).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from MedXAILib.engines.masks import Masks, Stream
from MedXAILib.engines.perturbation import perturb
from MedXAILib.explainer import Question
from MedXAILib.infills.choice import infill
from MedXAILib.infills.infill import Infill
from MedXAILib.supervoxels import grid
from MedXAILib.trust.finding import Finding, light
from MedXAILib.trust.judged import Judged

TITLE = "Do its values mean amounts?"
SAMPLES = 32
"""Sets of places that are tried."""

# Shares of the places that are taken away together, in turn.
_SHARES = (0.1, 0.3, 0.5, 0.7)

# About so many places along the shortest side: fewer say nothing of where, more are each too small to matter.
_PLACES = 5

# The correlation from which the light is green, and yellow.
_GOOD, _FAIR = 0.6, 0.3


@dataclass(frozen=True)
class Additivity:
    """For each of M sets of places: what the map says they hold, `foreseen` (M,), what the answer loses without them,
    `lost` (M,), and what share of all places they are, `shares` (M,)."""

    foreseen: Tensor
    lost: Tensor
    shares: Tensor

    @property
    def sensitivity_n(self) -> float:
        """Pearson's correlation of the two, for each share on its own, and their mean."""
        found = [self._correlation(self.shares == share) for share in self.shares.unique()]
        return sum(found) / len(found)

    @property
    def infidelity(self) -> float:
        """The mean squared difference after the best scaling of the map, in units of the mean squared loss: 0 when
        the map foresees everything, 1 when it foresees nothing."""
        beta = (self.foreseen * self.lost).sum() / self.foreseen.square().sum().clamp_min(1e-300)
        return float((beta * self.foreseen - self.lost).square().mean() / self.lost.square().mean().clamp_min(1e-300))

    def _correlation(self, of: Tensor) -> float:
        return float(torch.corrcoef(torch.stack([self.foreseen[of], self.lost[of]]))[0, 1].nan_to_num(0.0))


def additivity(question: Question, map: Tensor, infill: Infill, samples: int = SAMPLES) -> Additivity:
    """Take away random sets of cubes of a sample, and compare with a `map` (*spatial) of the first target."""
    spacing = question.seen[0].spacing
    side = min(n * step for n, step in zip(map.shape, spacing, strict=True)) / _PLACES
    places = torch.from_numpy(grid(map.shape, spacing, side)).long()
    count = int(places.max()) + 1
    shares = torch.tensor([_SHARES[i % len(_SHARES)] for i in range(samples)], dtype=torch.float64)
    generator = question.run.generator(1)
    chosen = torch.zeros(samples, count)
    for row, share in zip(chosen, shares, strict=True):
        row[torch.randperm(count, generator=generator)[: max(1, round(float(share) * count))]] = 1
    holds = torch.zeros(count, dtype=torch.float64).scatter_add(0, places.flatten(), map.flatten().double())
    lost = torch.zeros(samples, dtype=torch.float64)

    def make(start: int, stop: int) -> Masks:
        return Masks.everywhere(chosen[start:stop][:, places][:, None].to(question.x))

    def take(start: int, masks: Masks, found: list[Tensor]) -> None:
        lost[start : start + len(masks)] = -found[0].double().cpu()

    (at_sample, *_), done = perturb(question, Stream(samples, tuple(map.shape), make), infill, take, "Additivity")
    lost += float(at_sample)
    return Additivity((chosen.double() @ holds)[:done], lost[:done], shares[:done])


def judge(judged: Judged, samples: int = SAMPLES) -> Finding:
    """Sensitivity-n and infidelity, with the scan's blurred self instead of what is taken away."""
    with judged.asked() as (question, map):
        found = additivity(question, map, infill(question, "blur"), samples)
    value = found.sensitivity_n
    colour = light(value, _GOOD, _FAIR)
    sentence = {
        "good": "The values of the map foresee well what the answer loses without parts of the scan",
        "fair": "The values of the map foresee roughly what the answer loses without parts of the scan",
        "poor": "The values of the map do not foresee what the answer loses without parts of the scan: read them as "
        "places, not as amounts",
    }[colour]
    return Finding(
        "additivity",
        TITLE,
        f"{sentence} (correlation {value:.2f}).",
        colour,
        {"sensitivity-n": value, "infidelity": found.infidelity},
    )
