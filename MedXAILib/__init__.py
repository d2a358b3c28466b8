"""MedXAILib: why a network said what it said about a scan.

>>> import MedXAILib as mx
>>> model = mx.load_model("Resources/Models/lung_nodule")
>>> volume = mx.load_volume("chest.nrrd")
>>> explanation = mx.explain(model, volume, "hirescam", target="malignant", region=(-60.0, 12.0, -80.0))
"""

__version__ = "0.1.0"

from MedXAILib.ensemble import Ensemble
from MedXAILib.errors import Cancelled, MedXAIError, OutOfMemory, Untrusted
from MedXAILib.explain import explain, recompute
from MedXAILib.explanation import Explanation, Provenance, SaliencyMap, load_explanation
from MedXAILib.loading import load_model
from MedXAILib.model import Model, Prediction
from MedXAILib.registry import methods
from MedXAILib.run import Progress, Run
from MedXAILib.target import ClassTarget, EmbeddingTarget, RegressionTarget, SegmentationTarget, Target
from MedXAILib.volume import Volume, load_volume

__all__ = [
    "Cancelled",
    "ClassTarget",
    "EmbeddingTarget",
    "Ensemble",
    "Explanation",
    "MedXAIError",
    "Model",
    "OutOfMemory",
    "Prediction",
    "Progress",
    "Provenance",
    "RegressionTarget",
    "Run",
    "SaliencyMap",
    "SegmentationTarget",
    "Target",
    "Untrusted",
    "Volume",
    "explain",
    "load_explanation",
    "load_model",
    "load_volume",
    "methods",
    "recompute",
]
