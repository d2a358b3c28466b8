"""Healthy lung in the place of what is taken away, drawn by the network that ships with MedXAI.

Uzunova et al., "Interpretable explanations of black box classifiers applied on medical images by meaningful
perturbations using variational autoencoders", 2019; Lenis et al., "Domain aware medical image classifier interpretation
by counterfactual impact analysis", 2020, for filling in instead of encoding the whole scan.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import ClassVar, cast

import torch
from torch import Tensor

from MedXAILib import resources
from MedXAILib.engines.boxes import cut, put
from MedXAILib.engines.masks import Masks
from MedXAILib.errors import MedXAIError
from MedXAILib.explainer import Question
from MedXAILib.infills.infill import Infill
from MedXAILib.loading import load_model
from MedXAILib.networks.healthy_tissue import MULTIPLE, HealthyTissue

_BUNDLE = "Models/infills/healthy_lung"
_SPACING_MM, _WITHIN = 1.25, 0.02
_SIZE, _MARGIN = 40, 8
"""The network learnt on so many voxels; around larger masks it sees so many at least."""
_HIDDEN = -1.0


class HealthyLung(Infill):
    """Another healthy lung for each draw, which goes on from the surroundings.

    Where a mask takes less than half of a voxel, the network sees it, and what it makes of it stands in its place.

    Raises:
        MedXAIError: for anything but lung CT on the grid and in the grey values that the network learnt.
    """

    random: ClassVar[bool] = True

    def __init__(self, question: Question) -> None:
        super().__init__(question)
        x, spacing = question.x, question.seen[0].spacing
        known = all(abs(step / _SPACING_MM - 1) <= _WITHIN for step in spacing)
        # 0..1 is what is left of CT after clipping; most of a lung is dark and some of it is not.
        scaled = float(x.min()) >= 0 and float(x.max()) <= 1 and float(x.min()) < 0.3 < float(x.max())
        if len(spacing) != 3 or x.shape[1] != 1 or not known or not scaled:
            raise MedXAIError(
                "The infill 'healthy' knows lung CT only, scaled from -1000..400 HU to 0..1, at 1.25 mm, and "
                f"{question.model.name} sees {x.shape[1]} channel(s) of {float(x.min()):.3g}..{float(x.max()):.3g} at "
                f"{' x '.join(f'{step:.3g}' for step in spacing)} mm: use 'inpaint'."
            )
        self.network = _network(x.device)

    @torch.no_grad()
    def patches(self, masks: Masks, draws: Sequence[int]) -> Tensor:
        x = self.question.x
        window = [min(max(_SIZE, _up(b + 2 * _MARGIN)), _up(n)) for b, n in zip(masks.box, x.shape[2:], strict=True)]
        room = torch.tensor(x.shape[2:]) - torch.tensor(window)
        about = masks.low - (torch.tensor(window) - torch.tensor(masks.box)) // 2
        # Inside the sample where it is large enough; what is beyond its border is hidden, too.
        low = about.minimum(room).clamp_min(0)
        seen = cut(x, low, window, outside=_HIDDEN).float()
        share = masks.share.expand(len(masks), 1, *masks.box)
        hidden = torch.zeros_like(seen)
        put(hidden, low, (share >= 0.5).to(seen), masks.low)
        seen = seen.masked_fill(hidden > 0, _HIDDEN)
        shape = self.network.noise_shape(seen[:1])
        noise = torch.cat([torch.randn(shape, generator=self.question.run.generator(draw)) for draw in draws])
        filled = self.network.fill(seen, noise.to(seen)).clamp(0, 1).to(x)
        return torch.where(share > 0, cut(filled, masks.low - low, masks.box), cut(x, masks.low, masks.box))


@lru_cache(maxsize=1)
def _network(device: torch.device) -> HealthyTissue:
    model = load_model(resources.path(_BUNDLE))
    return cast(HealthyTissue, model.network.eval().requires_grad_(False).to(device))


def _up(size: int) -> int:
    return -(-size // MULTIPLE) * MULTIPLE
