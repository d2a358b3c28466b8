"""An explanation as a DICOM Structured Report (TID 1500): hot spots measured, scores, words, cases, and how far to
trust them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from MedXAILib import __version__
from MedXAILib.concept_scores import ConceptScores
from MedXAILib.explanation import Explanation, Provenance
from MedXAILib.export import made_by
from MedXAILib.export.series import Series
from MedXAILib.hotspots import HotSpot
from MedXAILib.placeless import without_folders
from MedXAILib.report.page import RESEARCH_ONLY
from MedXAILib.rule_set import RuleSet
from MedXAILib.similar_cases import SimilarCases
from MedXAILib.trust.card import TrustCard
from MedXAILib.trust.finding import COLOURS

if TYPE_CHECKING:
    from highdicom.seg import Segmentation
    from highdicom.sr import Comprehensive3DSR

Spots = Sequence[tuple["Segmentation", Sequence[HotSpot], float]]
"""Segmentations with the hot spots that are their segments, and the volume of a voxel in mm³."""


def structured_report(
    series: Series, explanation: Explanation, spots: Spots, card: TrustCard | None, series_number: int
) -> Comprehensive3DSR:
    """The report, which refers to the slices of `series` and to the segments of `spots`."""
    from highdicom import UID
    from highdicom.sr import (
        Comprehensive3DSR,
        DeviceObserverIdentifyingAttributes,
        MeasurementReport,
        ObservationContext,
        ObserverContext,
    )
    from pydicom.sr.codedict import codes

    made = explanation.provenance
    device = DeviceObserverIdentifyingAttributes(UID(), "MedXAI", "MedXAI", "MedXAILib")
    content = MeasurementReport(
        observation_context=ObservationContext(observer_device_context=ObserverContext(codes.DCM.Device, device)),
        procedure_reported=made_by.coded("Explanation of a network's answer"),
        imaging_measurements=[
            _group(made, "Explanation", made.title or made.method, lines=_lines(explanation), found=_found(made, card)),
            *_hot_spots(made, spots),
            *_scores(explanation),
        ],
        title=codes.DCM.ImagingMeasurementReport,
    )
    return Comprehensive3DSR(
        evidence=[*series.slices, *(one for one, *_ in spots)],
        content=content[0],
        is_complete=True,
        series_description=made_by.long_string(f"{made.title or made.method}: {made.target_label}"),
        manufacturer=made_by.equipment(made)["manufacturer"],
        **made_by.instance(series_number),
    )


def _hot_spots(made: Provenance, spots: Spots) -> Iterator[Any]:
    from highdicom.sr import ReferencedSegment
    from pydicom.sr.codedict import codes

    for segmentation, found, voxel in spots:
        for number, spot in enumerate(found, 1):
            measured = [
                _measure(codes.SCT.Volume, spot.voxels * voxel / 1000, codes.UCUM.CubicCentimeter),
                _measure(made_by.coded("Attribution"), spot.mean, derivation=codes.SCT.Mean),
                _measure(made_by.coded("Attribution"), spot.maximum, derivation=codes.SCT.Maximum),
            ]
            segment = ReferencedSegment.from_segmentation(segmentation, number)
            yield _group(made, "Hot spot of an attribution", spot.name, measured, segment=segment)


def _scores(explanation: Explanation) -> Iterator[Any]:
    """A group for each concept, and for each case."""
    made = explanation.provenance
    if isinstance(explanation, ConceptScores):
        for concept in explanation.concepts:
            told = {explanation.scored: concept.score, "value": concept.value, **concept.numbers}
            lines = [concept.refused] if concept.score is None else []
            yield _group(made, "Concept", concept.name, _measured(told), lines=lines)
    if isinstance(explanation, SimilarCases):
        for case in explanation.cases:
            told = {explanation.scored: case.similarity, **case.numbers}
            found = {"Label of the case": case.label or "unknown", "Why it is shown": case.role}
            yield _group(made, "Case", case.uid, _measured(told), found=found, lines=[case.note])


def _lines(explanation: Explanation) -> list[str]:
    lines = [RESEARCH_ONLY, explanation.in_words, *map(without_folders, explanation.provenance.notes)]
    if isinstance(explanation, RuleSet):
        lines += [rule.sentence for rule in explanation.rules]
    return lines


def _found(made: Provenance, card: TrustCard | None) -> dict[str, str]:
    """The answer that was explained, and the lights of the trust card."""
    lights = {} if card is None else {one.title: COLOURS[one.light][0] for one in card.findings}
    return {"Answer that was explained": made.target_label, "Network": str(made.model.get("name")), **lights}


def _group(
    made: Provenance,
    finding: str,
    name: str,
    measured: Sequence[Any] = (),
    found: Mapping[str, str] | None = None,
    lines: Iterable[str] = (),
    segment: Any = None,
) -> Any:
    """A measurement group, of a segment or of the scan as a whole; `lines` are comments in it."""
    from highdicom import UID
    from highdicom.sr import (
        AlgorithmIdentification,
        MeasurementsAndQualitativeEvaluations,
        QualitativeEvaluation,
        TextContentItem,
        TrackingIdentifier,
        VolumetricROIMeasurementsAndQualitativeEvaluations,
    )
    from pydicom.sr.codedict import codes

    known: dict[str, Any] = {
        "tracking_identifier": TrackingIdentifier(UID(), made_by.long_string(name)),
        "finding_type": made_by.coded(finding),
        "algorithm_id": AlgorithmIdentification(made_by.long_string(made.title or made.method), __version__),
        "measurements": list(measured),
        "qualitative_evaluations": [
            QualitativeEvaluation(made_by.coded(what), made_by.coded(value)) for what, value in (found or {}).items()
        ],
    }
    group: Any = (
        MeasurementsAndQualitativeEvaluations(**known)
        if segment is None
        else VolumetricROIMeasurementsAndQualitativeEvaluations(**known, referenced_segment=segment)
    )
    for line in filter(None, lines):
        group[0].ContentSequence.append(TextContentItem(codes.DCM.Comment, line, "CONTAINS"))
    return group


def _measured(values: Mapping[str, float | None]) -> list[Any]:
    return [_measure(made_by.coded(name), value) for name, value in values.items() if value is not None]


def _measure(name: Any, value: float, unit: Any = None, derivation: Any = None) -> Any:
    from highdicom.sr import Measurement
    from pydicom.sr.codedict import codes

    # A decimal string has sixteen characters.
    return Measurement(name, float(f"{value:.7g}"), unit or codes.UCUM.NoUnits, derivation=derivation)
