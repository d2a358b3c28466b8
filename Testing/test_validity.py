"""How well maps meet segmentations: against closed forms, scikit-learn, SciPy, brute force, and numbers of Quantus and
of surface-distance."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import plain_map
import pytest
import torch
from scipy.spatial.distance import cdist, directed_hausdorff
from sklearn.metrics import average_precision_score

from MedXAILib.errors import MedXAIError
from MedXAILib.explanation import SaliencyMap
from MedXAILib.grid import transform
from MedXAILib.model import Prepared
from MedXAILib.trust.judged import Judged
from MedXAILib.trust.validity import baselines, judge, validity
from MedXAILib.volume import Volume

SHAPE = (14, 18, 22)
SPACING = (3.0, 0.7, 1.1)
CUBE = (slice(4, 8), slice(6, 12), slice(5, 10))


def oblique() -> np.ndarray:
    """A turned grid with SPACING, whose axes are not those of the patient."""
    axes = np.linalg.qr(np.array([[1.0, 0.3, -0.2], [-0.4, 1.0, 0.1], [0.2, 0.5, 1.0]]))[0]
    affine = np.eye(4)
    affine[:3, :3] = axes * SPACING
    affine[:3, 3] = (-30.0, 12.0, 50.0)
    return affine


AFFINE = oblique()


def saliency(data: torch.Tensor, affine: np.ndarray = AFFINE) -> SaliencyMap:
    volume = {"fingerprint": Volume(data, affine).fingerprint}
    return plain_map.saliency(data, affine, True, model={"fingerprint": "network"}, volume=volume)


def block(where: tuple[slice, ...] = CUBE, value: float = 1.0, rest: float = 0.0) -> torch.Tensor:
    data = torch.full((1, *SHAPE), rest)
    data[0][where] = value
    return data


def points(mask: torch.Tensor) -> np.ndarray:
    return transform(AFFINE, torch.nonzero(mask).numpy().astype(float))


def surface(mask: torch.Tensor) -> torch.Tensor:
    """Voxels that have a face in common with what is outside."""
    padded = torch.nn.functional.pad(mask, (1,) * 6)
    within = mask.clone()
    for axis in range(3):
        for step in (-1, 1):
            within &= padded.roll(step, axis)[1:-1, 1:-1, 1:-1]
    return mask & ~within


def noise(seed: int = 0) -> torch.Tensor:
    return torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(seed))


def test_cube_that_is_met_exactly():
    found = validity(saliency(block(value=5, rest=0.01)), Volume(block(), AFFINE))
    assert found.pointing and found.distance_mm == 0
    assert (found.rank, found.auprc, found.iou, found.dice) == (1, 1, 1, 1)
    assert (found.hausdorff_mm, found.hd95_mm) == (0, 0)
    chance = 120 / math.prod(SHAPE)
    assert found.chance == pytest.approx(chance)
    assert found.mass == pytest.approx(600 / (600 + 0.01 * (math.prod(SHAPE) - 120)))
    # Everything speaks for it from 0.1 % of the maximum on.
    assert validity(saliency(block(value=5, rest=0.01)), Volume(block(), AFFINE), threshold=1e-3).iou == pytest.approx(
        chance
    )


def test_cube_that_is_half_met():
    # Two of the four slices of the cube overlap; the map says twice as much in the slices beyond.
    data = block((slice(6, 8), *CUBE[1:])) + block((slice(8, 10), *CUBE[1:]), 2.0)
    found = validity(saliency(data), Volume(block(), AFFINE))
    assert (found.mass, found.rank) == pytest.approx((1 / 3, 1 / 2))
    assert (found.iou, found.dice) == pytest.approx((1 / 3, 1 / 2))
    # The whole of one in the other, four slices of 3 mm less two away.
    assert (found.hausdorff_mm, found.hd95_mm) == pytest.approx((6, 6))
    # The box is those four slices; 60 voxels of the cube lie in it, below 60 others, and 60 out of it.
    assert found.chance == pytest.approx(1 / 2)
    assert found.auprc == pytest.approx(1 / 2 * 1 / 2)
    # The peak is in the middle of the brighter slices: between 8 and 9, so 1 or 2 slices from slice 7.
    assert not found.pointing and found.distance_mm in (pytest.approx(3), pytest.approx(6))
    assert validity(saliency(data), Volume(block(), AFFINE), tolerance_mm=6.01).pointing
    assert not validity(saliency(data), Volume(block(), AFFINE), tolerance_mm=2.99).pointing
    above = validity(saliency(data), Volume(block(), AFFINE), threshold=0.75)
    assert (above.iou, above.dice) == (0, 0)
    assert above.mass == found.mass


def test_what_speaks_against_does_not_count():
    data = block() - block((slice(0, 2), slice(0, 9), slice(0, 9)), 7.0)
    found = validity(saliency(data), Volume(block(), AFFINE))
    assert (found.mass, found.rank, found.auprc, found.iou) == (1, 1, 1, 1)
    assert found.chance == pytest.approx(120 / (8 * 12 * 10))  # but it is covered


def test_voxels_that_are_as_high_are_not_drawn():
    """An even map marks all of its voxels, and its rank is that of a draw."""
    found = validity(saliency(torch.ones(1, *SHAPE)), Volume(block(), AFFINE))
    chance = 120 / math.prod(SHAPE)
    assert (found.mass, found.rank, found.auprc, found.iou, found.chance) == pytest.approx((chance,) * 5)
    # 40 voxels above, of which 20 inside, and 200 that are as high as the 120th, of which 50 inside.
    data, mask = torch.zeros(290), torch.zeros(290)
    data[:40], data[40:240] = 3, 1
    mask[20:90] = mask[240:] = 1
    affine = np.diag([2.0, 1.0, 1.0])
    found = validity(saliency(data.reshape(1, 29, 10), affine), Volume(mask.reshape(1, 29, 10), affine))
    assert found.rank == pytest.approx((20 + 80 * 50 / 200) / 120)
    assert found.iou == pytest.approx(70 / (240 + 50))


def test_voxels_that_are_zero_are_never_among_the_highest():
    data = block((slice(4, 5), slice(6, 7), slice(5, 10)))
    found = validity(saliency(data), Volume(block(), AFFINE))
    assert found.rank == found.iou == pytest.approx(5 / 120)
    assert validity(saliency(data), Volume(block(), AFFINE), threshold=0.0).iou == pytest.approx(5 / 120)


def test_average_precision_is_that_of_scikit_learn():
    data, mask = noise() + block() * 0.4, block()
    found = validity(saliency(data), Volume(mask, AFFINE))
    exactly = {"rel": 1e-12}
    assert found.auprc == pytest.approx(average_precision_score(mask.flatten(), data.flatten()), **exactly)
    assert found.auprc > 2 * found.chance
    # Few values, so that many voxels are as high as others, in the segmentation and beside it; and mostly zeros.
    for coarse in ((4 * data).floor() / 4, (data - 0.9).clamp_min(0), block() * noise(2).round()):
        coarse[0, 0, 0, 0], coarse[0, -1, -1, -1] = 0.25, 0.25  # so that the box is the whole grid
        found = validity(saliency(coarse), Volume(mask, AFFINE))
        assert found.auprc == pytest.approx(average_precision_score(mask.flatten(), coarse.flatten()), **exactly)
    even = [validity(saliency(noise(seed)), Volume(mask, AFFINE)) for seed in range(5)]
    assert np.mean([each.auprc for each in even]) == pytest.approx(even[0].chance, rel=0.1)
    assert np.mean([each.mass for each in even]) == pytest.approx(even[0].chance, rel=0.1)


@pytest.mark.parametrize(
    ("step", "lift", "pointing", "mass", "rank"),
    [
        (7, 0.0, True, 0.26538211, 14 / 51),
        (3, 0.0, False, 0.28486615, 14 / 51),
        (11, 0.0, False, 0.23548144, 16 / 51),
        (31, 60.5, True, 0.36826521, 25 / 51),
        (77, 150.5, True, 0.48621365, 42 / 51),
    ],
)
def test_slices_have_the_numbers_of_quantus(step, lift, pointing, mass, rank):
    """PointingGame, RelevanceMassAccuracy and RelevanceRankAccuracy of Quantus 0.6.0, on slices without a tie.

    Of a scan (N, C, D, H, W) none of its metrics takes any, unless it is told channel_first=True. Then these three are
    right in voxels, as long as nothing is negative (the mass goes below 0 and above 1) and there is no tie (any of
    the highest voxels is a hit, and ranks are as the sort left them). There is no distance in mm, and no AUPRC: its AUC
    is that of the ROC. RegionPerturbation, Selectivity, Infidelity, IROF, Continuity and the three relative stabilities
    still refuse. ROAD gives wrong numbers: it takes the scan for an image of D x H pixels, whose neighbours are
    elsewhere in the scan, and nearly all voxels beyond become nan.
    """
    values = torch.arange(1, 193) * step % 193
    i, j = torch.meshgrid(torch.arange(12), torch.arange(16), indexing="ij")
    mask = (((i - 5) / 3.5) ** 2 + ((j - 9) / 4.2) ** 2 <= 1)[None].float()
    affine = np.diag([2.0, 0.5, 1.0])
    found = validity(saliency(values.reshape(1, 12, 16) + lift * mask, affine), Volume(mask, affine))
    assert (found.pointing, found.mass, found.rank) == (pointing, pytest.approx(mass, rel=1e-6), pytest.approx(rank))


def test_zeros_around_the_map_do_not_flatter_it():
    """Only the box that it covers counts, and what it does not cover of the segmentation is missed."""
    box = (slice(2, 12), slice(3, 15), slice(7, 16))  # holds 3 of the 5 columns of the cube
    data, mask = torch.zeros(1, *SHAPE), block()
    data[0][box] = noise()[0][box] + 0.1
    found = validity(saliency(data), Volume(mask, AFFINE))
    inside = mask[0][box].flatten().numpy(), data[0][box].flatten().numpy()
    assert found.chance == pytest.approx(4 * 6 * 3 / (10 * 12 * 9))
    assert found.auprc == pytest.approx(average_precision_score(*inside) * 3 / 5)
    assert found.auprc == pytest.approx(found.chance * 3 / 5, rel=0.5)
    data[0][box] = torch.where(mask[0][box] > 0, 1.0, 0.001)
    found = validity(saliency(data), Volume(mask, AFFINE), threshold=0.5)
    # The 48 voxels out of the box are left: no more of them are among the 1008 others, all as high, of the box.
    assert (found.auprc, found.rank, found.iou) == pytest.approx((3 / 5, 3 / 5, 3 / 5))
    assert found.hausdorff_mm == pytest.approx(2 * 1.1)


def test_map_beside_the_segmentation():
    data = block((slice(0, 3), slice(0, 3), slice(0, 3)), 1.0)
    found = validity(saliency(data), Volume(block(), AFFINE))
    assert (found.auprc, found.chance, found.mass, found.rank, found.iou, found.dice) == (0,) * 6
    assert not found.pointing
    # From the middle (1, 1, 1) to (4, 6, 5).
    assert found.distance_mm == pytest.approx(math.hypot(3 * 3.0, 5 * 0.7, 4 * 1.1))


@pytest.mark.parametrize("shift", [(1, 0, 0), (0, 5, 0), (0, 0, 7), (3, -2, 4)])
def test_distances_of_surfaces_are_those_of_scipy_and_of_brute_force(shift):
    moved = block(tuple(slice(s.start + by, s.stop + by) for s, by in zip(CUBE, shift, strict=True)))
    found = validity(saliency(moved), Volume(block(), AFFINE))
    both = points(moved[0]), points(block()[0])
    # Of a block and the same block moved, solids are as far apart as surfaces.
    expected = max(directed_hausdorff(*both)[0], directed_hausdorff(*both[::-1])[0])
    assert found.hausdorff_mm == pytest.approx(expected, rel=1e-5)
    away = cdist(points(surface(moved[0] > 0)), points(surface(block()[0] > 0)))
    assert found.hausdorff_mm == pytest.approx(max(away.min(0).max(), away.min(1).max()), rel=1e-5)
    expected = max(np.percentile(away.min(0), 95), np.percentile(away.min(1), 95))
    assert found.hd95_mm == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("axis", "hausdorff", "hd95"), [(0, 24.0, 9.0), (1, 5.6, 2.1), (2, 8.8, 3.3)])
def test_a_slab_and_a_spike_are_as_far_as_in_surface_distance(axis, hausdorff, hd95):
    """Golden values of surface-distance 0.1 (compute_robust_hausdorff at 100 and 95)."""
    cuboid = [slice(4, 16), slice(5, 21), slice(6, 22)]
    end = cuboid[axis].stop
    slab, spike = cuboid.copy(), [slice(9, 10), slice(11, 12), slice(13, 14)]
    slab[axis], spike[axis] = slice(end, end + 3), slice(end, end + 8)
    mask = torch.zeros(1, 26, 32, 34)
    mask[0][tuple(cuboid)] = 1
    data = mask.clone()
    data[0][tuple(slab)] = data[0][tuple(spike)] = 1
    found = validity(saliency(data), Volume(mask, AFFINE))
    assert (found.hausdorff_mm, found.hd95_mm) == pytest.approx((hausdorff, hd95), rel=1e-5)


@pytest.mark.parametrize(
    ("radii", "centre", "others", "hausdorff", "hd95"),
    [
        ((12, 5, 8), (7, 8, 12), (10, 4, 6), 6.0, 4.4),
        ((14, 5, 9), (6, 9, 10), (8, 3, 5), 6.1400, 6.0407),
        ((9, 4.5, 7), (8, 7, 13), (9, 4.5, 7), 6.9893, 5.7245),
    ],
)
def test_ellipsoids_are_as_far_as_in_surface_distance(radii, centre, others, hausdorff, hd95):
    """Golden values of surface-distance 0.1, whose surfaces lie at the corners of voxels and count by their area: its
    95th percentile is only near that of voxels."""

    def ellipsoid(at: tuple[float, ...], radii: tuple[float, ...]) -> torch.Tensor:
        index = torch.from_numpy(np.indices(SHAPE)).double()
        away = [(i - a) * step / r for i, a, step, r in zip(index, at, SPACING, radii, strict=True)]
        return (torch.stack(away).square().sum(0) <= 1)[None].float()

    mask = ellipsoid((6, 9, 10), radii)
    found = validity(saliency(ellipsoid(centre, others)), Volume(mask, AFFINE), threshold=0.5)
    assert found.hausdorff_mm == pytest.approx(hausdorff, abs=1e-4)
    assert found.hd95_mm == pytest.approx(hd95, abs=min(SPACING))


def test_distances_of_an_irregular_map():
    data = noise() + block() * 0.3
    found = validity(saliency(data), Volume(block(), AFFINE), threshold=0.9)
    marked = data[0] >= 0.9 * data.max()
    away = cdist(points(surface(marked)), points(surface(block()[0] > 0)))
    assert found.hausdorff_mm == pytest.approx(max(away.min(0).max(), away.min(1).max()), rel=1e-5)
    expected = max(np.percentile(away.min(0), 95), np.percentile(away.min(1), 95))
    assert found.hd95_mm == pytest.approx(expected, rel=1e-5) and found.hd95_mm < found.hausdorff_mm


@pytest.mark.parametrize("axes", [(1,), (2,), (3,), (1, 3), (1, 2, 3)])
def test_direction_of_the_axes_does_not_matter(axes):
    data, volume = noise() + block() * 0.3, noise(7)
    # The box has an odd number of voxels along each axis, so that it has a middle one.
    data[0, 0], data[0, :, 0], data[0, ..., 0] = 0, 0, 0

    def flipped(values: torch.Tensor) -> Volume:
        affine = AFFINE.copy()
        for axis in axes:
            affine[:3, 3] += affine[:3, axis - 1] * (SHAPE[axis - 1] - 1)
            affine[:3, axis - 1] *= -1
        return Volume(values.flip(axes), affine)

    turned = flipped(data)
    plain = validity(saliency(data), Volume(block(), AFFINE))
    other = validity(saliency(turned.data, turned.affine), flipped(block()))
    assert asdict(other) == pytest.approx(asdict(plain), rel=1e-5)
    # The segmentation as it was, on the turned grid of the map.
    mixed = validity(saliency(turned.data, turned.affine), Volume(block(), AFFINE))
    assert asdict(mixed) == pytest.approx(asdict(plain), rel=1e-5)
    known = baselines(saliency(data), Volume(block(), AFFINE), Volume(volume, AFFINE))
    blind = baselines(saliency(turned.data, turned.affine), flipped(block()), flipped(volume))
    for name in ("centre", "intensity"):
        assert asdict(blind[name]) == pytest.approx(asdict(known[name]), rel=1e-5)


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_map_in_which_nothing_speaks_for_the_target(value):
    found = validity(saliency(torch.full((1, *SHAPE), value)), Volume(block(), AFFINE), tolerance_mm=1000)
    assert not found.pointing
    assert (found.distance_mm, found.hausdorff_mm, found.hd95_mm) == (math.inf,) * 3
    assert (found.mass, found.rank, found.iou, found.dice) == (0, 0, 0, 0)
    assert (found.auprc, found.chance) == pytest.approx((120 / math.prod(SHAPE),) * 2)


@pytest.mark.parametrize(("shift", "value", "said"), [(0.0, 0.0, "is empty"), (1e4, 1.0, "has no voxel in the scan")])
def test_segmentation_that_cannot_be_met(shift, value, said):
    affine = AFFINE.copy()
    affine[0, 3] += shift
    with pytest.raises(MedXAIError, match=said):
        validity(saliency(noise()), Volume(block() * value, affine))
    with pytest.raises(MedXAIError, match=said):
        baselines(saliency(noise()), Volume(block() * value, affine), Volume(noise(), AFFINE))


def test_plain_image():
    data, affine = torch.zeros(1, 12, 16), np.diag([2.0, 0.5, 1.0])
    data[0, 3:7, 2:10] = 1
    other = data.roll(3, 2)
    found = validity(saliency(other, affine), Volume(data, affine))
    assert (found.rank, found.hausdorff_mm, found.iou) == pytest.approx((5 / 8, 1.5, 5 / 11))
    assert baselines(saliency(other, affine), Volume(data, affine), Volume(other, affine)).keys() == {
        "centre",
        "intensity",
        "random",
    }


def test_maps_that_know_nothing_stay_in_the_box():
    box = (slice(3, 9), slice(2, 16), slice(4, 18))
    mask, scan, data = block(), torch.cat([100 * noise(3) - 1000, 50 * noise(4)]), torch.zeros(2, *SHAPE)
    data[1][box] = -1.0
    scan[0, 3:5], scan[1, 3:5] = -1100, -1  # air: there the intensity says nothing, and yet it covers the box
    known = baselines(saliency(data), Volume(mask, AFFINE), Volume(scan, AFFINE))
    sizes = [s.stop - s.start for s in box]
    index = np.stack(np.meshgrid(*[np.arange(s.start, s.stop) for s in box], indexing="ij"), -1)
    middle = np.array([(s.start + s.stop - 1) / 2 for s in box])
    sigma = min(np.array(sizes) * SPACING) / 5
    gaussian = np.exp(-(np.linalg.norm((index - middle) * SPACING, axis=-1) ** 2) / (2 * sigma**2))
    here = torch.rand(sizes, generator=torch.Generator().manual_seed(0))
    for name, values in {
        "centre": torch.from_numpy(gaussian),
        "intensity": scan[0][box] + 1100 + scan[1][box] + 1,
        "random": here,
    }.items():
        inside = mask[0][box] > 0
        assert known[name].mass == pytest.approx(float(values[inside].sum() / values.sum()), rel=1e-4)
        expected = average_precision_score(inside.flatten().numpy(), values.flatten().numpy())
        assert known[name].auprc == pytest.approx(expected, rel=0.02)
        assert known[name].chance == pytest.approx(120 / math.prod(sizes))
    again = baselines(saliency(data), Volume(mask, AFFINE), Volume(scan, AFFINE), seed=1)
    assert again["random"] != known["random"] and again["centre"] == known["centre"]


def judged(data: torch.Tensor, mask: torch.Tensor | None, scan: torch.Tensor) -> Judged:
    volume, explanation = Volume(scan, AFFINE), saliency(data)
    made = explanation.provenance.model_copy(update={"volume": {"fingerprint": volume.fingerprint}})
    segmentation = None if mask is None else Volume(mask, AFFINE)
    seen = Prepared(volume.data, volume.affine)
    model = SimpleNamespace(fingerprint="network", prepare=lambda *_: seen)
    return Judged(replace(explanation, provenance=made), model, volume, segmentation)


def test_finding_of_a_map_that_meets_the_segmentation():
    finding = judge(judged(noise() + block() * 9, block(), noise(1)))
    assert finding is not None and finding.light == "good"
    found = validity(saliency(noise() + block() * 9), Volume(block(), AFFINE))
    blind = baselines(saliency(noise() + block() * 9), Volume(block(), AFFINE), Volume(noise(1), AFFINE))
    assert finding.sentence == (
        f"The strongest place lies in the segmentation, and {100 * found.mass:.0f} % of what speaks for the answer "
        f"does (2 % by chance, {100 * blind['centre'].mass:.0f} % for a map that just points at the middle)."
    )
    assert finding.values["pointing"] == 1 and finding.values["mass"] == found.mass
    assert finding.values["centre: mass"] == blind["centre"].mass
    assert finding.values["gain"] == pytest.approx(1)  # of the way to a perfect map
    assert len(finding.values) == 4 * 10 + 1


def test_finding_of_a_map_that_does_not():
    finding = judge(judged(noise(), block(), noise(1)))
    assert finding is not None and finding.light == "poor"
    # The peak outside, but most of the rest inside.
    high = noise() + block() * 9
    high[0, 0, 0, 0] = 99
    finding = judge(judged(high, block(), noise(1)))
    assert finding is not None and finding.light == "fair" and finding.values["gain"] > 0.9
    assert finding.sentence.startswith("The strongest place is 13.") and "lies in it (2 % by chance" in finding.sentence


def test_finding_of_a_map_that_says_nothing():
    finding = judge(judged(torch.zeros(1, *SHAPE), block(), noise(1)))
    assert finding is not None and finding.light == "poor"
    assert finding.sentence.startswith("Nothing on the map speaks for the answer")
    assert "distance_mm" not in finding.values and "centre: distance_mm" in finding.values
    json.dumps(finding.to_json(), allow_nan=False)


def test_no_light_where_intensity_alone_meets_the_segmentation():
    finding = judge(judged(noise() + block() * 9, block(), noise(1) + block() * 9))
    assert finding is not None and finding.light is None and "gain" not in finding.values


def test_nothing_to_say_without_a_segmentation():
    assert judge(judged(noise(), None, noise(1))) is None
