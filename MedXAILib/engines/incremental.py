"""Exact incremental inference: of a network that has looked at a sample, only what a small change of it can change is
computed again."""

from __future__ import annotations

import torch
from torch import Tensor

from MedXAILib.engines.changes import Change
from MedXAILib.engines.looking import Diverged, look, look_again, paste
from MedXAILib.engines.masks import Stream
from MedXAILib.engines.perturbation import Evaluator, Plain, changed, filled
from MedXAILib.engines.seeing import Unseen
from MedXAILib.explainer import Question
from MedXAILib.infills.infill import Infill
from MedXAILib.run import out_of_memory

# How many changes are also asked about as whole samples, and by how many roundings their answers may differ.
_TRIED, _ROUNDING = 2, 100

# It is worth it when it saves so much of the work.
_WORTH = 0.7

# While one operator works, there are about so many tensors as large as the largest.
_HELD = 4

# Multiplications in comparison with which it costs little to ask for them.
_BUSY = 5e8

# Layers near the output are small, and gain from larger batches than the others.
_MORE = 4

# Draws of what is tried are far from others.
_DRAW = 900_000

# What of the memory budget may hold what is known of the sample as it is.
_KEPT = 0.5


def together(work: float) -> int:
    """How many changes that take so much `work` to look at together: on a CPU just enough to keep it busy."""
    return max(1, round(_BUSY / work))


class Incremental(Evaluator):
    """Asks only about what a change can change."""

    def __init__(self, question: Question) -> None:
        self.question = question
        self.at_sample, self.looked = question.values(question.x), look(question, question.x)
        self.size = self.together = 1
        self.work: list[float] = []
        """About how many multiplications each step took of the change that was tried last."""

    def values(self, patches: Tensor, low: Tensor) -> list[Tensor]:
        # Those alike near borders come together.
        beyond = torch.tensor(self.looked.shape[1:]) - torch.tensor(patches.shape[2:]) - low
        order = sorted(range(len(low)), key=low.minimum(beyond).tolist().__getitem__)
        back = torch.tensor(order).argsort().to(patches.device)
        change = Change(patches[order], low[order])
        try:
            found, _ = look_again(self.question, self.looked, change, self.together)
        except Diverged:
            return Plain(self.question).values(patches, low)
        return [value[back] for value in found]

    def pays(self, patches: Tensor, low: Tensor) -> bool:
        """Whether asking about one change takes so much less work than about a whole sample that it is worth it, and
        says the same.

        Raises:
            Diverged: when it does not.
        """
        x, run = self.question.x, self.question.run
        found, mode = look_again(self.question, self.looked, Change(patches, low))
        self.work = mode.work
        share = sum(mode.work) / self.looked.work
        self.together = together(sum(mode.work))
        self.size = run.fitting(_HELD * mode.nbytes, int(share * x[0, 0].numel()) // _MORE, x.device)
        if share > _WORTH:
            return False
        small = _ROUNDING * torch.finfo(x.dtype if run.precision is None else getattr(torch, run.precision)).eps
        for one, other, at in zip(found, self.question.values(filled(x, patches, low)), self.at_sample, strict=True):
            scale = at.abs().maximum(other.abs())
            if not ((one - other).abs() <= 1e-3 * (other - at).abs() + small * scale).all():
                raise Diverged("What was computed of changes alone is not what the network says.")
        return True


class Chain:
    """Samples that begin as `start` (M, C, *spatial), so many looked at `together`, and change step by step: every
    change stays."""

    def __init__(self, question: Question, start: Tensor, together: int = 1) -> None:
        self.question, self.together = question, together
        self.looked = look(question, start.clone())

    def step(self, patches: Tensor, low: Tensor) -> list[Tensor]:
        """Put `patches` (M, C, *box) at `low` (M, rank); each target's value (M,) then."""
        kept = self.looked.kept
        values, mode = look_again(self.question, self.looked, Change(patches, low), self.together, kept)
        for number, what in mode.now.items():
            if isinstance(what, Tensor):
                kept[number] = what
            else:
                paste(kept[number], what)
        return values


def incremental(question: Question, stream: Stream, infill: Infill) -> Evaluator:
    """The cheap way to ask about the masks of a `stream` with an `infill`; or, where the network looks at
    all of the sample at once or cannot be looked into, the plain one.

    It is tried on random masks first, and must say of them what the network says of whole samples.
    """
    run = question.run
    try:
        asked = Incremental(question)
    except Unseen:
        return Plain(question)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return Plain(question)
    plain, looked = Plain(question), asked.looked
    of_local = sum(step.work for step in looked.steps if step.local is not None)
    if of_local < (1 - _WORTH) * looked.work or looked.nbytes > _KEPT * run.budget(question.x.device):
        return plain
    try:
        for i in torch.randperm(stream.count, generator=run.generator(_DRAW))[:_TRIED].tolist():
            masks = stream.make(i, i + 1)
            if not asked.pays(changed(question.x, masks, infill, [i]), masks.low):
                return plain
    except Diverged as error:
        run.note(f"{error} So whole scans were asked about, which takes longer.")
        return plain
    return asked
