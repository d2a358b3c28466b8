"""Explanations as DICOM objects: the same map on the same grid to another library, valid by the rules of a third."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import highdicom as hd
import numpy as np
import pytest
import small_explanations
import torch
from dicom_series import write_series
from pydicom import dcmread
from typer.testing import CliRunner

import MedXAILib as mx
from MedXAILib.cli import app
from MedXAILib.export import made_by
from MedXAILib.export.dicom import write_dicom
from MedXAILib.grid import resample
from MedXAILib.resources import path
from MedXAILib.trust.card import TrustCard
from MedXAILib.trust.finding import COLOURS, Finding


@pytest.fixture(scope="module", params=[False, True], ids=["forwards", "backwards"])
def series(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The nodule of the chest CT on an oblique, anisotropic grid, in slices that are numbered either way."""
    scan = small_explanations.chest()
    turned, _ = np.linalg.qr(np.array([[1.0, 0.2, -0.1], [-0.15, 1.0, 0.3], [0.05, -0.25, 1.0]]))
    turned *= np.sign(np.diag(turned))
    affine = np.eye(4)
    affine[:3, :3] = turned[:, ::-1] * (3.0, 0.9, 1.3)
    affine[:3, 3] = np.array(small_explanations.NODULE) - affine[:3, :3] @ (11.0, 35.0, 27.0)
    tilted = mx.Volume(resample(scan.data + 1000, scan.affine, (23, 70, 54), affine) - 1000, affine)
    return write_series(tilted, tmp_path_factory.mktemp("series") / "ct", request.param)


@pytest.fixture(scope="module")
def made(series: Path) -> mx.SaliencyMap:
    model = mx.load_model(path("Models/lung_nodule"))
    return mx.explain(model, mx.load_volume(series), "hirescam", target="malignant", region=small_explanations.NODULE)


def values_at(read: hd.Volume, points: np.ndarray) -> np.ndarray:
    """What a volume of highdicom holds at points in RAS mm, by its own affine."""
    lps = points * [-1, -1, 1]
    index = np.c_[lps, np.ones(len(lps))] @ np.linalg.inv(read.affine).T
    found = index[:, :3].round().astype(int)
    assert np.abs(index[:, :3] - found).max() < 1e-3
    return read.array[tuple(found.T)]


def test_the_map_comes_back_through_its_affine(series: Path, made: mx.SaliencyMap, tmp_path: Path) -> None:
    written = write_dicom(made, series, tmp_path / "out")
    assert [one.name for one in written] == ["map-0.dcm", "hot-spots-0.dcm", "report.dcm"]
    indices = np.argwhere(np.ones(made.data.shape[1:], bool))
    points = np.c_[indices, np.ones(len(indices))] @ made.affine.T
    read = hd.imread(tmp_path / "out" / "map-0.dcm").get_volume()
    assert np.array_equal(values_at(read, points[:, :3]), made.data[0].numpy().ravel())

    spots = hd.seg.segread(tmp_path / "out" / "hot-spots-0.dcm")
    values = made.data[0].clamp_min(0).numpy().ravel()
    for number, share in enumerate((0.5, 0.25, 0.1), 1):
        # Frames without a voxel are left out: outside of what is kept there is none.
        kept = spots.get_volume(segment_numbers=[number], combine_segments=False)
        inside = np.zeros(len(points), bool)
        index = np.c_[points[:, :3] * [-1, -1, 1], np.ones(len(points))] @ np.linalg.inv(kept.affine).T
        found = index[:, :3].round().astype(int)
        within = ((found >= 0) & (found < kept.array.shape[:3])).all(1)
        inside[within] = kept.array[(*found[within].T, 0)] > 0
        # The smallest set of voxels that holds this share.
        assert values[inside].min() >= values[~inside].max()
        assert values[inside].sum() >= share * values.sum() > values[inside].sum() - values[inside].min()


def test_objects_belong_to_the_patient_and_say_what_made_them(
    series: Path, made: mx.SaliencyMap, tmp_path: Path
) -> None:
    write_dicom(made, series, tmp_path / "out")
    source = dcmread(next(series.iterdir()))
    for name in ("map-0.dcm", "hot-spots-0.dcm", "report.dcm"):
        one = dcmread(tmp_path / "out" / name)
        assert (one.PatientID, one.PatientName) == ("P-1", "Doe^Jane")
        assert one.StudyInstanceUID == source.StudyInstanceUID != one.SeriesInstanceUID
        assert "FrameOfReferenceUID" not in one or one.FrameOfReferenceUID == source.FrameOfReferenceUID
    report = hd.sr.srread(tmp_path / "out" / "report.dcm")
    (spot, *_) = report.content.get_volumetric_roi_measurement_groups()
    volume, mean, largest = (float(one.value) for one in spot.get_measurements())
    voxel = abs(np.linalg.det(made.affine[:3, :3]))
    assert 0 < mean < largest == pytest.approx(float(made.data.max()), rel=1e-5)
    spots = hd.seg.segread(tmp_path / "out" / "hot-spots-0.dcm")
    count = spots.get_volume(segment_numbers=[1], combine_segments=False).array.sum()
    assert volume == pytest.approx(count * voxel / 1000, rel=1e-5)
    texts = [element.value for element in report.iterall() if element.keyword in ("TextValue", "CodeMeaning")]
    assert "malignant" in texts and "For research only. Not for diagnosis or treatment." in texts


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="needs dicom3tools")
def test_objects_are_valid(series: Path, made: mx.SaliencyMap, tmp_path: Path) -> None:
    chest = mx.load_volume(series)
    told = [made, small_explanations.caption(chest), small_explanations.similar_cases(chest, count=2)]
    for i, explanation in enumerate(told):
        for file in write_dicom(explanation, series, tmp_path / str(i)):
            said = subprocess.run(["dciodvfy", str(file)], capture_output=True, text=True, check=False).stderr
            assert [line for line in said.splitlines() if line.startswith("Error")] == [], file


def copy_of(series: Path, folder: Path, without: str = "", **changed: object) -> Path:
    """The slices in `series`, `without` one of their tags and with others `changed`."""
    folder.mkdir()
    for file in series.iterdir():
        one = dcmread(file)
        if without:
            delattr(one, without)
        one.update(changed)
        one.save_as(folder / file.name)
    return folder


def with_provenance(made: mx.SaliencyMap, **changed: object) -> mx.SaliencyMap:
    return replace(made, provenance=SimpleNamespace(**{**vars(made.provenance), **changed}))


def test_any_language_is_kept(series: Path, made: mx.SaliencyMap, tmp_path: Path) -> None:
    name = "Yamada^Tarou=山田^太郎=やまだ^たろう"
    japanese = copy_of(
        series, tmp_path / "japanese", SpecificCharacterSet=["", "ISO 2022 IR 87"], PatientName=name, StudyID="1"
    )
    told = with_provenance(made, title="Größe 患者", target_label="bösartig " + "x" * 80)
    for source, patient in ((japanese, name), (series, "Doe^Jane")):
        for file in write_dicom(told, source, tmp_path / "out"):
            one = dcmread(file)
            assert one.PatientName == patient
            assert "Größe 患者: bösartig x" in one.SeriesDescription and one.SeriesDescription.endswith("…")


@pytest.mark.parametrize("tag", ["StudyID", "PatientBirthDate", "SliceThickness"])
def test_a_series_that_was_made_anonymous_is_taken(
    series: Path, made: mx.SaliencyMap, tag: str, tmp_path: Path
) -> None:
    write_dicom(made, copy_of(series, tmp_path / "series", tag), tmp_path / "out")
    read = dcmread(tmp_path / "out" / "map-0.dcm")
    if tag == "SliceThickness":
        (measures,) = read.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence
        assert float(measures.SliceThickness) == pytest.approx(3.0, abs=1e-4)
    else:
        assert tag in read and not read[tag].value


@pytest.mark.parametrize("tag", ["ImageOrientationPatient", "FrameOfReferenceUID"])
def test_slices_that_are_nowhere_are_refused(series: Path, made: mx.SaliencyMap, tag: str, tmp_path: Path) -> None:
    with pytest.raises(mx.MedXAIError, match="no single slice in space"):
        write_dicom(made, copy_of(series, tmp_path / "series", tag), tmp_path / "out")


def test_folders_stay_at_home(series: Path, made: mx.SaliencyMap, tmp_path: Path) -> None:
    places = {"library": "/home/jane/cases", "table": r"C:\Users\jane\cases.csv", "layer": "shape/1"}
    notes = ("Left out: '/home/jane/scan 1.nrrd' is constant.", r"Left out: 'D:\jane\scan 2.nrrd'.")
    write_dicom(with_provenance(made, parameters=places, notes=notes), series, tmp_path / "out")
    spots = dcmread(tmp_path / "out" / "hot-spots-0.dcm")
    (algorithm,) = spots.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence
    assert algorithm.AlgorithmParameters.startswith('library="cases",table="cases.csv",layer="shape/1",')
    report = dcmread(tmp_path / "out" / "report.dcm")
    texts = [element.value for element in report.iterall() if element.keyword == "TextValue"]
    assert "Left out: 'scan 1.nrrd' is constant." in texts and "Left out: 'scan 2.nrrd'." in texts
    for file in (tmp_path / "out").iterdir():
        assert b"jane" not in file.read_bytes()


def test_meanings_that_differ_have_codes_that_differ() -> None:
    meanings = ["malignant", "malignant nodule 1", "malignant nodule 2", "良性", "恶性", "diameter (mm)", "diameter mm"]
    codes = [made_by.coded(meaning) for meaning in meanings]
    assert codes[0].value == "malignant" and len({code.value for code in codes}) == len(meanings)
    assert all(len(code.value) <= 16 and code.value.isascii() for code in codes)
    assert [code.meaning for code in codes] == meanings


def test_one_slice_is_as_thick_as_it_says(series: Path, made: mx.SaliencyMap, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    shutil.copy(min(series.iterdir()), tmp_path / "one")
    one = mx.load_volume(tmp_path / "one")
    write_dicom(replace(made, data=made.data.sum(1, keepdim=True), affine=one.affine), tmp_path / "one", tmp_path / "o")
    (spot, *_) = hd.sr.srread(tmp_path / "o" / "report.dcm").content.get_volumetric_roi_measurement_groups()
    count = hd.seg.segread(tmp_path / "o" / "hot-spots-0.dcm").get_volume(segment_numbers=[1]).array.astype(bool).sum()
    assert float(spot.get_measurements()[0].value) == pytest.approx(count * 3.0 * 0.9 * 1.3 / 1000, rel=1e-5)


def test_another_series_is_refused(series: Path, made: mx.SaliencyMap, tmp_path: Path) -> None:
    moved = made.affine.copy()
    moved[2, 3] += 0.5
    with pytest.raises(mx.MedXAIError, match=r"0\.50 mm off the grid of the series"):
        write_dicom(replace(made, affine=moved), series, tmp_path / "out")
    with pytest.raises(mx.MedXAIError, match="export with the series that was explained"):
        write_dicom(replace(made, data=torch.zeros(1, 4, 5, 6)), series, tmp_path / "out")
    with pytest.raises(mx.MedXAIError, match="holds 0 DICOM series"):
        write_dicom(made, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_map_without_anything_has_no_hot_spots(series: Path, made: mx.SaliencyMap, tmp_path: Path) -> None:
    written = write_dicom(replace(made, data=torch.zeros_like(made.data)), series, tmp_path / "out")
    assert [one.name for one in written] == ["map-0.dcm", "report.dcm"]


def test_the_command_line_takes_the_trust_card_along(series: Path, made: mx.SaliencyMap, tmp_path: Path) -> None:
    made.save(tmp_path / "kept")
    finding = Finding("randomisation", "Does it depend on what the network learnt?", "Yes.", "good", {})
    TrustCard((finding,), {}, 0, 0).save(tmp_path / "kept")
    args = ["export", str(tmp_path / "kept"), str(series), "--out", str(tmp_path / "out")]
    said = CliRunner().invoke(app, args)
    assert said.exit_code == 0 and "map-0.dcm, hot-spots-0.dcm, report.dcm" in said.output
    report = hd.sr.srread(tmp_path / "out" / "report.dcm")
    meanings = [element.value for element in report.iterall() if element.keyword == "CodeMeaning"]
    assert meanings[meanings.index("Does it depend on what the network learnt?") + 1] == COLOURS["good"][0]
