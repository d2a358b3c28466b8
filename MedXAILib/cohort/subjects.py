"""Where the cases of a cohort come from: a table, a BIDS folder, or a tree of DICOM series."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from MedXAILib.cohort.plan import Subject
from MedXAILib.errors import MedXAIError
from MedXAILib.table import Row, read_rows

_KNOWN = ("uid", "volume", "region", "target", "transform", "anatomy")
_IMAGES = (".nii", ".nii.gz")


def find_subjects(source: str | Path, suffix: str = "") -> list[Subject]:
    """The cases in `source`:

    - a CSV file, a row for each, with the columns `volume` and, if wanted, `uid`, `region` ("x y z", RAS mm), `target`,
      `transform`, `anatomy` (a mask), and any other, such as site, scanner, sex or age, by which results can be split;
    - a BIDS folder: its images, those that end in `suffix` ("T1w"), with what `participants.tsv` knows;
    - a folder of DICOM files, however deep: every series.

    Raises:
        MedXAIError: when there is no case.
    """
    source = Path(source)
    if source.is_file():
        found = [_of_row(row) for row in read_rows(source)]
    elif (source / "dataset_description.json").exists():
        found = list(_of_bids(source, suffix))
    elif source.is_dir():
        found = list(_of_dicom(source))
    else:
        raise MedXAIError(f"There is no '{source}': give a table, a BIDS folder or a folder of DICOM series.")
    if not found:
        raise MedXAIError(f"'{source}' holds no case: give a table, a BIDS folder or a folder of DICOM series.")
    return found


def _of_row(row: Row) -> Subject:
    transform, anatomy = row.file("transform"), row.file("anatomy")
    return Subject(
        uid=row["uid"] or f"row-{row.number}",
        volume=(str(row.volume.resolve()),),
        region=row.point("region"),
        target=row["target"] or None,
        transform=None if transform is None else str(transform.resolve()),
        anatomy=None if anatomy is None else str(anatomy.resolve()),
        meta={name: cell for name, cell in row.cells.items() if name not in _KNOWN},
    )


def _of_bids(folder: Path, suffix: str) -> Iterator[Subject]:
    known = _participants(folder / "participants.tsv")
    for path in sorted(folder.glob("sub-*/**/*")):
        stem = next((path.name[: -len(end)] for end in reversed(_IMAGES) if path.name.endswith(end)), None)
        if stem is None or not stem.endswith(f"_{suffix}" if suffix else ""):
            continue
        entities = dict(part.split("-", 1) for part in stem.split("_") if "-" in part)
        participant = f"sub-{entities.get('sub', '')}"
        meta = {**known.get(participant, {}), "participant": participant, "suffix": stem.rpartition("_")[2]}
        # Not resolved itself: in DataLad's data sets, files are links to others, whose names say nothing.
        yield Subject(uid=stem, volume=(str(path.parent.resolve() / path.name),), meta=meta)


def _participants(path: Path) -> dict[str, dict[str, str]]:
    if not path.exists():
        return {}
    # What BIDS calls not available is not known.
    return {
        row["participant_id"]: {k: v for k, v in row.cells.items() if k != "participant_id" and v != "n/a"}
        for row in read_rows(path, "participant_id")
    }


def _of_dicom(folder: Path) -> Iterator[Subject]:
    from SimpleITK import ImageSeriesReader

    for place in sorted({path.parent for path in folder.rglob("*") if path.is_file()}):
        series = ImageSeriesReader.GetGDCMSeriesIDs(str(place))
        if len(series) == 1:
            name = place.relative_to(folder).as_posix()
            yield Subject(uid=series[0] if name == "." else name, volume=(str(place.resolve()),))
        elif series:
            raise MedXAIError(f"'{place}' holds {len(series)} DICOM series: move each to a folder of its own.")
