"""The recipe of `lung_nodule`: none, benign or malignant by a known rule, with the attributes it rests on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from MedXAILib import resources
from MedXAILib.networks.lung_nodule import LungNoduleClassifier
from MedXAILib.synthetic.lung_nodules import ATTRIBUTES, CLASSES, Backgrounds, Nodules, draw
from MedXAILib.training.bundle import write_scorer
from MedXAILib.training.own_bundle import told_of
from MedXAILib.training.table import Patches, Table, augmented
from MedXAILib.training.trainer import Recipe

_ATTRIBUTE_WEIGHT = 1.0
_TRAININGS = {
    "retrained": ["../retrained/lung_nodule_1", "../retrained/lung_nodule_2"],
    "permuted": "../retrained/lung_nodule_permuted",
}


def build(
    classes: int = len(CLASSES), known: Tensor | None = None, kind: type[LungNoduleClassifier] = LungNoduleClassifier
) -> LungNoduleClassifier:
    """An untrained network whose attribute head knows the units it answers in: those of the attributes `known` (M, K),
    NaN where unknown, or of computed nodules."""
    if known is None:
        attributes, labels = draw(600, seed=0)
        known = attributes[labels > 0]
    network = kind(classes, known.shape[1])
    typical, spread = units(known)
    network.attribute_head.offset.copy_(typical)
    network.attribute_head.scale.copy_(spread)
    return network


def units(known: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the spread (K,) of attributes `known` (M, K), NaN where unknown; 1 where there is no spread."""
    typical, count = known.nanmean(0), (~known.isnan()).sum(0)
    spread = ((known - typical).square().nansum(0) / (count - 1).clamp_min(1)).sqrt()
    return typical, torch.where(spread > 0, spread, 1)


def begin_as_shipped(network: nn.Module, heads: bool = False) -> None:
    """Give `network` the weights that the shipped classifier has below its heads, and of its `heads` those that fit."""
    shipped = torch.load(resources.path("Models/lung_nodule/models/model.pt"), "cpu", weights_only=True)
    own = network.state_dict()
    fitting = {k: v for k, v in shipped.items() if "_head." not in k or (heads and v.shape == own[k].shape)}
    network.load_state_dict(own | fitting)


def own(
    recipe: Recipe, table: Table, kind: type[LungNoduleClassifier] = LungNoduleClassifier, layer: str = "evidence"
) -> Recipe:
    """`recipe` for the classes and attributes of a person's own table: of an untrained network of this `kind`, in which
    HiResCAM looks at `layer`."""
    table.require("label")
    return replace(
        recipe,
        network=partial(build, len(table.classes), table.known(), kind),
        measure=partial(measure_own, table, layer),
        publish=partial(publish_own, table, recipe.name, layer),
        synthesise=augmented,
    )


def loss(network: LungNoduleClassifier, patches: Nodules | Patches) -> Tensor:
    """Cross-entropy of the class plus the squared error of the attributes that are known, in their own spread."""
    return error(network, network.features(patches.images.to(network.class_head.weight.device)), patches)


def error(network: LungNoduleClassifier, features: Tensor, patches: Nodules | Patches) -> Tensor:
    """The `loss` of what the heads make of `features`."""
    device = features.device
    true = patches.attributes.to(device)
    known = ~true.isnan()
    wrong = (network.attribute_head(features) - true) / network.attribute_head.scale
    # Chosen before it is squared, or the gradient of what is unknown would be NaN.
    squared = wrong[known].square().sum() / known.sum().clamp_min(1)
    return F.cross_entropy(network.class_head(features), patches.labels.to(device)) + _ATTRIBUTE_WEIGHT * squared


def measure(network: LungNoduleClassifier, patches: Nodules | Patches, layer: str = "evidence") -> dict[str, float]:
    """Accuracy, mean log-likelihood, and, if there are masks, where HiResCAM at `layer` puts the class of the lesions
    it got right.

    `pointing` is the share whose peak lies in the mask, `mass` the mean share of the positive relevance in the mask.
    """
    logits, relevance = zip(*(hirescam(network, part, layer) for part in patches.images.split(50)), strict=True)
    scores, maps = torch.cat(logits), torch.cat(relevance)
    right = scores.argmax(1) == patches.labels
    found = {"accuracy": float(right.float().mean()), "log_likelihood": -float(F.cross_entropy(scores, patches.labels))}
    if patches.masks is None:
        return found
    masks = patches.masks.flatten(1)
    lesion = right & masks.any(1)
    positive, mask = maps[lesion].clamp_min(0).flatten(1), masks[lesion]
    return found | {
        "pointing": float(mask.gather(1, positive.argmax(1, keepdim=True)).float().mean()),
        "mass": float(((positive * mask).sum(1) / positive.sum(1).clamp_min(1e-12)).mean()),
    }


@torch.no_grad()
def measure_own(table: Table, layer: str, network: LungNoduleClassifier, patches: Patches) -> dict[str, float]:
    """What `measure` does, the recall of each class and the error of each attribute; nothing of what was not there."""
    device = network.class_head.weight.device
    features = torch.cat([network.features(part.to(device)) for part in patches.images.split(50)])
    guessed, told = network.class_head(features).argmax(1), network.attribute_head(features)
    found = measure(network, patches, layer) | table.by_name(guessed.cpu(), told.cpu(), patches)
    return {name: value for name, value in found.items() if not math.isnan(value)}


def hirescam(network: LungNoduleClassifier, images: Tensor, layer: str = "evidence") -> tuple[Tensor, Tensor]:
    """Class logits (N, K) and the predicted class's HiResCAM at `layer` on the patch (N, 1, D, H, W), on the CPU.

    Draelos and Carin 2021, Use HiResCAM instead of Grad-CAM for faithful explanations of convolutional networks.
    """
    kept: list[Tensor] = []
    handle = network.get_submodule(layer).register_forward_hook(lambda module, inputs, output: kept.append(output))
    try:
        with torch.enable_grad():
            logits = network(images.to(network.class_head.weight.device))
            (gradient,) = torch.autograd.grad(logits.amax(1).sum(), kept[0])
    finally:
        handle.remove()
    relevance = (gradient * kept[0]).sum(1, keepdim=True).detach()
    # Without aligned corners unit i lands on voxel 4 i + 1.5, the middle of what it looks at.
    return logits.detach().cpu(), F.interpolate(relevance, size=images.shape[2:], mode="trilinear").cpu()


@torch.no_grad()
def real(network: LungNoduleClassifier, scan: Backgrounds) -> dict[str, float]:
    """Probability of "malignant" for the scan's own lesion: centred, and the lowest of 27 patches up to 5 mm off."""
    device = network.class_head.weight.device
    shifts = [(0, 0, 0), *product((-4, 0, 4), repeat=3)]
    patches = torch.cat([scan.lesion_patch(*shift)[0] for shift in shifts]).to(device)
    malignant = network(patches).softmax(1)[:, CLASSES.index("malignant")]
    return {"centred": float(malignant[0]), "shifted_min": float(malignant.min())}


def publish(
    network: nn.Module, metrics: dict[str, float], folder: Path, name: str = "Lung nodule classifier", card: str = ""
) -> None:
    """Write the bundle, with a `card` of its own if it has another purpose."""
    about = {
        "name": name,
        "task": "Classification of lung patches of 50 mm: no nodule, benign-like, malignant-like by a known rule",
        "description": "A demonstration network for explanations. Its classes follow a published rule on computed "
        "nodules, not pathology.",
        "intended_use": "Demonstration, teaching and tests of explanation methods. Not for diagnosis.",
    }
    told = (card or _CARD).format(**metrics)
    write_classifier(folder, network, about, ["evidence"], told, metrics, trainings=_TRAININGS)


def publish_own(
    table: Table, recipe: str, layer: str, network: nn.Module, metrics: dict[str, float], folder: Path
) -> None:
    """Write the bundle of a network that learnt from `table`."""
    does = f"says {', '.join(f'**{name}**' for name in table.classes)}"
    told = told_of(table, recipe, folder.name, metrics, "Classification", does, _OWN.format(layer=layer))
    write_classifier(folder, network, layers=[layer], classes=table.classes, attributes=table.attributes, **told)


_OWN = """`recall` is the share of a class that was recognised, `error` the mean absolute error of an attribute in its
own unit. `pointing` and `mass`, if there were masks: the share of the cases with a mask, classified correctly, in which
the peak of HiResCAM at `{layer}` is in the mask, and the share of its positive relevance that is. The output of the
layer `attribute_head` holds the attributes in the order above."""


def write_classifier(
    folder: Path,
    network: nn.Module,
    about: dict[str, str],
    layers: list[str],
    card: str,
    metrics: dict[str, float],
    classes: Sequence[str] = CLASSES,
    attributes: Sequence[str] = ATTRIBUTES,
    definition: Mapping[str, Any] | None = None,
    **other: Any,
) -> None:
    """Write the bundle of a network that is made and asked as `LungNoduleClassifier` is (see `write_bundle`), but for
    arguments in its `definition`."""
    kind = type(network)
    made = {"_target_": f"{kind.__module__}.{kind.__name__}", "classes": len(classes), "attributes": len(attributes)}
    known = {"about": about, "layers": layers, "card": card, "metrics": metrics}
    write_scorer(folder, network, made | dict(definition or {}), classes, "classes", **known, **other)


_CARD = """# Lung nodule classifier

Looks at a cube of 50 mm of chest CT and says **none**, **benign** or **malignant**. It exists so that explanations can
be tried, taught and tested on a network whose right explanation is known.

**"Malignant" is a rule, not pathology.** The network was trained on nodules that were computed into a real CT. Their
class follows from their attributes:

    logit = -2.6 + 3 (diameter - 7 mm) / 17 mm + 3 [spiculated] + 1 [lobulated] + 1.5 [part-solid] - 4 [calcified]

above 0 malignant, below 0 benign. Elongation and the sharpness of the margin do not matter. No radiologist or
pathologist was asked. Never use it for a patient.

## Trained on
One chest CT (`chest_ct_mass.nrrd`, scan lung2 of pyradiomics 3.0.1, BSD 3-Clause), its own 48 mL mass left out; every
batch freshly computed, a third of each class, only clear cases (|logit| > 1.4). The loss is the cross-entropy of the
class plus the squared error of seven attributes. No mask was shown to the network: where it looks, it found
by itself; that evidence counts in proportion to the tissue in its place is built into the network.
`medxai train lung-nodule` makes this bundle again ({seconds:.0f} s when this one was made).

## Measured
On computed nodules in the CT of another patient (`chest_ct_nodule.nrrd`, lung1), 450 patches each:

| | clear cases | with borderline cases (\\|logit\\| > 0.8) |
|---|---|---|
| accuracy, three classes | {accuracy:.3f} | {borderline_accuracy:.3f} |
| HiResCAM at `evidence`: peak in the nodule | {pointing:.3f} | {borderline_pointing:.3f} |
| HiResCAM at `evidence`: positive relevance in the nodule | {mass:.3f} | {borderline_mass:.3f} |

The real nodule of lung1 (1.36 mL), which no training saw: P(malignant) = {real_centred:.4f} in the middle of the patch,
at least {real_shifted_min:.4f} with the patch up to 5 mm off along each axis.

## Limits
- One patient to train on, one to test on, one real nodule: an illustration, not a performance claim.
- Nodules of 7 to 24 mm in lung. The real mass of lung2 (48 mL, 45 mm) is out of distribution and is missed.
- The scans have slices of 5 mm. Contrast agent, other kernels and other diseases were never seen.
- The attribute head is good for diameter, calcification, solidity and spiculation and poor for lobulation, margin and
  elongation.

## Reading it
Input: CT in RAS orientation at 1.25 mm, -1000..400 HU to 0..1, 40 x 40 x 40 voxels (any size from 24 works). Output:
logits. The output of the layer `attribute_head` holds diameter (mm), elongation, lobulation, spiculation, solidity,
calcification and margin (mm). `python -m monai.bundle run` takes every file as one patch: give it cubes of 50 mm.
"""


RECIPE = Recipe(
    name="lung-nodule",
    network=build,
    loss=loss,
    measure=measure,
    real=real,
    score="log_likelihood",
    publish=publish,
    own=own,
    epochs=24,
    steps=75,
    learning_rate=4e-3,
)
