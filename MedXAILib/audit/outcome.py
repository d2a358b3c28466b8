"""What a check of an audit found: numbers that chance can be asked about, words, a table, and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Test:
    """An `effect` that matters from `least` on, in the words `says`; how often chance gives as much (`p`), and how much
    it gave each time (`null`). `alarms` when it shows that the network uses what it should not, rather than that it
    could."""

    __test__ = False

    says: str
    effect: float
    least: float
    p: float
    null: np.ndarray
    alarms: bool = True


@dataclass(frozen=True, eq=False)
class Picture:
    """A scan (*spatial) with a map (*spatial) over it, if there is one, in the plane through the voxel `focus`; those
    of one `group` are shown side by side."""

    group: str
    title: str
    scan: Tensor
    affine: np.ndarray
    focus: Sequence[int]
    heat: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Outcome:
    """The `tests` of a check, in the order of their weight, other numbers, the `rows` of its table, and pictures."""

    tests: Sequence[Test]
    values: Mapping[str, float]
    rows: Sequence[Mapping[str, Any]]
    pictures: Sequence[Picture] = ()
