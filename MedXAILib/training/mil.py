"""The recipe of `lung_mil`: is there a nodule in a whole scan, a malignant one? Learnt from grades of scans alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from MedXAILib import resources
from MedXAILib.engines.receptive_field import Geometry
from MedXAILib.loading import load_model
from MedXAILib.networks.mil import CELL, MultipleInstanceClassifier, Pooling
from MedXAILib.synthetic.lung_nodules import SPACING_MM, Backgrounds, scale
from MedXAILib.synthetic.whole_lungs import Scans, crops, healed, whole
from MedXAILib.training.bundle import write_scorer
from MedXAILib.training.own_bundle import told_of
from MedXAILib.training.table import Patches, Table, augmented
from MedXAILib.training.trainer import Recipe

GRADES = ("nodule", "malignant")
"""The outputs: benign or worse, malignant or worse."""

_SURER = 3.0


def build(grades: int = len(GRADES)) -> MultipleInstanceClassifier:
    """An untrained network that pools by gated attention."""
    return MultipleInstanceClassifier(grades, "attention")


def build_noisy_or() -> MultipleInstanceClassifier:
    """A network that pools by noisy-or and begins with what the shipped one with attention says of its instances.

    By itself it does not begin: of thousands of instances that know nothing yet, one always seems to show a nodule.
    """
    network = MultipleInstanceClassifier(len(GRADES), "noisy_or")
    known = load_model(resources.path("Models/lung_mil_attention")).network.state_dict()
    network.load_state_dict({name: value for name, value in known.items() if "instances" not in name}, strict=False)
    with torch.no_grad():
        # Attention has looked away from what is no nodule; here that has to be unlikely each time.
        for parameter in network.scores.parameters():
            parameter.mul_(_SURER)
    return network


def own(recipe: Recipe, table: Table) -> Recipe:
    """`recipe` for a person's own table, whose classes are grades from the lowest to the highest: of an untrained
    network."""
    table.require("label")
    return replace(
        recipe,
        network=partial(build, len(table.classes) - 1),
        measure=partial(measure_own, table),
        publish=partial(publish_own, table, recipe.name),
        synthesise=augmented,
    )


def loss(network: MultipleInstanceClassifier, scans: Scans | Patches) -> Tensor:
    """The cross-entropy of "at least this grade", of every grade, by the pooled instances and by the best that there
    could be. Where the nodules are is not looked at."""
    device = network.scores.weight.device
    features, here = network.bag(scans.images.to(device))
    grades = (scans.labels if isinstance(scans, Patches) else scans.grades).to(device)
    return _cross_entropy(network.pool(features, here), grades) + _cross_entropy(network.best(features), grades)


def _cross_entropy(logits: Tensor, grades: Tensor) -> Tensor:
    steps = torch.arange(logits.shape[1], device=grades.device)
    return F.binary_cross_entropy_with_logits(logits, (grades[:, None] > steps).to(logits))


def measure(network: MultipleInstanceClassifier, scans: Scans) -> dict[str, float]:
    """How well scans are told from each other, and where the map of each grade peaks in those that have it.

    `auc` is of nodule against none, `malignant_auc` of malignant against the others, `accuracy` and `kappa` (weighted
    with the square of the difference) of the three grades, `pointing` and `malignant_pointing` the share of maps whose
    peak lies in a nodule of that grade or a higher one, be the scan graded rightly or not.
    """
    each = [_look(network, scans.images[i], scans.masks[i]) for i in range(len(scans))]
    scores, hit = (torch.stack(column) for column in zip(*each, strict=True))
    grades = scans.grades
    told = (scores > 0).sum(1)
    measured = {
        "log_likelihood": -float(_cross_entropy(scores, grades)),
        "accuracy": float((told == grades).float().mean()),
        "kappa": kappa(told, grades),
    }
    for grade, name in enumerate(("", "malignant_"), 1):
        has = grades >= grade
        measured[f"{name}auc"] = auc(scores[has, grade - 1], scores[~has, grade - 1])
        measured[f"{name}pointing"] = float((hit[has, grade - 1] >= grade).float().mean())
    return measured


@torch.no_grad()
def measure_own(table: Table, network: MultipleInstanceClassifier, patches: Patches) -> dict[str, float]:
    """Accuracy, mean log-likelihood, and, if there are cases of more than one grade, kappa and the area under the ROC
    curve of each grade or a higher one against those below it; nothing of what was not there."""
    device = network.scores.weight.device
    scores = torch.cat([network(part.to(device)).cpu() for part in patches.images.split(10)])
    grades, told = patches.labels, (scores > 0).sum(1)
    measured = {
        "log_likelihood": -float(_cross_entropy(scores, grades)),
        "accuracy": float((told == grades).float().mean()),
    }
    if len(grades.unique()) > 1:
        measured["kappa"] = kappa(told, grades)
    for grade, name in enumerate(table.classes[1:], 1):
        has = grades >= grade
        if has.any() and not has.all():
            measured[f"auc: {name}"] = auc(scores[has, grade - 1], scores[~has, grade - 1])
    return measured


def auc(ill: Tensor, healthy: Tensor) -> float:
    """The probability that one of `ill` scores higher than one of `healthy`, ties counting half."""
    difference = ill[:, None] - healthy
    return float(((difference > 0).double() + (difference == 0).double() / 2).mean())


def kappa(told: Tensor, true: Tensor) -> float:
    """Cohen's kappa of grades, weighted with the square of their difference (Cohen 1968)."""
    by_chance = (told[:, None] - true).double().square().mean()
    return float(1 - (told - true).double().square().mean() / by_chance.clamp_min(1e-12))


@torch.no_grad()
def maps(network: MultipleInstanceClassifier, image: Tensor) -> tuple[Tensor, Tensor]:
    """The logits (grades,) of a scan (1, D, H, W) and what each voxel contributes to them, (grades, D, H, W)."""
    kept: list[Tensor] = []
    handle = network.instances.register_forward_hook(lambda module, inputs, output: kept.append(output))
    try:
        logits = network(image[None].to(network.scores.weight.device))[0]
    finally:
        handle.remove()
    geometry = Geometry((CELL,) * 3, (0,) * 3, (CELL - 1,) * 3)
    return logits.cpu(), geometry.place(kept[0], image.shape[1:])[0].cpu()


def _look(network: MultipleInstanceClassifier, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The logits of a scan, and the grade of the nodule in which each map peaks, both (grades,)."""
    logits, found = maps(network, image)
    return logits, mask.flatten()[found.flatten(1).argmax(1)]


def real(network: MultipleInstanceClassifier, scan: Backgrounds) -> dict[str, float]:
    """The probabilities of the scan as it is, and with its lesion healed; how far from that its map peaks, in mm."""
    assert scan.lesion is not None
    logits, found = maps(network, scale(scan.hu)[None])
    without, _ = maps(network, scale(healed(scan))[None])
    peak = torch.tensor([int(i) for i in torch.unravel_index(found[0].argmax(), found[0].shape)])
    away = (scan.lesion.nonzero() - peak).double().norm(dim=1).amin()
    names = ("nodule", "malignant")
    return {
        **dict(zip(names, logits.sigmoid().tolist(), strict=True)),
        **{f"healed_{name}": value for name, value in zip(names, without.sigmoid().tolist(), strict=True)},
        "distance_mm": SPACING_MM * float(away),
    }


def publish(network: nn.Module, metrics: dict[str, float], folder: Path, pooling: Pooling) -> None:
    """Write the bundle."""
    _write(
        folder,
        network,
        pooling,
        GRADES,
        about={
            "name": f"Lung scan grader ({_NAMES[pooling]})",
            "task": "Ordinal grading of whole chest CT: no nodule, benign-like, malignant-like by a known rule",
            "description": "A demonstration network for explanations. It learnt from the grades of whole scans where "
            "nodules are. Its grades follow a published rule on computed nodules, not pathology.",
            "intended_use": "Demonstration, teaching and tests of explanation methods. Not for diagnosis.",
        },
        card=_CARD.format(
            name=_NAMES[pooling],
            how=_HOW[pooling],
            began=_BEGAN[pooling],
            recipe=_RECIPES[pooling],
            size_mm=_SIZES[pooling] * SPACING_MM,
            **metrics,
        ),
        metrics=metrics,
        spatial_shape=("23+n",) * 3,
    )


def publish_own(table: Table, recipe: str, network: nn.Module, metrics: dict[str, float], folder: Path) -> None:
    """Write the bundle of a network that learnt from `table`."""
    does = f"grades it, {' < '.join(f'**{name}**' for name in table.classes)}"
    told = told_of(table, recipe, folder.name, metrics, "Ordinal grading", does, _OWN.format(lowest=table.classes[0]))
    _write(folder, network, "attention", table.classes[1:], **told)


def _write(folder: Path, network: nn.Module, pooling: Pooling, grades: Sequence[str], **told: Any) -> None:
    """Write the bundle of a network whose outputs are `grades` (see `write_bundle`)."""
    arguments = {"grades": len(grades), "pooling": pooling}
    definition = {"_target_": "MedXAILib.networks.mil.MultipleInstanceClassifier", **arguments}
    write_scorer(folder, network, definition, grades, "ordinal", layers=["evidence"], **told)


_OWN = """`kappa` has quadratic weights; `auc` is the area under the ROC curve of a grade or a higher one against those
below it. There is an output for every grade but the lowest ({lowest}): that grade or a higher one. The output of the
layer `instances` holds the part of each instance, which sees 34 voxels; instance i lies about voxel 4 i + 1.5. No mask
was used. Where some of the cube has the density of lung (0.02 to 0.35 of the intensities), only instances there
count."""

_NAMES: dict[Pooling, str] = {"noisy_or": "noisy-or", "attention": "gated attention"}
_RECIPES: dict[Pooling, str] = {"noisy_or": "lung-mil", "attention": "lung-mil-attention"}
_SIZES: dict[Pooling, int] = {"noisy_or": 96, "attention": 80}
_HOW: dict[Pooling, str] = {
    "noisy_or": """A patch has a probability p of showing a grade or a higher one, and a scan has the grade unless none
of its patches shows it (noisy-or): P = 1 - product of (1 - p). So -log(1 - P) is the sum of the parts -log(1 - p) of
all patches, and the map of a grade is these parts, zero or more. A whole scan has many times as many patches as the
cubes of the training, each of which may be wrong: its probabilities are too high.""",
    "attention": """A patch has a score for each grade or a higher one, and a weight that all grades share (gated
attention). The logits of a scan are the sums of the parts, weight times score, of all patches, and the map of a grade
is these parts, which speak for it or against it.""",
}
_BEGAN: dict[Pooling, str] = {
    "noisy_or": "It began with the weights of `lung_mil_attention`, which learnt from grades, too",
    "attention": "It began with random weights",
}

_CARD = """# Lung scan grader ({name})

Looks at a whole chest CT and says how likely it shows **a nodule**, and **a malignant nodule**. Nobody told it where
the nodules are: it learnt from scans of which only the grade was known (none < benign < malignant), as a bag of
overlapping patches of 42 mm. What each patch contributes is its explanation (`mil`).

**"Malignant" is a rule, not pathology.** The nodules were computed into a real CT, and their grade follows from their
attributes:

    logit = -2.6 + 3 (diameter - 7 mm) / 17 mm + 3 [spiculated] + 1 [lobulated] + 1.5 [part-solid] - 4 [calcified]

above 0 malignant, below 0 benign. No radiologist or pathologist was asked. Never use it for a patient.

## How
{how}

Only patches in lung count, and evidence in proportion to the tissue in the 5 mm at the middle of the patch.

## Trained on
Cubes of {size_mm:.0f} mm from one chest CT (`chest_ct_mass.nrrd`, scan lung2 of pyradiomics 3.0.1, BSD 3-Clause), its
own 48 mL mass left out, each without a nodule and with one to three, the worst benign or malignant, at random places;
only clear cases (|logit| > 1.4); every one freshly computed.
{began}. The loss is the
cross-entropy of "at least this grade", by the pooled patches and by the best patch that there could be. No mask and no
patch's label was used.
`medxai train {recipe}` makes this bundle again ({seconds:.0f} s when this one was made).

## Measured
On whole scans of another patient (`chest_ct_nodule.nrrd`, lung1; its own nodule healed by `healthy_lung`, computed
nodules put in at random places, mirrored at random), 60 each, a third of each grade:

| | clear cases | with borderline cases (\\|logit\\| > 0.8) |
|---|---|---|
| area under the ROC curve, a nodule or none | {auc:.3f} | {borderline_auc:.3f} |
| area under the ROC curve, malignant or not | {malignant_auc:.3f} | {borderline_malignant_auc:.3f} |
| accuracy, three grades | {accuracy:.3f} | {borderline_accuracy:.3f} |
| kappa, quadratic weights | {kappa:.3f} | {borderline_kappa:.3f} |
| map of "nodule": peak in a nodule | {pointing:.3f} | {borderline_pointing:.3f} |
| map of "malignant": peak in a malignant nodule | {malignant_pointing:.3f} | {borderline_malignant_pointing:.3f} |

Peaks are of all scans with such a nodule, graded rightly or not.

The real scan of lung1, which no training saw: P(nodule) = {real_nodule:.4f}, P(malignant) = {real_malignant:.4f}; the
map of "nodule" peaks {real_distance_mm:.1f} mm from its nodule (0: in it). With that nodule healed they are
{real_healed_nodule:.4f} and {real_healed_malignant:.4f}.

## Limits
- One patient to train on, one to test on: all scans without a nodule are the same lung, mirrored and with other noise.
  An illustration, not a performance claim.
- Nodules of 7 to 24 mm in lung. Slices of 5 mm. Contrast agent, other kernels and other diseases were never seen.

## Reading it
Input: CT in RAS orientation at 1.25 mm, -1000..400 HU to 0..1, whole, any size from 24 voxels a side. Output: logits of
"nodule" and "malignant", each of that grade or a higher one. The output of the layer `instances` holds the part of each
patch, instance i about voxel 4 i + 1.5.
"""


ATTENTION_RECIPE = Recipe(
    name=_RECIPES["attention"],
    network=build,
    loss=loss,
    measure=measure,
    real=real,
    score="log_likelihood",
    publish=partial(publish, pooling="attention"),
    own=own,
    epochs=14,
    steps=50,
    synthesise=partial(crops, size=_SIZES["attention"]),
    examine=whole,
    batch=12,
    learning_rate=4e-3,
    validation=90,
    test=60,
)

RECIPE = replace(
    ATTENTION_RECIPE,
    name=_RECIPES["noisy_or"],
    network=build_noisy_or,
    publish=partial(publish, pooling="noisy_or"),
    # It does not begin by itself, and what it begins with knows our grades only.
    own=None,
    epochs=4,
    steps=30,
    synthesise=partial(crops, size=_SIZES["noisy_or"]),
    batch=6,
    learning_rate=1e-3,
)
