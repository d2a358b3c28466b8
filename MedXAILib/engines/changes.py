"""How far a change goes: what an operator gives where what it was given has changed, and nowhere else.

Nakandala, Kumar and Papakonstantinou, "Incremental and approximate inference for faster occlusion-based deep CNN
explanations", 2019, for two dimensions and three networks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from MedXAILib.engines.boxes import cut, put
from MedXAILib.engines.operators import ACTIVATION, MEMBERS, Normalisation, option, replaced, tensors
from MedXAILib.engines.receptive_field import Geometry, geometry_after
from MedXAILib.engines.seeing import known

_HAS_ONEDNN = torch.backends.mkldnn.is_available()

_VOXELWISE = MEMBERS[ACTIVATION] | frozenset(
    "neg negative positive dropout feature_dropout alpha_dropout clone contiguous detach to type float double half "
    "bfloat16".split()
)
_ARITHMETIC = frozenset("add sub subtract radd rsub mul multiply rmul div divide true_divide truediv".split()) | {
    "maximum",
    "minimum",
}
_POOLS = {
    "max_pool": "input kernel_size stride padding dilation ceil_mode return_indices".split(),
    "avg_pool": "input kernel_size stride padding ceil_mode count_include_pad divisor_override".split(),
}
_CONVOLUTIONS = {
    "conv": "input weight bias stride padding dilation groups".split(),
    "conv_transpose": "input weight bias stride padding output_padding groups dilation".split(),
}


@dataclass(frozen=True)
class Change:
    """M samples where they may differ from the one they are made of: `values` (M, C, *box), each at its `low`
    (M, rank), which lies on the CPU."""

    values: Tensor
    low: Tensor

    @property
    def box(self) -> tuple[int, ...]:
        """The size of the boxes."""
        return tuple(self.values.shape[2:])

    def within(
        self, base: Tensor, low: Tensor, box: Sequence[int], outside: float = 0.0, into: Tensor | None = None
    ) -> Tensor:
        """The samples in boxes (*box) at `low` (M, rank), where they are `base` (1 or M, C, *spatial) but for the
        change; `outside` is what there is beyond the border."""
        if into is None and self.box == tuple(box) and torch.equal(low, self.low):
            return self.values
        found = cut(base, low, box, outside, into)
        put(found, low, self.values, self.low)
        return found


@dataclass(frozen=True)
class Operand:
    """Something that has changed, and the `base` (1 or M, C, *spatial) that it is a change of, where a rule asked for
    that."""

    change: Change
    base: Tensor | None

    def within(self, low: Tensor, box: Sequence[int], outside: float = 0.0, into: Tensor | None = None) -> Tensor:
        """See `Change.within`."""
        assert self.base is not None
        return self.change.within(self.base, low, box, outside, into)


@dataclass(frozen=True)
class Asked:
    """An operator as it is asked for: a `func`, and its arguments, among them tensors that depend on the input, whose
    values mean nothing where they have changed."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def on(self, instead: Sequence[Tensor], constant: Callable[[Tensor], Tensor] = lambda t: t) -> Any:
        """What it gives for tensors `instead` of those that depend on the input, and what becomes of the others."""
        left = iter(instead)
        args, kwargs = replaced((self.args, self.kwargs), lambda t: constant(t) if known(t) is None else next(left))
        return self.func(*args, **kwargs)

    def named(self, names: Sequence[str]) -> dict[str, Any]:
        """Its arguments by their names."""
        return dict(zip(names, self.args, strict=False)) | self.kwargs


class Local(ABC):
    """How an operator passes a change on."""

    result: ClassVar[bool] = False
    """Whether it must know what it gave for the unchanged."""

    @property
    def base(self) -> bool:
        """Whether it must know what the unchanged is around the change."""
        return True

    @abstractmethod
    def __call__(self, asked: Asked, given: Sequence[Operand], before: Tensor | None) -> Change | Tensor:
        """Where the result has changed; all of it (M, ...) where it has no boxes. `before` is that of the unchanged,
        if it is wanted."""


class Voxelwise(Local):
    """Each voxel by itself."""

    @property
    def base(self) -> bool:
        return False

    def __call__(self, asked: Asked, given: Sequence[Operand], before: Tensor | None) -> Change:
        (operand,) = given
        return Change(asked.on([operand.change.values]), operand.change.low)


@dataclass(frozen=True)
class Merged(Local):
    """Several volumes of one `size`, voxel by voxel; such as a sum."""

    size: tuple[int, ...]

    def __call__(self, asked: Asked, given: Sequence[Operand], before: Tensor | None) -> Change:
        low, box = self.union(given)
        parts = [operand.within(low, box) for operand in given]

        def there(constant: Tensor) -> Tensor:
            return cut(constant, low, box) if tuple(constant.shape[2:]) == self.size else constant

        return Change(asked.on(parts, there), low)

    def union(self, given: Sequence[Operand]) -> tuple[Tensor, tuple[int, ...]]:
        """Boxes around all changes."""
        low, high = given[0].change.low, _end(given[0].change)
        for operand in given[1:]:
            low, high = low.minimum(operand.change.low), high.maximum(_end(operand.change))
        return _fitted(low, high, self.size)


class Joined(Merged):
    """Volumes side by side as channels."""

    def __call__(self, asked: Asked, given: Sequence[Operand], before: Tensor | None) -> Change:
        low, box = self.union(given)
        parts, left = list(tensors(asked.args[0])), iter(given)
        channels = [part.shape[1] for part in parts]
        values = given[0].change.values
        out = values.new_empty(len(low), sum(channels), *box)
        # Each is written where it belongs at once, because copying is most of what a dense network costs here.
        for part, into in zip(parts, out.split(channels, 1), strict=True):
            if known(part) is None:
                cut(part, low, box, into=into)
            else:
                next(left).within(low, box, into=into)
        return Change(out, low)


@dataclass(frozen=True)
class Windowed(Local):
    """A convolution or pooling over windows that `looks` says, to a volume of `size`; `names` are its arguments'."""

    looks: Geometry
    size: tuple[int, ...]
    names: Sequence[str]
    outside: float

    @property
    def base(self) -> bool:
        alone = self.looks.low == self.looks.high == (0.0,) * len(self.size)
        return not alone or set(self.looks.jump) != {1.0}

    @cached_property
    def _sides(self) -> tuple[Tensor, Tensor, Tensor]:
        step, first, last = (torch.tensor(side).long() for side in (self.looks.jump, self.looks.low, self.looks.high))
        return step, first, last

    def __call__(self, asked: Asked, given: Sequence[Operand], before: Tensor | None) -> Change:
        (operand,) = given
        step, first, last = self._sides
        change = operand.change
        begin = -((last - change.low).div(step, rounding_mode="floor"))
        end = (_end(change) - 1 - first).div(step, rounding_mode="floor") + 1
        low, box = _fitted(begin, end, self.size)
        source = ((torch.tensor(box) - 1) * step + last - first + 1).tolist()
        named = asked.named(self.names)
        named["input"] = operand.within(low * step + first, source, self.outside) if self.base else change.values
        return Change(_quick(asked.func, **{**named, "padding": 0}), low)


@dataclass(frozen=True)
class Spread(Local):
    """A transposed convolution with a kernel of `reach` + 1 voxels, to a volume of `size`."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    reach: tuple[int, ...]
    size: tuple[int, ...]

    def __call__(self, asked: Asked, given: Sequence[Operand], before: Tensor | None) -> Change:
        (operand,) = given
        step, pad, reach = (torch.tensor(side) for side in (self.stride, self.padding, self.reach))
        begin = operand.change.low * step - pad
        end = (_end(operand.change) - 1) * step - pad + reach + 1
        low, box = _fitted(begin, end, self.size)
        # What makes these voxels, and which of what that makes they are.
        first = -((reach - low - pad).div(step, rounding_mode="floor"))
        last = (low + torch.tensor(box) - 1 + pad).div(step, rounding_mode="floor")
        named = asked.named(_CONVOLUTIONS["conv_transpose"])
        named["input"] = operand.within(first, ((last - first).amax(0) + 1).tolist())
        made = asked.func(named.pop("input"), **{**named, "padding": 0, "output_padding": 0})
        return Change(cut(made, low + pad - first * step, box), low)


class Averaged(Local):
    """The mean over all of a volume."""

    result: ClassVar[bool] = True

    def __call__(self, asked: Asked, given: Sequence[Operand], before: Tensor | None) -> Tensor:
        (operand,) = given
        assert operand.base is not None and before is not None
        change = operand.change
        # The difference first: sums over all of a volume would take its digits.
        differ = change.values - cut(operand.base, change.low, change.box)
        total = differ.flatten(2).sum(2) / operand.base[0, 0].numel()
        return before + total.reshape(*total.shape, *[1] * (before.ndim - 2))


def local(name: str, asked: Asked, given: Sequence[Tensor], result: Any) -> Local | None:
    """How the operator `name` passes changes of volumes `given` on, whose `result` this is; None where that depends on
    all of them."""
    x = given[0]
    rank, others = x.ndim - 2, [t for t in tensors((asked.args, asked.kwargs)) if known(t) is None]
    if not isinstance(result, Tensor) or rank < 1:
        return None
    size, same = tuple(result.shape[2:]), all(t.shape[2:] == result.shape[2:] for t in given)
    if len(given) == 1 and same and _voxelwise(name, asked, others):
        return Voxelwise()
    if name in _ARITHMETIC and same and all(_fits(t, size) for t in others):
        alone = len(given) == 1 and not any(tuple(t.shape[2:]) == size for t in others)
        return Voxelwise() if alone else Merged(size)
    if name in ("cat", "concat", "concatenate") and same and _dimension(asked, rank) == 1:
        return Joined(size) if all(t.shape[2:] == result.shape[2:] for t in others) else None
    if name in ("mean", "adaptive_avg_pool") and _over_all(asked, x, result):
        return Averaged()
    if len(given) > 1:
        return None
    if name == "conv_transpose":
        return _spread(asked, size, rank)
    if name in ("conv", *_POOLS):
        return _windowed(name, asked, x, size, rank)
    return None


def _end(change: Change) -> Tensor:
    return change.low + torch.tensor(change.box)


def _fitted(begin: Tensor, end: Tensor, size: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
    """Boxes of one size within a volume of `size` that hold the voxels from `begin` up to `end` (M, rank), and one at
    least."""
    most = torch.tensor(size)
    begin = begin.clamp_min(0).minimum(most - 1)
    end = end.minimum(most).maximum(begin + 1)
    box = (end - begin).amax(0)
    return begin.minimum(most - box), tuple(box.tolist())


def _voxelwise(name: str, asked: Asked, others: Sequence[Tensor]) -> bool:
    if name == "batch_norm":
        return Normalisation.of(name, asked.args, asked.kwargs).mean is not None
    return name in _VOXELWISE and all(t.ndim < 2 for t in others)


def _fits(constant: Tensor, size: tuple[int, ...]) -> bool:
    """Whether a constant is one volume of `size`, or the same for all of its voxels."""
    spatial = tuple(constant.shape[2:])
    return constant.numel() == 1 or (len(spatial) == len(size) and (spatial == size or set(spatial) == {1}))


def _quick(func: Callable[..., Any], input: Tensor, **named: Any) -> Tensor:
    """What a convolution or pooling gives. To a single small volume PyTorch applies its own convolution, although that
    of oneDNN takes half of the time; and it pools channels that lie side by side ten times as fast."""
    plain = input.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if "weight" in named and len(input) == 1 and input.device.type == "cpu" and plain and _HAS_ONEDNN:
        rank = input.ndim - 2
        stride, dilation = ([n] * rank if isinstance(n := named.get(k, 1), int) else n for k in ("stride", "dilation"))
        options = [0] * rank, stride, dilation, named.get("groups", 1)
        return torch.mkldnn_convolution(input, named["weight"], named.get("bias"), *options)
    if "weight" not in named and input.ndim == 5 and input.device.type == "cpu":
        input = input.contiguous(memory_format=torch.channels_last_3d)
    found: Tensor = func(input, **named)
    return found


def _dimension(asked: Asked, rank: int) -> int:
    named = asked.named(("tensors", "dim"))
    return int(named.get("dim", named.get("axis", 0))) % (rank + 2)


def _over_all(asked: Asked, x: Tensor, result: Tensor) -> bool:
    """Whether a mean is over all of the space of `x`, and nothing else."""
    spatial = result.shape[2:]
    return result.shape[:2] == x.shape[:2] and set(spatial) <= {1} and not asked.kwargs.get("dtype")


def _spread(asked: Asked, size: tuple[int, ...], rank: int) -> Local | None:
    args, kwargs = asked.args, asked.kwargs
    stride, pad = option(args, kwargs, 3, "stride", 1, rank), option(args, kwargs, 4, "padding", 0, rank)
    dilation = option(args, kwargs, 7, "dilation", 1, rank)
    kernel = asked.named(_CONVOLUTIONS["conv_transpose"])["weight"].shape[2:]
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    # Kernels that leave gaps would have to be told where those are.
    if any(r + 1 < s for r, s in zip(reach, stride, strict=True)):
        return None
    return Spread(tuple(stride), tuple(pad), tuple(reach), size)


def _windowed(name: str, asked: Asked, x: Tensor, size: tuple[int, ...], rank: int) -> Local | None:
    names = _POOLS.get(name) or _CONVOLUTIONS[name]
    named = asked.named(names)
    padded = any(option(asked.args, asked.kwargs, names.index("padding"), "padding", 0, rank))
    odd = named.get("ceil_mode") or named.get("return_indices") or named.get("divisor_override")
    if odd or (name == "avg_pool" and padded and not named.get("count_include_pad", True)):
        return None
    looks = geometry_after(asked.func, [(Geometry.identity(rank), tuple(x.shape))], asked.args, asked.kwargs, size)
    assert looks is not None
    return Windowed(looks, size, names, float("-inf") if name == "max_pool" else 0.0)
