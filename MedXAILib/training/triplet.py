"""The recipe of `lung_nodule_triplet`: which patches are alike in class, then in size, then in where they lie."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.ndimage import maximum_filter, minimum_filter  # type: ignore[import-untyped]
from scipy.stats import spearmanr  # type: ignore[import-untyped]
from torch import Tensor

from MedXAILib.networks.triplet import TripletEmbedding
from MedXAILib.synthetic.lung_nodules import ATTRIBUTES, CLASSES, SPACING_MM, Backgrounds, scale, synthesise
from MedXAILib.training.bundle import write_scorer
from MedXAILib.training.lung_nodule import begin_as_shipped, units
from MedXAILib.training.own_bundle import told_of
from MedXAILib.training.table import UNKNOWN, Patches, Table, augmented
from MedXAILib.training.trainer import Recipe
from MedXAILib.training.triplet_loss import (
    MARGIN,
    Triplets,
    batch_all,
    batch_hard,
    by_cue,
    distances,
    hierarchical,
    leading,
    violations,
)
from MedXAILib.trust.retrieval import interval, measured, ranking

CUES = {"class": 0.0, "diameter_mm": 3.0, "spiculated": 0.0, "part_solid": 0.0, "calcified": 0.0, "wall_mm": 4.0}
"""What likeness means, the most important first, and up to which difference two patches share it."""

_LEADING, _OTHER = 24, 8
_GLASS, _SOLID = 0.1, 0.9
_OPEN_LUNG_MM = 25.0
_WALL_HU, _VESSEL = -400.0, 7
_PART, _PARTS = 6, 100
_SEED, _REAL, _REAL_SEED = 11, 90, 4
_NOISE = 0.01
_NEAREST = 10


def build() -> TripletEmbedding:
    """A network that sees as `lung_nodule` does, and has yet to learn what is alike."""
    network = TripletEmbedding((_LEADING, *[_OTHER] * (len(CUES) - 1)))
    begin_as_shipped(network)
    network.requires_grad_(False)
    network.head.requires_grad_(True)
    return network


def cued(backgrounds: Backgrounds, count: int, seed: int, borderline: bool = False) -> Patches:
    """Patches whose attributes are all of `CUES` but the class; NaN is all that a patch without a nodule has not."""
    made = synthesise(backgrounds, count, seed, borderline)
    known = dict(zip(ATTRIBUTES, made.attributes.T, strict=True))
    found = {
        "diameter_mm": known["diameter_mm"],
        "spiculated": known["spiculation"] > 0,
        "part_solid": (known["solidity"] > _GLASS) & (known["solidity"] < _SOLID),
        "calcified": known["calcification"] > 0,
        "wall_mm": wall_mm(made.images, made.masks, made.centres),
    }
    attributes = torch.stack([found[name].float() for name in list(CUES)[1:]], dim=1)
    attributes[made.labels == 0] = math.nan
    return Patches(made.images, made.labels, attributes, None, ())


def wall_mm(images: Tensor, masks: Tensor, centres: Tensor) -> Tensor:
    """How far `centres` (N, 3) are from the wall of the lung, mediastinum or diaphragm (N,), 25 mm at most: what is
    dense and thicker than a vessel in `images` (N, 1, D, H, W) outside `masks`.

    It is the only place that these patches have: they are flipped and transposed, and no lobe can be told in them.
    """
    dense = ((images > scale(torch.tensor(_WALL_HU))) & ~masks).numpy()
    size = (1, 1, _VESSEL, _VESSEL, _VESSEL)
    wall = torch.from_numpy(dense & maximum_filter(minimum_filter(dense, size), size))[:, 0]
    away = [
        torch.cdist(centre[None], one.nonzero().float()).amin() if one.any() else torch.tensor(math.inf)
        for one, centre in zip(wall, centres, strict=True)
    ]
    return (SPACING_MM * torch.stack(away)).clamp_max(_OPEN_LUNG_MM)


def repeated(backgrounds: Backgrounds, count: int, seed: int) -> Patches:
    """Some of the same 600 patches, each flipped and transposed in the axial plane or not, with other noise."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(_PARTS, generator=generator)[: -(-count // _PART)].tolist()
    parts = [_part(backgrounds, which) for which in chosen]
    images = torch.cat([part.images for part in parts])[:count]
    turned = torch.rand(len(images), 4, generator=generator) < 0.5
    images = torch.stack([_turned(image, *turns) for image, turns in zip(images, turned.tolist(), strict=True)])
    images += _NOISE * torch.randn(images.shape, generator=generator)
    labels = torch.cat([part.labels for part in parts])[:count]
    attributes = torch.cat([part.attributes for part in parts])[:count]
    return Patches(images.clamp(0, 1), labels, attributes, None, ())


@lru_cache(maxsize=_PARTS)
def _part(backgrounds: Backgrounds, which: int) -> Patches:
    return cued(backgrounds, _PART, _SEED + which)


def _turned(image: Tensor, swap: bool, *flips: bool) -> Tensor:
    image = image.transpose(1, 2) if swap else image
    return image.flip([axis for axis, flip in enumerate(flips, 1) if flip])


def cues_of(patches: Patches) -> Tensor:
    """The class and the attributes of patches, (N, 1 + K), NaN where unknown."""
    labels = patches.labels.float().masked_fill(patches.labels == UNKNOWN, math.nan)
    return torch.cat([labels[:, None], patches.attributes], dim=1)


def loss(
    network: TripletEmbedding,
    patches: Patches,
    cues: Mapping[str, float] = CUES,
    triplets: Triplets = batch_hard,
) -> Tensor:
    """The hierarchical loss of the embedding, and half the loss of each block by its own cue."""
    embeddings = network(patches.images.to(network.head.weight.device))
    known, tolerances = cues_of(patches).to(embeddings.device), list(cues.values())
    by_block = zip(network.split(embeddings), by_cue(known, tolerances), strict=True)
    blocks = torch.stack([triplets(block, same, other, MARGIN) for block, (same, other) in by_block])
    return hierarchical(embeddings, known, tolerances, triplets) + blocks.sum() / 2


def loss_above(network: TripletEmbedding, patches: Patches) -> Tensor:
    """The `loss` of a network whose layers below the embedding stay as they are: on one patient they forget what the
    classifier knew of others."""
    return loss(network.eval(), patches, triplets=batch_all)


@torch.no_grad()
def embedded(network: TripletEmbedding, images: Tensor) -> Tensor:
    """The embeddings (N, K) of images (N, 1, D, H, W), on the CPU."""
    device = network.head.weight.device
    return torch.cat([network(part.to(device)).cpu() for part in images.split(50)])


def measure(network: TripletEmbedding, patches: Patches, cues: Mapping[str, float] = CUES) -> dict[str, float]:
    """How well patches find their like, each of them among all others; nothing of what none of them shows.

    Of the class: `precision_1`, `precision_10`, `map`, and `ndcg` of the first ten, from `ndcg_low` to `ndcg_high` (a
    95 % interval), and as `coarse_ndcg` that of the search from coarse to fine. `graded_ndcg` counts how many leading
    cues are shared. By cue, `violations` is the share of triplets in which a patch that shares it and all before it is
    not nearer than one that does not, and, but for the class, `rank` is Spearman's correlation of a patch's value and
    the mean of its ten nearest that have one.
    """
    embeddings, columns = embedded(network, patches.images), cues_of(patches)
    levels = list(leading(columns, list(cues.values())))
    similarity = (embeddings @ embeddings.T).numpy()
    alike, shared = levels[0][0].numpy(), torch.stack([same for same, _ in levels]).sum(0).numpy()
    found: dict[str, float] = {}
    if alike.any():
        found |= _found(similarity, alike)
        found["coarse_ndcg"] = _ndcg(network.coarse_to_fine(embeddings, embeddings).numpy(), alike)
        found["graded_ndcg"] = _ndcg(similarity, shared)
    apart = distances(embeddings)
    for name, (same, other) in zip(cues, levels, strict=True):
        found[f"{name}_violations"] = violations(apart, same, other)
    for name, values in list(zip(cues, columns.T.numpy(), strict=True))[1:]:
        known = np.isfinite(values)
        if known.sum() > 2 * _NEAREST:
            found[f"{name}_rank"] = _rank(similarity[np.ix_(known, known)], values[known])
    return {name: value for name, value in found.items() if not math.isnan(value)}


def _found(similarity: np.ndarray, alike: np.ndarray) -> dict[str, float]:
    order = ranking(similarity, alike, np.eye(len(alike), dtype=bool))
    first, each = measured(order, 1), measured(order, _NEAREST)
    mean, low, high = interval(each["nDCG@10"])
    precise = {f"precision_{k}": float(np.nanmean(values)) for k, values in ((1, first["P@1"]), (10, each["P@10"]))}
    return precise | {"map": float(np.nanmean(each["mAP"])), "ndcg": mean, "ndcg_low": low, "ndcg_high": high}


def _ndcg(similarity: np.ndarray, relevance: np.ndarray) -> float:
    order = ranking(similarity, relevance, np.eye(len(relevance), dtype=bool))
    return float(np.nanmean(measured(order, _NEAREST)["nDCG@10"]))


def _rank(similarity: np.ndarray, values: np.ndarray) -> float:
    others = np.where(np.eye(len(values), dtype=bool), -np.inf, similarity)
    near = values[np.argsort(-others, axis=1, kind="stable")[:, :_NEAREST]].mean(1)
    return float(spearmanr(values, near).statistic)


def real(network: TripletEmbedding, scan: Backgrounds) -> dict[str, float]:
    """Of the ten computed nodules and pieces of lung in another patient that are nearest to the scan's own lesion: the
    share that is "malignant", and the mean diameter of the nodules in mm."""
    patches = cued(Backgrounds.training(), _REAL, _REAL_SEED)
    itself = embedded(network, scan.lesion_patch()[0])
    near = (embedded(network, patches.images) @ itself[0]).topk(_NEAREST).indices
    malignant = patches.labels[near] == CLASSES.index("malignant")
    return {"malignant": float(malignant.float().mean()), "diameter_mm": float(patches.attributes[near, 0].nanmean())}


def own(recipe: Recipe, table: Table) -> Recipe:
    """`recipe` for a person's own table: of an untrained network, for which cases are alike that share their label,
    then each attribute in the order of the columns."""
    table.require("label")
    cues = {"label": 0.0, **dict(zip(table.attributes, tolerances_of(table.known()), strict=True))}
    return replace(
        recipe,
        network=partial(TripletEmbedding, (_LEADING, *[_OTHER] * len(table.attributes))),
        loss=partial(loss, cues=cues),
        measure=partial(measure, cues=cues),
        publish=partial(publish_own, table, cues),
        synthesise=augmented,
        repeat=None,
        learning_rate=2e-3,
        epochs=24,
        steps=75,
    )


def tolerances_of(known: Tensor) -> list[float]:
    """Up to which difference attributes (M, K), NaN where unknown, are shared: findings, which are 0 or 1, when they
    are the same, measures within half of their standard deviation."""
    finding = ((known == 0) | (known == 1) | known.isnan()).all(0)
    return torch.where(finding, 0.0, units(known)[1] / 2).tolist()


def publish(network: TripletEmbedding, metrics: dict[str, float], folder: Path) -> None:
    """Write the bundle."""
    about = {
        "name": "Lung nodule embedding",
        "task": "Embedding of lung patches of 50 mm: those of one class, size and place are near each other",
        "description": "A demonstration network for finding similar cases. Its classes follow a published rule on "
        "computed nodules, not pathology.",
        "intended_use": "Demonstration, teaching and tests of explanation methods. Not for diagnosis.",
    }
    told = defaultdict(lambda: math.nan, metrics)
    _write(folder, network, CUES, about=about, card=_CARD.format_map(told), metrics=metrics)


def publish_own(
    table: Table, cues: Mapping[str, float], network: TripletEmbedding, metrics: dict[str, float], folder: Path
) -> None:
    """Write the bundle of a network that learnt from `table`."""
    shared = [f"**{name}**" + (f" (within {within:.3g})" if within else "") for name, within in cues.items()]
    does = f"says what it is like: {', then '.join(shared)}"
    told = told_of(
        table, "lung-nodule-triplet", folder.name, metrics, "Embedding", does, _OWN, "an embedding of length 1"
    )
    _write(folder, network, cues, **told)


def _write(folder: Path, network: TripletEmbedding, cues: Iterable[str], **told: Any) -> None:
    names = [f"{cue} {i}" for cue, size in zip(cues, network.blocks, strict=True) for i in range(size)]
    definition = {"_target_": "MedXAILib.networks.triplet.TripletEmbedding", "blocks": network.blocks}
    write_scorer(folder, network, definition, names, "embedding", layers=["evidence"], **told)


_CARD = """# Lung nodule embedding

Turns a cube of 50 mm of chest CT into 64 numbers, so that cubes with nodules alike are near each other: of the same
class first, then of the same size, then of the same kind, then in the same place. It exists so that searching for
similar cases can be tried, taught and tested. Where two cases are alike can be read off exactly: their similarity is a
sum over places of either.

**"Malignant" is a rule, not pathology.** The network was trained on nodules that were computed into a real CT; the card
of `lung_nodule` has the rule. No radiologist or pathologist was asked. Never use it for a patient.

## What is alike
Cues, the most important first (a triplet network with several cues, as in Yan et al. 2018): the class (none, benign,
malignant); the diameter, within 3 mm; spiculated, part-solid, calcified, or not; and how far the nodule is from the
wall of the lung, within 4 mm. Patches are flipped and transposed, so that no side and no lobe can be told in them: the
wall is the only place that they have. The first 24 numbers are for the class, 8 each for the other cues. `first 100`
below is the search from coarse to fine: the first hundred by the class alone, in the order of the whole.

## Trained on
The layers below the embedding are those of `lung_nodule` and stayed as they are. On their means and maxima a linear
layer was trained, on 600 patches of one chest CT (`chest_ct_mass.nrrd`, scan lung2 of pyradiomics 3.0.1, BSD
3-Clause), its own 48 mL mass left out, a third of the patches of each class, only clear cases (|logit| > 1.4); with
flips and noise. The loss asks that who shares more of the leading cues is nearer, for every number of leading cues, and
the same of each block and its own cue. All triplets of a batch count: with the hardest alone (Hermans et al. 2017) this
layer learns the noise of its one patient, and the nDCG of the leading cues stays at 0.73. A network of a person's own
cases learns as a whole, and from the hardest.
`medxai train lung-nodule-triplet` makes this bundle again ({seconds:.0f} s when this one was made).

## Measured
On computed nodules in the CT of another patient (`chest_ct_nodule.nrrd`, lung1), 450 patches each; each patch asks, all
the others may be found:

| | clear cases | with borderline cases (\\|logit\\| > 0.8) |
|---|---|---|
| class: nDCG of the first ten | {ndcg:.3f} ({ndcg_low:.3f} to {ndcg_high:.3f}) | {borderline_ndcg:.3f} \
({borderline_ndcg_low:.3f} to {borderline_ndcg_high:.3f}) |
| class: nDCG, first 100 by the class alone | {coarse_ndcg:.3f} | {borderline_coarse_ndcg:.3f} |
| class: the nearest is right | {precision_1:.3f} | {borderline_precision_1:.3f} |
| class: share of the first ten that is right | {precision_10:.3f} | {borderline_precision_10:.3f} |
| class: mean average precision | {map:.3f} | {borderline_map:.3f} |
| leading cues shared: nDCG of the first ten | {graded_ndcg:.3f} | {borderline_graded_ndcg:.3f} |
| diameter: rank correlation with the mean of the ten nearest | {diameter_mm_rank:.3f} | \
{borderline_diameter_mm_rank:.3f} |
| spiculated: the same | {spiculated_rank:.3f} | {borderline_spiculated_rank:.3f} |
| part-solid: the same | {part_solid_rank:.3f} | {borderline_part_solid_rank:.3f} |
| calcified: the same | {calcified_rank:.3f} | {borderline_calcified_rank:.3f} |
| distance from the wall: the same | {wall_mm_rank:.3f} | {borderline_wall_mm_rank:.3f} |
| triplets in the wrong order, by class | {class_violations:.3f} | {borderline_class_violations:.3f} |
| ... by class and diameter | {diameter_mm_violations:.3f} | {borderline_diameter_mm_violations:.3f} |
| ... by all cues | {wall_mm_violations:.3f} | {borderline_wall_mm_violations:.3f} |

On the same clear cases, beside the plain embedding of `lung_nodule` (the means and maxima that its classes are decided
by), and beside this network before its training:

| | class: nDCG | class: mAP | leading cues: nDCG | diameter: rank | wall: rank |
|---|---|---|---|---|---|
| plain embedding of `lung_nodule` | 0.933 | 0.875 | 0.725 | 0.936 | 0.046 |
| before training | 0.930 | 0.856 | 0.720 | 0.937 | 0.114 |
| this | {ndcg:.3f} | {map:.3f} | {graded_ndcg:.3f} | {diameter_mm_rank:.3f} | {wall_mm_rank:.3f} |
| the block of the class, of the diameter, of the wall | 0.939 | 0.908 | | 0.962 | 0.521 |

The lead over the plain embedding (with 95 % intervals, by bootstrap over the patches that ask): 0.048 (0.038 to 0.058)
in the nDCG of the leading cues, 0.033 (0.026 to 0.041) in the mean average precision of the class by the block of the
class, but in the nDCG of the class no more than could be by chance: 0.0055 (-0.0004 to 0.0116).

From one patient to another: 100 nodules of lung1 search 300 of lung2, and what counts is how many of class,
spiculation, part-solid, calcification and diameter (within 3 mm) are shared (`python -m benchmarks.retrieval` measures
more of this):

| | this | plain embedding of `lung_nodule` |
|---|---|---|
| nDCG of the first ten | 0.884 (0.862 to 0.904) | 0.861 (0.838 to 0.883) |
| ... its lead | 0.023 (0.011 to 0.034) | |
| mean average precision of those that share four | 0.731 (0.694 to 0.764) | 0.669 (0.631 to 0.703) |
| of the first ten, the share that stays with faint noise | 0.978 (0.966 to 0.989) | 0.989 (0.980 to 0.996) |
| ... that stays when the patch moves by a voxel | 0.665 (0.620 to 0.708) | 0.619 (0.579 to 0.658) |

The real nodule of lung1 (1.36 mL, 13.7 mm if it were a ball), which no training saw: of the ten nearest of 90 computed
patches in lung2, {real_malignant:.0%} are "malignant", and the mean diameter is {real_diameter_mm:.1f} mm.

## Limits
- Of the place little is seen in the whole: for that, search its own numbers, the last 8.
- What part-solid is, the layers below hardly tell (compare `lung_nodule_semantic`), and so neither do these numbers.
- The classifier below is wrong about one patch in twenty, and the embedding is as wrong about their class.
- One patient to train on, one to test on, one real nodule: an illustration, not a performance claim. All patches of a
  patient are of one scan.
- Nodules of 7 to 24 mm in lung. The scans have slices of 5 mm. Contrast agent, other kernels and other diseases were
  never seen.

## Reading it
Input: CT in RAS orientation at 1.25 mm, -1000..400 HU to 0..1, 40 x 40 x 40 voxels (any size from 24 works). Output: an
embedding of length 1; compare two by their scalar product. `python -m monai.bundle run` takes every file as one patch:
give it cubes of 50 mm.
"""

_OWN = """`precision_1`, `precision_10`, `map` and `ndcg` (of the first ten, with a 95 % interval) say how well each
case of the test finds those of its own label among all others; `coarse_ndcg` is that of a search from coarse to fine,
and `graded_ndcg` counts how many of the leading cues are shared. `violations` is the share of triplets in which a case
that shares a cue and all before it is not nearer than one that does not, `rank` Spearman's correlation of a case's
value and the mean of its ten nearest."""

RECIPE = Recipe(
    name="lung-nodule-triplet",
    network=build,
    loss=loss_above,
    measure=measure,
    real=real,
    score="graded_ndcg",
    publish=publish,
    own=own,
    epochs=6,
    steps=25,
    synthesise=cued,
    repeat=repeated,
    learning_rate=5e-2,
)
