"""Planted marks: only the mark differs, sites come as often as was asked, and files lie where the scan does; the
shipped network with a shortcut goes by the tag, the others do not, and an audit tells them apart."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy.stats import binom

import MedXAILib as mx
from MedXAILib import resources
from MedXAILib.audit.audit import CHECKS, Audit, audit
from MedXAILib.audit.cohort import seen
from MedXAILib.cohort.subjects import find_subjects
from MedXAILib.errors import MedXAIError
from MedXAILib.grid import transform
from MedXAILib.synthetic import lung_nodules
from MedXAILib.synthetic.lung_nodules import CLASSES, HU_RANGE, SIZE, SPACING_MM, Backgrounds, Nodules
from MedXAILib.synthetic.planted_marker import ANATOMY_MM, SITES, TAG, Mark, Planted, marked, plant, synthesise, write
from MedXAILib.training.lung_nodule_shortcut import reliance
from MedXAILib.within import mask_on

MALIGNANT = CLASSES.index("malignant")
SHORTCUT = "retrained/lung_nodule_shortcut"

scan = cache(Backgrounds.test)


@cache
def bare() -> Nodules:
    return lung_nodules.synthesise(scan(), 90, 4100)


@cache
def model(name: str) -> mx.Model:
    return mx.load_model(resources.path(f"Models/{name}"))


def test_only_the_mark_differs() -> None:
    without, with_tag, with_blur = (plant(bare(), 1, mark, 0.8) for mark in ("none", "tag", "blur"))
    assert torch.equal(without.images, bare().images)
    assert not bool(without.marks.any())
    for planted in (with_tag, with_blur):
        assert torch.equal(planted.sites, without.sites)
        assert torch.equal(planted.labels, bare().labels)
        assert torch.equal(planted.images[~planted.marks], bare().images[~planted.marks])
        assert torch.equal(planted.marks.flatten(1).any(1), planted.sites == SITES.index("B"))
    assert set(with_tag.marks.flatten(1).sum(1).tolist()) == {0, TAG**3}
    assert set(with_blur.marks.flatten(1).sum(1).tolist()) == {0, SIZE**3}


def test_a_tag_is_stripes_in_the_corner_farthest_from_the_nodule() -> None:
    images, tags = marked(bare(), "tag")
    for image, tag, centre in zip(images, tags, bare().centres, strict=True):
        where = tag[0].nonzero()
        low, high = where.amin(0), where.amax(0)
        assert bool((high - low == TAG - 1).all())
        corner = torch.where(centre < (SIZE - 1) / 2, SIZE - 1, 0)
        assert bool((torch.minimum((low - corner).abs(), (high - corner).abs()) == 1).all())
        # Along A two voxels are dark, two bright, and so on; along R and S nothing changes.
        row = torch.tensor([float(a // 2 % 2) for a in range(int(low[1]), int(high[1]) + 1)])
        assert torch.equal(image[0][tag[0]].reshape(TAG, TAG, TAG), row[:, None].expand(TAG, TAG, TAG))
    far = [(t[0].nonzero() - c).norm(dim=1).min() * SPACING_MM for t, c in zip(tags, bare().centres, strict=True)]
    assert float(min(far)) > ANATOMY_MM
    assert not bool((tags & bare().masks).any())


def test_a_blur_keeps_what_is_smooth_and_halves_what_is_not() -> None:
    """Two means of three voxels: cos(w k) becomes ((1 + 2 cos w) / 3)² times that, and a slope stays a slope."""
    place = torch.arange(SIZE, dtype=torch.float32)
    omega = 2 * math.pi / 8
    waves = torch.stack([0.01 * place, (omega * place).cos()])[:, None, :, None, None].expand(-1, 1, SIZE, SIZE, SIZE)
    few = Nodules(waves, *(value[:2] for value in list(vars(bare()).values())[1:]))
    blurred, _ = marked(few, "blur")
    # Also at the border, what is the same everywhere stays what it is.
    assert torch.allclose(marked(replace(few, images=torch.ones_like(waves)), "blur")[0], torch.ones(()))
    inside = slice(2, -2)
    assert torch.allclose(blurred[0, :, inside], waves[0, :, inside], atol=1e-5)
    gain = ((1 + 2 * math.cos(omega)) / 3) ** 2
    assert torch.allclose(blurred[1, :, inside], gain * waves[1, :, inside], atol=1e-5)


@pytest.mark.parametrize("correlation", [0.5, 0.8, 1.0])
def test_as_many_of_each_class_are_of_each_site_as_was_asked(correlation: float) -> None:
    labels = torch.arange(1800) % len(CLASSES)
    one = torch.zeros(1800, 1, 1, 1, 1)
    many = Nodules(one, one.bool(), labels, torch.zeros(1800, 7), torch.zeros(1800, 3), torch.zeros(1800, 3))
    sites = plant(many, 3, "none", correlation).sites
    for label in range(len(CLASSES)):
        share = correlation if label == MALIGNANT else 1 - correlation
        low, high = binom.interval(0.9999, 600, share)
        assert low <= int(sites[labels == label].sum()) <= high
    told = plant(many, 3, "none", correlation, doubt=0.2)
    assert torch.equal(told.labels == 0, labels == 0)
    low, high = binom.interval(0.9999, 1200, 0.2)
    assert low <= int((told.labels != labels).sum()) <= high
    # The site goes with what is told, not with what is so.
    for such in (told.labels == labels, told.labels != labels):
        such = such & (told.labels == MALIGNANT)
        low, high = binom.interval(0.9999, int(such.sum()), correlation)
        assert low <= int(told.sites[such].sum()) <= high
    with pytest.raises(MedXAIError, match=r"from 0.5 to 1, not 0.4"):
        plant(many, 3, "none", 0.4)
    with pytest.raises(MedXAIError, match="did you mean blur"):
        marked(many, "blurr")  # type: ignore[arg-type]


def test_a_seed_gives_the_same_sites_in_sets_of_any_size() -> None:
    many, few = synthesise(scan(), 12, 5, mark="tag"), synthesise(scan(), 6, 5, mark="tag")
    assert torch.equal(many.sites[:6], few.sites)
    assert torch.equal(many.marks[:6], few.marks)
    other = synthesise(scan(), 12, 5, correlation=0.6)
    # Fewer malignant ones of site B, and more of the others.
    change = other.sites - many.sites
    assert bool((change[many.labels == MALIGNANT] <= 0).all())
    assert bool((change[many.labels != MALIGNANT] >= 0).all())


@pytest.mark.parametrize("slices", [1, 2])
def test_files_lie_where_the_scan_does_also_obliquely(slices: int, tmp_path: Path) -> None:
    c, s = math.cos(0.4), math.sin(0.4)
    turn = np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]]) @ np.array(
        [[1.0, 0.0, 0.0], [0.0, c, -s], [0.0, s, c]]
    )
    few = Planted(**{name: value[:6] for name, value in vars(plant(bare(), 2, "tag", 0.7)).items()})
    subjects = find_subjects(write(few, scan(), tmp_path / "set", turn, slices))
    assert [one.meta["label"] for one in subjects] == [CLASSES[k] for k in few.labels]
    assert [one.meta["site"] for one in subjects] == [SITES[k] for k in few.sites]
    assert [bool(one.meta["mark"]) for one in subjects] == few.marks.flatten(1).any(1).tolist()
    low, high = HU_RANGE
    for k, one in enumerate(subjects):
        volume = mx.load_volume(one.volume[0])
        assert sorted(volume.spacing) == pytest.approx([SPACING_MM, SPACING_MM, slices * SPACING_MM])
        assert not np.allclose(np.abs(volume.affine[:3, :3] / volume.spacing).round(6) % 1, 0)
        # A voxel of the patch, through the scan's affine and the turn, is the voxel of the file at that point.
        at = np.array([7, 23, 12 + (slices - 1) / 2])
        point = turn @ transform(scan().affine, few.corners[k].numpy() + at)
        index = tuple(volume.to_index(point).round().astype(int))
        assert np.allclose(volume.to_point(index), point, atol=1e-3)
        patch = few.images[k, 0, 7, 23, 12 : 12 + slices].mean()
        assert float(volume.data[0][index]) == pytest.approx(float(patch) * (high - low) + low, abs=1.01)
        # The anatomy is a ball of 20 mm about the nodule: its volume, where the patch does not cut it, and its middle.
        ball = mx.load_volume(one.anatomy)
        centre = turn @ transform(scan().affine, few.corners[k].numpy() + few.centres[k].numpy())
        points = transform(ball.affine, ball.data[0].nonzero().numpy())
        assert np.linalg.norm(points - centre, axis=1).max() <= 20.0
        outside = transform(ball.affine, (ball.data[0] == 0).nonzero().numpy())
        assert np.linalg.norm(outside - centre, axis=1).min() > 20.0
        if one.meta["mark"]:
            mark = mx.load_volume(tmp_path / "set" / one.meta["mark"])
            middle = transform(mark.affine, mark.data[0].nonzero().double().mean(0).numpy())
            true = few.marks[k, 0].nonzero().double().mean(0).numpy()
            expected = turn @ transform(scan().affine, few.corners[k].numpy() + true)
            assert np.allclose(middle, expected, atol=1e-3 if slices == 1 else SPACING_MM)
        # The network sees the patch as it was, or nearly, where slices are thick.
        if slices == 1:
            prepared = model("lung_nodule").prepare(volume)
            assert prepared.x.shape[1:] == (SIZE,) * 3
            assert mask_on(prepared, ball, prepared.x.shape[1:]).shape == (SIZE,) * 3


def test_files_are_of_the_same_voxels_to_another_reader(tmp_path: Path) -> None:
    few = Planted(**{name: value[:1] for name, value in vars(plant(bare(), 2, "tag", 0.7)).items()})
    write(few, scan(), tmp_path)
    image = sitk.ReadImage(str(tmp_path / "case-0000.nrrd"))
    low, high = HU_RANGE
    for at in ((3, 20, 31), (0, 0, 0), (39, 1, 17)):
        r, a, s = transform(scan().affine, few.corners[0].numpy() + np.array(at))
        index = image.TransformPhysicalPointToIndex((-r, -a, s))
        assert image.GetPixel(*index) == pytest.approx(float(few.images[0, 0][at]) * (high - low) + low, abs=1.01)


@cache
def relies(name: str, mark: Mark) -> dict[str, float]:
    of = replace(model(name), preprocessing=None)
    with of.ready():
        return reliance(of.forward, bare(), mark)


def test_the_shipped_shortcut_goes_by_the_tag_and_the_classifier_does_not() -> None:
    cheat, honest = relies(SHORTCUT, "tag"), relies("lung_nodule", "tag")
    assert cheat["aligned"] - cheat["conflicting"] > 0.2
    assert cheat["moves"] > 1.5
    # It has never seen a tag, which may well confuse it, but does not speak for a malignant nodule.
    assert honest["moves"] < 0.3


@cache
def audited(name: str, mark: Mark) -> Audit:
    planted, of = plant(bare(), 4100, mark, 0.8), replace(model(name), preprocessing=None)
    maps = torch.cat([mx.explain(of, part, "hirescam").data.sum(1) for part in planted.images.split(30)])
    axis = torch.arange(SIZE, dtype=torch.float32)
    index = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)
    anatomy = [(index - c).norm(dim=-1) * SPACING_MM <= ANATOMY_MM for c in planted.centres]
    labels, sites = [CLASSES[k] for k in planted.labels], [SITES[k] for k in planted.sites]
    cohort = seen(of, planted.images, maps, labels, {"site": sites}, anatomy)
    # The one that is left out asks the network hundreds of times.
    return audit(cohort, checks=[name for name in CHECKS if name != "transplant"], draws=1999)


def test_an_audit_finds_the_shortcut_and_nothing_without_it() -> None:
    assert audited(SHORTCUT, "tag").alarm
    assert not audited(SHORTCUT, "none").alarm
    assert not audited("lung_nodule", "none").alarm
