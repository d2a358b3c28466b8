"""What every technique is: its parameters, its place in the survey's taxonomy, and how it answers a question."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from torch import Tensor

from MedXAILib.engines.checkpointing import Block
from MedXAILib.errors import MedXAIError
from MedXAILib.explanation import Explanation
from MedXAILib.model import Model, Prepared
from MedXAILib.run import Run
from MedXAILib.target import Bound, Target, read_layers
from MedXAILib.volume import Volume

# Gradients are this much larger on their way back, because most of them are too small for float16.
_SCALE = 1024


def _split(value: Any) -> Any:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_split)]
"""A parameter that is several names, or one text with commas between them."""

Folder = Annotated[str, Field(json_schema_extra={"format": "folder"})]
"""A parameter that is the path of a folder."""


@dataclass(frozen=True)
class Taxonomy:
    """Where van der Velden et al. 2022 place a technique, and what to expect of it."""

    section: str
    """The survey's section."""
    family: Literal["visual", "textual", "example-based"]
    built: Literal["post hoc", "model-based"]
    applies: Literal["model-specific", "model-agnostic"]
    scope: tuple[Literal["local", "global"], ...]
    strengths: str
    limits: str


def backpropagation(strengths: str, limits: str) -> Taxonomy:
    """The taxonomy of the visual, backpropagation-based methods (section 3.1.1)."""
    return Taxonomy("3.1.1", "visual", "post hoc", "model-specific", ("local",), strengths, limits)


def perturbation(strengths: str, limits: str) -> Taxonomy:
    """The taxonomy of the visual, perturbation-based methods (section 3.1.2)."""
    return Taxonomy("3.1.2", "visual", "post hoc", "model-agnostic", ("local",), strengths, limits)


@dataclass(frozen=True)
class Attribution:
    """A map on the network's input grid: `values` (N, C or 1, *spatial), and what theory says it should sum to,
    missed by `residual` (relative, the worst sample's). Of a map that is an estimate, `interval` (as `values`) is half
    the width of the 95 % confidence interval of each voxel."""

    values: Tensor
    residual: dict[str, float] = field(default_factory=dict)
    interval: Tensor | None = None


@dataclass
class Question:
    """What an explainer is asked: why `model` gives the `targets` for the samples `seen`, stacked as `x`.

    `x` is (N, C, *spatial) on the network's device. The network is in evaluation mode with frozen parameters.
    """

    model: Model
    x: Tensor
    seen: Sequence[Prepared]
    targets: Sequence[Target]
    run: Run = field(default_factory=Run)
    bound: list[Bound] = field(default_factory=list)
    fitting: int = 0
    """How many versions of the samples fit in memory at once, when that has been measured."""
    recomputed: Sequence[Block] = ()
    """The parts of the network that are computed again in a backward, because not even one version fits."""
    look: Callable[[Tensor], object] | None = None
    """Takes the first target's map (N, C or 1, *spatial) as it is so far; None when nobody looks on."""
    _at_samples: dict[str | None, list[Tensor]] = field(default_factory=dict, init=False, repr=False)
    """What the network says of the samples, by the precision it computes in."""

    def values(self, x: Tensor) -> list[Tensor]:
        """Each target's value (M,) for `x` (M, C, *spatial), from one forward. M is N or repeats of the N samples."""
        if x is not self.x or torch.is_grad_enabled():
            return self._values(x)
        precision = self.model._precision
        if precision not in self._at_samples:
            self._at_samples[precision] = self._values(x)
        return self._at_samples[precision]

    def _values(self, x: Tensor) -> list[Tensor]:
        if not self.bound and not torch.equal(x[: len(self.x)], self.x):
            self.bind()
        read = read_layers(self.model, x, [target.layer for target in self.targets])
        self.run.cost.forwards += len(x)
        if self.run.precision is not None:
            read = {name: output.to(self.x.dtype) for name, output in read.items()}
        if not self.bound:
            self.bound = [t.bind(self.model, read[t.layer][: len(self.x)], self.seen) for t in self.targets]
        return [bound.value(read[bound.target.layer]) for bound in self.bound]

    def bind(self) -> None:
        """Settle what each target is. What is predicted, and where, is a matter of the samples themselves and not of
        changed ones."""
        if not self.bound:
            with torch.no_grad():
                self.values(self.x)

    def alone(self) -> Iterator[Question]:
        """Each sample as a question of its own."""
        self.bind()
        if len(self.x) == 1:
            yield self
            return
        for i in range(len(self.x)):
            targets = [bound.target.part(i, i + 1) for bound in self.bound]
            yield replace(self, x=self.x[i : i + 1], seen=self.seen[i : i + 1], targets=targets, bound=[])

    def gradients(self, value: Tensor, inputs: Sequence[Tensor], keep: bool = False) -> tuple[Tensor, ...]:
        """The gradient of the summed `value` (M,) with respect to each of `inputs`; `keep` the graph for another.

        Raises:
            MedXAIError: when the network's output does not depend differentiably on them.
        """
        if not value.requires_grad:
            raise MedXAIError(
                f"{self.model.name} is not differentiable (its output carries no gradient: a detach, an argmax or "
                "no_grad inside): use a perturbation method, or wrap the network so that it returns scores."
            )
        self.run.cost.backwards += len(value)
        scale = _SCALE if self.run.precision == "float16" else 1
        found = torch.autograd.grad(value.sum() * scale, list(inputs), retain_graph=keep, allow_unused=True)
        if self.run.precision is not None:
            found = tuple(None if g is None else g.to(self.x.dtype) / scale for g in found)
        return tuple(torch.zeros_like(i) if g is None else g for g, i in zip(found, inputs, strict=True))

    def show(self, so_far: Callable[[], Tensor]) -> None:
        """Let whoever looks on see the first target's map (N, C or 1, *spatial), which `so_far` makes."""
        look = self.look
        if look is not None:
            self.run.glimpse(lambda: look(so_far()))


class Technique(BaseModel, ABC):
    """What all techniques have. Its fields are its parameters: validated, with defaults and help, from which the panel,
    the command line and the documentation build themselves."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    id: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    taxonomy: ClassVar[Taxonomy]
    kind: ClassVar[str]
    """The kind of explanation that it answers with."""
    layered: ClassVar[bool] = False
    """Whether it looks inside the network, at a layer."""
    anytime: ClassVar[bool] = False
    """Whether it can end early, with what it has found so far."""

    @property
    def signed(self) -> bool:
        """Whether its maps speak for (positive) and against (negative)."""
        return True


class Explainer(Technique):
    """A technique that answers with a map."""

    kind: ClassVar[str] = "SaliencyMap"
    stitching: ClassVar[Literal["sum", "blend"] | None] = "sum"
    """How its maps of a scan's windows become one: summed, because they add up to the score, or blended. None when it
    asks about whole scans itself."""

    @abstractmethod
    def attribute(self, question: Question) -> list[Attribution]:
        """Answer `question`: one attribution for each of its targets."""


class Teller(Technique):
    """A technique that answers otherwise than with one map: in words, by concepts, by cases."""

    bare: ClassVar[Mapping[str, Any]] = {}
    """Parameters with which it says the same without what takes long: maps, and checks of them."""

    @classmethod
    def asked_again(cls, told: Explanation) -> Mapping[str, Any]:
        """Parameters, besides those of `told`, with which another network is asked the same."""
        return cls.bare

    @abstractmethod
    def tell(self, question: Question, volume: Volume) -> Callable[..., Explanation]:
        """Answer `question`, of one target for the one sample that the network sees of `volume`.

        Returns:
            What makes the explanation of its provenance, such as `partial(Caption, residual={}, text=text, ...)`. Maps
            in it are on the grid of `volume`.
        """
