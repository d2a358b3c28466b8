"""An explanation as DICOM objects, beside the series that was explained: maps, their hot spots, and a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from MedXAILib.explanation import Explanation, written_whole
from MedXAILib.export.maps import maps
from MedXAILib.export.parametric_map import parametric_map
from MedXAILib.export.segmentation import segmentation
from MedXAILib.export.series import read_series
from MedXAILib.export.structured_report import structured_report
from MedXAILib.hotspots import find
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
    placed = maps(explanation)
    series = read_series(source)
    voxel = abs(float(np.linalg.det(series.affine[:3, :3])))
    written: dict[str, Any] = {}
    spots = []
    for i, one in enumerate(placed):
        number = _FIRST_SERIES + 2 * i
        written[f"map-{i}.dcm"] = parametric_map(series, one, number)
        found = [spot for spot in find(one.data.sum(0).numpy()) if spot.voxels]
        if found:
            made = segmentation(series, one, found, number + 1)
            written[f"hot-spots-{i}.dcm"] = made
            spots.append((made, found, voxel))
    written[REPORT] = structured_report(series, explanation, spots, card, _FIRST_SERIES + 2 * len(placed))
    with written_whole(folder, REPORT) as fresh:
        for name, dataset in written.items():
            dataset.save_as(fresh / name)
    return [folder / name for name in written]
