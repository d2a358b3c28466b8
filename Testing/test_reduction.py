"""What maps of a cohort have in common: sums that are the same whoever makes them, and groups that differ or not."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from scipy.ndimage import map_coordinates
from scipy.stats import false_discovery_control, kstest, permutation_test, spearmanr

import MedXAILib as mx
from MedXAILib.cohort import sums, work
from MedXAILib.cohort.differences import differences, grouped
from MedXAILib.cohort.plan import Subject, make_plan, read_plan
from MedXAILib.cohort.reduce import reduce, write
from MedXAILib.cohort.work import RESULTS
from MedXAILib.grid import transform
from MedXAILib.resources import path


def maps_of(folder: Path) -> dict[str, mx.SaliencyMap]:
    """The maps of a cohort by uid."""
    found = {}
    for unit in read_plan(folder).units():
        one = mx.load_explanation(folder / RESULTS / unit.key)
        assert isinstance(one, mx.SaliencyMap)
        found[unit.subject.uid] = one
    return found


@pytest.fixture(scope="module")
def mapped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cohort of 20 signed maps, which no network made, on an oblique grid; every third goes through a transform."""
    folder = tmp_path_factory.mktemp("mapped")
    affine = np.array([[0.1, 0.2, 1.3, -20.0], [-0.2, 1.5, 0.1, 5.0], [3.1, 0.1, -0.2, 60.0], [0, 0, 0, 1.0]])
    turned, _ = np.linalg.qr(affine[:3, :3])
    affine[:3, :3] = turned * np.linalg.norm(affine[:3, :3], axis=0)
    scan = mx.Volume(torch.randn(1, 16, 30, 34) * 200 - 600, affine)
    made = mx.explain(mx.load_model(path("Models/lung_nodule")), scan, "gradient", region=scan.to_point((7, 14, 16)))
    sitk.WriteTransform(sitk.Euler3DTransform((0, 0, 0), 0.1, -0.2, 0.1, (4, 3, -6)), str(folder / "turned.tfm"))
    given = [None, None, str(folder / "turned.tfm")]
    subjects = [
        Subject(f"{i:02d}", ("scan.nrrd",), region=(float(i), 0.0, 0.0), transform=given[i % 3]) for i in range(20)
    ]
    plan = make_plan("m", "f", {"gradient": {}}, subjects)
    plan.save(folder)
    generator = torch.Generator().manual_seed(1)
    for unit in plan.units():
        data = torch.randn(1, 9, 11, 13, generator=generator) ** 3
        place = replace(made, data=data, affine=affine, signed=True).save(folder / RESULTS / unit.key)
        work.write_receipt(folder, unit, {"status": "done", "digest": work.digest(place)})
    return folder


def onto(mapped: Path) -> tuple[mx.Volume, mx.Volume]:
    """A template on another grid than the maps, larger than most of them, and an atlas on yet another."""
    affine = maps_of(mapped)["00"].affine
    affine[:3, :3] = affine[:3, :3] @ np.array([[0, 0, 0.7], [1.2, 0, 0], [0, 0.9, 0]])
    template = mx.Volume(torch.arange(24.0 * 13 * 14).reshape(1, 24, 13, 14), affine)
    fine = affine @ np.diag([0.5, 0.5, 0.5, 1])
    atlas = (torch.arange(48)[:, None, None] // 12 + torch.arange(26)[:, None] // 13 * 4).expand(48, 26, 28)
    return template, mx.Volume(atlas[None].float(), fine)


def test_the_sum_is_the_same_whoever_adds_up(mapped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distributed import LocalCluster

    template, atlas = onto(mapped)
    (alone,) = reduce(mapped, template, atlas)
    with LocalCluster(n_workers=1, threads_per_worker=3, processes=False, dashboard_address=None) as cluster:
        (many,) = reduce(mapped, template, atlas, scheduler=cluster.scheduler_address)
    # One that was killed: some pieces are there, of another there is a beginning.
    true, written = sums._write, list[str]()

    def dies(place: Path, key: str) -> None:
        written.append(key)
        if len(written) == 6:
            (place / f".{key}-0123abcd").mkdir()
            raise mx.MedXAIError("killed")
        true(place, key)

    monkeypatch.setattr(sums, "_write", dies)
    with pytest.raises(mx.MedXAIError, match="killed"):
        reduce(mapped, template, atlas)
    (resumed,) = reduce(mapped, template, atlas)
    assert len(written) == len(set(written)) + 1 == 17
    for other in (many, resumed):
        assert torch.equal(other.mean, alone.mean) and torch.equal(other.variance, alone.variance)
        assert other.shares == alone.shares and other.contributions == alone.contributions
    assert not any((mapped / "reduction").iterdir())


def test_mean_and_variance_are_those_of_all_maps_at_once(mapped: Path, tmp_path: Path) -> None:
    template, atlas = onto(mapped)
    (found,) = reduce(mapped, template, atlas)
    laid = []
    for unit in read_plan(mapped).units():
        one = maps_of(mapped)[unit.subject.uid]
        # Each point of the template, through the transform, in voxels of the map: by another interpolation.
        index = np.stack(np.meshgrid(*map(np.arange, template.shape), indexing="ij"), -1)
        points = index @ template.affine[:3, :3].T + template.affine[:3, 3]
        if unit.subject.transform:
            turn = sitk.ReadTransform(unit.subject.transform)
            flip = np.array([-1, -1, 1])
            points = np.array([turn.TransformPoint(p) for p in (points * flip).reshape(-1, 3).tolist()]) * flip
        back = np.linalg.inv(one.affine)
        at = points.reshape(-1, 3) @ back[:3, :3].T + back[:3, 3]
        inside = ((at > -0.5) & (at < np.array(one.data.shape[1:]) - 0.5)).all(1)
        values = map_coordinates(one.data[0].abs().numpy().astype(float), at.T, order=1, mode="nearest") * inside
        laid.append(values.reshape(template.shape) / values.sum())
    stack = torch.from_numpy(np.stack(laid))
    assert torch.allclose(found.mean, stack.mean(0), rtol=1e-5, atol=1e-12)
    assert torch.allclose(found.variance, stack.var(0), rtol=1e-5, atol=1e-15)
    write(found, read_plan(mapped).subjects, [], tmp_path)
    error, variation = (mx.load_volume(tmp_path / f"gradient-{name}.nrrd").data[0] for name in ("error", "variation"))
    assert torch.allclose(error, (stack.std(0) / 20**0.5).float(), rtol=1e-4, atol=1e-9)
    there = stack.mean(0) > 0
    assert torch.allclose(variation[there], (stack.std(0) / stack.mean(0))[there].float(), rtol=1e-4)
    assert not variation[~there].any() and (~there).any()


def test_contributions_of_regions_add_up_to_what_is_explained(mapped: Path, tmp_path: Path) -> None:
    template, atlas = onto(mapped)
    (found,) = reduce(mapped, template, atlas)
    for unit in read_plan(mapped).units():
        one, uid = maps_of(mapped)[unit.subject.uid], unit.subject.uid
        assert sum(found.contributions[uid].values()) == pytest.approx(float(one.data.double().sum()), abs=1e-9)
        if unit.subject.transform:
            continue
        # The voxel of the template at each of the map, and that of the atlas, which is on a grid twice as fine.
        index = np.stack(np.meshgrid(*map(np.arange, one.data.shape[1:]), indexing="ij"), -1)
        at = np.rint(transform(np.linalg.inv(template.affine) @ one.affine, index)).astype(int)
        inside = ((at >= 0) & (at < template.shape)).all(-1)
        there = tuple(np.moveaxis((2 * at).clip(0, np.array(atlas.shape) - 1), -1, 0))
        labels = atlas.data[0].numpy()[there] * inside
        for label in range(1, 8):
            expected = one.data[0].double().numpy()[labels == label].sum()
            assert found.contributions[uid][f"label {label}"] == pytest.approx(expected, abs=1e-6)
    write(found, read_plan(mapped).subjects, [], tmp_path)
    rows = {row["region"]: row for row in csv.DictReader((tmp_path / "gradient-contributions.csv").open())}
    told = np.array([one["label 3"] for one in found.contributions.values()])
    assert float(rows["label 3"]["mean"]) == pytest.approx(told.mean())
    assert float(rows["label 3"]["importance"]) == pytest.approx(np.abs(told).mean())


def test_without_a_map_there_is_nothing_to_reduce(mapped: Path, tmp_path: Path) -> None:
    plan = read_plan(mapped)
    plan.save(tmp_path)
    with pytest.raises(mx.MedXAIError, match="holds no map yet"):
        reduce(tmp_path, onto(mapped)[0])
    far = onto(mapped)[0].affine + np.array([[0, 0, 0, 9e3]] * 3 + [[0] * 4])
    with pytest.raises(mx.MedXAIError, match="No map lies on the template"):
        reduce(mapped, mx.Volume(onto(mapped)[0].data, far))
    # One whose map lies beside the template is left out, and told.
    first, second = list(plan.units())[:2]
    for unit, by in ((first, 0.0), (second, 900.0)):
        one = maps_of(mapped)[unit.subject.uid]
        affine = one.affine.copy()
        affine[0, 3] += by
        replace(one, affine=affine).save(tmp_path / RESULTS / unit.key)
        work.write_receipt(tmp_path, unit, {"status": "done"})
    (found,) = reduce(tmp_path, onto(mapped)[0])
    assert (
        found.cases == 1
        and list(found.left_out) == [second.subject.uid]
        and not any((tmp_path / "reduction").iterdir())
    )


@pytest.mark.parametrize(
    ("file", "said"),
    [("gone.tfm", "gone.tfm' cannot be read .No such file"), ("plane.tfm", "transform of 2-D points")],
)
def test_a_transform_that_is_none_is_named(mapped: Path, tmp_path: Path, file: str, said: str) -> None:
    sitk.WriteTransform(sitk.Euler2DTransform(), str(tmp_path / "plane.tfm"))
    plan = read_plan(mapped)
    replace(plan, subjects=tuple(replace(one, transform=str(tmp_path / file)) for one in plan.subjects)).save(tmp_path)
    for unit in plan.units():
        work.write_receipt(tmp_path, unit, {"status": "done"})
    maps_of(mapped)["00"].save(tmp_path / RESULTS / next(plan.units()).key)
    with pytest.raises(mx.MedXAIError, match=said):
        reduce(tmp_path, onto(mapped)[0])


@pytest.mark.parametrize("wrong", [0.5, 614454277.0, np.nan])
def test_what_is_no_atlas_of_labels_is_refused(mapped: Path, wrong: float) -> None:
    template, atlas = onto(mapped)
    atlas.data[0, 3, 3, 3] = wrong
    with pytest.raises(mx.MedXAIError, match="give labels, not probabilities"):
        reduce(mapped, template, atlas)
    with pytest.raises(mx.MedXAIError, match="give labels"):
        reduce(mapped, template, mx.Volume(torch.zeros(2, 4, 4, 4), np.eye(4)))


def test_a_mass_is_the_same_by_one_thread_and_by_many(mapped: Path) -> None:
    template, _ = onto(mapped)
    fine = mx.Volume(torch.zeros(1, 48, 52, 56), template.affine @ np.diag([0.5, 0.25, 0.25, 1]))
    threads, found = torch.get_num_threads(), list[torch.Tensor]()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(reduce(mapped, fine)[0].mean)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


def people(count: int, **meta: Sequence[object]) -> list[Subject]:
    return [Subject(f"{i}", ("s",), meta={k: str(v[i]) for k, v in meta.items()}) for i in range(count)]


def told_of(values: np.ndarray) -> dict[str, dict[str, float]]:
    return {f"{i}": {f"r{j}": float(v) for j, v in enumerate(row)} for i, row in enumerate(values)}


def test_without_a_difference_p_is_uniform() -> None:
    values = np.random.default_rng(0).exponential(size=(26, 400))
    ages = np.random.default_rng(1).uniform(40, 80, 26)
    found = differences(told_of(values), people(26, site=["n"] * 10 + ["s"] * 16, age=ages), ["site", "age"])
    for column in ("site", "age"):
        assert kstest([one.p for one in found if one.by == column], "uniform").pvalue > 0.01
    assert min(one.q for one in found) > 0.05


def test_a_planted_difference_is_found_and_no_other() -> None:
    random = np.random.default_rng(2)
    values, site, age = random.normal(size=(60, 30)), ["n"] * 30 + ["s"] * 30, random.uniform(40, 80, 60)
    values[:30, 4] += 1.5
    values[:, 9] += (age - 60) / 8
    people_ = people(60, site=site, age=age)
    found = {(one.region, one.by): one for one in differences(told_of(values), people_, ["site", "age"])}
    assert {key for key, one in found.items() if one.q < 0.05} == {("r4", "site"), ("r9", "age")}
    one = found["r4", "site"]
    assert one.group == "n - s" and one.mean == pytest.approx(values[:30, 4].mean() - values[30:, 4].mean())
    assert one.low < 1.5 < one.high and one.high - one.low == pytest.approx(2 * 1.96 * np.sqrt(2 / 30), rel=0.3)
    assert found["r9", "age"].mean == pytest.approx(spearmanr(age, values[:, 9])[0])
    for j in (0, 1):
        parts, y = (values[:30, j], values[30:, j]), values[:, j]
        known = permutation_test(parts, lambda x, y, axis: x.mean(axis) - y.mean(axis), vectorized=True)
        assert found[f"r{j}", "site"].p == pytest.approx(known.pvalue, abs=0.03)
        assert found[f"r{j}", "age"].p == pytest.approx(spearmanr(age, y).pvalue, abs=0.03)
    # As many tests as there are make it harder to stand out: of one column alone, q is another.
    q = false_discovery_control([one.p for one in found.values()])
    assert [one.q for one in found.values()] == pytest.approx(q.tolist())


@pytest.mark.parametrize("value", [0.1, 0.3, 1 / 3, 1.0])
def test_what_is_the_same_in_all_cases_differs_nowhere(value: float) -> None:
    for count in (11, 13, 15, 21):
        site = people(count, site=["n"] * 5 + ["s"] * (count - 5), age=range(count))
        found = differences(told_of(np.full((count, 1), value)), site, ["site", "age"])
        assert [one.p for one in found] == [1, 1]


def test_what_cannot_be_tested_is_told() -> None:
    values = np.random.default_rng(3).normal(size=(13, 1))
    few = differences(told_of(values), people(13, site=["n"] * 9 + ["s"] * 4), ["site"])
    assert (
        np.isnan(few[0].p)
        and "4 cases are fewer than 5" in few[0].note
        and few[0].mean == pytest.approx(values[:9].mean() - values[9:].mean())
    )
    # Three groups, each against the others; what is not known is left out; one group, or none, says nothing.
    three = differences(told_of(values), people(13, site=["a"] * 5 + ["b"] * 5 + ["c"] * 2 + ["n/a"]), ["site", "sex"])
    assert [(one.group, one.cases, np.isnan(one.p)) for one in three] == [
        ("a - others", 12, False),
        ("b - others", 12, False),
        ("c - others", 12, True),
    ]
    # Scans of one patient are one case of their mean, and not tested where they differ.
    patients = [f"p{i // 2}" for i in range(12)] + ["p9"]
    (twice,) = differences(
        told_of(values), people(13, patient=patients, site=["n", "n", "s", "s"] * 3 + ["s"]), ["site"]
    )
    assert twice.cases == 7 and twice.mean == pytest.approx(
        np.mean([values[i : i + 2].mean() for i in (0, 4, 8)])
        - np.mean([*(values[i : i + 2].mean() for i in (2, 6, 10)), values[12].mean()])
    )
    (within,) = differences(told_of(values), people(13, patient=patients, site=["n", "s"] * 6 + ["n"]), ["site"])
    assert np.isnan(within.p) and "several groups" in within.note


def test_numbers_make_groups_at_their_median() -> None:
    some = people(8, age=[61, 52, 70, 48, 66, "n/a", 55, 59], sex=[0, 1, 1, 0, 1, 0, 0, 1])
    assert grouped(some, "age") == dict.fromkeys("024", "above 59") | dict.fromkeys("1367", "up to 59")
    assert set(grouped(some, "sex").values()) == {"0", "1"}
