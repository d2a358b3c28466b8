"""Libraries of cases from scans: each is embedded by a network, one at a time."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from MedXAILib import resources
from MedXAILib.cases.library import Embedder, Library
from MedXAILib.cases.record import SCAN, Record
from MedXAILib.cases.similarity import Metric
from MedXAILib.cases.spaces import SPACES, Plain, fingerprint, said
from MedXAILib.errors import Cancelled, MedXAIError, OutOfMemory
from MedXAILib.grid import middle
from MedXAILib.model import Model, Prepared
from MedXAILib.report.montage import View
from MedXAILib.run import Run
from MedXAILib.table import Row, read_rows
from MedXAILib.volume import Volume, load_volume

COLUMNS = ("volume", "region", "label", "patient", "uid", "report", "segmentation")
"""Of a table, with a meaning of their own, or none here; every other column becomes meta."""

THUMBNAIL = 96
"""Pixels along each side."""

# What was embedded is written so often, in seconds, and in so many cases at most.
_SECONDS, _CASES = 10.0, 64
# Of patches, so many are embedded at once.
_VOXELS = 16 * 40**3


@dataclass(frozen=True)
class Source:
    """A case to be: which scan, where in it, and what is known. `stored` is what is kept of the scan's path."""

    uid: str
    patient: str
    volume: Path
    stored: str = ""
    region: tuple[float, float, float] | None = None
    label: str = ""
    meta: Mapping[str, float | str] = field(default_factory=dict)


_Seen = tuple[Source, Prepared]


def build(
    model: Model,
    table: str | Path,
    out: str | Path,
    run: Run,
    identifiers: bool = False,
    paths: bool = True,
    again: bool = False,
) -> Library:
    """A library at `out` of the scans in a CSV file, or those of them added that it lacks: so it goes on where it was
    interrupted. A scan that cannot be read is left out, with a note.

    The table has a row for each place in a scan, with the columns `volume` (a file or DICOM folder; its path begins
    where the table is), `region` ("x y z" in RAS mm, the middle of what a patch network looks at), `label`, `patient`
    and `uid`; without the last two, every scan is of another patient, and the place in it is the name. `report` and
    `segmentation` are not kept, and any other column is, as number or text.

    Args:
        identifiers: whether patients and uids are kept as they are in the table, rather than as pseudonyms.
        paths: whether it is kept where the scans are, which it takes to look at them. Paths may name patients.
        again: whether cases that are there are embedded again.

    Raises:
        MedXAIError: when the table is wrong, the library is another network's, or no scan at all can be read.
    """
    rows = read_rows(Path(table))
    first: dict[str, int] = {}
    for row in rows:
        if (known := first.setdefault(_source(row, str, paths).uid, row.number)) != row.number:
            raise row.wrong("uid", f"this is the case of row {known} again: give each a uid of its own.")
    library = opened(out, model, (_source(row, str, paths) for row in rows), run)
    named = str if identifiers else library.pseudonym
    telling = [row for row in rows if paths and not identifiers and _tells(row)]
    if telling:
        run.note(
            f"The paths of {len(telling)} of the {len(rows)} scans have the patient or the uid in them, and the "
            "library keeps them: move the scans, or leave the paths out."
        )
    fill(library, model, [_source(row, named, paths) for row in rows], run, again)
    return library


def opened(path: str | Path, model: Model, sources: Iterable[Source], run: Run) -> Library:
    """The library at `path`, or a new one, for a network that embeds such `sources`.

    Raises:
        MedXAIError: when it is another network's.
    """
    if not Library.is_at(path):
        return Library.create(path, _embedder(model, sources, run))
    library = Library.open(path)
    library.require(fingerprint(model), "give another folder")
    return library


def fill(library: Library, model: Model, sources: Sequence[Source], run: Run, again: bool = False) -> None:
    """Add the cases that a library lacks, or all of them `again`, a scan at a time; see `build`."""
    known = set() if again else set(library.uids())
    wanted = [source for source in sources if source.uid not in known]
    failed: list[MedXAIError] = []

    def left_out(error: MedXAIError) -> None:
        if isinstance(error, (Cancelled, OutOfMemory)):
            raise error
        failed.append(error)
        run.note(f"Left out: {error}")

    ready: list[Record] = []
    done, written = 0, time.monotonic()
    try:
        with model.ready(run.device), model.keeping_last():
            for group in _groups(model, wanted, left_out):
                run.step(done + len(failed), len(wanted), "Embedding the scans")
                for part in _embeddable(model, group, list(library.embedder.spaces), left_out):
                    ready += part
                    done += len(part)
                if len(ready) >= _CASES or time.monotonic() - written > _SECONDS:
                    library.add(ready)
                    ready, written = [], time.monotonic()
    except (Cancelled, KeyboardInterrupt):
        # What was done is not done in vain.
        library.add(ready)
        raise
    library.add(ready)
    if failed and len(failed) == len(wanted):
        raise MedXAIError(f"None of the {len(wanted)} scans can be embedded. The first: {failed[0]}") from failed[0]
    library.compact()
    library.index(run)


def _groups(model: Model, sources: Iterable[Source], left_out: Callable[[MedXAIError], None]) -> Iterator[list[_Seen]]:
    """What the network sees of each scan, those of one shape together."""
    # Rows of one scan often follow each other.
    load = lru_cache(maxsize=1)(load_volume)
    group: list[_Seen] = []
    for source in sources:
        try:
            scan = load(source.volume)
            seen = model.prepare(scan, source.region)
        except MedXAIError as error:
            left_out(error)
            continue
        full = (len(group) + 1) * seen.x.numel() > _VOXELS
        if group and (full or seen.x.shape != group[0][1].x.shape):
            yield group
            group = []
        group.append((replace(source, meta={**source.meta, SCAN: scan.fingerprint}), seen))
    if group:
        yield group


def _embeddable(
    model: Model, group: Sequence[_Seen], spaces: Sequence[str], left_out: Callable[[MedXAIError], None]
) -> Iterator[list[Record]]:
    """The records of a group: all together, or each alone where one cannot be embedded."""
    try:
        yield _records(model, group, spaces)
    except MedXAIError as error:
        if len(group) == 1:
            left_out(error)
            return
        for one in group:
            yield from _embeddable(model, [one], spaces, left_out)


def _source(row: Row, named: Callable[[str], str], paths: bool) -> Source:
    volume = row.table.parent / row["volume"]
    return Source(
        uid=named(row["uid"] or " ".join([row["volume"], row["region"]]).strip()),
        patient=named(row["patient"] or row["volume"]),
        volume=volume,
        stored=str(volume.absolute()) if paths else "",
        region=row.point("region"),
        label=row["label"],
        meta={name: _value(row, name) for name, cell in row.cells.items() if cell and name not in COLUMNS},
    )


def _value(row: Row, name: str) -> float | str:
    try:
        number = float(row[name])
    except ValueError:
        return row[name]
    return number if math.isfinite(number) else row[name]


def _tells(row: Row) -> bool:
    """Whether the path of a scan says whose it is."""
    return any(row[name] and row[name] in row["volume"] for name in ("patient", "uid"))


def _embedder(model: Model, sources: Iterable[Source], run: Run) -> Embedder:
    """What embeds by `model`: into all spaces that apply to the first of `sources` that can be read."""
    failed: MedXAIError | None = None
    for source in sources:
        try:
            seen = model.prepare(load_volume(source.volume), source.region)
        except MedXAIError as error:
            failed = failed or error
            continue
        found: dict[str, tuple[int, Metric]] = {}
        for name, space in SPACES.items():
            try:
                found[name] = space.embed(model, seen.x[None], [source.label]).shape[1], space.metric
            except MedXAIError as error:
                # A network embeds into "plain", or not at all; the other spaces are not for every one.
                if name == "plain":
                    raise
                run.note(f"Without the space '{name}': {error}")
        return Embedder(fingerprint(model), _named(model), model.name, found)
    raise MedXAIError(f"None of the scans can be read. The first: {failed}") from failed


def _named(model: Model) -> str:
    """How the network is found again: the name of one that ships with MedXAI, or where it came from."""
    named = str(model.source or "")
    source = Path(named)
    if source.parent == resources.path("Models"):
        return source.name
    return str(source.absolute()) if named and source.exists() else named


def _records(model: Model, group: Sequence[_Seen], spaces: Sequence[str]) -> list[Record]:
    x = torch.stack([seen.x for _, seen in group])
    labels = [source.label for source, _ in group]
    with model.ready() as device, torch.no_grad():
        answers = said(model, model.forward(x.to(device, model.dtype)).float().cpu())
    vectors = {space: SPACES[space].embed(model, x, labels).numpy() for space in spaces}
    regions = Plain().regions(model, x).numpy()
    return [
        Record(
            uid=source.uid,
            patient=source.patient,
            label=source.label,
            said=answers[i],
            vectors={space: values[i] for space, values in vectors.items()},
            regions=regions[i],
            meta=source.meta,
            volume=source.stored,
            region=source.region,
            thumbnail=thumbnail(seen),
        )
        for i, (source, seen) in enumerate(group)
    ]


def thumbnail(seen: Prepared, channel: int = 0) -> bytes:
    """The axial plane through the middle of what a network sees, in its own grey values, as PNG."""
    shape = np.array(seen.x.shape[1:])
    # A plain image has no place in the patient: it is shown as it is stored.
    stored = seen.affine[:-1, :-1][:, ::-1] / np.array(seen.spacing)[::-1]
    axes = stored if len(shape) == 2 else np.diag([-1.0, -1.0, 1.0])
    size = float(max(shape * seen.spacing))
    image = Volume(seen.x[channel : channel + 1], seen.affine).to_sitk()
    low, high = (float(end) for end in seen.x[channel].aminmax())
    plane = View("Axial", axes, middle(shape.tolist(), seen.affine), size / THUMBNAIL, THUMBNAIL).sample(image, low)
    grey = (255 * (plane.astype(float) - low) / max(high - low, 1e-6)).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(grey).save(file, "PNG")
    return file.getvalue()
