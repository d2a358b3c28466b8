"""Which way learning from a case moves a network, as a vector of a length that does not depend on the network's.

Its inner product with the gradient of a score is by how much one step on that case moves the score: TracIn, Pruthi et
al., "Estimating training data influence by tracing gradient descent", 2020. With the inverse of the kernel of all cases
between, it is TRAK, Park et al., "TRAK: attributing model behavior at scale", 2023.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from MedXAILib.engines.per_sample_gradients import Measure, per_sample_gradients
from MedXAILib.engines.projection import projected
from MedXAILib.errors import MedXAIError
from MedXAILib.model import Model
from MedXAILib.run import Run

LENGTH = 512
"""Of the vectors, when it is not said."""
TRAK_DAMPING = 10.0
"""By linear datamodelling scores on a small network for volumes (benchmarks/influence.py)."""

# A case that is known by heart teaches nothing more, but what is kept of it is divided by how much it does.
_LEAST = 1e-6


@dataclass(frozen=True)
class TrainingGradients:
    """Vectors of a classifier (cross-entropy) or a regression network of one output (half the squared error), projected
    to `length` numbers, the same for the same `seed`.

    What is kept of a case (K + 1,) is the gradient of how sure the network is of its label (the log-odds, or the
    value), times how much is left to learn, and at the end how much that is: 1 - p of the label, or by how much the
    value is too small.
    """

    model: Model
    length: int = LENGTH
    seed: int = 0

    def __post_init__(self) -> None:
        if self.model.task not in ("classification", "regression"):
            raise MedXAIError(
                f"{self.model.name} is for {self.model.task}: what learning from a case does is known of networks for "
                "classification and regression."
            )

    def kept(self, x: Tensor, labels: Sequence[str], run: Run) -> np.ndarray:
        """Of cases `x` (N, C, *spatial) with these labels, (N, K + 1); zero where a label is no answer of the network,
        because nothing can be learnt from it."""
        with torch.no_grad():
            output = self.model.forward(x)
        run.cost.forwards += len(x)
        answers = [answer(self.model, label, output.shape[1]) for label in labels]
        given = torch.tensor([0.0 if one is None else one for one in answers], device=x.device, dtype=output.dtype)
        moves = self._moves(x, given, self._sure, run)
        sure = torch.stack([self._sure(*one) for one in zip(output.split(1), given, strict=True)])
        left = given - sure if self.model.task == "regression" else (-sure).sigmoid().clamp_min(_LEAST)
        left *= torch.tensor([one is not None for one in answers], device=x.device)
        return torch.cat([moves * left[:, None], left[:, None]], dim=1).cpu().numpy()

    def asked(self, x: Tensor, value: Callable[[Tensor], Tensor], run: Run) -> np.ndarray:
        """The gradient (K,) of the `value` (1,) of the output for `x` (1, C, *spatial)."""
        found = self._moves(x, x.new_zeros(1), lambda output, _: value(output)[0], run)
        return found[0].double().cpu().numpy()

    def _moves(self, x: Tensor, given: Tensor, measure: Measure, run: Run) -> Tensor:
        return projected(per_sample_gradients(self.model, x, given, measure, run), self.length, self.seed)

    def _sure(self, output: Tensor, given: Tensor) -> Tensor:
        """The log-odds of the class `given` () by an output (1, K), or its value."""
        if self.model.task == "regression":
            return output.flatten()[0]
        scores = torch.cat([torch.zeros_like(output), output], dim=1) if output.shape[1] == 1 else output
        own = torch.arange(scores.shape[1], device=scores.device) == given
        others = scores.masked_fill(own, -math.inf).logsumexp(1)
        return ((scores * own).sum(1) - others)[0]


def answer(model: Model, label: str, outputs: int) -> float | None:
    """What a network of so many `outputs` is to say of a case with this label: the index of its class, or its value;
    None when it has no such answer."""
    if model.task == "regression":
        try:
            value = float(label)
        except ValueError:
            return None
        return value if math.isfinite(value) else None
    names = [model.class_name(k, outputs) for k in range(max(2, outputs))]
    return float(names.index(label)) if label in names else None


def trak(kept: np.ndarray, asked: np.ndarray, damping: float = TRAK_DAMPING) -> np.ndarray:
    """What to ask (K + 1,) for TRAK's influences by one network, of which this is `kept` (N, K + 1) of the cases: the
    kernel's inverse times the gradient `asked` (K,), `damping` times its mean eigenvalue added to it. The kernel is of
    gradients of the log-odds, without how much is left to learn."""
    taught = kept[kept[:, -1] != 0].astype(float)
    moves = taught[:, :-1] / taught[:, -1:]
    kernel = moves.T @ moves
    kernel += np.eye(len(kernel)) * max(damping * float(np.trace(kernel)) / len(kernel), 1e-12)
    return np.append(np.linalg.solve(kernel, asked), 0.0)
