"""A network learns from a person's own table as from ours, and a table that it cannot learn from is refused with a line
that says where and why."""

from __future__ import annotations

import csv
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import oblique_affine
from model_cards import metrics_of
from sklearn.metrics import cohen_kappa_score, roc_auc_score
from torch import Tensor, nn
from typer.testing import CliRunner

import MedXAILib as mx
from MedXAILib.cli import app
from MedXAILib.errors import Cancelled, MedXAIError
from MedXAILib.generator import spoken
from MedXAILib.model import Model
from MedXAILib.synthetic.lung_nodules import Backgrounds, synthesise
from MedXAILib.tokens import tokens
from MedXAILib.training import RECIPES, lung_nodule, train
from MedXAILib.training.bundle import Grid
from MedXAILib.training.table import Patches, Table, augmented, fingerprint, read_table
from MedXAILib.trust.wording import rouge_l

GRID = Grid(24, 2.0)
NAMES = ("clear", "kind", "wicked")


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of 20 patches of 10 patients, as cubes of 50 mm; every third diameter is unknown."""
    folder = tmp_path_factory.mktemp("own")
    patches = synthesise(Backgrounds.training(), 20, seed=5)
    with (folder / "scans.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["volume", "patient", "label", "diameter", "segmentation", "report"])
        for i, label in enumerate(patches.labels.tolist()):
            write(folder / f"{i}.nrrd", patches.images[i, 0] * 1400 - 1000)
            write(folder / f"{i}-mask.nrrd", patches.masks[i, 0].float())
            diameter = f"{patches.attributes[i, 0]:.3f}" if label and i % 3 else ""
            writer.writerow([f"{i}.nrrd", f"P{i // 2}", NAMES[label], diameter, f"{i}-mask.nrrd", f"Patch {i},\nseen."])
    return folder / "scans.csv"


def write(path: Path, voxels: Tensor, affine: np.ndarray | None = None) -> None:
    """Voxels (R, A, S) of 1.25 mm, or (D, H, W) of an affine."""
    if affine is None:
        voxels, affine = voxels.permute(2, 1, 0), np.diag([1.25, 1.25, 1.25, 1.0])[:, [2, 1, 0, 3]]
    sitk.WriteImage(mx.Volume(voxels[None], affine).to_sitk(), str(path))


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def weights(bundle: Path) -> dict[str, Tensor]:
    return dict(torch.load(bundle / "models" / "model.pt", weights_only=True))


@pytest.fixture(scope="module")
def trained(own: Path) -> tuple[Path, dict[str, float]]:
    out = own.parent / "trained"
    return out, train("lung-nodule", out, mx.Run(), quick=True, data=read_table(own, GRID))


def test_an_interrupted_training_ends_with_the_same_weights(
    own: Path, trained: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    done: list[int] = []
    run = mx.Run(progress=lambda p: done.append(p.done) if "Training" in p.message else None, cancel=lambda: 7 in done)
    with pytest.raises(Cancelled):
        train("lung-nodule", tmp_path / "out", run, quick=True, data=read_table(own, GRID))
    checkpoint = tmp_path / "out.checkpoint.pt"
    assert torch.load(checkpoint, weights_only=True)["epoch"] == 1
    other = own.with_name("other.csv")
    other.write_text(own.read_text("utf-8").replace("wicked", "kind", 1), encoding="utf-8")
    for table in (read_table(other, GRID), read_table(own, GRID, seed=1), read_table(own, Grid(24, 2.1))):
        with pytest.raises(MedXAIError, match="another training"):
            train("lung-nodule", tmp_path / "out", mx.Run(), quick=True, data=table)
    train("lung-nodule", tmp_path / "out", mx.Run(), quick=True, data=read_table(own, GRID))
    whole = weights(trained[0])
    assert all(torch.equal(value, whole[name]) for name, value in weights(tmp_path / "out").items())
    assert not checkpoint.exists()


def test_the_bundle_says_in_the_persons_words_what_was_measured(
    own: Path, trained: tuple[Path, dict[str, float]]
) -> None:
    bundle, metrics = trained
    model = mx.load_model(bundle)  # Without trust.
    assert model.class_names == NAMES and model.patch_size == (24, 24, 24)
    table = read_table(own, GRID)
    right, wrong = [], []
    for case in table.of("test"):
        scan = mx.load_volume(case.volume)
        middle = scan.to_point([19.5] * 3)
        read: list[Tensor] = []
        with model.network.attribute_head.register_forward_hook(lambda *hooked, read=read: read.append(hooked[2])):
            scores = model.predict(scan, middle).scores
        right.append(max(scores, key=scores.__getitem__) == case.row["label"])
        if case.row["diameter"]:
            wrong.append(abs(float(read[0]) - float(case.row["diameter"])))
    assert len(right) == 4 and wrong
    assert metrics["accuracy"] == pytest.approx(np.mean(right), abs=1e-4)
    assert metrics["error: diameter"] == pytest.approx(np.mean(wrong), abs=1e-3)
    of_class = Counter(case.row["label"] for case in table.of("test"))
    recalled = sum(metrics[f"recall: {name}"] * count for name, count in of_class.items())
    assert recalled == pytest.approx(sum(right), abs=1e-3)
    assert metrics_of(bundle) == metrics


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.own is not None])
def test_whatever_learns_from_a_table_makes_a_bundle(own: Path, tmp_path: Path, name: str) -> None:
    table = read_table(own, GRID)
    metrics = train(name, tmp_path / "mine", mx.Run(), quick=True, data=table)
    model = mx.load_model(tmp_path / "mine")
    patches = table.read(mx.Run())["test"]
    with model.ready(), torch.no_grad():
        scores = model.forward(patches.images)
    found = scores.argmax(1)
    if model.task == "ordinal":
        assert model.class_names == NAMES[1:]
        assert metrics["accuracy"] == pytest.approx(np.mean((scores > 0).sum(1).eq(patches.labels).numpy()), abs=1e-4)
    elif model.task == "classification":
        assert model.class_names == NAMES
        assert metrics["accuracy"] == pytest.approx(float((found == patches.labels).float().mean()), abs=1e-4)
    elif model.task == "embedding":
        nearest = (scores @ scores.T).fill_diagonal_(-2).argmax(1)
        alike = patches.labels[nearest] == patches.labels
        # Who is the only one of a class has nobody to find.
        asked = patches.labels.bincount()[patches.labels] > 1
        assert metrics["precision_1"] == pytest.approx(float(alike[asked].float().mean()), abs=1e-4)
    elif model.task == "captioning":
        with torch.no_grad():
            said = model.network.eval().beam(model.network(patches.images))
        captions = [spoken(model.network, words) for words in said]
        scored = rouge_l(captions, [[tokens(report)] for report in patches.reports])
        assert metrics["rouge_l"] == pytest.approx(scored, abs=1e-4)
    else:
        assert model.task == "segmentation" and model.class_names == ("background", "finding")
        pairs = [(one > 0, mask[0]) for one, mask in zip(found, patches.masks, strict=True) if mask.any()]
        dice = [2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in pairs]
        assert metrics["dice"] == pytest.approx(float(np.mean(dice)), abs=1e-4)
    assert set(model.layers) <= set(dict(model.network.named_modules()))
    card = (tmp_path / "mine" / "docs" / "README.md").read_text("utf-8")
    assert f"medxai train {name}" in card and "chest_ct" not in card


def test_grades_of_a_table_are_learnt_without_masks_and_measured(own: Path, tmp_path: Path) -> None:
    """By scikit-learn's kappa and area under the curve; the order of the grades is the person's."""
    order = ("wicked", "clear", "kind")
    cases = tuple(replace(case, segmentation=None) for case in read_table(own, GRID, order).cases)
    table = replace(read_table(own, GRID, order), cases=cases)
    done: list[int] = []
    run = mx.Run(progress=lambda p: done.append(p.done) if "Training" in p.message else None, cancel=lambda: 7 in done)
    with pytest.raises(Cancelled):
        train("lung-mil-attention", tmp_path / "mine", run, quick=True, data=table)
    metrics = train("lung-mil-attention", tmp_path / "mine", mx.Run(), quick=True, data=table)
    train("lung-mil-attention", tmp_path / "whole", mx.Run(), quick=True, data=table)
    whole = weights(tmp_path / "whole")
    assert all(torch.equal(value, whole[name]) for name, value in weights(tmp_path / "mine").items())
    model = mx.load_model(tmp_path / "mine")  # Without trust.
    assert model.task == "ordinal" and model.class_names == order[1:] and model.patch_size == (24, 24, 24)
    scan = mx.load_volume(own.parent / "0.nrrd")
    chances = model.predict(scan, scan.to_point([19.5] * 3)).scores
    assert 0 < chances["kind"] < chances["clear"] < 1
    recipe = RECIPES["lung-mil-attention"]
    assert recipe.own is not None
    patches = table.read(mx.Run())["test"]
    # Whatever the training made of it, grades that are told rightly and wrongly.
    logits = torch.tensor([[-1.0, -3.0], [2.0, -1.0], [3.0, 0.5], [0.5, -0.5]])
    labels = torch.tensor([0, 0, 2, 1])
    fixed = nn.Module()
    fixed.scores = model.network.scores
    fixed.forward = lambda images: logits[: len(images)]  # type: ignore[method-assign]
    measure = recipe.own(recipe, table).measure
    found = measure(fixed, replace(patches, images=patches.images[:4], labels=labels))
    assert set(found) == set(metrics) - {"seconds"} | {"kappa", "auc: clear", "auc: kind"}
    assert found["accuracy"] == 0.75
    assert found["kappa"] == pytest.approx(cohen_kappa_score([0, 1, 2, 1], labels, weights="quadratic"))
    for k, name in enumerate(order[1:]):
        assert found[f"auc: {name}"] == pytest.approx(roc_auc_score(labels > k, logits[:, k]))
    alike = measure(fixed, replace(patches, images=patches.images[:4], labels=torch.ones(4).long()))
    assert set(alike) == {"log_likelihood", "accuracy"}


def test_grades_that_cannot_be_learnt_are_refused(own: Path, tmp_path: Path) -> None:
    with pytest.raises(MedXAIError, match=r"Every label .* 'a'.* two classes"):
        train(
            "lung-mil-attention",
            tmp_path / "out",
            mx.Run(),
            data=read_table(made(tmp_path, [line.replace(",b", ",a") for line in GOOD], BASIC)),
        )
    with pytest.raises(MedXAIError, match=r"Row 6 .*'label': it is empty"):
        train(
            "lung-mil-attention",
            tmp_path / "out",
            mx.Run(),
            data=read_table(made(tmp_path, [*GOOD, "s4.nrrd,,test"], BASIC)),
        )
    with pytest.raises(MedXAIError, match=r"'lung-mil' cannot learn from a table.*lung-mil-attention"):
        train("lung-mil", tmp_path / "out", mx.Run(), data=read_table(own, GRID))


def test_a_validation_that_tells_nothing_is_refused(own: Path, tmp_path: Path) -> None:
    table = read_table(own, GRID)
    write(tmp_path / "empty.nrrd", torch.zeros(40, 40, 40))
    cases = [c if c.split != "validation" else replace(c, segmentation=tmp_path / "empty.nrrd") for c in table.cases]
    with pytest.raises(MedXAIError, match="says nothing of 'dice'"):
        train(
            "lung-nodule-segmentation", tmp_path / "out", mx.Run(), quick=True, data=replace(table, cases=tuple(cases))
        )
    with pytest.raises(MedXAIError, match="a size that 4 divides, not 26"):
        train("lung-nodule-segmentation", tmp_path / "out", mx.Run(), quick=True, data=read_table(own, Grid(26, 2.0)))


def test_the_card_counts_what_was_learnt_from(own: Path, trained: tuple[Path, dict[str, float]]) -> None:
    card = (trained[0] / "docs" / "README.md").read_text("utf-8")
    for split in ("train", "validation", "test"):
        cases = read_table(own, GRID).of(split)
        of_class = Counter(row["label"] for row in rows(own) if any(c.volume.name == row["volume"] for c in cases))
        counts = [len(cases) // 2, len(cases), len(cases), *(of_class[name] for name in NAMES)]
        assert f"| {split} | {' | '.join(map(str, counts))} |" in card
    assert f"| accuracy | {trained[1]['accuracy']:.3f} |" in card
    assert "Never use it for a patient" in card
    assert "chest_ct" not in card and "pyradiomics" not in card
    # These weights and data are not ours.
    assert not (trained[0] / "LICENSE").exists()
    assert "MedXAI authors" not in (trained[0] / "configs" / "metadata.json").read_text("utf-8")


def test_patches_are_cut_where_the_network_will_look(tmp_path: Path) -> None:
    """A linear field stays one in every grid, and a ball a ball; the scan is oblique and its voxels are no cubes."""
    affine, shape = oblique_affine(), (31, 90, 70)
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    points = index @ affine[:3, :3].T + affine[:3, 3]
    slope = np.array([3.0, -2.0, 5.0])
    write(tmp_path / "scan.nrrd", torch.from_numpy(points @ slope), affine)
    middle = affine[:3, :3] @ [14.2, 41.3, 38.9] + affine[:3, 3]
    # The mask has a grid of its own.
    other = oblique_affine((1.0, 1.0, 1.0))
    other[:3, 3] = middle - other[:3, :3] @ [20, 20, 20]
    inside = np.stack(np.meshgrid(*[np.arange(41)] * 3, indexing="ij"), -1) @ other[:3, :3].T + other[:3, 3]
    write(tmp_path / "ball.nrrd", torch.from_numpy(np.linalg.norm(inside - middle, axis=-1) < 12).float(), other)
    where = " ".join(map(str, middle))
    lines = []
    for split in ("train", "validation", "test"):
        # A patient may be in one split only.
        shutil.copy(tmp_path / "scan.nrrd", tmp_path / f"{split}.nrrd")
        lines += [f"{split}.nrrd,{where},{name},ball.nrrd,{split}" for name in "ab"]
    (tmp_path / "table.csv").write_text("\n".join(["volume,region,label,segmentation,split", *lines]), encoding="utf-8")
    grid = Grid(24, 1.5, (-900.0, 900.0))
    patches = read_table(tmp_path / "table.csv", grid).read(mx.Run())
    model = Model(nn.Identity(), preprocessing=grid.transforms(), patch_size=(24,) * 3, channels=1)
    seen = model.prepare(mx.load_volume(tmp_path / "scan.nrrd"), middle)
    voxels = np.stack(np.meshgrid(*[np.arange(24)] * 3, indexing="ij"), -1) @ seen.affine[:3, :3].T + seen.affine[:3, 3]
    assert np.linalg.norm(voxels[11:13, 11:13, 11:13].mean((0, 1, 2)) - middle) < 1.5 * np.sqrt(3) / 2
    trained = patches["train"].images[0, :, 4:-4, 4:-4, 4:-4]
    for image in (patches["test"].images[0], patches["validation"].images[1], trained):
        assert np.allclose(image[0], (voxels @ slope + 900) / 1800, atol=1e-4)
    distance = np.linalg.norm(voxels - middle, axis=-1)
    mask = patches["test"].masks[0, 0].numpy()
    assert mask[distance < 11].all() and not mask[distance > 13].any()
    assert torch.equal(patches["train"].masks[0, 0, 4:-4, 4:-4, 4:-4], patches["test"].masks[0, 0])


def test_patches_of_the_training_are_moved_and_flipped_with_their_masks_and_labels() -> None:
    place = torch.stack(torch.meshgrid(*[torch.arange(32.0)] * 3, indexing="ij"))
    images = torch.stack([1e6 * k + place[0] * 1e4 + place[1] * 1e2 + place[2] for k in range(5)])[:, None]
    told = torch.arange(5)
    patches = Patches(images, told, told[:, None] * 2.0, images % 3 == 0, [str(k) for k in range(5)])
    corners, flips = set(), set()
    for seed in range(12):
        batch = augmented(patches, 4, seed)
        assert torch.equal(batch.images, augmented(patches, 4, seed).images)
        assert len(batch) == 4 and batch.images.shape == (4, 1, 24, 24, 24)
        assert batch.labels.unique().numel() == 4
        assert torch.equal(batch.masks, batch.images % 3 == 0)
        for one, label, attribute, report in zip(
            batch.images[:, 0], batch.labels, batch.attributes, batch.reports, strict=True
        ):
            assert torch.equal((one / 1e6).floor(), torch.full_like(one, float(label)))
            assert attribute == 2 * label and report == str(int(label))
            along = [one[:, 0, 0] % 1e6 // 1e4, one[0, :, 0] % 1e4 // 1e2, one[0, 0, :] % 1e2]
            for axis, line in enumerate(along):
                step = float(line[1] - line[0])
                assert abs(step) == 1 and bool((line.diff() == step).all())
                flips.add((axis, step))
                corners.add((axis, float(line.min())))
    assert len(flips) == 6
    assert {corner for _, corner in corners} == set(range(9))
    assert len(augmented(patches, 30, 0)) == 5


def test_data_that_differ_in_anything_are_told_apart() -> None:
    one = Patches(torch.rand(2, 1, 24, 24, 24), torch.zeros(2), torch.rand(2, 1), torch.zeros(2, 1).bool(), ["a", "b"])
    others = [replace(one, **{name: getattr(one, name) + 1}) for name in ("images", "labels", "attributes")]
    others += [replace(one, masks=None), replace(one, masks=~one.masks), replace(one, reports=["a", ""])]
    found = {fingerprint({"train": one, "test": other}) for other in (one, *others)}
    assert len(found) == 7 and fingerprint({"train": one, "test": one}) in found


def test_nothing_is_learnt_of_attributes_that_are_unknown() -> None:
    torch.manual_seed(0)
    known = torch.tensor([[1.0, 10.0], [3.0, torch.nan], [torch.nan, 30.0], [5.0, 50.0]])
    network = lung_nodule.build(2, known)
    typical, spread = np.nanmean(known.numpy(), 0), np.nanstd(known.numpy(), 0, ddof=1)
    assert np.allclose(network.attribute_head.offset, typical) and np.allclose(network.attribute_head.scale, spread)
    batch = Patches(torch.rand(4, 1, 24, 24, 24), torch.tensor([0, 1, 1, 0]), known, None, [""] * 4)
    told: list[Tensor] = []
    network.attribute_head.register_forward_hook(lambda *hooked: told.append(hooked[2]) or hooked[2].retain_grad())
    value = lung_nodule.loss(network, batch)
    value.backward()
    wrong = told[0].detach() - known
    expected = torch.where(known.isnan(), 0, 2 * wrong / torch.from_numpy(spread) ** 2 / 6)
    assert torch.allclose(told[0].grad, expected, atol=1e-6)
    assert all(bool(p.grad.isfinite().all()) for p in network.parameters())
    # Without any the loss is that of the class.
    for attributes in (torch.full((4, 2), torch.nan), torch.zeros(4, 0)):
        network = lung_nodule.build(2, torch.rand(5, attributes.shape[1])).eval()
        value = lung_nodule.loss(network, replace(batch, attributes=attributes))
        assert float(value.detach()) == pytest.approx(
            float(nn.functional.cross_entropy(network(batch.images), batch.labels).detach()), abs=1e-6
        )


def test_an_attribute_that_is_always_the_same_has_a_unit_all_the_same() -> None:
    assert lung_nodule.build(2, torch.full((4, 1), 7.0)).attribute_head.scale.tolist() == [1.0]


def made(folder: Path, lines: list[str], head: str = "volume,patient,label") -> Path:
    """A table whose scans are there, but empty."""
    for line in lines:
        (folder / line.split(",")[0]).touch()
    (folder / "table.csv").write_text("\n".join([head, *lines]), encoding="utf-8")
    return folder / "table.csv"


@pytest.mark.parametrize("seed", range(8))
def test_no_patient_is_in_two_splits(seed: int, tmp_path: Path) -> None:
    random = np.random.default_rng(seed)
    count = int(random.integers(10, 40))
    grades = random.integers(0, 2, count)
    grades[:6] = [0, 0, 0, 1, 1, 1]
    lines = [
        f"{patient}-{k}.nrrd,P{patient},{'ab'[grades[patient]]}"
        for patient in range(count)
        for k in range(random.integers(1, 4))
    ]
    table = read_table(made(tmp_path, lines), seed=seed)
    of_patient: dict[str, set[str]] = {}
    for case in table.cases:
        of_patient.setdefault(case.row["patient"], set()).add(case.split)
    assert all(len(splits) == 1 for splits in of_patient.values())
    dealt = Counter(next(iter(splits)) for splits in of_patient.values())
    assert dealt == Counter(["train", "validation", "test", "train", "train"][k % 5] for k in range(count))
    # The order of the rows does not matter; the seed does.
    shuffled = read_table(made(tmp_path, [lines[i] for i in random.permutation(len(lines))]), seed=seed)
    assert {c.row["volume"]: c.split for c in shuffled.cases} == {c.row["volume"]: c.split for c in table.cases}
    assert [c.split for c in read_table(shuffled.path, seed=seed + 1).cases] != [c.split for c in shuffled.cases]


def test_every_class_is_dealt_out_alike(tmp_path: Path) -> None:
    lines = [f"{k}.nrrd,{name}" for name in "ab" for k in (range(5) if name == "a" else range(5, 10))]
    table = read_table(made(tmp_path, lines, "volume,label"))
    assert Counter((case.label, case.split) for case in table.cases) == {
        (label, split): n for label in (0, 1) for split, n in (("train", 3), ("validation", 1), ("test", 1))
    }


def test_what_is_known_of_a_case(tmp_path: Path) -> None:
    lines = [
        's0.nrrd,1 -2 3.5,b,train,,"one, two\nthree"',
        "s1.nrrd,,0,train,2.5,",
        "s2.nrrd,,1,validation,,",
        "s3.nrrd,,a,test,,",
    ]
    path = made(tmp_path, lines, "volume,region,label,split,age,report")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    table = read_table(path, classes=["a", "b"])
    assert table.classes == ("a", "b") and table.attributes == ("age",)
    assert [case.label for case in table.cases] == [1, 0, 1, 0]
    assert table.cases[0].region == (1.0, -2.0, 3.5) and table.cases[1].region is None
    assert table.cases[0].row["report"] == "one, two\nthree"
    assert [case.row.number for case in table.cases] == [2, 3, 4, 5]
    assert torch.equal(table.known().nan_to_num(-1), torch.tensor([[-1.0], [2.5]]))


BASIC = "volume,label,split"
GOOD = ["s0.nrrd,a,train", "s1.nrrd,b,train", "s2.nrrd,a,validation", "s3.nrrd,b,test"]


def each(*more: str) -> list[str]:
    """The good rows with one more cell: the same in each, or one after the other."""
    return [f"{line},{cell}" for line, cell in zip(GOOD, more * (4 // len(more)), strict=True)]


@pytest.mark.parametrize(
    ("head", "lines", "says"),
    [
        ("", [], "holds no cases"),
        (BASIC, [], "holds no cases"),
        ("volume;label;split", ["s0.nrrd;a;train"], "column 'volume'.* first row is 'volume;label;split'"),
        ("volume,label,label", GOOD, "two columns 'label'"),
        (BASIC, [*GOOD[:3], "s3.nrrd,b,test,large, round"], "Row 5 .* 5 cells .* 3 columns.*quotes"),
        (BASIC, [*GOOD, "missing.nrrd,a,test"], "Row 6 .*'volume'.* no volume 'missing.nrrd'"),
        (BASIC, [*GOOD, ",a,test"], "Row 6 .*'volume': it is empty"),
        (BASIC, [*GOOD, "s0.nrrd,a,dev"], "Row 6 .*'split': There is no split 'dev'"),
        (BASIC, [*GOOD, "s0.nrrd,a,test"], "Row 6 .*'split': in row 2 .* 'train'"),
        (BASIC, GOOD[:3], "no row for the split 'test'"),
        ("volume,label", ["s0.nrrd,a", "s1.nrrd,b"], "no row for the split 'test': give scans of at least three"),
        (BASIC, [line.replace(",b", ",a") for line in GOOD], "Every label .* 'a'.* two classes"),
        (BASIC, [*GOOD, "s4.nrrd,c,test"], "No row of the split 'train' .* label 'c'"),
        (BASIC, [*GOOD[:3], "s3.nrrd,20261126,test"], "No row of the split 'train' .* label '20261126'"),
        (BASIC, [line.replace(",a", ",0").replace(",b", ",20261126") for line in GOOD], "There is no class '20261126'"),
        (f"{BASIC},age", [*each("3"), "s0.nrrd,a,train,old"], "Row 6 .*'age': 'old' is not"),
        (f"{BASIC},age", each("inf"), "Row 2 .*'age': 'inf' is not a number"),
        (f"{BASIC},age", each(""), "'train' .* attribute 'age'"),
        (f"{BASIC},region", each("1 2"), "Row 2 .*'region': '1 2' is not three"),
        (f"{BASIC},region", each("1 2 nan"), "Row 2 .*'region': '1 2 nan' is not"),
        (f"{BASIC},patient", [*each(*"1234"), "s0.nrrd,a,train,"], "Row 6 .*'patient'"),
        (f"{BASIC},patient", [*each(*"1234"), "s0.nrrd,a,train,9"], "Row 6 .*'patient': in row 2"),
        (f"{BASIC},segmentation", each("mask.nii"), "Row 2 .*'segmentation'.*'mask.nii'"),
    ],
)
def test_a_bad_table_is_refused_where_it_is_bad(tmp_path: Path, head: str, lines: list[str], says: str) -> None:
    path = made(tmp_path, lines, head)
    (tmp_path / "missing.nrrd").unlink(missing_ok=True)
    with pytest.raises(MedXAIError, match=says) as error:
        read_table(path)
    assert "\n" not in str(error.value)


def test_a_table_that_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(MedXAIError, match=r"none\.csv.*check the path"):
        read_table(tmp_path / "none.csv")
    (tmp_path / "latin.csv").write_bytes("volume,größe\n".encode("latin-1"))
    with pytest.raises(MedXAIError, match="UTF-8"):
        read_table(tmp_path / "latin.csv")
    with pytest.raises(MedXAIError, match="class 'b'"):
        read_table(made(tmp_path, GOOD, "volume,label,split"), classes=["a", "c"])


def test_labels_may_be_missing_only_where_nobody_learns_from_them(tmp_path: Path) -> None:
    table = read_table(made(tmp_path, [*GOOD, "s4.nrrd,,test"], "volume,label,split"))
    with pytest.raises(MedXAIError, match=r"Row 6 .*'label': it is empty"):
        train("lung-nodule", tmp_path / "out", mx.Run(), data=table)
    # Before scans are read, of which there are none.
    with pytest.raises(MedXAIError, match="no device 'toaster'"):
        train("lung-nodule", tmp_path / "out", mx.Run(device="toaster"), data=read_table(made(tmp_path, GOOD, BASIC)))
    with pytest.raises(MedXAIError, match=r"'healthy-lung' cannot learn from a table.* lung-nodule"):
        train("healthy-lung", tmp_path / "out", mx.Run(), data=table)


def reported(folder: Path, *splits: str) -> Table:
    """A table with the same report in a row for each of the splits."""
    lines = [f's{i}.nrrd,{split},"50 % solid, #3 @ $2."' for i, split in enumerate(splits)]
    return read_table(made(folder, lines, "volume,split,report"), GRID)


@pytest.mark.parametrize("alone", ["validation", "test"])
def test_captions_that_nothing_can_be_compared_with_are_refused_before_training(alone: str, tmp_path: Path) -> None:
    recipe = RECIPES["lung-nodule-captioning"]
    assert recipe.own is not None
    both = ["train", "train", "validation", "validation", "test", "test"]
    assert recipe.own(recipe, reported(tmp_path, *both)).score == "bleu_4"
    both.remove(alone)
    with pytest.raises(MedXAIError, match=f"one report in the split '{alone}'.*two or more"):
        recipe.own(recipe, reported(tmp_path, *both))


def test_signs_that_mean_something_in_a_bundle_are_no_words_of_a_network(tmp_path: Path) -> None:
    """MONAI takes what begins with one of them for an expression, a file or a reference."""
    recipe = RECIPES["lung-nodule-captioning"]
    assert recipe.own is not None
    recipe = recipe.own(recipe, reported(tmp_path, *["train", "validation", "test"] * 2))
    recipe.publish(recipe.network(), {"bleu_4": 0.5, "seconds": 1.0}, tmp_path / "mine")
    model = mx.load_model(tmp_path / "mine")
    assert model.network.vocabulary == (",", ".", "2", "3", "50", "solid")


@pytest.mark.parametrize(
    ("region", "voxels", "says"),
    [
        ("", None, "Row 3 .*'volume'.*cannot be read"),
        ("", torch.zeros(30, 30, 30), "Row 3 .*'volume'.*constant"),
        ("", torch.rand(60, 30, 30), "Row 3 .*'region'.*48 mm.*larger"),
        ("500 0 0", torch.rand(60, 30, 30), "Row 3 .*'region'.*outside"),
    ],
)
def test_a_scan_that_cannot_be_learnt_from_is_named(tmp_path: Path, region: str, voxels: Any, says: str) -> None:
    path = made(tmp_path, [f"{line}," for line in GOOD], "volume,label,split,region")
    path.write_text(path.read_text("utf-8").replace("s1.nrrd,b,train,", f"s1.nrrd,b,train,{region}"), encoding="utf-8")
    for i in range(4):
        write(tmp_path / f"s{i}.nrrd", torch.rand(30, 30, 30))
    if voxels is None:
        (tmp_path / "s1.nrrd").write_text("no scan", encoding="utf-8")
    else:
        write(tmp_path / "s1.nrrd", voxels)
    with pytest.raises(MedXAIError, match=says):
        read_table(path, GRID).read(mx.Run())


@pytest.mark.parametrize(
    ("grid", "says"), [((8, 1.0), "24 voxels"), ((24, 0.0), "spacing"), ((24, 1.0, (5.0, 5.0)), "low to high")]
)
def test_grids_that_are_none(grid: tuple[Any, ...], says: str) -> None:
    with pytest.raises(MedXAIError, match=says):
        Grid(*grid)


def test_the_command_line_trains_on_a_table(own: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    told = ["train", "lung-nodule", "--data", str(own), "--size", "24", "--spacing", "2", "--quick", "--out", str(out)]
    order = ["--classes", "wicked,kind,clear", "--intensities", "-1000", "400", "--device", "cpu"]
    done = CliRunner().invoke(app, [*told, *order])
    assert done.exit_code == 0, done.output
    assert "recall: kind" in done.stdout
    assert mx.load_model(out).class_names == ("wicked", "kind", "clear")
    listed = CliRunner().invoke(app, ["train"])
    assert [line.split()[0] for line in listed.stdout.splitlines()] == list(RECIPES)
    refused = CliRunner().invoke(app, ["train", "lung-nodule", "--size", "24"])
    assert refused.exit_code == 1 and "add --data" in refused.output
