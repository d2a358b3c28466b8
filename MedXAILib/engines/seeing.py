"""Every operator that PyTorch is asked for while a network runs: seen, and asked for out of place.

No hook and no surgery on modules (`torch.overrides`): functional calls, activations used twice or in place, skips,
concatenations and shared weights are what they are. What must be known of a tensor is attached to it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from unittest.mock import patch

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from MedXAILib.engines.operators import operator, out_of_place, replaced, tensors
from MedXAILib.errors import MedXAIError
from MedXAILib.model import Model

OUT_OF_SIGHT = (
    "A part of this network cannot be looked into (TorchScript, torch.compile, C++ or an operator of its own: {}): use "
    "gradient or integrated_gradients."
)


class Unseen(MedXAIError):
    """A part of the network is out of sight, so that nothing can be said of what happens there."""


def known(tensor: Tensor) -> Any:
    """What is known of `tensor`; None when it does not depend on the input."""
    return getattr(tensor, "_medxai", None)


def mark(tensor: Tensor, what: Any) -> Tensor:
    """`tensor`, of which this is known from now on."""
    tensor._medxai = what  # type: ignore[attr-defined]
    return tensor


class Seeing(TorchFunctionMode, ABC):
    """While this is on, operators on what depends on the input are `seen`, with no work in place: that becomes work on
    a copy that takes the original's name."""

    def __init__(self) -> None:
        super().__init__()
        self._stand_ins = WeakTensorKeyDictionary()
        self._stale: dict[int, StorageWeakRef] = {}

    @abstractmethod
    def concerns(self, name: str, args: Any, kwargs: Any) -> bool:
        """Whether an operator with these arguments is to be `seen`; another is asked for as it is."""

    @abstractmethod
    def seen(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """What an operator gives instead of what PyTorch would."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, inplace = operator(func)
        target = next(tensors(args), None)
        args, kwargs = replaced((args, kwargs or {}), self._current)
        if not self.concerns(name, args, kwargs):
            return func(*args, **kwargs)
        func, args, kwargs, inplace = out_of_place(func, name, args, kwargs, inplace)
        result = self.seen(name, func, args, kwargs)
        if inplace and target is not None and result is not target:
            self._stand_ins[target] = result
            storage = target.untyped_storage()
            if storage.data_ptr() != result.untyped_storage().data_ptr():
                self._stale[storage.data_ptr()] = StorageWeakRef(storage)
        return result

    def _current(self, tensor: Tensor) -> Tensor:
        """What stands for `tensor` since it was worked on in place."""
        while tensor in self._stand_ins:
            tensor = self._stand_ins[tensor]
        if self._stale:
            storage = tensor.untyped_storage()
            old = self._stale.get(storage.data_ptr())
            if old is not None and not old.expired():
                raise Unseen(
                    "This network changes a tensor in place and then uses another view of it, which cannot be "
                    "followed: set inplace=False in its activations, or use gradient or integrated_gradients."
                )
        return tensor

    @contextmanager
    def on(self) -> Iterator[None]:
        """Inside, operators are seen."""
        # A network's own checkpoints would run again in the backward, where nothing is seen; and the operators in a
        # function of its own are none that its backward goes by.
        at_once = patch.object(torch.utils.checkpoint, "checkpoint", _at_once)
        with at_once, patch.object(torch.autograd.Function, "apply", classmethod(_refused)), self:
            yield


Mode = TypeVar("Mode", bound=Seeing)


@contextmanager
def intercepting(model: Model, mode: Mode) -> Iterator[Mode]:
    """`mode`, on, for forwards of `model`.

    Raises:
        Unseen: when a part of the network cannot be looked into.
    """
    for name, module in model.network.named_modules():
        if isinstance(module, torch.jit.ScriptModule) or type(module).__name__ == "OptimizedModule":
            what = f"Layer '{name}'" if name else model.name
            how = "TorchScript" if isinstance(module, torch.jit.ScriptModule) else "compiled"
            raise Unseen(
                f"{what} is {how}, and operators inside it cannot be seen: give the network as Python code or a MONAI "
                "bundle, or use gradient or integrated_gradients."
            )
    with mode.on():
        yield mode


_apply: Any = torch.autograd.Function.apply


def _refused(function: Any, *args: Any, **kwargs: Any) -> Any:
    if function.__module__.partition(".")[0] != "MedXAILib" and any(known(t) is not None for t in tensors(args)):
        raise Unseen(OUT_OF_SIGHT.format(function.__name__))
    return _apply.__func__(function, *args, **kwargs)


def _at_once(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    known_options = ("use_reentrant", "context_fn", "determinism_check", "debug", "early_stop", "preserve_rng_state")
    return function(*args, **{k: v for k, v in options.items() if k not in known_options})
