"""What is explained: from a network's output to one number per sample."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from MedXAILib.errors import MedXAIError, unknown
from MedXAILib.generator import External, decoder, numbered, spoken
from MedXAILib.model import Model, Prepared
from MedXAILib.volume import Volume
from MedXAILib.within import mask_on

Value = Callable[[Tensor], Tensor]
"""From an output (M, ...) to one number per sample (M,); M may be a multiple of the N samples it was bound to."""


@dataclass(frozen=True)
class Bound:
    """A target made definite by the output it was bound to: predicted classes known, names resolved."""

    target: Target
    value: Value
    label: str
    outputs: int = 0
    """How many the network has, of the score of a class (see `Model.classes`)."""


@dataclass(frozen=True)
class Target(ABC):
    """What to explain. `layer` reads the output of that layer instead of the network's own."""

    layer: str | None = field(default=None, kw_only=True)

    @abstractmethod
    def bind(self, model: Model, output: Tensor, seen: Sequence[Prepared]) -> Bound:
        """Make this target definite for the samples `seen`, whose output (N, ...) is given."""

    def part(self, start: int, stop: int) -> Target:
        """The target of samples `start` to `stop` of a batch."""
        return self

    def spec(self) -> dict[str, Any]:
        """This target as JSON, for `from_spec`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        plain = {k: v.tolist() if isinstance(v, (Tensor, np.ndarray)) else v for k, v in values.items()}
        return {"kind": type(self).__name__, **{k: v for k, v in plain.items() if v is not None}}


@dataclass(frozen=True)
class ClassTarget(Target):
    """The score (logit) of a class: by name or index, the predicted one when left out, or its lead over `versus`."""

    which: str | int | Sequence[str | int] | None = None
    versus: str | int | None = None

    def part(self, start: int, stop: int) -> Target:
        if self.which is None or isinstance(self.which, (str, int)):
            return self
        return replace(self, which=tuple(self.which[start:stop]))

    def bind(self, model: Model, output: Tensor, seen: Sequence[Prepared]) -> Bound:
        if output.ndim != 2:
            raise MedXAIError(
                f"{model.name} gives an output of shape {tuple(output.shape)}, not one score per class: use "
                "SegmentationTarget for an image of labels."
            )
        scores = _two_sided(output)
        count, outputs = scores.shape[1], output.shape[1]
        if self.which is None:
            chosen = scores.detach().argmax(1)
        else:
            names = (self.which,) if isinstance(self.which, (str, int)) else self.which
            chosen = torch.tensor([model.class_index(name, count, outputs) for name in names], device=output.device)
            chosen = chosen.expand(len(output)) if len(chosen) == 1 else chosen
        against = None if self.versus is None else model.class_index(self.versus, count, outputs)

        def value(output: Tensor) -> Tensor:
            scores = _two_sided(output)
            lead = scores.gather(1, _tiled(chosen, len(scores))[:, None])[:, 0]
            return lead if against is None else lead - scores[:, against]

        indices = chosen.tolist()
        which = indices[0] if len(set(indices)) == 1 else tuple(indices)
        label = ", ".join(dict.fromkeys(model.class_name(i, outputs) for i in indices))
        label += "" if against is None else f" rather than {model.class_name(against, outputs)}"
        return Bound(replace(self, which=which, versus=against), value, label, outputs)


@dataclass(frozen=True)
class RegressionTarget(Target):
    """The value of an output of a regression network, or of a layer, by name or index."""

    which: str | int = 0

    def bind(self, model: Model, output: Tensor, seen: Sequence[Prepared]) -> Bound:
        flat = output.flatten(1)
        index = model.class_index(self.which, flat.shape[1])
        label = model.class_name(index) if self.layer is None else f"{self.layer}[{index}]"
        return Bound(replace(self, which=index), lambda output: output.flatten(1)[:, index], label)


@dataclass(frozen=True)
class SegmentationTarget(Target):
    """A class of a segmentation, within a region of the scan.

    `within` is "predicted" (where the network says this class), "everywhere", a mask `Volume` (non-zero voxels), or a
    box in RAS mm. `measure` is the mean "logit" there, the soft "volume" in mL, or the soft "dice" with the mask.
    """

    which: str | int = 1
    within: Any = "predicted"
    measure: Literal["logit", "volume", "dice"] = "logit"

    def __post_init__(self) -> None:
        if self.measure not in ("logit", "volume", "dice"):
            raise unknown("measure", self.measure, ("logit", "volume", "dice"))

    def bind(self, model: Model, output: Tensor, seen: Sequence[Prepared]) -> Bound:
        rank = model.spatial_dims or 3
        if output.ndim != rank + 2:
            raise MedXAIError(
                f"{model.name} gives an output of shape {tuple(output.shape)}, not an image of labels: use ClassTarget."
            )
        index = model.class_index(self.which, max(2, output.shape[1]), output.shape[1])
        where = torch.stack([self._where(output[i], index, seen[i]) for i in range(len(output))]).to(output)
        name = model.class_name(index, output.shape[1])
        if not where.flatten(1).any(1).all():
            raise MedXAIError(
                f"There is no voxel of '{name}' to explain: choose another class, or within='everywhere'."
            )
        # An output coarser or finer than the input has voxels of another size.
        voxel_ml = torch.tensor(
            [float(np.prod(p.spacing)) * p.x[0].numel() / output[0, 0].numel() / 1000 for p in seen],
            device=output.device,
        )

        def value(output: Tensor) -> Tensor:
            scores = _two_sided(output)
            mask = _tiled(where, len(scores)).flatten(1)
            if self.measure == "logit":
                return (scores[:, index].flatten(1) * mask).sum(1) / mask.sum(1)
            soft = model.probabilities(output)[:, index].flatten(1)
            if self.measure == "volume":
                return (soft * mask).sum(1) * _tiled(voxel_ml, len(scores))
            return 2 * (soft * mask).sum(1) / (soft.sum(1) + mask.sum(1))

        return Bound(replace(self, which=index), value, f"{name} ({self.measure})")

    def _where(self, scores: Tensor, index: int, seen: Prepared) -> Tensor:
        shape = scores.shape[1:]
        if self.within == "predicted":
            return _two_sided(scores[None])[0].argmax(0) == index
        if self.within == "everywhere":
            return torch.ones(shape, dtype=torch.bool)
        # The output's grid spans the input's, whatever its resolution.
        return mask_on(seen, self.within, shape)

    def spec(self) -> dict[str, Any]:
        if isinstance(self.within, Volume):
            return {**replace(self, within=None).spec(), "within": {"mask": self.within.fingerprint}}
        return super().spec()


@dataclass(frozen=True)
class EmbeddingTarget(Target):
    """How alike (cosine) the network's embedding, or that of `layer`, is to a reference: a vector, another scan, or
    "itself", which it is to itself as long as nothing changes."""

    reference: Any = None

    def bind(self, model: Model, output: Tensor, seen: Sequence[Prepared]) -> Bound:
        if self.reference is None:
            raise MedXAIError("An embedding is explained against another case: EmbeddingTarget(reference=that scan).")
        if isinstance(self.reference, str):
            return self._itself(output)
        reference = self.reference
        if isinstance(reference, Volume):
            with torch.no_grad():
                x = model.prepare(reference).x[None].to(output.device)
                reference = read_layers(model, x, (self.layer,))[self.layer]
        reference = torch.as_tensor(reference, dtype=torch.float32, device=output.device).flatten()
        if len(reference) != output[0].numel():
            raise MedXAIError(
                f"The reference has {len(reference)} values and the embedding {output[0].numel()}: "
                "make both with one network and layer."
            )
        return Bound(
            replace(self, reference=reference),
            lambda output: functional.cosine_similarity(output.flatten(1), reference[None]),
            "similarity to the reference",
        )

    def _itself(self, output: Tensor) -> Bound:
        if self.reference != "itself":
            raise unknown("reference", self.reference, ("itself",))
        own = output.detach().flatten(1)

        def value(output: Tensor) -> Tensor:
            return functional.cosine_similarity(output.flatten(1), _tiled(own, len(output)))

        return Bound(self, value, "the scan itself")


@dataclass(frozen=True)
class CaptionTarget(Target):
    """How probable (log) a network finds its caption: all of it, or one `word` of it after those before it.

    `word` is a word (of several alike the first) or its index in the caption, counted from 0 with punctuation marks.
    `caption` is another text to say, one for each sample or one for all; the network's own when left out.
    """

    word: str | int | None = None
    caption: str | Sequence[str] | None = None

    def part(self, start: int, stop: int) -> Target:
        if self.caption is None or isinstance(self.caption, str):
            return self
        return replace(self, caption=tuple(self.caption[start:stop]))

    def bind(self, model: Model, output: Tensor, seen: Sequence[Prepared]) -> Bound:
        if isinstance(model.network, External):
            return Bound(self, lambda output: output[:, 0], "its report")
        network = decoder(model.network, model.name)
        given = (self.caption,) * len(output) if isinstance(self.caption, str) else self.caption
        words = network.beam(output.detach()) if given is None else numbered(network, given).to(output.device)
        captions = [spoken(network, row) for row in words]
        at = torch.tensor([self._index(caption) for caption in captions], device=output.device)
        next_word = functional.pad(words, (0, 1))
        # The word that is asked about, or all of them and the end.
        place = torch.arange(next_word.shape[1], device=output.device)
        length = (words > 0).sum(1, keepdim=True)
        counts = place <= length if self.word is None else place == at[:, None]

        def value(output: Tensor) -> Tensor:
            scores = network.log_probabilities(output, _tiled(words, len(output)))
            of_next = scores.gather(2, _tiled(next_word, len(output))[..., None])[..., 0]
            return of_next.where(_tiled(counts, len(output)), 0).sum(1)

        texts = tuple(" ".join(caption) for caption in captions)
        target = replace(self, caption=texts[0] if len(set(texts)) == 1 else texts)
        said = texts if self.word is None else [c[i] for c, i in zip(captions, at.tolist(), strict=True)]
        return Bound(target, value, ", ".join(f"“{text}”" for text in dict.fromkeys(said)))

    def _index(self, caption: Sequence[str]) -> int:
        if self.word is None:
            return 0
        for word in (self.word, self.word.lower()) if isinstance(self.word, str) else ():
            if word in caption:
                return caption.index(word)
        if isinstance(self.word, int) and 0 <= self.word < len(caption):
            return self.word
        raise MedXAIError(
            f"There is no word '{self.word}' in the caption '{' '.join(caption)}': choose one of its words, or say the "
            "caption that you mean, with CaptionTarget(word, caption)."
        )


_KINDS: dict[str, type[Target]] = {
    kind.__name__: kind for kind in (ClassTarget, RegressionTarget, SegmentationTarget, EmbeddingTarget, CaptionTarget)
}


def from_spec(spec: Mapping[str, Any]) -> Target:
    """The target that `Target.spec` described.

    Raises:
        MedXAIError: when it was within a mask, which is not kept in a specification.
    """
    values = dict(spec)
    kind = _KINDS[values.pop("kind")]
    if isinstance(values.get("within"), dict):
        raise MedXAIError(
            "The target lies within a mask, which is not stored: give target=SegmentationTarget(...) again."
        )
    return kind(**values)


def as_target(target: Target | str | int | None, model: Model) -> Target:
    """What a person meant: a class name or index for a classifier, a label for a segmentation, the model's default."""
    if isinstance(target, Target):
        return target
    given = () if target is None else (target,)
    if model.task == "segmentation":
        return SegmentationTarget(*given)
    if model.task == "regression":
        return RegressionTarget(*given)
    if model.task == "embedding":
        return EmbeddingTarget(*given)
    if model.task == "captioning":
        return CaptionTarget(*given)
    return ClassTarget(*given)


def read_layers(model: Model, x: Tensor, layers: Sequence[str | None]) -> dict[str | None, Tensor]:
    """The output of the network (for None) and of the layers named, from one forward of `x` (N, C, *spatial)."""
    refuse_layers(model, x, layers)
    read: dict[str | None, Tensor] = {}
    handles = []
    try:
        for name in dict.fromkeys(layers):
            if name is not None:
                handles.append(
                    model.layer(name).register_forward_hook(lambda _m, _i, y, name=name: read.update({name: y}))
                )
        read[None] = model.forward(x)
    finally:
        for handle in handles:
            handle.remove()
    return read


def refuse_layers(model: Model, x: Tensor, layers: Sequence[str | None]) -> None:
    """
    Raises:
        MedXAIError: when one of `layers` is a layer, and no layer ever sees all of `x` (N, C, *spatial).
    """
    if any(layers) and model.slides(x.shape[2:]):
        raise MedXAIError(
            f"A layer of {model.name} sees one window of the scan at a time: say where with region=(x, y, z) in RAS "
            "mm, or explain the network's own output."
        )


def _two_sided(output: Tensor) -> Tensor:
    """A single score, as of a binary network, as the scores of both its classes."""
    return torch.cat([-output, output], dim=1) if output.shape[1] == 1 else output


def _tiled(values: Tensor, length: int) -> Tensor:
    """Per-sample values (N, ...) for `length` samples that repeat those N in order."""
    return values.repeat(length // len(values), *[1] * (values.ndim - 1))
