"""A map as a DICOM Parametric Map: its own values, on the slices it is of."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from MedXAILib.explanation import SaliencyMap
from MedXAILib.export import made_by
from MedXAILib.export.series import Series

if TYPE_CHECKING:
    from highdicom.pm import ParametricMap


def parametric_map(series: Series, saliency_map: SaliencyMap, series_number: int) -> ParametricMap:
    """The map (1 or C, D, H, W; channels are summed) of the scan in `series`, in float32.

    Raises:
        MedXAIError: when it is not on the grid of the series.
    """
    from highdicom import VOILUTTransformation
    from highdicom.pm import ParametricMap, RealWorldValueMapping
    from pydicom.sr.codedict import codes

    made = saliency_map.provenance
    values = saliency_map.data.sum(0).numpy().astype(np.float32)
    series.check(values.shape, saliency_map.affine)
    largest = float(f"{max(float(np.abs(values).max()), 1e-12):.6g}")
    low = -largest if saliency_map.signed else 0.0
    about = made_by.long_string(f"{made.title or made.method}: {made.target_label}")
    mapping = RealWorldValueMapping(
        lut_label="attribution",
        lut_explanation=about,
        unit=codes.UCUM.NoUnits,
        value_range=(float(values.min()), float(values.max())),
        slope=1.0,
        intercept=0.0,
        quantity_definition=made_by.coded("Attribution"),
    )
    found = ParametricMap(
        source_images=series.slices,
        pixel_array=values,
        contains_recognizable_visual_features=False,
        real_world_value_mappings=[mapping],
        # A window of the plain kind is at least 1 wide, and maps are often smaller.
        voi_lut_transformations=[
            VOILUTTransformation((low + largest) / 2, largest - low, voi_lut_function="LINEAR_EXACT")
        ],
        content_label=re.sub(r"[^A-Z0-9]+", "_", made.method.upper())[:16],
        content_description=about,
        series_description=about,
        **made_by.instance(series_number),
        **made_by.equipment(made),
    )
    # Empty where the series does not say which side it is of; it may not be missing.
    found.Laterality = series.slices[0].get("Laterality", "")
    return found
