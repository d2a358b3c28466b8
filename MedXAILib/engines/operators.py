"""What the operators of PyTorch are to a rule: what family they belong to, and the linear ones as y = T(x, W) + b."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from MedXAILib.engines.convolution import convolution

WEIGHTED = "weighted"
ACTIVATION = "activation"
NORMALISATION = "normalisation"
FIXED = "fixed normalisation"
SOFTMAX = "softmax"
PRODUCT = "product"
DIVISION = "division"
POOLING = "max pooling"
MAXIMUM = "maximum"
MOVE = "move"
LINEAR = "linear combination"
UNKNOWN = "unknown"

# Those of one argument that work voxel by voxel; MEMBERS[ACTIVATION] that give 0 for 0 need no care there.
KEEP_ZERO = frozenset(
    "relu relu6 leaky_relu prelu rrelu elu selu celu gelu silu mish tanh hardtanh hardswish softsign softshrink "
    "hardshrink tanhshrink threshold sqrt square abs sin erf log1p expm1 atan asinh tan".split()
)

MEMBERS = {
    WEIGHTED: frozenset({"conv", "conv_transpose", "linear"}),
    ACTIVATION: KEEP_ZERO
    | frozenset(
        "sigmoid hardsigmoid softplus logsigmoid log_sigmoid exp exp2 log log2 log10 rsqrt reciprocal pow rpow "
        "float_power clamp clip clamp_min clamp_max cos erfc logit".split()
    ),
    NORMALISATION: frozenset({"batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm"}),
    SOFTMAX: frozenset({"softmax", "logsumexp"}),
    PRODUCT: frozenset("mul multiply rmul matmul rmatmul mm bmm mv dot inner outer einsum tensordot".split()),
    DIVISION: frozenset("div divide true_divide truediv rdiv rtruediv".split()),
    POOLING: frozenset({"max_pool", "adaptive_max_pool"}),
    MAXIMUM: frozenset("amax max amin min maximum minimum fmax fmin".split()),
    # What changes the place of values, or drops some of them, and not the values.
    MOVE: frozenset(
        "reshape view view_as reshape_as flatten unflatten ravel permute transpose t adjoint movedim moveaxis swapaxes "
        "swapdims squeeze unsqueeze expand expand_as broadcast_to repeat repeat_interleave tile contiguous clone "
        "alias getitem index_select narrow select slice split split_with_sizes chunk unsafe_chunk unsafe_split "
        "tensor_split hsplit vsplit dsplit unbind gather take take_along_dim masked_select roll flip fliplr flipud "
        "rot90 pad to type type_as float double half bfloat16 cpu cuda dropout alpha_dropout feature_alpha_dropout "
        "T mT H mH as_tensor pixel_shuffle pixel_unshuffle channel_shuffle unfold im2col diagonal tril triu positive "
        "atleast_1d atleast_2d atleast_3d".split()
    ),
    LINEAR: frozenset(
        "add sub subtract radd rsub neg negative cat concat concatenate stack hstack vstack dstack mean sum cumsum "
        "avg_pool adaptive_avg_pool interpolate upsample upsample_nearest upsample_bilinear grid_sample fold col2im "
        "where masked_fill diag max_unpool index_add index_copy scatter scatter_add index_put setitem sort topk "
        "kthvalue median trace copy fftn ifftn rfftn irfftn fft ifft rfft irfft real view_as_real diff".split()
    ),
}
_FAMILY = {name: family for family, names in MEMBERS.items() for name in names}

# What answers about a tensor, or makes a constant, and sends nothing back whatever its argument.
SILENT = frozenset(
    "detach item tolist numpy argmax argmin argsort size dim numel stride ones_like zeros_like full_like rand_like "
    "randn_like empty_like new_zeros new_ones new_full new_empty new_tensor sign round floor ceil trunc floor_divide "
    "floordiv eq ne lt le gt ge isnan isinf isfinite logical_not any all nonzero count_nonzero one_hot bool int long "
    "unique histc bincount is_floating_point is_complex requires_grad retain_grad register_hook backward data_ptr "
    "element_size untyped_storage storage_offset get_device is_contiguous bernoulli remainder fmod heaviside "
    "repr format len hash equal allclose isclose result_type set".split()
)


def operator(func: Any) -> tuple[str, bool]:
    """The name of what PyTorch calls `func`, without its dimensions, and whether it works in place."""
    name = getattr(func, "__name__", str(func))
    if name == "__get__":
        attribute = func.__self__.__name__
        return ("detach" if attribute == "data" else attribute if attribute in MEMBERS[MOVE] else "size"), False
    inplace = (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
    if re.fullmatch(r"__i(add|sub|mul|div|truediv|matmul|pow)__", name):
        name, inplace = name[3:], True
    name = re.sub(r"(_nd|[123]d)?(_with_indices)?$", "", name.strip("_"))
    return name, inplace


def option(
    args: tuple[Any, ...], kwargs: dict[str, Any], position: int, key: str, default: Any, rank: int
) -> list[Any]:
    """An argument that says something of each of `rank` axes, such as a stride."""
    value = args[position] if len(args) > position else kwargs.get(key)
    value = default if value is None or (isinstance(value, (list, tuple)) and not value) else value
    return list(value) if isinstance(value, (list, tuple)) else [value] * rank


def out_of_place(
    func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], inplace: bool
) -> tuple[Any, tuple[Any, ...], dict[str, Any], bool]:
    """A call that leaves its arguments as they are, and whether the one it stands for did not."""
    if kwargs.get("inplace"):
        return func, args, {**kwargs, "inplace": False}, True
    if name in _INPLACE_LAST and len(args) > 1 and args[-1] is True:
        return func, (*args[:-1], False), kwargs, True
    if name == "setitem":
        return _with_item, args, kwargs, True
    if inplace:
        copying = getattr(Tensor, name, None) or getattr(torch, name, None) or getattr(F, name, None)
        return copying or _COPYING[name], args, kwargs, True
    return func, args, kwargs, False


def _with_item(whole: Tensor, where: Any, part: Any) -> Tensor:
    whole = whole.clone()
    whole[where] = part
    return whole


_COPYING: dict[str, Callable[..., Tensor]] = {
    "copy": lambda to, source, *_: source.to(to.dtype).expand_as(to),
    "zero": torch.zeros_like,
    "fill": torch.full_like,
}

# Those that PyTorch's modules tell by their last argument that they may work in place.
_INPLACE_LAST = frozenset(
    "relu relu6 elu leaky_relu hardtanh celu selu silu mish hardswish hardsigmoid threshold rrelu dropout "
    "alpha_dropout feature_alpha_dropout".split()
)


def family(name: str) -> str:
    """The family of an operator; UNKNOWN when there is none."""
    return _FAMILY.get(name, UNKNOWN)


def tensors(values: Any) -> Iterator[Tensor]:
    """The tensors among nested arguments or results."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from tensors(value)
    elif isinstance(values, dict):
        yield from tensors(tuple(values.values()))


def replaced(values: Any, new: Callable[[Tensor], Any]) -> Any:
    """Nested arguments with `new(tensor)` for each tensor."""
    if isinstance(values, Tensor):
        return new(values)
    if type(values) in (tuple, list):
        return type(values)(replaced(v, new) for v in values)
    if isinstance(values, dict):
        return {k: replaced(v, new) for k, v in values.items()}
    return values


Change = Callable[[Tensor], Tensor]
"""From a weight to another of the same shape, or with more input channels."""

_OPTIONS = {
    "conv": "stride padding dilation groups".split(),
    "conv_transpose": "stride padding output_padding groups dilation".split(),
}


@dataclass(frozen=True)
class Weight:
    """A weight as PyTorch has it, times the `gain` (K,) of what follows its operator, if any."""

    stored: Tensor
    transposed: bool
    groups: int
    gain: Tensor | None = None

    def __call__(self, change: Change | None = None) -> Tensor:
        """The weight, changed."""
        weight, gain = self.stored.detach(), self.gain
        if gain is not None:
            if self.transposed:
                # (in, out / groups, ...), and each group has its own outputs.
                gain = gain.reshape(self.groups, 1, -1).expand(-1, len(weight) // self.groups, -1)
                gain = gain.reshape(weight.shape[:2])
            weight = weight * gain.reshape(*gain.shape, *[1] * (weight.ndim - gain.ndim))
        return weight if change is None else change(weight)


@dataclass(frozen=True)
class Affine:
    """A convolution, transposed convolution or linear layer, y = T(x, weight) + bias, with `bias` (K,) or None."""

    func: Callable[..., Tensor]
    name: str
    x: Tensor
    weight: Weight
    bias: Tensor | None
    given: dict[str, Any]

    @classmethod
    def of(cls, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Affine:
        """That of a call."""
        named = dict(zip(("input", "weight", "bias", *_OPTIONS.get(name, ())), args, strict=False)) | kwargs
        x, weight, bias = (named.pop(key, None) for key in ("input", "weight", "bias"))
        stored = Weight(weight, name == "conv_transpose", named.get("groups", 1))
        return cls(func, name, x, stored, bias, named)

    def __call__(self, x: Tensor, bias: Tensor | None = None, change: Change | None = None) -> Tensor:
        """T(x, change(weight)) + bias.

        A weight that had to be made is made again in the backward instead of being kept: a network's weights can be
        larger than a scan's activations.
        """
        made, make = self.weight(change), self.weight
        if made.data_ptr() == make.stored.data_ptr():
            return self._applied(x, made, bias)
        place = made.data_ptr()

        def kept(tensor: Tensor) -> Tensor | tuple[Sequence[int], Sequence[int]]:
            return (tensor.shape, tensor.stride()) if tensor.data_ptr() == place else tensor

        def again(kept: Tensor | tuple[Sequence[int], Sequence[int]]) -> Tensor:
            return kept if isinstance(kept, Tensor) else make(change).as_strided(*kept)

        with torch.autograd.graph.saved_tensors_hooks(kept, again):
            return self._applied(x, made, bias)

    def of_both(self, x: Tensor, bias: Tensor | None, change: Change, other: Change) -> Tensor:
        """T(x+, change(weight)) + T(x-, other(weight)) + bias."""
        high, low = x.clamp(min=0), x.clamp(max=0)
        if self.name == "conv" and self.weight.groups == 1 and x.ndim == self.weight.stored.ndim:
            # At once: twice as many input channels cost no more where they are few.
            return self(torch.cat([high, low], 1), bias, lambda weight: torch.cat([change(weight), other(weight)], 1))
        return self(high, bias, change) + self(low, None, other)

    def followed(self, gain: Tensor, shift: Tensor) -> Affine:
        """This operator followed by y * gain + shift, both (K,), as one."""
        bias = shift if self.bias is None else self.bias * gain + shift
        so_far = self.weight.gain
        return replace(self, weight=replace(self.weight, gain=gain if so_far is None else so_far * gain), bias=bias)

    def _applied(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.name not in _OPTIONS or x.ndim != weight.ndim or isinstance(self.given.get("padding"), str):
            return self.func(x, weight, bias, **self.given)
        return convolution(x, weight, bias, **self.given, transposed=self.weight.transposed)


@dataclass(frozen=True)
class Normalisation:
    """y = (x - mean) / sqrt(variance + eps) * weight + bias.

    `x` is reshaped so that the statistics are over `dims`; `mean` and `variance` are given when they are fixed, as in a
    batch normalisation that is no longer trained. `centred` is False for an RMS normalisation.
    """

    x: Tensor
    dims: tuple[int, ...]
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    mean: Tensor | None = None
    variance: Tensor | None = None
    centred: bool = True

    @classmethod
    def of(cls, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Normalisation:
        """That of a call."""
        order = {
            "batch_norm": "input running_mean running_var weight bias training momentum eps",
            "instance_norm": "input running_mean running_var weight bias use_input_stats momentum eps",
            "group_norm": "input num_groups weight bias eps",
            "layer_norm": "input normalized_shape weight bias eps",
            "rms_norm": "input normalized_shape weight eps",
        }[name].split()
        # torch.batch_norm and torch.instance_norm end with one more, about the kernel.
        given = {"weight": None, "bias": None, **dict(zip(order, args, strict=False)), **kwargs}
        x, weight, bias, eps = given["input"], given["weight"], given["bias"], given.get("eps")
        channels = (1, -1, *[1] * (x.ndim - 2))
        if name in ("batch_norm", "instance_norm"):
            own = bool(given.get("training" if name == "batch_norm" else "use_input_stats", name == "instance_norm"))
            fixed = not own and given["running_mean"] is not None
            dims = tuple(range(2, x.ndim)) if name == "instance_norm" else (0, *range(2, x.ndim))
            return cls(
                x,
                dims,
                None if weight is None else weight.reshape(channels),
                None if bias is None else bias.reshape(channels),
                1e-5 if eps is None else eps,
                given["running_mean"].reshape(channels) if fixed else None,
                given["running_var"].reshape(channels) if fixed else None,
            )
        if name == "group_norm":
            groups = given["num_groups"]
            inner = (1, groups, -1, *[1] * (x.ndim - 2))
            parted = x.unflatten(1, (groups, -1))
            weight, bias = (None if p is None else p.reshape(inner) for p in (weight, bias))
            return cls(parted, tuple(range(2, parted.ndim)), weight, bias, 1e-5 if eps is None else eps)
        dims = tuple(range(-len(given["normalized_shape"]), 0))
        if eps is None:
            eps = 1e-5 if name == "layer_norm" else torch.finfo(x.dtype).eps
        return cls(x, dims, weight, bias, eps, centred=name == "layer_norm")

    def centre(self, x: Tensor) -> Tensor:
        """`x` less its mean."""
        if self.mean is not None:
            return x - self.mean
        return x - x.mean(self.dims, keepdim=True) if self.centred else x

    def scale(self, centred: Tensor) -> Tensor:
        """What a centred input is multiplied by, before the weight."""
        return (centred.square().mean(self.dims, keepdim=True) + self.eps).rsqrt()

    @property
    def fixed(self) -> tuple[Tensor, Tensor]:
        """With fixed statistics, y = x * gain + shift."""
        assert self.mean is not None and self.variance is not None
        gain = (self.variance + self.eps).rsqrt()
        gain = gain if self.weight is None else gain * self.weight
        return gain, -self.mean * gain if self.bias is None else self.bias - self.mean * gain
