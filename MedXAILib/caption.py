"""A caption: what a network says about a scan in words, and where it sees each of them."""

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

Point = tuple[float, float, float]


@dataclass(frozen=True)
class Word:
    """A word or phrase of a caption: characters `start` to `end` (not included).

    `confidence` is 0 to 1, `map` the index of its map among those of the caption, `place` where it is seen, in RAS mm,
    and `numbers` what else is known of it by name (what deleting its map does, how far two maps agree ...).
    """

    text: str
    start: int
    end: int
    confidence: float | None = None
    map: int | None = None
    place: Point | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Caption(Explanation):
    """What: a text, with the words that are grounded in the scan.

    `maps` is float32, (K, D, H, W), on the volume's own grid; `affine` takes its index (d, h, w) to RAS mm.

    Raises:
        MedXAIError: when a word is not in the text, or has a map, confidence or place that cannot be.
    """

    text: str
    words: tuple[Word, ...] = ()
    maps: Tensor = field(default_factory=lambda: torch.zeros(0, 1, 1, 1))
    affine: np.ndarray = field(default_factory=lambda: np.eye(4))

    def __post_init__(self) -> None:
        object.__setattr__(self, "words", tuple(self.words))
        if self.maps.ndim != 4:
            raise MedXAIError(
                f"The maps of a caption are (K, D, H, W), not {tuple(self.maps.shape)}: stack one a word."
            )
        for word in self.words:
            _check(word, self.text, len(self.maps))

    def seen(self) -> list[SaliencyMap]:
        """Its maps, each of the words that share it."""
        shared = [" ".join(word.text for word in self.words if word.map == i) for i in range(len(self.maps))]
        return [map_of(self, values, self.affine, of) for values, of in zip(self.maps, shared, strict=True)]

    def _write(self, folder: Path, image_format: ImageFormat) -> dict[str, Any]:
        files = write_maps(folder, self.maps, self.affine, image_format)
        words = [asdict(word) for word in self.words]
        return {"files": files, "text": self.text, "words": words, "affine": self.affine.tolist()}

    @classmethod
    def _read(cls, folder: Path, manifest: dict[str, Any], common: dict[str, Any]) -> Caption:
        words = (Word(**{**said, "place": said["place"] and tuple(said["place"])}) for said in manifest["words"])
        return cls(
            **common,
            text=manifest["text"],
            words=tuple(words),
            maps=read_maps(folder, manifest["files"]),
            affine=np.array(manifest["affine"]),
        )


def check_place(place: Point | None, what: str) -> None:
    """Refuse what is no point in RAS mm."""
    if place is not None and not (len(place) == 3 and all(map(math.isfinite, place))):
        raise MedXAIError(f"The place of {what} is {place}: give three finite numbers (RAS mm), or None.")


def _check(word: Word, text: str, maps: int) -> None:
    if not 0 <= word.start < word.end <= len(text) or text[word.start : word.end] != word.text:
        raise MedXAIError(
            f"The word '{word.text}' is not at {word.start} to {word.end} in '{text:.60}': count its characters again."
        )
    if word.map is not None and not 0 <= word.map < maps:
        raise MedXAIError(f"The word '{word.text}' has map {word.map}, and there are {maps}: count them from 0.")
    if word.confidence is not None and not 0 <= word.confidence <= 1:
        raise MedXAIError(f"The word '{word.text}' has confidence {word.confidence}: give 0 to 1, or None.")
    check_place(word.place, f"the word '{word.text}'")
