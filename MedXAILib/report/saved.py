"""The page of an explanation that was saved before, without one or with a former one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from MedXAILib.errors import MedXAIError
from MedXAILib.explanation import Explanation, SaliencyMap, load_explanation
from MedXAILib.report.case import PAGE, PRINTED, show, write_map_page
from MedXAILib.report.told import write_told_page
from MedXAILib.trust.card import load_card
from MedXAILib.volume import Volume, load_volume


def write_page(
    folder: str | Path,
    volume: str | Path | Sequence[str | Path] | None = None,
    segmentation: str | Path | None = None,
    printed: bool = False,
) -> Path:
    """Write the page, its pictures, and if wanted its PDF, of the explanation and the trust card in `folder` there,
    whole or not at all. A former page is replaced; nothing else in the folder is touched.

    `volume` is the file, folder or files (channels) of the scan that was explained; without, it is read from where it
    was then. `segmentation` is outlined and compared with the map. What the network said is not known any more.

    Raises:
        MedXAIError: when there is no explanation, the scan is missing or another, a segmentation is given for what is
            not one map, or the page cannot be written.
    """
    folder = Path(folder)
    explanation, card = load_explanation(folder), load_card(folder)
    mask = None if segmentation is None else load_volume(segmentation)
    if mask is not None and not isinstance(explanation, SaliencyMap):
        raise MedXAIError(f"The explanation in '{folder}' is not one map to compare: leave the segmentation out.")
    scan = _explained(explanation, volume)
    try:
        with TemporaryDirectory(prefix=".page-", dir=folder) as beside:
            fresh = Path(beside)
            if isinstance(explanation, SaliencyMap):
                write_map_page(fresh, show(scan, explanation, segmentation=mask, card=card))
            else:
                write_told_page(fresh, scan, explanation, card=card)
            if printed:
                from MedXAILib.report.pdf import print_page

                print_page(fresh)
            for file in fresh.iterdir():
                file.replace(folder / file.name)
        if not printed:
            # That of a former page would say something else.
            (folder / PRINTED).unlink(missing_ok=True)
    except OSError as error:
        raise MedXAIError(
            f"'{folder}' cannot be written ({error.strerror}): free some space, or give leave."
        ) from error
    return folder / PAGE


def _explained(explanation: Explanation, volume: str | Path | Sequence[str | Path] | None) -> Volume:
    """The scan that was explained, and no other."""
    made = explanation.provenance.volume
    source = made.get("source")
    if volume is None:
        if not source or not Path(source).exists():
            raise MedXAIError(f"The scan that was explained, '{source}', is not there: give the scan as well.")
        volume = source
    scan = load_volume(volume)
    # In Slicer's matrices no zero has a sign, in SimpleITK's some have.
    unsigned = replace(scan, affine=scan.affine.round(6) + 0.0)
    if made.get("fingerprint") not in (scan.fingerprint, unsigned.fingerprint):
        raise MedXAIError(
            f"'{scan.source}' is not the scan that was explained, '{source}' (its voxels or their place differ): give "
            "that one, all its files if it had several."
        )
    return scan
