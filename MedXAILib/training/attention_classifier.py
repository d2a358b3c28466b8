"""The recipe of `lung_nodule_attention`: the classes of `lung_nodule`, from what the network attends to."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from MedXAILib.networks.attention_classifier import AttentionClassifier
from MedXAILib.synthetic.lung_nodules import ATTRIBUTES, CLASSES, Nodules
from MedXAILib.training import lung_nodule
from MedXAILib.training.table import Patches
from MedXAILib.training.trainer import Recipe

_GATES = ("fine", "coarse")


def build() -> AttentionClassifier:
    """A network that sees as `lung_nodule` does and has yet to learn what to attend to."""
    network = AttentionClassifier(len(CLASSES), len(ATTRIBUTES))
    # The heads have other inputs, and the same units.
    lung_nodule.begin_as_shipped(network, heads=True)
    return network


def loss(network: AttentionClassifier, patches: Nodules | Patches) -> Tensor:
    """The loss of `lung_nodule`, of both gates together and of either one alone.

    Deep supervision (Schlemper et al. 2019): without it `fine` leaves the answer to `coarse` and attends to the
    background.
    """
    features = network.features(patches.images.to(network.class_head.weight.device))
    fine = torch.arange(features.shape[1], device=features.device) < network.fine.of_features.in_channels
    return torch.stack([lung_nodule.error(network, features * kept, patches) for kept in (1, fine, ~fine)]).mean()


def measure(network: AttentionClassifier, patches: Nodules) -> dict[str, float]:
    """What `lung_nodule` measures, HiResCAM being at `coarse`, and where the attention of each gate lies for lesions.

    `..._pointing` is the share of lesions, classified correctly or not, in which the coefficient is largest, and
    `..._mass` the mean share of the coefficients.
    """
    measured = lung_nodule.measure(network, patches, "coarse")
    lesion = patches.labels > 0
    mask = patches.masks[lesion].flatten(1)
    for gate, maps in attention(network, patches.images[lesion]).items():
        share = maps.flatten(1) / maps.flatten(1).sum(1, keepdim=True)
        measured[f"{gate}_pointing"] = float(mask.gather(1, share.argmax(1, keepdim=True)).float().mean())
        measured[f"{gate}_mass"] = float((share * mask).sum(1).mean())
    return measured


@torch.no_grad()
def attention(network: AttentionClassifier, images: Tensor) -> dict[str, Tensor]:
    """The coefficients of each gate on the patches (N, 1, D, H, W), on the CPU."""
    found: dict[str, list[Tensor]] = {name: [] for name in _GATES}

    def read(name: str) -> Any:
        gate = getattr(network, name)

        def hook(_module: nn.Module, inputs: tuple[Tensor, Tensor], _output: Tensor) -> None:
            # Without aligned corners a unit lands in the middle of what it looks at.
            placed = F.interpolate(gate.coefficients(*inputs), size=images.shape[2:], mode="trilinear")
            found[name].append(placed.cpu())

        return gate.register_forward_hook(hook)

    handles = [read(name) for name in _GATES]
    for part in images.split(50):
        network(part.to(network.class_head.weight.device))
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def publish(network: nn.Module, metrics: dict[str, float], folder: Path) -> None:
    """Write the bundle."""
    about = {
        "name": "Lung nodule classifier with attention",
        "task": "Classification of lung patches of 50 mm: no nodule, benign-like, malignant-like by a known rule",
        "description": "A demonstration network that shows what it attends to. Its classes follow a published rule on "
        "computed nodules, not pathology.",
        "intended_use": "Demonstration, teaching and tests of explanation methods. Not for diagnosis.",
    }
    lung_nodule.write_classifier(folder, network, about, ["coarse"], _CARD.format(**metrics), metrics)


_CARD = """# Lung nodule classifier with attention

Looks at a cube of 50 mm of chest CT and says **none**, **benign** or **malignant**, as `lung_nodule` does, from what it
attends to: the method `attention` shows the coefficients. Where `lung_nodule` takes the mean and the maximum of its
evidence, this network has two attention gates (Schlemper et al. 2019), one at stride 2 and one at stride 4, gated by
what is seen at stride 8. The scores are linear in what comes out of the gates. The coefficients of a gate sum to 1.

**"Malignant" is a rule, not pathology.** The network was trained on nodules that were computed into a real CT; the card
of `lung_nodule` has the rule. No radiologist or pathologist was asked. Never use it for a patient.

## Trained on
The layers below the gates began with the weights of `lung_nodule`; all was then trained together, on one chest CT
(`chest_ct_mass.nrrd`, scan lung2 of pyradiomics 3.0.1, BSD 3-Clause), its own 48 mL mass left out, a third of the
patches of each class, only clear cases (|logit| > 1.4). The loss is the cross-entropy of the class plus the squared
error of seven attributes, of both gates together and of what either one lets through by itself. No mask was shown to
the network, and nothing told it where to attend.
`medxai train lung-nodule-attention` makes this bundle again ({seconds:.0f} s when this one was made).

## Measured
On computed nodules in the CT of another patient (`chest_ct_nodule.nrrd`, lung1), 450 patches each:

| | clear cases | with borderline cases (\\|logit\\| > 0.8) |
|---|---|---|
| accuracy, three classes | {accuracy:.3f} | {borderline_accuracy:.3f} |
| mean log-likelihood | {log_likelihood:.3f} | {borderline_log_likelihood:.3f} |
| attention at stride 4 (`coarse`): peak in the nodule | {coarse_pointing:.3f} | {borderline_coarse_pointing:.3f} |
| attention at stride 4: share in the nodule | {coarse_mass:.3f} | {borderline_coarse_mass:.3f} |
| attention at stride 2 (`fine`): peak in the nodule | {fine_pointing:.3f} | {borderline_fine_pointing:.3f} |
| attention at stride 2: share in the nodule | {fine_mass:.3f} | {borderline_fine_mass:.3f} |
| HiResCAM at `coarse`: peak in the nodule | {pointing:.3f} | {borderline_pointing:.3f} |
| HiResCAM at `coarse`: positive relevance in the nodule | {mass:.3f} | {borderline_mass:.3f} |

The attention is that of all nodules; HiResCAM, of the class that was said, of those classified correctly. On the same
patches `lung_nodule` has an accuracy of 0.947 and 0.956; each has a standard error of 0.01.

The real nodule of lung1 (1.36 mL), which no training saw: P(malignant) = {real_centred:.4f} in the middle of the patch,
at least {real_shifted_min:.4f} with the patch up to 5 mm off along each axis.

## Limits
- Attention says where the network looks and not what it makes of it: it is the same for every class, and lies
  somewhere also where there is no nodule.
- One patient to train on, one to test on, one real nodule: an illustration, not a performance claim.
- Nodules of 7 to 24 mm in lung. The real mass of lung2 (48 mL, 45 mm) is out of distribution.
- The scans have slices of 5 mm. Contrast agent, other kernels and other diseases were never seen.

## Reading it
Input: CT in RAS orientation at 1.25 mm, -1000..400 HU to 0..1, 40 x 40 x 40 voxels (any size from 24 works). Output:
logits. The output of the layer `attribute_head` holds diameter (mm), elongation, lobulation, spiculation, solidity,
calcification and margin (mm). `python -m monai.bundle run` takes every file as one patch: give it cubes of 50 mm.
"""


RECIPE = Recipe(
    name="lung-nodule-attention",
    network=build,
    loss=loss,
    measure=measure,
    real=lung_nodule.real,
    score="log_likelihood",
    publish=publish,
    own=partial(lung_nodule.own, kind=AttentionClassifier, layer="coarse"),
    epochs=16,
    steps=50,
    learning_rate=4e-3,
)
