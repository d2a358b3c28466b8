"""Concept scores: what a person has a word for, and how much it moves what the network says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from MedXAILib.errors import MedXAIError
from MedXAILib.explanation import Explanation, ImageFormat, SaliencyMap, map_of, read_maps, write_maps


@dataclass(frozen=True)
class Concept:
    """A concept, as "spiculation" or "diameter".

    `score` is how much it speaks for (positive) or against (negative) the target, `interval` half the width of its 95 %
    confidence interval; without a score, `refused` says why there is none. `value` is what is measured or predicted of
    it in this scan, in `unit`. `layer` is where in the network it was looked for, `map` the index of its map among
    those of the explanation, and `numbers` has what else is known of it by name (accuracy, p, q, R² ...).

    Where the decision follows from the concepts alone, `weights` is by how much one unit of it moves the score of each
    class (of what has no value: what it is itself), and of those that share a `scale` one is there and no other.
    `chance` is by how much the score of the target changes along random concepts, by which several scans are compared.
    """

    name: str
    score: float | None = None
    interval: float | None = None
    value: float | None = None
    unit: str = ""
    layer: str = ""
    map: int | None = None
    refused: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    scale: str = ""
    chance: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False)
class ConceptScores(Explanation):
    """Why, in a person's own terms: concepts, and what they mean to the network.

    `scored` says what a score is ("TCAV score", "share of the logit"), `text` sums it up in a sentence or two.
    `maps` is float32, (K, D, H, W), on the volume's own grid; `affine` takes its index (d, h, w) to RAS mm.
    `alike` (concepts, concepts) is the cosine between each two concepts, by which one may stand for another.

    Raises:
        MedXAIError: when a concept has a map or a number that cannot be.
    """

    concepts: tuple[Concept, ...]
    scored: str
    text: str = ""
    maps: Tensor = field(default_factory=lambda: torch.zeros(0, 1, 1, 1))
    affine: np.ndarray = field(default_factory=lambda: np.eye(4))
    alike: np.ndarray | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "concepts", tuple(self.concepts))
        if self.maps.ndim != 4:
            raise MedXAIError(f"The maps of concepts are (K, D, H, W), not {tuple(self.maps.shape)}: stack them.")
        count = len(self.concepts)
        if self.alike is not None and self.alike.shape != (count, count):
            raise MedXAIError(f"{count} concepts have {count} x {count} cosines, not {self.alike.shape}.")
        for concept in self.concepts:
            _check(concept, len(self.maps))

    def seen(self) -> list[SaliencyMap]:
        """Its maps, each of one concept."""
        of = {concept.map: concept.name for concept in self.concepts}
        return [map_of(self, values, self.affine, of.get(i, "")) for i, values in enumerate(self.maps)]

    def _write(self, folder: Path, image_format: ImageFormat) -> dict[str, Any]:
        return {
            "files": write_maps(folder, self.maps, self.affine, image_format),
            "concepts": [asdict(concept) for concept in self.concepts],
            "scored": self.scored,
            "text": self.text,
            "affine": self.affine.tolist(),
            "alike": None if self.alike is None else self.alike.tolist(),
        }

    @classmethod
    def _read(cls, folder: Path, manifest: dict[str, Any], common: dict[str, Any]) -> ConceptScores:
        return cls(
            **common,
            concepts=tuple(
                Concept(**{**said, "chance": tuple(said.get("chance", ()))}) for said in manifest["concepts"]
            ),
            scored=manifest["scored"],
            text=manifest["text"],
            maps=read_maps(folder, manifest["files"]),
            affine=np.array(manifest["affine"]),
            alike=None if manifest["alike"] is None else np.array(manifest["alike"]),
        )


def _check(concept: Concept, maps: int) -> None:
    if concept.map is not None and not 0 <= concept.map < maps:
        raise MedXAIError(f"The concept '{concept.name}' has map {concept.map}, and there are {maps}: count from 0.")
    if concept.score is None and not concept.refused:
        raise MedXAIError(f"The concept '{concept.name}' has no score: say why in `refused`.")
    weights = ((f"weight for {of}", weight) for of, weight in concept.weights.items())
    for name, value in (("score", concept.score), ("value", concept.value), *concept.numbers.items(), *weights):
        if value is not None and not math.isfinite(value):
            raise MedXAIError(f"The {name} of the concept '{concept.name}' is {value}: give a finite number or None.")
