"""Do several explanations of one scan point at the same place, and name the same reasons?

Krishna et al., "The disagreement problem in explainable machine learning", 2022.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import combinations
from statistics import mean

import numpy as np
import torch
from torch import Tensor

from MedXAILib.caption import Caption
from MedXAILib.concept_scores import ConceptScores
from MedXAILib.errors import MedXAIError
from MedXAILib.explanation import Explanation, SaliencyMap, map_of
from MedXAILib.grid import resample
from MedXAILib.report.localisation import evidence, extent, peak
from MedXAILib.similar_cases import SimilarCases
from MedXAILib.trust.finding import Finding, light
from MedXAILib.trust.likeness import Looks, likeness

# The share of the strongest twentieth that maps have in common, from which the light is green, and yellow. Grids of
# windows and of voxels never agree wholly.
_GOOD, _FAIR = 0.4, 0.15

# Letters by which a word is known: "spiculated" and "spiculation" are one reason.
_STEM = 6
_SMALL_WORDS = frozenset({"nodule", "the", "not", "with", "and", "without", "margin"})


def judge(explanations: Sequence[Explanation]) -> Finding:
    """How far `explanations` of one scan agree, by whatever methods and of whatever kinds: where each two of them
    point, on the grid of the first, and which reasons those that have words for them share.

    Raises:
        MedXAIError: when there are fewer than two, or they are not about the same scan, or maps not about the same
            answer.
    """
    if any(isinstance(explanation, SaliencyMap) and explanation.batched for explanation in explanations):
        raise MedXAIError("A batch of maps cannot be judged as one: explain one scan at a time.")
    maps = [(explanation.provenance.method, shown) for explanation in explanations if (shown := where(explanation))]
    asked = {m.provenance.volume["fingerprint"] for m in explanations}
    answers = {m.provenance.target_label for m in explanations if isinstance(m, SaliencyMap)}
    if len(maps) < 2 or len(asked) > 1 or len(answers) > 1:
        raise MedXAIError(
            "Agreement is between at least two explanations of one scan and one answer that say where: explain both "
            "alike."
        )
    first = maps[0][1]
    shape = first.data.shape[1:]
    values: dict[str, float] = {}
    placed = [resample(evidence(m)[None], m.affine, shape, first.affine) for _, m in maps]
    # Where no map says anything, all would agree.
    box = extent(torch.cat(placed))
    looks = [Looks.of(one if box is None else one[(slice(None), *box)]) for one in placed]
    overlaps, distances = [], []
    for (one, a), (other, b) in combinations(zip(maps, looks, strict=True), 2):
        pair = f"{one[0]} and {other[0]}"
        alike = likeness(a, b)
        away = float(np.linalg.norm(np.subtract(peak(one[1]), peak(other[1]))))
        values |= {f"{pair}: overlap": alike["overlap"], f"{pair}: correlation": alike["signed"]}
        values[f"{pair}: peaks apart (mm)"] = away
        overlaps.append(alike["overlap"])
        distances.append(away)
    colour = light(mean(overlaps), _GOOD, _FAIR)
    word = {"good": "point at the same place", "fair": "agree in part", "poor": "point at different places"}[colour]
    sentence = (
        f"{len(maps)} explanations {word}: {mean(overlaps):.0%} of their strongest places are the same, and their "
        f"peaks are at most {max(distances):.0f} mm apart."
    )
    shared, of = reasons(explanations)
    if of:
        values |= {"reasons in common": float(len(shared)), "reasons": float(of)}
        named = f" ({', '.join(sorted(shared))})" if shared else ""
        sentence += f" {len(shared)} of {of} reasons are named by all{named}."
    return Finding("agreement", "Do several explanations agree?", sentence, colour, values)


def where(explanation: Explanation) -> SaliencyMap | None:
    """Where an explanation points, whatever its kind: the maps of words that the network is sure of, of concepts by how
    much they matter, or of what similar cases share with the scan. None when it does not say where."""
    if isinstance(explanation, SaliencyMap):
        return explanation
    if isinstance(explanation, SimilarCases) and explanation.query_map is not None and explanation.affine is not None:
        return map_of(explanation, explanation.query_map[0], explanation.affine, "similar cases")
    if isinstance(explanation, Caption):
        weights = {w.map: 1.0 if w.confidence is None else w.confidence for w in explanation.words}
    elif isinstance(explanation, ConceptScores):
        weights = {c.map: abs(c.score or 0.0) for c in explanation.concepts}
    else:
        return None
    told = [weight * _scaled(explanation.maps[i]) for i, weight in weights.items() if i is not None]
    return map_of(explanation, torch.stack(told).sum(0), explanation.affine, "all together") if told else None


def reasons(explanations: Sequence[Explanation]) -> tuple[set[str], int]:
    """The reasons that all explanations with words for them name, and how many any of them does; none when fewer than
    two have words."""
    named = [found for e in explanations if (found := _named(e)) is not None]
    if len(named) < 2:
        return set(), 0
    shared = set.intersection(*(set(one) for one in named))
    return {named[0][stem] for stem in shared}, len(set.union(*(set(one) for one in named)))


def _named(explanation: Explanation) -> dict[str, str] | None:
    """The reasons that an explanation has words for, by their stems."""
    if isinstance(explanation, Caption):
        words = [part for word in explanation.words if word.map is not None for part in _parts(word.text)]
    elif isinstance(explanation, ConceptScores):
        words = [part for c in explanation.concepts if c.score is not None for part in _parts(c.name)[:1]]
    else:
        return None
    return {word[:_STEM]: word for word in words}


def _parts(text: str) -> list[str]:
    return [word for word in re.findall(r"[^\W\d_]{3,}", text.lower()) if word not in _SMALL_WORDS]


def _scaled(values: Tensor) -> Tensor:
    positive = values.clamp_min(0)
    return positive / positive.max().clamp_min(1e-12)
