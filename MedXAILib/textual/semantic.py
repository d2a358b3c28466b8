"""A decision by what a radiologist would name, and what becomes of it when that is otherwise.

Shen et al., "An interpretable deep hierarchical semantic convolutional neural network for lung nodule malignancy
classification", 2019; for the intervention, Koh et al., "Concept bottleneck models", 2020.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Protocol, runtime_checkable

import torch
from pydantic import Field
from torch import Tensor

from MedXAILib.concept_scores import Concept, ConceptScores
from MedXAILib.engines.capture import capture, suggest_layer
from MedXAILib.errors import MedXAIError, unknown
from MedXAILib.explainer import Names, Question, Taxonomy, Teller
from MedXAILib.explanation import Explanation
from MedXAILib.grid import resample
from MedXAILib.networks.semantic import Attribute
from MedXAILib.textual.attribute_sentence import THERE, because, described, listed, predicate
from MedXAILib.textual.intervention import changed
from MedXAILib.visual.cam_family import spatial
from MedXAILib.volume import Volume

REST = "all else"
"""The last of the concepts: the score that the target would have with the attributes of the reference."""

_CERTAIN = 1e-7
"""A probability this near to 0 or 1 has no log-odds that float32 could tell apart."""
_LINEAR = 1e-3
"""A sum of shares may miss the score by this part of it; beyond, the decision is not linear in the attributes."""


@runtime_checkable
class NamesAttributes(Protocol):
    """What a network has to say of itself to be asked for its attributes.

    Its layer `attribute_layer` gives (N, K), what it takes for each of `attributes`; what it decides follows from that.
    `reference` (K,) are the attributes that speak for nothing, such as the mean of the training.
    """

    attributes: Sequence[Attribute]
    attribute_layer: str

    @property
    def reference(self) -> Tensor:
        """(K,), in the units of the attributes."""


class Semantic(Teller):
    """What would a radiologist name here, and how much does each of it speak for the decision?

    The share of an attribute is its weight times how far its value is from that of the reference. With the score of the
    reference ("all else") the shares sum to that of the target. With `intervene` all is as if the network had seen
    these values.
    """

    id: ClassVar[str] = "semantic"
    title: ClassVar[str] = "Semantic attributes"
    paper: ClassVar[str] = "Shen 2019"
    kind: ClassVar[str] = "ConceptScores"
    taxonomy: ClassVar[Taxonomy] = Taxonomy(
        "3.2",
        "textual",
        "model-based",
        "model-specific",
        ("local",),
        strengths="in a reader's own terms; exact; a wrong attribute can be put right, and the decision follows",
        limits="only of networks that learnt attributes; that an attribute is named does not mean that it is there",
    )

    intervene: Names = Field(
        (), description="attributes to set before the decision, such as spiculation=0 (0 to 1) or diameter=8 (its unit)"
    )

    def tell(self, question: Question, volume: Volume) -> Callable[..., Explanation]:
        network = _named(question)
        attributes, target = tuple(network.attributes), question.bound[0]
        names, scales = [a.name for a in attributes], {a.name: a.scale for a in attributes}
        changes = parsed(self.intervene, attributes)
        question.run.step(0, 2, self.title)
        read = self.read(question, network)
        predicted, seen = read.values, {name: i for i, name in enumerate(read.seen)}
        placed = resample(read.maps, question.seen[0].affine, volume.shape, volume.affine)
        if len(volume.shape) < 3:
            # A plain image has no maps: those of concepts are of volumes.
            placed, seen = torch.zeros(0, 1, 1, 1), {}
        question.run.step(1, 2, self.title)
        values = changed(predicted, scales, changes)
        reference = dict(zip(names, torch.as_tensor(network.reference).tolist(), strict=True))
        now, then, plain = (_decided(question, network, v) for v in (values, predicted, reference))
        shares = {n: float(w) * (values[n] - reference[n]) for n, w in zip(names, now.weights[0], strict=True)}
        missed = abs(now.value - plain.value - sum(shares.values())) / max(abs(now.value - plain.value), 1e-6)
        linear = missed <= _LINEAR
        if not linear:
            question.run.note(f"The decision is not linear in the attributes: the shares miss {missed:.0%} of it.")
        concepts = [
            Concept(
                a.name,
                shares[a.name],
                value=values[a.name],
                unit=a.unit,
                layer=network.attribute_layer,
                map=seen.get(a.name),
                numbers={
                    "weight": float(now.weights[0, k]),
                    "reference": reference[a.name],
                    "predicted": predicted[a.name],
                },
                weights=dict(zip(now.scores, now.weights[1:, k].tolist(), strict=True)) if linear else {},
                scale=a.scale,
            )
            for k, a in enumerate(attributes)
        ]
        rest = plain.scores if linear else {}
        concepts.append(Concept(REST, plain.value, layer=network.attribute_layer, weights=rest))
        side = "for" if sum(shares.values()) > 0 else "against"
        why = f"{side} {target.label}{because(attributes, values, shares)}"
        text = f"{described(attributes, predicted)}. That speaks {why}. The network says {now.said}."
        if changes:
            otherwise = listed([predicate(a, values[a.name]) for a in attributes if a.name in changes])
            text = (
                f"{described(attributes, predicted)}. The network says {then.said}. Were it {otherwise}, that would "
                f"speak {why}, and the network would say {now.said}."
            )
        return partial(
            ConceptScores,
            residual={"completeness": missed, **read.residual},
            concepts=tuple(concepts),
            scored=f"share of the score of {target.label}",
            text=" ".join(filter(None, [text, read.note])),
            maps=placed,
            affine=volume.affine,
        )

    def read(self, question: Question, network: NamesAttributes) -> Read:
        """What the network takes for its attributes, and HiResCAMs of those that are there: in the unit of what is
        measured and in the log-odds of findings."""
        attributes = tuple(network.attributes)
        layer = suggest_layer(question)
        _, taken = capture(question, (network.attribute_layer, layer))
        given, where = taken[network.attribute_layer].raw, taken[layer]
        values = named(network, given)
        activation = spatial(layer, where)
        maps = [question.x.new_zeros((0, *question.x.shape[2:]))]
        there = visible(attributes, values)
        for k in there:
            value = given[:, k] if attributes[k].unit else given[:, k].logit(_CERTAIN)
            (gradient,) = question.gradients(value, [where.raw], keep=True)
            relevance = activation * where.grid(gradient)  # type: ignore[operator]
            maps.append(where.place(relevance.sum(1, keepdim=True))[0])
        return Read(values, torch.cat(maps).detach().float().cpu(), [attributes[k].name for k in there])


@dataclass(frozen=True)
class Read:
    """What a network takes for its attributes, by name; on its own grid maps (M, *spatial) of those `seen`; what theory
    demands of these, and by how much they miss it; and a note for the reader."""

    values: dict[str, float]
    maps: Tensor
    seen: list[str]
    residual: dict[str, float] = field(default_factory=dict)
    note: str = ""


def named(network: NamesAttributes, given: Tensor) -> dict[str, float]:
    """The attributes by name, as the network's layer gives them.

    Raises:
        MedXAIError: when it does not give one for each.
    """
    if given.shape != (1, len(network.attributes)):
        raise MedXAIError(
            f"Layer '{network.attribute_layer}' gives {tuple(given.shape)} for {len(network.attributes)} attributes: "
            "name one attribute for each of its outputs."
        )
    return dict(zip((a.name for a in network.attributes), given[0].tolist(), strict=True))


def visible(attributes: Sequence[Attribute], values: Mapping[str, float]) -> list[int]:
    """Which attributes there is something to see of: what is measured, and findings that are there."""
    if any(a.role == "noun" and values[a.name] <= THERE for a in attributes):
        return []
    return [k for k, a in enumerate(attributes) if a.unit or values[a.name] > THERE]


def parsed(changes: Sequence[str], attributes: Sequence[Attribute]) -> dict[str, float]:
    """Changes such as "spiculation=0" as new values by name.

    Raises:
        MedXAIError: for what is no change, an attribute that there is not, and a finding that is not from 0 to 1.
    """
    known, found = {a.name: a for a in attributes}, {}
    for change in changes:
        name, _, value = (part.strip() for part in change.partition("="))
        try:
            number = float(value)
        except ValueError as error:
            raise MedXAIError(f"'{change}' is no change: write name=value, such as {attributes[-1].name}=0.") from error
        if name not in known:
            raise unknown("attribute", name, known)
        if not (math.isfinite(number) if known[name].unit else 0 <= number <= 1):
            raise MedXAIError(f"The attribute '{name}' cannot be {value}: give 0 (not there) to 1 (there).")
        found[name] = number
    return found


@dataclass(frozen=True)
class _Decided:
    """The target's value, the scores by class and as a person reads them, and the weights (1 + classes, K) that the
    attributes have in the value and in each score."""

    value: float
    scores: dict[str, float]
    said: str
    weights: Tensor


def _named(question: Question) -> NamesAttributes:
    network = question.model.network
    if not isinstance(network, NamesAttributes):
        raise MedXAIError(
            f"{question.model.name} names no attributes: use a network that does, as lung_nodule_semantic, or tcav, "
            "which takes any network."
        )
    if question.bound[0].target.layer is not None:
        raise MedXAIError("Attributes speak for what the network puts out: leave the layer of the target out.")
    return network


def _decided(question: Question, network: NamesAttributes, values: Mapping[str, float]) -> _Decided:
    """What the network decides where its attribute layer gives `values`."""
    model = question.model
    given = torch.tensor([list(values.values())]).to(question.x).requires_grad_()
    # What follows may work in place.
    handle = model.layer(network.attribute_layer).register_forward_hook(lambda *_: given.clone())
    try:
        output = model.forward(question.x)
    finally:
        handle.remove()
    question.run.cost.forwards += 1
    value = question.bound[0].value(output)
    columns = output.flatten(1).T[..., None]
    weights = [question.gradients(score, [given], keep=True)[0] for score in (value, *columns)]
    output, columns, value = output.detach(), columns.detach(), value.detach()
    # The one score of a binary network is that of its second class.
    binary = len(columns) == 1 and model.task == "classification"
    names = [model.class_name(i + binary, int(binary)) for i in range(len(columns))]
    chances = model.probabilities(output).flatten()
    percent = model.task not in ("regression", "embedding")
    said = ", ".join(
        f"{model.class_name(i, int(binary))} " + (f"{p:.0%}" if percent else f"{p:.3g}")
        for i, p in enumerate(chances.tolist())
    )
    scores = {name: float(score) for name, score in zip(names, columns, strict=True)}
    return _Decided(float(value), scores, said, torch.cat(weights).cpu())
