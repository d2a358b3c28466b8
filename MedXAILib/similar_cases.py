"""Similar cases: other scans that look alike to a network, and where the likeness lies."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from torch import Tensor

from MedXAILib.caption import Point, check_place
from MedXAILib.errors import MedXAIError
from MedXAILib.explanation import Explanation, ImageFormat
from MedXAILib.volume import Volume


@dataclass(frozen=True, eq=False)
class Case:
    """A case that is like the one explained.

    `uid` tells it from the others, `label` is what is known about it, and `similarity` is the greater the more alike it
    is. `source` says where its whole scan is; `volume` is the part that was compared, `place` (RAS mm) and `map`
    (1, D, H, W) where in it the likeness lies.
    """

    uid: str
    label: str
    similarity: float
    source: str | None = None
    place: Point | None = None
    volume: Volume | None = None
    map: Tensor | None = None


@dataclass(frozen=True, eq=False)
class SimilarCases(Explanation):
    """Which: cases like this one, the most similar first, and what in it they are like.

    `query_map` is float32, (1, D, H, W), on the volume's own grid; `affine` takes its index (d, h, w) to RAS mm.

    Raises:
        MedXAIError: when two cases are one, or one has a similarity, place or map that cannot be.
    """

    cases: tuple[Case, ...]
    query_map: Tensor | None = None
    affine: np.ndarray | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "cases", tuple(self.cases))
        uids = [case.uid for case in self.cases]
        for case in self.cases:
            if not case.uid or uids.count(case.uid) > 1:
                raise MedXAIError(f"{uids.count(case.uid)} cases are called '{case.uid}': give each a name of its own.")
            _check(case)
        if self.query_map is not None and (self.affine is None or self.query_map.ndim != 4 or len(self.query_map) != 1):
            raise MedXAIError("The query's map is (1, D, H, W), with its affine: give both, or neither.")

    def _write(self, folder: Path, image_format: ImageFormat) -> dict[str, Any]:
        files: list[str] = []

        def written(volume: Volume | None, name: str) -> int | None:
            if volume is None:
                return None
            files.append(f"{name}.{image_format}")
            sitk.WriteImage(volume.to_sitk(), str(folder / files[-1]), useCompression=True)
            return len(files) - 1

        query = None if self.query_map is None or self.affine is None else Volume(self.query_map, self.affine)
        said: dict[str, Any] = {"query_map": written(query, "query-map"), "cases": []}
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
                }
            )
        return {"files": files, **said, "affine": None if self.affine is None else self.affine.tolist()}

    @classmethod
    def _read(cls, folder: Path, manifest: dict[str, Any], common: dict[str, Any]) -> SimilarCases:
        def read(index: int | None, source: str | None = None) -> Volume | None:
            if index is None:
                return None
            return Volume.from_sitk(sitk.ReadImage(str(folder / manifest["files"][index])), source)

        cases = []
        for said in manifest["cases"]:
            volume, of_map = read(said["volume"], said["source"]), read(said["map"])
            known = {
                "place": said["place"] and tuple(said["place"]),
                "volume": volume,
                "map": None if of_map is None else of_map.data,
            }
            cases.append(Case(**{**said, **known}))
        query = read(manifest["query_map"])
        return cls(
            **common,
            cases=tuple(cases),
            query_map=None if query is None else query.data,
            affine=None if manifest["affine"] is None else np.array(manifest["affine"]),
        )


def _map(case: Case) -> Volume | None:
    return None if case.map is None or case.volume is None else Volume(case.map, case.volume.affine)


def _check(case: Case) -> None:
    if not math.isfinite(case.similarity):
        raise MedXAIError(f"The similarity of the case '{case.uid}' is {case.similarity}: give a finite number.")
    if case.map is not None and (case.volume is None or tuple(case.map.shape) != (1, *case.volume.shape)):
        raise MedXAIError(f"The map of the case '{case.uid}' is not on the grid of its volume: give (1, D, H, W).")
    check_place(case.place, f"the case '{case.uid}'")
