"""What an explanation says as a flat table: a row for each hot spot, region, concept, case, word, rule and step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from scipy import ndimage  # type: ignore[import-untyped]

from MedXAILib.caption import Caption, Point
from MedXAILib.concept_scores import ConceptScores
from MedXAILib.errors import MedXAIError
from MedXAILib.explanation import Explanation, SaliencyMap
from MedXAILib.export.maps import maps
from MedXAILib.grid import transform
from MedXAILib.hotspots import HotSpot, find
from MedXAILib.placeless import without_folders
from MedXAILib.registry import EXPLAINERS
from MedXAILib.report.localisation import peak
from MedXAILib.rule_set import RuleSet
from MedXAILib.similar_cases import SimilarCases
from MedXAILib.table import write_rows
from MedXAILib.traversal import Traversal
from MedXAILib.visual.supervoxel_method import BySupervoxels

Row = dict[str, Any]

COLUMNS = {
    "case": "the scan that was explained",
    "method": "the method of explanation",
    "kind": "what the row is about: a hot spot, region, concept, case, word, rule, step or text",
    "target": "what is explained: the answer, or the concept or words that a map is of",
    "name": "what it is called; of a rule and of a text, what it says",
    "x": "mm to the right (RAS): of a hot spot its peak, of a region its middle, of a word where it is seen, of a case "
    "where in its own scan the likeness lies",
    "y": "mm to the front (RAS)",
    "z": "mm up (RAS)",
    "voxels": "how many voxels it has",
    "volume_ml": "how large it is, in ml",
    "share": "of a hot spot the part of all positive values that it holds; of a region its part of all absolute values",
    "threshold": "the least value in a hot spot",
    "value": "the mean value of a region; what is measured or predicted of a concept; what is explained, at a step",
    "maximum": "the largest value in a hot spot",
    "mean": "the mean value in a hot spot",
    "unit": "of the value of a concept",
    "score": "of a concept, case or word: see scored",
    "scored": "what the score is",
    "interval": "half the width of the 95 % confidence interval of the score",
    "layer": "where in the network a concept was looked for",
    "role": "why a case is shown",
    "label": "what is known of a case",
    "note": "what else is said of it, or why it has no score",
    "start": "the first character of a word in the text, from 0",
    "says": "what the network says where a rule holds",
    "applies": "whether a rule holds for this scan",
    "scope": "of a rule: all scans, or this case and those near it",
    "completeness": "the share of all cases that a rule covers",
    "correctness": "the share of those it covers of which the network says so",
    "truth": "the share of those it covers whose label says so",
    "cases": "how many cases a rule covers",
    "position": "of a step, 0 being the scan",
    "strange": "whether no scan that the generative network learnt from is like a step",
}
"""What the columns mean; any other has its own name."""

# Relative to the largest value: what is laid on another grid is not equal to the last bit within one supervoxel.
_EQUAL = 1e-5
# The part of a map that has to lie in whole supervoxels.
_WHOLE = 0.9


def rows(explanation: Explanation) -> Iterator[Row]:
    """All that there is, with `kind`, `target` and whichever of `COLUMNS` and others belong to it.

    Raises:
        MedXAIError: when it is of a batch of scans.
    """
    for one in maps(explanation):
        yield from (of_spot(one, spot) for spot in spots(one))
        yield from regions(one)
    yield from told(explanation)


def write_table(path: Path, explained: Iterable[tuple[str, Explanation]]) -> int:
    """Write the `rows` of explanations, each with the name of its case, as one CSV file; returns how many.

    Raises:
        MedXAIError: when it cannot be written, or an explanation is of a batch.
    """
    found = [{"case": case, "method": one.provenance.method, **row} for case, one in explained for row in rows(one)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_rows(path, heads := columns(found), ([cell(row.get(head)) for head in heads] for row in found))
    except OSError as error:
        raise MedXAIError(f"'{path}' cannot be written ({error.strerror}): give another file.") from error
    return len(found)


def columns(found: Iterable[Row]) -> list[str]:
    """The columns that any row has something in: those known first."""
    there = dict.fromkeys(name for row in found for name, value in row.items() if value not in (None, ""))
    return [name for name in COLUMNS if name in there] + [name for name in there if name not in COLUMNS]


def cell(value: Any) -> str:
    """A value as text in one line, without the folders that it names; "" of what is not known."""
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else without_folders(" ".join(str(value).split()))


def spots(one: SaliencyMap) -> list[HotSpot]:
    """The hot spots of a map, summed over its channels, that are not empty."""
    return [spot for spot in find(one.data.sum(0).numpy()) if spot.voxels]


def told(explanation: Explanation) -> Iterator[Row]:
    """What is said otherwise than with maps."""
    target = explanation.provenance.target_label
    for row in _KINDS.get(type(explanation), lambda _: iter(()))(explanation):
        yield {"kind": row.pop("kind"), "target": target, **row}
    if explanation.in_words:
        yield {"kind": "text", "target": target, "name": explanation.in_words}


def of_spot(one: SaliencyMap, spot: HotSpot) -> Row:
    """A hot spot, as a row."""
    return {
        "kind": "hot spot",
        "target": one.provenance.target_label,
        "name": spot.name,
        **_at(peak(one)),
        **_size(one, spot.voxels),
        "share": spot.share,
        "threshold": spot.threshold,
        "mean": spot.mean,
        "maximum": spot.maximum,
    }


def regions(one: SaliencyMap) -> Iterator[Row]:
    """The supervoxels of a method that gives each one value, the largest value first; neighbours of one value are one
    region. None where the network looks at the scan on another grid: on the way back, supervoxels blend."""
    kind = EXPLAINERS.get(one.provenance.method)
    values = one.data.sum(0).numpy().astype(np.float64)
    if kind is None or not issubclass(kind, BySupervoxels) or not values.any():
        return
    near, size = _EQUAL * np.abs(values).max(), np.abs(values)
    image = sitk.GetImageFromArray(values)
    labels = sitk.GetArrayFromImage(sitk.ScalarConnectedComponent(image, near, False))
    labels[size <= near] = 0
    # A layer that is blended on the way from one to the next has no voxel whose neighbours are all alike.
    around = ndimage.generate_binary_structure(values.ndim, 1)
    low, high = (f(values, footprint=around) for f in (ndimage.minimum_filter, ndimage.maximum_filter))
    whole = np.isin(labels, np.unique(labels[high - low <= near]))
    if size[whole].sum() < _WHOLE * size.sum():
        return
    known, voxels = np.unique(labels[labels > 0], return_counts=True)
    means = ndimage.mean(values, labels, known)
    middles = transform(one.affine, np.array(ndimage.center_of_mass(labels > 0, labels, known)))
    for i in np.argsort(-np.abs(means), kind="stable").tolist():
        yield {
            "kind": "region",
            "target": one.provenance.target_label,
            "name": f"region {known[i]}",
            **_at(middles[i]),
            **_size(one, int(voxels[i])),
            "share": float(abs(means[i]) * voxels[i] / size.sum()),
            "value": float(means[i]),
        }


def _of_concepts(found: ConceptScores) -> Iterator[Row]:
    for one in found.concepts:
        yield {
            "kind": "concept",
            "name": one.name,
            "value": one.value,
            "unit": one.unit,
            "score": one.score,
            "scored": found.scored,
            "interval": one.interval,
            "layer": one.layer,
            "note": one.refused,
            **_named(one.numbers),
            **{f"weight for {name}": weight for name, weight in one.weights.items()},
        }


def _of_cases(found: SimilarCases) -> Iterator[Row]:
    for one in found.cases:
        yield {
            "kind": "case",
            "name": one.uid,
            **_at(one.place),
            "score": one.similarity,
            "scored": found.scored,
            "role": one.role,
            "label": one.label,
            "note": one.note,
            **_named(one.numbers),
        }


def _of_words(found: Caption) -> Iterator[Row]:
    for one in found.words:
        known = {"score": one.confidence, "scored": "confidence"} if one.confidence is not None else {}
        yield {"kind": "word", "name": one.text, **_at(one.place), **known, "start": one.start, **_named(one.numbers)}


def _of_rules(found: RuleSet) -> Iterator[Row]:
    for one in found.rules:
        known = ("says", "applies", "scope", "completeness", "correctness", "truth", "cases")
        intervals = {
            f"{name}_{end}": value
            for name in ("completeness", "correctness")
            for end, value in zip(("low", "high"), getattr(one, f"{name}_interval") or (), strict=False)
        }
        yield {"kind": "rule", "name": one.sentence, **{name: getattr(one, name) for name in known}, **intervals}


def _of_steps(found: Traversal) -> Iterator[Row]:
    for one in found.steps:
        yield {
            "kind": "step",
            "name": found.along,
            "value": one.value,
            "position": one.position,
            "strange": one.strange,
            **{f"score of {name}": score for name, score in one.scores.items()},
            **_named(one.numbers),
        }


_KINDS: dict[type[Explanation], Any] = {
    ConceptScores: _of_concepts,
    SimilarCases: _of_cases,
    Caption: _of_words,
    RuleSet: _of_rules,
    Traversal: _of_steps,
}


def _named(numbers: Mapping[str, float]) -> Row:
    """Numbers by their own names, which are no others' here."""
    return {f"{name} (its own)" if name in COLUMNS else name: value for name, value in numbers.items()}


def _at(place: Point | np.ndarray | tuple[float, ...] | None) -> Row:
    return {} if place is None else {axis: round(float(mm), 4) for axis, mm in zip("xyz", place, strict=False)}


def _size(one: SaliencyMap, voxels: int) -> Row:
    axes = one.affine[:-1, :-1]
    volume = {"volume_ml": voxels * abs(float(np.linalg.det(axes))) / 1000} if len(axes) == 3 else {}
    return {"voxels": voxels, **volume}
