"""Score-CAM, with channels that say the same thing asked once.

Wang et al., "Score-CAM: score-weighted visual explanations for convolutional neural networks", 2020.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from MedXAILib.engines.capture import Captured, capture
from MedXAILib.explainer import Question, Taxonomy, backpropagation
from MedXAILib.visual.baseline import Baseline, baseline
from MedXAILib.visual.cam_family import LayerMap, spatial


class ScoreCAM(LayerMap):
    """How much of the decision remains when only what a feature sees is left of the scan? No gradient is used.

    One forward for every channel is what makes it slow. Channels with like maps are clustered, each cluster asked once.
    """

    id: ClassVar[str] = "scorecam"
    title: ClassVar[str] = "Score-CAM"
    paper: ClassVar[str] = "Wang 2020"
    taxonomy: ClassVar[Taxonomy] = backpropagation(
        strengths="no gradients, so no noise or saturation of them",
        limits="a forward for every cluster of channels; as coarse as the layer",
    )

    clusters: int = Field(32, ge=0, le=4096, description="clusters of channels to ask; 0 asks every channel")
    baseline: Baseline = "zero"

    def maps(self, question: Question, layers: tuple[str, ...]) -> list[list[Tensor]]:
        with torch.no_grad():
            _, taken = capture(question, layers)
            start = baseline(question, self.baseline)
            at_start = question.values(start)
            of_layers = [self._of_layer(question, name, taken[name], start, at_start) for name in layers]
        return [list(of_target) for of_target in zip(*of_layers, strict=True)]

    def _of_layer(
        self, question: Question, name: str, captured: Captured, start: Tensor, at_start: list[Tensor]
    ) -> list[Tensor]:
        activations = spatial(name, captured).to(question.x.dtype)
        n, _channels = activations.shape[:2]
        groups = self._grouped(question, activations)
        difference = question.x - start
        scores = [activations.new_zeros(n, groups.shape[1]) for _ in at_start]

        def work(begin: int, end: int) -> None:
            kept = [start + difference * _unit(captured.place(groups[:, k : k + 1])) for k in range(begin, end)]
            for score, value, base in zip(scores, question.values(torch.cat(kept)), at_start, strict=True):
                score[:, begin:end] = value.reshape(end - begin, n).T - base[:, None]
            if len(self.layers) < 2:
                question.show(lambda: weighted(scores[0][:, :end]))

        def weighted(score: Tensor) -> Tensor:
            asked = groups[:, : score.shape[1]]
            weights = score.softmax(1).reshape(*score.shape, *[1] * (groups.ndim - 2))
            return self.placed(captured, (weights * asked).sum(1, keepdim=True))

        # Without gradients a forward holds little more than a few layers: count the input sixteen times.
        size = question.run.fitting(64 * question.x.numel(), question.x[:, 0].numel(), question.x.device)
        question.run.chunks(groups.shape[1], size).map(work, f"{self.title}: {name}")
        return [weighted(score) for score in scores]

    def _grouped(self, question: Question, activations: Tensor) -> Tensor:
        """The activations, those of like channels averaged: (N, clusters, *grid)."""
        if not 0 < self.clusters < activations.shape[1]:
            return activations
        groups = []
        for one in activations:
            member = _k_means(_unit(one[:, None]).flatten(1), self.clusters, question.run.generator())
            total = one.new_zeros(self.clusters, *one.shape[1:]).index_add_(0, member, one)
            count = torch.bincount(member, minlength=self.clusters).clamp_min(1)
            groups.append(total / count.reshape(-1, *[1] * (one.ndim - 1)))
        return torch.stack(groups)


def _unit(maps: Tensor) -> Tensor:
    """Each map (M, 1, *spatial) scaled to 0 … 1; a constant map becomes 0."""
    flat = maps.flatten(1)
    shape = (-1, *[1] * (maps.ndim - 1))
    low = flat.amin(1).reshape(shape)
    return (maps - low) / (flat.amax(1).reshape(shape) - low).clamp_min(1e-12)


def _k_means(points: Tensor, count: int, generator: torch.Generator, rounds: int = 20) -> Tensor:
    """Lloyd's algorithm from randomly chosen points: the cluster (M,) of each of `points` (M, F)."""
    centres = points[torch.randperm(len(points), generator=generator)[:count].to(points.device)]
    member = torch.cdist(points, centres).argmin(1)
    for _ in range(rounds):
        sums = torch.zeros_like(centres).index_add_(0, member, points)
        size = torch.bincount(member, minlength=count)[:, None]
        centres = torch.where(size > 0, sums / size.clamp_min(1), centres)
        moved = torch.cdist(points, centres).argmin(1)
        if torch.equal(moved, member):
            break
        member = moved
    return member
