"""What an audit sees of a cohort: for each case what the network saw and said, where it looked, and what is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from MedXAILib.engines.capture import capture, suggest_layer
from MedXAILib.engines.concept_vectors import Units
from MedXAILib.errors import MedXAIError
from MedXAILib.explainer import Question
from MedXAILib.model import Model, Prepared
from MedXAILib.run import Run
from MedXAILib.target import ClassTarget

# A forward that keeps its tail for a backward takes up to so many times its input.
_TIMES = 1000


@dataclass(frozen=True, eq=False)
class Cohort:
    """N cases of one network.

    `x` is what the network saw of each (C, *spatial), on a grid that `affines` place (index to RAS mm), `maps` where it
    looked (*spatial), `anatomy` where what should matter lies (*spatial; None where that is not known), `labels` what
    is known of each ("": nothing), and `columns` what else is, such as the site. `output` (N, K) is what the network
    says, `embedding` (N, F) the means and the maxima of its last layer with a spatial layout, and `gradients` (N, M, F)
    how its evidence changes with them (NaN where that cannot be said); None of a network that has no such layer, for
    the reason `bare`.
    """

    model: Model
    uids: Sequence[str]
    x: Sequence[Tensor]
    affines: Sequence[np.ndarray]
    maps: Sequence[Tensor]
    anatomy: Sequence[Tensor | None]
    labels: Sequence[str]
    columns: Mapping[str, Sequence[str]]
    output: Tensor
    embedding: np.ndarray | None
    gradients: np.ndarray | None
    bare: str = ""

    def __len__(self) -> int:
        return len(self.uids)

    def taken(self, which: Sequence[int] | np.ndarray) -> Cohort:
        """Only these cases; nothing is computed again."""
        at = [int(i) for i in which]
        return replace(
            self,
            uids=[self.uids[i] for i in at],
            x=[self.x[i] for i in at],
            affines=[self.affines[i] for i in at],
            maps=[self.maps[i] for i in at],
            anatomy=[self.anatomy[i] for i in at],
            labels=[self.labels[i] for i in at],
            columns={name: [cells[i] for i in at] for name, cells in self.columns.items()},
            output=self.output[at],
            embedding=None if self.embedding is None else self.embedding[at],
            gradients=None if self.gradients is None else self.gradients[at],
        )

    @cached_property
    def evidence(self) -> np.ndarray:
        """How much speaks for each class (N, M), by `evidence_of`."""
        return evidence_of(self.output).numpy()

    @cached_property
    def said(self) -> list[str]:
        """The class that the network says of each."""
        return [self._named(k) for k in self.model.probabilities(self.output).argmax(1).tolist()]

    @cached_property
    def sureness(self) -> np.ndarray:
        """The probability that the network gives to what is known of each case (N,)."""
        names = [self._named(k) for k in range(self.model.probabilities(self.output[:1]).shape[1])]
        at = [self.model.class_index(label, len(names), self.output.shape[1]) for label in self.labels]
        return self.model.probabilities(self.output).numpy()[np.arange(len(self)), at]

    @property
    def classes(self) -> list[str]:
        """The classes that the columns of `evidence` speak for."""
        return [self._named(k) for k in ([1] if self.output.shape[1] <= 2 else range(self.output.shape[1]))]

    def _named(self, index: int) -> str:
        return self.model.class_name(index, self.output.shape[1])


def evidence_of(output: Tensor) -> Tensor:
    """From logits (N, K) to how much speaks for each class (N, M): its logit over the mean of the others'. Of two
    classes, or of one logit, it is the log-odds of the second alone."""
    count = output.shape[1]
    if count <= 2:
        return output[:, -1:] - (output[:, :1] if count == 2 else 0)
    return (output - output.mean(1, keepdim=True)) * count / (count - 1)


def seen(
    model: Model,
    x: Sequence[Tensor],
    maps: Sequence[Tensor],
    labels: Sequence[str],
    columns: Mapping[str, Sequence[str]],
    anatomy: Sequence[Tensor | None] | None = None,
    uids: Sequence[str] | None = None,
    run: Run | None = None,
    affines: Sequence[np.ndarray] | None = None,
) -> Cohort:
    """The cohort of cases of which `model` sees `x` and whose `maps` are computed: asks the network about each. Their
    axes point to the right, to the front and up unless `affines` say otherwise.

    Raises:
        MedXAIError: when it does not tell classes apart.
        Cancelled: when the person asked to stop.
    """
    if model.task != "classification":
        raise MedXAIError(f"{model.name} is for {model.task}: an audit is of a network that tells classes apart.")
    if not len(x):
        raise MedXAIError("There is no case to audit: give those whose label and columns are known.")
    run, count = run or Run(), len(x)
    output: list[Tensor] = []
    inside: list[tuple[Tensor, Tensor]] = []
    bare = ""
    masks = (
        [None] * count if anatomy is None else [each if each is not None and each.any() else None for each in anatomy]
    )
    if anatomy is not None and (empty := sum(each is not None for each in anatomy) - sum(m is not None for m in masks)):
        run.note(f"{empty} masks of the anatomy are empty where the network looks, and count as unknown.")
    with model.ready(run.device) as device:
        one = x[0][None].to(device, model.dtype)
        with torch.no_grad():
            outputs = model.forward(one).shape[1]
        targets = [ClassTarget(1, versus=0 if outputs == 2 else None)]
        targets = targets if outputs <= 2 else [ClassTarget(k) for k in range(outputs)]
        try:
            layer = suggest_layer(Question(model, one, [Prepared(x[0], np.eye(one.ndim - 1))], targets[:1]))
        except MedXAIError as error:
            bare = str(error)

        def ask(start: int, stop: int) -> None:
            batch = torch.stack(list(x[start:stop])).to(device, model.dtype)
            with torch.no_grad():
                said = model.forward(batch)
            if not bare:
                question = Question(model, batch, [Prepared(each, np.eye(each.ndim)) for each in batch], targets, run)
                inside.append(_inside(question, layer))
            output.append(said.float().cpu())

        size = (
            run.fitting(_TIMES * one.nbytes, one[0, 0].numel(), device) if len({each.shape for each in x}) == 1 else 1
        )
        run.chunks(count, size).map(ask, "Asking the network about each case")
    embedding, gradients = (torch.cat(each).numpy() for each in zip(*inside, strict=True)) if inside else (None, None)
    return Cohort(
        model,
        [f"case {i + 1}" for i in range(count)] if uids is None else uids,
        x,
        [np.eye(x[0].ndim)] * count if affines is None else affines,
        [each.detach().abs() for each in maps],
        masks,
        labels,
        columns,
        torch.cat(output),
        embedding,
        gradients,
        bare,
    )


def _inside(question: Question, layer: str) -> tuple[Tensor, Tensor]:
    """The means and maxima of the activations of `layer` (N, F), and the gradients (N, M, F) of the evidence there."""
    values, taken = capture(question, (layer,))
    units = Units.of(layer, taken[layer])
    moving = [units.moving(question.gradients(v, [taken[layer].raw], keep=True)[0], "both") for v in values]
    gradients, classes = torch.stack(moving, 1), len(values)
    if classes > 1:
        # What speaks for one of many classes speaks against the others.
        gradients = (gradients - gradients.mean(1, keepdim=True)) * classes / (classes - 1)
    # The mean and the maximum of what is the same everywhere cannot be moved apart.
    flat = units.flat.amax(2) == units.flat.amin(2)
    gradients = gradients.masked_fill(flat.repeat(1, 2)[:, None], torch.nan)
    return units.vector("both").float().cpu(), gradients.float().cpu()
