"""What operators send back: one mechanism for deconvolution, guided backpropagation, LRP, attention and DeepLIFT.

While the forward runs once, every operator is seen (`seeing`), and its result is replaced by the same values with
another way back. A rule says that as a forward expression, from two pieces: `send` (these values, but what comes back
goes there, scaled) and plain autograd.

What comes back to a tensor is a multiplier m. Relevance is m * x (LRP) or m * (x - x') (DeepLIFT); where values are
added, moved, averaged or interpolated, multipliers go back as gradients do, which is why most operators need no rule.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from MedXAILib.engines.checkpointing import checkpointed
from MedXAILib.engines.decompositions import DECOMPOSED
from MedXAILib.engines.operators import (
    ACTIVATION,
    DIVISION,
    FIXED,
    LINEAR,
    MOVE,
    PRODUCT,
    SILENT,
    UNKNOWN,
    WEIGHTED,
    Affine,
    Normalisation,
    family,
    replaced,
    tensors,
)
from MedXAILib.engines.seeing import OUT_OF_SIGHT, Seeing, Unseen, intercepting, known, mark
from MedXAILib.errors import MedXAIError
from MedXAILib.explainer import Question

# Values between 0 and 1 that say how much of something counts.
_GATES = frozenset({"sigmoid", "hardsigmoid", "softmax"})

_SUMS = frozenset("add sub subtract radd rsub".split())

# What may add a constant to something that depends on the input.
_ADDING = _SUMS | frozenset("cat concat concatenate stack hstack vstack dstack where".split())

# What makes its first argument like its second.
_LIKE = frozenset("to type_as expand_as view_as reshape_as".split())

PASSED = "passed through"


@dataclass(frozen=True)
class Trace:
    """What is known of a tensor that depends on the input."""

    raw: bool = False
    """Whether its values are the input's own, at most in other places."""
    gate: bool = False
    """Whether it says how much of something counts (a sigmoid or softmax)."""
    call: Call | None = None
    """The weighted operator that it is the result of, as long as it has no way back, and the `rule` for that."""
    rule: Rule | None = None


class Rule(ABC):
    """What an operator sends back, as data: a frozen dataclass."""

    title: ClassVar[str]
    compares: ClassVar[bool] = False
    """Whether it needs what the operator was given in another forward (`Call.others`)."""
    through: ClassVar[bool] = False
    """Whether, of a weighted operator, it goes back through the operator itself (`Call.result`)."""

    @abstractmethod
    def __call__(self, call: Call) -> Tensor:
        """The operator's values, with this rule's way back."""


@dataclass(frozen=True)
class Composite:
    """Which rule for which operator: the first whose key is the operator's name or family, or "first" for the weighted
    operators on the input itself."""

    rules: tuple[tuple[str, Rule], ...]
    merges: bool = False
    """Whether a batch normalisation becomes part of the convolution or linear layer before it."""
    balanced: bool = False
    """Whether what constants take is counted, so that the relevance can be added up."""
    strict: bool = True
    """Whether operators that are neither linear nor in the list are refused; else they send back their gradient."""
    shared_gates: bool = False
    """Whether gates get a share of a product, and not only what they let through."""

    def rule(self, keys: Sequence[str]) -> Rule | None:
        """The first rule for one of `keys`."""
        return next((rule for key, rule in self.rules if key in keys), None)


@dataclass
class Book:
    """What happened on the way: which rule met which operator, and what constants and stabilisers take."""

    met: dict[str, Counter[str]] = field(default_factory=dict)
    constants: list[Tensor] = field(default_factory=list)
    """The constants that were added to something, as leaves of the graph."""
    lost: float = 0.0
    """The relevance that stabilisers took in the backward so far."""
    largest: int = 0
    """Bytes of the largest result."""

    def count(self, rule: str, name: str) -> None:
        """Note that `rule` met an operator."""
        self.met.setdefault(rule, Counter())[name] += 1

    def constant(self, value: Tensor) -> Tensor:
        """`value`, so that its share can be asked for later."""
        leaf = value.detach().requires_grad_()
        self.constants.append(leaf)
        return leaf


@dataclass
class Call:
    """An operator being asked for: its `name`, what PyTorch calls it, its arguments (`given` are those that depend on
    the input), and what `others` it was given in the forward that this one is compared with. A weighted one comes as
    `affine`, with its `result`."""

    name: str
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    book: Book
    composite: Composite
    given: list[Tensor]
    others: tuple[Tensor, ...] = ()
    affine: Affine | None = None
    result: Tensor | None = None

    @property
    def x(self) -> Tensor:
        """The first tensor that depends on the input."""
        return self.given[0]

    def plain(self) -> Any:
        """What it gives, with its own gradient."""
        return self.func(*self.args, **self.kwargs)

    def value(self, *instead: Tensor) -> Any:
        """What it gives, without a way back; for tensors `instead` of those given."""
        with torch.no_grad():
            return self.on(*instead) if instead else self.plain()

    def on(self, *instead: Tensor) -> Any:
        """What it gives for tensors `instead` of those given."""
        left = iter(instead)
        swapped = replaced((self.args, self.kwargs), lambda t: t if trace(t) is None else next(left))
        return self.func(*swapped[0], **swapped[1])

    @property
    def gate(self) -> Tensor | None:
        """The factor that is a gate, of a product of something with one; else None."""
        gates = [factor for factor in self.given if (known := trace(factor)) and known.gate]
        return gates[0] if len(gates) == 1 < len(self.given) else None

    def gated(self) -> Any:
        """What a product of something with a gate gives, all of it going back to what is let through; else None."""
        gate = self.gate
        return None if gate is None else self.on(*(t.detach() if t is gate else t for t in self.given))

    def weighted(self) -> Tensor:
        """What a weighted operator gives, with its own gradient."""
        assert self.affine is not None
        bias = None if self.affine.bias is None else self.constant(self.affine.bias)
        return self.affine(self.affine.x, bias)

    def normalised(self) -> Tensor:
        """What a normalisation with fixed statistics gives, with its own gradient."""
        gain, shift = Normalisation.of(self.name, self.args, self.kwargs).fixed
        return torch.addcmul(self.constant(shift), self.x, gain)

    def constant(self, value: Tensor) -> Tensor:
        """A constant that is added, whose share is counted where the composite wants it."""
        return self.book.constant(value) if self.composite.balanced else value.detach()


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, book: Book, how: Sequence[tuple[Share, Share]], *ways: Tensor) -> Tensor:
        ctx.book = book
        ctx.how = [tuple(None if isinstance(share, Tensor) else share for share in pair) for pair in how]
        ctx.save_for_backward(*(share for pair in how for share in pair if isinstance(share, Tensor)))
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (m,), saved, back = gradients, iter(ctx.saved_tensors), []
        for scale, taken in ctx.how:
            back.append(m * (next(saved) if scale is None else scale) if scale != 1 else m)
            if taken != 0:
                taken = next(saved) if taken is None else taken
                ctx.book.lost += float(
                    (back[-1] * taken).sum() if isinstance(taken, Tensor) else back[-1].sum() * taken
                )
        return None, None, None, *back


Share = Tensor | float
Way = tuple[Tensor, Share, Share]
"""Where relevance goes: to this tensor, as so many times the multiplier, of which so much is taken by a stabiliser."""


def send(value: Tensor, *ways: Way, call: Call) -> Tensor:
    """`value`, with these ways back."""
    sent: Tensor = _Send.apply(value.detach(), call.book, [way[1:] for way in ways], *(way[0] for way in ways))
    return sent


def trace(tensor: Tensor) -> Trace | None:
    """What is known of `tensor`; None when it does not depend on the input."""
    found: Trace | None = known(tensor)
    return found


Record = list[tuple[str, tuple[Tensor, ...]]]
"""What operators were given in a forward, in their order, for another to be compared with."""


class Interception(Seeing):
    """While this is on, operators send back what `composite` says."""

    def __init__(self, composite: Composite, record: Record | None = None) -> None:
        super().__init__()
        self.composite, self.record = composite, record
        self.book = Book()
        self._compared = 0
        self._ways = WeakTensorKeyDictionary()

    def start(self, x: Tensor) -> Tensor:
        """`x` (N, C, *spatial) as the input to follow from here on."""
        return mark(x.detach().requires_grad_(), Trace(raw=True))

    def concerns(self, name: str, args: Any, kwargs: Any) -> bool:
        args = args[:1] if name in _LIKE else args
        # Every tensor has to be looked at.
        given = [t for t in tensors((args, kwargs)) if self._follows(t)]
        return bool(given) and name not in SILENT

    def seen(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        if name in _LIKE:
            args = args[:1] + replaced(args[1:], _untraced)
        if name in DECOMPOSED:
            with self:
                return DECOMPOSED[name](*args, **kwargs)
        return self._sent(name, func, args, kwargs)

    def _sent(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        if name == "batch_norm" and self.composite.merges and (merged := self._merged(args, kwargs)) is not None:
            return merged
        args, kwargs = replaced((args, kwargs), self._on_its_way)
        given = [t for t in tensors((args, kwargs)) if trace(t) is not None]
        known = [trace(t) or Trace() for t in given]
        call = Call(name, func, args, kwargs, self.book, self.composite, given)
        kind = _kind(call)
        raw, gate = all(k.raw for k in known), all(k.gate for k in known)
        rule = self.composite.rule((*(("first",) if raw and kind == WEIGHTED else ()), name, kind))
        if rule is None:
            result = self._passed(call, kind)
        else:
            self.book.count(rule.title, name)
            if kind == WEIGHTED:
                return self._weighted(call, rule)
            result = self._by_rule(call, rule)
        if self.composite.strict and torch.is_autocast_enabled(call.x.device.type):
            # Where relevance has to add up, only the products themselves are in the lower precision.
            result = replaced(result, _wide)
        for t in tensors(result):
            self.book.largest = max(self.book.largest, t.nbytes)
            if t.is_floating_point():
                mark(t, Trace(raw and kind == MOVE, name in _GATES or (gate and kind in (MOVE, LINEAR))))
        return result

    def _weighted(self, call: Call, rule: Rule) -> Tensor:
        call.affine = Affine.of(call.func, call.name, call.args, call.kwargs)
        with torch.set_grad_enabled(rule.through):
            result = call.weighted()
        # A batch normalisation may follow that belongs to it.
        return mark(_noticed(result), Trace(call=call, rule=rule))

    def _merged(self, args: Any, kwargs: Any) -> Tensor | None:
        normalisation = Normalisation.of("batch_norm", args, kwargs)
        before = trace(normalisation.x)
        if before is None or before.call is None or before.rule is None or normalisation.mean is None:
            return None
        gain, shift = normalisation.fixed
        assert before.call.affine is not None
        call = replace(before.call, affine=before.call.affine.followed(gain.flatten(), shift.flatten()))
        with torch.set_grad_enabled(before.rule.through):
            result = torch.addcmul(call.constant(shift), normalisation.x, gain)
        self.book.count(before.rule.title, "batch_norm")
        return mark(_noticed(result), Trace(call=call, rule=before.rule))

    def _on_its_way(self, tensor: Tensor) -> Tensor:
        """`tensor`, with the way back of the weighted operator that it is the result of."""
        known = trace(tensor)
        if known is None or known.call is None or known.rule is None:
            return tensor
        if tensor not in self._ways:
            self._ways[tensor] = mark(known.rule(replace(known.call, result=tensor)), Trace())
        return self._ways[tensor]

    def _passed(self, call: Call, kind: str) -> Any:
        if kind not in (MOVE, LINEAR, WEIGHTED, FIXED) and self.composite.strict:
            raise MedXAIError(
                f"There is no rule for the operator '{call.name}' of this network: use a method that needs none, such "
                "as gradient or integrated_gradients."
            )
        self.book.count(PASSED, call.name)
        if self.composite.balanced and call.name in _ADDING:
            numbers = call.name in _SUMS
            call.args = tuple(call.x.new_tensor(a) if numbers and type(a) in (int, float) else a for a in call.args)
            call.args = replaced(call.args, self._counted)
        if kind == WEIGHTED:
            call.affine = Affine.of(call.func, call.name, call.args, call.kwargs)
            return call.weighted()
        if kind == FIXED:
            return call.normalised()
        return call.plain()

    def _counted(self, tensor: Tensor) -> Tensor:
        return self.book.constant(tensor) if tensor.is_floating_point() and trace(tensor) is None else tensor

    def _follows(self, tensor: Tensor) -> bool:
        """Whether `tensor` depends on the input."""
        if trace(tensor) is None and tensor.requires_grad and not isinstance(tensor, nn.Parameter):
            if not tensor.is_leaf:
                raise Unseen(OUT_OF_SIGHT.format(type(tensor.grad_fn).__name__))
            mark(tensor, Trace())
        return trace(tensor) is not None

    def _by_rule(self, call: Call, rule: Rule) -> Any:
        if rule.compares:
            call.others = self._other(call)
        return rule(call)

    def _other(self, call: Call) -> tuple[Tensor, ...]:
        """What the operator in the place of `call` was given in the forward that is compared with."""
        assert self.record is not None
        name, others = self.record[self._compared] if self._compared < len(self.record) else ("", ())
        if name != call.name or [t.shape for t in others] != [t.shape for t in call.given]:
            raise MedXAIError(_ANOTHER_WAY)
        self._compared += 1
        return others

    def again(self) -> AbstractContextManager[object]:
        """Inside what this returns, a part of the forward that begins now can be computed once more."""
        return _Again(self, self._compared)

    def finished(self) -> None:
        """The forward is over: nothing may be left to compare with."""
        if self.record is not None and self._compared < len(self.record):
            raise MedXAIError(_ANOTHER_WAY)


_ANOTHER_WAY = (
    "This network takes another way for the baseline than for the scan, so that they cannot be compared: use "
    "gradient_shap or integrated_gradients."
)


class _Again:
    def __init__(self, mode: Interception, compared: int) -> None:
        self.mode, self.compared = mode, compared
        self._inside = ExitStack()

    def __enter__(self) -> None:
        self.mode._compared, self._left = self.compared, self.mode._compared
        self._inside.enter_context(self.mode.on())

    def __exit__(self, *error: Any) -> None:
        self._inside.close()
        self.mode._compared = self._left


class Recording(Interception):
    """While this is on, `record` takes what operators are given whose rules compare, and nothing else changes."""

    def __init__(self, composite: Composite) -> None:
        super().__init__(composite, [])

    def _by_rule(self, call: Call, rule: Rule) -> Any:
        if rule.compares and self.record is not None:
            self.record.append((call.name, tuple(t.detach() for t in call.given)))
        return call.value()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _noticed(tensor: Tensor) -> Tensor:
    """`tensor`, so that what is made of it out of sight can be told from a constant."""
    return tensor if tensor.requires_grad else tensor.requires_grad_()


def _alias(tensor: Tensor) -> Tensor:
    return tensor.view_as(tensor)


def _untraced(tensor: Tensor) -> Tensor:
    return tensor.detach()


def _kind(call: Call) -> str:
    """The family of a call: a product with a constant, or a quotient by one, is linear."""
    kind = family(call.name)
    if kind == PRODUCT and len(call.given) == 1:
        return LINEAR
    if kind == DIVISION and len(call.given) == 1 and call.given[0] is call.args[0] and not call.name.startswith("r"):
        return LINEAR
    if (
        call.name in ("batch_norm", "instance_norm")
        and Normalisation.of(call.name, call.args, call.kwargs).mean is not None
    ):
        return FIXED
    # A convolution with weights made from the input is none that a rule knows.
    if len(call.given) > {WEIGHTED: 1, ACTIVATION: 1, PRODUCT: 2}.get(kind, len(call.given)):
        return UNKNOWN
    return kind


@dataclass(frozen=True)
class Multipliers:
    """What came back to `x` (M, C, *spatial) for a target of `value` (M,): relevance is `m` times `x`. Constants that
    were added on the way hold `held`."""

    m: Tensor
    value: Tensor
    held: float

    def residual(self, relevance: Tensor) -> dict[str, float]:
        """By how much `relevance` and what constants hold miss the value, relative to it, over the whole batch."""
        whole = float(self.value.sum(dtype=torch.float64))
        missed = whole - self.held - float(relevance.sum(dtype=torch.float64))
        return {"conservation": abs(missed) / max(abs(whole), 1e-12)}

    def shared_out(self) -> str:
        """Who holds the score, in a sentence."""
        share = self.held / (float(self.value.sum(dtype=torch.float64)) or 1e-12)
        return f"Constants of the network (biases) hold {share:.0%} of the score, the map the other {1 - share:.0%}."


def multipliers(question: Question, x: Tensor, composite: Composite, record: Record | None = None) -> list[Multipliers]:
    """What comes back to `x` (M, C, *spatial) under `composite`, for each target, from one forward.

    Raises:
        MedXAIError: when an operator has no rule.
        Unseen: when one cannot be seen.
    """
    mode, leaf, values = ran(question, x, composite, record)
    return came_back(question, mode.book, values, leaf)


def ran(
    question: Question, x: Tensor, composite: Composite, record: Record | None = None
) -> tuple[Interception, Tensor, list[Tensor]]:
    """A forward of an input like `x` under `composite`: what was on, the input, and each target's value (M,)."""
    mode = Interception(composite, record)
    with intercepting(question.model, mode), checkpointed(question.recomputed, mode.again, edge=_alias):
        leaf = mode.start(x)
        values = question.values(leaf)
    mode.finished()
    return mode, leaf, values


def came_back(question: Question, book: Book, values: list[Tensor], leaf: Tensor) -> list[Multipliers]:
    """What comes back to `leaf` from each of `values`, which it has led to."""
    question.run.operators = {rule: dict(met) for rule, met in book.met.items()}
    # Those of this forward; what is computed again in the backward has others.
    constants, found = list(book.constants), []
    for i, value in enumerate(values):
        book.lost = 0.0
        m, *of_constants = question.gradients(value, [leaf, *constants], keep=i < len(values) - 1)
        held = [float((g * c.detach()).sum(dtype=torch.float64)) for g, c in zip(of_constants, constants, strict=True)]
        found.append(Multipliers(m, value.detach(), sum(held) + book.lost))
    return found


def record(question: Question, x: Tensor, composite: Composite) -> tuple[Record, list[Tensor]]:
    """What a forward of `x` gives its operators, for another to be compared with, and each target's value (M,)."""
    mode = Recording(composite)
    with torch.no_grad(), intercepting(question.model, mode):
        values = question.values(mode.start(x))
    assert mode.record is not None
    return mode.record, [value.detach() for value in values]
