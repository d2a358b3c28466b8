"""Scans brought to a template: known moves are found again, what does not belong is refused, whatever is killed."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

import MedXAILib as mx
from MedXAILib.cohort import fit as fitting
from MedXAILib.cohort.fit import fit, inverse
from MedXAILib.cohort.plan import Subject, make_plan
from MedXAILib.cohort.reduce import reduce, write
from MedXAILib.cohort.registration import register, registered, troubles
from MedXAILib.cohort.work import RESULTS, write_receipt
from MedXAILib.resources import path


def oblique(image: sitk.Image, spacing: tuple[float, ...], angles: tuple[float, ...]) -> sitk.Image:
    """A turned, anisotropic grid around the middle of `image`, of about its extent."""
    turn = sitk.Euler3DTransform()
    turn.SetRotation(*angles)
    size = [round(n * s / t) for n, s, t in zip(image.GetSize(), image.GetSpacing(), spacing, strict=True)]
    grid = sitk.Image(size, sitk.sitkFloat32)
    grid.SetSpacing(spacing)
    grid.SetDirection(turn.GetMatrix())
    middle = [(n - 1) / 2 for n in size]
    offset = np.array(grid.TransformContinuousIndexToPhysicalPoint(middle))
    grid.SetOrigin(np.array(middle_of(image)) - offset)
    return grid


def middle_of(image: sitk.Image) -> tuple[float, ...]:
    return image.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in image.GetSize()])


def seen(image: sitk.Image, grid: sitk.Image, through: sitk.Transform | None = None) -> mx.Volume:
    """`image` on `grid`: its points through `through`."""
    through = sitk.Transform(3, sitk.sitkIdentity) if through is None else through
    low = float(sitk.GetArrayViewFromImage(image).min())
    return mx.Volume.from_sitk(sitk.Resample(image, grid, through, sitk.sitkLinear, low, sitk.sitkFloat32))


def fewer_voxels() -> None:
    """Than are registered else, for the sake of time."""
    fitting._GRIDS, fitting._ITERATIONS, fitting._SAMPLES, fitting._CELLS = (8e3, 3e4), (50, 15), 2e4, 5


@pytest.fixture(autouse=True)
def coarser(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_GRIDS", "_ITERATIONS", "_SAMPLES", "_CELLS"):
        monkeypatch.setattr(fitting, name, getattr(fitting, name))
    fewer_voxels()


@pytest.fixture(scope="module")
def chest() -> sitk.Image:
    image = sitk.ReadImage(str(path("SampleData/chest_ct_nodule.nrrd")), sitk.sitkFloat32)
    return sitk.BinShrink(image, [9, 9, 1])


@pytest.fixture(scope="module")
def scan(chest: sitk.Image) -> mx.Volume:
    return seen(chest, oblique(chest, (5.6, 5.1, 6.3), (0.1, -0.15, 0.2)))


def phantom(contrast: tuple[float, ...], noise: float) -> sitk.Image:
    """A head of sorts: ellipsoids in one another and aside, none of them symmetric to another."""
    z, y, x = np.meshgrid(np.arange(48) * 4 - 94, np.arange(56) * 3.5 - 96, np.arange(52) * 3.0 - 76, indexing="ij")
    image = np.zeros(x.shape)
    parts = [
        ((0, 0, 0), (66, 84, 80)),
        ((0, 4, 4), (56, 72, 68)),
        ((20, 25, 10), (14, 18, 12)),
        ((-22, -20, 25), (9, 22, 14)),
    ]
    for (a, b, c), (u, v, w), value in ((*part, value) for part, value in zip(parts, contrast, strict=True)):
        image[((x - a) / u) ** 2 + ((y - b) / v) ** 2 + ((z - c) / w) ** 2 < 1] = value
    image += np.random.default_rng(0).normal(0, noise, image.shape)
    made = sitk.GetImageFromArray(image.astype(np.float32))
    made.SetSpacing((3.0, 3.5, 4.0))
    made.SetOrigin((-76, -96, -94))
    return made


def moved(kind: str, about: sitk.Image) -> sitk.Transform:
    """A known transform about the middle of an image."""
    rigid = sitk.Euler3DTransform(middle_of(about), 0.12, -0.08, 0.15, (9.0, -14.0, 11.0))
    if kind == "rigid":
        return rigid
    stretch = np.array([[1.1, 0.06, 0], [0, 0.93, 0], [0.04, 0, 1.05]])
    matrix = (np.reshape(rigid.GetMatrix(), (3, 3)) @ stretch).ravel()
    affine = sitk.AffineTransform(matrix.tolist(), rigid.GetTranslation(), middle_of(about))
    if kind == "affine":
        return affine
    splines = sitk.BSplineTransformInitializer(about, [3, 3, 3])
    splines.SetParameters(np.random.default_rng(1).uniform(-9, 9, len(splines.GetParameters())))
    return sitk.CompositeTransform([affine, splines])


def missed(found: sitk.Transform, truth: sitk.Transform, template: mx.Volume, above: float) -> np.ndarray:
    """How far landmarks, points of the anatomy all over the template, are laid from where they belong, in mm."""
    image = template.to_sitk()
    index = np.argwhere(sitk.GetArrayViewFromImage(image) > above)[::37, ::-1]
    points = [image.TransformIndexToPhysicalPoint(one.tolist()) for one in index]
    return np.linalg.norm([np.subtract(found.TransformPoint(p), truth.TransformPoint(p)) for p in points], axis=1)


@pytest.mark.parametrize(
    ("kind", "mean", "most"), [("rigid", 0.3, 0.6), ("affine", 0.5, 1.2), ("deformable", 1.6, 6.0)]
)
def test_a_known_move_of_a_chest_is_found_again(
    chest: sitk.Image, scan: mx.Volume, kind: str, mean: float, most: float
) -> None:
    # Voxels of the template are of 5 x 5.7 x 6 mm.
    truth = moved(kind, chest)
    template = seen(chest, oblique(chest, (5.0, 5.7, 6.0), (-0.05, 0.1, -0.1)), truth)
    found = fit(scan, template, kind)
    apart = missed(found.transform, truth, template, -300)
    assert not found.reason and apart.mean() < mean and apart.max() < most
    assert found.quality["similarity"] > found.quality["before"] + 0.1
    if kind == "deformable":
        affine = sitk.CompositeTransform(found.transform).GetNthTransform(0)
        assert apart.mean() < 0.7 * missed(affine, truth, template, -300).mean()
        assert 0 < found.quality["jacobian_low"] < 1 < found.quality["jacobian_high"]


def test_what_is_nearly_symmetric_is_not_taken_for_found() -> None:
    # Ellipsoids in another contrast: the optimum lies some mm from where they belong, and mirror images do as well.
    template, other = phantom((40, 90, 20, 160), 4), phantom((200, 60, 150, 10), 6)
    truth = moved("affine", template)
    on = seen(template, oblique(template, (4.0, 4.5, 5.0), (0.1, 0, -0.1)), truth)
    found = fit(seen(other, oblique(other, (4.4, 4.0, 4.6), (0, 0.2, 0.1))), on)
    assert missed(found.transform, truth, on, 60).mean() > 2 and "turned about" in found.reason


def test_the_same_comes_out_again(chest: sitk.Image, scan: mx.Volume) -> None:
    template = seen(chest, oblique(chest, (6.0, 6.7, 6.0), (-0.05, 0.1, -0.1)), moved("rigid", chest))
    one, other = (fit(scan, template, "rigid") for _ in range(2))
    assert one.transform.GetParameters() == other.transform.GetParameters() and one.quality == other.quality


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("noise", "little in common"),
        ("head", "little in common|turned about"),
        ("upside down", "turned about"),
        ("left to right", "left and right exchanged"),
        ("corner", "of the template"),
    ],
)
def test_what_does_not_belong_is_refused(chest: sitk.Image, scan: mx.Volume, what: str, reason: str) -> None:
    template = seen(chest, oblique(chest, (5.0, 5.7, 6.0), (-0.05, 0.1, -0.1)), moved("rigid", chest))
    if what == "noise":
        scan = mx.Volume(torch.randn(scan.data.shape, generator=torch.Generator().manual_seed(0)), scan.affine)
    elif what == "head":
        scan = seen(
            phantom((40, 90, 20, 160), 4), oblique(phantom((40, 90, 20, 160), 4), (4.4, 4.0, 4.6), (0, 0.2, 0.1))
        )
    elif what == "corner":
        scan = mx.Volume(scan.data[:, :14, :16, :16], scan.affine)
    else:
        scan = mx.Volume(scan.data.flip(1 if what == "upside down" else 3), scan.affine)
    found = fit(scan, template, "rigid")
    assert re.search(reason, found.reason)


def test_what_cannot_be_registered_is_told(scan: mx.Volume) -> None:
    with pytest.raises(mx.MedXAIError, match="constant"):
        fit(scan, mx.Volume(torch.zeros(1, 9, 9, 9), scan.affine))
    with pytest.raises(mx.MedXAIError, match="too flat"):
        fit(mx.Volume(scan.data[:, :3], scan.affine), scan)
    with pytest.raises(mx.MedXAIError, match="affine"):
        fit(scan, scan, "affin")


def test_volumes_change_as_the_transform_says(chest: sitk.Image) -> None:
    grid = oblique(chest, (5.0, 5.7, 6.0), (-0.05, 0.1, -0.1))
    affine = moved("affine", chest)
    assert fitting._jacobian(affine, grid) == pytest.approx([np.linalg.det(np.reshape(affine.GetMatrix(), (3, 3)))] * 2)
    splines = sitk.BSplineTransformInitializer(chest, [3, 3, 3])
    splines.SetParameters(np.random.default_rng(1).uniform(-90, 90, len(splines.GetParameters())))
    assert fitting._jacobian(splines, grid)[0] < 0
    low = fitting._jacobian(splines, grid)[0]
    assert "folds" in fitting._reason({**_GOOD, "jacobian_low": low}, 1.0, 300.0) and not fitting._reason(
        _GOOD, 1.0, 300
    )


_GOOD = {"similarity": 0.5, "advantage": 2.0, "sides": 1.2, "covered": 0.9, "scaled": 1.0, "residual_mm": 0.2}


_DRIVER = """
import sys
sys.path.insert(0, sys.argv[1])
from test_registration import fewer_voxels
from MedXAILib.cohort.registration import register
fewer_voxels()
register(sys.argv[2], sys.argv[3], "rigid")
"""


def test_a_cohort_is_registered_killed_and_resumed(chest: sitk.Image, scan: mx.Volume, tmp_path: Path) -> None:
    truth, spot = moved("rigid", chest), np.array(middle_of(chest))
    template = seen(chest, oblique(chest, (5.0, 5.7, 6.0), (-0.05, 0.1, -0.1)), truth)
    noise = mx.Volume(torch.randn(scan.data.shape, generator=torch.Generator().manual_seed(0)), scan.affine)
    files = {name: str(tmp_path / f"{name}.nrrd") for name in ("template", "moved", "noise", "damaged", "given")}
    for name, one in {"template": template, "moved": scan, "noise": noise, "given": template}.items():
        sitk.WriteImage(one.to_sitk(), files[name])
    (tmp_path / "damaged.nrrd").write_bytes((tmp_path / "moved.nrrd").read_bytes()[:500])
    sitk.WriteTransform(sitk.TranslationTransform(3, (0.0, 0.0, 0.0)), str(tmp_path / "own.tfm"))
    subjects = [Subject(name, (files[name],)) for name in ("noise", "damaged", "moved")]
    subjects.append(Subject("given", (files["given"],), transform=str(tmp_path / "own.tfm")))
    folders = [tmp_path / "undisturbed", tmp_path / "killed"]
    plan = make_plan("m", "f", {"gradient": {}}, subjects)
    for folder in folders:
        folder.mkdir()
        plan.save(folder)
    assert register(folders[0], files["template"], "rigid") == {"done": 1, "refused": 2}
    assert {one["case"] for one in troubles(folders[0])} == {"noise", "damaged"}
    with pytest.raises(mx.MedXAIError, match="registered to another template"):
        reduce(folders[0], scan)

    receipts = folders[1] / "registration" / "receipts"
    driver = [sys.executable, "-c", _DRIVER, str(Path(__file__).parent), str(folders[1]), files["template"]]
    with subprocess.Popen(driver, env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        while not list(receipts.glob("*.json")) and process.poll() is None:
            time.sleep(0.02)
        process.kill()
    assert len(list(receipts.glob("*.json"))) < 3
    with pytest.raises(mx.MedXAIError, match="is not registered"):
        reduce(folders[1], template)
    register(folders[1], files["template"], "rigid")
    done = [registered(folder, template)[0]["moved"] for folder in folders]
    assert (
        Path(done[0]).read_bytes() == Path(done[1]).read_bytes()
        and register(folders[1], files["template"], "rigid") == {}
    )
    assert len(missed(sitk.ReadTransform(done[0]), truth, template, -300)) and (
        missed(sitk.ReadTransform(done[0]), truth, template, -300).mean() < 0.3
    )

    # A spot in each scan, where a point of the anatomy is; what was refused has one, too, and elsewhere.
    at = {"moved": truth.TransformPoint(spot.tolist()), "given": spot, "noise": spot + 40}
    made = mx.explain(mx.load_model(path("Models/lung_nodule")), scan, "gradient", region=scan.to_point((10, 15, 15)))
    for unit in plan.units():
        if unit.subject.uid in at:
            volume = mx.load_volume(unit.subject.volume[0])
            index = np.stack(np.meshgrid(*map(np.arange, volume.shape), indexing="ij"), -1)
            points = index @ volume.affine[:3, :3].T + volume.affine[:3, 3]
            away = points - np.array(at[unit.subject.uid]) * [-1, -1, 1]
            data = torch.from_numpy(np.exp(-((away / 9) ** 2).sum(-1)))[None].float()
            one = replace(made, data=data, affine=volume.affine)
            write_receipt(
                folders[0], unit, {"status": "done", "digest": str(one.save(folders[0] / RESULTS / unit.key))}
            )
    (overall,) = reduce(folders[0], template)
    assert overall.cases == 2 and overall.left_out.keys() == {"noise", "damaged"}
    grid = [np.arange(n) for n in template.shape]
    centre = [
        float((overall.mean.sum(tuple({0, 1, 2} - {axis})) * torch.from_numpy(grid[axis])).sum()) for axis in range(3)
    ]
    assert np.linalg.norm(template.to_point(centre) * [-1, -1, 1] - spot) < 1.5
    write(overall, plan.subjects, [], tmp_path / "out")
    rows = list(csv.DictReader((tmp_path / "out" / "gradient-left-out.csv").open()))
    assert [row["case"] for row in rows] == ["noise", "damaged"] and "little in common" in rows[0]["reason"]


@pytest.mark.parametrize("kind", ["affine", "deformable"])
def test_the_way_back(chest: sitk.Image, kind: str) -> None:
    truth = moved(kind, chest)
    grid = oblique(chest, (5.0, 5.7, 6.0), (-0.05, 0.1, -0.1))
    back = inverse(truth, grid)
    # Away from the rim, beyond which splines end.
    index = np.random.default_rng(0).uniform(0.2, 0.8, (300, 3)) * (np.array(grid.GetSize()) - 1)
    points = np.array([grid.TransformContinuousIndexToPhysicalPoint(one) for one in index.tolist()])
    again = np.array([back.TransformPoint(truth.TransformPoint(point)) for point in points.tolist()])
    assert np.linalg.norm(again - points, axis=1).max() < (1e-6 if kind == "affine" else 0.5)
