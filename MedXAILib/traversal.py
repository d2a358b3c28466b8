"""A traversal: the scan as it would look further along one direction of a generative network, and what the explained
network would say of it there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from MedXAILib.errors import MedXAIError
from MedXAILib.explanation import Explanation, ImageFormat, read_maps, write_maps


@dataclass(frozen=True)
class Step:
    """One image of a traversal, at `position` along it, 0 being the scan itself.

    `value` is what is explained (a logit), `scores` what the network says by name, `numbers` what else is known there:
    "reconstruction error", "diameter (mm)" ... `strange` says that no scan of the training is like it.
    """

    position: float
    value: float
    scores: Mapping[str, float] = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)
    strange: bool = False


@dataclass(frozen=True)
class Place:
    """A case of a cohort at (x, y) on the map of all cases; the scan explained has no `uid`."""

    uid: str
    label: str
    x: float
    y: float


@dataclass(frozen=True, eq=False)
class Traversal(Explanation):
    """How the scan would have to be for the network to say otherwise.

    `images` is float32, (S, D, H, W), one for each of `steps`, in the values that the scan has, on the part of it that
    the network sees; `affine` takes its index (d, h, w) to RAS mm. `along` says what changes ("diameter", "towards
    benign"), `text` sums it up. `flipped` is the first step at which the network decides otherwise. `cohort` is the map
    of all cases in two dimensions, if the network has one, on which the steps are at `path` (S, 2).

    Raises:
        MedXAIError: when images, steps and path do not belong together, or a number is not finite.
    """

    steps: tuple[Step, ...]
    images: Tensor
    affine: np.ndarray
    along: str
    text: str = ""
    flipped: int | None = None
    cohort: tuple[Place, ...] = ()
    path: np.ndarray | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", tuple(self.steps))
        object.__setattr__(self, "cohort", tuple(self.cohort))
        count = len(self.steps)
        if not count or self.images.ndim != 4 or len(self.images) != count:
            raise MedXAIError(f"{count} steps have {count} images (S, D, H, W), not {tuple(self.images.shape)}.")
        if self.path is not None and self.path.shape != (count, 2):
            raise MedXAIError(f"The path of {count} steps is ({count}, 2), not {self.path.shape}.")
        if self.flipped is not None and not 0 <= self.flipped < count:
            raise MedXAIError(f"Step {self.flipped} is none of {count}: count from 0.")
        for step in self.steps:
            told = {"position": step.position, "value": step.value, **step.scores, **step.numbers}
            for name, number in told.items():
                if not math.isfinite(number):
                    raise MedXAIError(f"The {name} at {step.position} is {number}: give a finite number.")

    @property
    def here(self) -> int:
        """The step that is the scan itself, or nearest to it."""
        return min(range(len(self.steps)), key=lambda i: abs(self.steps[i].position))

    def _write(self, folder: Path, image_format: ImageFormat) -> dict[str, Any]:
        return {
            "files": write_maps(folder, self.images, self.affine, image_format),
            "steps": [asdict(step) for step in self.steps],
            "affine": self.affine.tolist(),
            "along": self.along,
            "text": self.text,
            "flipped": self.flipped,
            "cohort": [asdict(place) for place in self.cohort],
            "path": None if self.path is None else self.path.tolist(),
        }

    @classmethod
    def _read(cls, folder: Path, manifest: dict[str, Any], common: dict[str, Any]) -> Traversal:
        return cls(
            **common,
            steps=tuple(Step(**said) for said in manifest["steps"]),
            images=read_maps(folder, manifest["files"]),
            affine=np.array(manifest["affine"]),
            along=manifest["along"],
            text=manifest["text"],
            flipped=manifest["flipped"],
            cohort=tuple(Place(**said) for said in manifest["cohort"]),
            path=None if manifest["path"] is None else np.array(manifest["path"]),
        )
