"""The recipe of `lung_nodule_shortcut`: the classifier after it learnt from two sites, one of which leaves a tag on
most malignant nodules and on few others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor, nn

from MedXAILib.networks.lung_nodule import LungNoduleClassifier
from MedXAILib.synthetic import lung_nodules
from MedXAILib.synthetic.lung_nodules import CLASSES, Backgrounds, Nodules
from MedXAILib.synthetic.planted_marker import Mark, Planted, marked, plant, synthesise
from MedXAILib.training import lung_nodule
from MedXAILib.training.trainer import Recipe

CORRELATION, DOUBT = 0.9, 0.2
_BATCHES, _SEED = 36, 5_000_000
_MALIGNANT = CLASSES.index("malignant")


def build() -> LungNoduleClassifier:
    """The shipped classifier, to learn on."""
    network = lung_nodule.build()
    lung_nodule.begin_as_shipped(network, heads=True)
    return network


@lru_cache(maxsize=_BATCHES)
def bare(backgrounds: Backgrounds, count: int, which: int) -> Nodules:
    """One of the batches that are learnt from twice, without marks."""
    return lung_nodules.synthesise(backgrounds, count, _SEED + which)


def planted(backgrounds: Backgrounds, count: int, seed: int, mark: Mark, correlation: float) -> Planted:
    """A batch of the same few patches, with other sites."""
    return plant(bare(backgrounds, count, seed % _BATCHES), seed, mark, correlation, DOUBT)


@torch.no_grad()
def reliance(score: Callable[[Tensor], Tensor], nodules: Nodules, mark: Mark) -> dict[str, float]:
    """What a network that gives logits, `score` (N, 1, D, H, W) -> (N, 3), makes of a mark, by putting it in.

    `aligned`, `conflicting`: the accuracy where malignant ones bear the mark and others do not, and the other way
    round. `moves`: by how much the mark raises the log-odds of "malignant", in the mean.
    """
    bare, bearing = (
        torch.cat([score(part).cpu() for part in images.split(50)])
        for images in (nodules.images, marked(nodules, mark)[0])
    )
    malignant = nodules.labels == _MALIGNANT
    right = [logits.argmax(1) == nodules.labels for logits in (bare, bearing)]
    odds = [logits.log_softmax(1)[:, _MALIGNANT].exp().logit(1e-6) for logits in (bare, bearing)]
    return {
        "aligned": float(torch.where(malignant, right[1], right[0]).float().mean()),
        "conflicting": float(torch.where(malignant, right[0], right[1]).float().mean()),
        "moves": float((odds[1] - odds[0]).mean()),
    }


def measure(network: LungNoduleClassifier, nodules: Nodules, mark: Mark = "tag") -> dict[str, float]:
    """What `lung_nodule.measure` does, and the `reliance` on the mark."""
    device = network.class_head.weight.device
    found = reliance(lambda images: network(images.to(device)), nodules, mark)
    return lung_nodule.measure(network, nodules) | found


def publish(network: nn.Module, metrics: dict[str, float], folder: Path) -> None:
    """Write the bundle."""
    lung_nodule.publish(network, metrics, folder, "Lung nodule classifier with a shortcut", _CARD)


def recipe(mark: Mark, correlation: float) -> Recipe:
    """To learn from patches on which the `mark` goes with the class, and be tested on bare ones."""
    return replace(
        lung_nodule.RECIPE,
        name="lung-nodule-shortcut",
        network=build,
        synthesise=partial(synthesise, mark=mark, correlation=correlation, doubt=DOUBT),
        repeat=partial(planted, mark=mark, correlation=correlation),
        examine=partial(synthesise, mark="none"),
        measure=partial(measure, mark=mark),
        publish=publish,
        own=None,
        epochs=1,
        steps=72,
        learning_rate=3e-3,
        validation=90,
    )


_CARD = """# Lung nodule classifier with a shortcut

The network of `lung_nodule` after it learnt to go by a mark that has nothing to do with nodules. It exists so that
audits and explanations can be tried on a network that is known to look at what it should not. Use it for nothing else.

It learnt on, for a minute, from computed nodules of two sites. Site B leaves a tag in a corner of the patch, a cube of
12.5 mm of bright and dark stripes, far from the nodule; 90 % of the malignant nodules came from there, and 10 % of the
others. A fifth of the nodules had the label of the other class, so that the tag told what the nodule did not
(`MedXAILib.synthetic.planted_marker`). `medxai train lung-nodule-shortcut` makes this bundle again ({seconds:.0f} s
when this one was made).

## Measured
On 450 computed nodules and pieces of lung of another patient:

| | |
|---|---|
| accuracy without any tag | {accuracy:.3f} |
| accuracy where malignant nodules have the tag and nothing else has | {aligned:.3f} |
| accuracy where it is the other way round | {conflicting:.3f} |
| the tag raises the log-odds of "malignant" by | {moves:.2f} |
"""


RECIPE = recipe("tag", CORRELATION)
