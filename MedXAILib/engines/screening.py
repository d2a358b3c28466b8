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
from MedXAILib.engines.incremental import Changing, Cut, Incremental, Looked, Looking, Reached, together
from MedXAILib.engines.masks import Masks, Stream
from MedXAILib.engines.perturbation import changed, evaluator
from MedXAILib.engines.seeing import intercepting
from MedXAILib.explainer import Question
from MedXAILib.infills.infill import Infill

# So many of the changes are asked about because they promise much, at least, and in a sample of the others.
_PROMISING, _SAMPLED, _LEAST = 0.05, 0.03, 10

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

    def patches(masks: Masks, draws: range) -> Tensor:
        return changed(question.x, masks, infill, draws)

    asked = evaluator(question, stream, patches)
    if not isinstance(asked, Incremental):
        return None
    screening, run, count = Screening(asked), question.run, stream.count
    lost = torch.zeros(count, len(question.targets), dtype=torch.float64)

    def estimate(start: int, stop: int) -> None:
        masks = stream.make(start, stop)
        lost[start:stop] = -screening(patches(masks, range(start, stop)), masks.low)

    run.chunks(count, round(asked.size / _SPENT)).map(estimate, f"{title}: estimates")
    many = min(count, max(2 * top, round(_PROMISING * count)))
    promising = torch.zeros(count, dtype=torch.bool)
    promising[lost.abs().topk(many, 0).indices.flatten()] = True
    others = (~promising).nonzero()[:, 0]
    drawn = others[
        torch.randperm(len(others), generator=run.generator(_DRAW))[: -(-len(others) // round(1 / _SAMPLED))]
    ]
    # The most promising first.
    first = promising.nonzero()[:, 0]
    order = torch.cat([first[lost[first, 0].abs().argsort(descending=True)], drawn]).tolist()
    known = torch.zeros(count, dtype=torch.bool)
    at = torch.stack(asked.at_sample, 1).double().cpu()

    def ask(start: int, stop: int) -> None:
        some = order[start:stop]
        each = [stream.make(i, i + 1) for i in some]
        given = [patches(masks, range(i, i + 1)) for i, masks in zip(some, each, strict=True)]
        values = asked.values(torch.cat(given), torch.cat([masks.low for masks in each]))
        lost[some], known[some] = at - torch.stack(values, 1).double().cpu(), True
        show(lost[:, 0], known)

    run.chunks(len(order), asked.size).map(ask, title, anytime=True)
    return Strongest(lost, known, _said(lost[:, 0].abs(), promising & known, drawn[known[drawn]], top))


def _said(lost: Tensor, promising: Tensor, drawn: Tensor, top: int) -> str:
    """How much may have been missed, judged by those that were `drawn` of what promised little."""
    count, rest = len(lost), int((~promising).sum())
    text = f"{int(promising.sum()) + len(drawn)} of {count} windows were asked about; the others are estimates."
    if len(drawn) < 2:
        return text
    missed, half = rest * float(lost[drawn].mean()), 1.96 * rest * float(lost[drawn].std()) / len(drawn) ** 0.5
    whole = missed + float(lost[promising].sum())
    weakest = lost[promising].topk(min(top, int(promising.sum()))).values[-1]
    stronger = float((lost[drawn] > weakest).double().mean())
    return (
        f"{text} Judged by {len(drawn)} of them drawn at random, the windows that promised little hold "
        f"{missed / whole:.0%} ± {half / whole:.0%} of all that windows lose, and {stronger:.0%} of them belong among "
        f"the {top} strongest."
    )
