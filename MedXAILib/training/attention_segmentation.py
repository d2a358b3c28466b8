"""The recipe of `lung_nodule_attention_segmentation`: which voxels are nodule, by a U-Net with attention gates."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from monai.networks.nets import AttentionUnet
from torch import Tensor, nn

from MedXAILib.synthetic.lung_nodules import Nodules
from MedXAILib.training import lung_nodule_segmentation
from MedXAILib.training.trainer import Recipe

_UNET: dict[str, Any] = {
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 2,
    "channels": [8, 16, 32],
    "strides": [2, 2],
}
_DEFINITION = {"_target_": "monai.networks.nets.AttentionUnet", **_UNET}
_LAYER = "model.1.submodule.1.merge"
# The coefficients of each gate, and how many voxels its units, the first at voxel 0, are apart.
_GATES = {"fine": ("model.1.attention.psi", 1), "coarse": ("model.1.submodule.1.attention.psi", 2)}


def build() -> AttentionUnet:
    """An untrained network, (N, 1, D, H, W) -> logits (N, 2, D, H, W)."""
    return AttentionUnet(**_UNET)


def measure(network: nn.Module, patches: Nodules) -> dict[str, float]:
    """What `lung_nodule_segmentation` measures, and the mean coefficient of each gate in the nodules (`..._inside`) and
    elsewhere in patches with a nodule (`..._outside`)."""
    read: dict[str, list[Tensor]] = {name: [] for name in _GATES}
    handles = [
        network.get_submodule(layer).register_forward_hook(lambda _m, _i, y, name=name: read[name].append(y.cpu()))
        for name, (layer, _) in _GATES.items()
    ]
    measured = lung_nodule_segmentation.measure(network, patches)
    for handle in handles:
        handle.remove()
    lesion = patches.labels > 0
    for name, (_, step) in _GATES.items():
        coefficients = torch.cat(read[name])[lesion]
        mask = patches.masks[lesion][..., ::step, ::step, ::step]
        measured[f"{name}_inside"] = float(coefficients[mask].mean())
        measured[f"{name}_outside"] = float(coefficients[~mask].mean())
    return measured


def publish(network: nn.Module, metrics: dict[str, float], folder: Path) -> None:
    """Write the bundle."""
    about = {
        "name": "Lung nodule segmentation with attention",
        "task": "Segmentation of lung nodules of 7 to 24 mm in chest CT",
        "description": "A demonstration network with attention gates, trained on computed nodules.",
        "intended_use": "Demonstration, teaching and tests of explanation methods. Not for diagnosis.",
    }
    card = _CARD.format(**metrics)
    lung_nodule_segmentation.write_segmentation(folder, network, _DEFINITION, about, [_LAYER], card, metrics)


_CARD = """# Lung nodule segmentation with attention

MONAI's `AttentionUnet`, small, that marks the voxels of a nodule in chest CT. At every skip connection a gate says how
much each place counts (Oktay et al. 2018); the method `attention` shows the coefficients. It exists so that attention
can be tried, taught and tested. Never use it for a patient.

## Trained on
Nodules of exactly known shape that were computed into one real chest CT (`chest_ct_mass.nrrd`, scan lung2 of
pyradiomics 3.0.1, BSD 3-Clause), its own 48 mL mass left out; a third of the patches without a nodule. Soft Dice plus
cross-entropy. `medxai train lung-nodule-attention-segmentation` makes this bundle again ({seconds:.0f} s when this one
was made).

## Measured
On computed nodules in the CT of another patient (`chest_ct_nodule.nrrd`, lung1), 450 patches:

| | clear cases | with borderline cases |
|---|---|---|
| mean Dice of the nodules | {dice:.3f} | {borderline_dice:.3f} |
| nodules with a Dice above 0.1 | {detected:.3f} | {borderline_detected:.3f} |
| patches without a nodule in which fewer than 10 voxels are marked | {empty:.3f} | {borderline_empty:.3f} |
| mean coefficient at stride 2 in the nodule | {coarse_inside:.3f} | {borderline_coarse_inside:.3f} |
| mean coefficient at stride 2 elsewhere | {coarse_outside:.3f} | {borderline_coarse_outside:.3f} |
| mean coefficient at full resolution in the nodule | {fine_inside:.3f} | {borderline_fine_inside:.3f} |
| mean coefficient at full resolution elsewhere | {fine_outside:.3f} | {borderline_fine_outside:.3f} |

`lung_nodule_segmentation`, without gates, has a Dice of 0.786 and 0.818 on the same patches. The real nodule of lung1
(1.36 mL), which no training saw, in the patch centred on it: Dice {real_dice:.2f}.

## Limits
- A gate passes features on or holds them back; a low coefficient on a nodule need not mean that it is overlooked.
- One patient to train on, one to test on, one real nodule: an illustration, not a performance claim.
- Trained in lung and on nodules of 7 to 24 mm only. Larger masses are out of distribution.
- The scans have slices of 5 mm. Contrast agent, other kernels and other diseases were never seen.

## Reading it
Input: CT in RAS orientation at 1.25 mm, -1000..400 HU to 0..1, windows of 40 x 40 x 40 voxels. Output: logits of
background and nodule.
"""


RECIPE = Recipe(
    name="lung-nodule-attention-segmentation",
    network=build,
    loss=lung_nodule_segmentation.loss,
    measure=measure,
    real=lung_nodule_segmentation.real,
    score="dice",
    publish=publish,
    own=partial(lung_nodule_segmentation.own, network=build, definition=_DEFINITION, layer=_LAYER),
    epochs=12,
    steps=40,
    batch=20,
    learning_rate=6e-3,
)
