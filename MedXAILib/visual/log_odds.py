"""The probability that a network gives a class, as log-odds, which stay precise where it is nearly 0 or 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from MedXAILib.explainer import Question
from MedXAILib.model import Model, Prepared
from MedXAILib.target import Bound, ClassTarget, Target


@dataclass(frozen=True)
class LogOdds(Target):
    """The log-odds of the probability of what `of` explains; `classes` says among how many, once it is bound."""

    of: ClassTarget = field(default_factory=ClassTarget)
    classes: int = 2

    def bind(self, model: Model, output: Tensor, seen: Sequence[Prepared]) -> Bound:
        bound = self.of.bind(model, output, seen)
        definite = bound.target
        assert isinstance(definite, ClassTarget) and isinstance(definite.which, int)
        own = model.task in ("multilabel", "ordinal")
        count = max(2, output.shape[1])
        chosen = definite.which
        against = None if definite.versus is None else model.class_index(definite.versus, count)

        def value(output: Tensor) -> Tensor:
            # Of one score the other class has its negative where it is asked by itself, and zero in a softmax.
            other = -output if own else torch.zeros_like(output)
            scores = torch.cat([other, output], 1) if output.shape[1] == 1 else output
            if against is not None:
                return scores[:, chosen] - scores[:, against]
            if own:
                return scores[:, chosen]
            others = [k for k in range(count) if k != chosen]
            return scores[:, chosen] - scores[:, others].logsumexp(1)

        classes = 2 if own or against is not None else count
        return Bound(replace(self, of=definite, classes=classes), value, bound.label)


def log_odds(question: Question) -> list[LogOdds | None]:
    """For each target of `question`, which holds one sample, that of its probability, where it has one."""
    question.bind()
    likely = question.model.task in ("classification", "multilabel", "ordinal")
    return [
        LogOdds(of=target) if likely and isinstance(target, ClassTarget) and target.layer is None else None
        for target in (bound.target for bound in question.bound)
    ]
