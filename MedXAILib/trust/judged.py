"""An explanation together with what it is about, so that the same can be asked again of another network or scan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from MedXAILib.errors import MedXAIError
from MedXAILib.explainer import Question
from MedXAILib.explanation import SaliencyMap
from MedXAILib.grid import resample, resample_part
from MedXAILib.model import Model
from MedXAILib.request import check_explained, explain
from MedXAILib.run import Run
from MedXAILib.target import SegmentationTarget, Target, from_spec
from MedXAILib.volume import Volume


@dataclass(frozen=True, eq=False)
class Judged:
    """An `explanation` of what `model` says about `volume`. `segmentation` says where it should be, if that is known,
    and `given` has those of its parameters that were scans in memory, of which its provenance has but the fingerprint.

    Raises:
        MedXAIError: when `model` or `volume` is not the one that was explained.
    """

    explanation: SaliencyMap
    model: Model
    volume: Volume
    segmentation: Volume | None = None
    run: Run = field(default_factory=Run)
    given: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_explained(self.explanation.provenance, self.model, self.volume)
        if self.explanation.batched:
            raise MedXAIError("A batch of maps cannot be judged as one: explain one scan at a time.")

    @cached_property
    def target(self) -> Target:
        """What was explained."""
        return from_spec(self.explanation.provenance.target)

    @cached_property
    def settled(self) -> Target:
        """The target, within what the network segments: another network may find nothing."""
        target = self.target
        if not isinstance(target, SegmentationTarget) or target.layer is not None or target.within != "predicted":
            return target
        labels = self.model.predict(self.volume, self.explanation.provenance.region).labels
        assert labels is not None
        return replace(target, within=Volume(labels.data.eq(float(target.which)), labels.affine))

    @cached_property
    def box(self) -> tuple[slice, ...]:
        """The part of the scan's grid that the network saw."""
        seen = self.model.prepare(self.volume, self.explanation.provenance.region)
        ones = torch.ones(1, *seen.x.shape[1:])
        return resample_part(ones, seen.affine, self.volume.shape, self.volume.affine)[1]

    def again(
        self, model: Model | None = None, volume: Volume | None = None, target: Target | None = None
    ) -> SaliencyMap:
        """The same explanation, of another network, scan or target. What that costs counts in `run`."""
        made = self.explanation.provenance
        run = replace(self.run, seed=made.seed, precision=made.model.get("precision"), progress=None, partial=None)
        found = explain(
            model or self.model,
            volume or self.volume,
            made.method,
            target or self.target,
            made.region,
            run,
            **{**made.parameters, **self.given},
        )
        self.run.cost.forwards += found.provenance.forwards
        self.run.cost.backwards += found.provenance.backwards
        return found

    def question(self, volume: Volume, device: torch.device) -> Question:
        """What was explained, asked of `volume` on the `device` where the network is ready."""
        seen = self.model.prepare(volume, self.explanation.provenance.region)
        x = seen.x[None].to(device, self.model.dtype)
        return Question(self.model, x, [seen], [self.target.part(0, 1)], self.run)

    @contextmanager
    def asked(self) -> Iterator[tuple[Question, Tensor]]:
        """The question that was answered, bound, and what the map says for the target on the grid that the network
        sees: (*spatial), summed over channels, on the CPU."""
        with self.model.ready(self.run.device) as device:
            question = self.question(self.volume, device)
            (seen,) = question.seen
            if self.model.slides(seen.x.shape[1:]):
                raise MedXAIError(
                    f"{self.model.name} looks at this scan window by window, which has no test yet: explain a region "
                    "that it sees at once."
                )
            question.bind()
            data = self.explanation.data.sum(0, keepdim=True)
            here = resample(data, self.explanation.affine, seen.x.shape[1:], seen.affine)[0]
            with torch.no_grad():
                yield question, here
