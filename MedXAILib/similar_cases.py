"""Similar cases: other scans that look alike to a network, and where the likeness lies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import SimpleITK as sitk
from torch import Tensor

from MedXAILib.caption import Point, check_place
from MedXAILib.errors import MedXAIError
from MedXAILib.explanation import Explanation, ImageFormat
from MedXAILib.volume import Volume

Role = Literal["alike", "unlike", "mistaken", "helpful", "harmful", "prototype"]
"""Why a case is shown: the network says the same of it, or otherwise; it is wrong about it; learning from it spoke for
what is said of the scan, or against; or it is where a prototype of the network comes from."""


@dataclass(frozen=True, eq=False)
class Case:
    """A case that says something about the one explained.

    `uid` tells it from the others, `label` is what is known about it, and `similarity` is the greater the more alike it
    is, or what the explanation calls its score. `role` says why it is shown, `numbers` has what else is known of it by
    name (points, diameter ...), and `note` is a sentence for people. `source` says where its whole scan is; `volume` is
    the part that was compared, `place` (RAS mm) and `map` (1, D, H, W) where in it the likeness lies; `query_map` is
    where in the scan explained: of one channel, the part of that scan's own grid outside which there is none.
    """

    uid: str
    label: str
    similarity: float
    source: str | None = None
    place: Point | None = None
    volume: Volume | None = None
    map: Tensor | None = None
    role: Role = "alike"
    note: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)
    query_map: Volume | None = None


@dataclass(frozen=True, eq=False)
class SimilarCases(Explanation):
    """Which: cases like this one, the most similar first, and what in it they are like.

    `scored` says what their similarity is ("cosine similarity", "influence on the logit", "points"), `text` sums up.
    `query_map` is float32, (1, D, H, W), on the volume's own grid; `affine` takes its index (d, h, w) to RAS mm.

    Raises:
        MedXAIError: when two cases are one, or one has a similarity, place or map that cannot be.
    """

    cases: tuple[Case, ...]
    query_map: Tensor | None = None
    affine: np.ndarray | None = None
    scored: str = "similarity"
    text: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "cases", tuple(self.cases))
        uids = [case.uid for case in self.cases]
        for case in self.cases:
            if not case.uid or uids.count(case.uid) > 1:
                raise MedXAIError(f"{uids.count(case.uid)} cases are called '{case.uid}': give each a name of its own.")
            _check(case)
        if self.query_map is not None and (self.affine is None or self.query_map.ndim != 4 or len(self.query_map) != 1):
            raise MedXAIError("The map of the query is (1, D, H, W), with the affine of its grid: give both.")

    @property
    def whole_map(self) -> Volume | None:
        """`query_map` in its place."""
        return None if self.query_map is None or self.affine is None else Volume(self.query_map, self.affine)

    def _write(self, folder: Path, image_format: ImageFormat) -> dict[str, Any]:
        files: list[str] = []

        def written(volume: Volume | None, name: str) -> int | None:
            if volume is None:
                return None
            files.append(f"{name}.{image_format}")
            sitk.WriteImage(volume.to_sitk(), str(folder / files[-1]), useCompression=True)
            return len(files) - 1

        said: dict[str, Any] = {
            "scored": self.scored,
            "text": self.text,
            "query_map": written(self.whole_map, "query-map"),
            "cases": [],
        }
        for i, case in enumerate(self.cases):
            said["cases"].append(
                {
                    "uid": case.uid,
                    "label": case.label,
                    "similarity": case.similarity,
                    "source": case.source,
                    "place": case.place,
                    "volume": written(case.volume, f"case-{i}"),
                    "map": written(_map(case), f"case-{i}-map"),
                    "role": case.role,
                    "note": case.note,
                    "numbers": dict(case.numbers),
                    "query_map": written(case.query_map, f"query-{i}-map"),
                }
            )
        return {"files": files, **said, "affine": None if self.affine is None else self.affine.tolist()}

    @classmethod
    def _read(cls, folder: Path, manifest: dict[str, Any], common: dict[str, Any]) -> SimilarCases:
        def read(index: int | None, source: str | None = None) -> Volume | None:
            if index is None:
                return None
            return Volume.from_sitk(sitk.ReadImage(str(folder / manifest["files"][index])), source)

        def values(index: int | None) -> Tensor | None:
            found = read(index)
            return None if found is None else found.data

        cases = []
        for said in manifest["cases"]:
            known = {
                "place": said["place"] and tuple(said["place"]),
                "volume": read(said["volume"], said["source"]),
                "map": values(said["map"]),
                "query_map": read(said["query_map"]),
            }
            cases.append(Case(**{**said, **known}))
        return cls(
            **common,
            cases=tuple(cases),
            scored=manifest["scored"],
            text=manifest["text"],
            query_map=values(manifest["query_map"]),
            affine=None if manifest["affine"] is None else np.array(manifest["affine"]),
        )


def _map(case: Case) -> Volume | None:
    return None if case.map is None or case.volume is None else Volume(case.map, case.volume.affine)


def _check(case: Case) -> None:
    for name, number in (("similarity", case.similarity), *case.numbers.items()):
        if not math.isfinite(number):
            raise MedXAIError(f"The {name} of the case '{case.uid}' is {number}: give a finite number.")
    if case.map is not None and (case.volume is None or tuple(case.map.shape) != (1, *case.volume.shape)):
        raise MedXAIError(f"The map of the case '{case.uid}' is not on the grid of its volume: give (1, D, H, W).")
    if case.query_map is not None and len(case.query_map.data) != 1:
        raise MedXAIError(f"The query map of the case '{case.uid}' has {len(case.query_map.data)} channels: give one.")
    check_place(case.place, f"the case '{case.uid}'")
