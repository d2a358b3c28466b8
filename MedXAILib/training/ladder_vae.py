"""The recipe of `lung_nodule_ladder_vae`: nodules, drawn from codes of which the uppermost two are a map."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
from sklearn.metrics import roc_auc_score  # type: ignore[import-untyped]
from torch import Tensor

from MedXAILib.networks.ladder_vae import LadderVAE
from MedXAILib.synthetic.lung_nodules import ATTRIBUTES, CLASSES, Nodules
from MedXAILib.training import vae
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
    the training tells malignant from benign on that of `patches` (AUC), and what `traversed` says."""
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
    return found | vae.traversed(network, patches)


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
    vae.write_generator(folder, network, arguments, about=about, card=_CARD.format(**metrics), metrics=metrics)


_CARD = """# Nodules on a map

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
    epochs=7,
    steps=200,
    learning_rate=4e-3,
    validation=_CASES,
    test=150,
)
"""The recipe of `lung_nodule_ladder_vae`."""
