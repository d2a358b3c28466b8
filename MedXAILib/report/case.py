"""One explanation made ready for people: map, picture and page in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from MedXAILib.explanation import ImageFormat, SaliencyMap
from MedXAILib.model import Prediction
from MedXAILib.report.localisation import localise
from MedXAILib.report.montage import montage
from MedXAILib.report.page import Shown, page
from MedXAILib.trust.card import TrustCard
from MedXAILib.volume import Volume

PICTURE, PAGE, PRINTED = "montage.png", "index.html", "report.pdf"


def show(
    volume: Volume,
    explanation: SaliencyMap,
    prediction: Prediction | None = None,
    segmentation: Volume | None = None,
    card: TrustCard | None = None,
) -> Shown:
    """The picture of a map of `volume`, how well it meets the segmentation if there is one, and its trust card."""
    met = None if segmentation is None else localise(explanation, segmentation)
    made = explanation.provenance
    # The value of a regression is not a probability.
    scores = {} if prediction is None or made.model.get("task") == "regression" else prediction.scores
    picture = montage(volume, explanation, segmentation, probability=scores.get(made.target_label))
    return Shown(explanation, picture, met, card)


def write(
    folder: Path,
    shown: Shown,
    prediction: Prediction | None = None,
    others: Sequence[Shown] = (),
    caution: str = "",
    image_format: ImageFormat = "nrrd",
) -> None:
    """Fill the empty `folder` with the map (NRRD, or NIfTI), its provenance, picture and page; each of `others` gets a
    folder inside. Give it the folder of `written_whole`, so that it appears complete or not at all."""
    _save(folder, shown, image_format)
    for other in others:
        beside = folder / other.explanation.provenance.method
        _save(beside, other, image_format)
        other.picture.save(beside / PICTURE, optimize=True)
    write_map_page(folder, shown, prediction, others, caution)


def write_map_page(
    folder: Path,
    shown: Shown,
    prediction: Prediction | None = None,
    others: Sequence[Shown] = (),
    caution: str = "",
) -> None:
    """Write the picture and the page alone."""
    shown.picture.save(folder / PICTURE, optimize=True)
    (folder / PAGE).write_text(page(shown, prediction, others, caution), encoding="utf-8")


def _save(folder: Path, shown: Shown, image_format: ImageFormat) -> None:
    shown.explanation.save(folder, image_format)
    if shown.card is not None:
        shown.card.save(folder)
