"""SmoothGrad, VarGrad and SquareGrad as options of every gradient method.

Smilkov et al., "SmoothGrad: removing noise by adding noise", 2017; Adebayo et al., "Local explanation methods for deep
neural networks lack sensitivity to parameter values", 2018 (VarGrad); Hooker et al., 2019 (SquareGrad).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from MedXAILib.engines.input_gradients import fit, fitting
from MedXAILib.explainer import Attribution, Explainer, Question


class Smoothable(Explainer):
    """An explainer whose map can be averaged over noisy copies of the scan, streamed so that none is kept."""

    samples: int = Field(
        1, ge=1, le=1000, description="noisy copies to average over; 1 is the scan itself, without noise"
    )
    noise: float = Field(
        0.1, ge=0, le=1, description="noise of the copies, as a fraction of each channel's range of values"
    )
    statistic: Literal["mean", "variance", "squared"] = Field(
        "mean", description="over the copies: mean (SmoothGrad), variance (VarGrad) or mean square (SquareGrad)"
    )
    per_channel: bool = Field(False, description="one map for each input channel, such as each MR sequence")

    @property
    def signed(self) -> bool:
        return self.samples == 1 or self.statistic == "mean"

    @abstractmethod
    def maps(self, question: Question, x: Tensor) -> list[Attribution]:
        """Each target's attribution for `x` (M, C, *spatial), M being N or repeats of the N samples."""

    def finish(self, question: Question, values: Tensor) -> Tensor:
        """From the statistic over the copies (N, C, *spatial) to the map."""
        return values if self.per_channel else values.sum(1, keepdim=True)

    def attribute(self, question: Question) -> list[Attribution]:
        fit(question)
        found = self.maps(question, question.x) if self.samples == 1 else self._over_copies(question)
        return [Attribution(self.finish(question, a.values), a.residual) for a in found]

    def _over_copies(self, question: Question) -> list[Attribution]:
        x = question.x
        n, flat = len(x), x.flatten(2)
        spread = (flat.amax(2) - flat.amin(2)).reshape(*x.shape[:2], *[1] * (x.ndim - 2))
        zeros = [torch.zeros_like(x) for _ in question.targets]
        mean, squares, residual, seen = zeros, [z.clone() for z in zeros], [{} for _ in zeros], 0  # type: ignore[var-annotated]

        def copy(i: int) -> Tensor:
            # One draw serves every sample of a batch, so that a sample's map does not depend on its place there.
            field = torch.randn(x.shape[1:], generator=question.run.generator(i)).to(x)
            return x + self.noise * spread * field

        def work(start: int, stop: int) -> None:
            nonlocal seen
            found = self.maps(question, torch.cat([copy(i) for i in range(start, stop)]))
            for k in range(stop - start):
                seen += 1
                for t, attribution in enumerate(found):
                    value = attribution.values[k * n : (k + 1) * n]
                    delta = value - mean[t]
                    mean[t] += delta / seen
                    squares[t] += delta * (value - mean[t])
            for t, attribution in enumerate(found):
                residual[t] = {k: max(v, residual[t].get(k, 0.0)) for k, v in attribution.residual.items()}
            question.show(lambda: self.finish(question, statistic(0)))

        def statistic(t: int) -> Tensor:
            if self.statistic == "mean":
                return mean[t]
            variance = squares[t] / seen
            return variance if self.statistic == "variance" else mean[t] ** 2 + variance

        question.run.chunks(self.samples, fitting(question)).map(work, f"{self.title}: noisy copies")
        # What theory says of each copy it says of their mean only.
        kept = residual if self.statistic == "mean" else [{} for _ in residual]
        return [Attribution(statistic(t), r) for t, r in enumerate(kept)]
