"""Which of many changes matter most: all are estimated to first order, and the most promising ones asked about.

The network is cut where little has been computed of a change yet. Up to there the change is followed exactly; what
follows is replaced by its gradient. That costs a tenth of asking, and knows saturated and dead units of the first
layers, which a gradient at the scan does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from MedXAILib.engines.boxes import cut as boxes
from MedXAILib.engines.changes import Change
from MedXAILib.engines.incremental import Incremental, together
from MedXAILib.engines.looking import Changing, Cut, Looked, Looking, Reached
from MedXAILib.engines.masks import Stream
from MedXAILib.engines.perturbation import changed, evaluator
from MedXAILib.engines.seeing import intercepting
from MedXAILib.explainer import Question
from MedXAILib.infills.infill import Infill

# So many of the changes are asked about because they promise much, at least, and in a sample of the others.
_PROMISING, _SAMPLED, _LEAST = 0.1, 0.03, 10

# Draws of the sample are far from others.
_DRAW = 950_000

# What of the work for a change may be spent on an estimate of it.
_SPENT = 0.1


def cut_of(looked: Looked, work: Sequence[float]) -> Cut:
    """The latest place in a network up to which a change takes no more than a small part of the `work` of its steps."""
    allowed = _SPENT * sum(work)
    steps = sum(spent <= allowed for spent in accumulate(work))
    made = {0, *(number for step in looked.steps[:steps] for number in step.made)}
    return Cut(steps, frozenset(made & {number for step in looked.steps[steps:] for number in step.given}))


class Screening:
    """Estimates of what changes do to each target, to first order where a network is cut."""

    def __init__(self, asked: Incremental) -> None:
        self.asked, self.question = asked, asked.question
        self.cut = cut_of(asked.looked, asked.work)
        self.together = together(sum(asked.work[: self.cut.steps]) + 1)
        mode = Looking(self.cut)
        with intercepting(self.question.model, mode):
            values = self.question.values(mode.start(self.question.x))
        self.at = {number: leaf.detach() for number, leaf in mode.leaves.items()}
        last = len(values) - 1
        self.gradients = [
            dict(zip(mode.leaves, self.question.gradients(v, list(mode.leaves.values()), keep=t < last), strict=True))
            for t, v in enumerate(values)
        ]

    def __call__(self, patches: Tensor, low: Tensor) -> Tensor:
        """The estimated change of each target's value, (M, T)."""
        mode = Changing(self.asked.looked, self.together, self.cut)
        try:
            with intercepting(self.question.model, mode):
                self.question.values(mode.start(Change(patches, low)))
        except Reached:
            pass
        rows = [sum(self._of(mode.now[n], self.at[n], g[n]) for n in self.at) for g in self.gradients]
        return torch.stack([torch.as_tensor(row) for row in rows], 1).double().cpu()

    @staticmethod
    def _of(now: Tensor | tuple[Change, ...], at: Tensor, gradient: Tensor) -> Tensor:
        """What has become of a tensor, less what it was, times its gradient: (M,)."""
        if isinstance(now, Tensor):
            return ((now - at) * gradient).flatten(1).sum(1)
        parts = []
        for change in now:
            differs = change.values - boxes(at, change.low, change.box)
            parts.append((differs * boxes(gradient, change.low, change.box)).flatten(1).sum(1))
        return torch.cat(parts)


@dataclass(frozen=True)
class Strongest:
    """What M changes do to each target: `lost` (M, T), which is only estimated where it was not `asked` (M,); and how
    that went, in words."""

    lost: Tensor
    asked: Tensor
    said: str


def strongest(
    question: Question, stream: Stream, infill: Infill, top: int, show: Callable[[Tensor, Tensor], None], title: str
) -> Strongest | None:
    """The `top` masks of a `stream` that change a target most, found by asking about few of them; None where all have
    to be asked, because the network looks at all of a sample at once. `show` gets what is lost (M,) of the first
    target, and where that is known (M,)."""
    asked = evaluator(question, stream, infill)
    if not isinstance(asked, Incremental):
        return None
    screening, run, count = Screening(asked), question.run, stream.count
    lost = torch.zeros(count, len(question.targets), dtype=torch.float64)

    def estimate(start: int, stop: int) -> None:
        masks = stream.make(start, stop)
        lost[start:stop] = -screening(changed(question.x, masks, infill, range(start, stop)), masks.low)

    run.chunks(count, round(asked.size / _SPENT)).map(estimate, f"{title}: estimates")
    # Of several targets the greatest promise counts.
    promise = (lost.abs() / lost.abs().amax(0).clamp_min(1e-300)).amax(1)
    many = min(count, max(2 * top, round(_PROMISING * count)))
    first, others = promise.argsort(descending=True).split([many, count - many])
    drawn = others[torch.randperm(len(others), generator=run.generator(_DRAW))]
    drawn = drawn[: max(_LEAST, round(_SAMPLED * len(others)))]
    order, known = torch.cat([drawn, first]), torch.zeros(count, dtype=torch.bool)
    estimates, at = lost.clone(), torch.stack(asked.at_sample, 1).double().cpu()
    guessed = estimates.abs()

    def ask(start: int, stop: int) -> None:
        if start > len(drawn) and _settled(lost.abs()[known], guessed[known], guessed[order[start:]], top):
            return
        some = order[start:stop]
        each = [stream.make(i, i + 1) for i in some.tolist()]
        given = [changed(question.x, masks, infill, [i]) for i, masks in zip(some.tolist(), each, strict=True)]
        values = asked.values(torch.cat(given), torch.cat([masks.low for masks in each]))
        lost[some], known[some] = at - torch.stack(values, 1).double().cpu(), True
        show(lost[:, 0], known)

    run.chunks(len(order), asked.size).map(ask, title, anytime=True)
    # Estimates are too large where much saturates: those that were asked about tell by how much.
    scale = (lost * estimates)[known].sum(0) / estimates[known].square().sum(0).clamp_min(1e-300)
    lost[~known] = estimates[~known] * scale
    sampled = torch.zeros_like(known)
    sampled[drawn] = True
    return Strongest(lost, known, _said(lost[:, 0].abs(), known, sampled & known, top))


def _settled(found: Tensor, guessed: Tensor, left: Tensor, top: int) -> bool:
    """Whether none of those `left` (L, T) is likely to be among the `top` strongest, judged by how well those that were
    asked about (M, T) had been `guessed`."""
    if len(found) < max(top, _LEAST):
        return False
    slope = (found * guessed).sum(0) / guessed.square().sum(0).clamp_min(1e-300)
    missed = (found - slope * guessed).abs().amax(0)
    return bool((slope * left.amax(0) + missed < found.topk(top, 0).values[-1]).all())


def _said(lost: Tensor, known: Tensor, drawn: Tensor, top: int) -> str:
    """How much may have been missed, judged by those that were `drawn` of what promised little."""
    count, others, sample = len(lost), ~known | drawn, lost[drawn]
    text = f"{int(known.sum())} of {count} windows were asked about; the others are estimates."
    if len(sample) < 2:
        return text
    rest = int(others.sum())
    missed, half = rest * float(sample.mean()), 1.96 * rest * float(sample.std()) / len(sample) ** 0.5
    whole = missed + float(lost[known & ~drawn].sum())
    least = lost[known].topk(min(top, int(known.sum()))).values[-1]
    stronger = int((sample >= least).sum())
    return (
        f"{text} Judged by {len(sample)} drawn at random, those that promised little hold {missed / whole:.0%} "
        f"± {half / whole:.0%} of all that windows lose, and {stronger} of the {len(sample)} belong among the {top} "
        "strongest."
    )
