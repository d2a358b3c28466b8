"""The DICOM series that was explained: whom results belong to, and on which grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from MedXAILib.errors import MedXAIError

if TYPE_CHECKING:
    from pydicom import Dataset

_IN_SPACE = (
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "FrameOfReferenceUID",
    "SOPClassUID",
)
# What every object has to have, if only empty. Who makes series anonymous often takes them out.
_MAY_BE_EMPTY = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "AccessionNumber",
)
# A voxel may stray this far from where the series says it is, in mm.
_TOLERANCE_MM = 0.05


@dataclass(frozen=True)
class Series:
    """The slices of a series without their voxels, in the order of the array that is read of them."""

    slices: Sequence[Dataset]

    @property
    def affine(self) -> np.ndarray:
        """Array index (d, h, w) to RAS mm."""
        first, last, count = self.slices[0], self.slices[-1], len(self.slices)
        along_row, along_column = np.reshape(np.asarray(first.ImageOrientationPatient, float), (2, 3))
        between_rows, between_columns = (float(mm) for mm in first.PixelSpacing)
        start, end = (np.asarray(one.ImagePositionPatient, float) for one in (first, last))
        affine = np.eye(4)
        normal = np.cross(along_row, along_column) * float(first.get("SliceThickness") or 1)
        affine[:3, 0] = (end - start) / (count - 1) if count > 1 else normal
        affine[:3, 1] = along_column * between_rows
        affine[:3, 2] = along_row * between_columns
        affine[:3, 3] = start
        return np.asarray(np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The voxel grid, (D, H, W)."""
        return len(self.slices), int(self.slices[0].Rows), int(self.slices[0].Columns)

    def check(self, shape: Sequence[int], affine: np.ndarray) -> None:
        """Refuse what is on another grid.

        Raises:
            MedXAIError: saying by how much it is elsewhere.
        """
        if tuple(shape) != self.shape:
            raise MedXAIError(
                f"The map has {tuple(shape)} voxels and the series {self.shape}: export with the series that was "
                "explained, or explain that series."
            )
        corners = np.array([[*index, 1.0] for index in np.ndindex(2, 2, 2)]) * [*np.array(shape) - 1, 1]
        off = float(np.linalg.norm(corners @ (affine - self.affine).T, axis=1).max())
        if off > _TOLERANCE_MM:
            raise MedXAIError(
                f"The map is up to {off:.2f} mm off the grid of the series: export with the series that was explained."
            )


def read_series(folder: Path) -> Series:
    """The series in `folder`, in the order in which SimpleITK stacks its slices.

    Raises:
        MedXAIError: when there is none, or several, or its slices are not single images in space; or without highdicom.
    """
    try:
        import highdicom  # noqa: F401
        from pydicom import dcmread
    except ImportError as error:
        raise MedXAIError("DICOM results need highdicom: install it by pip install 'medxai[dicom]'.") from error
    from SimpleITK import ImageSeriesReader

    if not folder.is_dir():
        raise MedXAIError(f"There is no folder '{folder}': give the one that holds the slices that were explained.")
    found = ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    if len(found) != 1:
        raise MedXAIError(f"'{folder}' holds {len(found)} DICOM series: give a folder with the one that was explained.")
    files = ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), found[0])
    slices = [dcmread(file, stop_before_pixels=True) for file in files]
    for one, file in zip(slices, files, strict=True):
        if any(name not in one for name in _IN_SPACE) or int(one.get("NumberOfFrames") or 1) > 1:
            raise MedXAIError(f"'{Path(file).name}' is no single slice in space: results refer to slices of CT or MR.")
        for name in _MAY_BE_EMPTY:
            if name not in one:
                setattr(one, name, None)
    series = Series(slices)
    thickness = float(np.linalg.norm(series.affine[:3, 0]))
    for one in slices:
        if not one.get("SliceThickness"):
            one.SliceThickness = f"{thickness:.8g}"
    return series
