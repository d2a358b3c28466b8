"""Sums of the maps of a cohort, in pieces that any worker can make, and that are the same whoever made them."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor

from MedXAILib.bundle import sha256
from MedXAILib.cohort.fit import inverse
from MedXAILib.cohort.plan import Unit
from MedXAILib.cohort.work import RESULTS, Status, receipt
from MedXAILib.errors import MedXAIError
from MedXAILib.explanation import SaliencyMap, load_explanation, written_whole
from MedXAILib.volume import Volume

# A sum of floats depends on its order: the maps of a method are cut into these pieces, whoever adds them up.
_PIECES = 16
_ASKED, _LABELS, _TOLD, _SUMS = "asked.json", "labels.nrrd", "told.json", "sums.npy"


@dataclass(frozen=True)
class Summing:
    """Adding up the maps of the pieces that were `prepare`d in `place`."""

    place: Path

    def do(self, key: str, device: str | None, attempt: int) -> Status:
        """Write the sums of a piece, unless they are there."""
        if not (self.place / key / _TOLD).exists():
            _write(self.place, key)
        return "done"

    def give_up(self, key: str, error: BaseException) -> Status:
        """There is no sum without one of its pieces.

        Raises:
            MedXAIError: always.
        """
        raise MedXAIError(f"The maps of '{key}' cannot be added up ({type(error).__name__}: {error}).") from error


@dataclass
class Sums:
    """What is known of the maps of a method: their sum and that of their squares (2, D, H, W), and case by case the
    shares of the absolute map in each region, the sums of a signed one, or why it was left out."""

    maps: np.ndarray
    shares: dict[str, dict[str, float]]
    contributions: dict[str, dict[str, float]]
    left_out: dict[str, str]


def prepare(
    folder: Path,
    template: Volume,
    atlas: Volume | None,
    names: Mapping[int, str],
    methods: Mapping[str, Sequence[tuple[Unit, str | None]]],
) -> tuple[Path, list[str]]:
    """Write down what is to be added up, each unit with the file of its transform: the place, which is named after all
    that the sums depend on, and its pieces, `<method>.<number>`."""
    labels = _labels(atlas, template)
    pieces = {}
    for method, units in methods.items():
        for i, part in enumerate(np.array_split(np.arange(len(units)), min(_PIECES, len(units)) or 1)):
            of = [units[j] for j in part]
            pieces[f"{method}.{i:02d}"] = [
                {
                    "case": unit.subject.uid,
                    "map": str(folder / RESULTS / unit.key),
                    "digest": (receipt(folder, unit.key) or {}).get("digest"),
                    "transform": file,
                    "transform_digest": file and _digest(file),
                }
                for unit, file in of
            ]
    asked = json.dumps({"pieces": pieces, "names": dict(names), "atlas": atlas is not None})
    said = hashlib.sha256(asked.encode() + sitk.GetArrayViewFromImage(labels).tobytes())
    said.update(repr([labels.GetOrigin(), labels.GetSpacing(), labels.GetDirection(), labels.GetSize()]).encode())
    place = folder / "reduction" / said.hexdigest()[:20]
    if not (place / _ASKED).exists():
        with written_whole(place, _ASKED) as fresh:
            sitk.WriteImage(labels, str(fresh / _LABELS), useCompression=True)
            (fresh / _ASKED).write_text(asked, encoding="utf-8")
    return place, list(pieces)


def discard(place: Path) -> None:
    """Remove what was added up: at once, so that what is interrupted here leaves no halves."""
    aside = place.with_name(f".{place.name}-{uuid.uuid4().hex[:8]}")
    place.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def merged(place: Path, pieces: Sequence[str]) -> Sums:
    """The sums of all `pieces`, added up in their order."""
    _, grid = _asked(place)
    total = Sums(np.zeros((2, *reversed(grid.GetSize()))), {}, {}, {})
    for key in pieces:
        told = json.loads((place / key / _TOLD).read_text(encoding="utf-8"))
        d, h, w = (slice(low, high) for low, high in told["where"])
        total.maps[:, d, h, w] += np.load(place / key / _SUMS)
        total.shares |= told["shares"]
        total.contributions |= told["contributions"]
        total.left_out |= told["left_out"]
    return total


def _transform(file: str | None) -> sitk.Transform:
    if file is None:
        return sitk.Transform(3, sitk.sitkIdentity)
    try:
        found = sitk.ReadTransform(file)
    except RuntimeError as error:
        raise MedXAIError(
            f"'{file}' cannot be read as a transform: give one that SimpleITK wrote (.tfm, .h5)."
        ) from error
    if found.GetDimension() != 3:
        raise MedXAIError(f"'{file}' is a transform of {found.GetDimension()}-D points: give one of 3-D points.")
    return found


def _digest(file: str) -> str:
    try:
        return sha256(Path(file))
    except OSError as error:
        raise MedXAIError(f"The transform '{file}' cannot be read ({error.strerror}): check the path.") from error


def _write(place: Path, key: str) -> None:
    asked, grid = _asked(place)
    names = {int(label): name for label, name in asked["names"].items()}
    labels = torch.from_numpy(sitk.GetArrayFromImage(grid))
    # A map that reaches few regions has nothing in the others.
    none = dict.fromkeys(by_region(torch.zeros(labels.shape, dtype=torch.float64), labels, names), 0.0)
    found = Sums(np.zeros((2, *labels.shape)), {}, {}, {})
    for one in asked["pieces"][key]:
        made = load_explanation(one["map"])
        assert isinstance(made, SaliencyMap)
        through = _transform(one["transform"])
        where, values = _laid(made, grid, through)
        # By NumPy: what several threads of PyTorch add up depends on how they share it.
        mass = float(values.numpy().sum())
        if not mass > 0:
            found.left_out[one["case"]] = "Its map is zero wherever the template is."
            continue
        values = values / mass
        found.maps[0][where] += values.numpy()
        found.maps[1][where] += values.numpy() ** 2
        found.shares[one["case"]] = none | by_region(values, labels[where], names) if asked["atlas"] else {}
        if asked["atlas"] and made.signed:
            found.contributions[one["case"]] = {"outside": 0.0} | none | _contributions(made, grid, through, names)
    there = [np.flatnonzero(found.maps[0].any(tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    box = [(int(on[0]), int(on[-1]) + 1) if len(on) else (0, 0) for on in there]
    told = {"where": box, "shares": found.shares, "contributions": found.contributions, "left_out": found.left_out}
    with written_whole(place / key, _TOLD) as fresh:
        d, h, w = (slice(low, high) for low, high in box)
        np.save(fresh / _SUMS, found.maps[:, d, h, w])
        (fresh / _TOLD).write_text(json.dumps(told, ensure_ascii=False), encoding="utf-8")


def _laid(made: SaliencyMap, grid: sitk.Image, through: sitk.Transform) -> tuple[tuple[slice, ...], Tensor]:
    """The absolute map on the part of the grid that it reaches: which part, and the values, float64."""
    image = Volume(made.data.abs().sum(0, keepdim=True), made.affine).to_sitk()
    low, high = np.zeros(3, int), np.array(grid.GetSize())
    if through.IsLinear():
        back = through.GetInverse()
        ends = itertools.product(*((-0.5, size - 0.5) for size in image.GetSize()))
        points = [back.TransformPoint(image.TransformContinuousIndexToPhysicalPoint(end)) for end in ends]
        landed = np.array([grid.TransformPhysicalPointToContinuousIndex(point) for point in points])
        low = np.clip(np.floor(landed.min(0)).astype(int), 0, high)
        high = np.clip(np.ceil(landed.max(0)).astype(int) + 1, low, high)
    where = tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
    if (low == high).any():
        return where[::-1], torch.zeros(tuple((high - low)[::-1]), dtype=torch.float64)
    laid = sitk.Resample(image, grid[where], through, sitk.sitkLinear, 0.0, sitk.sitkFloat64)
    return where[::-1], torch.from_numpy(sitk.GetArrayFromImage(laid))


def _contributions(
    made: SaliencyMap, grid: sitk.Image, through: sitk.Transform, names: Mapping[int, str]
) -> dict[str, float]:
    """The sums of a signed map over the regions. The labels are brought to its own voxels, so that none is lost."""
    values = made.data.sum(0).double()
    here = sitk.Resample(
        grid, Volume(values[None], made.affine).to_sitk(), inverse(through, grid), sitk.sitkNearestNeighbor, 0.0
    )
    return by_region(values, torch.from_numpy(sitk.GetArrayFromImage(here)), names)


def by_region(values: Tensor, labels: Tensor, names: Mapping[int, str]) -> dict[str, float]:
    """The sum of `values` over each label, by its name."""
    # By their rank: there are atlases with labels of nine digits.
    there, rank = labels.unique(return_inverse=True)
    sums = torch.bincount(rank.flatten(), values.flatten())
    return {
        names.get(label, f"label {label}") if label else "outside": share
        for label, share in zip(there.tolist(), sums.tolist(), strict=True)
    }


def _labels(atlas: Volume | None, template: Volume) -> sitk.Image:
    """The labels on the grid of the template; zero without an atlas.

    Raises:
        MedXAIError: when they are no labels, or too large to be told apart.
    """
    grid = Volume(template.data[:1], template.affine).to_sitk()
    if atlas is None:
        return sitk.Cast(grid * 0, sitk.sitkInt64)
    # Scans are float32, which has no odd numbers beyond.
    if len(atlas.data) > 1 or not bool(((atlas.data == atlas.data.round()) & (atlas.data.abs() < 2**24)).all()):
        raise MedXAIError(
            f"'{atlas.source or 'The atlas'}' has other values than one integer label below {2**24} a voxel: give "
            "labels, not probabilities, and number them anew if they are larger."
        )
    identity = sitk.Transform(3, sitk.sitkIdentity)
    return sitk.Resample(atlas.to_sitk(), grid, identity, sitk.sitkNearestNeighbor, 0.0, sitk.sitkInt64)


@lru_cache(maxsize=1)
def _asked(place: Path) -> tuple[dict[str, Any], sitk.Image]:
    return json.loads((place / _ASKED).read_text(encoding="utf-8")), sitk.ReadImage(str(place / _LABELS))
