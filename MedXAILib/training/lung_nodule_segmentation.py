"""The recipe of `lung_nodule_segmentation`: which voxels are nodule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from torch import Tensor, nn

from MedXAILib.errors import MedXAIError
from MedXAILib.synthetic.lung_nodules import Backgrounds, Nodules
from MedXAILib.training.bundle import Grid, write_bundle
from MedXAILib.training.own_bundle import told_of
from MedXAILib.training.table import Patches, Table, augmented
from MedXAILib.training.trainer import Recipe

_CLASSES = ("background", "nodule")
_GRID = Grid()
# Batch normalisation, because instance normalisation would hide how dense a patch is as a whole.
_UNET: dict[str, Any] = {
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": len(_CLASSES),
    "channels": [16, 32, 64],
    "strides": [2, 2],
    "num_res_units": 1,
    "norm": "batch",
}
_DEFINITION = {"_target_": "monai.networks.nets.UNet", **_UNET}
_LAYER = "model.1.submodule.2"
_LOSS = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)


def build() -> UNet:
    """An untrained network, (N, 1, D, H, W) -> logits (N, 2, D, H, W)."""
    return UNet(**_UNET)


def loss(network: nn.Module, patches: Nodules | Patches) -> Tensor:
    """Soft Dice over the batch plus cross-entropy."""
    assert patches.masks is not None
    device = next(network.parameters()).device
    value: Tensor = _LOSS(network(patches.images.to(device)), patches.masks.to(device))
    return value


@torch.no_grad()
def measure(network: nn.Module, patches: Nodules | Patches) -> dict[str, float]:
    """Mean Dice of the patches with a nodule, and the share of patches without one that stay empty."""
    assert patches.masks is not None
    device = next(network.parameters()).device
    found = torch.cat([network(images.to(device)).argmax(1, keepdim=True).cpu() for images in patches.images.split(50)])
    lesion = patches.masks.flatten(1).any(1)
    scores = dice(found[lesion] > 0, patches.masks[lesion])
    return {
        "dice": float(scores.mean()),
        "detected": float((scores > 0.1).float().mean()),
        "empty": float((found[~lesion].flatten(1).sum(1) < 10).float().mean()),
    }


def own(
    recipe: Recipe,
    table: Table,
    network: Callable[..., nn.Module] = build,
    definition: Mapping[str, Any] = _DEFINITION,
    layer: str = _LAYER,
) -> Recipe:
    """`recipe` for what a person's own table has masks of: of an untrained `network` of this `definition`, whose class
    maps had best look at `layer`.

    Raises:
        MedXAIError: for a row without a mask, and a grid that cannot be halved twice.
    """
    table.require("segmentation")
    if table.grid.size % 4:
        raise MedXAIError(f"'{recipe.name}' halves its grid twice: give a size that 4 divides, not {table.grid.size}.")
    return replace(
        recipe,
        network=network,
        measure=measure_own,
        publish=partial(publish_own, table, recipe.name, definition, layer),
        synthesise=augmented,
    )


def measure_own(network: nn.Module, patches: Patches) -> dict[str, float]:
    """What `measure` does, but for what was not there."""
    return {name: value for name, value in measure(network, patches).items() if not math.isnan(value)}


def dice(one: Tensor, other: Tensor) -> Tensor:
    """Twice the overlap over the sum, (N, ...) bool -> (N,)."""
    overlap = (one & other).flatten(1).sum(1)
    return 2 * overlap / (one.flatten(1).sum(1) + other.flatten(1).sum(1)).clamp_min(1)


@torch.no_grad()
def real(network: nn.Module, scan: Backgrounds) -> dict[str, float]:
    """Dice with the mask of the scan's own lesion, in the patch around it."""
    image, mask = scan.lesion_patch()
    found = network(image.to(next(network.parameters()).device)).argmax(1, keepdim=True).cpu()
    return {"dice": float(dice(found > 0, mask)[0])}


def publish(network: nn.Module, metrics: dict[str, float], folder: Path) -> None:
    """Write the bundle."""
    about = {
        "name": "Lung nodule segmentation",
        "task": "Segmentation of lung nodules of 7 to 24 mm in chest CT",
        "description": "A demonstration network for explanations, trained on computed nodules.",
        "intended_use": "Demonstration, teaching and tests of explanation methods. Not for diagnosis.",
    }
    write_segmentation(folder, network, _DEFINITION, about, [_LAYER], _CARD.format(**metrics), metrics)


def publish_own(
    table: Table,
    recipe: str,
    definition: Mapping[str, Any],
    layer: str,
    network: nn.Module,
    metrics: dict[str, float],
    folder: Path,
) -> None:
    """Write the bundle of a network that learnt from `table`."""
    told = told_of(table, recipe, folder.name, metrics, "Segmentation", "marks the voxels of a **finding**", _OWN)
    write_segmentation(folder, network, definition, layers=[layer], classes=("background", "finding"), **told)


_OWN = """`dice` is the mean of the patches whose mask is not empty, `detected` the share of them with a Dice above 0.1,
`empty` the share of patches with an empty mask in which fewer than 10 voxels are marked."""


def write_segmentation(
    folder: Path,
    network: nn.Module,
    definition: Mapping[str, Any],
    about: dict[str, str],
    layers: list[str],
    card: str,
    metrics: dict[str, float],
    classes: Sequence[str] = _CLASSES,
    grid: Grid = _GRID,
    **other: Any,
) -> None:
    """Write the bundle of a network that marks the second class in windows of a scan (see `write_bundle`)."""
    write_bundle(
        folder,
        network,
        definition=definition,
        inferer={
            "_target_": "SlidingWindowInferer",
            "roi_size": [grid.size] * 3,
            "sw_batch_size": 8,
            "overlap": 0.5,
            "mode": "gaussian",
        },
        postprocessing=[
            {"_target_": "Activationsd", "keys": "pred", "softmax": True},
            {
                "_target_": "Invertd",
                "keys": "pred",
                "transform": "@preprocessing",
                "orig_keys": "@image_key",
                "nearest_interp": False,
                "to_tensor": True,
            },
            {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
            {"_target_": "SaveImaged", "keys": "pred", "output_dir": "@output_dir", "output_postfix": classes[1]},
        ],
        handlers=[],
        about=about,
        output={
            "type": "image",
            "format": "segmentation",
            "num_channels": len(classes),
            "spatial_shape": [grid.size] * 3,
            "dtype": "float32",
            "value_range": [0, 1],
            "is_patch_data": True,
            "channel_def": {str(i): name for i, name in enumerate(classes)},
        },
        layers=layers,
        card=card,
        metrics=metrics,
        grid=grid,
        **other,
    )


_CARD = """# Lung nodule segmentation

A small 3-D U-Net that marks the voxels of a nodule in chest CT. It exists so that explanations of segmentations can be
tried, taught and tested. Never use it for a patient.

## Trained on
Nodules of exactly known shape that were computed into one real chest CT (`chest_ct_mass.nrrd`, scan lung2 of
pyradiomics 3.0.1, BSD 3-Clause), its own 48 mL mass left out; every batch freshly computed, a third of it without a
nodule. Soft Dice plus cross-entropy. `medxai train lung-nodule-segmentation` makes this bundle again ({seconds:.0f} s
when this one was made).

## Measured
On computed nodules in the CT of another patient (`chest_ct_nodule.nrrd`, lung1), 450 patches:

| | clear cases | with borderline cases |
|---|---|---|
| mean Dice of the nodules | {dice:.3f} | {borderline_dice:.3f} |
| nodules with a Dice above 0.1 | {detected:.3f} | {borderline_detected:.3f} |
| patches without a nodule in which fewer than 10 voxels are marked | {empty:.3f} | {borderline_empty:.3f} |

The real nodule of lung1 (1.36 mL), which no training saw, in the patch centred on it: Dice {real_dice:.2f}.

## Limits
- One patient to train on, one to test on, one real nodule: an illustration, not a performance claim.
- Trained in lung and on nodules of 7 to 24 mm only. The real mass of lung2 (48 mL, 45 mm) is out of distribution: most
  of it is missed.
- The scans have slices of 5 mm. Contrast agent, other kernels and other diseases were never seen.

## Reading it
Input: CT in RAS orientation at 1.25 mm, -1000..400 HU to 0..1, windows of 40 x 40 x 40 voxels. Output: logits of
background and nodule.
"""


RECIPE = Recipe(
    name="lung-nodule-segmentation",
    network=build,
    loss=loss,
    measure=measure,
    real=real,
    score="dice",
    publish=publish,
    own=own,
    epochs=12,
    steps=25,
)
