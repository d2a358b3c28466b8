"""What a network does with samples, operator by operator, and what changes of them change.

The network itself runs, and every operator is seen (`seeing`). Those that are local carry boxes of what has changed
(`changes`); one that is not gets the whole of what it is given, and all after it is computed as ever. So any network is
right, and one that is local up to a global pooling is fast.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from MedXAILib.engines.boxes import put
from MedXAILib.engines.changes import Asked, Change, Local, Operand, local
from MedXAILib.engines.operators import replaced, tensors
from MedXAILib.engines.seeing import Seeing, intercepting, known, mark
from MedXAILib.errors import MedXAIError
from MedXAILib.explainer import Question

# What only asks how a tensor is made, or makes one that is, whatever its values.
_ABOUT = frozenset(
    "size dim ndimension numel stride len is_floating_point is_complex get_device is_contiguous element_size "
    "storage_offset requires_grad result_type register_hook retain_grad zeros_like ones_like full_like empty_like "
    "rand_like randn_like new_zeros new_ones new_full new_empty new_tensor repr format hash".split()
)

# Where changes are so much of all samples together, all is computed: in batches that costs less.
_MOST = 0.7


class Diverged(MedXAIError):
    """A network took another way than for the sample as it is."""


@dataclass(frozen=True)
class Spot:
    """A tensor that depends on the input: the how manieth that was made; and where it has changed, if only there: some
    samples after the other."""

    number: int
    changes: tuple[Change, ...] = ()


@dataclass
class Step:
    """An operator on its way: which tensors it was `given` and it `made`, by their numbers, and the `local` rule for
    it, if all before it are local too. `shape` (C, *spatial) is that of what a local one made, `work` about how many
    multiplications that took."""

    name: str
    local: Local | None
    given: tuple[int, ...]
    made: tuple[int, ...]
    shape: tuple[int, ...]
    work: float


@dataclass
class Looked:
    """What a network did with samples (M, C, *spatial): its steps, and those of the tensors it made that have to be
    known around changes, by their numbers."""

    shape: tuple[int, ...]
    steps: list[Step] = field(default_factory=list)
    count: int = 1
    kept: dict[int, Tensor] = field(default_factory=dict)

    @property
    def work(self) -> float:
        """About how many multiplications it took."""
        return sum(step.work for step in self.steps)

    @property
    def nbytes(self) -> int:
        """What is kept, in bytes."""
        return sum(t.nbytes for t in self.kept.values())


@dataclass(frozen=True)
class Cut:
    """A place in a network: after so many `steps`, when the tensors with the numbers `live` are what the rest needs."""

    steps: int
    live: frozenset[int]


class _Seeing(Seeing):
    """What looking at samples and at changes of them have in common."""

    looked: Looked

    def concerns(self, name: str, args: Any, kwargs: Any) -> bool:
        return name not in _ABOUT and any(known(t) is not None for t in tensors((args, kwargs)))


class Looking(_Seeing):
    """While this is on, what a network does with samples is noted. After so many steps as a `cut` says, what comes is
    recorded for a gradient with respect to the tensors that have been made, as if each were an input."""

    def __init__(self, cut: Cut | None = None) -> None:
        super().__init__()
        self.cut, self._local = cut, {0}
        self.leaves: dict[int, Tensor] = {}

    def start(self, x: Tensor) -> Tensor:
        """`x` (M, C, *spatial) as the input to follow from here on."""
        self.looked = Looked(tuple(x.shape[1:]))
        return self._marked(x.detach().view_as(x), 0)

    def seen(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        asked, looked, cut = Asked(func, args, kwargs), self.looked, self.cut
        if cut is not None and len(looked.steps) == cut.steps:
            for leaf in self.leaves.values():
                leaf.requires_grad_()
        with torch.set_grad_enabled(cut is not None and len(looked.steps) >= cut.steps):
            result = func(*args, **kwargs)
        given = [t for t in tensors((args, kwargs)) if known(t) is not None]
        numbers = tuple(known(t).number for t in given)
        rule = local(name, asked, given, result) if self._local.issuperset(numbers) else None
        for number, t in zip(numbers, given, strict=True):
            if number in self._local and (rule is None or rule.base):
                looked.kept[number] = t.detach()
        made = []
        for t in tensors(result):
            if known(t) is None:
                self._marked(t, looked.count)
                looked.count += 1
            made.append(known(t).number)
        if rule is not None and rule.result:
            looked.kept[made[0]] = result.detach()
        elif rule is not None:
            self._local.add(made[0])
        shape = tuple(result.shape[1:]) if rule is not None else ()
        looked.steps.append(Step(name, rule, numbers, tuple(made), shape, _work(name, args, result)))
        return result

    def _marked(self, tensor: Tensor, number: int) -> Tensor:
        if self.cut is not None and number in self.cut.live:
            self.leaves[number] = tensor
        return mark(tensor, Spot(number))


class Changing(_Seeing):
    """While this is on, a network that has `looked` at samples sees changes of them, so many `together`, until a `cut`
    is `Reached`. What becomes of the tensors with the numbers `wanted` is remembered, or of those that live there."""

    def __init__(
        self, looked: Looked, together: int = 1, cut: Cut | None = None, wanted: Container[int] = frozenset()
    ) -> None:
        super().__init__()
        self.looked, self.together, self.cut = looked, together, cut
        self.wanted = wanted if cut is None else cut.live
        self.work: list[float] = []
        self.nbytes = 0
        """Of the largest tensor or change that was made, of one sample."""
        self.now: dict[int, Tensor | tuple[Change, ...]] = {}
        """What has become of those that were wanted."""

    def start(self, change: Change) -> Tensor:
        """A change of the input (M, C, *spatial) to follow from here on."""
        # Boxes of one size are as large as the largest, and near a border they are small: so not all are together.
        size = self.together if change.values.device.type == "cpu" else len(change.low)
        parts = zip(change.values.split(size), change.low.split(size), strict=True)
        return self._changed(tuple(Change(values, low) for values, low in parts), 0, self.looked.shape)

    def whole(self, tensor: Tensor) -> Tensor:
        """All of `tensor` (M, ...), changed or not."""
        spot = known(tensor)
        return tensor if spot is None or not spot.changes else self._put(spot.changes, self.looked.kept[spot.number])

    def seen(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        done, steps = len(self.work), self.looked.steps
        if self.cut is not None and done == self.cut.steps:
            raise Reached
        step = steps[done] if done < len(steps) else None
        spots = [known(t) for t in tensors((args, kwargs)) if known(t) is not None]
        if step is None or step.name != name or step.given != tuple(spot.number for spot in spots):
            raise Diverged("This network takes another way for a changed scan than for the scan as it is.")
        if step.local is None or not all(spot.changes for spot in spots):
            args, kwargs = replaced((args, kwargs), self.whole)
            result = func(*args, **kwargs)
            self.work.append(_work(name, args, result))
            for number, t in zip(step.made, tensors(result), strict=True):
                self._plain(t, number)
            return result
        asked, kept = Asked(func, args, kwargs), self.looked.kept
        bases, before = [kept.get(spot.number) for spot in spots], kept.get(step.made[0])
        found: list[Any] = []
        begin, work = 0, 0.0
        for changes in zip(*(spot.changes for spot in spots), strict=True):
            own = slice(begin, begin := begin + len(changes[0].low))
            operands = [Operand(change, _of(base, own)) for change, base in zip(changes, bases, strict=True)]
            found.append(step.local(asked, operands, _of(before, own)))
            work += _work(name, args, found[-1] if isinstance(found[-1], Tensor) else found[-1].values)
        self.work.append(work)
        if isinstance(found[0], Tensor):
            return self._plain(torch.cat(found), step.made[0])
        return self._changed(tuple(found), step.made[0], step.shape)

    def _changed(self, changes: tuple[Change, ...], number: int, shape: tuple[int, ...]) -> Tensor:
        count, like = sum(len(change.low) for change in changes), changes[0].values
        size = sum(change.values[:, 0].numel() for change in changes)
        if size >= _MOST * count * prod(shape[1:]):
            if all(change.box == shape[1:] for change in changes):
                return self._plain(torch.cat([change.values for change in changes]), number)
            if number in self.looked.kept:
                return self._plain(self._put(changes, self.looked.kept[number]), number)
        self._noted(number, changes)
        # Of the right shape and without any memory: nobody reads it.
        return mark(like.new_empty(()).expand(count, *shape), Spot(number, changes))

    def _put(self, changes: Sequence[Change], base: Tensor) -> Tensor:
        """Samples that are `base` (1 or M, C, *spatial) but for the changes."""
        count = sum(len(change.low) for change in changes)
        made = base.repeat(count // len(base), *[1] * (base.ndim - 1))
        paste(made, changes)
        return made

    def _plain(self, tensor: Tensor, number: int) -> Tensor:
        self._noted(number, tensor)
        return mark(tensor, Spot(number))

    def _noted(self, number: int, what: Tensor | tuple[Change, ...]) -> None:
        values = what if isinstance(what, Tensor) else what[0].values
        self.nbytes = max(self.nbytes, values.nbytes // max(1, len(values)) if values.ndim else 0)
        if number in self.wanted:
            self.now[number] = what


def paste(into: Tensor, changes: Sequence[Change]) -> None:
    """Put changes of samples in their place, `into` all of the samples (M, C, *spatial)."""
    begin = 0
    for change in changes:
        own = into[begin : begin + len(change.low)]
        put(own, torch.zeros_like(change.low), change.values, change.low)
        begin += len(own)


def _of(base: Tensor | None, own: slice) -> Tensor | None:
    """Of what is known of all samples, or of each, that of some."""
    return base if base is None or len(base) == 1 else base[own]


class Reached(Exception):
    """As far as somebody wanted to go."""


def look(question: Question, x: Tensor) -> Looked:
    """What the network does with samples `x` (M, C, *spatial).

    Raises:
        Unseen: when a part of it is out of sight.
    """
    # To find out what a target is takes other operators than its value.
    question.bind()
    mode = Looking()
    with intercepting(question.model, mode):
        question.values(mode.start(x))
    return mode.looked


def look_again(
    question: Question, looked: Looked, change: Change, together: int = 1, wanted: Container[int] = frozenset()
) -> tuple[list[Tensor], Changing]:
    """Each target's value (M,) of a change, so many samples `together`, and what became of the tensors `wanted`.

    Raises:
        Diverged: when the network takes another way.
    """
    mode = Changing(looked, together, wanted=wanted)
    with intercepting(question.model, mode):
        values = question.values(mode.start(change))
        return [mode.whole(value) for value in values], mode


def _work(name: str, args: Any, result: Any) -> float:
    """About how many multiplications an operator took."""
    made = float(next((t.numel() for t in tensors(result)), 0))
    given = list(tensors(args))
    if name in ("conv", "linear") and len(given) > 1:
        return made * given[1][0].numel()
    if name == "conv_transpose":
        return made * given[1].shape[0] * given[1][0, 0].numel()
    if name in ("matmul", "bmm"):
        return made * given[0].shape[-1]
    return made
