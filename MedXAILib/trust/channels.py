"""Which of the scan's channels (modalities) does the answer come from, and does the map say so?

Jin, Li and Hamarneh, "Evaluating explainable AI on a multi-modal medical imaging task", 2022 (modality importance by
Shapley values).
"""

from __future__ import annotations

from itertools import product
from math import comb

import torch
from torch import Tensor

from MedXAILib.engines.perturbation import Plain
from MedXAILib.errors import MedXAIError
from MedXAILib.explainer import Question
from MedXAILib.trust.finding import Finding
from MedXAILib.trust.judged import Judged
from MedXAILib.visual.baseline import baseline

TITLE = "Which channel does the answer come from?"
MOST = 8
"""Channels: all 2^C sets of them are asked about."""


def judge(judged: Judged) -> Finding | None:
    """The share of each channel in what the answer loses without any; None for a scan of one channel.

    Raises:
        MedXAIError: when there are more than `MOST`.
    """
    with judged.asked() as (question, _):
        count = question.x.shape[1]
        if count == 1:
            return None
        if count > MOST:
            raise MedXAIError(f"This scan has {count} channels, too many to try all sets of them ({MOST} at most).")
        shares = shapley(question, baseline(question, "mean"))
    first = int(shares.abs().argmax())
    weight = float(shares[first].abs() / shares.abs().sum().clamp_min(1e-300))
    values = {f"channel {i}": float(share) for i, share in enumerate(shares)}
    data = judged.explanation.data
    said = ""
    if len(data) == count:
        mass = data.flatten(1).double().abs().sum(1)
        values |= {f"map in channel {i}": float(m / mass.sum().clamp_min(1e-300)) for i, m in enumerate(mass)}
        strongest = int(mass.argmax())
        said = "; so does most of the map" if strongest == first else f"; most of the map is in channel {strongest}"
    return Finding(
        "channels",
        TITLE,
        f"Most of the answer ({weight:.0%}) comes from channel {first}{said}.",
        None,
        values,
    )


def shapley(question: Question, instead: Tensor) -> Tensor:
    """The Shapley value (C,) of each channel of a sample for the first target, a channel that is taken away being
    `instead` (1, C, *spatial): from all sets of channels, so exact."""
    x, count = question.x, question.x.shape[1]
    sets = torch.tensor(list(product((False, True), repeat=count)))
    values = torch.empty(len(sets), dtype=torch.float64)

    def ask(start: int, stop: int) -> None:
        present = sets[start:stop].to(x.device).reshape(-1, count, *[1] * (x.ndim - 2))
        values[start:stop] = question.values(torch.where(present, x, instead))[0].double().cpu()

    question.run.chunks(len(sets), Plain(question).size).map(ask, "Asking about channels")
    found = torch.zeros(count, dtype=torch.float64)
    for i in range(count):
        # The sets are binary numbers, so that the same with and without a channel lie in the same order.
        without = sets[~sets[:, i]].sum(1)
        weight = torch.tensor([1 / (count * comb(count - 1, int(n))) for n in without], dtype=torch.float64)
        found[i] = (weight * (values[sets[:, i]] - values[~sets[:, i]])).sum()
    return found
