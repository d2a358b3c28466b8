"""The cases of the table: patches whose nodule is known, and the network that is asked about them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from torch import Tensor

import MedXAILib as mx
from MedXAILib import resources
from MedXAILib.synthetic.lung_nodules import CLASSES, Backgrounds, synthesise

SEED = 401
"""Of the synthetic nodules. Neither the training nor the model card has seen it."""
OF_EACH_CLASS = 12
REAL = 12
SHIFT = 12
"""The nodules lie up to so many voxels off the middle of the patch, along each axis."""
STAGES = ("class_head", "evidence", "shape.1", "shape.0", "texture", "stem")
"""The layers of the demo classifier, from the output back. Its attribute head has no part in the classes."""


@dataclass(frozen=True)
class Patches:
    """What a network sees: `images` (N, 1, D, H, W), the `masks` of its nodules (N, 1, D, H, W) bool, and `labels`
    (N,), the classes to explain."""

    images: Tensor
    masks: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, which: slice | Tensor) -> Patches:
        return Patches(self.images[which], self.masks[which], self.labels[which])


def demo_model(name: str = "lung_nodule") -> mx.Model:
    """A shipped classifier, for patches that are prepared already."""
    return replace(mx.load_model(resources.path(f"Models/{name}")), preprocessing=None)


@cache
def scan() -> Backgrounds:
    """Of a patient whom the network has not seen."""
    return Backgrounds.test()


@cache
def lung() -> list[mx.Volume]:
    """Five patches of that lung without a nodule, for methods that compare with a set of scans."""
    drawn = synthesise(scan(), 5 * len(CLASSES), SEED + 1)
    return [mx.Volume(image, np.eye(4)) for image in drawn.images[drawn.labels == CLASSES.index("none")]]


def synthetic(model: mx.Model) -> Patches:
    """Nodules computed into that lung, that the network classifies rightly: benign and malignant in turn."""
    drawn = synthesise(scan(), 6 * OF_EACH_CLASS, SEED)
    found = _right(model, Patches(drawn.images, drawn.masks, drawn.labels))
    of_each = [(found.labels == CLASSES.index(name)).nonzero()[:OF_EACH_CLASS, 0] for name in ("benign", "malignant")]
    return found[torch.stack(of_each, 1).flatten()]


def real(model: mx.Model) -> Patches:
    """The patient's own nodule, in patches that are shifted at random and that the network calls malignant."""
    draws = torch.randint(-SHIFT, SHIFT + 1, (2 * REAL, 3), generator=torch.Generator().manual_seed(SEED))
    images, masks = map(torch.cat, zip(*(scan().lesion_patch(*shift) for shift in draws.tolist()), strict=True))
    return _right(model, Patches(images, masks, torch.full((len(draws),), CLASSES.index("malignant"))))[:REAL]


def _right(model: mx.Model, patches: Patches) -> Patches:
    with model.ready(), torch.no_grad():
        said = model.forward(patches.images).argmax(1)
    return patches[said == patches.labels]
