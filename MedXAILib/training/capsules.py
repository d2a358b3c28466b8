"""The recipe of `lung_nodule_capsules`: the attributes and classes of `lung_nodule_semantic`, in capsules."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from MedXAILib import resources
from MedXAILib.networks.capsules import CapsuleLungNodule, around
from MedXAILib.networks.semantic import ATTRIBUTES
from MedXAILib.synthetic.lung_nodules import CLASSES, SIZE, Backgrounds, Nodules, synthesise
from MedXAILib.training import lung_nodule, semantic
from MedXAILib.training.trainer import Recipe

_DIAMETER = [a.name for a in ATTRIBUTES].index("diameter")
_RANGE_MM = (5.0, 25.0)
"""What a diameter's capsule of no length and one of full length stand for."""

_DRAWING_WEIGHT = 20.0

_BATCHES, _SEED = 40, 11
_SHIFT = 3


def build() -> CapsuleLungNodule:
    """A network that sees as `lung_nodule` does, and has yet to learn what its capsules are for."""
    network = CapsuleLungNodule(len(CLASSES))
    semantic.begin(network)
    network.degrees.low[_DIAMETER], network.degrees.high[_DIAMETER] = _RANGE_MM
    return network


def repeated(backgrounds: Backgrounds, count: int, seed: int) -> Nodules:
    """Always one of the same 40 batches, each patch turned over and moved a little."""
    known = _batch(backgrounds, count, seed % _BATCHES)
    generator = Generator().manual_seed(seed)
    flips = torch.rand(count, 3, generator=generator) < 0.5
    swaps = torch.rand(count, generator=generator) < 0.5
    shifts = torch.randint(-_SHIFT, _SHIFT + 1, (count, 3), generator=generator)
    parts = [_turned(known, i, flips[i], bool(swaps[i]), shifts[i]) for i in range(count)]
    images, masks, centres = map(torch.stack, zip(*parts, strict=True))
    return replace(known, images=images, masks=masks, centres=centres)


@lru_cache(maxsize=_BATCHES)
def _batch(backgrounds: Backgrounds, count: int, which: int) -> Nodules:
    return synthesise(backgrounds, count, _SEED + which)


def _turned(patches: Nodules, i: int, flips: Tensor, swap: bool, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The image, the mask and the centre of patch `i`, flipped, its first two axes swapped, and moved by `shift`."""
    centre = torch.where(flips, SIZE - 1 - patches.centres[i], patches.centres[i])
    axes = [axis + 1 for axis in range(3) if flips[axis]]
    image, mask = patches.images[i].flip(axes), patches.masks[i].flip(axes).to(patches.images)
    if swap:
        image, mask, centre = image.transpose(1, 2), mask.transpose(1, 2), centre[[1, 0, 2]]
    where = (slice(None), *(slice(_SHIFT - s, _SHIFT - s + SIZE) for s in shift.tolist()))
    image = F.pad(image[None], (_SHIFT,) * 6, mode="replicate")[0][where]
    mask = F.pad(mask, (_SHIFT,) * 6)[where]
    return image, mask > 0, centre + shift


def loss(network: CapsuleLungNodule, patches: Nodules) -> Tensor:
    """What `lung_nodule_semantic` minimises, and the squared error of the nodules drawn again."""
    device = network.class_head.weight.device
    features = network.features(patches.images.to(device))
    drawing = F.mse_loss(network.redrawn(features), alone(patches).to(device))
    return semantic.error(network, features, patches) + _DRAWING_WEIGHT * drawing


def alone(patches: Nodules) -> Tensor:
    """The nodules without what is around them, each in the middle of nothing: (N, 1, 16, 16, 16), 0..1."""
    return around(patches.images * patches.masks, patches.centres)


@torch.no_grad()
def measure(network: CapsuleLungNodule, patches: Nodules) -> dict[str, float]:
    """What is measured of `lung_nodule_semantic`, where the capsule "nodule" comes from, and how well the nodules are
    drawn again.

    `routed_pointing` is the share of the nodules found in which the place that adds most to the capsule is in the mask;
    `drawing_r2` the part of the squared differences to the mean nodule that the drawings explain, of the nodules.
    """
    measured = semantic.measure(network, patches)
    device = network.class_head.weight.device
    taken: list[Tensor] = []
    handle = network.primary.register_forward_hook(lambda module, inputs, output: taken.append(output))
    try:
        capsules = torch.cat([network.features(part.to(device)) for part in patches.images.split(50)])
    finally:
        handle.remove()
    lesion = patches.labels > 0
    found = lesion & (network.named(capsules)[:, 0] > 0.5).cpu()
    if found.any():
        parts = network.routed(torch.cat(taken))[:, :1].cpu()
        on_patch = F.interpolate(parts, size=patches.images.shape[2:], mode="trilinear").flatten(1)[found]
        inside = patches.masks.flatten(1)[found].gather(1, on_patch.argmax(1, keepdim=True))
        measured["routed_pointing"] = float(inside.float().mean())
    true, drawn = alone(patches)[lesion], network.redrawn(capsules).cpu()[lesion]
    spread = (true - true.mean(0)).square().sum()
    measured["drawing_r2"] = 1 - float((drawn - true).square().sum() / spread)
    return measured


def publish(network: nn.Module, metrics: dict[str, float], folder: Path) -> None:
    """Write the bundle."""
    about = {
        "name": "Lung nodule classifier with attributes in capsules",
        "task": "Classification of lung patches of 50 mm: no nodule, benign-like, malignant-like by a known rule",
        "description": "A demonstration network that decides by ten attributes, each the length of a capsule. Its "
        "classes follow a published rule on computed nodules, not pathology.",
        "intended_use": "Demonstration, teaching and tests of explanation methods. Not for diagnosis.",
    }
    metadata = resources.path("Models/lung_nodule_semantic/configs/metadata.json")
    other = json.loads(metadata.read_text("utf-8"))["eval_metrics"]
    columns = [(measured, f"{cases}{{}}") for cases in ("", "borderline_") for measured in (metrics, other)]
    rows = [[said, *(f"{of[key.format(name)]:.3f}" for of, key in columns)] for said, name in _BESIDE.items()]
    card = _CARD.format(beside="\n".join(f"| {' | '.join(row)} |" for row in rows), **metrics)
    lung_nodule.write_classifier(
        folder, network, about, ["evidence"], card, metrics, attributes=[a.name for a in ATTRIBUTES]
    )


_BESIDE = {
    "accuracy, three classes": "accuracy",
    "mean log-likelihood": "log_likelihood",
    "accuracy with findings there or not, nothing between": "rounded_accuracy",
    "accuracy with the true attributes put in": "corrected_accuracy",
    "nodule or none, all patches": "nodule",
    "solid, part-solid or ground-glass": "solidity",
    "calcified": "calcification",
    "spiculated": "spiculation",
    "lobulated": "lobulation",
    "ill-defined (margin of more than 1.1 mm)": "margin",
    "elongated (axes of a ratio below 0.75)": "elongation",
    "diameter, mean error in mm": "diameter_mm",
    "diameter, R²": "diameter_r2",
    "HiResCAM at `evidence`: peak in the nodule": "pointing",
}
"""Rows of the card, and what they show beside `lung_nodule_semantic`."""

_CARD = """# Lung nodule classifier with attributes in capsules

Looks at a cube of 50 mm of chest CT and holds each of ten attributes (is there a nodule, how large is it, is it solid,
spiculated, calcified ...) in a capsule: 16 numbers, whose length is how much of it is there. By the lengths alone it
decides between **none**, **benign** and **malignant** (X-Caps, LaLonde et al. 2020, in 3-D). The method `capsules`
shows how much each attribute speaks for a class and from where in the scan its capsule came; `semantic` and its
interventions work as they do for `lung_nodule_semantic`.

**"Malignant" is a rule, not pathology.** The network was trained on nodules that were computed into a real CT; the card
of `lung_nodule` has the rule. No radiologist or pathologist was asked. Never use it for a patient.

## Trained on
The layers below the capsules began with the weights of `lung_nodule`; all was then trained together, on 1200 patches of
one chest CT (`chest_ct_mass.nrrd`, scan lung2 of pyradiomics 3.0.1, BSD 3-Clause), turned over and moved by up to 3
voxels, its own 48 mL mass left out, a third of the patches of each class, only clear cases (|logit| > 1.4). The loss is
that of `lung_nodule_semantic` plus the squared error of the nodule as the capsules draw it again; for that, unlike any
other network here, it was shown masks.
`medxai train lung-nodule-capsules` makes this bundle again ({seconds:.0f} s when this one was made).

## Measured
On computed nodules in the CT of another patient (`chest_ct_nodule.nrrd`, lung1), 450 patches each, and what
`lung_nodule_semantic` reaches on the same:

| | clear cases | semantic | with borderline cases (\\|logit\\| > 0.8) | semantic |
|---|---|---|---|---|
{beside}

The plain `lung_nodule` has an accuracy of 0.947 and 0.956 there; each has a standard error of 0.01.

| of the capsules alone | clear cases | with borderline cases |
|---|---|---|
| the place that adds most to "nodule" is in the nodule | {routed_pointing:.3f} | {borderline_routed_pointing:.3f} |
| the nodule drawn again: R² beside the mean nodule | {drawing_r2:.3f} | {borderline_drawing_r2:.3f} |

The real nodule of lung1 (1.36 mL), which no training saw: P(malignant) = {real_centred:.4f} in the middle of the patch,
at least {real_shifted_min:.4f} with the patch up to 5 mm off along each axis.

## Unlike X-Caps
- It decides by the lengths of the capsules, X-Caps by their vectors: so nothing passes beside what has a name.
- The same matrix votes at every place, so it takes patches of any size, and a map of the votes can be read off.
- X-Caps fits the spread of four readers' scores. Computed nodules have no readers: an attribute is there or not.
- A diameter is a length, too: 0 is 5 mm and 1 is 25 mm, so nothing is larger than 25 mm.

## Limits
- About half of the nodules are lobulated, ill-defined or elongated: an attribute that is right in little more than half
  of the cases is little more than guessed.
- Nothing passes beside the attributes, but a length can carry more than its name says.
- The nodule drawn again is small (16 x 16 x 16 of 2.5 mm) and blurred. It is for the training, and to see what a number
  of a capsule stands for; it proves nothing.
- One patient to train on, one to test on, one real nodule: an illustration, not a performance claim.
- Nodules of 7 to 24 mm in lung. The real mass of lung2 (48 mL, 45 mm) is out of distribution.
- The scans have slices of 5 mm. Contrast agent, other kernels and other diseases were never seen.

## Reading it
Input: CT in RAS orientation at 1.25 mm, -1000..400 HU to 0..1, 40 x 40 x 40 voxels (any size from 24 works). Output:
logits. The output of the layer `degrees` holds the attributes in the order nodule, diameter (mm), solid, part-solid,
ground-glass, elongation, margin, lobulation, spiculation, calcification: 0 to 1 but for the diameter.
`python -m monai.bundle run` takes every file as one patch: give it cubes of 50 mm.
"""


RECIPE = Recipe(
    name="lung-nodule-capsules",
    network=build,
    loss=loss,
    measure=measure,
    real=lung_nodule.real,
    score="log_likelihood",
    publish=publish,
    repeat=repeated,
    epochs=16,
    steps=50,
    learning_rate=3e-3,
    patience=16,
    validation=150,
)
