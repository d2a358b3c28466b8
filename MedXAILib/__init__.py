"""MedXAILib: why a network said what it said about a scan.

>>> import MedXAILib as mx
>>> model = mx.load_model("Resources/Models/lung_nodule")
>>> volume = mx.load_volume("Resources/SampleData/chest_ct_nodule.nrrd")
>>> explanation = mx.explain(model, volume, "hirescam", target="malignant", region=(21.9, 120.5, -611.5))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from MedXAILib.caption import Caption, Word
    from MedXAILib.cohort_map import explain_cohort
    from MedXAILib.concept_scores import Concept, ConceptScores
    from MedXAILib.ensemble import Ensemble
    from MedXAILib.errors import Cancelled, MedXAIError, OutOfMemory, Untrusted
    from MedXAILib.explanation import Explanation, Provenance, SaliencyMap, load_explanation
    from MedXAILib.loading import load_model
    from MedXAILib.model import Model, Prediction
    from MedXAILib.registry import methods
    from MedXAILib.request import explain, recompute, tell
    from MedXAILib.rule import Condition, Rule
    from MedXAILib.rule_set import RuleSet
    from MedXAILib.run import Progress, Run
    from MedXAILib.similar_cases import Case, SimilarCases
    from MedXAILib.target import (
        CaptionTarget,
        ClassTarget,
        EmbeddingTarget,
        RegressionTarget,
        SegmentationTarget,
        Target,
    )
    from MedXAILib.textual.concept_sets import Examples
    from MedXAILib.traversal import Place, Step, Traversal
    from MedXAILib.trust.card import TrustCard, trust_card
    from MedXAILib.trust.judged import Judged
    from MedXAILib.volume import Volume, load_volume

# Where each public name is, to be imported when it is first used: help and Slicer's panels need not wait for PyTorch.
# No module may be called like one of these names, which importing it would hide.
_HOME = {
    "caption": ["Caption", "Word"],
    "cohort_map": ["explain_cohort"],
    "concept_scores": ["Concept", "ConceptScores"],
    "ensemble": ["Ensemble"],
    "errors": ["Cancelled", "MedXAIError", "OutOfMemory", "Untrusted"],
    "explanation": ["Explanation", "Provenance", "SaliencyMap", "load_explanation"],
    "loading": ["load_model"],
    "model": ["Model", "Prediction"],
    "registry": ["methods"],
    "request": ["explain", "recompute", "tell"],
    "rule": ["Condition", "Rule"],
    "rule_set": ["RuleSet"],
    "run": ["Progress", "Run"],
    "similar_cases": ["Case", "SimilarCases"],
    "target": ["CaptionTarget", "ClassTarget", "EmbeddingTarget", "RegressionTarget", "SegmentationTarget", "Target"],
    "textual.concept_sets": ["Examples"],
    "traversal": ["Place", "Step", "Traversal"],
    "trust.card": ["TrustCard", "trust_card"],
    "trust.judged": ["Judged"],
    "volume": ["Volume", "load_volume"],
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = list(_MODULE)


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module 'MedXAILib' has no attribute '{name}'")
    value = getattr(import_module(f"MedXAILib.{_MODULE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
