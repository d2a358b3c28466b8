"""The recipe of `lung_nodule_ladder_vae`: nodules, drawn from codes of which the uppermost two are a map."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
from sklearn.metrics import roc_auc_score  # type: ignore[import-untyped]
from torch import Tensor

from MedXAILib.networks.ladder_vae import LadderVAE
from MedXAILib.networks.vae import SIZE
from MedXAILib.synthetic.lung_nodules import ATTRIBUTES, CLASSES, Nodules
from MedXAILib.training import vae
from MedXAILib.training.bundle import write_generator
from MedXAILib.training.lung_nodule import begin_as_shipped
from MedXAILib.training.trainer import Recipe

_CASES = 510
_DECIDING = 60.0
_HU = 1400


def build() -> LadderVAE:
    """A network that sees as `lung_nodule` does, and has yet to learn what nodules look like."""
    network = LadderVAE(ATTRIBUTES, CLASSES, _CASES)
    begin_as_shipped(network.encoder.trunk)
    return network


def loss(network: LadderVAE, patches: Nodules) -> Tensor:
    """The bound on the likelihood, with the divergence at each level from what the one above makes likely, and the
    cross-entropy of the class by the two codes of the top."""
    seen = vae.shifted(patches.images).to(network.typical.device)
    rungs = network.climb(seen, [torch.randn(len(seen), size).to(seen) for size in network.levels])
    spent = sum(divergence(posterior, prior).sum(1).mean() for prior, posterior, _ in rungs)
    likely = vae.likelihood(network, seen, network.decoder(rungs[-1][2]))
    decided = F.cross_entropy(network.class_head(rungs[0][2]), patches.labels.to(seen.device))
    return spent - likely + _DECIDING * decided


def divergence(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    """The Kullback-Leibler divergence of normal distributions from others, each given by its mean and the logarithm of
    its variance, of the shape of the means."""
    (mean, log_variance), (to, log_to) = one, other
    return (log_to - log_variance + (log_variance.exp() + (mean - to).square()) * (-log_to).exp() - 1) / 2


@torch.no_grad()
def measure(network: LadderVAE, patches: Nodules) -> dict[str, float]:
    """The accuracy and the mean log-likelihood of the class by the two codes of the top, the mean absolute error in HU,
    and what the codes of each level cost. Of a network that is settled, how well a logistic regression of the map of
    the training tells malignant from benign on that of `patches` (AUC)."""
    seen = vae.middle(patches.images).to(network.typical.device)
    parts = [network.climb(part) for part in seen.split(30)]
    drawn = torch.cat([network.decoder(rungs[-1][2]) for rungs in parts])
    costs = [
        sum(float(divergence(rungs[level][1], rungs[level][0]).sum()) for rungs in parts) / len(seen)
        for level in range(len(network.levels))
    ]
    top = torch.cat([rungs[0][2] for rungs in parts])
    logits, labels = network.class_head(top), patches.labels.to(seen.device)
    decided = -float(F.cross_entropy(logits, labels))
    found = {
        "score": float(vae.likelihood(network, seen, drawn)) - sum(costs) + _DECIDING * decided,
        "accuracy": float((logits.argmax(1) == labels).float().mean()),
        "log_likelihood": decided,
        "error_hu": _HU * float(network.error(seen, drawn).mean()),
        **{f"divergence_{level}": cost for level, cost in enumerate(costs)},
    }
    if not bool(network.limits.isfinite().all()):
        return found
    malignant, lesion = CLASSES.index("malignant"), patches.labels > 0
    of_training = network.kinds > 0
    fit = LogisticRegression().fit(network.places[of_training].cpu(), network.kinds[of_training].cpu() == malignant)
    chance = fit.predict_proba(top[lesion].cpu())[:, 1]
    found["map_auc"] = float(roc_auc_score(patches.labels[lesion] == malignant, chance))
    return found


def publish(network: LadderVAE, metrics: dict[str, float], folder: Path) -> None:
    """Write the bundle."""
    arguments = {
        "attributes": list(network.attributes),
        "classes": list(network.classes),
        "cases": len(network.places),
    }
    about = {
        "name": "Nodules on a map",
        "task": "Drawing nodules in lung CT from codes, of which the uppermost two are a map of all cases",
        "description": "Where a nodule is among others, and how it would look elsewhere. It learnt from computed "
        "nodules.",
        "intended_use": "The explanation method `latent`. Not for diagnosis.",
    }
    told = _CARD.format(**metrics)
    write_generator(folder, network, arguments, SIZE, about=about, card=told, metrics=metrics)


_CARD = """# Nodules on a map

Draws nodules in lung CT again from codes of three levels, of which the uppermost are two: a map of all cases, on which
malignant and benign ones part (Biffi et al. 2020). For the method `latent` with generator=lung_nodule_ladder_vae. The
network knows nothing of a patient: what it draws is plausible at best. **Never use it for a patient.**

A ladder variational autoencoder (Sønderby et al. 2016) of the middle 40 mm of what `lung_nodule` sees: 2, 6 and 16
codes, what is likely at a level being for the level above to say, and a small network that decides between none, benign
and malignant by the uppermost two, all trained together. Its encoder looks through the layers of `lung_nodule` below
the heads, which were not trained further.

**"Malignant" is a rule, not pathology**; the card of `lung_nodule` has it.

## Trained on
1,200 computed nodules and pieces of healthy lung, in one chest CT (`chest_ct_mass.nrrd`, scan lung2 of pyradiomics
3.0.1, BSD 3-Clause), with the nodule up to 2 voxels from the middle, flipped and turned at random. The loss is the
evidence lower bound with normal errors, 600 observations to an image because neighbouring voxels say much the same,
and 60 times the cross-entropy of the class. The map shows 510 other patches of the same scan, by which it was also
settled what is like the training. `medxai train lung-nodule-ladder-vae` makes this bundle again ({seconds:.0f} s when
this one was made, on a busy machine).

## Measured
On computed nodules in the CT of another patient (`chest_ct_nodule.nrrd`, lung1), 150 patches each:

| | clear cases | with borderline cases |
|---|---|---|
| **malignant or benign by a line on the map of the training: AUC** | {map_auc:.3f} | {borderline_map_auc:.3f} |
| accuracy, three classes, by the two codes | {accuracy:.3f} | {borderline_accuracy:.3f} |
| mean absolute error of what is drawn | {error_hu:.0f} HU | {borderline_error_hu:.0f} HU |

The codes of the three levels tell {divergence_0:.1f}, {divergence_1:.1f} and {divergence_2:.1f} nats, from the top.

The real nodule of lung1: an error of {real_error_hu:.0f} HU, at a distance of {real_distance:.1f} from the mean of the
training; P(malignant) goes from {real_before:.2f} to {real_after:.2f} on the way to "benign", which ends at a distance
of {real_distance_after:.1f}.

## Limits
- The map parts the classes because it was taught them: that a case lies among malignant ones is what this network makes
  of it, and not evidence beside the classifier, whose layers it shares.
- The middle level has collapsed, as ladders do: what the map does not tell is told by the lowest level alone.
- What is drawn is smooth: spikes, vessels and texture are not told by the codes.
- One patient to train on, one to test on; nodules of 7 to 24 mm, computed ones. The scans have slices of 5 mm.
- Where the nodule is more than some 3 mm from the middle, the network does not know what it sees.

## Reading it
Input: CT in RAS orientation at 1.25 mm, -1000..400 HU to 0..1, 32 x 32 x 32 voxels with the nodule in the middle.
Output: the same as drawn from its codes. `encode`, `decode`, `changed`, `place`, `distance` and `read` of
`MedXAILib.networks.ladder_vae.LadderVAE` do the rest.
"""

RECIPE = Recipe(
    name="lung-nodule-ladder-vae",
    network=build,
    loss=loss,
    measure=measure,
    real=vae.real,
    score="score",
    publish=publish,
    synthesise=vae.near,
    repeat=vae.again,
    finish=vae.settle,
    epochs=3,
    steps=200,
    learning_rate=4e-3,
    validation=_CASES,
    test=150,
)
"""The recipe of `lung_nodule_ladder_vae`."""
