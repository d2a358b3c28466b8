"""The maps in an explanation of any kind, each as one of its own."""

from __future__ import annotations

from MedXAILib.caption import Caption
from MedXAILib.concept_scores import ConceptScores
from MedXAILib.errors import MedXAIError
from MedXAILib.explanation import Explanation, SaliencyMap, map_of
from MedXAILib.similar_cases import SimilarCases


def maps(explanation: Explanation) -> list[SaliencyMap]:
    """Those on the grid of the scan; none of a kind that has none.

    Raises:
        MedXAIError: when they are of a batch of scans.
    """
    if isinstance(explanation, SaliencyMap):
        if explanation.batched:
            raise MedXAIError("This explanation is of a batch of scans: export the map of each scan.")
        return [explanation]
    if isinstance(explanation, Caption | ConceptScores):
        return explanation.seen()
    if isinstance(explanation, SimilarCases) and explanation.query_map is not None and explanation.affine is not None:
        return [map_of(explanation, explanation.query_map[0], explanation.affine, explanation.scored)]
    return []
