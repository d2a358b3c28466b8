"""An explanation as DICOM objects, beside the series that was explained: maps, their hot spots, and a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from MedXAILib.caption import Caption
from MedXAILib.concept_scores import ConceptScores
from MedXAILib.errors import MedXAIError
from MedXAILib.explanation import Explanation, SaliencyMap, map_of, written_whole
from MedXAILib.export.parametric_map import parametric_map
from MedXAILib.export.segmentation import segmentation
from MedXAILib.export.series import read_series
from MedXAILib.export.structured_report import structured_report
from MedXAILib.hotspots import find
from MedXAILib.similar_cases import SimilarCases
from MedXAILib.trust.card import TrustCard

REPORT = "report.dcm"
# Far above the numbers that scanners give.
_FIRST_SERIES = 9100


def write_dicom(explanation: Explanation, source: Path, folder: Path, card: TrustCard | None = None) -> list[Path]:
    """Write `explanation` to `folder`, whole or not at all, as results of the DICOM series in `source`.

    Each of its maps becomes a Parametric Map (`map-0.dcm` ...) and a Segmentation of its hot spots (`hot-spots-0.dcm`
    ...), and all that is told a Structured Report (`report.dcm`, TID 1500) that refers to the hot spots.

    Raises:
        MedXAIError: when the explanation is of another grid than the series, or of a batch; when highdicom is missing,
            or the folder cannot be written.
    """
    maps = _maps(explanation)
    series = read_series(source)
    voxel = abs(float(np.linalg.det(series.affine[:3, :3])))
    written: dict[str, Any] = {}
    spots = []
    for i, one in enumerate(maps):
        number = _FIRST_SERIES + 2 * i
        written[f"map-{i}.dcm"] = parametric_map(series, one, number)
        found = [spot for spot in find(one.data.sum(0).numpy()) if spot.voxels]
        if found:
            made = segmentation(series, one, found, number + 1)
            written[f"hot-spots-{i}.dcm"] = made
            spots.append((made, found, voxel))
    written[REPORT] = structured_report(series, explanation, spots, card, _FIRST_SERIES + 2 * len(maps))
    with written_whole(folder, REPORT) as fresh:
        for name, dataset in written.items():
            dataset.save_as(fresh / name)
    return [folder / name for name in written]


def _maps(explanation: Explanation) -> list[SaliencyMap]:
    if isinstance(explanation, SaliencyMap):
        if explanation.batched:
            raise MedXAIError("This explanation is of a batch of scans: export the map of each scan.")
        return [explanation]
    if isinstance(explanation, Caption | ConceptScores):
        return explanation.seen()
    if isinstance(explanation, SimilarCases) and explanation.query_map is not None and explanation.affine is not None:
        return [map_of(explanation, explanation.query_map[0], explanation.affine, explanation.scored)]
    return []
