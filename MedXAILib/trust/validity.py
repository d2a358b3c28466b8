"""How well a map meets a segmentation, in physical units, beside maps that know nothing of the network."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from monai.metrics.utils import get_edge_surface_distance
from torch import Tensor

from MedXAILib.explanation import SaliencyMap
from MedXAILib.grid import resample, shifted
from MedXAILib.report.localisation import evidence, extent, localise, on_grid
from MedXAILib.trust.finding import Finding, light
from MedXAILib.trust.judged import Judged
from MedXAILib.volume import Volume

TITLE = "Does it meet the segmentation?"

# How much of the way from the AUPRC of the best map that knows nothing of the network to that of a perfect map must be
# gone. A share of the way, since a multiple means little where the former is tiny and cannot be reached where it is
# large. A lesion is small and a map smooth, so that even a good map goes only a part of it.
_GOOD = 0.2
_FAIR = 0.05
# From this AUPRC of a map that knows nothing on, meeting the segmentation takes no knowledge, so there is no light.
_TELLING = 0.9

Box = tuple[slice, ...]


@dataclass(frozen=True)
class Validity:
    """How well what speaks for a target meets a segmentation. A map in which nothing does has no peak: `pointing` is
    False, and what is in mm is infinite.

    `pointing`: whether the map's peak lies in the segmentation, or at most a tolerance away from it (the pointing game
    of Zhang et al., "Top-down neural attention by excitation backprop", 2018); `distance_mm` from there to the nearest
    voxel of the segmentation, 0 inside.

    `mass` and `rank`: relevance mass and rank accuracy (Arras et al., "CLEVR-XAI: A benchmark dataset for the ground
    truth evaluation of neural network explanations", 2022): the share of the relevance that lies in the segmentation,
    and of the K highest voxels, K being how many voxels the segmentation has. Of several voxels as high as the K-th,
    those in the segmentation count as often as if the K were drawn from them; voxels that are zero never do.

    `auprc`: the area under the precision-recall curve (average precision) of the voxels in the box that the map covers,
    times the share of the segmentation that the box holds: what it does not hold is missed.

    `iou`, `dice`, `hausdorff_mm` and `hd95_mm` compare the segmentation with the voxels above a threshold: with as many
    as the segmentation has (and all that are as high as the last of them), or with those from a share of the maximum
    on; never with voxels that are zero. The distances are between surfaces; `hd95_mm` is the larger of both directions'
    95th percentiles.

    `chance`: the share of that box which the segmentation fills, which is the mass of an even map.
    """

    pointing: bool
    distance_mm: float
    mass: float
    rank: float
    auprc: float
    iou: float
    dice: float
    hausdorff_mm: float
    hd95_mm: float
    chance: float


def validity(
    explanation: SaliencyMap,
    segmentation: Volume,
    tolerance_mm: float = 0.0,
    threshold: float | None = None,
    box: Box | None = None,
) -> Validity:
    """Compare the map (of one scan) with `segmentation`, whose non-zero voxels say where it should be; on any grid.

    `threshold` is a share of the map's maximum, 0 to 1; None marks as many voxels as the segmentation has. `box` is
    the part of the grid that the network saw; where the map is not zero if that is not known.

    Raises:
        MedXAIError: when the segmentation is empty, or has no voxel in the scan.
    """
    return _measured(*_part(explanation, segmentation, box), tolerance_mm, threshold)


def baselines(
    explanation: SaliencyMap, segmentation: Volume, volume: Volume, seed: int = 0, box: Box | None = None
) -> dict[str, Validity]:
    """The same of maps that know nothing of the network, in the box that `explanation` covers.

    "centre" is a Gaussian about the middle of the box (sigma a fifth of its shortest side in mm), "intensity" the
    values of `volume` there above their minimum, summed over channels, and "random" uniform noise drawn with `seed`.

    Raises:
        MedXAIError: when the segmentation is empty, or has no voxel in the scan.
    """
    explanation, mask, box = _part(explanation, segmentation, box)
    sizes = [along.stop - along.start for along in box]
    spacing = Volume(mask[None], explanation.affine).spacing
    sigma = min(n * step for n, step in zip(sizes, spacing, strict=True)) / 5
    centre = torch.ones(sizes)
    for axis, (n, step) in enumerate(zip(sizes, spacing, strict=True)):
        away = (torch.arange(n) - (n - 1) / 2) * step / sigma
        centre *= torch.exp(-(away**2) / 2).reshape(-1, *[1] * (len(sizes) - axis - 1))
    scan = resample(volume.data, volume.affine, mask.shape, explanation.affine)[(slice(None), *box)]
    made = {
        "centre": centre,
        "intensity": (scan - scan.flatten(1).amin(1).reshape(-1, *[1] * len(sizes))).sum(0),
        "random": torch.rand(sizes, generator=torch.Generator().manual_seed(seed)),
    }
    found = {}
    for name, values in made.items():
        data = torch.zeros(1, *mask.shape)
        data[0][box] = values
        found[name] = _measured(replace(explanation, data=data), mask, box)
    return found


def judge(judged: Judged) -> Finding | None:
    """Say whether the map meets the segmentation better than maps that know nothing of the network; None without one.

    The light is by `gain`, the share of the way from the best of those maps to a perfect one, in AUPRC; a map whose
    peak misses is never good. There is none where a map that knows nothing is nearly perfect already.

    Raises:
        MedXAIError: when the segmentation is empty, or has no voxel in the scan.
    """
    if judged.segmentation is None:
        return None
    box = judged.box
    found = validity(judged.explanation, judged.segmentation, box=box)
    others = baselines(judged.explanation, judged.segmentation, judged.volume, judged.run.seed, box)
    best = max(other.auprc for other in others.values())
    values = {key: float(value) for key, value in asdict(found).items()}
    for name, other in others.items():
        values |= {f"{name}: {key}": float(value) for key, value in asdict(other).items()}
    rated = None
    if best < _TELLING:
        values["gain"] = (found.auprc - best) / (1 - best)
        rated = light(values["gain"], _GOOD, _FAIR)
        if rated == "good" and not found.pointing:
            rated = "fair"
    where, does = "lies in the segmentation", "does"
    if not found.pointing:
        where, does = f"is {found.distance_mm:.1f} mm away from the segmentation", "lies in it"
    # What follows a hit is why the light is not green all the same.
    link = "but only" if found.pointing and rated in ("fair", "poor") else "and"
    sentence = (
        f"The strongest place {where}, {link} {_percent(found.mass)} of what speaks for the answer {does} "
        f"({_percent(found.chance)} by chance, {_percent(others['centre'].mass)} for a map that just points at the "
        "middle)."
    )
    if math.isinf(found.distance_mm):
        sentence = "Nothing on the map speaks for the answer, so it does not meet the segmentation."
    # JSON has no infinity.
    values = {key: value for key, value in values.items() if math.isfinite(value)}
    return Finding("validity", TITLE, sentence, rated, values)


def _percent(share: float) -> str:
    return "less than 1 %" if 0 < share < 0.01 else f"{100 * share:.0f} %"


def _part(explanation: SaliencyMap, segmentation: Volume, box: Box | None) -> tuple[SaliencyMap, Tensor, Box]:
    """The map, the mask (D, H, W) and the box in the part of the grid that holds both: maps of networks that see a
    patch are zero beyond it, which would make voxels that were never asked about look like background well told."""
    mask = on_grid(explanation, segmentation)
    if box is None:
        box = extent(explanation.data) or tuple(slice(0, n) for n in mask.shape)
    marked = mask.nonzero()
    sides = zip(box, marked.amin(0).tolist(), marked.amax(0).tolist(), strict=True)
    part = tuple(slice(min(side.start, low), max(side.stop, high + 1)) for side, low, high in sides)
    start = [side.start for side in part]
    cropped = replace(
        explanation,
        data=explanation.data[(slice(None), *part)],
        affine=shifted(explanation.affine, np.array(start)),
    )
    inner = tuple(slice(side.start - at, side.stop - at) for side, at in zip(box, start, strict=True))
    return cropped, mask[part], inner


def _measured(
    explanation: SaliencyMap,
    mask: Tensor,
    box: Box,
    tolerance_mm: float = 0.0,
    threshold: float | None = None,
) -> Validity:
    """Compare the map with the voxels `mask` (D, H, W) of its grid, of which it covers `box`."""
    values, place = evidence(explanation), Volume(mask[None], explanation.affine)
    met = localise(explanation, place)
    distance = met.distance if bool(values.any()) else math.inf
    wanted, held = _count(mask), mask[box]
    last = float(np.partition(values.flatten().numpy(), -wanted)[-wanted])
    above, level = values > last, (values == last) & (values > 0)
    drawn = (wanted - _count(above)) * _count(level & mask) / max(1, _count(level))
    marked = (values >= (last if threshold is None else threshold * values.max())) & (values > 0)
    common, both = _count(marked & mask), _count(marked) + wanted
    hausdorff, hd95 = _hausdorff(marked, mask, place.spacing)
    return Validity(
        pointing=distance <= tolerance_mm,
        distance_mm=distance,
        mass=met.mass,
        rank=(_count(above & mask) + drawn) / wanted,
        auprc=float(_precisions(values[box], held).sum()) / wanted,
        iou=common / (both - common),
        dice=2 * common / both,
        hausdorff_mm=hausdorff,
        hd95_mm=hd95,
        chance=_count(held) / held.numel(),
    )


def _count(mask: Tensor) -> int:
    return int(mask.count_nonzero())


def _precisions(values: Tensor, held: Tensor) -> np.ndarray:
    """For each of the voxels `held`, the share of them in all that are as high as it or higher: average precision is
    their mean."""
    # Sorting values is many times as fast as sorting places, as scikit-learn does.
    every, ours = np.sort(values.flatten().numpy()), np.sort(values[held].numpy())
    hits, marked = (len(of) - np.searchsorted(of, ours) for of in (ours, every))
    return hits / marked


def _hausdorff(marked: Tensor, mask: Tensor, spacing: tuple[float, ...]) -> tuple[float, float]:
    """The largest distance in mm between the surfaces of both, of which `mask` has a voxel, and the larger of the 95th
    percentiles of both directions."""
    if not bool(marked.any()):
        return math.inf, math.inf
    _, distances, _ = get_edge_surface_distance(marked, mask, spacing=spacing, symmetric=True)
    return max(float(each.max()) for each in distances), max(float(each.quantile(0.95)) for each in distances)
