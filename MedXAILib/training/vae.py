"""The recipes of `lung_nodule_vae` and `lung_nodule_tc_vae`: nodules, drawn from codes of which some have a name."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr  # type: ignore[import-untyped]
from sklearn.metrics import mutual_info_score  # type: ignore[import-untyped]
from torch import Generator, Tensor, nn

from MedXAILib import resources
from MedXAILib.engines.counterfactual import otherwise
from MedXAILib.engines.nodule_size import diameter
from MedXAILib.loading import load_model
from MedXAILib.networks.vae import SIZE, VAE, Autoencoder
from MedXAILib.synthetic.lung_nodules import (
    ATTRIBUTES,
    CLASSES,
    HU_RANGE,
    SPACING_MM,
    Backgrounds,
    Nodules,
    synthesise,
    turned,
)
from MedXAILib.synthetic.lung_nodules import SIZE as PATCH
from MedXAILib.training.bundle import write_generator
from MedXAILib.training.lung_nodule import begin_as_shipped
from MedXAILib.training.trainer import Recipe

NAMED = ("diameter_mm", "spiculation", "solidity", "calcification")
"""The attributes that have a code of their own."""

_NEAR = 2
"""Voxels by which the nodule may miss the middle: so exactly a person points at it."""
_BATCHES, _SEED = 40, 11
_SHIFT = 1
_VOICES = 600.0
"""Neighbouring voxels say much the same: an image is worth so many observations."""
_NAMING, _STEEP = 30.0, 2.0
_TOTAL_CORRELATION = 5.0
_RIDGE = 0.1
"""Of the spread of codes: one that says nothing is not to count."""
_RARE = 0.99
_BINS = 5
_ASKED = 4
"""Of so many patches one nodule is walked in the test."""
_WALKED = ("", "_within", "_agreed", "_moved_hu", "_grown_mm", *(f"_{name}" for name in NAMED[1:]))
_REACH, _STEPS = 4.0, 9
_HU = HU_RANGE[1] - HU_RANGE[0]


def near(backgrounds: Backgrounds, count: int, seed: int, borderline: bool = False) -> Nodules:
    """Fresh patches with the nodule near their middle."""
    return synthesise(backgrounds, count, seed, borderline, jitter=_NEAR)


def again(backgrounds: Backgrounds, count: int, seed: int) -> Nodules:
    """Some of the same 40 batches, flipped, and turned in the axial plane, at random."""
    generator = Generator().manual_seed(seed)
    one, other = torch.randperm(_BATCHES, generator=generator)[:2].tolist()
    sets = _batch(backgrounds, count, one), _batch(backgrounds, count, other)
    which = torch.randperm(2 * count, generator=generator)[:count]
    picked = Nodules(*(torch.cat([getattr(part, f.name) for part in sets])[which] for f in fields(Nodules)))
    return replace(picked, images=turned(picked.images, generator))


@lru_cache(maxsize=_BATCHES)
def _batch(backgrounds: Backgrounds, count: int, which: int) -> Nodules:
    return near(backgrounds, count, _SEED + which)


def middle(images: Tensor, shift: tuple[int, ...] = (0, 0, 0)) -> Tensor:
    """What the network sees of patches (N, 1, 40, 40, 40): (N, 1, 32, 32, 32)."""
    r, a, s = ((PATCH - SIZE) // 2 + by for by in shift)
    return images[:, :, r : r + SIZE, a : a + SIZE, s : s + SIZE]


def shifted(images: Tensor) -> Tensor:
    """The same, a voxel off at random."""
    return middle(images, tuple(torch.randint(-_SHIFT, _SHIFT + 1, (3,)).tolist()))


def build(begun: bool = False) -> VAE:
    """A network that sees as `lung_nodule` does, and has yet to learn what nodules look like, or has `begun`."""
    if begun:
        return cast(VAE, load_model(resources.path("Models/generators/lung_nodule_vae")).network)
    network = VAE(names=[name.removesuffix("_mm") for name in NAMED], attributes=ATTRIBUTES, classes=CLASSES)
    begin_as_shipped(network.encoder.trunk)
    return network


def loss(network: VAE, patches: Nodules, total_correlation: float = 0.0) -> Tensor:
    """The bound on the likelihood, less `total_correlation` times what the codes tell of one another, and how far the
    codes with a name are from ordering the patches as their attributes do."""
    seen = shifted(patches.images).to(network.typical.device)
    mean, log_variance = network.posterior(seen)
    codes = mean + (log_variance / 2).exp() * torch.randn_like(mean)
    charged = divergence(mean, log_variance).sum(1).mean()
    if total_correlation:
        charged = charged + total_correlation * decomposed(codes, mean, log_variance, _BATCHES * len(seen))[1]
    likely = likelihood(network, seen, network.decode(codes))
    return charged - likely + _NAMING * unordered(codes, known(patches).to(mean))


def likelihood(network: Autoencoder, image: Tensor, drawn: Tensor) -> Tensor:
    """The mean log-likelihood of `image` by what is `drawn`, but for a constant: of normal errors in the window whose
    spread is the one by which that is largest (Rybkin et al. 2021, Simple and effective VAE training)."""
    squared = (image - drawn).square() * network.window
    return -_VOICES / 2 * (squared.sum() / (len(image) * network.window.sum())).log()


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """The Kullback-Leibler divergence of each normal distribution from the standard one, of the shape of `mean`."""
    return (log_variance.exp() + mean.square() - 1 - log_variance) / 2


def decomposed(codes: Tensor, mean: Tensor, log_variance: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The mean divergence from the prior of `codes` (N, K), drawn from normal distributions of these `mean` and
    `log_variance`, in three parts: what they tell of the images, what they tell of one another (the total correlation),
    and how far each alone is from the prior. Estimated as if the N images were drawn from `count`.

    Chen et al., "Isolating sources of disentanglement in variational autoencoders", 2018, for the decomposition and the
    estimate; Sarhan et al., "Learning interpretable disentangled representations using adversarial VAEs", 2019, for its
    use on medical images.
    """
    off = (codes[:, None] - mean).square() * (-log_variance).exp()
    # (of code, under the distribution of image, K)
    each = -0.5 * (math.log(2 * math.pi) + log_variance + off)
    own = each.diagonal().sum(0)
    # An image's own distribution is one of `count`, the others of the batch stand for the rest.
    weight = torch.full((len(codes),) * 2, math.log((1 - 1 / count) / max(1, len(codes) - 1)), device=codes.device)
    weight.fill_diagonal_(-math.log(count))
    joint = (each.sum(2) + weight).logsumexp(1)
    alone = (each + weight[..., None]).logsumexp(1).sum(1)
    prior = -0.5 * (math.log(2 * math.pi) + codes.square()).sum(1)
    return (own - joint).mean(), (joint - alone).mean(), (alone - prior).mean()


def known(patches: Nodules) -> Tensor:
    """The attributes `NAMED` (N, 4); what is not there has a diameter of 0, and of the others NaN."""
    values = patches.attributes[:, [ATTRIBUTES.index(name) for name in NAMED]].clone()
    values[patches.labels == 0, 0] = 0
    return values


def unordered(codes: Tensor, values: Tensor) -> Tensor:
    """How far the first codes are from ordering the images as `values` (N, A) do, NaN where unknown: the mean, over
    pairs, of how the sign of a difference is missed, summed over attributes (Pati and Lerch 2021)."""
    codes = codes[:, : values.shape[1]]
    apart, more = torch.tanh(_STEEP * (codes[:, None] - codes)), values[:, None] - values
    # The sign of NaN is 0.
    there = ~more.isnan()
    missed = (apart - more.sign()).abs() * there
    return (missed.sum((0, 1)) / there.sum((0, 1)).clamp_min(1)).sum()


@torch.no_grad()
def settle(network: Autoencoder, patches: Nodules) -> None:
    """Let the network know what the codes of `patches`, which it has not learnt from, are like."""
    seen = middle(patches.images).to(network.typical.device)
    codes = torch.cat([network.encode(part) for part in seen.split(30)])
    off = codes - codes.mean(0)
    spread = off.T @ off / len(off) + _RIDGE * torch.eye(off.shape[1], device=off.device)
    network.typical.copy_(codes.mean(0))
    network.whitening.copy_(torch.linalg.cholesky(torch.linalg.inv(spread)))
    errors = torch.cat([network.error(part, network(part)) for part in seen.split(30)])
    network.limits.copy_(torch.stack([network.distance(codes), errors]).quantile(_RARE, dim=1))
    lesion = patches.labels > 0
    x, y = off[lesion], patches.attributes[lesion].to(codes)
    penalty = len(x) * _RIDGE * torch.eye(x.shape[1], device=x.device)
    mean = x.mean(0)
    reading = torch.linalg.solve((x - mean).T @ (x - mean) + penalty, (x - mean).T @ (y - y.mean(0))).T
    network.reading.copy_(reading)
    network.offset.copy_(y.mean(0) - reading @ (mean + network.typical))
    if len(network.places):
        count = min(len(network.places), len(codes))
        network.places[:count] = network.place(codes)[:count]
        network.kinds[:count] = patches.labels[:count].to(network.kinds)


@torch.no_grad()
def measure(network: VAE, patches: Nodules) -> dict[str, float]:
    """The bound (`score` chooses by), the mean absolute error in HU, the total correlation, the mutual information gap,
    and how well the codes with a name order nodules (Spearman). Of a network that is settled, what `traversed` says."""
    seen = middle(patches.images).to(network.typical.device)
    mean, log_variance = (torch.cat(part) for part in zip(*map(network.posterior, seen.split(30)), strict=True))
    drawn = torch.cat([network.decode(part) for part in mean.split(30)])
    noise = torch.randn(mean.shape, generator=Generator().manual_seed(0)).to(mean)
    codes = mean + (log_variance / 2).exp() * noise
    told, correlated, _ = (float(part) for part in decomposed(codes, mean, log_variance, len(mean)))
    lesion, values = patches.labels > 0, known(patches)
    spent = float(divergence(mean, log_variance).sum(1).mean())
    found = {
        "score": float(likelihood(network, seen, drawn)) - spent - _NAMING * float(unordered(mean, values.to(mean))),
        "error_hu": _HU * float(network.error(seen, drawn).mean()),
        "divergence": spent,
        "told": told,
        "total_correlation": correlated,
        "mutual_information_gap": information_gap(mean[lesion], values[lesion]),
    }
    for k, name in enumerate(NAMED):
        found[f"{name}_order"] = float(spearmanr(mean[lesion, k].cpu(), values[lesion, k])[0])
    return found | (traversed(network, patches) if bool(network.limits.isfinite().all()) else {})


def information_gap(codes: Tensor, values: Tensor) -> float:
    """How much more the code that tells most of an attribute tells than the next one, as a share of what there is to
    tell, the mean over attributes (N, A); of fifths (Chen et al. 2018)."""

    def fifths(columns: Tensor) -> list[Any]:
        parts = torch.linspace(0, 1, _BINS + 1)[1:-1].to(columns)
        return [torch.bucketize(c, c.quantile(parts).unique()).cpu().numpy() for c in columns.T.contiguous()]

    gaps = []
    for value in fifths(values):
        most, second = sorted((mutual_info_score(value, code) for code in fifths(codes)), reverse=True)[:2]
        gaps.append((most - second) / max(mutual_info_score(value, value), 1e-9))
    return float(sum(gaps) / len(gaps))


def traversed(network: Autoencoder, patches: Nodules) -> dict[str, float]:
    """What becomes of nodules, and of what the shipped classifier says of them, along the code of the diameter and
    towards the other class."""
    device = network.typical.device
    chosen = (patches.labels > 0).nonzero()[: len(patches) // _ASKED, 0]
    images = patches.images[chosen].to(device)
    judges = [_judge(name, device) for name in ("lung_nodule", "retrained/lung_nodule_1")]
    with torch.no_grad():
        at, said = network.encode(middle(images)), judges[0](images).argmax(1)
        found = sizes(network, images, at) if "diameter" in network.names else {}
    for kind, other in (("benign", "malignant"), ("malignant", "benign")):
        rows = said == CLASSES.index(kind)
        # Of a few patches none may be of that kind.
        walked = _walked(network, images[rows], at[rows], judges, CLASSES.index(other)) if bool(rows.any()) else {}
        found |= {f"to_{other}{name}": float(walked[name].float().mean()) if walked else math.nan for name in _WALKED}
    return found


def _walked(network: Autoencoder, images: Tensor, start: Tensor, judges: list[nn.Module], to: int) -> dict[str, Tensor]:
    """What becomes of patches of codes `start` (N, K) for the first of the `judges` to say `to`, (N,) each: whether it
    does, whether it does within what is known of the training, whether the second judge does, how much changes in the
    window, and by how much the measured diameter and the named attributes grow."""

    def lead(codes: Tensor) -> Tensor:
        return ahead(judges[0](changed(network, images, start, codes)), to)

    codes = otherwise(start, lead, network.distance, float(network.limits[0]), _REACH)
    with torch.no_grad():
        now = changed(network, images, start, codes)
        flipped, again = (judge(now).argmax(1) == to for judge in judges)
        grown = _diameters(middle(now)) - _diameters(middle(images))
        read = network.read(network.encode(middle(now))) - network.read(start)
        named = {f"_{name}": read[:, ATTRIBUTES.index(name)] for name in NAMED[1:]}
        return {
            "": flipped,
            "_within": flipped & (network.distance(codes) <= network.limits[0]),
            "_agreed": again,
            "_moved_hu": _HU * network.error(middle(images), middle(now)),
            "_grown_mm": grown,
            **named,
        }


def ahead(logits: Tensor, to: int) -> Tensor:
    """By how much the class `to` leads before all others, (N,)."""
    return logits[:, to] - logits.index_fill(1, torch.tensor(to, device=logits.device), -torch.inf).amax(1)


def changed(network: Autoencoder, images: Tensor, start: Tensor, codes: Tensor) -> Tensor:
    """Patches (N, 1, 40, 40, 40) of codes `start` (N, K) as they would look with other `codes`."""
    seen, rim = middle(images), (PATCH - SIZE) // 2
    return images + F.pad(network.changed(seen, start, codes) - seen, (rim,) * 6)


def sizes(network: Autoencoder, images: Tensor, at: Tensor) -> dict[str, float]:
    """How well the diameter follows its code, measured on what is drawn: the mean rank correlation over nodules."""
    code = network.names.index("diameter")
    rows = []
    for by in torch.linspace(-_REACH, _REACH, _STEPS).tolist():
        codes = at.clone()
        codes[:, code] += by
        rows.append(_diameters(middle(changed(network, images, at, codes))))
    rho = torch.tensor([float(spearmanr(range(_STEPS), row)[0]) for row in torch.stack(rows, 1).tolist()]).nan_to_num()
    return {"size_order": float(rho.mean()), "size_order_least": float(rho.min())}


def _diameters(images: Tensor) -> Tensor:
    return torch.tensor([diameter(one[0].cpu().numpy(), (SPACING_MM,) * 3) for one in images.detach()])


def _judge(name: str, device: torch.device) -> nn.Module:
    return load_model(resources.path(f"Models/{name}")).network.eval().requires_grad_(False).to(device)


@torch.no_grad()
def real(network: VAE, scan: Backgrounds) -> dict[str, float]:
    """The scan's own lesion: the error in HU, its distance in that of the training, and the probability of "malignant"
    before and after a walk towards "benign"."""
    images = scan.lesion_patch()[0].to(network.typical.device)
    start, judge = network.encode(middle(images)), _judge("lung_nodule", images.device)
    to, malignant = CLASSES.index("benign"), CLASSES.index("malignant")
    codes = otherwise(
        start,
        lambda codes: ahead(judge(changed(network, images, start, codes)), to),
        network.distance,
        float(network.limits[0]),
        _REACH,
    )
    now = changed(network, images, start, codes)
    return {
        "error_hu": _HU * float(network.error(middle(images), network(middle(images)))),
        "distance": float(network.distance(start)),
        "distance_after": float(network.distance(codes)),
        "before": float(judge(images).softmax(1)[0, malignant]),
        "after": float(judge(now).softmax(1)[0, malignant]),
    }


def publish(card: dict[str, str], network: VAE, metrics: dict[str, float], folder: Path) -> None:
    """Write the bundle."""
    arguments = {
        "latent": len(network.typical),
        "names": list(network.names),
        "attributes": list(network.attributes),
        "classes": list(network.classes),
    }
    about = {
        "name": card["title"],
        "task": "Drawing nodules in lung CT from codes, some of which have a name",
        "description": "How a nodule would look if it were larger, denser ..., or if a classifier were to decide "
        "otherwise. It learnt from computed nodules.",
        "intended_use": "The explanation method `latent`. Not for diagnosis.",
    }
    told = _CARD.format(**card, **metrics)
    write_generator(folder, network, arguments, SIZE, about=about, card=told, metrics=metrics)


_CARD = """# {title}

Draws nodules in lung CT again from 16 numbers, their codes, for the method `latent`: how would a nodule look if it were
larger, or if a classifier were to decide otherwise? Four of the codes have a name: diameter, spiculation, solidity and
calcification. The network knows nothing of a patient: what it draws is plausible at best. **Never use it for a
patient.**

A variational autoencoder (Kingma and Welling 2014) of the middle 40 mm of what `lung_nodule` sees. Its encoder looks
through the layers of `lung_nodule` below the heads, which were not trained further; codes with a name were made to
order nodules as the attribute does (Pati and Lerch 2021).

{kind}

## Trained on
{begins} 1,200 computed nodules and pieces
of healthy lung, in one chest CT (`chest_ct_mass.nrrd`, scan lung2 of pyradiomics 3.0.1, BSD 3-Clause), with the nodule
up to 2 voxels from the middle, flipped and turned at random. The loss is the evidence lower bound with normal errors,
600 observations to an image because neighbouring voxels say much the same. What is like the training, and what is not,
was settled on 300 other patches of the same scan.
`medxai train {recipe}` makes this bundle again ({seconds:.0f} s when this one was made, on a busy machine).

## Measured
On computed nodules in the CT of another patient (`chest_ct_nodule.nrrd`, lung1), 150 patches each; walks are those of
the first 37 nodules:

| | clear cases | with borderline cases |
|---|---|---|
| mean absolute error of what is drawn | {error_hu:.0f} HU | {borderline_error_hu:.0f} HU |
| rank correlation of the diameter with its code | {diameter_mm_order:.3f} | {borderline_diameter_mm_order:.3f} |
| ... of the spiculation | {spiculation_order:.3f} | {borderline_spiculation_order:.3f} |
| ... of the solidity | {solidity_order:.3f} | {borderline_solidity_order:.3f} |
| ... of the calcification | {calcification_order:.3f} | {borderline_calcification_order:.3f} |
| **walk along the diameter: rank correlation, measured by density** | {size_order:.3f} | {borderline_size_order:.3f} |
| ... of the worst nodule | {size_order_least:.3f} | {borderline_size_order_least:.3f} |
| **walk to malignant: `lung_nodule` says so** | {to_malignant:.3f} | {borderline_to_malignant:.3f} |
| ... still like the training | {to_malignant_within:.3f} | {borderline_to_malignant_within:.3f} |
| ... so does another training of it | {to_malignant_agreed:.3f} | {borderline_to_malignant_agreed:.3f} |
| **walk to benign: `lung_nodule` says so** | {to_benign:.3f} | {borderline_to_benign:.3f} |
| ... still like the training | {to_benign_within:.3f} | {borderline_to_benign_within:.3f} |
| ... so does another training of it | {to_benign_agreed:.3f} | {borderline_to_benign_agreed:.3f} |

What changes on these walks is what the rule by which nodules are malignant speaks of (larger, spiculated, part-solid:
malignant; calcified: benign), on average:

| | to malignant | to benign |
|---|---|---|
| diameter, measured by density | {to_malignant_grown_mm:+.1f} mm | {to_benign_grown_mm:+.1f} mm |
| spiculation, as the encoder reads it | {to_malignant_spiculation:+.2f} | {to_benign_spiculation:+.2f} |
| solidity | {to_malignant_solidity:+.2f} | {to_benign_solidity:+.2f} |
| calcification | {to_malignant_calcification:+.2f} | {to_benign_calcification:+.2f} |
| mean change in the window | {to_malignant_moved_hu:.0f} HU | {to_benign_moved_hu:.0f} HU |

| codes, clear cases | |
|---|---|
| total correlation: what they tell of one another | {total_correlation:.2f} nats |
| what they tell of the image | {told:.2f} nats |
| divergence from the prior, in all | {divergence:.1f} nats |
| mutual information gap of the four attributes | {mutual_information_gap:.3f} |

These are estimates from 150 patches, which overstate the total correlation and cannot exceed log 150 = 5.0 nats of what
is told: compare them with those of the other generator only.

The real nodule of lung1: an error of {real_error_hu:.0f} HU, at a distance of {real_distance:.1f} from the mean of the
training; P(malignant) goes from {real_before:.2f} to {real_after:.2f} on the way to "benign", which ends at a distance
of {real_distance_after:.1f}.

## Limits
- What is drawn is smooth: spikes, vessels and texture are not told by the codes. What they do not tell stays as it is
  in the scan, or goes with the nodule in proportion.
- A walk shows what the classifier reacts to, not what happens in a patient, and not every change that would do.
- One patient to train on, one to test on; nodules of 7 to 24 mm, computed ones. The scans have slices of 5 mm.
- Where the nodule is more than some 3 mm from the middle, the network does not know what it sees.

## Reading it
Input: CT in RAS orientation at 1.25 mm, -1000..400 HU to 0..1, 32 x 32 x 32 voxels with the nodule in the middle.
Output: the same as drawn from its codes. `encode`, `decode`, `changed`, `distance` and `read` of
`MedXAILib.networks.vae.VAE` do the rest.
"""

_PLAIN = {
    "title": "Nodules from codes",
    "kind": "`lung_nodule_tc_vae` is the same with codes that tell less of one another.",
    "begins": "On",
    "recipe": "lung-nodule-vae",
}
_FACTORS = {
    "title": "Nodules from codes that tell little of one another",
    "kind": "What the codes tell of one another, their total correlation, is charged six times instead of once (Chen\n"
    "et al. 2018, Sarhan et al. 2019).",
    "begins": "It began with the weights of `lung_nodule_vae` and went on for 200 steps. On",
    "recipe": "lung-nodule-tc-vae",
}

RECIPE = Recipe(
    name="lung-nodule-vae",
    network=build,
    loss=loss,
    measure=measure,
    real=real,
    score="score",
    publish=partial(publish, _PLAIN),
    synthesise=near,
    repeat=again,
    finish=settle,
    epochs=3,
    steps=200,
    learning_rate=4e-3,
    validation=300,
    test=150,
)
"""The recipe of `lung_nodule_vae`."""

TC_RECIPE = replace(
    RECIPE,
    name="lung-nodule-tc-vae",
    network=partial(build, begun=True),
    loss=partial(loss, total_correlation=_TOTAL_CORRELATION),
    publish=partial(publish, _FACTORS),
    epochs=1,
    learning_rate=2e-3,
)
"""The recipe of `lung_nodule_tc_vae`."""
