"""What a radiologist would name, each held in a capsule: how much it speaks for a decision, and where it came from.

LaLonde et al., "Encoding visual attributes in capsules for explainable medical diagnoses", 2020.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from MedXAILib.engines.capture import capture
from MedXAILib.errors import MedXAIError
from MedXAILib.explainer import Question, Taxonomy
from MedXAILib.explanation import Explanation
from MedXAILib.textual.semantic import NamesAttributes, Read, Semantic, named, visible
from MedXAILib.volume import Volume


@runtime_checkable
class RoutesAttributes(NamesAttributes, Protocol):
    """What a network that names attributes has besides, where each of them is the length of a capsule.

    Its layer `primary_layer` gives (N, C, *grid), what the capsules are made of.
    """

    primary_layer: str

    def routed(self, primary: Tensor) -> Tensor:
        """What each place of the grid adds to the length of each capsule, (N, K, *grid)."""

    def drawn_off(self, image: Tensor, primary: Tensor) -> Tensor:
        """How far what the capsules draw again is off the image, as a part of its range (N,); NaN where it is none."""


class Capsules(Semantic):
    """Which attributes does the network hold, how much does each speak for the decision, and where did it come from?

    The value of a finding is the length of its capsule. Its map is the routing: how much of that length each place
    gave; over the network's grid the map sums to it. Shares and `intervene` are those of `semantic`.
    """

    id: ClassVar[str] = "capsules"
    title: ClassVar[str] = "Attribute capsules"
    paper: ClassVar[str] = "LaLonde 2020"
    taxonomy: ClassVar[Taxonomy] = Taxonomy(
        "3.3",
        "example-based",
        "model-based",
        "model-specific",
        ("local",),
        strengths="exact shares in a reader's own terms; where each comes from is read off, without a gradient",
        limits="only of networks of capsules; routing says where an attribute came from, not what there it rests on",
    )

    def tell(self, question: Question, volume: Volume) -> Callable[..., Explanation]:
        if not isinstance(question.model.network, RoutesAttributes):
            raise MedXAIError(
                f"{question.model.name} has no capsules for its attributes: use a network that does, as "
                "lung_nodule_capsules, or semantic or tcav."
            )
        return super().tell(question, volume)

    def read(self, question: Question, network: NamesAttributes) -> Read:
        """What the network takes for its attributes, and the routing of those that are there."""
        assert isinstance(network, RoutesAttributes)
        _, taken = capture(question, (network.primary_layer, network.attribute_layer))
        primary = taken[network.primary_layer]
        values = named(network, taken[network.attribute_layer].raw)
        with torch.no_grad():
            parts = network.routed(primary.raw)
            off = float(network.drawn_off(question.x, primary.raw))
        sums = parts.flatten(2).sum(2)[0].tolist()
        missed = max(
            (abs(total - values[a.name]) for a, total in zip(network.attributes, sums, strict=True) if not a.unit),
            default=0.0,
        )
        there = visible(tuple(network.attributes), values)
        maps = primary.place(parts[:, there])[0].float().cpu()
        note = "" if math.isnan(off) or not there else f"Drawn again from its capsules, it is {off:.0%} off the scan."
        return Read(values, maps, [network.attributes[k].name for k in there], {"routing": missed}, note)
