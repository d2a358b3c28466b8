"""What a layer holds of many scans, one vector each, and how a target changes as that vector moves.

A vector is a layer's activations, pooled over space: their means, their maxima, or both. That pooling is undone, too: a
way to read a vector, or to move it, becomes a map whose sum is what was read, or by how much the target moved.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from MedXAILib.engines.capture import Captured, capture
from MedXAILib.errors import Cancelled, MedXAIError, OutOfMemory
from MedXAILib.explainer import Question
from MedXAILib.model import Model, Prepared
from MedXAILib.region import Region
from MedXAILib.target import Target
from MedXAILib.visual.cam_family import spatial
from MedXAILib.volume import Volume, load_volume

Pool = Literal["both", "mean", "max"]

# A forward that keeps its tail for a backward takes up to so many times its input.
_TIMES = 1000

# Vectors that are known, by network; they go when it goes.
_KNOWN: WeakKeyDictionary[Model, dict[Any, np.ndarray]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Scan:
    """A scan, or a file of one, and where in it the network is to look, if not at all of it. `name` is what errors call
    it."""

    volume: Volume | Path
    region: Region | None = None
    name: str = "An example"

    @property
    def key(self) -> tuple[Any, ...]:
        """The same for what is the same."""
        region = None if self.region is None else tuple(np.ravel(np.asarray(self.region, dtype=float)).tolist())
        if isinstance(self.volume, Volume):
            return self.volume.fingerprint, region
        return str(self.volume), self.volume.stat().st_mtime_ns, region

    def prepare(self, model: Model, load: Callable[[Path], Volume]) -> Prepared:
        """What `model` sees of it.

        Raises:
            MedXAIError: naming the scan, when it cannot be read, or not be taken by the network.
        """
        try:
            volume = self.volume if isinstance(self.volume, Volume) else load(self.volume)
            seen = model.prepare(volume, self.region)
        except (Cancelled, OutOfMemory):
            raise
        except MedXAIError as error:
            raise MedXAIError(f"{self.name}: {error}") from error
        if model.slides(seen.x.shape[1:]):
            raise MedXAIError(
                f"{self.name}: {model.name} looks at it window by window: say where (region, RAS mm), or cut it out."
            )
        return seen


def vectors(
    question: Question, scans: Sequence[Scan], layers: Sequence[str], pool: Pool, target: Target | None = None
) -> dict[str, np.ndarray]:
    """For each of `layers` the vectors (N, F) of `scans`; with a `target` its gradients with respect to them instead.

    What was asked before is not computed again.
    """
    model, kind = question.model, None if target is None else json.dumps(target.spec(), default=str)
    known = _KNOWN.setdefault(model, {})
    asked = [[(model.fingerprint, layer, pool, kind, scan.key) for layer in layers] for scan in scans]
    missing = [i for i, keys in enumerate(asked) if not all(key in known for key in keys)]
    # Those of one file follow each other, so that it is read and preprocessed once.
    missing.sort(key=lambda i: str(asked[i][0][-1][0]))
    load = lru_cache(maxsize=1)(load_volume)

    def work(start: int, stop: int) -> None:
        seen = [(i, scans[i].prepare(model, load)) for i in missing[start:stop]]
        for _, alike in groupby(seen, key=lambda one: one[1].x.shape):
            which, prepared = zip(*alike, strict=True)
            found = _of_batch(question, prepared, layers, pool, target)
            for i, rows in zip(which, found, strict=True):
                known.update(zip(asked[i], rows, strict=True))

    x = question.x[:1]
    size = question.run.fitting(_TIMES * x.nbytes, x[0, 0].numel(), x.device)
    with model.keeping_last():
        question.run.chunks(len(missing), size).map(work, "Examples" if target is None else "Cases to explain")
    return {layer: np.array([known[keys[n]] for keys in asked]) for n, layer in enumerate(layers)}


def _of_batch(
    question: Question, seen: Sequence[Prepared], layers: Sequence[str], pool: Pool, target: Target | None
) -> list[list[np.ndarray]]:
    x = torch.stack([p.x for p in seen]).to(question.x)
    asked = Question(question.model, x, seen, [] if target is None else [target], question.run)
    with torch.set_grad_enabled(target is not None):
        values, taken = capture(asked, layers)
    at = [Units.of(name, taken[name]) for name in layers]
    if target is None:
        found = [one.vector(pool) for one in at]
    else:
        gradients = asked.gradients(values[0], [taken[name].raw for name in layers])
        found = [one.moving(g, pool) for one, g in zip(at, gradients, strict=True)]
    if not all(bool(one.isfinite().all()) for one in found):
        raise MedXAIError(
            f"{question.model.name} is not finite for an example: it overflows there; check that the examples are as "
            "those that it learnt from."
        )
    return [[layer[i].cpu().numpy() for layer in found] for i in range(len(seen))]


@dataclass(frozen=True)
class Units:
    """A layer's activations (N, K, units) with the `shape` of their grid, or a single unit where there is none."""

    captured: Captured
    flat: Tensor
    shape: tuple[int, ...]

    @classmethod
    def of(cls, name: str, captured: Captured) -> Units:
        """Those of the layer called `name`.

        Raises:
            MedXAIError: when they are neither a vector nor have a spatial layout.
        """
        raw = captured.raw.detach()
        # A class head, or what is pooled already.
        grid = raw.flatten(2) if raw.ndim > 2 and raw[0, 0].numel() == 1 else raw[..., None] if raw.ndim == 2 else None
        grid = spatial(name, captured) if grid is None else grid
        return cls(captured, grid.flatten(2).double(), tuple(grid.shape[2:]))

    @property
    def mapped(self) -> bool:
        """Whether a vector can be laid over the scan."""
        return self.flat.shape[2] > 1

    def vector(self, pool: Pool) -> Tensor:
        """The pooled activations (N, F)."""
        mean, largest = self.flat.mean(2), self.flat.amax(2)
        pool = self._pool(pool)
        return torch.cat([mean, largest], 1) if pool == "both" else mean if pool == "mean" else largest

    def moving(self, gradient: Tensor, pool: Pool) -> Tensor:
        """From the `gradient` at the layer that with respect to the vector (N, F).

        A mean moves with all units alike, a maximum with those that have it. To move one of both and not the other, all
        move alike, and those with the maximum on top.
        """
        g = self._like(gradient)
        everywhere, at_peak = g.sum(2), (g * self._peak).sum(2)
        pool = self._pool(pool)
        if pool != "both":
            return everywhere if pool == "mean" else at_peak
        of_mean = (everywhere - at_peak) / self._apart
        return torch.cat([of_mean, everywhere - of_mean], 1)

    def read_map(self, reading: Tensor, pool: Pool) -> Tensor:
        """Where in the scan that is what `reading` (F,) finds in the vector: (N, 1, *spatial). On the layer's own grid
        it sums to `reading` times the vector."""
        return self._placed(self._read(reading, pool))

    def moved_map(self, gradient: Tensor, direction: Tensor, pool: Pool) -> Tensor:
        """Where in the scan the target moves as the vector moves along `direction` (F,): (N, 1, *spatial). On the
        layer's own grid it sums to `direction` times the gradient with respect to the vector."""
        return self._placed(self._moved(gradient, direction, pool))

    def _read(self, reading: Tensor, pool: Pool) -> Tensor:
        mean, largest = self._parts(reading, pool)
        share = self._peak / self._peak.sum(2, keepdim=True)
        return (self.flat * (mean / self.flat.shape[2] + largest * share)).sum(1)

    def _moved(self, gradient: Tensor, direction: Tensor, pool: Pool) -> Tensor:
        mean, largest = self._parts(direction, pool)
        kind = self._pool(pool)
        on_top = (largest - mean) / self._apart[..., None] if kind == "both" else largest
        alike = largest - on_top if kind == "both" else mean
        return (self._like(gradient) * (alike + on_top * self._peak)).sum(1)

    def _parts(self, vector: Tensor, pool: Pool) -> tuple[Tensor, Tensor]:
        """What of a vector (F,) concerns the means and what the maxima, (K, 1) each."""
        column = vector.to(self.flat)[:, None]
        nothing, kind = torch.zeros_like(self.flat[0, :, :1]), self._pool(pool)
        if kind == "both":
            mean, largest = column.chunk(2)
            return mean, largest
        return (column, nothing) if kind == "mean" else (nothing, column)

    def _pool(self, pool: Pool) -> Pool:
        return pool if self.mapped else "mean"

    @property
    def _peak(self) -> Tensor:
        return (self.flat == self.flat.amax(2, keepdim=True)).to(self.flat)

    @property
    def _apart(self) -> Tensor:
        """How far mean and maximum part (N, K) when those with the maximum move by 1. Where all have it they cannot."""
        return (1 - self._peak.mean(2)).clamp_min(1e-9)

    def _like(self, gradient: Tensor) -> Tensor:
        grid = self.captured.grid(gradient) if self.mapped else gradient
        return grid.reshape(self.flat.shape).to(self.flat)  # type: ignore[union-attr]

    def _placed(self, values: Tensor) -> Tensor:
        return self.captured.place(values.reshape(len(values), 1, *self.shape))
