"""A scan: voxels, where they are in the patient, and where they came from."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor

from MedXAILib.errors import MedXAIError

# A slice may stray this far from its regular position before the series counts as irregular, in mm.
_SLICE_TOLERANCE_MM = 0.05


@dataclass(frozen=True, eq=False)
class Volume:
    """A scan on a regular grid.

    `data` is float32, (C, D, H, W), or (C, H, W) for a plain image; D runs over slices, as SimpleITK's arrays do.
    `affine` takes an array index (d, h, w, 1) to RAS millimetres. `source` is the path it was read from.
    """

    data: Tensor
    affine: np.ndarray
    source: str | None = None

    def __post_init__(self) -> None:
        rank = self.data.ndim - 1
        if rank not in (2, 3):
            raise MedXAIError(
                f"A volume is (C, D, H, W) or (C, H, W), not {tuple(self.data.shape)}: add the channel dimension first."
            )
        object.__setattr__(self, "data", self.data.detach().to(torch.float32))
        object.__setattr__(self, "affine", np.asarray(self.affine, dtype=np.float64))
        if self.affine.shape != (rank + 1, rank + 1):
            raise MedXAIError(f"The affine of a {rank}-D volume is {rank + 1}x{rank + 1}, not {self.affine.shape}.")

    @classmethod
    def from_sitk(cls, image: sitk.Image, source: str | None = None) -> Volume:
        """A SimpleITK image; vector pixels, and the fourth axis of a 4-D image, become channels.

        Raises:
            MedXAIError: for complex pixels or more than four axes.
        """
        if "complex" in image.GetPixelIDTypeAsString():
            raise MedXAIError("The image holds complex numbers: take its magnitude first (SimpleITK.ComplexToModulus).")
        if image.GetDimension() == 4:
            size = image.GetSize()
            frames = [sitk.Extract(image, [*size[:3], 0], [0, 0, 0, i]) for i in range(size[3])]
            return stack([cls.from_sitk(frame, source) for frame in frames])
        rank = image.GetDimension()
        # SimpleITK counts indices x first and points in LPS; our arrays are z first and in RAS.
        step = np.reshape(image.GetDirection(), (rank, rank)) * np.asarray(image.GetSpacing())
        affine = np.eye(rank + 1)
        affine[:rank, :rank] = step[:, ::-1]
        affine[:rank, rank] = image.GetOrigin()
        affine[:2] *= -1
        array = np.asarray(sitk.GetArrayFromImage(image), dtype=np.float32)
        multiple = image.GetNumberOfComponentsPerPixel() > 1
        data = torch.from_numpy(np.moveaxis(array, -1, 0).copy() if multiple else array[None])
        return cls(data, affine, source)

    def to_sitk(self) -> sitk.Image:
        """The same voxels in the same place as a SimpleITK image (a vector image for several channels)."""
        array = self.data.cpu().numpy()
        multiple = len(array) > 1
        image = sitk.GetImageFromArray(np.moveaxis(array, 0, -1) if multiple else array[0], isVector=multiple)
        step = self.affine[:-1, :-1][:, ::-1].copy()
        origin = self.affine[:-1, -1].copy()
        step[:2] *= -1
        origin[:2] *= -1
        spacing = np.linalg.norm(step, axis=0)
        image.SetSpacing(spacing.tolist())
        image.SetDirection((step / spacing).ravel().tolist())
        image.SetOrigin(origin.tolist())
        return image

    @property
    def shape(self) -> tuple[int, ...]:
        """The voxel grid, (D, H, W)."""
        return tuple(self.data.shape[1:])

    @property
    def spacing(self) -> tuple[float, ...]:
        """Distance between neighbouring voxels along (D, H, W), in mm."""
        return tuple(float(s) for s in np.linalg.norm(self.affine[:-1, :-1], axis=0))

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the voxels and their place; equal for equal scans wherever they are stored."""
        digest = hashlib.sha256(repr((tuple(self.data.shape), self.affine.round(6).tolist())).encode())
        digest.update(self.data.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:32]

    def to_index(self, point: Sequence[float]) -> np.ndarray:
        """The (continuous) array index (d, h, w) of a point in RAS mm."""
        return (np.linalg.inv(self.affine) @ np.append(np.asarray(point, dtype=np.float64), 1.0))[:-1]

    def to_point(self, index: Sequence[float]) -> np.ndarray:
        """The point in RAS mm of an array index (d, h, w)."""
        return (self.affine @ np.append(np.asarray(index, dtype=np.float64), 1.0))[:-1]

    def check(self) -> None:
        """Refuse voxels that nothing can be learnt from.

        Raises:
            MedXAIError: for NaN or infinite voxels and for a constant volume.
        """
        name = self.source or "the volume"
        low, high = (float(end) for end in self.data.aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            bad = int((~torch.isfinite(self.data)).sum())
            raise MedXAIError(
                f"{name} has {bad} NaN or infinite voxels: replace them first, for example by the value of air or "
                "with numpy.nan_to_num."
            )
        if low == high:
            raise MedXAIError(
                f"{name} is constant (every voxel is {low:g}): check that the right file or series was loaded."
            )


def stack(volumes: Sequence[Volume]) -> Volume:
    """One volume of several channels out of volumes on one grid, such as the sequences of an MR examination.

    Raises:
        MedXAIError: when they are not on one grid.
    """
    first = volumes[0]
    if len(volumes) == 1:
        return first
    for other in volumes[1:]:
        if other.shape != first.shape or not np.allclose(other.affine, first.affine, atol=1e-3):
            raise MedXAIError(
                f"{other.source or 'One volume'} is not on the grid of {first.source or 'the first'}: "
                "resample it to that grid first (SimpleITK.Resample)."
            )
    return Volume(torch.cat([v.data for v in volumes]), first.affine, first.source)


def load_volume(path: str | Path | Sequence[str | Path]) -> Volume:
    """Read a scan: a NIfTI, NRRD, MHA or DICOM file, a DICOM folder of one series, or several files as channels.

    Raises:
        MedXAIError: when it is missing, corrupt, not a scan, several series, or irregularly spaced.
    """
    if not isinstance(path, (str, Path)):
        return stack([load_volume(p) for p in path])
    path = Path(path)
    if not path.exists():
        raise MedXAIError(f"There is no file or folder '{path}': check the path.")
    return Volume.from_sitk(_read_series(path) if path.is_dir() else _read_file(path), str(path))


def _read_file(path: Path) -> sitk.Image:
    try:
        return sitk.ReadImage(str(path))
    except RuntimeError as error:
        if "orthonormal" in str(error):
            raise MedXAIError(
                f"'{path.name}' has a sheared grid, which a scan cannot have: resample it to a regular grid first."
            ) from error
        raise MedXAIError(
            f"'{path.name}' cannot be read as an image: it may be corrupt or of an unknown type; NIfTI, NRRD, MHA and "
            "DICOM are known."
        ) from error


def _read_series(folder: Path) -> sitk.Image:
    series = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    if not series:
        raise MedXAIError(f"'{folder}' holds no DICOM series: give a file, or the folder that holds the slices.")
    if len(series) > 1:
        raise MedXAIError(
            f"'{folder}' holds {len(series)} DICOM series: move the one to explain to a folder of its own."
        )
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series[0]))
    reader.MetaDataDictionaryArrayUpdateOn()
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise MedXAIError(
            f"The DICOM series in '{folder}' cannot be read: a slice may be corrupt or missing."
        ) from error
    _check_slices(reader, image, folder)
    return image


def _check_slices(reader: sitk.ImageSeriesReader, image: sitk.Image, folder: Path) -> None:
    """ITK stacks slices as if they were evenly spaced along the normal; say so when they are not."""
    count = image.GetDepth()
    if image.GetDimension() < 3 or count < 2 or not reader.HasMetaDataKey(0, "0020|0032"):
        return
    position = np.array([[float(v) for v in reader.GetMetaData(i, "0020|0032").split("\\")] for i in range(count)])
    expected = np.array([image.TransformIndexToPhysicalPoint((0, 0, i)) for i in range(count)])
    worst = float(np.abs(position - expected).max())
    if worst > _SLICE_TOLERANCE_MM:
        raise MedXAIError(
            f"The slices in '{folder}' are not regularly spaced (one is {worst:.2f} mm off: a missing slice or a "
            "tilted gantry): resample the series to a regular grid first."
        )
