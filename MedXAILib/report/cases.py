"""The page of similar cases: a card for each, with where in the scan and where in the case the likeness lies."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import groupby

import numpy as np
from PIL import Image

from MedXAILib.amount import amounts
from MedXAILib.explanation import map_of
from MedXAILib.grid import corners, middle, transform
from MedXAILib.report.localisation import extent, highest
from MedXAILib.report.montage import Look, montage
from MedXAILib.report.page import image
from MedXAILib.report.sheet import Figure, Sheet
from MedXAILib.similar_cases import Case, Role, SimilarCases
from MedXAILib.volume import Volume

TITLES: dict[Role, str] = {
    "alike": "The network says the same of these",
    "unlike": "The network says otherwise of these",
    "mistaken": "The network is wrong about these",
    "helpful": "Learning from these speaks for the answer",
    "harmful": "Learning from these speaks against the answer",
    "prototype": "Prototypes that the network compares with",
}
_SMALLEST_FIELD_MM = 40.0


def of_cases(volume: Volume, told: SimilarCases) -> Sheet:
    """The cases by the role they play, each beside the scan explained."""
    focus, field = _focus(volume, told)
    look = Look.at(volume, focus, field)
    parts = [f"<p class=told>{escape(told.text)}</p>"] if told.text else []
    ranked = sorted(told.cases, key=lambda case: list(TITLES).index(case.role))
    for role, cases in groupby(ranked, key=lambda case: case.role):
        cards = "".join(_card(volume, told, case, focus, look) for case in cases)
        parts.append(f"<h2>{TITLES[role]}</h2><div class=cases>{cards}</div>")
    figures = []
    if told.query_map is not None and told.affine is not None:
        seen = map_of(told, told.query_map[0], told.affine, told.scored)
        picture = montage(volume, seen, title=f"Where in the scan the {told.scored} lies")
        figures.append(Figure("query-map", "Where in the scan it lies", "Planes through the peak of the map", picture))
    reading = [
        "On each card the scan is on the left and the case on the right, through one window and at one scale; the "
        "patient's right is on the left. Colours show what in each of them counts for the number below, scaled to each "
        "map.",
        "The label is that of the case. A case that looks alike to the network may be another disease, and the network "
        "may be wrong about both.",
    ]
    return Sheet(f"Which cases speak of “{told.provenance.target_label}”?", "".join(parts), reading, figures, _STYLE)


def _card(volume: Volume, told: SimilarCases, case: Case, focus: Sequence[float], look: Look) -> str:
    seen = told.whole_map if case.query_map is None else case.query_map
    shown = [look.draw(volume, _through(focus, _peak(seen)), seen)]
    if case.volume is not None:
        centre = middle(case.volume.shape, case.volume.affine).tolist()
        shown.append(look.draw(case.volume, _through(centre, case.place), case.map))
    note = f"<p>{escape(case.note)}</p>" if case.note else ""
    seen_in = f"the scan and the case {case.uid}"
    known = f"{told.scored} {case.similarity:.3f}; {', '.join(amounts(case.numbers))}".removesuffix("; ")
    return (
        f"<div class=case>{image(_beside(shown), seen_in)}<h3>{escape(case.label)}</h3>"
        f"<p class=lead>{escape(case.uid)}</p>{note}<p class=numbers>{escape(known)}</p></div>"
    )


def _focus(volume: Volume, told: SimilarCases) -> tuple[Sequence[float], float]:
    """Where in the scan to look, in RAS mm, and how much of it to show."""
    region = told.provenance.region
    rank = len(volume.shape)
    focus = middle(volume.shape, volume.affine) if region is None else np.reshape(region, (-1, rank)).mean(0)
    parts = [case.volume for case in told.cases if case.volume is not None]
    box = None if told.query_map is None else extent(told.query_map)
    if box is not None:
        ends = np.array([[side.start, side.stop - 1] for side in box]).T
        field = np.ptp(transform(volume.affine, ends), axis=0).max()
    else:
        one = parts[0] if parts else volume
        field = np.ptp(transform(one.affine, corners(one.shape)), axis=0).max()
    return list(focus), max(float(field), _SMALLEST_FIELD_MM)


def _peak(seen: Volume | None) -> Sequence[float] | None:
    return seen.to_point(highest(seen.data[0])).tolist() if seen is not None and bool(seen.data.max() > 0) else None


def _through(centre: Sequence[float], place: Sequence[float] | None) -> Sequence[float]:
    """`centre` in the axial plane of `place` (RAS mm)."""
    return centre if place is None else [*centre[:2], *place[2:]]


def _beside(pictures: Sequence[Image.Image]) -> Image.Image:
    gap = 4
    whole = Image.new("RGB", (sum(p.width + gap for p in pictures) - gap, pictures[0].height), (16, 16, 18))
    for i, one in enumerate(pictures):
        whole.paste(one, (i * (one.width + gap), 0))
    return whole


_STYLE = """
.cases { display: flex; flex-wrap: wrap; gap: 1.25rem; } .case { width: 484px; max-width: 100%; }
.case h3 { margin: .4rem 0 0; font-size: 1.05rem; } .case p { margin: .2rem 0; }
.numbers { font-size: .85rem; color: var(--faint); }
"""
