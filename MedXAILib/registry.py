"""Every technique there is. A new one is a file of its own and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from MedXAILib.errors import MedXAIError, unknown
from MedXAILib.example_based.capsules import Capsules
from MedXAILib.example_based.influence import Influence
from MedXAILib.example_based.latent import Latent
from MedXAILib.example_based.prototypes import PrototypeParts
from MedXAILib.example_based.rules import Rules
from MedXAILib.example_based.similar_cases import SimilarCaseSearch
from MedXAILib.explainer import Technique
from MedXAILib.textual.captioning import Captioning
from MedXAILib.textual.rcv import RCV
from MedXAILib.textual.semantic import Semantic
from MedXAILib.textual.tcav import TCAV
from MedXAILib.textual.visual_captioning import VisualCaptioning
from MedXAILib.visual.attention import Attention
from MedXAILib.visual.attention_relevance import AttentionRelevance
from MedXAILib.visual.attention_rollout import AttentionRollout
from MedXAILib.visual.cam import CAM
from MedXAILib.visual.counterfactual_infill import CounterfactualInfill
from MedXAILib.visual.deconvnet import DeconvNet
from MedXAILib.visual.deep_shap import DeepSHAP
from MedXAILib.visual.deeplift import DeepLIFT
from MedXAILib.visual.gradcam import GradCAM
from MedXAILib.visual.gradcam_plus_plus import GradCAMPlusPlus
from MedXAILib.visual.gradient import Gradient, SmoothGrad, VarGrad
from MedXAILib.visual.gradient_shap import GradientSHAP
from MedXAILib.visual.guided_backprop import GuidedBackprop
from MedXAILib.visual.guided_gradcam import GuidedGradCAM
from MedXAILib.visual.hirescam import HiResCAM
from MedXAILib.visual.integrated_gradients import IntegratedGradients
from MedXAILib.visual.kernel_shap import KernelSHAP
from MedXAILib.visual.layercam import LayerCAM
from MedXAILib.visual.lime import LIME
from MedXAILib.visual.lrp import LRP
from MedXAILib.visual.meaningful_perturbation import MeaningfulPerturbation
from MedXAILib.visual.mil import MIL
from MedXAILib.visual.occlusion import Occlusion
from MedXAILib.visual.permutation_shap import PermutationSHAP
from MedXAILib.visual.prediction_difference import PredictionDifference
from MedXAILib.visual.rise import RISE
from MedXAILib.visual.scorecam import ScoreCAM
from MedXAILib.visual.supervoxel_ablation import SupervoxelAblation

EXPLAINERS: dict[str, type[Technique]] = {
    kind.id: kind
    for kind in (
        Gradient,
        SmoothGrad,
        VarGrad,
        DeconvNet,
        GuidedBackprop,
        IntegratedGradients,
        GradientSHAP,
        CAM,
        GradCAM,
        GradCAMPlusPlus,
        HiResCAM,
        LayerCAM,
        ScoreCAM,
        GuidedGradCAM,
        LRP,
        DeepLIFT,
        DeepSHAP,
        Attention,
        AttentionRelevance,
        AttentionRollout,
        MIL,
        Occlusion,
        SupervoxelAblation,
        LIME,
        KernelSHAP,
        PermutationSHAP,
        RISE,
        PredictionDifference,
        MeaningfulPerturbation,
        CounterfactualInfill,
        Captioning,
        VisualCaptioning,
        TCAV,
        RCV,
        Semantic,
        Latent,
        Capsules,
        PrototypeParts,
        Rules,
        SimilarCaseSearch,
        Influence,
    )
}


def methods(kind: str | None = None) -> dict[str, type[Technique]]:
    """Every method by its id, or those that answer with one `kind` of explanation: parameters are `model_fields`, and
    `taxonomy`, `paper` and `title` say what it is."""
    return {id: technique for id, technique in EXPLAINERS.items() if kind in (None, technique.kind)}


def make(method: str, parameters: Mapping[str, Any]) -> Technique:
    """The technique called `method` with `parameters`.

    Raises:
        MedXAIError: for an unknown method or parameter, naming the nearest, or a value out of range.
    """
    if method not in EXPLAINERS:
        raise unknown("method", method, EXPLAINERS)
    kind = EXPLAINERS[method]
    for name in parameters:
        if name not in kind.model_fields:
            raise unknown(f"parameter of {method}", name, kind.model_fields)
    try:
        return kind(**parameters)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "parameters"
        raise MedXAIError(f"{method}: {name} = {first['input']!r} is not possible: {first['msg']}.") from error
