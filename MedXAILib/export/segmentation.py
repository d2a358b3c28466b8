"""The hot spots of a map as a DICOM Segmentation, a segment for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from MedXAILib.explanation import SaliencyMap
from MedXAILib.export import made_by
from MedXAILib.export.series import Series
from MedXAILib.hotspots import HotSpot

if TYPE_CHECKING:
    from highdicom.seg import Segmentation


def segmentation(
    series: Series, saliency_map: SaliencyMap, spots: Sequence[HotSpot], series_number: int
) -> Segmentation:
    """Hot spots of the map as segments, in the order of `spots`, none of which is empty.

    Raises:
        MedXAIError: when the map is not on the grid of the series.
    """
    from highdicom import UID
    from highdicom.seg import Segmentation, SegmentationTypeValues, SegmentDescription
    from pydicom.sr.codedict import codes

    made = saliency_map.provenance
    shape = tuple(saliency_map.data.shape[1:])
    series.check(shape, saliency_map.affine)
    masks = np.zeros((*shape, len(spots)), np.uint8)
    for i, spot in enumerate(spots):
        box = tuple(slice(low, low + size) for low, size in zip(spot.corner, spot.mask.shape, strict=True))
        masks[..., i][box] = spot.mask
    segments = [
        SegmentDescription(
            segment_number=i,
            segment_label=spot.name,
            # What a network looked at is a place. It is no anatomy, and no finding.
            segmented_property_category=codes.SCT.SpatialAndRelationalConcept,
            segmented_property_type=made_by.coded("Hot spot of an attribution"),
            algorithm_type="AUTOMATIC",
            algorithm_identification=made_by.algorithm(made),
            tracking_uid=UID(),
            tracking_id=made_by.long_string(f"{made.method} {made.target_label} {spot.share:.0%}"),
        )
        for i, spot in enumerate(spots, 1)
    ]
    about = made_by.long_string(f"Hot spots of {made.title or made.method}: {made.target_label}")
    return Segmentation(
        source_images=series.slices,
        pixel_array=masks,
        segmentation_type=SegmentationTypeValues.BINARY,
        segment_descriptions=segments,
        content_label="HOT_SPOTS",
        content_description=about,
        series_description=about,
        **made_by.instance(series_number),
        **made_by.equipment(made),
    )
