"""Regression concept vectors against closed forms, scikit-learn and measures that were planted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from concept_examples import GRID, WEIGHTS, by_name, examples, model, pooled
from conftest import oblique_affine
from scipy.stats import kstest
from sklearn.metrics import r2_score
from test_tcav import SCAN, Squared, write_table

import MedXAILib as mx
from MedXAILib import resources
from MedXAILib.synthetic.lung_nodules import ATTRIBUTES, CLASSES, SPACING_MM, Backgrounds, synthesise
from MedXAILib.textual.concept_method import Found
from MedXAILib.textual.concept_sets import MEASURES, measured
from MedXAILib.textual.rcv import RCV, _relevance, explained


def planted(count: int, seed: int, channel: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """Scans of noise of which one channel is as bright as a measure says, 5 to 25 mm."""
    generator = torch.Generator().manual_seed(seed)
    size = 5 + 20 * torch.rand(count, generator=generator)
    x = torch.randn(count, 4, *GRID, generator=generator)
    x[:, channel] += 0.3 * size.reshape(-1, 1, 1, 1)
    return x, size.numpy()


def rcv(network: mx.Model, given: object, **parameters: object) -> dict[str, mx.Concept]:
    return by_name(mx.tell(network, SCAN, "rcv", "yes", examples=given, **{"draws": 60, "pool": "mean", **parameters}))


def test_measure_that_is_linear_in_the_layer_is_read_exactly() -> None:
    x, _ = planted(80, 0)
    way = torch.tensor([3.0, -1.0, 0.0, 2.0])
    size = (pooled(x, "mean") @ way + 7).numpy()
    network = model()
    found = rcv(network, examples(x, {"size_mm": size}))["size_mm"]
    assert found.numbers["r2"] > 0.9999 and found.numbers["fold_angle"] < 0.5 and found.unit == "mm"
    assert found.value == pytest.approx(float(pooled(SCAN.data[None], "mean")[0] @ way + 7), rel=1e-3)
    # Along a step of the layer's spread.
    spread = float(pooled(x, "mean").var(0, correction=0).mean().sqrt())
    assert found.numbers["sensitivity"] == pytest.approx(float(spread * WEIGHTS[1] @ way / way.norm()), rel=3e-3)
    told = mx.tell(network, SCAN, "rcv", "yes", examples=examples(x, {"size_mm": size}), pool="mean")
    assert float(told.maps.sum()) == pytest.approx(found.value - 7, rel=1e-2)


def test_planted_measure_is_known_and_speaks_for_and_noise_is_not() -> None:
    for seed in range(5):
        x, size = planted(80, seed)
        random = np.random.default_rng(seed)
        given = examples(x, {"size": size, "noise": random.normal(size=80), "other way": 30 - size})
        found = rcv(model(), given)
        assert found["size"].numbers["r2"] > 0.8 and found["size"].score - found["size"].interval > 0
        assert found["other way"].score == pytest.approx(-found["size"].score, rel=0.3)
        noise = found["noise"]
        assert (noise.score is None and "does not know it" in noise.refused) or abs(noise.score) < 0.1


def test_measure_of_a_channel_without_weight_is_known_and_means_nothing() -> None:
    x, size = planted(120, 3, channel=1)
    found = rcv(model(), examples(x, {"size": size}), draws=200)["size"]
    assert found.numbers["r2"] > 0.8 and abs(found.score) < 3


def test_scores_vanish_with_the_weights() -> None:
    x, size = planted(60, 0)
    network = model()
    with torch.no_grad():
        network.network.head.weight.zero_()
    found = rcv(network, examples(x, {"size": size}))["size"]
    assert (found.score, found.interval, found.numbers["sensitivity"]) == (0, 0, 0)


def test_relevance_is_that_of_the_paper_where_the_direction_is_certain() -> None:
    random = np.random.default_rng(0)
    gradients, way = random.normal(1, 2, size=(40, 6)), random.normal(size=6)
    way /= np.linalg.norm(way)
    found = Found({"r2": 0.7, "r2_p": 0.01}, "", way, way, np.tile(way, (50, 1)))
    along = gradients @ way
    made = RCV().scored(found, gradients, random)
    assert made.score == pytest.approx(0.7 * along.mean() / along.std())
    # Its interval, by the standard error of a mean over its standard deviation.
    assert made.interval == pytest.approx(1.96 * 0.7 / np.sqrt(40), rel=0.35)
    assert _relevance(0.7, np.zeros(3), np.zeros((3, 5))) == 0


def test_each_case_has_a_gradient_of_its_own() -> None:
    x, size = planted(60, 1)
    network = mx.Model(Squared(), class_names=("no", "yes"), channels=4, layers=("features",))
    found = rcv(network, examples(x, {"size": size}), explained="all")["size"]
    held = pooled(x, "mean").double().numpy()
    way = np.linalg.lstsq(held - held.mean(0), size - size.mean(), rcond=None)[0]
    along = 2 * held @ way / np.linalg.norm(way)
    assert found.score == pytest.approx(found.numbers["r2"] * along.mean() / along.std(), rel=0.1)


def test_explained_variance_equals_scikit_learn() -> None:
    random = np.random.default_rng(0)
    y, told = random.normal(size=(2, 30, 3))
    np.testing.assert_allclose(explained(y, told), r2_score(y, told, multioutput="raw_values"))


def test_explained_variance_is_of_what_was_held_out() -> None:
    random = np.random.default_rng(3)
    x, one_each = random.normal(size=(60, 60)), [str(i) for i in range(60)]
    for _ in range(5):
        found = RCV(draws=30).found(x, random.normal(size=60), one_each, x[0], random)
        assert found.numbers["r2"] < 0.15


def test_p_of_random_measures_is_even() -> None:
    x, _ = planted(40, 0)
    held, random = pooled(x, "mean").numpy(), np.random.default_rng(1)
    p = [
        RCV(draws=30).found(held, random.normal(size=40), [str(i) for i in range(40)], held[0], random).numbers["r2_p"]
        for _ in range(80)
    ]
    # In steps of 1/31.
    assert kstest(np.array(p) - random.uniform(0, 1 / 31, 80), "uniform").pvalue > 0.01


def test_few_or_equal_measures_are_refused() -> None:
    x, size = planted(40, 0)
    size[15:] = np.nan
    found = rcv(model(), examples(x, {"size": size, "same": np.full(40, 3.0)}))
    assert "15 examples are measured: give 50" in found["size"].refused
    assert "all examples have as much of it" in found["same"].refused


def test_measure_that_is_rare_has_an_interval() -> None:
    x, _ = planted(60, 0)
    rare = np.zeros(60)
    rare[:4] = 10
    x[:4, 0] += 20
    found = rcv(model(), examples(x, {"rare": rare}), draws=100)["rare"]
    # Of 100 draws of 60 among which 4 have any, some have none at all: (56 / 60) ** 60 is 1.6 %.
    assert found.score is not None and 0 < found.numbers["r2_interval"] < 1


def test_measures_of_a_ball_and_a_box_on_an_oblique_grid() -> None:
    affine, shape = oblique_affine((1.5, 0.8, 1.1)), (36, 60, 50)
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    points = index @ affine[:3, :3].T + affine[:3, 3]
    centre = affine[:3, :3] @ np.array([18, 30, 25]) + affine[:3, 3]
    distance = np.linalg.norm(points - centre, axis=-1)
    # A ball of 10 mm whose rim goes from 100 to 0 over 4 mm.
    scan = mx.Volume(torch.from_numpy(100 * np.clip((12 - distance) / 4, 0, 1)).float()[None], affine)
    ball = mx.Volume(torch.from_numpy(distance < 10).float()[None], affine)
    found = measured(scan, ball)
    assert list(found) == list(MEASURES)
    assert found["volume_ml"] == pytest.approx(4 / 3 * np.pi, rel=0.02)
    assert found["diameter_mm"] == pytest.approx(20, abs=1.5)
    assert found["elongation"] == pytest.approx(1, abs=0.02) and found["flatness"] == pytest.approx(1, abs=0.02)
    assert found["roundness"] == pytest.approx(1, abs=0.05)
    assert found["edge_sharpness"] == pytest.approx(25, rel=0.15)
    inside = scan.data[0].numpy()[distance < 10]
    assert found["mean_intensity"] == pytest.approx(inside.mean(), rel=1e-5)
    assert found["sd_intensity"] == pytest.approx(inside.std(), rel=1e-5)
    # A box of 12 x 8 x 4 voxels along the axes of a grid of its own.
    box = torch.zeros(1, *shape)
    box[0, 10:22, 20:28, 20:24] = 1
    sides = np.array([12 * 1.5, 8 * 0.8, 4 * 1.1])
    of_box = measured(scan, mx.Volume(box, affine))
    assert of_box["volume_ml"] == pytest.approx(sides.prod() / 1000)
    steps = sides - (1.5, 0.8, 1.1)
    assert of_box["diameter_mm"] == pytest.approx(np.linalg.norm(steps), rel=1e-3)
    # Moments of a box are in proportion to the squares of its sides; those of voxel centres, to n² - 1.
    spread = np.sort(np.sqrt(np.array([12, 8, 4]) ** 2 - 1) * (1.5, 0.8, 1.1))
    assert of_box["elongation"] == pytest.approx(spread[2] / spread[1], rel=0.02)
    assert of_box["flatness"] == pytest.approx(spread[1] / spread[0], rel=0.02)
    with pytest.raises(mx.MedXAIError, match="no voxel in the scan"):
        measured(scan, mx.Volume(0 * box, affine))


def test_segmentations_of_a_table_are_measured(tmp_path) -> None:
    x, _ = planted(30, 0)
    masks = torch.zeros(30, 1, *GRID)
    for i, mask in enumerate(masks):
        mask[0].flatten()[: 5 + i] = 1
        x[i, 0] += 0.1 * i
    for i, mask in enumerate(masks):
        sitk.WriteImage(mx.Volume(mask, np.diag([-1.0, -1, 1, 1])).to_sitk(), str(tmp_path / f"mask {i}.nrrd"))
    named = {"segmentation": np.array([f"mask {i}.nrrd" for i in range(30)]), "noise": np.arange(30) % 7}
    table = write_table(tmp_path, x, named)
    found = rcv(model(), table, concepts="volume_ml,noise")
    assert found["volume_ml"].numbers["r2"] > 0 and found["volume_ml"].unit == "mL"
    assert set(rcv(model(), table)) == {"noise", *MEASURES}
    with pytest.raises(mx.MedXAIError, match="There is no column"):
        rcv(model(), table, concepts="volume")
    empty = mx.Volume(0 * masks[3], np.diag([-1.0, -1, 1, 1])).to_sitk()
    sitk.WriteImage(empty, str(tmp_path / "mask 3.nrrd"))
    with pytest.raises(mx.MedXAIError, match=r"Row 5 of .*no voxel in the scan"):
        rcv(model(), table, concepts="volume_ml")


@pytest.mark.slow
def test_shipped_network_knows_what_its_rule_rests_on() -> None:
    made = synthesise(Backgrounds.test(), 300, 811)
    there = (made.labels > 0).nonzero()[:, 0]
    attributes = dict(zip(ATTRIBUTES, made.attributes[there].T.double().numpy(), strict=True))
    attributes["spiculation"] = (attributes["spiculation"] > 0).astype(float)
    affine = np.diag([SPACING_MM] * 3 + [1.0])
    given = mx.Examples.of(
        [mx.Volume(made.images[i], affine) for i in there], attributes, [CLASSES[made.labels[i]] for i in there]
    )
    network = replace(mx.load_model(resources.path("Models/lung_nodule")), preprocessing=None)
    asked = {"examples": given, "explained": "class", "maps": "none", "target": "malignant", "draws": 30}
    concepts = ("spiculation", "calcification", "diameter_mm > 15")
    tested = by_name(mx.tell(network, given.scans[0].volume, "tcav", concepts=concepts, **asked))
    for name, sign in zip(concepts, (1, -1, 1), strict=True):
        assert tested[name].numbers["q"] < 0.01 and sign * tested[name].score > 0.9
    known = by_name(mx.tell(network, given.scans[0].volume, "rcv", concepts=("diameter_mm", "margin_mm"), **asked))
    assert known["diameter_mm"].numbers["r2"] > 0.8 and known["diameter_mm"].score > 1
    assert abs(known["margin_mm"].score or 0) < 0.1
