"""What was told otherwise than with one map, made ready for people: a page with its pictures."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from MedXAILib.caption import Caption
from MedXAILib.concept_scores import ConceptScores
from MedXAILib.explanation import Explanation, ImageFormat
from MedXAILib.model import Prediction
from MedXAILib.report import cases, rules, traversal, words
from MedXAILib.report.case import PAGE
from MedXAILib.report.methods import question, title
from MedXAILib.report.page import RESEARCH_ONLY, checks, document, image, listed, provenance, said, trusted
from MedXAILib.report.sheet import Sheet
from MedXAILib.rule_set import RuleSet
from MedXAILib.similar_cases import SimilarCases
from MedXAILib.traversal import Traversal
from MedXAILib.trust.card import TrustCard
from MedXAILib.volume import Volume

_SHEETS: dict[type[Explanation], Callable[[Volume, Any], Sheet]] = {
    Caption: words.of_caption,
    ConceptScores: words.of_concepts,
    SimilarCases: cases.of_cases,
    Traversal: traversal.of_traversal,
    RuleSet: rules.of_rules,
}


def write_told(
    folder: Path,
    volume: Volume,
    told: Explanation,
    prediction: Prediction | None = None,
    card: TrustCard | None = None,
    image_format: ImageFormat = "nrrd",
) -> None:
    """Fill the empty `folder` with an explanation of `volume` that is not one map, its card, pictures and page."""
    told.save(folder, image_format)
    if card is not None:
        card.save(folder)
    write_told_page(folder, volume, told, prediction, card)


def write_told_page(
    folder: Path,
    volume: Volume,
    told: Explanation,
    prediction: Prediction | None = None,
    card: TrustCard | None = None,
) -> None:
    """Write the pictures and the page alone."""
    sheet = _SHEETS[type(told)](volume, told)
    for figure in sheet.figures:
        figure.image.save(folder / f"{figure.name}.png", optimize=True)
    (folder / PAGE).write_text(told_page(told, sheet, prediction, card), encoding="utf-8")


def told_page(
    told: Explanation, sheet: Sheet, prediction: Prediction | None = None, card: TrustCard | None = None
) -> str:
    """The HTML page, UTF-8."""
    made = told.provenance
    name = title(made.method)
    asked = f"{name}, asked of {made.model.get('name') or 'a network'} about "
    asked += Path(made.volume.get("source") or "a scan").name
    asks = f"{name} asks: {question(made.method)}"
    parts = [
        f"<h1>{escape(sheet.heading)}</h1>",
        f"<p class=lead>{escape(asked)}.</p>",
        f"<p class=warning>{RESEARCH_ONLY}</p>",
        sheet.body,
        said(prediction, made.target_label),
        *(f"<h2>{escape(f.heading)}</h2><figure>{image(f.image, f.of)}</figure>" for f in sheet.figures),
        trusted(card),
        f"<h2>How to read it</h2>{listed([asks, *sheet.reading])}",
        checks(told),
        provenance(told),
    ]
    return document(f"{sheet.heading}: {name}", parts, _STYLE + sheet.style, made.created)


_STYLE = """
.told { font-size: 1.2rem; line-height: 1.6; }
.wide { overflow-x: auto; } .wide td { white-space: nowrap; } .head td { color: var(--faint); font-size: .85rem; }
"""
