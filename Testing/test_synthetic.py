"""The synthetic nodules are what they say they are: their place, shape, attributes and class."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor

from MedXAILib import resources
from MedXAILib.errors import MedXAIError
from MedXAILib.synthetic import lung_nodules as synthetic
from MedXAILib.synthetic.lung_nodules import ATTRIBUTES, SIZE, SPACING_MM, Backgrounds, draw, render, synthesise


@cache
def training() -> Backgrounds:
    return Backgrounds.training()


@cache
def test_scan() -> Backgrounds:
    return Backgrounds.test()


test_scan.__test__ = False  # type: ignore[attr-defined]


def test_a_seed_gives_the_same_patches_again_in_batches_of_any_size() -> None:
    many, few = synthesise(training(), 20, seed=5), synthesise(training(), 5, seed=5)
    assert torch.equal(many.images, synthesise(training(), 20, seed=5).images)
    assert torch.allclose(many.images[:5], few.images, atol=1e-5)
    assert torch.equal(many.masks[:5], few.masks)
    assert not torch.equal(many.images[:5], synthesise(training(), 5, seed=6).images)


def test_the_classes_are_balanced_and_follow_the_rule() -> None:
    attributes, labels = draw(90, seed=7)
    assert labels.bincount().tolist() == [30, 30, 30]
    assert bool(attributes[labels == 0].isnan().all())
    low, high = 7.0, 24.0
    for row, label in zip(attributes.tolist(), labels.tolist(), strict=True):
        if label == 0:
            continue
        a = dict(zip(ATTRIBUTES, row, strict=True))
        logit = -2.6 + 3 * (a["diameter_mm"] - low) / (high - low)
        logit += 3 * (a["spiculation"] > 0) + (a["lobulation"] > 0) - 4 * (a["calcification"] > 0)
        logit += 1.5 * (0.1 < a["solidity"] < 0.9)
        assert abs(logit) > 1.4
        assert (logit > 0) == (label == 2)


def test_borderline_cases_are_those_near_the_rule_s_boundary() -> None:
    attributes, labels = draw(300, seed=8, borderline=True)
    logit = synthetic.rule_logit(attributes[labels > 0]).abs()
    assert float(logit.min()) > 0.8
    assert 0.05 < float((logit < 1.4).float().mean()) < 0.5


def _plain(diameter: float, count: int = 3) -> torch.Tensor:
    """Smooth, solid, round: nothing but a diameter."""
    return torch.tensor([[diameter, 1.0, 0.0, 0.0, 1.0, 0.0, 0.5]]).repeat(count, 1)


@pytest.mark.parametrize("diameter", [8.0, 14.0, 18.0])
def test_the_mask_has_the_volume_of_the_diameter(diameter: float) -> None:
    nodules = render(training(), _plain(diameter, 6), torch.ones(6, dtype=torch.long), seed=9)
    radius = diameter / 2 / SPACING_MM
    whole = ((nodules.centres > radius) & (nodules.centres < SIZE - 1 - radius)).all(1)
    assert int(whole.sum()) >= 2
    volume = nodules.masks[whole].flatten(1).sum(1) * SPACING_MM**3
    assert torch.allclose((6 * volume / np.pi) ** (1 / 3), torch.full((len(volume),), diameter), rtol=0.04)


def test_an_elongated_nodule_has_the_same_volume() -> None:
    attributes = _plain(14.0, 6)
    long = attributes.clone()
    long[:, ATTRIBUTES.index("elongation")] = 0.6
    labels = torch.ones(6, dtype=torch.long)
    one, other = (render(training(), a, labels, seed=10).masks.flatten(1).sum(1) for a in (attributes, long))
    assert torch.allclose(one.float(), other.float(), rtol=0.15)


def test_the_mask_is_where_the_image_changed() -> None:
    attributes, labels = draw(12, seed=11)
    with_nodule = render(training(), attributes, labels, seed=11)
    without = render(training(), attributes, torch.zeros_like(labels), seed=11)
    change = (with_nodule.images - without.images).abs()
    lesion = labels > 0
    assert float(change[~lesion].max()) == 0.0
    assert not bool(with_nodule.masks[~lesion].any())
    inside = (change * with_nodule.masks)[lesion].flatten(1).sum(1) / change[lesion].flatten(1).sum(1)
    assert float(inside.min()) > 0.3  # the rest is the soft margin and the blur of thick slices
    assert float(inside.mean()) > 0.6
    for k in lesion.nonzero().flatten().tolist():
        centre = with_nodule.masks[k, 0].nonzero().float().mean(0)
        assert float((centre - with_nodule.centres[k]).norm()) < 3


def test_toggling_one_attribute_changes_nothing_else() -> None:
    before = torch.tensor([[16.0, 0.8, 0.0, 0.0, 1.0, 0.0, 1.0]])
    after = before.clone()
    after[:, ATTRIBUTES.index("calcification")] = 1.0
    label = torch.ones(1, dtype=torch.long)
    one, other = render(training(), before, label, seed=12), render(training(), after, label, seed=12)
    assert torch.equal(one.masks, other.masks)
    change = (other.images - one.images)[0, 0]
    assert float(change.max()) > 0.1
    where = (change > 0.05).nonzero().float()
    assert float((where - one.centres[0]).norm(dim=1).max()) * SPACING_MM < 16.0 / 2


def test_nodules_lie_anywhere_in_the_patch_but_in_lung() -> None:
    nodules = synthesise(training(), 120, seed=13)
    offset = nodules.centres - (SIZE - 1) / 2
    assert float(offset.abs().max()) <= 13.1
    assert float(offset.std()) > 6
    attributes, labels = draw(120, seed=13)
    empty = render(training(), attributes, torch.zeros_like(labels), seed=13)
    r, a, s = empty.centres.round().long().T
    at = empty.images[torch.arange(120), 0, r, a, s]
    assert float((at < 0.5).float().mean()) > 0.6


@pytest.mark.parametrize("scan", [training, test_scan])
def test_no_patch_touches_the_patient_s_own_lesion(scan) -> None:
    backgrounds = scan()
    assert backgrounds.lesion is not None
    for corner in synthesise(backgrounds, 60, seed=14).corners.tolist():
        cut = tuple(slice(max(0, c - 3), c + SIZE + 3) for c in corner)
        assert not bool(backgrounds.lesion[cut].any())


def test_the_patients_are_two() -> None:
    one, other = training(), test_scan()
    assert one.hu.shape != other.hu.shape
    assert float(one.lesion.sum()) * SPACING_MM**3 == pytest.approx(48_434, rel=0.02)
    assert float(other.lesion.sum()) * SPACING_MM**3 == pytest.approx(1_361, rel=0.1)


@pytest.mark.parametrize("bundle", ["lung_nodule", "lung_nodule_segmentation"])
def test_the_bundles_preprocess_a_scan_as_the_training_did(bundle: str) -> None:
    config = json.loads((resources.path(f"Models/{bundle}") / "configs" / "inference.json").read_text("utf-8"))
    config["preprocessing"]["transforms"] = config["preprocessing"]["transforms"][2:]
    transform = ConfigParser(config).get_parsed_content("preprocessing")
    image = sitk.ReadImage(str(resources.path("SampleData/chest_ct_nodule.nrrd")))
    array = torch.from_numpy(sitk.GetArrayFromImage(image).astype(np.float32).transpose(2, 1, 0).copy())[None]
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ np.block(
        [[np.diag(image.GetSpacing()), np.array(image.GetOrigin())[:, None]], [np.zeros((1, 3)), np.ones((1, 1))]]
    )
    seen = transform({"image": MetaTensor(array, affine=affine)})["image"]
    assert torch.allclose(seen[0].as_tensor(), synthetic.scale(test_scan().hu), atol=1e-5)
    assert np.allclose(np.asarray(seen.affine), test_scan().affine)


def test_a_scan_without_lung_is_refused(tmp_path) -> None:
    path = tmp_path / "block.nrrd"
    sitk.WriteImage(sitk.GetImageFromArray(np.full((20, 40, 40), 40, np.int16)), str(path))
    with pytest.raises(MedXAIError, match="No lung was found"):
        Backgrounds.from_scan(path)
    with pytest.raises(MedXAIError, match="know of no lesion"):
        Backgrounds(torch.zeros(1, 1, 1), np.eye(4), torch.zeros(0, 3), torch.zeros(0, 3)).lesion_patch()


def test_the_sample_data_fits() -> None:
    files = list(resources.path("SampleData").iterdir())
    assert sum(file.stat().st_size for file in files) <= 15_000_000
    notice = resources.path("SampleData/README.md").read_text("utf-8")
    assert "Redistribution and use in source and binary forms" in notice
