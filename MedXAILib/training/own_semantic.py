"""The recipe of a semantic network on a person's own table: it decides by the attributes that are columns there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from MedXAILib.errors import MedXAIError
from MedXAILib.networks.semantic import Attribute, SemanticLungNodule
from MedXAILib.training.lung_nodule import measure as measure_classes
from MedXAILib.training.lung_nodule import units, write_classifier
from MedXAILib.training.own_bundle import told_of
from MedXAILib.training.table import Patches, Table, augmented
from MedXAILib.training.trainer import Recipe

_UNITS = ("mm", "cm", "ml", "hu")
_WEIGHT = 3.0


def own(recipe: Recipe, table: Table) -> Recipe:
    """`recipe` for the classes and attributes of `table`, of an untrained network.

    Raises:
        MedXAIError: when it has no label somewhere, or no attribute that is known in the training.
    """
    table.require("label")
    known = table.known()
    named = attributes_of(table.attributes, known)
    return replace(
        recipe,
        network=partial(build, len(table.classes), named, known),
        loss=loss,
        measure=partial(measure, table),
        publish=partial(publish, table),
        synthesise=augmented,
    )


def attributes_of(names: Sequence[str], known: Tensor) -> tuple[Attribute, ...]:
    """What columns (M, K) are: findings where all that is known is 0 or 1, else measures, in the unit that ends their
    name, as in diameter_mm.

    Raises:
        MedXAIError: when there is none, or nothing is known of one.
    """
    if not names:
        raise MedXAIError("The table has no attributes: give columns such as spiculation (0 or 1) or diameter_mm.")
    found = []
    for name, column in zip(names, known.T, strict=True):
        values = column[column.isfinite()]
        if not len(values):
            raise MedXAIError(f"Nothing is known of '{name}' in the training: fill it in, or leave the column out.")
        stem, _, unit = name.rpartition("_")
        if ((values == 0) | (values == 1)).all():
            found.append(Attribute(name, yes=name.replace("_", " ")))
        elif unit.lower() in _UNITS:
            found.append(Attribute(stem, unit))
        else:
            found.append(Attribute(name, "units"))
    return tuple(found)


def build(classes: int, attributes: Sequence[Attribute], known: Tensor) -> SemanticLungNodule:
    """An untrained network that knows in which units it answers: those of `known` (M, K), NaN where unknown."""
    network = SemanticLungNodule(classes, [asdict(attribute) for attribute in attributes])
    typical, spread = units(known)
    network.class_head.offset.copy_(typical)
    network.class_head.scale.copy_(spread)
    measured = torch.tensor([bool(attribute.unit) for attribute in attributes])
    network.attribute_head.offset[measured] = typical[measured]
    network.attribute_head.scale[measured] = spread[measured]
    return network


def loss(network: SemanticLungNodule, patches: Patches) -> Tensor:
    """Cross-entropy of the class, and of the attributes that are known: the mean negative log-likelihood of findings
    and the squared error of measures in their own spread."""
    device = network.class_head.weight.device
    features = network.features(patches.images.to(device))
    said = network.named(features)
    true = patches.attributes.to(device)
    finding = torch.tensor([not attribute.unit for attribute in network.attributes], device=device).expand_as(said)
    known = true.isfinite()
    wrong = F.binary_cross_entropy(said[known & finding], true[known & finding], reduction="sum")
    off = ((said - true.nan_to_num()) / network.class_head.scale)[known & ~finding].square().sum()
    decided = F.cross_entropy(network.decide(said, features), patches.labels.to(device))
    return decided + _WEIGHT * (wrong + off) / known.sum().clamp_min(1)


@torch.no_grad()
def measure(table: Table, network: SemanticLungNodule, patches: Patches) -> dict[str, float]:
    """What is measured of a classifier, the recall of each class and the error of each attribute, of findings that of
    their probability; nothing of what was not there."""
    device = network.class_head.weight.device
    features = torch.cat([network.features(part.to(device)) for part in patches.images.split(50)])
    said = network.named(features)
    guessed = network.decide(said, features).argmax(1)
    found = measure_classes(network, patches) | table.by_name(guessed.cpu(), said.cpu(), patches)
    return {name: value for name, value in found.items() if not math.isnan(value)}


def publish(table: Table, network: nn.Module, metrics: dict[str, float], folder: Path) -> None:
    """Write the bundle of a network that learnt from `table`."""
    assert isinstance(network, SemanticLungNodule)
    does = f"says {', '.join(f'**{name}**' for name in table.classes)} by {', '.join(table.attributes)} alone"
    told = told_of(table, "lung-nodule-semantic", folder.name, metrics, "Classification", does, _MEANING)
    write_classifier(
        folder,
        network,
        layers=["evidence"],
        classes=table.classes,
        definition={"attributes": [asdict(attribute) for attribute in network.attributes]},
        **told,
    )


_MEANING = """`recall` is the share of a class that was recognised, `error` the mean absolute error of an attribute: of
a measure in its own unit, of a finding that of its probability. The method `semantic` shows the attributes, and what
each speaks for."""
