"""Occlusion sensitivity.

Zeiler and Fergus, "Visualizing and understanding convolutional networks", 2014.
"""

from __future__ import annotations

from itertools import product
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from MedXAILib.engines.masks import Masks, Stream
from MedXAILib.engines.perturbation import perturb
from MedXAILib.errors import MedXAIError
from MedXAILib.explainer import Attribution, Question, Taxonomy, perturbation
from MedXAILib.infills.choice import infill
from MedXAILib.visual.perturbing import Perturbing


class Occlusion(Perturbing):
    """How much of the decision is lost when a small window of the scan is covered? Every place is tried.

    A voxel gets the mean loss over the windows that cover it. Windows come coarsely spread first, so that the map is
    there early and then refines.
    """

    id: ClassVar[str] = "occlusion"
    title: ClassVar[str] = "Occlusion sensitivity"
    paper: ClassVar[str] = "Zeiler & Fergus 2014"
    taxonomy: ClassVar[Taxonomy] = perturbation(
        strengths="plain meaning, any network, no gradients",
        limits="as coarse as its windows; misses what only several places together change; covered scans look odd",
    )

    window: tuple[float, ...] = Field(
        (), description="size of the window in mm, for all axes or each; a sixth of the shortest side if empty"
    )
    stride: tuple[float, ...] = Field((), description="step between windows in mm; the window's own size if empty")

    def of_sample(self, question: Question) -> list[Attribution]:
        x = question.x
        box, low = self._windows(question)
        totals, covered = [torch.zeros_like(x[:, :1]) for _ in question.targets], torch.zeros_like(x[:, :1])

        def take(start: int, masks: Masks, values: list[Tensor]) -> None:
            for total, of_sample, value in zip(totals, at_sample, values, strict=True):
                _add(total, masks.low, box, of_sample - value)
            _add(covered, masks.low, box, torch.ones(len(masks)))
            question.show(lambda: totals[0] / covered.clamp_min(1))

        with torch.no_grad():
            at_sample = question.values(x)
        stream = Stream(len(low), box, lambda start, stop: Masks.boxes(low[start:stop], box, x))
        perturb(question, stream, infill(question, self.infill), take, self.title)
        return [Attribution(total / covered.clamp_min(1)) for total in totals]

    def _windows(self, question: Question) -> tuple[tuple[int, ...], Tensor]:
        """The window's size in voxels, and where the windows begin (M, rank), coarsely spread ones first."""
        size, spacing = question.x.shape[2:], question.seen[0].spacing
        auto = min(n * step for n, step in zip(size, spacing, strict=True)) / 6
        window = voxels(self.window or (auto,), spacing)
        window = tuple(min(w, n) for w, n in zip(window, size, strict=True))
        stride = voxels(self.stride, spacing) if self.stride else window
        counts = [-(-(n - w) // s) + 1 for n, w, s in zip(size, window, stride, strict=True)]
        index = sorted(product(*map(range, counts)), key=lambda place: -min(_level(i) for i in place))
        low = torch.tensor(index) * torch.tensor(stride)
        # The last windows end where the scan does.
        return window, low.minimum(torch.tensor(size) - torch.tensor(window))


def voxels(mm: tuple[float, ...], spacing: tuple[float, ...]) -> tuple[int, ...]:
    """Lengths in mm, one for each axis or for all, as voxels of a grid, at least one.

    Raises:
        MedXAIError: when there are neither one nor as many as axes.
    """
    if len(mm) not in (1, len(spacing)):
        raise MedXAIError(f"{len(mm)} sizes for {len(spacing)} axes: give one, or one for each axis.")
    each = mm * len(spacing) if len(mm) == 1 else mm
    return tuple(max(1, round(m / step)) for m, step in zip(each, spacing, strict=True))


def _level(index: int) -> int:
    """How often an index can be halved: 0 most of all."""
    return 32 if index == 0 else (index & -index).bit_length() - 1


def _add(total: Tensor, low: Tensor, box: tuple[int, ...], values: Tensor) -> None:
    """Add `values` (M,) to the boxes of `total` (1, 1, *spatial) that begin at `low` (M, rank)."""
    for start, value in zip(low.tolist(), values.tolist(), strict=True):
        total[0, 0][tuple(slice(a, a + b) for a, b in zip(start, box, strict=True))] += value
