"""Lung patches from two sites, one of which leaves a mark: cases on which a network can learn a shortcut.

What the lung and the nodule look like does not depend on the site. Site B leaves a `tag` in a corner of the patch, as
markers on a plate do, or a `blur` over all of it, as another kernel of reconstruction does; how many of each class come
from there is set. What a network makes of the mark is then known by putting it in and taking it away, and whether an
explanation shows it can be measured (Sun et al. 2023, Right for the wrong reason: can interpretable ML techniques
detect spurious correlations?).

As in `MedXAILib.synthetic.lung_nodules`, sample k of a seed is the same in every batch, for every mark and correlation,
but for the mark.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import SimpleITK as sitk
import torch
import torch.nn.functional as F
from torch import Tensor

from MedXAILib.errors import MedXAIError, unknown
from MedXAILib.grid import shifted, transform
from MedXAILib.synthetic import lung_nodules
from MedXAILib.synthetic.lung_nodules import CLASSES, HU_RANGE, SIZE, Backgrounds, Nodules
from MedXAILib.table import write_rows
from MedXAILib.volume import Volume

Mark = Literal["none", "tag", "blur"]
SITES = ("A", "B")
TAG = 10
"""Voxels along each side of a tag, a cube of bright and dark stripes of 2 voxels."""
ANATOMY_MM = 20.0
"""So far from the middle of a nodule, or of where one would be, lies what should matter."""

_RIM = 1
_SITE = 2
"""The purpose of the random numbers that choose the site; 0 and 1 are those of the nodules."""


@dataclass(frozen=True)
class Planted(Nodules):
    """Patches of two sites. `sites` (N,) are indices into `SITES`; `marks` (N, 1, 40, 40, 40) bool is where the mark
    may have changed the patch: nowhere without one, everywhere with a blur."""

    sites: Tensor
    marks: Tensor


def synthesise(
    backgrounds: Backgrounds,
    count: int,
    seed: int,
    borderline: bool = False,
    mark: Mark = "tag",
    correlation: float = 0.9,
    doubt: float = 0.0,
) -> Planted:
    """`count` patches, a third of each class; see `lung_nodules.draw` for `borderline`, and `plant` for the others."""
    return plant(lung_nodules.synthesise(backgrounds, count, seed, borderline), seed, mark, correlation, doubt)


def plant(nodules: Nodules, seed: int, mark: Mark = "tag", correlation: float = 0.9, doubt: float = 0.0) -> Planted:
    """The patches with a site each; those of site B bear the `mark`.

    Args:
        correlation: P(site B | malignant), from 0.5 (the site says nothing of the class) to 1; P(site B) of each other
            class is what is left to 1.
        doubt: the share of nodules that are told to be of the other class, benign or malignant, before sites are
            chosen. Who learns from these has a reason to look at the mark: it says what the nodule does not.

    Raises:
        MedXAIError: for a correlation that is less than 0.5 or more than 1.
    """
    if not 0.5 <= correlation <= 1:
        raise MedXAIError(f"The correlation of site and class is from 0.5 to 1, not {correlation:g}.")
    generators = [lung_nodules._generator(seed, k, _SITE) for k in range(len(nodules))]
    chance = torch.stack([torch.rand(2, generator=generator) for generator in generators])
    other = torch.tensor([0, 2, 1])[nodules.labels]
    labels = torch.where(chance[:, 1] < doubt, other, nodules.labels)
    likely = torch.where(labels == CLASSES.index("malignant"), correlation, 1 - correlation)
    sites = (chance[:, 0] < likely).long()
    from_b = sites.bool()[:, None, None, None, None]
    images, where = marked(nodules, mark)
    told = replace(nodules, images=torch.where(from_b, images, nodules.images), labels=labels)
    return Planted(**vars(told), sites=sites, marks=where & from_b)


def marked(nodules: Nodules, mark: Mark) -> tuple[Tensor, Tensor]:
    """What each patch would be with the mark, and where that may have changed it (bool), both (N, 1, 40, 40, 40).

    A tag is in the corner of the patch that is farthest from the nodule, or from where one would be.

    Raises:
        MedXAIError: for an unknown mark.
    """
    images = nodules.images
    if mark not in get_args(Mark):
        raise unknown("mark", mark, get_args(Mark))
    if mark == "none":
        return images, torch.zeros_like(images, dtype=torch.bool)
    if mark == "blur":
        for _ in range(2):
            images = F.avg_pool3d(images, 3, stride=1, padding=1, count_include_pad=False)
        return images, torch.ones_like(images, dtype=torch.bool)
    begins = torch.where(nodules.centres < (SIZE - 1) / 2, SIZE - _RIM - TAG, _RIM)[:, None]
    axis = torch.arange(SIZE)[:, None]
    along = ((axis >= begins) & (axis < begins + TAG)).unbind(-1)
    tag = along[0][:, None, :, None, None] & along[1][:, None, None, :, None] & along[2][:, None, None, None, :]
    return torch.where(tag, (axis[:, 0] // 2 % 2).to(images).reshape(-1, 1), images), tag


def write(
    planted: Planted, backgrounds: Backgrounds, folder: Path, turn: np.ndarray | None = None, slices: int = 1
) -> Path:
    """Write the patches as scans in Hounsfield units, and the table `cases.csv` of them, which `medxai cohort plan`
    takes; returns its path.

    Its columns are uid, volume, label, site, anatomy (a mask: 20 mm about the nodule, or where one would be) and mark
    (a mask; empty where there is none). A patch lies where it was taken from the scan.

    Args:
        turn: a rotation (3, 3) of the patient in the scanner: the patches lie obliquely then.
        slices: so many make one thick slice.
    """
    folder.mkdir(parents=True, exist_ok=True)
    low, high = HU_RANGE
    placed = backgrounds.affine.copy()
    placed[:3] = (np.eye(3) if turn is None else turn) @ placed[:3]
    thick = np.diag([1.0, 1.0, slices, 1.0])
    rows = []
    for k, (image, mark) in enumerate(zip(planted.images, planted.marks, strict=True)):
        affine = shifted(placed, planted.corners[k].numpy())
        middle = transform(affine, planted.centres[k].numpy())
        grid = shifted(affine, np.array([0.0, 0.0, (slices - 1) / 2])) @ thick
        image, where = (F.avg_pool3d(one.float(), (1, 1, slices)) for one in (image, mark))
        index = np.stack(np.meshgrid(*map(np.arange, image.shape[1:]), indexing="ij"), -1)
        anatomy = np.linalg.norm(transform(grid, index) - middle, axis=-1) <= ANATOMY_MM
        uid, label, site = f"case-{k:04d}", CLASSES[planted.labels[k]], SITES[planted.sites[k]]
        volume, inside, bears = f"{uid}.nrrd", f"{uid}-anatomy.nrrd", f"{uid}-mark.nrrd" if bool(where.any()) else ""
        _save(image * (high - low) + low, grid, folder / volume, sitk.sitkInt16)
        _save(torch.from_numpy(anatomy)[None], grid, folder / inside, sitk.sitkUInt8)
        if bears:
            _save(where > 0, grid, folder / bears, sitk.sitkUInt8)
        rows.append([uid, volume, label, site, inside, bears])
    write_rows(folder / "cases.csv", ["uid", "volume", "label", "site", "anatomy", "mark"], rows)
    return folder / "cases.csv"


def _save(values: Tensor, affine: np.ndarray, path: Path, kind: int) -> None:
    """Write (1, R, A, S) with its slices along S, as scanners do."""
    volume = Volume(values.permute(0, 3, 2, 1), affine[:, [2, 1, 0, 3]])
    sitk.WriteImage(sitk.Cast(volume.to_sitk(), kind), str(path), useCompression=True)
