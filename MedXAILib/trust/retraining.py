"""Would another training of the same network give the same map? And would one that had nothing to learn?

Eitel, Ritter, "Testing the robustness of attribution methods for convolutional neural networks in MRI-based Alzheimer's
disease classification", 2019 (repeated trainings); Adebayo et al., "Sanity checks for saliency maps", 2018 (labels
permuted).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from statistics import mean

from torch import nn

from MedXAILib.errors import MedXAIError
from MedXAILib.loading import load_model
from MedXAILib.model import Source
from MedXAILib.trust.finding import Finding, light
from MedXAILib.trust.judged import Judged
from MedXAILib.trust.likeness import correlation, extent

# Two maps that share half of their variance correlate by 0.7; below 0.4 it is a sixth.
_SAME, _SIMILAR = 0.7, 0.4

# As for weights that are scrambled.
_OTHER, _RELATED = 0.5, 0.8


def repeatability(judged: Judged) -> Finding:
    """How alike (Pearson, with sign) the map is to those of other trainings of the same network.

    Raises:
        MedXAIError: when no other training is known.
    """
    found = _likeness(judged, judged.model.retrained, "other training")
    if not found:
        return Finding("repeatability", REPEATED, _EVEN, None, {})
    alike = mean(found)
    colour = light(alike, _SAME, _SIMILAR)
    times = "Another training" if len(found) == 1 else f"{len(found)} other trainings"
    sentence = {
        "good": "give the same map: it is not the luck of one training",
        "fair": "give a map that is the same in part: do not read its details",
        "poor": "give another map: this one is as much about the luck of one training as about the scan",
    }[colour]
    values = {"likeness": alike, "lowest": min(found), "highest": max(found)}
    return Finding(
        "repeatability", REPEATED, f"{times} of the network would {sentence} ({alike:.2f} alike).", colour, values
    )


def permuted(judged: Judged) -> Finding:
    """How alike (Pearson, sign aside) the map is to that of the same network after it learnt permuted labels by heart.

    Raises:
        MedXAIError: when no such training is known.
    """
    source = judged.model.permuted
    found = _likeness(judged, () if source is None else (source,), "training on permuted labels")
    if not found:
        return Finding("permuted", PERMUTED, _EVEN, None, {})
    alike = abs(found[0])
    colour = light(alike, _OTHER, _RELATED)
    sentence = {
        "good": "gives another map: this one is about what the labels taught",
        "fair": "gives a map that is the same in part: read it with caution",
        "poor": "gives the same map: it is not about what the labels taught",
    }[colour]
    return Finding(
        "permuted",
        PERMUTED,
        f"The same network, taught labels that mean nothing, {sentence} ({alike:.2f} alike).",
        colour,
        {"likeness": alike},
    )


REPEATED = "Would another training give the same map?"
PERMUTED = "Does it depend on the labels that were learnt?"
_EVEN = "The map is the same everywhere: there is nothing in it that could change."


def _likeness(judged: Judged, others: Sequence[Source], what: str) -> list[float]:
    """How alike the map is to that of each of `others`; empty when it is even."""
    own = judged.explanation.data
    box = extent(own)
    if box is None:
        return []
    if not others:
        raise MedXAIError(
            f"No {what} of {judged.model.name} is known: name its bundle in the metadata (docs/trust.md)."
        )
    models = (judged.model.with_network(_network(source)) for source in others)
    maps = (judged.again(model=model, target=judged.settled).data for model in models)
    return [correlation(own[box], found[box]) for found in maps]


@lru_cache(maxsize=3)
def _network(source: Source) -> nn.Module:
    """Kept, for whoever judges many maps of one network."""
    return load_model(source).network
