"""Does the answer go when what the map marks goes, and stay when only that stays?

Samek et al., "Evaluating the visualization of what a deep neural network has learned", 2017 (most and least relevant
first); Petsiuk et al., "RISE", 2018 (deletion and insertion); Rong et al., "A consistent and efficient evaluation
strategy for attribution methods", 2022 (ROAD: what is taken away is filled in from its surroundings, with noise).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from MedXAILib.engines.masks import Masks, Stream
from MedXAILib.engines.perturbation import perturb
from MedXAILib.explainer import Question
from MedXAILib.infills.choice import infill
from MedXAILib.infills.infill import Infill
from MedXAILib.infills.inpainting import Inpainting
from MedXAILib.trust.finding import Finding, light
from MedXAILib.trust.judged import Judged

TITLE = "Does the answer depend on what the map marks?"
STEPS = 12
"""Points of a curve; they lie closer where little is taken away, because lesions are small."""

# The score, 0 by chance, from which the light is green, and yellow. Of maps that know nothing of the network a fifth is
# beyond the one and half beyond the other (docs/measured-table-5.md): a smooth spot on tissue takes much away.
_GOOD, _FAIR = 0.8, 0.4

# Noise of ROAD, as a share of the scan's spread, so that a network cannot tell what is filled in by its smoothness.
_NOISE = 0.01


class NoisyImputation(Inpainting):
    """What is smoothest given the surroundings, in millimetres, with noise: ROAD's imputation on a grid of any rank."""

    def patches(self, masks: Masks, draws: Sequence[int]) -> Tensor:
        smooth = super().patches(masks, draws)
        noise = torch.stack([self._noise(smooth[0], draw) for draw in draws])
        return smooth + _NOISE * self.spread.reshape(1, -1, *[1] * (smooth.ndim - 2)) * noise

    def _noise(self, like: Tensor, draw: int) -> Tensor:
        return torch.randn(like.shape, generator=self.question.run.generator(draw)).to(like)


@dataclass(frozen=True)
class Curves:
    """What is left of the answer, 1 for the scan and 0 for the scan with everything replaced, when a share `shares`
    (F,) of the voxels is replaced (`deletion`) or is all that is not (`insertion`), the most relevant first."""

    shares: Tensor
    deletion: Tensor
    insertion: Tensor

    @property
    def areas(self) -> tuple[float, float]:
        """The areas under deletion and insertion."""
        return (float(torch.trapezoid(self.deletion, self.shares)), float(torch.trapezoid(self.insertion, self.shares)))

    @property
    def score(self) -> float:
        """Insertion less deletion: 0 by chance, negative when the least relevant matters most; above 1 where a part
        that is replaced moves the answer further than all of it."""
        deletion, insertion = self.areas
        return insertion - deletion


def curves(question: Question, order: Tensor, infill: Infill, steps: int = STEPS) -> Curves | None:
    """The curves of a map `order` (*spatial) of the first target of a question about one sample; None when the answer
    is the same with everything replaced, so that there is nothing to lose. Ties are broken at random."""
    shares = torch.linspace(0, 1, steps + 1, dtype=torch.float64) ** 2
    flat = order.flatten()
    shuffled = torch.randperm(len(flat), generator=question.run.generator(0))
    rank = torch.empty(len(flat), dtype=torch.long)
    rank[shuffled[flat[shuffled].argsort(descending=True, stable=True)]] = torch.arange(len(flat))
    counts = (shares * len(flat)).round().long()
    # To delete so much, or to replace all but so much; the ends are the scan and nothing of it.
    ways = [(int(n), inserted) for inserted in (False, True) for n in counts[1:-1]] + [(len(flat), False)]
    values = torch.empty(len(ways), dtype=torch.float64)

    def make(start: int, stop: int) -> Masks:
        taken = [(rank >= n) if inserted else (rank < n) for n, inserted in ways[start:stop]]
        return Masks.everywhere(torch.stack(taken).reshape(-1, 1, *order.shape).to(question.x))

    def take(start: int, masks: Masks, found: list[Tensor]) -> None:
        values[start : start + len(masks)] = found[0].double().cpu()

    stream = Stream(len(ways), tuple(order.shape), make)
    (at_sample, *_), done = perturb(question, stream, infill, take, "Deletion and insertion")
    whole, nothing = float(at_sample), float(values[-1])
    if done < len(ways) or abs(whole - nothing) <= 1e-6 * max(abs(whole), abs(nothing)):
        return None
    left = (values - nothing) / (whole - nothing)
    one, zero = left.new_ones(1), left.new_zeros(1)
    deletion, insertion = left[: steps - 1], left[steps - 1 : -1]
    return Curves(shares, torch.cat([one, deletion, zero]), torch.cat([zero, insertion, one]))


def judge(judged: Judged, infills: Sequence[str] = ("blur", "road"), steps: int = STEPS) -> Finding:
    """Deletion and insertion with several infills: any one of them makes scans that no network has seen."""
    values: dict[str, float] = {}
    with judged.asked() as (question, map):
        for name in infills:
            made = NoisyImputation(question) if name == "road" else infill(question, name)
            found = curves(question, map, made, steps)
            if found is not None:
                deletion, insertion = found.areas
                values |= {
                    f"{name}: deletion": deletion,
                    f"{name}: insertion": insertion,
                    f"{name}: score": found.score,
                }
    say = partial(Finding, "faithfulness", TITLE, values=values)
    scores = [value for name, value in values.items() if name.endswith("score")]
    if not scores:
        return say("The answer stays the same when the whole scan is replaced, so nothing can be said.", light=None)
    score = sum(scores) / len(scores)
    colour = light(score, _GOOD, _FAIR)
    sentence = {
        "good": "The answer goes when what the map marks is replaced, and comes back when only that is shown",
        "fair": "The answer depends more on what the map marks than on the rest, as with many a map that knows nothing "
        "of the network",
        "poor": "The answer depends little on what the map marks: other places matter as much or more",
    }[colour]
    return say(f"{sentence} (score {score:.2f}; 0 by chance, the more the better).", light=colour)
