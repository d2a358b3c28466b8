"""What a network says of a whole scan that it looks at window by window, the outputs being blended.

A window's output depends on that window alone, whatever the network is. So what a change of the scan does to the
blended output is what it does to the windows that it touches, and only those matter where a target looks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from MedXAILib.engines.sliding_window import Grid, Windows
from MedXAILib.errors import MedXAIError
from MedXAILib.explainer import Question
from MedXAILib.target import Bound, SegmentationTarget, refuse_layers

# Without gradients a forward holds little more than a few layers: count the input sixteen times.
_FORWARD = 16

# What part of the memory budget holds the windows' own outputs.
_KEPT = 4


@dataclass
class Blended:
    """What the network says of a whole scan: the `output` (1, K, *size) on its `grid`, each target's value (1,), some
    windows' own outputs (K, *part), and which windows can change a target at all."""

    grid: Grid
    output: Tensor
    values: list[Tensor]
    kept: dict[int, Tensor]
    reach: list[int]


@dataclass
class WholeScan(Question):
    """A question about one scan that the network looks at window by window. All of it is looked at only once; for a
    changed scan the network is asked about the windows that a target looks at."""

    windows: Windows = field(init=False, repr=False)
    padded: Tensor = field(init=False, repr=False)
    """The scan with what the inferer puts around it, (1, C, *size)."""
    _blended: tuple[object, Blended] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        assert self.model.window is not None and len(self.x) == 1
        self.windows = Windows(self.model.window, self.x.shape[2:])
        self.padded = self.windows.padded(self.x)

    def values(self, x: Tensor) -> list[Tensor]:
        blended = self.blended()
        if x is self.x:
            return blended.values
        outputs = [self._output(blended, self.windows.padded(one)) for one in x.split(1)]
        return [torch.cat([bound.value(output) for output in outputs]) for bound in self.bound]

    def blended(self) -> Blended:
        """What the network says of the scan as it is."""
        # In another precision it says something else.
        precision = self.model._precision
        if self._blended is None or self._blended[0] != precision:
            self._blended = precision, self._looked()
        return self._blended[1]

    @property
    def batch(self) -> int:
        """How many windows to ask about at once, without gradients."""
        roi = self.windows.roi
        return self.run.fitting(
            _FORWARD * self.x.shape[1] * prod(roi) * self.x.element_size(), prod(roi), self.x.device
        )

    def ask(self, parts: Tensor) -> Tensor:
        """The network's outputs (M, K, *part) for windows (M, C, *roi)."""
        self.run.cost.forwards += len(parts)
        return self.model.forward(parts).to(self.x.dtype)

    def outputs(self, which: Sequence[int]) -> list[Tensor]:
        """The outputs (K, *part) of some windows of the scan as it is: those that were kept, or else asked again."""
        kept, found = self.blended().kept, dict[int, Tensor]()
        missing = [w for w in which if w not in kept]
        for i in range(0, len(missing), self.batch):
            some = missing[i : i + self.batch]
            with torch.no_grad():
                found.update(zip(some, self.ask(self.windows.cut(self.padded, some)), strict=True))
        return [kept[w] if w in kept else found[w] for w in which]

    def lead(self, target: int, output: Tensor) -> Tensor:
        """What the outputs of windows, times their weights, contribute to a target's value, to first order where the
        blended output is `output` (1, K, *size): (1, K, *size).

        Raises:
            MedXAIError: when the target has no gradient.
        """
        grid, bound = self.blended().grid, self.bound[target]
        gradient = _gradient(bound, grid, output)
        if gradient is None:
            raise MedXAIError(f"'{bound.label}' has no gradient: use a perturbation method.")
        return gradient / grid.total

    def linear(self, target: int) -> bool:
        """Whether a target's value is a sum over the output."""
        asked = self.targets[target]
        return isinstance(asked, SegmentationTarget) and asked.measure == "logit"

    def _looked(self) -> Blended:
        refuse_layers(self.model, self.x, [target.layer for target in self.targets])
        windows, kept = self.windows, dict[int, Tensor]()
        room = self.run.budget(self.x.device) // _KEPT
        grid: Grid | None = None
        output = self.x

        def work(start: int, stop: int) -> None:
            nonlocal grid, output
            with torch.no_grad():
                found = self.ask(windows.cut(self.padded, range(start, stop)))
            if grid is None:
                grid = windows.grid(found.shape[2:], found)
                output = grid.zeros(found.shape[1])
            for w, one in enumerate(found, start):
                if (len(kept) + 1) * one.nbytes <= room:
                    # Not a view, which would hold on to its whole batch.
                    kept[w] = one.clone()
            for w, one in enumerate(found, start):
                output[grid.places[w]] += one * grid.weight

        self.run.chunks(len(windows), self.batch).map(work, f"Looking at {len(windows)} windows of the scan")
        assert grid is not None
        output /= grid.total
        inside = output[grid.inside]
        if not self.bound:
            self.bound = [t.bind(self.model, inside, self.seen) for t in self.targets]
        values = [bound.value(inside) for bound in self.bound]
        return Blended(grid, output, values, kept, self._reach(grid, output))

    def _reach(self, grid: Grid, output: Tensor) -> list[int]:
        """The windows that can change a target. Where a decision is firm its gradient may vanish: so an undecided
        output is asked, too."""
        looks = torch.zeros_like(grid.total, dtype=torch.bool)
        for tried in (torch.zeros_like(output), output):
            for bound in self.bound:
                gradient = _gradient(bound, grid, tried)
                looks |= True if gradient is None else (gradient != 0).any(1, keepdim=True)
        return [w for w, place in enumerate(grid.places) if bool(looks[place].any())]

    def _output(self, blended: Blended, padded: Tensor) -> Tensor:
        """The blended output (1, K, *spatial) for a changed scan (1, C, *size), where a target looks. For a backward
        only the windows are kept, and the network is asked about them again."""
        grid, output = blended.grid, blended.output.clone()
        for i in range(0, len(blended.reach), self.batch):
            some = blended.reach[i : i + self.batch]
            parts = self.windows.cut(padded, some)
            said = checkpoint(self.ask, parts, use_reentrant=False) if parts.requires_grad else self.ask(parts)
            for w, one, before in zip(some, said, self.outputs(some), strict=True):
                output[grid.places[w]] += (one - before) * grid.weight / grid.total[grid.places[w]]
        return output[grid.inside]


def _gradient(bound: Bound, grid: Grid, output: Tensor) -> Tensor | None:
    """Of a target's value, with respect to the blended output (1, K, *size), if it has one."""
    with torch.enable_grad():
        leaf = output.detach().clone().requires_grad_()
        value = bound.value(leaf[grid.inside]).sum()
        return torch.autograd.grad(value, leaf)[0] if value.requires_grad else None
