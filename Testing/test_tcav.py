"""TCAV against closed forms, captum, SciPy and concepts that were planted."""

from __future__ import annotations

import csv
import hashlib
from math import erf, sqrt

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from captum.concept import TCAV as CaptumTCAV
from captum.concept import Classifier, Concept
from concept_examples import GRID, WEIGHTS, by_name, drawn, examples, model, pooled
from conftest import make_model, oblique_affine
from monai.transforms import Compose, Orientation, Spacing
from scipy.stats import false_discovery_control, kstest
from torch import Tensor, nn
from torch.utils.data import DataLoader

import MedXAILib as mx
from MedXAILib.engines.concept_vectors import Scan
from MedXAILib.textual.concept_sets import sha256
from MedXAILib.textual.significance import FOLDS, benjamini_hochberg, exceeded, folds, shuffled
from MedXAILib.textual.tcav import _compact, concept_vector, held_out_accuracy, score
from MedXAILib.window import Window

SCAN = mx.Volume(torch.randn(4, *GRID, generator=torch.Generator().manual_seed(9)), np.eye(4))


def tcav(network: mx.Model, given: object, **parameters: object) -> dict[str, mx.Concept]:
    return by_name(
        mx.tell(network, SCAN, "tcav", "yes", examples=given, **{"draws": 30, "vector": "pattern", **parameters})
    )


NOTHING = torch.zeros(4)


@pytest.mark.parametrize(
    ("network", "pool", "weights"),
    [
        ("mean", "mean", WEIGHTS[1]),
        ("max", "max", WEIGHTS[1]),
        ("mean", "both", torch.cat([WEIGHTS[1], NOTHING])),
        ("max", "both", torch.cat([NOTHING, WEIGHTS[1]])),
        ("both", "both", torch.cat([WEIGHTS[1], WEIGHTS[1].flip(0)])),
    ],
)
def test_sensitivity_of_a_linear_head_is_its_weights_times_the_vector(network: str, pool: str, weights: Tensor) -> None:
    x, there = drawn(80, 1, bright=0)
    held, is_there = pooled(x, pool), torch.from_numpy(there["bright"]) == 1
    difference = held[is_there].mean(0) - held[~is_there].mean(0)
    found = tcav(model(network), examples(x, there), pool=pool, score="magnitude")["bright"]
    assert found.score == pytest.approx(float(weights @ difference), rel=1e-4)


def test_maps_sum_to_the_projected_activation_and_to_the_sensitivity() -> None:
    x, there = drawn(80, 1, bright=0)
    is_there = torch.from_numpy(there["bright"]) == 1
    for pool in ("mean", "max", "both"):
        held = pooled(x, pool)
        difference = held[is_there].mean(0) - held[~is_there].mean(0)
        scale = torch.cat([part.var(0, correction=0).mean().sqrt().expand(part.shape[1]) for part in held.split(4, 1)])
        unit = difference / scale / (difference / scale).norm()
        told = {
            kind: mx.tell(
                model(pool), SCAN, "tcav", "yes", examples=examples(x, there), pool=pool, vector="pattern", maps=kind
            )
            for kind in ("activation", "gradient")
        }
        total = float((pooled(SCAN.data[None], pool)[0] / scale) @ unit)
        assert float(told["activation"].maps.sum()) == pytest.approx(total, rel=1e-4)
        assert float(told["gradient"].maps.sum()) == pytest.approx(
            told["gradient"].concepts[0].numbers["magnitude"], rel=1e-4
        )
        if pool == "mean":
            expected = torch.einsum("cdhw,c->dhw", SCAN.data, unit / scale) / SCAN.data[0].numel()
            torch.testing.assert_close(told["activation"].maps[0], expected)
    assert mx.tell(model(), SCAN, "tcav", "yes", examples=examples(x, there), maps="none").maps.shape[0] == 0


class Given(Classifier):
    """A CAV that is known."""

    vector: Tensor

    def train_and_eval(self, dataloader: DataLoader, **kwargs: object) -> dict[str, Tensor]:
        return {"accs": torch.tensor(1.0)}

    def __init__(self) -> None:
        pass

    def weights(self) -> Tensor:
        return torch.stack([Given.vector, -Given.vector])

    def classes(self) -> list[int]:
        return [0, 1]


def test_equals_captum_given_the_same_vector(tmp_path) -> None:
    network = make_model("resnet18")
    x = torch.randn(24, 1, 24, 24, 16, generator=torch.Generator().manual_seed(1))
    is_there = torch.arange(24) % 2 == 0
    x[is_there, :, 6:14, 6:14, 4:10] += 1.5
    kept: list[Tensor] = []
    handle = network.network.eval().layer2.register_forward_hook(lambda _m, _i, y: kept.append(y.detach()))
    network.network(x)
    handle.remove()
    means = kept[0].mean((2, 3, 4))
    difference = means[is_there].mean(0) - means[~is_there].mean(0)
    # Captum's vectors are those of the whole layer: the channels move alike in every place.
    Given.vector = difference[:, None].expand(-1, kept[0][0, 0].numel()).flatten()
    sides = [
        Concept(i, name, DataLoader(x[is_there == yes], batch_size=12))
        for i, (name, yes) in enumerate((("blob", True), ("none", False)))
    ]
    peer = CaptumTCAV(network.network, ["layer2"], classifier=Given(), save_path=str(tmp_path))
    expected = peer.interpret(x, [sides], target=2)["0-1"]["layer2"]
    given = mx.Examples.of([mx.Volume(one, np.eye(4)) for one in x], {"blob": is_there.numpy()})
    asked = {"layers": "layer2", "pool": "mean", "vector": "pattern", "explained": "all", "draws": 30}
    found = mx.tell(network, mx.Volume(x[0], np.eye(4)), "tcav", "malignant", examples=given, **asked).concepts[0]
    assert found.numbers["magnitude"] == pytest.approx(float(expected["magnitude"][0]), rel=1e-4)
    assert found.numbers["tcav"] == pytest.approx(float(expected["sign_count"][0]))


@pytest.mark.parametrize("vector", ["logistic", "pattern"])
def test_planted_concept_is_found_by_every_seed_and_one_without_weight_is_not(vector: str) -> None:
    chance = []
    for seed in range(5):
        x, there = drawn(60, seed, bright=0, idle=1)
        found = tcav(model(), examples(x, there), vector=vector, pool="mean")
        assert found["bright"].numbers["q"] < 0.01 and found["bright"].score > 0.9
        assert found["idle"].numbers["accuracy"] > 0.9
        chance.append(found["idle"].numbers["p"])
    assert np.median(chance) > 0.1


def test_concept_that_speaks_against_is_negative_and_alike_is_the_cosine() -> None:
    x, there = drawn(200, 3, bright=0, dark=2)
    there["not bright"] = 1 - there["bright"]
    told = mx.tell(model(), SCAN, "tcav", "yes", examples=examples(x, there), vector="pattern")
    found = by_name(told)
    assert found["dark"].score < -0.9 and found["not bright"].score == pytest.approx(-found["bright"].score)
    held = pooled(x, "both").double().numpy()
    z = held / np.repeat([np.sqrt(part.var(0).mean()) for part in np.split(held, 2, 1)], 4)
    ways = [z[there[n] == 1].mean(0) - z[there[n] == 0].mean(0) for n in there]
    expected = np.corrcoef(np.concatenate([ways, -np.array(ways)], 1))[:3, :3]
    np.testing.assert_allclose(told.alike, expected, atol=1e-4)
    assert (
        told.text == "For yes: bright. Against yes: not bright, dark." or "Against yes: dark, not bright" in told.text
    )


def test_gate_refuses_random_labels_before_any_score() -> None:
    passed = 0
    for seed in range(12):
        x, _ = drawn(40, seed)
        labels = np.random.default_rng(seed).permutation(np.arange(40) % 2)
        found = tcav(model(), examples(x, {"random": labels}), vector="pattern")["random"]
        passed += found.score is not None
        if found.score is None:
            assert "no better than by chance" in found.refused and not {"p", "q", "tcav"} & set(found.numbers)
            assert found.numbers["accuracy_p"] > 0.05 and found.map is None
    assert passed <= 2


def test_few_examples_are_refused() -> None:
    x, there = drawn(20, 0, bright=0)
    there["bright"][:11] = np.nan
    refused = tcav(model(), examples(x, there))["bright"].refused
    assert "examples with it" in refused and "give 50 of each" in refused


def test_scores_vanish_with_the_weights() -> None:
    x, there = drawn(60, 0, bright=0)
    network = model()
    with torch.no_grad():
        network.network.head.weight.zero_()
    found = tcav(network, examples(x, there))["bright"]
    assert (found.score, found.numbers["magnitude"], found.numbers["q"]) == (0, 0, 1)


def test_random_concepts_get_every_score_and_p_equally_often() -> None:
    random = np.random.default_rng(5)
    x, gradient = random.normal(size=(60, 6)), random.normal(size=6)
    found, gate = [], []
    held = folds(range(60), random)
    for _ in range(150):
        sets = [random.permutation(np.arange(60) % 2 == 1) for _ in range(40)]
        ways = np.stack([x[y].mean(0) - x[~y].mean(0) for y in sets])
        found.append(score((ways[0] @ gradient)[None], (ways[1:] @ gradient)[None]))
        told = [held_out_accuracy(x, y, held, "pattern") for y in sets]
        gate.append(exceeded(told[0], told[1:]))
    for values in ([one.p for one in found], [one.numbers["alpha_tcav"] for one in found]):
        assert kstest(values, "uniform").pvalue > 0.01
    # As often as ties allow, and never more often than it says.
    assert 0.01 <= np.mean(np.array(gate) <= 0.05) <= 0.09 and 0.4 < np.median(gate) < 0.65


@pytest.mark.parametrize("vector", ["logistic", "pattern"])
def test_accuracy_is_of_what_was_held_out(vector: str) -> None:
    # With as many features as examples any labels can be told apart, but for those that were not seen.
    random = np.random.default_rng(2)
    x, y = random.normal(size=(60, 60)), np.arange(60) % 2 == 1
    told = [held_out_accuracy(x, random.permutation(y), folds(range(60), random), vector) for _ in range(12)]
    assert np.mean(told) == pytest.approx(0.5, abs=0.06)
    x[y] += 1
    assert held_out_accuracy(x, y, folds(range(60), random), vector) > 0.95


def test_p_of_a_permutation_test_counts_what_was_observed() -> None:
    assert exceeded(1.0, [0.0, 0.2, 0.9]) == 0.25 and exceeded(0.2, [0.0, 0.2, 0.9]) == 0.75


def test_scores_of_given_changes() -> None:
    changes, chance = np.array([3.0, -1.0]), np.array([[-1.0, 1.0] * 20, [-2.0, 2.0] * 20])
    spread = sqrt(40 / 39)
    share = sum((1 + erf(at / spread / sqrt(2))) / 2 for at in (3, -0.5)) / 2
    for kind, expected in (("alpha", 2 * share - 1), ("sign", 0.0), ("magnitude", 1.0)):
        made = score(changes, chance, kind)
        assert made.score == pytest.approx(expected, abs=1e-6)
    assert made.interval == pytest.approx(1.96 * 1.5 * spread)
    assert score(np.array([0.0]), chance[:1], "sign").interval == 1.0


def test_false_discovery_rate_of_a_worked_example() -> None:
    # Benjamini and Hochberg 1995, section 4.1: of 15 tests the first four are rejected at 5 %.
    p = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459]
    p += [0.3240, 0.4262, 0.5719, 0.6528, 0.7590, 1.000]
    order = np.random.default_rng(0).permutation(15)
    q = np.empty(15)
    q[order] = benjamini_hochberg(np.array(p)[order])
    assert (q <= 0.05).tolist() == [True] * 4 + [False] * 11
    np.testing.assert_allclose(q, false_discovery_control(p))
    assert benjamini_hochberg([]).size == 0


def test_q_allows_for_concepts_layers_and_classes() -> None:
    x, there = drawn(60, 0, bright=0, idle=1)
    network, asked = model(), {"examples": examples(x, there), "vector": "pattern"}
    alone = by_name(mx.tell(network, SCAN, "tcav", "yes", classes=False, **asked))
    both = by_name(mx.tell(network, SCAN, "tcav", "yes", **asked))
    assert alone["bright"].numbers["q"] == pytest.approx(2 * alone["bright"].numbers["p"])
    # The other score has no weight at all, so that it can only be found by chance: its p is 1.
    assert both["bright"].numbers["q"] == pytest.approx(4 * both["bright"].numbers["p"])


def test_folds_and_shuffling_keep_patients_together() -> None:
    random = np.random.default_rng(0)
    patients = np.repeat(np.arange(12), 3)
    for out in folds(patients, random):
        assert not set(patients[out]) & set(patients[~out])
    assert sum(folds(patients, random)).tolist() == [1] * 36
    assert len(folds(["one"] * 20, random)) == FOLDS and all(f.sum() == 4 for f in folds(["one"] * 20, random))
    known = (patients % 2 == 0).astype(float)
    dealt = shuffled(known, patients, random)
    assert all(len(set(dealt[patients == k])) == 1 for k in range(12)) and dealt.sum() == known.sum()
    assert not np.array_equal(dealt, known)


def test_more_features_than_examples_lose_nothing() -> None:
    random = np.random.default_rng(0)
    x, y = random.normal(size=(30, 80)), np.arange(30) % 2 == 1
    x[y] += 0.5
    few, back = _compact(x)
    assert few.shape == (30, 30)
    np.testing.assert_allclose(concept_vector(few, y, "logistic") @ back, concept_vector(x, y, "logistic"), atol=2e-3)


class Coarse(nn.Module):
    """A layer of one unit for 4 x 4 x 4 voxels: how bright, and how bright squared; the score is the largest of it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.AvgPool3d(4)
        self.features = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        mean = self.stem(x)
        top = self.features(torch.cat([mean, mean**2], 1)).amax((2, 3, 4))
        return torch.stack([-top[:, 0], top[:, 0]], 1)


def test_map_is_where_the_concept_is_on_an_oblique_grid() -> None:
    network = mx.Model(
        Coarse(),
        class_names=("no", "yes"),
        preprocessing=Compose([Orientation("RAS", labels=None), Spacing((2.0, 2.0, 2.0))]),
        channels=1,
        layers=("features",),
    )
    affine, shape = oblique_affine((3.0, 1.1, 0.9)), (20, 44, 60)
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    points = index @ affine[:3, :3].T + affine[:3, 3]
    random, volumes, there = np.random.default_rng(0), [], np.arange(24) % 2
    for yes in there:
        centre = affine[:3, :3] @ (np.array(shape) * random.uniform(0.3, 0.7, 3)) + affine[:3, 3]
        blob = 3 * yes * np.exp(-0.5 * ((points - centre) ** 2).sum(-1) / 8**2)
        volumes.append(mx.Volume(torch.from_numpy(blob + 0.1 * random.normal(size=shape)).float()[None], affine))
    scan = volumes[int(np.flatnonzero(there)[0])]
    where = scan.data[0].flatten().argmax()
    truth = points.reshape(-1, 3)[int(where)]
    told = mx.tell(network, scan, "tcav", "yes", examples=mx.Examples.of(volumes, {"blob": there}), draws=30)
    assert told.maps.shape == (1, *shape) and np.allclose(told.affine, affine)
    peak = points.reshape(-1, 3)[int(told.maps[0].flatten().argmax())]
    # A unit looks at 8 mm along each axis.
    assert np.linalg.norm(peak - truth) < 7 and told.concepts[0].score > 0.9


def write_table(folder, x: Tensor, there: dict[str, np.ndarray], labels=None):
    folder.mkdir(exist_ok=True)
    rows = []
    for i, one in enumerate(x):
        name = f"scan {i}.nrrd"
        image = sitk.GetImageFromArray(np.moveaxis(one.numpy(), 0, -1), isVector=True)
        sitk.WriteImage(image, str(folder / name))
        rows.append(
            {"volume": name, "label": "" if labels is None else labels[i], **{n: v[i] for n, v in there.items()}}
        )
    table = folder / "table.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return table


def test_table_is_what_its_scans_are_and_recomputes_only_as_it_was(tmp_path) -> None:
    x, there = drawn(60, 0, bright=0)
    there["size"] = 10 + 5 * there["bright"] + np.random.default_rng(0).uniform(0, 4, 60)
    labels = ["yes" if v else "0" for v in there["bright"]]
    table = write_table(tmp_path / "ü b", x, there, labels)
    asked = {"examples": table, "concepts": ("bright", "size > 12", "size"), "explained": "class"}
    asked |= {"draws": 30, "vector": "pattern"}
    network = model()
    told = mx.tell(network, SCAN, "tcav", "yes", **asked)
    found = by_name(told)
    memory = tcav(network, examples(x, {"bright": there["bright"]}, labels), explained="class")["bright"]
    for key in ("accuracy", "accuracy_p", "magnitude"):
        assert found["bright"].numbers[key] == pytest.approx(memory.numbers[key], rel=1e-5)
    assert found["size > 12"].numbers["with"] == (there["size"] > 12).sum() > 30
    assert found[f"size > {np.median(there['size']):.3g}"].numbers["with"] == 30
    made = told.provenance
    assert made.parameters["examples"] == str(table) and len(made.parameters["sha256"]) == 64
    again = mx.recompute(told, network, SCAN)
    assert [c.numbers for c in again.concepts] == [c.numbers for c in told.concepts]
    loaded = mx.load_explanation(told.save(tmp_path / "told"))
    np.testing.assert_allclose(loaded.alike, told.alike)
    assert loaded.concepts == told.concepts and torch.equal(loaded.maps, told.maps)
    table.write_text(table.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    with pytest.raises(mx.MedXAIError, match="is not what it was"):
        mx.recompute(told, network, SCAN)


def test_cases_of_the_one_name_of_one_score_are_those_with_that_name() -> None:
    x, there = drawn(60, 0, bright=0)
    labels = tuple("yes" if v else "not yes" for v in there["bright"])
    slope = WEIGHTS[1] - WEIGHTS[0]

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.features(x).mean((2, 3, 4)) @ slope[:, None]

    network = mx.Model(One(), class_names=("yes",), channels=4, layers=("features",))
    asked = {"explained": "class", "pool": "mean", "vector": "pattern", "score": "magnitude"}
    made = tcav(network, examples(x, there, labels), **asked)["bright"]
    held = pooled(x, "mean")
    yes = torch.from_numpy(there["bright"]) == 1
    assert made.score == pytest.approx(float(slope @ (held[yes].mean(0) - held[~yes].mean(0))), rel=1e-4)


def test_cases_of_a_class_are_those_with_its_label() -> None:
    x, there = drawn(60, 0, bright=0)
    labels = tuple("yes" if v else "no" for v in there["bright"])
    network = mx.Model(Squared(), class_names=("no", "yes"), channels=4, layers=("features",))
    held = pooled(x, "mean")
    yes = torch.from_numpy(there["bright"]) == 1
    difference = held[yes].mean(0) - held[~yes].mean(0)
    asked = {"pool": "mean", "vector": "pattern", "score": "magnitude"}
    for explained, cases in (("class", held[yes]), ("all", held), ("scan", pooled(SCAN.data[None], "mean"))):
        made = tcav(network, examples(x, there, labels), explained=explained, **asked)["bright"]
        assert made.score == pytest.approx(float((2 * cases @ difference).mean()), rel=1e-4)
    with pytest.raises(mx.MedXAIError, match="No example is labelled 'yes'"):
        tcav(network, examples(x, there), explained="class")
    with pytest.raises(mx.MedXAIError, match="Example 0, column 'label': There is no class 'maybe'"):
        tcav(network, examples(x, there, ("maybe",) * 60), explained="class")


class Squared(nn.Module):
    """The score is the square of the pooled channels, so that its gradient is another for each scan."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        square = pooled(self.features(x), "mean").square().sum(1)
        return torch.stack([-square, square], 1)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("gone.nrrd,1,yes,1 2 3", r"Row 3 of .*table.csv', column 'volume': there is no volume 'gone.nrrd'"),
        ("scan 0.nrrd,many,yes,1 2 3", r"Row 3 of .*, column 'bright': 'many' is not a number"),
        ("scan 0.nrrd,1,yes,1 2", r"Row 3 of .*, column 'region': '1 2' is not three numbers in RAS mm"),
        ("scan 0.nrrd,1,yes,900 2 3", r"Row 3 of .*table.csv': .*lies outside the scan"),
        ("table.csv,1,yes,", r"Row 3 of .*table.csv': 'table.csv' cannot be read as an image"),
    ],
)
def test_bad_table_names_row_and_column(tmp_path, row: str, said: str) -> None:
    x, there = drawn(2, 0, bright=0)
    table = write_table(tmp_path, x, there)
    table.write_text(f"volume,bright,label,region\nscan 1.nrrd,0,no,\n{row}\n", encoding="utf-8")
    network = model()
    network.patch_size = GRID
    with pytest.raises(mx.MedXAIError, match=said):
        tcav(network, table)


def test_other_columns_are_no_trouble_when_concepts_are_named(tmp_path) -> None:
    x, there = drawn(24, 0, bright=0)
    table = write_table(tmp_path, x, {**there, "comment": np.array(["seen by A"] * 24)})
    with pytest.raises(mx.MedXAIError, match=r"column 'comment': 'seen by A' is not a number.*concepts="):
        tcav(model(), table)
    assert tcav(model(), table, concepts="bright")["bright"].score is not None
    with pytest.raises(mx.MedXAIError, match=r"There is no column in .* 'brigth': did you mean bright"):
        tcav(model(), table, concepts="brigth")


def test_sha_of_a_folder_is_the_same_on_every_system(tmp_path) -> None:
    names = ["B/x", "a-b/x", "a/x", "c"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    expected = "".join(f"{name} {hashlib.sha256(name.encode()).hexdigest()}" for name in names)
    assert sha256(tmp_path) == hashlib.sha256(expected.encode()).hexdigest()


def test_folders_of_scans(tmp_path) -> None:
    x, there = drawn(40, 0, bright=0)
    for i, (one, yes) in enumerate(zip(x, there["bright"], strict=True)):
        folder = tmp_path / ("bright" if yes else "random")
        folder.mkdir(exist_ok=True)
        image = sitk.GetImageFromArray(np.moveaxis(one.numpy(), 0, -1), isVector=True)
        sitk.WriteImage(image, str(folder / f"{i}.nrrd"))
        (folder / "notes.txt").write_text("no scan", encoding="utf-8")
    found = tcav(model(), tmp_path)
    assert list(found) == ["bright"] and found["bright"].numbers["with"] == found["bright"].numbers["without"] == 20
    assert found["bright"].score > 0.9
    (tmp_path / "empty").mkdir()
    with pytest.raises(mx.MedXAIError, match="'empty' holds no scan"):
        tcav(model(), tmp_path)


def test_segments_of_the_scan_against_elsewhere(tmp_path) -> None:
    affine, shape = oblique_affine((3.0, 1.5, 1.5)), (16, 40, 40)
    generator = torch.Generator().manual_seed(0)
    scan = mx.Volume(torch.randn(4, *shape, generator=generator), affine)
    labels = torch.zeros(1, *shape)
    labels[:, 3:13, 4:18, 4:18] = 2
    scan.data[0][labels[0] == 2] += 2
    network = model()
    network.patch_size = (3, 3, 3)
    image = mx.Volume(labels, affine).to_sitk()
    image = sitk.Cast(image, sitk.sitkUInt8)
    image.SetMetaData("Segment0_Name", "bright part")
    image.SetMetaData("Segment0_LabelValue", "2")
    sitk.WriteImage(image, str(tmp_path / "Segmentation.seg.nrrd"))
    at = tuple(scan.to_point((8, 10, 10)))
    for given, name in ((tmp_path / "Segmentation.seg.nrrd", "bright part"), (mx.Volume(labels, affine), "segment 2")):
        told = mx.tell(network, scan, "tcav", "yes", region=at, examples=given, patches=30, draws=30)
        (found,) = told.concepts
        assert found.name == name and found.numbers["with"] == found.numbers["without"] == 30
        assert found.score > 0.9 and found.numbers["accuracy"] > 0.9
        assert any("places of one scan" in note for note in told.provenance.notes)
    labels[:, 0, 0, 0] = torch.nan
    again = mx.tell(network, scan, "tcav", "yes", region=at, examples=mx.Volume(labels, affine), patches=30, draws=30)
    assert [found.name for found in again.concepts] == ["segment 2"]
    with pytest.raises(mx.MedXAIError, match="has no segment"):
        mx.tell(network, scan, "tcav", "yes", region=at, examples=mx.Volume(0 * labels, affine))


def test_what_was_asked_before_is_not_computed_again_unless_the_network_changed() -> None:
    x, there = drawn(40, 0, bright=0)
    network, given = model(), examples(x, there)
    costs = []
    for _ in range(2):
        costs.append(
            mx.tell(network, SCAN, "tcav", "yes", examples=given, draws=30, vector="pattern").provenance.forwards
        )
    with torch.no_grad():
        network.network.head.weight.mul_(2)
    costs.append(mx.tell(network, SCAN, "tcav", "yes", examples=given, draws=30, vector="pattern").provenance.forwards)
    assert costs[0] == costs[2] == costs[1] + 40


def test_layers_agree_on_what_is_in_the_examples() -> None:
    x, there = drawn(40, 0, bright=0)
    network = mx.Model(nn.Sequential(nn.Identity(), nn.Identity(), *_head()), class_names=("no", "yes"), channels=4)
    told = mx.tell(network, SCAN, "tcav", "yes", examples=examples(x, there), layers="0,1,4", draws=30)
    first, second, scores = told.concepts
    assert first.numbers["consistency"] == pytest.approx(second.numbers["consistency"]) and first.layer == "0"
    assert first.numbers["consistency"] > 0.8
    assert (first.map, second.map, scores.map) == (0, 1, None)  # the scores have no place in the scan
    assert told.alike[0, 1] == 0 and told.alike[0, 0] == 1


def _head() -> list[nn.Module]:
    linear = nn.Linear(4, 2)
    with torch.no_grad():
        linear.weight.copy_(WEIGHTS)
    return [nn.AdaptiveAvgPool3d(1), nn.Flatten(), linear]


class Overflowing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 8, torch.nan, x)


@pytest.mark.parametrize("method", ["tcav", "rcv"])
def test_network_that_overflows_on_an_example_says_so(method: str) -> None:
    x, there = drawn(40, 0, bright=0)
    x[7, 0, 0, 0, 0] = 9
    network = model()
    network.network.features = Overflowing()
    with pytest.raises(mx.MedXAIError, match="not finite for an example"):
        mx.tell(network, SCAN, method, "yes", examples=examples(x, there))
    with pytest.raises(mx.MedXAIError, match="is not finite: the network overflows on this input"):
        mx.tell(network, mx.Volume(x[7], np.eye(4)), method, "yes", examples=examples(x, there))


class Averaged(nn.Module):
    """Labels by the scan itself, seen through a layer of the same."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        seen: Tensor = self.features(x)
        return torch.cat([-seen[:, :1], seen[:, :1]], 1)


def test_examples_that_are_more_than_a_window_say_where() -> None:
    """Of several windows a layer has several vectors, and the last of them is not that of the scan."""
    x, there = drawn(40, 0, bright=0)
    given = {"task": "segmentation", "class_names": ("none", "some"), "channels": 4, "layers": ("features",)}
    network = mx.Model(Averaged(), window=Window((3, 4, 3)), **given)
    affine = np.eye(4)
    at = {"region": (1, 1, 1), "target": mx.SegmentationTarget("some", within="everywhere"), "vector": "pattern"}
    with pytest.raises(mx.MedXAIError, match=r"Example \d+: .* window by window: say where"):
        mx.tell(network, SCAN, "tcav", examples=examples(x, there), **at)
    cut = [Scan(mx.Volume(one, affine), (1, 1, 1)) for one in x]
    found = mx.tell(network, SCAN, "tcav", examples=mx.Examples(cut, there), **at).concepts[0]
    assert found.score > 0.9


def test_what_is_not_kept_says_so() -> None:
    network, x = model(), drawn(40, 0, bright=0)
    told = mx.tell(network, SCAN, "tcav", "yes", examples=examples(*x), run=mx.Run(precision="bfloat16"))
    with pytest.raises(mx.MedXAIError, match="were in memory, and are not kept"):
        mx.recompute(told, network, SCAN)
    # Nor is a precision claimed in which nothing was computed.
    exact = mx.tell(network, SCAN, "tcav", "yes", examples=examples(*x))
    assert told.concepts == exact.concepts and "precision" not in told.provenance.model


def test_plain_images_have_scores_and_no_maps() -> None:
    x, there = drawn(40, 0, bright=0)
    x = torch.cat([x.mean(2), x[:, :1, 0]], 1)
    linear = nn.Linear(5, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.cat([WEIGHTS, torch.zeros(2, 1)], 1))
    network = mx.Model(
        nn.Sequential(nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear),
        class_names=("no", "yes"),
        channels=5,
        spatial_dims=2,
    )
    images = [mx.Volume(one, np.eye(3)) for one in x]
    asked = {"examples": mx.Examples.of(images, there), "layers": "0", "vector": "pattern"}
    told = mx.tell(network, images[0], "tcav", "yes", **asked)
    assert told.concepts[0].score > 0.9 and len(told.maps) == 0


def test_model_is_as_before_and_cancel_works() -> None:
    x, there = drawn(40, 0, bright=0)
    network = model()
    network.network.train()
    before = {name: value.clone() for name, value in network.network.state_dict().items()}
    tcav(network, examples(x, there))
    assert network.network.training and not network.network.features._forward_hooks
    assert all(torch.equal(value, network.network.state_dict()[name]) for name, value in before.items())
    with pytest.raises(mx.Cancelled):
        mx.tell(network, SCAN, "tcav", "yes", run=mx.Run(cancel=lambda: True), examples=examples(x, there))
    with pytest.raises(mx.MedXAIError, match="needs examples"):
        mx.tell(network, SCAN, "tcav", "yes")
    with pytest.raises(mx.MedXAIError, match=r"there is no file or folder 'nowhere.csv'"):
        tcav(network, "nowhere.csv")
