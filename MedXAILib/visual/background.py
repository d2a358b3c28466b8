"""What a scan is compared with where one baseline would say too little: a set of scans, each with its weight."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field, PlainSerializer, PlainValidator, WithJsonSchema
from torch import Tensor
from torch.nn import functional

from MedXAILib.engines.input_gradients import fit
from MedXAILib.errors import MedXAIError, unknown
from MedXAILib.explainer import Attribution, Explainer, Question
from MedXAILib.grid import corners, resample, transform
from MedXAILib.model import Prepared
from MedXAILib.visual.baseline import KINDS, baseline, completeness
from MedXAILib.volume import Volume, load_volume

Scan = str | tuple[str, ...] | Volume
"""One of `KINDS`, made from the sample itself; a file, or a file for each channel; or a scan in memory."""

Compare = Callable[[Tensor, int, int], list[tuple[Tensor, Tensor]]]
"""From a baseline (N, C, *spatial), its number and how many there are, to each target's map of the samples against it
(N, C, *spatial) and the value (N,) of the baseline."""

# Scans are told apart on at most this many voxels a side.
_COARSE = 16

# A completeness residual beyond this is said in words.
_COMPLETE = 0.05


def _scans(value: Any) -> tuple[Scan, ...]:
    if isinstance(value, str) and not Path(value).exists():
        value = value.split(",")
    items = value if isinstance(value, (list, tuple)) else [value]
    return tuple(scan for item in items for scan in _files(item)) or KINDS


def _files(item: Any) -> list[Scan]:
    """The scans that an item of a background means: none for an empty one, several for a pattern such as *.nii."""
    if isinstance(item, Volume):
        return [item]
    if isinstance(item, (list, tuple)) and item:
        return [tuple(_file(part) for part in item)]
    if not isinstance(item, (str, Path)):
        raise ValueError("a background scan is a file, a file for each channel, or a Volume")
    name = str(item).strip()
    if "*" in name and not Path(name).exists():
        pattern = Path(name)
        files = sorted(map(str, Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor)))))
        if not files:
            raise ValueError(f"there is no file '{name}': check the path")
        return list(files)
    return [] if not name else [name] if name in KINDS else [_file(name)]


def _file(name: str | Path) -> str:
    if not isinstance(name, (str, Path)) or not Path(name).exists():
        raise ValueError(str(unknown("background scan or file", name, KINDS)))
    return str(name)


def _plain(scans: tuple[Scan, ...]) -> list[Any]:
    return [f"volume {s.fingerprint}" if isinstance(s, Volume) else s if isinstance(s, str) else list(s) for s in scans]


Background = Annotated[
    tuple[Any, ...],
    PlainValidator(_scans),
    PlainSerializer(_plain, return_type=list[Any]),
    WithJsonSchema({"type": "array", "items": {"type": "string"}}),
    Field(
        description="scans to compare with, such as those of healthy people: files (* stands for any characters), or "
        "what is made from the scan itself: zero, its minimum, its mean, itself blurred (6 mm)"
    ),
]


class AgainstBackground(Explainer):
    """An explainer whose map is the weighted mean of maps against single baselines, of which one is held at a time.

    Background scans are seldom registered to the one explained. Where one covers the place the network looks at, it is
    read at that place, in millimetres. Where it does not, its middle is taken: as many voxels as the network sees.
    """

    unaccounted: ClassVar[str]
    """What to do about a map that does not add up to the change of the decision."""

    background: Background = KINDS
    baselines: int = Field(
        10,
        ge=1,
        le=1000,
        description="background scans to use at most; of more, the most typical ones (k-medoids) stand for the others",
    )
    per_channel: bool = Field(False, description="one map for each input channel, such as each MR sequence")

    @abstractmethod
    def comparing(self, question: Question) -> tuple[list[Tensor], Compare]:
        """Each target's value (N,) of the samples, and what compares them with a baseline."""

    def attribute(self, question: Question) -> list[Attribution]:
        fit(question)
        x, count = question.x, min(self.baselines, len(self.background))
        at_sample, compare = self.comparing(question)
        changes = [value.clone() for value in at_sample]
        totals, share = [torch.zeros_like(x) for _ in changes], x.new_zeros(len(x), *[1] * (x.ndim - 1))
        for index, (weight, start) in enumerate(baselines(question, self.background, count)):
            found = compare(start, index, count)
            for total, change, (values, at_start) in zip(totals, changes, found, strict=True):
                total += weight.reshape(share.shape) * values
                change -= weight * at_start
            share.add_(weight.reshape(share.shape))
            question.show(lambda: self._finish(totals[0] / share))
        return [self._attribution(question, total, change) for total, change in zip(totals, changes, strict=True)]

    def _attribution(self, question: Question, values: Tensor, change: Tensor) -> Attribution:
        residual = completeness(question, values, change, _COMPLETE, self.unaccounted)
        return Attribution(self._finish(values), residual)

    def _finish(self, values: Tensor) -> Tensor:
        return values if self.per_channel else values.sum(1, keepdim=True)


def baselines(question: Question, scans: Sequence[Scan], most: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Weight (N,) and baseline (N, C, *spatial) of `question`'s samples, one after the other.

    Of more than `most` scans each sample has its own medoids, found among what of them would be at its place; the
    weight of one is the share of scans that are nearer to it than to the others.

    Raises:
        MedXAIError: when a scan cannot be read, or cannot be brought to the samples' grid.
    """
    n, count = len(question.x), min(most, len(scans))
    chosen, weights = [list(range(count))] * n, torch.full((n, count), 1 / count)
    if count < len(scans):
        coarse = []
        for i, scan in enumerate(scans):
            question.run.step(i, len(scans), "Choosing background scans")
            coarse.append(_coarse(_placed(question, scan, range(n))))
        points = torch.stack(coarse, 1)
        found = [k_medoids(torch.cdist(of_sample, of_sample), count) for of_sample in points]
        chosen, weights = [medoids for medoids, _ in found], torch.stack([shares for _, shares in found])
    for i in range(count):
        start = torch.empty_like(question.x)
        for which in sorted({medoids[i] for medoids in chosen}):
            samples = [s for s in range(n) if chosen[s][i] == which]
            start[samples] = _placed(question, scans[which], samples)
        yield weights[:, i].to(question.x), start


def _placed(question: Question, scan: Scan, samples: Sequence[int]) -> Tensor:
    """`scan` as a baseline of some of the samples, (len(samples), C, *spatial)."""
    if isinstance(scan, str) and scan in KINDS:
        return baseline(question, scan)[list(samples)]
    volume = scan if isinstance(scan, Volume) else load_volume(scan)
    name = volume.source or "a background scan"
    whole = question.model.preprocess(volume)
    channels, rank = question.x.shape[1], question.x.ndim - 2
    if whole.x.shape[0] != channels or whole.x.ndim != rank + 1:
        raise MedXAIError(
            f"{name} is {whole.x.ndim - 1}-D with {whole.x.shape[0]} channel(s), and the network sees {rank}-D with "
            f"{channels}: leave it out of the background."
        )
    if not torch.isfinite(whole.x).all():
        raise MedXAIError(f"{name} has NaN or infinite voxels: leave it out of the background, or replace them.")
    return torch.stack([_on_grid(whole, question.seen[s], name) for s in samples]).to(question.x)


def _on_grid(whole: Prepared, seen: Prepared, name: str) -> Tensor:
    """What of a background scan is compared with a sample, on the sample's grid."""
    grid = tuple(seen.x.shape[1:])
    wanted, size = np.array(grid), np.array(whole.x.shape[1:])
    # The middles of the outermost voxels: a background scan of the same extent covers the sample.
    outermost = np.clip(corners(grid), 0, wanted - 1)
    index = transform(np.linalg.inv(whole.affine) @ seen.affine, outermost)
    if ((index > -0.5 - 1e-6) & (index < size - 0.5 + 1e-6)).all():
        return resample(whole.x, whole.affine, grid, seen.affine)
    if (size < wanted).any():
        raise MedXAIError(
            f"{name} does not cover the part of the scan that is explained, nor does the network see as much of it "
            f"({' x '.join(map(str, size))} voxels of {' x '.join(map(str, wanted))}): leave it out of the background, "
            "or register it to the scan."
        )
    return whole.x[(slice(None), *(slice(a, a + w) for a, w in zip((size - wanted) // 2, wanted, strict=True)))]


def _coarse(x: Tensor) -> Tensor:
    """`x` (N, C, *spatial) averaged to at most 16 voxels a side, as vectors (N, F)."""
    size = [min(_COARSE, s) for s in x.shape[2:]]
    return functional.interpolate(x.float(), size, mode="area").flatten(1).double().cpu()


def k_medoids(distances: Tensor, count: int) -> tuple[list[int], Tensor]:
    """`count` of M points, to which the M points are nearest in sum, and the share of the points each stands for.

    Points are taken greedily and then swapped, always the best swap, until none is left that helps (Kaufman and
    Rousseeuw, "Finding groups in data", 1990). `distances` is (M, M). Nothing is random.
    """
    medoids: list[int] = []
    for _ in range(count):
        medoids.append(_best(distances, medoids)[0])
    cost = float(distances[:, medoids].amin(1).sum())
    while True:
        swaps = [(medoids[:p] + medoids[p + 1 :]) for p in range(count)]
        found = [(*_best(distances, rest), rest) for rest in swaps]
        point, lowest, rest = min(found, key=lambda swap: swap[1])
        if lowest >= cost * (1 - 1e-9):
            break
        medoids, cost = [*rest, point], lowest
    medoids.sort()
    nearest = distances[:, medoids].argmin(1)
    # A point that is there twice stands for itself, too.
    nearest[medoids] = torch.arange(count)
    return medoids, nearest.bincount(minlength=count) / len(distances)


def _best(distances: Tensor, medoids: list[int]) -> tuple[int, float]:
    """The point that is best added to `medoids`, and the sum of distances then."""
    costs = distances if not medoids else distances.minimum(distances[:, medoids].amin(1, keepdim=True))
    total = costs.sum(0)
    total[medoids] = float("inf")
    point = int(total.argmin())
    return point, float(total[point])
