"""Class activation mapping, exactly.

Zhou et al., "Learning deep features for discriminative localization", 2016. With the pooled features of several layers
side by side it is the multi-scale CAM of Liao 2019.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from MedXAILib.engines.capture import capture
from MedXAILib.errors import MedXAIError
from MedXAILib.explainer import Question, Taxonomy, backpropagation
from MedXAILib.visual.cam_family import LayerMap, space, spatial


class CAM(LayerMap):
    """What does each place contribute to a score that is linear in globally averaged features?

    The mean of the map and the bias are the class score. Networks of another build are refused: for them Grad-CAM and
    HiResCAM are the generalisations.
    """

    id: ClassVar[str] = "cam"
    title: ClassVar[str] = "Class activation mapping"
    paper: ClassVar[str] = "Zhou 2016"
    taxonomy: ClassVar[Taxonomy] = backpropagation(
        strengths="exact: the map and the bias are the score; one forward, no backward",
        limits="only networks of global average pooling and one linear layer; as coarse as the layer",
    )

    positive: bool = Field(False, description="keep only what speaks for the target (ReLU)")

    def maps(self, question: Question, layers: tuple[str, ...]) -> list[list[Tensor]]:
        pooled: list[Tensor] = []
        linear = [m for m in question.model.network.modules() if isinstance(m, nn.Linear)]
        handles = [m.register_forward_pre_hook(lambda _m, inputs: pooled.append(inputs[0])) for m in linear]
        try:
            values, taken = capture(question, layers)
        finally:
            for handle in handles:
                handle.remove()
        activations = [spatial(name, taken[name]) for name in layers]
        averages = torch.cat([a.mean(space(a)) for a in activations], 1)
        if not (pooled and pooled[-1].shape == averages.shape and torch.allclose(pooled[-1], averages, atol=1e-5)):
            raise MedXAIError(
                f"CAM is exact only where the score is linear in the averages of {', '.join(layers)}, and in "
                f"{question.model.name} it is not: use hirescam or gradcam."
            )
        found = []
        for value in values:
            (weights,) = question.gradients(value, [pooled[-1]], keep=value is not values[-1])
            parts = weights.split([a.shape[1] for a in activations], 1)
            found.append(
                [
                    self.placed(taken[name], (a * w.reshape(*w.shape, *[1] * (a.ndim - 2))).sum(1, keepdim=True))
                    for name, a, w in zip(layers, activations, parts, strict=True)
                ]
            )
        return found
