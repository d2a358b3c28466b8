"""The space in which it is searched for the cases that taught a network what it says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from MedXAILib.cases.space import Space
from MedXAILib.engines.training_gradients import TrainingGradients
from MedXAILib.errors import MedXAIError
from MedXAILib.model import Model
from MedXAILib.run import Run

# The gradients of so many scans are held at once.
_TOGETHER = 8


class Gradient(Space):
    """Which way learning from a scan with its label moves the network as it is (see `TrainingGradients`). Inner
    products with the gradient of a score are influences on it."""

    name: ClassVar[str] = "gradient"
    title: ClassVar[str] = "What the network learns from it"
    metric: ClassVar[Literal["cosine", "dot"]] = "dot"

    def embed(self, model: Model, x: Tensor, labels: Sequence[str] | None = None) -> Tensor:
        if labels is None:
            raise MedXAIError("What a network learns from a scan depends on its label: give labels, '' where unknown.")
        gradients, run, found = TrainingGradients(model), Run(), list[Tensor]()
        with model.ready() as device:
            for start in range(0, len(x), _TOGETHER):
                part = slice(start, start + _TOGETHER)
                rows = gradients.kept(x[part].to(device, model.dtype), labels[part], run)
                found.append(torch.from_numpy(rows))
        return torch.cat(found)
