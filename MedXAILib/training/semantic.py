"""The recipe of `lung_nodule_semantic`: the classes of `lung_nodule`, by attributes that a radiologist would name."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from MedXAILib.networks.capsules import CapsuleLungNodule
from MedXAILib.networks.semantic import ATTRIBUTES, Decision, SemanticLungNodule
from MedXAILib.synthetic.lung_nodules import CLASSES, Nodules, draw
from MedXAILib.training import lung_nodule
from MedXAILib.training.own_semantic import own
from MedXAILib.training.trainer import Recipe

_NAMES = [a.name for a in ATTRIBUTES]
_DIAMETER = _NAMES.index("diameter")
_SOLIDITY = [i for i, a in enumerate(ATTRIBUTES) if a.scale == "solidity"]
_FINDINGS = [i for i, a in enumerate(ATTRIBUTES) if not a.unit]

# From where on the generator's numbers are a finding: elongation is the ratio of the axes, the margin is in mm.
_SOLID, _GLASS = 0.9, 0.1
_ELONGATED, _ILL_DEFINED = 0.75, 1.1

_ATTRIBUTE_WEIGHT = 3.0
_DECAY = 1e-3
_PATCHES = 600


def build() -> SemanticLungNodule:
    """A network that sees as `lung_nodule` does, and has yet to learn what it is called and what to decide by it."""
    network = SemanticLungNodule(len(CLASSES))
    begin(network)
    network.attribute_head.offset[_DIAMETER] = network.class_head.offset[_DIAMETER]
    network.attribute_head.scale[_DIAMETER] = network.class_head.scale[_DIAMETER]
    return network


def begin(network: SemanticLungNodule | CapsuleLungNodule) -> None:
    """Give `network` the weights that the shipped classifier has below its heads, and a decision by true attributes."""
    lung_nodule.begin_as_shipped(network)
    attributes, labels = draw(_PATCHES, seed=0)
    known = true_attributes(attributes, labels)
    typical, spread = known.nanmean(0), (known - known.nanmean(0)).square().nanmean(0).sqrt()
    network.class_head.offset.copy_(typical)
    network.class_head.scale.copy_(spread)
    _learn_decision(network.class_head, torch.where(known.isfinite(), known, typical), labels)


def _learn_decision(head: Decision, attributes: Tensor, labels: Tensor) -> None:
    """Begin with what decides best by the true attributes, as an independent bottleneck would go on with."""
    optimiser = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = F.cross_entropy(head(attributes), labels) + _DECAY * head.weight.square().sum()
        value.backward()
        return value

    optimiser.step(closure)


def true_attributes(attributes: Tensor, labels: Tensor) -> Tensor:
    """The generator's numbers (N, 7) as `ATTRIBUTES` (N, 10); NaN is all that a patch without a nodule has not."""
    diameter, elongation, lobulation, spiculation, solidity, calcification, margin = attributes.unbind(1)
    part = (solidity > _GLASS) & (solidity < _SOLID)
    known = {
        "nodule": labels > 0,
        "diameter": diameter,
        "solid": solidity >= _SOLID,
        "part_solid": part,
        "ground_glass": solidity <= _GLASS,
        "elongation": elongation < _ELONGATED,
        "margin": margin > _ILL_DEFINED,
        "lobulation": lobulation > 0,
        "spiculation": spiculation > 0,
        "calcification": calcification > 0,
    }
    values = torch.stack([known[name].to(attributes) for name in _NAMES], dim=1)
    values[labels == 0, 1:] = torch.nan
    return values


def loss(network: SemanticLungNodule, patches: Nodules) -> Tensor:
    """Cross-entropy of the class, and of the attributes that a patch has: the mean negative log-likelihood of the
    findings and the squared error of the diameter in its own spread."""
    return error(network, network.features(patches.images.to(network.class_head.weight.device)), patches)


def error(network: SemanticLungNodule | CapsuleLungNodule, features: Tensor, patches: Nodules) -> Tensor:
    """The `loss` of what follows from `features`."""
    device = features.device
    said = network.named(features)
    true = true_attributes(patches.attributes, patches.labels).to(device)
    known = true.isfinite()
    wrong = F.binary_cross_entropy(said[:, _FINDINGS], true[:, _FINDINGS].nan_to_num(), reduction="none")
    findings = wrong[known[:, _FINDINGS]].mean()
    off = (said - true)[known[:, _DIAMETER], _DIAMETER] / network.class_head.scale[_DIAMETER]
    decided = F.cross_entropy(network.decide(said, features), patches.labels.to(device))
    return decided + _ATTRIBUTE_WEIGHT * (findings + off.square().mean())


@torch.no_grad()
def measure(network: SemanticLungNodule | CapsuleLungNodule, patches: Nodules) -> dict[str, float]:
    """What `lung_nodule` measures, and how right and how honest the attributes are.

    Of each finding the accuracy, of nodules, the scale "solidity" as one; of the diameter mean error in mm and R². The
    accuracy of the class once more: `rounded`, with each finding there or not; `corrected`, with the true attributes in
    the place of the predicted; `without`, with those of the reference. `leakage` is what is left of that above chance:
    what the network knows beside its attributes. `intervention_error` is how far, at most, a logit moves otherwise than
    by the weight when a finding is turned to its opposite.
    """
    measured = lung_nodule.measure(network, patches)
    device = network.class_head.weight.device
    features = torch.cat([network.features(part.to(device)) for part in patches.images.split(50)])
    said = network.named(features)
    true = true_attributes(patches.attributes, patches.labels).to(device)
    labels = patches.labels.to(device)
    lesion = labels > 0
    right = ((said > 0.5) == (true > 0.5)).float()
    for i in _FINDINGS:
        if i not in _SOLIDITY:
            measured[_NAMES[i]] = float(right[:, i].mean() if ATTRIBUTES[i].role == "noun" else right[lesion, i].mean())
    solidity = said[lesion][:, _SOLIDITY].argmax(1), true[lesion][:, _SOLIDITY].argmax(1)
    measured["solidity"] = float((solidity[0] == solidity[1]).float().mean())
    off, spread = (said - true)[lesion, _DIAMETER], true[lesion, _DIAMETER] - true[lesion, _DIAMETER].mean()
    measured["diameter_mm"] = float(off.abs().mean())
    measured["diameter_r2"] = 1 - float(off.square().sum() / spread.square().sum())

    def accuracy(attributes: Tensor) -> float:
        return float((network.decide(attributes, features).argmax(1) == labels).float().mean())

    rounded = said.clone()
    rounded[:, _FINDINGS] = (said[:, _FINDINGS] > 0.5).to(said)
    rounded[:, _SOLIDITY] = F.one_hot(said[:, _SOLIDITY].argmax(1), len(_SOLIDITY)).to(said)
    measured["rounded_accuracy"] = accuracy(rounded)
    measured["corrected_accuracy"] = accuracy(torch.where(true.isfinite(), true, said))
    measured["without_accuracy"] = accuracy(network.reference.expand_as(said))
    chance = float(labels.bincount().max() / len(labels))
    measured["leakage"] = max(0.0, measured["without_accuracy"] - chance)
    before = network.decide(said, features)
    errors = []
    for i in _FINDINGS:
        turned = said.clone()
        turned[:, i] = 1 - said[:, i]
        expected = (1 - 2 * said[:, i])[:, None] * network.class_head.each[:, i]
        errors.append((network.decide(turned, features) - before - expected).abs().max())
    measured["intervention_error"] = float(torch.stack(errors).max())
    return measured


def publish(network: nn.Module, metrics: dict[str, float], folder: Path) -> None:
    """Write the bundle."""
    about = {
        "name": "Lung nodule classifier with attributes",
        "task": "Classification of lung patches of 50 mm: no nodule, benign-like, malignant-like by a known rule",
        "description": "A demonstration network that decides by ten attributes, which it names. Its classes follow a "
        "published rule on computed nodules, not pathology.",
        "intended_use": "Demonstration, teaching and tests of explanation methods. Not for diagnosis.",
    }
    lung_nodule.write_classifier(
        folder, network, about, ["evidence"], _CARD.format(**metrics), metrics, attributes=_NAMES
    )


_CARD = """# Lung nodule classifier with attributes

Looks at a cube of 50 mm of chest CT, says what a radiologist would name (is there a nodule, how large is it, is it
solid, spiculated, calcified ...), and decides between **none**, **benign** and **malignant** by that alone: the scores
are linear in ten attributes and see nothing else (a hierarchical semantic network after Shen et al. 2019, as strict as
the concept bottleneck of Koh et al. 2020). The method `semantic` shows the attributes, how much each speaks for a
class, and what the network would say if an attribute were otherwise.

**"Malignant" is a rule, not pathology.** The network was trained on nodules that were computed into a real CT; the card
of `lung_nodule` has the rule. No radiologist or pathologist was asked. Never use it for a patient.

## Trained on
The layers below the heads began with the weights of `lung_nodule`; all was then trained together, on one chest CT
(`chest_ct_mass.nrrd`, scan lung2 of pyradiomics 3.0.1, BSD 3-Clause), its own 48 mL mass left out, a third of the
patches of each class, only clear cases (|logit| > 1.4). The loss is the cross-entropy of the class plus that of the
findings plus the squared error of the diameter. No mask was shown to the network.
`medxai train lung-nodule-semantic` makes this bundle again ({seconds:.0f} s when this one was made).

## Measured
On computed nodules in the CT of another patient (`chest_ct_nodule.nrrd`, lung1), 450 patches each:

| | clear cases | with borderline cases (\\|logit\\| > 0.8) |
|---|---|---|
| accuracy, three classes | {accuracy:.3f} | {borderline_accuracy:.3f} |
| mean log-likelihood | {log_likelihood:.3f} | {borderline_log_likelihood:.3f} |
| accuracy with findings there or not, nothing between | {rounded_accuracy:.3f} | {borderline_rounded_accuracy:.3f} |
| accuracy with the true attributes put in | {corrected_accuracy:.3f} | {borderline_corrected_accuracy:.3f} |
| accuracy with the same attributes for all | {without_accuracy:.3f} | {borderline_without_accuracy:.3f} |
| ... above chance: leakage beside the attributes | {leakage:.3f} | {borderline_leakage:.3f} |
| HiResCAM at `evidence`: peak in the nodule | {pointing:.3f} | {borderline_pointing:.3f} |
| HiResCAM at `evidence`: positive relevance in the nodule | {mass:.3f} | {borderline_mass:.3f} |
| a logit moves otherwise than by the weight, at most | {intervention_error:.4f} | {borderline_intervention_error:.4f} |

On the same patches `lung_nodule` has an accuracy of 0.947 and 0.956; each has a standard error of 0.01.

| attribute | right, clear cases | with borderline cases |
|---|---|---|
| nodule or none, all patches | {nodule:.3f} | {borderline_nodule:.3f} |
| solid, part-solid or ground-glass | {solidity:.3f} | {borderline_solidity:.3f} |
| calcified | {calcification:.3f} | {borderline_calcification:.3f} |
| spiculated | {spiculation:.3f} | {borderline_spiculation:.3f} |
| lobulated | {lobulation:.3f} | {borderline_lobulation:.3f} |
| ill-defined (margin of more than 1.1 mm) | {margin:.3f} | {borderline_margin:.3f} |
| elongated (axes of a ratio below 0.75) | {elongation:.3f} | {borderline_elongation:.3f} |
| diameter, mean error | {diameter_mm:.2f} mm | {borderline_diameter_mm:.2f} mm |
| diameter, R² | {diameter_r2:.3f} | {borderline_diameter_r2:.3f} |

The real nodule of lung1 (1.36 mL), which no training saw: P(malignant) = {real_centred:.4f} in the middle of the patch,
at least {real_shifted_min:.4f} with the patch up to 5 mm off along each axis.

## Limits
- About half of the nodules are lobulated, ill-defined or elongated: an attribute that is right in little more than half
  of the cases is little more than guessed.
- Nothing passes beside the attributes, but a probability can carry more than its name says: compare the accuracy with
  each finding there or not.
- An intervention says what the network would decide, not what it would see: nodules that are rendered again without
  their spikes move the decision mostly in the same direction, and less far, because other attributes are then seen
  otherwise as well.
- What the network is sure of has hardly a gradient, as a probability near 0 or 1 barely changes: HiResCAM of a class
  shows the rest, and hits the nodule less often than that of `lung_nodule` (0.997). The maps of `semantic` are of
  log-odds and do not fade.
- One patient to train on, one to test on, one real nodule: an illustration, not a performance claim.
- Nodules of 7 to 24 mm in lung. The real mass of lung2 (48 mL, 45 mm) is out of distribution.
- The scans have slices of 5 mm. Contrast agent, other kernels and other diseases were never seen.

## Reading it
Input: CT in RAS orientation at 1.25 mm, -1000..400 HU to 0..1, 40 x 40 x 40 voxels (any size from 24 works). Output:
logits. The output of the layer `degrees` holds the attributes in the order nodule, diameter (mm), solid, part-solid,
ground-glass, elongation, margin, lobulation, spiculation, calcification: probabilities but for the diameter.
`python -m monai.bundle run` takes every file as one patch: give it cubes of 50 mm.
"""


RECIPE = Recipe(
    name="lung-nodule-semantic",
    network=build,
    loss=loss,
    measure=measure,
    real=lung_nodule.real,
    score="log_likelihood",
    publish=publish,
    own=own,
    epochs=16,
    steps=50,
    learning_rate=3e-3,
    # It begins well, and is worse while the learning rate is high.
    patience=16,
)
