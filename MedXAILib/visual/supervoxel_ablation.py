"""Ablation of supervoxels: feature ablation with the parts of a scan as features.

Zeiler and Fergus, "Visualizing and understanding convolutional networks", 2014, with parts that follow the anatomy.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from MedXAILib.engines.masks import Masks
from MedXAILib.engines.perturbation import perturb
from MedXAILib.explainer import Question, Taxonomy, perturbation
from MedXAILib.infills.infill import Infill
from MedXAILib.supervoxels import Supervoxels
from MedXAILib.visual.supervoxel_method import BySupervoxels, Estimate


class SupervoxelAblation(BySupervoxels):
    """How much of the decision is lost when one supervoxel is replaced? Each is, alone."""

    id: ClassVar[str] = "supervoxel_ablation"
    title: ClassVar[str] = "Supervoxel ablation"
    paper: ClassVar[str] = "Zeiler & Fergus 2014"
    taxonomy: ClassVar[Taxonomy] = perturbation(
        strengths="plain meaning, any network, parts that follow the anatomy, one forward for each",
        limits="misses what only several parts together change; what stands in may itself look odd",
    )

    per_ml: bool = Field(False, description="the loss for each mL of a supervoxel, so that large ones do not stand out")

    def estimates(self, question: Question, supervoxels: Supervoxels, infill: Infill) -> list[Estimate]:
        x = question.x
        at_sample = torch.stack(question.values(x), 1)
        per = _volumes(question, supervoxels) if self.per_ml else torch.ones(supervoxels.count)
        lost = torch.zeros(supervoxels.count, len(question.targets), dtype=torch.float64)

        def take(start: int, masks: Masks, values: list[Tensor]) -> None:
            lost[start : start + len(masks)] = (at_sample - torch.stack(values, 1)).double().cpu()
            question.show(lambda: supervoxels.painted(lost[:, 0] / per))

        perturb(question, supervoxels.one_by_one(x), infill, take, self.title)
        return [Estimate(of_target / per) for of_target in lost.T]


def _volumes(question: Question, supervoxels: Supervoxels) -> Tensor:
    """How large each supervoxel is, in mL, (count,)."""
    voxel = torch.tensor(question.seen[0].spacing).prod() / 1000
    return supervoxels.sizes().cpu().double() * voxel
