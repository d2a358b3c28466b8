"""Volumes are where SimpleITK says they are, and refuse what is no scan."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import oblique_affine

import MedXAILib as mx


def oblique_image(size: tuple[int, int, int] = (7, 9, 5)) -> sitk.Image:
    image = sitk.GetImageFromArray(np.random.default_rng(0).normal(size=size[::-1]).astype(np.float32))
    image.SetSpacing((0.7, 0.9, 3.0))
    image.SetOrigin((-12.5, 40.0, 7.25))
    image.SetDirection(sitk.VersorTransform((0.3, -0.2, 0.5), 0.6).GetMatrix())
    return image


def test_affine_says_where_simpleitk_says() -> None:
    image = oblique_image()
    volume = mx.Volume.from_sitk(image)
    x, y, z = image.TransformIndexToPhysicalPoint((6, 1, 3))
    np.testing.assert_allclose(volume.to_point((3, 1, 6)), (-x, -y, z), atol=1e-9)
    np.testing.assert_allclose(volume.to_index((-x, -y, z)), (3, 1, 6), atol=1e-9)
    assert volume.spacing == pytest.approx((3.0, 0.9, 0.7))
    assert volume.data[0, 3, 1, 6] == image[6, 1, 3]


def test_round_trip_through_simpleitk() -> None:
    image = oblique_image()
    back = mx.Volume.from_sitk(image).to_sitk()
    np.testing.assert_allclose(back.GetDirection(), image.GetDirection(), atol=1e-12)
    np.testing.assert_allclose(back.GetOrigin(), image.GetOrigin(), atol=1e-12)
    np.testing.assert_allclose(back.GetSpacing(), image.GetSpacing(), atol=1e-12)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(back), sitk.GetArrayFromImage(image))


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
def test_files_keep_the_geometry(tmp_path: Path, suffix: str) -> None:
    image = oblique_image()
    sitk.WriteImage(image, str(tmp_path / f"scan{suffix}"))
    volume = mx.load_volume(tmp_path / f"scan{suffix}")
    np.testing.assert_allclose(volume.affine, mx.Volume.from_sitk(image).affine, atol=1e-4)


def test_channels_from_vectors_fourth_axis_and_several_files(tmp_path: Path) -> None:
    image = oblique_image()
    other = sitk.Image(image) + 1
    vector = mx.Volume.from_sitk(sitk.Compose(image, other))
    series = mx.Volume.from_sitk(sitk.JoinSeries([image, other]))
    for i, one in enumerate((image, other)):
        sitk.WriteImage(one, str(tmp_path / f"{i}.nrrd"))
    files = mx.load_volume([tmp_path / "0.nrrd", tmp_path / "1.nrrd"])
    assert vector.data.shape == (2, 5, 9, 7)
    for volume in (series, files):
        torch.testing.assert_close(volume.data, vector.data)
        np.testing.assert_allclose(volume.affine, vector.affine, atol=1e-5)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(vector.to_sitk())[..., 1], sitk.GetArrayFromImage(other))


def test_files_on_different_grids_are_refused(tmp_path: Path) -> None:
    image, other = oblique_image(), oblique_image()
    other.SetOrigin((0, 0, 0))
    sitk.WriteImage(image, str(tmp_path / "a.nrrd"))
    sitk.WriteImage(other, str(tmp_path / "b.nrrd"))
    with pytest.raises(mx.MedXAIError, match=r"b\.nrrd is not on the grid of .*a\.nrrd.*resample"):
        mx.load_volume([tmp_path / "a.nrrd", tmp_path / "b.nrrd"])


def test_two_dimensional_image() -> None:
    image = sitk.GetImageFromArray(np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32))
    image.SetSpacing((0.5, 0.25))
    volume = mx.Volume.from_sitk(image)
    assert volume.data.shape == (1, 6, 8) and volume.spacing == (0.25, 0.5)
    assert volume.to_sitk().GetSpacing() == (0.5, 0.25)


def test_fingerprint_is_of_voxels_and_place(oblique: mx.Volume) -> None:
    same = mx.Volume(oblique.data.clone(), oblique.affine.copy(), source="elsewhere")
    moved = mx.Volume(oblique.data, oblique_affine((2.5, 0.8, 1.2)))
    changed = mx.Volume(oblique.data + 1e-3, oblique.affine)
    assert same.fingerprint == oblique.fingerprint
    assert len({oblique.fingerprint, moved.fingerprint, changed.fingerprint}) == 3


def write_series(folder: Path, positions: list[float], uid: str = "1.2.3") -> None:
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for i, z in enumerate(positions):
        image = sitk.GetImageFromArray(np.full((4, 6), i, dtype=np.int16))
        for key, value in {
            "0008|0060": "CT",
            "0020|000e": uid,
            "0020|000d": "1.2",
            "0008|0018": f"{uid}.{i}",
            "0020|0032": f"-10\\5\\{z}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0020|0013": str(i),
            "0028|0030": "0.5\\0.5",
        }.items():
            image.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"{uid}-{i}.dcm"))
        writer.Execute(image)


def test_dicom_folder(tmp_path: Path) -> None:
    write_series(tmp_path, [0.0, 2.0, 4.0, 6.0])
    volume = mx.load_volume(tmp_path)
    assert volume.data.shape == (1, 4, 4, 6)
    assert volume.data[0, :, 0, 0].tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(volume.to_point((2, 0, 0)), (10, -5, 4))


@pytest.mark.parametrize(
    ("positions", "said"), [([0.0, 2.0, 6.0, 8.0], "not regularly spaced"), ([], "holds no DICOM series")]
)
def test_irregular_and_empty_dicom_folders_are_refused(tmp_path: Path, positions: list[float], said: str) -> None:
    write_series(tmp_path, positions)
    with pytest.raises(mx.MedXAIError, match=said):
        mx.load_volume(tmp_path)


def test_folder_of_two_series_is_refused(tmp_path: Path) -> None:
    write_series(tmp_path, [0.0, 2.0])
    write_series(tmp_path, [0.0, 2.0], uid="1.2.9")
    with pytest.raises(mx.MedXAIError, match="holds 2 DICOM series"):
        mx.load_volume(tmp_path)


def test_missing_and_corrupt_files(tmp_path: Path) -> None:
    with pytest.raises(mx.MedXAIError, match=r"no file or folder.*check the path"):
        mx.load_volume(tmp_path / "none.nrrd")
    sitk.WriteImage(oblique_image(), str(tmp_path / "good.nrrd"))
    (tmp_path / "cut.nrrd").write_bytes((tmp_path / "good.nrrd").read_bytes()[:400])
    (tmp_path / "text.nii").write_text("no image", encoding="utf-8")
    for name in ("cut.nrrd", "text.nii"):
        with pytest.raises(mx.MedXAIError, match=f"'{name}' cannot be read"):
            mx.load_volume(tmp_path / name)


def test_paths_with_spaces_and_other_scripts(tmp_path: Path) -> None:
    folder = tmp_path / "Thorax été 胸部"
    folder.mkdir()
    sitk.WriteImage(oblique_image(), str(folder / "scan één.nrrd"))
    assert mx.load_volume(folder / "scan één.nrrd").shape == (5, 9, 7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_voxels_are_refused(oblique: mx.Volume, bad: float) -> None:
    data = oblique.data.clone()
    data[0, 3, 4, 5] = bad
    with pytest.raises(mx.MedXAIError, match="1 NaN or infinite voxels: replace"):
        mx.Volume(data, oblique.affine).check()


def test_constant_volume_is_refused(oblique: mx.Volume) -> None:
    with pytest.raises(mx.MedXAIError, match=r"constant \(every voxel is 4\)"):
        mx.Volume(torch.full_like(oblique.data, 4.0), oblique.affine).check()


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(mx.MedXAIError, match=r"\(C, D, H, W\)"):
        mx.Volume(torch.zeros(4, 4), np.eye(3))
    with pytest.raises(mx.MedXAIError, match="4x4"):
        mx.Volume(torch.zeros(1, 4, 4, 4), np.eye(3))
