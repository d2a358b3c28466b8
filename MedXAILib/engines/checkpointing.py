"""Activation checkpointing: parts of a network forget what they computed, and compute it again for the backward.

Chen et al., "Training deep nets with sublinear memory cost", 2016.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

Forward = Callable[..., Any]
Context = Callable[[], AbstractContextManager[object]]
Carry = Callable[[Sequence[Any], Sequence[Any]], object]
Edge = Callable[[Tensor], Tensor]

# Blocks are tried that keep at most a half, a fourth ... of the whole, down to 2 to the power of minus this.
_HALVINGS = 10

# A block is worth it when it keeps so many times what it is given.
_WORTH = 1.5


@dataclass(frozen=True, eq=False)
class Block:
    """What is computed again as one: a module, or of an `nn.Sequential` the children of `part`."""

    module: nn.Module
    part: slice | None = None


@contextmanager
def checkpointed(
    blocks: Sequence[Block],
    recompute: Context = nullcontext,
    carry: Carry | None = None,
    edge: Edge | None = None,
) -> Iterator[None]:
    """Inside, of the `blocks` only the inputs are kept for a backward, which may come later. The modules are as they
    were afterwards.

    Blocks must not overlap. One with hooks inside is computed as ever, so that they run once. `recompute()` is called
    where a block begins, and what it gives is entered whenever the block is computed again, once for each backward:
    such as a `TorchFunctionMode` that is on in the forward (the backward must be outside of that).
    `carry(before, now)` may copy what Python attached to a block's inputs to others that it is computed again from.
    Tensors that enter or leave a block become what `edge` says.
    """

    def forgetful(forward: Forward, block: Block) -> Forward:
        return _forgetful(forward, _inside(block), recompute, carry, edge)

    parts: dict[nn.Module, list[slice]] = {}
    forwards: dict[nn.Module, Forward] = {}
    for block in blocks:
        if block.part is not None:
            parts.setdefault(block.module, []).append(block.part)
        else:
            forwards[block.module] = forgetful(block.module.forward, block)
    for module, cuts in parts.items():
        steps: list[Forward] = []
        done = 0
        for cut in sorted(cuts, key=lambda cut: cut.start):
            children = _children(module)
            steps += children[done : cut.start]
            steps.append(forgetful(_chain(children[cut]), Block(module, cut)))
            done = cut.stop
        forwards[module] = _chain([*steps, *_children(module)[done:]])
    with _replaced(forwards):
        yield


@contextmanager
def _replaced(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Inside, modules have other forwards; what surrounds a forward, such as hooks, stays."""
    own = {module: module.__dict__["forward"] for module in forwards if "forward" in module.__dict__}
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module in forwards:
            module.__dict__.pop("forward", None) if module not in own else module.__dict__.update(forward=own[module])


def _forgetful(
    forward: Forward, inside: Sequence[nn.Module], recompute: Context, carry: Carry | None, edge: Edge | None
) -> Forward:
    def at_edge(values: Any) -> Any:
        return values if edge is None else tree_map_only(Tensor, edge, values)

    def forgetful(*args: Any, **kwargs: Any) -> Any:
        args = at_edge(args)
        if not _suited(args, kwargs) or any(map(_hooked, inside)):
            return forward(*args, **kwargs)
        before = args if carry is not None else ()

        def run(*now: Any) -> Any:
            # The first time they are the same, and later wherever nobody else packed what was kept.
            if carry is not None and any(n is not b for n, b in zip(now, before, strict=True)):
                carry(before, now)
            return at_edge(forward(*now, **kwargs))

        return checkpoint(run, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), recompute()))

    return forgetful


def _suited(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call can be repeated: with tensors and plain values, which nobody changes meanwhile."""
    values = [*args, *kwargs.values()]
    plain = all(value is None or isinstance(value, (Tensor, bool, int, float, str)) for value in values)
    return plain and any(isinstance(value, Tensor) and value.requires_grad for value in args)


def _hooked(module: nn.Module) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds)


def _inside(block: Block) -> list[nn.Module]:
    """The modules that run when the block is computed again."""
    if block.part is None:
        return [module for module in block.module.modules() if module is not block.module]
    return [module for child in _children(block.module)[block.part] for module in child.modules()]


def _children(module: nn.Module) -> list[nn.Module]:
    # Not children(), which names one that is used twice once.
    return [child for child in module._modules.values() if child is not None]


def _chain(steps: Sequence[Forward]) -> Forward:
    def forward(x: Any) -> Any:
        for step in steps:
            x = step(x)
        return x

    return forward


@dataclass
class _Call:
    """A call of a block: which of the tensors that autograd kept it added, and how many bytes it was given."""

    start: int
    given: int
    stop: int = 0
    repeatable: bool = True
    hooked: bool = False


_Candidate = tuple[Block, _Call]


class Kept:
    """What autograd keeps of a forward, in bytes, and where in the network. What two operators keep together counts
    twice, which covers the gradients that backward holds beside it."""

    def __init__(self, network: nn.Module, forward: Callable[[], object]) -> None:
        """Measure `forward()`, which calls `network` once, without keeping anything."""
        self._network = network
        self._sizes: list[int] = []
        self._calls: dict[nn.Module, _Call] = {}
        self._again: set[nn.Module] = set()
        self._given: list[tuple[weakref.ref[Tensor], int, _Call]] = []
        own = {t.untyped_storage().data_ptr() for t in (*network.parameters(), *network.buffers())}

        def count(tensor: Tensor) -> None:
            # No backward follows; a tensor handed back here would outlive its graph in a cycle.
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                self._sizes.append(storage.nbytes())

        watched = {module: self._watched(module) for module in _open(network)}
        with _replaced(watched), torch.autograd.graph.saved_tensors_hooks(count, lambda never: never):
            forward()
        self._until = [0, *accumulate(self._sizes)]

    @property
    def bytes(self) -> int:
        """What is kept at once when nothing is computed again."""
        return self._until[-1]

    def _watched(self, module: nn.Module) -> Forward:
        plain, inside = module.forward, _inside(Block(module))

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return plain(*args, **kwargs)
            if module in self._calls:
                self._again.add(module)
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            call = _Call(len(self._sizes), sum(tensor.untyped_storage().nbytes() for tensor in tensors))
            call.hooked = any(map(_hooked, module.modules()))
            call.repeatable = _suited(args, kwargs) and not any(map(_hooked, inside))
            self._given += [(weakref.ref(tensor), tensor._version, call) for tensor in tensors]
            result = plain(*args, **kwargs)
            self._look()
            call.stop = len(self._sizes)
            self._calls[module] = call
            return result

        return forward

    def _look(self) -> None:
        """See whether what a module was given was changed in place, so that nothing can be computed from it again."""
        there = [(known, version, call, known()) for known, version, call in self._given]
        for _, version, call, tensor in there:
            call.repeatable &= tensor is None or tensor._version == version
        self._given = [(known, version, call) for known, version, call, tensor in there if tensor is not None]

    def blocks(self, budget: int, several: bool = False) -> list[Block]:
        """The blocks with which what is kept at once fits `budget` (bytes), computing as little as possible again; when
        none do, those with which the least is kept. `several` backwards keep what comes after a block beside it."""
        best: list[_Candidate] = []
        rank = self._rank(best, budget, several)
        for halving in range(1, _HALVINGS + 1):
            found = self._disjoint(self._candidates(self._network, self.bytes >> halving))
            found.sort(key=lambda candidate: candidate[1].given - self._inside(candidate[1]))
            for count in range(1, len(found) + 1):
                tried = self._rank(found[:count], budget, several)
                if tried < rank:
                    best, rank = found[:count], tried
        return [block for block, _ in best]

    def peak(self, blocks: Sequence[Block], several: bool = False) -> int:
        """The bytes that are kept at once with these `blocks`, which `self.blocks` gave."""
        return self._peak([(block, self._span(block)) for block in blocks], several)

    def _rank(self, found: Sequence[_Candidate], budget: int, several: bool) -> tuple[bool, int, int]:
        peak, again = self._peak(found, several), sum(self._inside(call) for _, call in found)
        return (True, peak, again) if peak > budget else (False, again, peak)

    def _peak(self, found: Sequence[_Candidate], several: bool) -> int:
        kept = most = done = 0
        for _, call in sorted(found, key=lambda candidate: candidate[1].start):
            kept += self._until[call.start] - self._until[done] + call.given
            # What came after it is gone by then, unless another backward will need it.
            most = max(most, self._inside(call) + (0 if several else kept))
            done = call.stop
        kept += self.bytes - self._until[done]
        return kept + most if several else max(kept, most)

    def _inside(self, call: _Call) -> int:
        return self._until[call.stop] - self._until[call.start]

    def _once(self, module: nn.Module) -> _Call | None:
        return None if module in self._again else self._calls.get(module)

    def _span(self, block: Block) -> _Call:
        """The call of a block, whose modules were each called once."""
        if block.part is None:
            return self._calls[block.module]
        first, *_, last = 2 * [self._calls[child] for child in _children(block.module)[block.part]]
        return _Call(first.start, first.given, last.stop)

    def _candidates(self, module: nn.Module, limit: int) -> list[_Candidate]:
        """The largest blocks in `module` that keep at most `limit` bytes."""
        call = self._once(module)
        if call is not None and call.repeatable and self._inside(call) <= limit:
            return [(Block(module), call)]
        children = _children(module)
        parts = self._parts(module, limit) if call is not None and _in_order(module) else []
        found = [(block, self._span(block)) for block in (Block(module, part) for part in parts)]
        covered = {i for part in parts for i in range(part.start, part.stop)}
        for i, child in enumerate(children):
            if i not in covered:
                found += self._candidates(child, limit)
        return found

    def _parts(self, module: nn.Module, limit: int) -> list[slice]:
        """Of a sequence, the longest parts that keep at most `limit` bytes."""
        calls = [self._once(child) for child in _children(module)]
        if any(call is None or call.hooked for call in calls):
            return []
        starts = [i for i, call in enumerate(calls) if call is not None and call.repeatable]
        parts: list[slice] = []
        for start, stop in pairwise([*starts, len(calls)]):
            if parts and parts[-1].stop == start:
                longer = slice(parts[-1].start, stop)
                if self._inside(self._span(Block(module, longer))) <= limit:
                    parts[-1] = longer
                    continue
            if self._inside(self._span(Block(module, slice(start, stop)))) <= limit:
                parts.append(slice(start, stop))
        return parts

    def _disjoint(self, found: list[_Candidate]) -> list[_Candidate]:
        """Those that are worth it, each place once, by whatever names it can be reached."""
        chosen: list[_Candidate] = []
        for block, call in sorted(found, key=lambda candidate: candidate[1].start):
            if self._inside(call) > _WORTH * call.given and (not chosen or call.start >= chosen[-1][1].stop):
                chosen.append((block, call))
        return chosen


def _in_order(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _open(module: nn.Module) -> Iterator[nn.Module]:
    """The modules whose forwards Python calls: not those that are compiled, nor what is in them."""
    if isinstance(module, torch.jit.ScriptModule) or hasattr(module, "_orig_mod") or module._compiled_call_impl:
        return
    yield module
    for child in module.children():
        yield from _open(child)
