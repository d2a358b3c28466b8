"""Examples of concepts: scans of which it is known whether something is there, or how much of it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import SimpleITK as sitk
import torch
from pydantic import Field, PlainSerializer, PlainValidator, WithJsonSchema
from torch import Tensor

from MedXAILib import bundle
from MedXAILib.engines.concept_vectors import Scan
from MedXAILib.errors import MedXAIError, unknown
from MedXAILib.grid import resample, transform
from MedXAILib.run import Run
from MedXAILib.table import Row, read_rows
from MedXAILib.volume import Volume, load_volume

COLUMNS = ("volume", "region", "label", "patient", "split", "report", "segmentation")
"""Of a table, with a meaning of their own; every other column is a concept."""
RANDOM = "random"
"""The folder, or the segment, of what is no concept's."""
MEASURES = {
    "volume_ml": "mL",
    "diameter_mm": "mm",
    "elongation": "",
    "flatness": "",
    "roundness": "",
    "mean_intensity": "",
    "sd_intensity": "",
    "edge_sharpness": "per mm",
}
"""What is measured of a segmentation, with its unit: see `measured`."""

_IMAGES = (".nrrd", ".nhdr", ".nii", ".nii.gz", ".mha", ".mhd", ".dcm")
# What stands for examples that have no file, before their hash.
_IN_MEMORY = "examples "
_SIDES = {">=": np.greater_equal, "<=": np.less_equal, ">": np.greater, "<": np.less}


@dataclass(frozen=True, eq=False)
class Examples:
    """Scans, and what is known of them.

    `concepts` has numbers (N,) by name, NaN where unknown: 1 where a concept is, 0 where it is not, or how much of it
    there is. `labels` (the class of each scan), `patients` and `segmentations` are empty or of all scans. `source` is
    the file or folder it was read from.

    Raises:
        MedXAIError: when there are not as many of each.
    """

    scans: Sequence[Scan]
    concepts: Mapping[str, np.ndarray]
    labels: Sequence[str] = ()
    patients: Sequence[str] = ()
    segmentations: Sequence[Volume | Path | None] = ()
    source: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "concepts", {n: np.asarray(v, dtype=float) for n, v in self.concepts.items()})
        others = {"labels": self.labels, "patients": self.patients, "segmentations": self.segmentations}
        for name, values in {**self.concepts, **{n: v for n, v in others.items() if len(v)}}.items():
            if len(values) != len(self.scans):
                raise MedXAIError(f"There are {len(self.scans)} examples and {len(values)} {name}: give one for each.")

    @classmethod
    def of(cls, volumes: Sequence[Volume], concepts: Mapping[str, Any], labels: Sequence[str] = ()) -> Examples:
        """Scans in memory."""
        scans = [Scan(volume, name=f"Example {i}") for i, volume in enumerate(volumes)]
        return cls(scans, concepts, labels)

    @property
    def fingerprint(self) -> str:
        """A hash of the scans and of what is known of them."""
        told = [[scan.key for scan in self.scans], {n: v.tolist() for n, v in self.concepts.items()}, [*self.labels]]
        return hashlib.sha256(repr(told).encode()).hexdigest()

    @property
    def groups(self) -> list[str]:
        """Whom each scan is of. Where that is not said, another file is another patient."""
        if self.patients:
            return list(self.patients)
        return [str(i if isinstance(s.volume, Volume) else s.volume) for i, s in enumerate(self.scans)]

    def there(self, asked: Sequence[str]) -> dict[str, np.ndarray]:
        """For each concept `asked` for, or all: 1 where it is, 0 where it is not, NaN where that is not known (N,).

        Other numbers than 0 and 1 are compared as in "diameter_mm > 15", and else with their median.

        Raises:
            MedXAIError: for a concept that there is not, naming the nearest.
        """
        found = {}
        for text in asked or self.concepts:
            name, side, limit = _comparison(text)
            values = self._known(name)
            if not side and not np.isin(values[~np.isnan(values)], (0, 1)).all():
                side, limit = ">", float(np.nanmedian(values))
                text = f"{name} > {limit:.3g}"
            found[text] = np.where(np.isnan(values), np.nan, _SIDES[side](values, limit)) if side else values
        return found

    def amounts(self, asked: Sequence[str], run: Run) -> dict[str, np.ndarray]:
        """How much there is of each concept `asked` for, or of all: (N,), NaN where unknown. Those of `MEASURES` that
        are not given are measured, where there are segmentations."""
        can = [*self.concepts, *(m for m in MEASURES if self.segmentations and m not in self.concepts)]
        names = list(asked or can)
        for name in names:
            if name not in can:
                raise unknown("concept", name, can)
        missing = [name for name in names if name not in self.concepts]
        found = {name: self.concepts.get(name, np.full(len(self.scans), np.nan)).copy() for name in names}
        load = lru_cache(maxsize=2)(load_volume)
        for i, (scan, mask) in enumerate(zip(self.scans, self.segmentations, strict=False)):
            if not missing or mask is None:
                continue
            run.step(i, len(self.scans), "Measuring segmentations")
            try:
                volume, marked = (v if isinstance(v, Volume) else load(v) for v in (scan.volume, mask))
                of_scan = measured(volume, marked)
            except MedXAIError as error:
                raise MedXAIError(f"{scan.name}: {error}") from error
            for name in missing:
                found[name][i] = of_scan[name]
        # A flat segmentation has no flatness.
        return {name: np.where(np.isfinite(values), values, np.nan) for name, values in found.items()}

    def _known(self, name: str) -> np.ndarray:
        if name not in self.concepts:
            raise unknown("concept", name, self.concepts)
        return self.concepts[name]


def _source(value: Any) -> str | Volume | Examples:
    if isinstance(value, (Volume, Examples)):
        return value
    if not isinstance(value, (str, Path)):
        raise ValueError("examples are a CSV file, a folder of folders, a segmentation, or Examples")
    if str(value).startswith(_IN_MEMORY):
        raise ValueError("these examples were in memory, and are not kept: ask anew, with the examples themselves")
    if str(value) and not Path(value).exists():
        raise ValueError(f"there is no file or folder '{value}': check the path")
    return str(value)


ExampleSource = Annotated[
    Any,
    PlainValidator(_source),
    PlainSerializer(lambda v: v if isinstance(v, str) else _IN_MEMORY + v.fingerprint, return_type=str),
    WithJsonSchema({"type": "string", "format": "file"}),
    Field(
        description="what concepts look like: a CSV file (columns volume, region, label, and one for each concept), a "
        f"folder with a folder of scans for each concept and one called {RANDOM}, or a segmentation of the scan"
    ),
]


def sha256(path: Path) -> str:
    """The SHA-256 of a file, or of the names and contents of all that is in a folder."""
    if path.is_file():
        return bundle.sha256(path)
    digest = hashlib.sha256()
    # By name: paths are in another order on Windows.
    files = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
    for name in sorted(files):
        digest.update(f"{name} {sha256(files[name])}".encode())
    return digest.hexdigest()


def read_examples(
    source: str | Volume | Examples, asked: Sequence[str], volume: Volume, patches: int, run: Run
) -> Examples:
    """The examples that `source` stands for. Those of a segmentation are up to `patches` places of `volume` for each
    segment, and as many beside them all. Of a table the columns that are `asked` for are read, or all.

    Raises:
        MedXAIError: when they cannot be read; in a table, naming the row and the column.
    """
    if isinstance(source, Examples):
        return source
    if isinstance(source, Volume):
        return _of_segments(_segments(source, {}), source.affine, volume, patches, run)
    path = Path(source)
    if path.is_dir():
        return _of_folder(path)
    return _of_table(path, asked) if path.suffix.lower() == ".csv" else _of_file(path, volume, patches, run)


def _of_table(path: Path, asked: Sequence[str]) -> Examples:
    rows = read_rows(path)
    concepts = [name for name in rows[0].cells if name not in COLUMNS]
    wanted = [_comparison(text)[0] for text in asked]
    masked = any(row["segmentation"] for row in rows)
    for name in wanted:
        if name not in concepts and not (masked and name in MEASURES):
            raise unknown(f"column in '{path}'", name, concepts)
    named = any(row["patient"] for row in rows)
    return Examples(
        [Scan(row.volume, row.point("region"), f"Row {row.number} of '{path}'") for row in rows],
        {n: np.array([_number(row, n) for row in rows]) for n in concepts if not wanted or n in wanted},
        [row["label"] for row in rows],
        [row["patient"] or f"row {row.number}" for row in rows] if named else (),
        [row.file("segmentation") for row in rows] if masked else (),
        str(path),
    )


def _number(row: Row, name: str) -> float:
    try:
        return row.number_in(name)
    except MedXAIError as error:
        raise MedXAIError(f"{error} Columns that are no concepts are passed over when concepts=... names some.") from (
            error
        )


def _of_folder(folder: Path) -> Examples:
    """1 for the scans in the folder of a concept, 0 for those in the folder of what is none, and else unknown."""
    sets = {part.name: _scans(part) for part in sorted(folder.iterdir()) if part.is_dir()}
    empty = next((name for name, scans in sets.items() if not scans), None)
    if RANDOM not in sets or len(sets) < 2 or empty:
        what = f"'{empty}' holds no scan" if empty else f"there is {', '.join(sets) or 'no folder'}"
        raise MedXAIError(
            f"'{folder}' needs a folder of scans for each concept, and one called '{RANDOM}' of others: {what}."
        )
    files = [(name, file) for name, scans in sets.items() for file in scans]
    return Examples(
        [Scan(file, None, f"'{file}'") for _, file in files],
        {concept: _one_of(concept, [name for name, _ in files]) for concept in sets if concept != RANDOM},
        source=str(folder),
    )


def _scans(folder: Path) -> list[Path]:
    """The image files in a folder, and the folders in it, which are DICOM series."""
    return sorted(p for p in folder.iterdir() if p.is_dir() or p.name.lower().endswith(_IMAGES))


def _of_file(path: Path, volume: Volume, patches: int, run: Run) -> Examples:
    # What Slicer calls its segments is in the header.
    marked = load_volume(path)
    image = sitk.ImageFileReader()
    image.SetFileName(str(path))
    image.ReadImageInformation()
    header = {key: image.GetMetaData(key) for key in image.GetMetaDataKeys()}
    names = {}
    for key, name in header.items():
        if re.fullmatch(r"Segment\d+_Name", key):
            segment = key.removesuffix("_Name")
            layer, value = (
                int(header.get(f"{segment}_{what}", told)) for what, told in (("Layer", 0), ("LabelValue", 1))
            )
            names[layer, value] = name
    return _of_segments(_segments(marked, names), marked.affine, volume, patches, run, str(path))


def _segments(marked: Volume, names: Mapping[tuple[int, int], str]) -> dict[str, Tensor]:
    """The mask (D, H, W) of each label of a segmentation. Segments that overlap are in several channels."""
    found = {}
    for layer, labels in enumerate(marked.data.nan_to_num()):
        for value in labels.unique().tolist():
            if value:
                found[names.get((layer, int(value)), f"segment {int(value)}")] = labels == value
    return found


def _of_segments(
    segments: Mapping[str, Tensor], affine: np.ndarray, volume: Volume, patches: int, run: Run, source: str = ""
) -> Examples:
    if set(segments) <= {RANDOM}:
        raise MedXAIError(f"{source or 'The segmentation'} has no segment: draw one for each concept.")
    elsewhere = segments.get(RANDOM, ~torch.stack([*segments.values()]).any(0))
    masks = {**{n: m for n, m in segments.items() if n != RANDOM}, RANDOM: elsewhere}
    scans, names = [], []
    for draw, (name, mask) in enumerate(masks.items()):
        points = transform(affine, mask.nonzero().numpy().astype(float))
        index = transform(np.linalg.inv(volume.affine), points)
        points = points[((index > -0.5) & (index < np.array(volume.shape) - 0.5)).all(1)]
        chosen = torch.randperm(len(points), generator=run.generator(draw))[:patches].tolist()
        scans += [Scan(volume, tuple(points[i].tolist()), f"A place in '{name}'") for i in chosen]
        names += [name] * len(chosen)
    run.note(
        "The examples are places of one scan, and neighbours are alike: accuracies are too high, and p and q too small."
    )
    return Examples(scans, {n: _one_of(n, names) for n in masks if n != RANDOM}, source=source)


def _one_of(concept: str, names: Sequence[str]) -> np.ndarray:
    return np.array([1.0 if name == concept else 0.0 if name == RANDOM else np.nan for name in names])


def _comparison(text: str) -> tuple[str, str, float]:
    """Name, sign and number of "diameter_mm > 15"; no sign and 0 for a name alone."""
    found = re.fullmatch(r"\s*(.+?)\s*(>=|<=|>|<)\s*(-?\d+\.?\d*)\s*", text)
    return (found[1], found[2], float(found[3])) if found else (text.strip(), "", 0.0)


def measured(volume: Volume, segmentation: Volume) -> dict[str, float]:
    """What SimpleITK measures of the non-zero voxels of a segmentation, on the grid of `volume`.

    Volume, largest (Feret) diameter, elongation and flatness (1 and more), roundness (1 is a ball); mean and standard
    deviation of the first channel inside; and how steep that is, per mm, on the contour.

    Raises:
        MedXAIError: when the segmentation has no voxel in the scan.
    """
    marked = (segmentation.data != 0).any(0, keepdim=True).float()
    inside = resample(marked, segmentation.affine, volume.shape, volume.affine, nearest=True) > 0
    if not bool(inside.any()):
        raise MedXAIError(
            f"{segmentation.source or 'The segmentation'} has no voxel in the scan: check that both are of one "
            "examination."
        )
    mask = sitk.Cast(Volume(inside.float(), volume.affine).to_sitk(), sitk.sitkUInt8)
    shape = sitk.LabelShapeStatisticsImageFilter()
    shape.ComputeFeretDiameterOn()
    shape.Execute(mask)
    image = Volume(volume.data[:1], volume.affine).to_sitk()
    voxels = volume.data[0][inside[0]].double()
    contour = sitk.GetArrayFromImage(sitk.LabelContour(mask)) > 0
    found = (
        shape.GetPhysicalSize(1) / 1000,
        shape.GetFeretDiameter(1),
        shape.GetElongation(1),
        shape.GetFlatness(1),
        shape.GetRoundness(1),
        float(voxels.mean()),
        float(voxels.std(correction=0)),
        float(sitk.GetArrayFromImage(sitk.GradientMagnitude(image))[contour].mean()),
    )
    return dict(zip(MEASURES, found, strict=True))
