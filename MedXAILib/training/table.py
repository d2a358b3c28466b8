"""A person's own data to train on: a table of scans with labels, attributes, reports and masks.

A recipe that can learn from such a table has `own(recipe, table)`, which gives it for the table's classes and
attributes. It may rely on this:

- `table.classes` and `table.attributes` are the names, `table.known()` the attributes of the training (M, K), NaN where
  unknown: what `AttributeHead` takes its units from. `table.require(column)` refuses a table in which it is not filled.
- Its batches are `Patches`: some of the training as `augmented` makes them, with `synthesise=augmented`, and all of the
  validation and of the test as they are. `loss` and `measure` must take attributes that are NaN, labels that are
  `UNKNOWN` and no masks, unless `own` requires the column.
- `publish` is to say what the network learnt from: see `MedXAILib.training.own_bundle`.

For a network that is built and asked as `LungNoduleClassifier` is, `own=partial(lung_nodule.own, kind=..., layer=...)`
is all that is needed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from MedXAILib.errors import MedXAIError, unknown
from MedXAILib.grid import middle
from MedXAILib.model import Model, Prepared
from MedXAILib.region import cut
from MedXAILib.run import Run
from MedXAILib.table import Row, read_rows
from MedXAILib.training.bundle import Grid
from MedXAILib.volume import load_volume
from MedXAILib.within import mask_on

COLUMNS = ("volume", "region", "label", "patient", "split", "report", "segmentation")
"""With a meaning of their own; every other column is an attribute."""
SPLITS = ("train", "validation", "test")
UNKNOWN = -100
"""The label where there is none: what PyTorch's cross-entropy passes over."""

_DEALT = ("train", "validation", "test", "train", "train")
_SHIFT = 4
"""Voxels by which a patch of the training is moved at most, along each axis."""


@dataclass(frozen=True)
class Case:
    """A row of the table, understood. `region` in RAS mm, `attributes` NaN where unknown."""

    row: Row
    volume: Path
    region: tuple[float, float, float] | None
    label: int
    attributes: tuple[float, ...]
    segmentation: Path | None
    patient: str
    split: str


@dataclass(frozen=True)
class Patches:
    """What is learnt from.

    `images` (N, 1, D, H, W) float32 in 0..1 as a network gets them, `labels` (N,) indices of classes or `UNKNOWN`,
    `attributes` (N, K), NaN where unknown, `masks` of the shape of the images (bool), empty where a row has none, or
    None when no row has one, `reports` N texts.
    """

    images: Tensor
    labels: Tensor
    attributes: Tensor
    masks: Tensor | None
    reports: Sequence[str]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Table:
    """A table of cases for networks that see `grid`."""

    path: Path
    cases: tuple[Case, ...]
    classes: tuple[str, ...]
    attributes: tuple[str, ...]
    grid: Grid

    def require(self, column: str) -> None:
        """Refuse a table in which `column` is not filled.

        Raises:
            MedXAIError: naming the first row where it is not.
        """
        for case in self.cases:
            if not case.row[column]:
                raise case.row.wrong(column, "it is empty, and this network learns from it: fill it in.")

    def of(self, split: str) -> list[Case]:
        """The cases of a split."""
        return [case for case in self.cases if case.split == split]

    def known(self) -> Tensor:
        """The attributes of the cases of the training (M, K), NaN where unknown."""
        return torch.tensor([case.attributes for case in self.of("train")])

    def read(self, run: Run) -> dict[str, Patches]:
        """The patches by split. Each scan is read once; those of the training are larger than the grid by what
        `augmented` may move them.

        Raises:
            MedXAIError: naming the row whose scan cannot be read, or has nothing in that place.
        """
        model = Model(nn.Identity(), preprocessing=self.grid.transforms(), channels=1, spatial_dims=3, name="It")
        found: dict[str, list[_Part]] = {split: [] for split in SPLITS}
        path, whole = None, None
        # The rows of one scan follow each other.
        for done, case in enumerate(sorted(self.cases, key=lambda case: (case.volume, case.row.number))):
            run.step(done, len(self.cases), "Reading scans")
            column = "volume"
            try:
                if whole is None or path != case.volume:
                    path, whole = case.volume, model.prepare(load_volume(case.volume))
                column = "region"
                seen = self._cut(case, whole)
                column = "segmentation"
                mask = None if case.segmentation is None else load_volume(case.segmentation)
            except MedXAIError as error:
                raise case.row.wrong(column, str(error)) from error
            found[case.split].append(
                (case, seen.x.clone(), None if mask is None else mask_on(seen, mask, seen.x.shape[1:]))
            )
        masked = any(case.segmentation is not None for case in self.cases)
        return {split: _together(parts, masked) for split, parts in found.items()}

    def _cut(self, case: Case, whole: Prepared) -> Prepared:
        """The patch as `Model.prepare` of a network of this grid cuts it, with what it needs to be moved."""
        moved = self.grid.size + 2 * _SHIFT
        region = case.region
        if region is None:
            if max(whole.x.shape[1:]) > moved:
                reach = self.grid.size * self.grid.spacing_mm
                raise MedXAIError(f"the network looks at {reach:.0f} mm and the scan is larger: say where, as x y z.")
            region = tuple(middle(whole.x.shape[1:], whole.affine))
        size = moved if case.split == "train" else self.grid.size
        return Prepared(*cut(whole.x, whole.affine, region, (size,) * 3))

    def by_name(self, guessed: Tensor, told: Tensor, patches: Patches) -> dict[str, float]:
        """The share of each class that `guessed` (N,) recognises, and the mean absolute error of the attributes `told`
        (N, K); NaN where there are none."""
        right = guessed == patches.labels
        found = {f"recall: {name}": right[patches.labels == i] for i, name in enumerate(self.classes)}
        wrong = (told - patches.attributes).abs().T
        found |= {f"error: {name}": one[~one.isnan()] for name, one in zip(self.attributes, wrong, strict=True)}
        return {name: float(values.float().mean()) for name, values in found.items()}


def fingerprint(patches: Mapping[str, Patches]) -> str:
    """A hash of all that is learnt from, and of what it is tested on."""
    digest = hashlib.sha256()
    for part in patches.values():
        digest.update(repr(part.reports).encode())
        for tensor in (part.images, part.labels, part.attributes, part.masks):
            digest.update(b"" if tensor is None else tensor.numpy().tobytes())
    return digest.hexdigest()[:16]


_Part = tuple[Case, Tensor, Tensor | None]


def read_table(
    path: str | Path, grid: Grid | None = None, classes: Sequence[str] | None = None, seed: int = 0
) -> Table:
    """A CSV file of cases to train on, a row for each place in a scan, with the columns

    - `volume`: a file or DICOM folder; its path begins where the table is;
    - `region`: "x y z" in RAS mm, the middle of the patch; may be left out where a scan is no larger than a patch;
    - `label`: the name of a class, or its index;
    - `patient`: who it is of, if there are several scans of one. Without, every scan is of another patient;
    - `split`: train, validation or test. Without, patients are dealt out by `seed` and label, 3 : 1 : 1;
    - `report`: text; `segmentation`: a mask, non-zero where the finding is;
    - and any other: numbers, which are attributes that the network is to tell as well. Empty is unknown.

    Args:
        classes: their names, in the order of the network's outputs. Without, those in the table in alphabetical order.

    Raises:
        MedXAIError: naming the row and the column that is wrong, and what would be right.
    """
    path = Path(path)
    rows = read_rows(path)
    columns = rows[0].cells
    attributes = tuple(name for name in columns if name not in COLUMNS)
    told = [row["label"] for row in rows if row["label"]]
    names = tuple(classes) if classes is not None else _names(told)
    labels = [_label(row, names) for row in rows]
    patients = [_patient(row, "patient" in columns) for row in rows]
    splits = [_split(row) for row in rows] if "split" in columns else _dealt(patients, labels, seed)
    cases = tuple(
        Case(
            row=row,
            volume=row.volume,
            region=row.point("region"),
            label=label,
            attributes=tuple(_attribute(row, name) for name in attributes),
            segmentation=row.file("segmentation"),
            patient=patient,
            split=split,
        )
        for row, label, patient, split in zip(rows, labels, patients, splits, strict=True)
    )
    table = Table(path, cases, names, attributes, grid if grid is not None else Grid())
    _check_apart(cases)
    _check_enough(table)
    return table


def augmented(patches: Patches, count: int, seed: int) -> Patches:
    """`count` of the patches of the training, each moved by up to 5 mm at a spacing of 1.25 and flipped, or not."""
    generator = Generator().manual_seed(seed)
    chosen = torch.randperm(len(patches), generator=generator)[:count]
    starts = torch.randint(2 * _SHIFT + 1, (len(chosen), 3), generator=generator).tolist()
    flips = (torch.rand(len(chosen), 3, generator=generator) < 0.5).tolist()
    size = patches.images.shape[-1] - 2 * _SHIFT

    def moved(whole: Tensor) -> Tensor:
        parts = []
        for one, start, flip in zip(whole[chosen], starts, flips, strict=True):
            part = one[(slice(None), *(slice(low, low + size) for low in start))]
            parts.append(part.flip([axis for axis, yes in enumerate(flip, 1) if yes]))
        return torch.stack(parts)

    return Patches(
        moved(patches.images),
        patches.labels[chosen],
        patches.attributes[chosen],
        None if patches.masks is None else moved(patches.masks),
        [patches.reports[i] for i in chosen.tolist()],
    )


def _together(parts: Sequence[_Part], masked: bool) -> Patches:
    cases, images, masks = zip(*parts, strict=True)
    nothing = torch.zeros_like(images[0], dtype=torch.bool)
    return Patches(
        torch.stack(images),
        torch.tensor([case.label for case in cases]),
        torch.tensor([case.attributes for case in cases]),
        torch.stack([nothing if mask is None else mask[None] for mask in masks]) if masked else None,
        [case.row["report"] for case in cases],
    )


def _names(labels: Sequence[str]) -> tuple[str, ...]:
    if all(label.isdecimal() for label in labels):
        # No more than can be learnt: it may be a column of numbers that are no labels.
        return tuple(str(index) for index in range(1 + min(max(map(int, labels), default=-1), len(labels))))
    return tuple(sorted(set(labels)))


def _label(row: Row, classes: Sequence[str]) -> int:
    label = row["label"]
    if label in classes:
        return list(classes).index(label)
    if label.isdecimal() and int(label) < len(classes):
        return int(label)
    if label:
        raise row.wrong("label", str(unknown("class", label, classes)))
    return UNKNOWN


def _attribute(row: Row, name: str) -> float:
    try:
        return row.number_in(name)
    except MedXAIError as error:
        raise MedXAIError(f"{error} Columns other than {', '.join(COLUMNS)} are attributes.") from error


def _patient(row: Row, told: bool) -> str:
    if told and not row["patient"]:
        raise row.wrong("patient", "it is empty: name the patient in every row, or leave the column out.")
    return row["patient"] or str((row.table.parent / row["volume"]).resolve())


def _split(row: Row) -> str:
    if row["split"] not in SPLITS:
        raise row.wrong("split", str(unknown("split", row["split"], SPLITS)))
    return row["split"]


def _dealt(patients: Sequence[str], labels: Sequence[int], seed: int) -> list[str]:
    """The split of each row: patients are dealt out at random, those with the same highest label after each other."""
    highest: dict[str, int] = {}
    for patient, label in zip(patients, labels, strict=True):
        highest[patient] = max(label, highest.get(patient, UNKNOWN))
    names = sorted(highest)
    order = torch.randperm(len(names), generator=Generator().manual_seed(seed)).tolist()
    ranked = sorted((names[i] for i in order), key=highest.__getitem__)
    split = {patient: _DEALT[place % len(_DEALT)] for place, patient in enumerate(ranked)}
    return [split[patient] for patient in patients]


def _check_apart(cases: Sequence[Case]) -> None:
    """Nobody may be in two splits: what was learnt by heart would pass for what was understood."""
    scans: dict[Path, Case] = {}
    patients: dict[str, Case] = {}
    for case in cases:
        other = scans.setdefault(case.volume.resolve(), case)
        if other.patient != case.patient:
            raise case.row.wrong(
                "patient", f"in row {other.row.number} this scan is of '{other.patient}': correct one."
            )
        other = patients.setdefault(case.patient, case)
        if other.split != case.split:
            raise case.row.wrong(
                "split",
                f"in row {other.row.number} this patient is of the split '{other.split}': all rows of a patient belong "
                "to one split, or the test would be of what was learnt by heart.",
            )


def _check_enough(table: Table) -> None:
    for split in SPLITS:
        if not table.of(split):
            raise MedXAIError(
                f"'{table.path}' has no row for the split '{split}': give scans of at least three patients, and every "
                "split some rows if there is a column 'split'."
            )
    if len(table.classes) == 1:
        raise MedXAIError(f"Every label of '{table.path}' is '{table.classes[0]}': give at least two classes.")
    learnt = {case.label for case in table.of("train")}
    for index, name in enumerate(table.classes):
        if index not in learnt:
            raise MedXAIError(
                f"No row of the split 'train' of '{table.path}' has the label '{name}': give more cases of it, or deal "
                "them out with a column 'split'."
            )
    for name, unknown_ in zip(table.attributes, table.known().isnan().all(0), strict=True):
        if unknown_:
            raise MedXAIError(f"No row of the split 'train' of '{table.path}' has the attribute '{name}': fill it in.")
