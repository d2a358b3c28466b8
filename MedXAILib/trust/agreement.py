"""Do several methods point at the same place?

Krishna et al., "The disagreement problem in explainable machine learning", 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from MedXAILib.errors import MedXAIError
from MedXAILib.explanation import SaliencyMap
from MedXAILib.grid import resample
from MedXAILib.report.localisation import evidence, peak
from MedXAILib.trust.finding import Finding, light
from MedXAILib.trust.likeness import Looks, likeness

# The share of the strongest twentieth that maps have in common, from which the light is green, and yellow. Grids of
# windows and of voxels never agree wholly.
_GOOD, _FAIR = 0.4, 0.15


def judge(maps: Sequence[SaliencyMap]) -> Finding:
    """How far `maps` of one scan and target by several methods agree: each two of them, on the grid of the first.

    Raises:
        MedXAIError: when there are fewer than two, or they are not about the same scan and answer.
    """
    asked = {(m.provenance.volume["fingerprint"], m.provenance.target_label) for m in maps}
    if len(maps) < 2 or len(asked) > 1:
        raise MedXAIError("Agreement is between at least two maps of one scan and one answer: explain both alike.")
    first = maps[0]
    values: dict[str, float] = {}
    shape = first.data.shape[1:]
    looks = [Looks.of(resample(evidence(m)[None], m.affine, shape, first.affine)) for m in maps]
    overlaps, distances = [], []
    for (one, a), (other, b) in combinations(zip(maps, looks, strict=True), 2):
        pair = f"{one.provenance.method} and {other.provenance.method}"
        alike = likeness(a, b)
        away = float(np.linalg.norm(np.subtract(peak(one), peak(other))))
        values |= {f"{pair}: overlap": alike["overlap"], f"{pair}: correlation": alike["signed"]}
        values[f"{pair}: peaks apart (mm)"] = away
        overlaps.append(alike["overlap"])
        distances.append(away)
    overlap = sum(overlaps) / len(overlaps)
    colour = light(overlap, _GOOD, _FAIR)
    word = {"good": "point at the same place", "fair": "agree in part", "poor": "point at different places"}[colour]
    return Finding(
        "agreement",
        "Do several methods agree?",
        f"{len(maps)} methods {word}: {overlap:.0%} of their strongest places are the same, and their peaks are at "
        f"most {max(distances):.0f} mm apart.",
        colour,
        values,
    )
