"""What a network would say, were what it sees otherwise: by the numbers of its answer, without it and without PyTorch.

Koh et al., "Concept bottleneck models", 2020.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from MedXAILib.errors import MedXAIError, unknown


def intervened(concepts: Sequence[Mapping[str, Any]], changes: Mapping[str, float]) -> dict[str, float]:
    """The network's scores by class, were attributes other than the network takes them to be.

    `concepts` are those of an answer of `semantic` as they are saved (`dataclasses.asdict`), `changes` new values of
    some by name.

    Raises:
        MedXAIError: for an attribute that there is not, naming the nearest; for concepts that have no weights.
    """
    if not carry_decision(concepts):
        raise MedXAIError("These concepts have no weights that the decision follows from: ask the method semantic.")
    *named, rest = concepts
    predicted = {c["name"]: c["numbers"]["predicted"] for c in named}
    for name in changes:
        if name not in predicted:
            raise unknown("attribute", name, predicted)
    values = changed(predicted, {c["name"]: c["scale"] for c in named}, changes)
    return {
        of: score + sum(c["weights"][of] * (values[c["name"]] - c["numbers"]["reference"]) for c in named)
        for of, score in rest["weights"].items()
    }


def carry_decision(concepts: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the network's decision follows from these concepts and nothing else, as far as this scan goes."""
    return bool(concepts) and all(c["weights"] for c in concepts)


def changed(values: Mapping[str, float], scales: Mapping[str, str], changes: Mapping[str, float]) -> dict[str, float]:
    """`values` with `changes`; findings that share a scale (by name, empty: none) share what a change leaves of it."""
    new = {**values, **changes}
    for scale in {scales[name] for name in changes if scales[name]}:
        others = [name for name in values if scales[name] == scale and name not in changes]
        left = max(0.0, 1 - sum(changes[name] for name in changes if scales[name] == scale))
        was = sum(values[name] for name in others)
        for name in others:
            new[name] = left * (values[name] / was if was > 0 else 1 / len(others))
    return new


def probabilities(scores: Mapping[str, float], task: str) -> dict[str, float]:
    """Scores by class as probabilities where the network's task has them, as `MedXAILib.Model.probabilities`; of a
    binary network with one score, that of its second class."""
    if task in ("regression", "embedding"):
        return dict(scores)
    if task in ("multilabel", "ordinal") or len(scores) == 1:
        return {of: (1 + math.tanh(score / 2)) / 2 for of, score in scores.items()}
    largest = max(scores.values())
    odds = {of: math.exp(score - largest) for of, score in scores.items()}
    return {of: odd / sum(odds.values()) for of, odd in odds.items()}
