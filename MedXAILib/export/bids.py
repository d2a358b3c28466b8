"""Explanations as a BIDS derivative data set: maps, hot spots and tables beside the scans that they are of."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from MedXAILib import __version__
from MedXAILib.cohort.intervals import whose
from MedXAILib.cohort.plan import Subject
from MedXAILib.errors import MedXAIError
from MedXAILib.explanation import Explanation, SaliencyMap, written_whole
from MedXAILib.export.maps import maps
from MedXAILib.export.rows import COLUMNS, Row, cell, columns, of_spot, regions, spots, told
from MedXAILib.hotspots import HotSpot
from MedXAILib.placeless import placeless, without_folders
from MedXAILib.report.page import RESEARCH_ONLY
from MedXAILib.table import inert
from MedXAILib.volume import Volume

DESCRIPTION = "dataset_description.json"
VERSION = "1.10.0"
MAP, INTERVAL = "attrmap", "attrinterval"

_NAME = re.compile(r"(sub-[0-9a-zA-Z+]+(?:_[a-zA-Z]+-[0-9a-zA-Z+]+)*)_([0-9a-zA-Z]+)")
# For which BIDS has a suffix for segmentations, and the entities that may be in their names.
_SEGMENTED = ("anat", "dwi", "func")
_ENTITIES = ("sub", "ses", "task", "acq", "ce", "rec", "run", "echo", "part", "chunk", "space", "res", "desc")
# What BIDS itself says of participants.
_OF_BIDS = ("participant_id", "species", "strain", "strain_rrid", "sex", "handedness", "age")
_UNITS = {"x": "mm", "y": "mm", "z": "mm", "volume_ml": "mL"}


def write_bids(explained: Iterable[tuple[Subject, Explanation]], folder: Path) -> Path:
    """Write explanations, each with the case that it is of, as a data set in `folder`, whole or not at all.

    A scan that has a name as BIDS gives them keeps its participant, session and other entities; any other is of the
    participant that its columns `patient` or `participant` name, or its uid, in `anat`.

    Raises:
        MedXAIError: when the folder holds another data set or cannot be written, or an explanation is of a batch.
    """
    _check_former(folder)
    with written_whole(folder, DESCRIPTION) as fresh:
        made = _DataSet(fresh, folder.resolve())
        for subject, explanation in explained:
            made.add(subject, explanation)
        made.close()
    return folder


def label(*parts: str) -> str:
    """Letters and digits that stand for `parts`, and for no others: words of small letters are joined; where more than
    that would be lost, a hash is added."""
    words = [word for part in parts for word in re.split("[^0-9a-zA-Z]+", part) if word]
    joined = "".join(words[:1] + [word[0].upper() + word[1:] for word in words[1:]])
    plain = all(re.fullmatch("[0-9a-z]+", part) for part in parts) and len(joined) <= 40
    if plain and not re.search("X[0-9a-f]{8}$", joined):
        return joined
    return f"{joined[:32]}X{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]}"


@dataclass
class _Place:
    """Where in a data set the results of a scan belong, and under which names."""

    prefix: str
    folder: Path
    entities: list[str]
    suffix: str = ""
    more: list[str] = field(default_factory=list)


class _DataSet:
    """A derivative data set that is written to `fresh` and will be in `folder`."""

    def __init__(self, fresh: Path, folder: Path) -> None:
        self._fresh, self._folder = fresh, folder
        self._sources: dict[Path, str] = {}
        self._participants: dict[str, list[Subject]] = {}
        self._own_names = False
        self._descriptions: dict[str, str] = {}
        self._unknown = {f"*_{suffix}.*" for suffix in (MAP, INTERVAL)}

    def add(self, subject: Subject, explanation: Explanation) -> None:
        """Write what is said of a case."""
        place, made = self._place(subject), explanation.provenance
        about = self._about(subject, explanation)
        placed = maps(explanation)
        often = Counter(one.provenance.target_label for one in placed)
        for i, one in enumerate(placed):
            of = one.provenance.target_label
            name = self._named(place, one, *[f"map {i}"] * (often[of] > 1 or not of))
            told_of = {**about, "Target": of, "Description": f"{made.title or made.method}: what speaks for {of}"}
            self._map(name, one, told_of)
            self._table(name, "regions", list(regions(one)), told_of)
        name = self._named(place, explanation)
        for kind, rows in groupby(told(explanation), lambda row: row["kind"]):
            self._table(name, f"{kind}s", list(rows), about)

    def close(self) -> None:
        """Write what is said of all of it."""
        description: dict[str, Any] = {
            "Name": "Explanations by MedXAI",
            "BIDSVersion": VERSION,
            "DatasetType": "derivative",
            "GeneratedBy": [{"Name": "MedXAI", "Version": __version__, "Description": RESEARCH_ONLY}],
        }
        links = {name: link for root, name in self._sources.items() if (link := _link(root, self._folder))}
        if self._sources:
            description["SourceDatasets"] = [_source(root, links.get(name)) for root, name in self._sources.items()]
        if links:
            description["DatasetLinks"] = links
        _write_json(self._fresh / DESCRIPTION, description)
        _write_text(self._fresh / "README.md", _README)
        _write_text(self._fresh / ".bidsignore", "\n".join(sorted(self._unknown)) + "\n")
        rows = [{"desc_id": f"desc-{name}", "description": what} for name, what in sorted(self._descriptions.items())]
        _write_tsv(self._fresh / "descriptions.tsv", rows, ["desc_id", "description"])
        if self._own_names:
            rows = [_participant(*one) for one in self._participants.items()]
            heads = list(dict.fromkeys(name for row in rows for name in row))
            _write_tsv(self._fresh / "participants.tsv", rows, heads)
            meant = {**dict.fromkeys(heads, "As in the table of cases"), "uid": "The cases of this participant"}
            known = {name: {"Description": meant[name]} for name in heads if name not in _OF_BIDS}
            _write_json(self._fresh / "participants.json", known)

    def _place(self, subject: Subject) -> _Place:
        path = Path(subject.volume[0])
        stem = path.name.partition(".")[0]
        found = _NAME.fullmatch(stem)
        if found is None:
            participant, self._own_names = f"sub-{label(whose(subject))}", True
            self._participants.setdefault(participant, []).append(subject)
            more = [] if whose(subject) == subject.uid else [f"case {subject.uid}"]
            return _Place(participant, Path(participant) / "anat", ["sub"], more=more)
        parts = [part.split("-") for part in found[1].split("_")]
        kept = [f"{entity}-{value}" for entity, value in parts if entity != "desc"]
        folders = [part for part in kept if part[:4] in ("sub-", "ses-")]
        self._participants.setdefault(folders[0], []).append(subject)
        datatype = path.parent.name if path.parent.parent.name == folders[-1] else "anat"
        more = [f"of {value}" for entity, value in parts if entity == "desc"]
        more += [] if subject.uid == stem else [f"case {subject.uid}"]
        return _Place("_".join(kept), Path(*folders, datatype), [entity for entity, _ in parts], found[2], more)

    def _named(self, place: _Place, one: Explanation, *which: str) -> Path:
        """The path of a result without its suffix."""
        made, more = one.provenance, [*place.more, *which]
        desc = label(*made.method.split("_"), made.target_label, *more) + place.suffix[:1].upper() + place.suffix[1:]
        words = [made.target_label, *more, *[f"of {place.suffix} images"] * bool(place.suffix)]
        self._descriptions[desc] = f"{made.title or made.method}: {', '.join(words)}"
        if place.folder.name not in _SEGMENTED or not set(place.entities) <= set(_ENTITIES):
            # BIDS has no segmentations of such images.
            self._unknown.add(f"{place.prefix}_desc-{desc}_dseg.*")
        (self._fresh / place.folder).mkdir(parents=True, exist_ok=True)
        return self._fresh / place.folder / f"{place.prefix}_desc-{desc}"

    def _about(self, subject: Subject, explanation: Explanation) -> dict[str, Any]:
        """What a sidecar says of how a result was made, in names like those of BIDS; no folders."""
        made = explanation.provenance
        sources = [uri for file in subject.volume if (uri := self._uri(Path(file)))]
        return {
            "Description": f"{made.title or made.method}: {made.target_label}",
            **({"Sources": sources} if sources else {}),
            "Case": placeless(subject.uid),
            "Target": made.target_label,
            "Method": made.method,
            "Parameters": placeless(made.parameters),
            "Region": made.region,
            "Network": placeless(made.model),
            "ScanFingerprint": made.volume["fingerprint"],
            "Seed": made.seed,
            "Device": made.device,
            "Versions": made.versions,
            "Created": made.created,
            "Missed": explanation.residual,
            "Partial": made.partial,
            "Notes": [without_folders(note) for note in made.notes],
            "Use": RESEARCH_ONLY,
        }

    def _uri(self, file: Path) -> str | None:
        """The BIDS URI of a scan that is in a BIDS data set."""
        # As it is named: in DataLad's data sets, files are links to others.
        file = file.parent.resolve() / file.name
        root = next((one for one in file.parents if (one / DESCRIPTION).is_file()), None)
        if root is None or _NAME.fullmatch(file.name.partition(".")[0]) is None:
            return None
        name = self._sources.setdefault(root, f"source{len(self._sources) or ''}")
        return f"bids:{name}:{file.relative_to(root).as_posix()}"

    def _map(self, name: Path, one: SaliencyMap, about: Mapping[str, Any]) -> None:
        image = Volume(one.data.sum(0, keepdim=True), one.affine).to_sitk()
        summed = {"Channels": f"the sum of {len(one.data)}"} if len(one.data) > 1 else {}
        _write_image(name, MAP, image, {**about, "Units": "arbitrary", "Signed": one.signed, **summed})
        if one.interval is not None and len(one.interval) == 1:
            half = Volume(one.interval, one.affine).to_sitk()
            what = {"Description": "Half the width of the 95 % confidence interval of each voxel of the map"}
            _write_image(name, INTERVAL, half, {**about, **what, "Units": "arbitrary"})
        found = spots(one)
        if not found:
            return
        labels = sitk.GetImageFromArray(_nested(one, found))
        labels.CopyInformation(image)
        rows = [{"index": i, **of_spot(one, spot)} for i, spot in enumerate(found, 1)]
        what = {"Description": "Hot spots of the map, one within the other: each is the voxels of its index and more"}
        _write_image(
            name,
            "dseg",
            labels,
            {**about, **what, "Manual": False, "SpatialReference": "orig", **_dictionary(_heads(rows))},
        )
        _write_tsv(_file(name, "dseg", ".tsv"), rows, _heads(rows))

    def _table(self, name: Path, suffix: str, rows: list[Row], about: Mapping[str, Any]) -> None:
        if rows:
            self._unknown.add(f"*_{suffix}.*")
            _write_tsv(_file(name, suffix, ".tsv"), rows, _heads(rows))
            _write_json(_file(name, suffix, ".json"), {**about, **_dictionary(_heads(rows))})


def _nested(one: SaliencyMap, found: Iterable[HotSpot]) -> np.ndarray:
    """The number of the smallest hot spot that each voxel is in, from 1; 0 outside of all."""
    labels = np.zeros(one.data.shape[1:], np.uint8)
    for i, spot in enumerate(found, 1):
        box = tuple(slice(low, low + size) for low, size in zip(spot.corner, spot.mask.shape, strict=True))
        labels[box][spot.mask] = i
    return labels


def _participant(name: str, cases: list[Subject]) -> Row:
    # What differs between scans is not the participant's.
    alike = {k: v for k, v in cases[0].meta.items() if all(one.meta.get(k) == v for one in cases)}
    known = {k: v for k, v in alike.items() if k not in ("participant_id", "uid")}
    return {"participant_id": name, "uid": "; ".join(dict.fromkeys(one.uid for one in cases)), **placeless(known)}


def _link(root: Path, folder: Path) -> str | None:
    """The way from the data set in `folder` to that in `root`, if it names no more than the latter's own folder."""
    try:
        way = Path(os.path.relpath(root, folder))
    except ValueError:
        # They are on two drives of Windows.
        return None
    return way.as_posix() if set(way.parts[:-1]) <= {".."} else None


def _source(root: Path, link: str | None) -> dict[str, str]:
    try:
        said = json.loads((root / DESCRIPTION).read_text(encoding="utf-8"))
        known = {"DOI": said["DatasetDOI"]} if "DatasetDOI" in said else {}
    except (ValueError, TypeError):
        known = {}
    return {**({"URL": link} if link else {}), **known}


def _check_former(folder: Path) -> None:
    """A data set that is not of MedXAI is never replaced."""
    path = folder / DESCRIPTION
    if path.exists() and '"Name": "MedXAI"' not in path.read_text(encoding="utf-8", errors="replace"):
        raise MedXAIError(f"'{folder}' holds another data set: choose a folder of its own, such as derivatives/medxai.")


def _heads(rows: Iterable[Row]) -> list[str]:
    """The columns of a table, what is called first."""
    first = ("index", "name")
    return sorted((name for name in columns(rows) if name != "kind"), key=lambda name: (*first, name).index(name))


def _dictionary(heads: Iterable[str]) -> dict[str, Any]:
    """What the columns of a table mean."""
    return {
        name: {"Description": COLUMNS.get(name, name), **({"Units": _UNITS[name]} if name in _UNITS else {})}
        for name in heads
        if name != "index"
    }


def _file(name: Path, suffix: str, extension: str) -> Path:
    path = name.with_name(f"{name.name}_{suffix}{extension}")
    if path.exists():
        raise MedXAIError(f"Two results are called '{path.name}': export those of each data set by themselves.")
    return path


def _write_image(name: Path, suffix: str, image: sitk.Image, about: Mapping[str, Any]) -> None:
    sitk.WriteImage(image, str(_file(name, suffix, ".nii.gz")), useCompression=True)
    _write_json(_file(name, suffix, ".json"), about)


def _write_tsv(path: Path, rows: list[Row], heads: list[str]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        written = csv.writer(file, delimiter="\t", lineterminator="\n")
        cells = [heads, *([cell(row.get(head)) or "n/a" for head in heads] for row in rows)]
        written.writerows(map(inert, row) for row in cells)


def _write_json(path: Path, said: Mapping[str, Any]) -> None:
    _write_text(path, json.dumps(said, indent=2, ensure_ascii=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


_README = f"""# Explanations by MedXAI

Why a network says what it says about these scans. {RESEARCH_ONLY}

- `*_{MAP}.nii.gz`: where what speaks for (and, where it is signed, against) the answer lies, on the grid of the scan.
  The sidecar says what was explained, by which method, of which network.
- `*_{INTERVAL}.nii.gz`: half the width of the 95 % confidence interval of each voxel of an estimated map.
- `*_dseg.nii.gz`: the smallest sets of voxels that hold 50, 25 and 10 % of what speaks for the answer, one in the
  other: the first is every voxel of at least 1, the second of at least 2. The table of the same name measures them.
- Other tables: concepts, cases, words, rules, steps, and regions that have one value each.

`descriptions.tsv` says what `desc-` and a label stand for, `participants.tsv` (if there is one) whose the cases are.
Labels are of letters and digits; where something had to be left out of one, it ends in X and a hash of all of it.
"""
