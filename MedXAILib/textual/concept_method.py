"""What the methods have in common that ask what a concept means to a network: examples, layers, sensitivities, maps."""

from __future__ import annotations

import zlib
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from MedXAILib.concept_scores import Concept, ConceptScores
from MedXAILib.engines.capture import capture, suggest_layer
from MedXAILib.engines.concept_vectors import Pool, Units, vectors
from MedXAILib.errors import MedXAIError
from MedXAILib.explainer import Names, Question, Teller
from MedXAILib.explanation import Explanation
from MedXAILib.grid import resample
from MedXAILib.run import Run
from MedXAILib.target import ClassTarget, Target
from MedXAILib.textual.concept_sets import Examples, ExampleSource, read_examples, sha256
from MedXAILib.textual.significance import benjamini_hochberg
from MedXAILib.volume import Volume

FEW = 50
"""With fewer examples of a side than this, a concept is known only roughly."""


@dataclass(frozen=True)
class Found:
    """A concept at a layer, in units of the layer's spread: what `reading` (F,) finds in a vector is how much of it is
    there, along `direction` (F,) there is more of it. `drawn` (draws, F) are directions to compare with, and `value` is
    how much is there in the scan. Or it was `refused`, saying why."""

    numbers: dict[str, float]
    refused: str = ""
    reading: np.ndarray = field(default_factory=lambda: np.zeros(0))
    direction: np.ndarray = field(default_factory=lambda: np.zeros(0))
    drawn: np.ndarray = field(default_factory=lambda: np.zeros(0))
    value: float | None = None


@dataclass(frozen=True)
class Scored:
    """What a concept means to a class, and the `p` of its being chance; `chance` are mean changes of the class's score
    along random concepts."""

    score: float
    interval: float
    p: float
    numbers: dict[str, float]
    chance: tuple[float, ...] = ()


class ConceptMethod(Teller):
    """A method that looks for concepts of a person in the activations of a layer."""

    kind: ClassVar[str] = "ConceptScores"
    bare: ClassVar[Mapping[str, Any]] = {"maps": "none"}
    layered: ClassVar[bool] = True

    examples: ExampleSource = ""
    sha256: str = Field(
        "", validate_default=True, description="refuse examples of another SHA-256 than this; filled in when left out"
    )
    concepts: Names = Field((), description="concepts to look for, as the examples name them; all when left out")
    layers: Names = Field(
        (), description="layers to look at, by their names in the network; the last with a spatial layout when left out"
    )
    pool: Pool = Field("both", description="what is kept of a layer's activations: their mean, their maximum, or both")
    explained: Literal["scan", "class", "all"] = Field(
        "scan",
        description="whose answers are to be sensitive: that to this scan, to the examples whose label is the target, "
        "or to all examples",
    )
    classes: bool = Field(True, description="let q-values allow for the other classes that could be asked about")
    maps: Literal["activation", "gradient", "none"] = Field(
        "activation", description="show where a concept is, or where the answer would move if there were more of it"
    )
    patches: int = Field(50, ge=1, description="places to draw from each segment, when the examples are a segmentation")

    @field_validator("sha256")
    @classmethod
    def _same(cls, value: str, info: ValidationInfo) -> str:
        source = info.data.get("examples", "")
        if not source or not isinstance(source, str):
            return value
        found = sha256(Path(source))
        if value and value != found:
            raise ValueError(f"'{source}' is not what it was (its SHA-256 is {found} now): give the former file")
        return found

    @abstractmethod
    def known(self, examples: Examples, run: Run) -> dict[str, tuple[np.ndarray, str]]:
        """What is known of each concept (N,), NaN where nothing is, and its unit."""

    @abstractmethod
    def found(
        self, x: np.ndarray, known: np.ndarray, patients: Sequence[str], at: np.ndarray, random: np.random.Generator
    ) -> Found:
        """Look for a concept, `known` (N,), in vectors `x` (N, F), of which that of the scan is `at` (F,)."""

    @abstractmethod
    def scored(self, found: Found, gradients: np.ndarray, random: np.random.Generator) -> Scored:
        """What a concept means to a target whose gradients at the cases to explain are (M, F)."""

    @property
    @abstractmethod
    def says(self) -> str:
        """What a score is."""

    def tell(self, question: Question, volume: Volume) -> Callable[..., Explanation]:
        if isinstance(self.examples, str) and not self.examples:
            raise MedXAIError(f"{self.title} needs examples of what to look for: examples=a table, folder or mask.")
        run = question.run
        examples = read_examples(self.examples, self.concepts, volume, self.patches, run)
        run.note(f"{len(examples.scans)} examples" + (f" of '{examples.source}'." if examples.source else "."))
        layers = self.layers or (suggest_layer(question),)
        concepts = self.known(examples, run)
        held = vectors(question, examples.scans, layers, self.pool)
        targets = self._targets(question)
        here = _Here.of(question, targets, layers, self.pool)
        gradients = self._gradients(question, targets, here, examples, layers)
        rows = [
            self._row(layer, name, known, examples.groups, held[layer], here, [g[layer] for g in gradients], run)
            for layer in layers
            for name, known in concepts.items()
        ]
        chances = iter(benjamini_hochberg([s.p for row in rows for s in row.scored]))
        qs = [[float(next(chances)) for _ in row.scored] for row in rows]
        shown, maps = self._maps(rows, here, question, volume)
        same = _consistency(rows)
        answers = [
            Concept(
                row.name,
                row.scored[0].score if row.scored else None,
                row.scored[0].interval if row.scored else None,
                row.found.value,
                row.unit,
                row.layer,
                shown.get(i),
                row.found.refused,
                {**row.found.numbers, **(_numbers(row.scored[0], q[0]) if q else {}), **same.get(row.name, {})},
                chance=row.scored[0].chance if row.scored else (),
            )
            for i, (row, q) in enumerate(zip(rows, qs, strict=True))
        ]
        return partial(
            ConceptScores,
            residual={},
            concepts=tuple(answers),
            scored=f"{self.says}: {question.bound[0].label}",
            text=_text(answers, question.bound[0].label, len(layers) > 1),
            maps=maps,
            affine=volume.affine,
            alike=_alike(rows),
        )

    def _targets(self, question: Question) -> list[Target]:
        """What is asked about, and the other classes that could have been."""
        target = question.bound[0].target
        plain = isinstance(target, ClassTarget) and target.versus is None and target.layer is None
        if not (self.classes and plain):
            return [target]
        return [target, *(ClassTarget(k) for k in range(len(question.model.class_names)) if k != target.which)]  # type: ignore[attr-defined]

    def _gradients(
        self, question: Question, targets: Sequence[Target], here: _Here, examples: Examples, layers: Sequence[str]
    ) -> list[dict[str, np.ndarray]]:
        """For each target that has cases, by layer, its gradients at them (M, F)."""
        if self.explained == "scan":
            return here.gradients
        cases = [list(examples.scans) if self.explained == "all" else _of_class(question, examples, t) for t in targets]
        if not cases[0]:
            raise MedXAIError(
                f"No example is labelled '{question.bound[0].label}': fill the column 'label', or ask about the scan "
                "alone (explained='scan')."
            )
        return [
            vectors(question, of_target, layers, self.pool, target)
            for target, of_target in zip(targets, cases, strict=True)
            if of_target
        ]

    def _row(
        self,
        layer: str,
        name: str,
        known: tuple[np.ndarray, str],
        patients: Sequence[str],
        held: np.ndarray,
        here: _Here,
        gradients: Sequence[np.ndarray],
        run: Run,
    ) -> _Row:
        values, unit = known
        there = np.flatnonzero(~np.isnan(values)).tolist()
        random = np.random.default_rng([run.seed, zlib.crc32(f"{layer} {name}".encode())])
        run.step(0, 1, f"{self.title}: {name}")
        # Means and maxima differ in size, and neither is to outweigh the other.
        halves = np.split(held, 2, axis=1) if here.units[layer].mapped and self.pool == "both" else [held]
        scale = np.concatenate([np.full(h.shape[1], max(np.sqrt(h.var(0).mean()), 1e-12)) for h in halves])
        of = [patients[i] for i in there]
        found = self.found(held[there] / scale, values[there], of, here.vectors[layer] / scale, random)
        scored = [] if found.refused else [self.scored(found, g * scale, random) for g in gradients]
        readings = (held[there] @ (found.reading / scale)) if scored else np.zeros(0)
        return _Row(layer, name, unit, found, scored, scale, dict(zip(there, readings.tolist(), strict=False)))

    def _maps(
        self, rows: Sequence[_Row], here: _Here, question: Question, volume: Volume
    ) -> tuple[dict[int, int], Tensor]:
        """Which row has which map, and the maps (K, D, H, W) on the grid of `volume`; none of a plain image."""
        shown, maps = dict[int, int](), list[Tensor]()
        for i, row in enumerate(rows):
            units = here.units[row.layer]
            if self.maps == "none" or len(volume.shape) < 3 or not row.scored or not units.mapped:
                continue
            if self.maps == "activation":
                made = units.read_map(torch.from_numpy(row.found.reading / row.scale), self.pool)
            else:
                along = torch.from_numpy(row.found.direction * row.scale)
                made = units.moved_map(here.raw_gradients[row.layer], along, self.pool)
            shown[i] = len(shown)
            maps.append(made[0].float().cpu())
        if not maps:
            return {}, torch.zeros(0, *(volume.shape if len(volume.shape) == 3 else (1, 1, 1)))
        return shown, resample(torch.cat(maps), question.seen[0].affine, volume.shape, volume.affine)


@dataclass(frozen=True)
class _Here:
    """The scan: by layer its units, its vector (F,) and the target's gradient at the layer; and for each target, by
    layer, the gradient (1, F) with respect to the vector."""

    units: Mapping[str, Units]
    vectors: Mapping[str, np.ndarray]
    raw_gradients: Mapping[str, Tensor]
    gradients: list[dict[str, np.ndarray]]

    @classmethod
    def of(cls, question: Question, targets: Sequence[Target], layers: Sequence[str], pool: Pool) -> _Here:
        values, taken = capture(replace(question, targets=list(targets), bound=[]), layers)
        units = {name: Units.of(name, taken[name]) for name in layers}
        raws = [taken[name].raw for name in layers]
        raw = [dict(zip(layers, question.gradients(value, raws, keep=True), strict=True)) for value in values]
        return cls(
            units,
            {name: units[name].vector(pool)[0].cpu().numpy() for name in layers},
            raw[0],
            [{name: units[name].moving(g, pool).cpu().numpy() for name, g in of.items()} for of in raw],
        )


@dataclass(frozen=True)
class _Row:
    """A concept at a layer: what was found, and what it means to each target. `readings` says how much of it is in each
    example, by its number."""

    layer: str
    name: str
    unit: str
    found: Found
    scored: Sequence[Scored]
    scale: np.ndarray
    readings: Mapping[int, float]


def _of_class(question: Question, examples: Examples, target: Target) -> list[Any]:
    """The examples whose label is the class of `target`."""
    if not isinstance(target, ClassTarget) or not isinstance(target.which, int):
        raise MedXAIError("Only a class has cases: ask about the scan alone (explained='scan'), or about all examples.")
    model, found, outputs = question.model, [], question.bound[0].outputs
    for scan, label in zip(examples.scans, examples.labels, strict=False):
        named = label in model.classes(outputs) or not label.isdecimal()
        try:
            count = 1 + max(target.which, len(model.class_names))
            which = model.class_index(label if named else int(label), count, outputs)
        except MedXAIError as error:
            if not label:
                continue
            raise MedXAIError(f"{scan.name}, column 'label': {error}") from error
        if which == target.which:
            found.append(scan)
    return found


def _numbers(scored: Scored, q: float) -> dict[str, float]:
    return {**scored.numbers, "p": scored.p, "q": q}


def _alike(rows: Sequence[_Row]) -> np.ndarray:
    """The cosine between each two directions (rows, rows); 0 between layers and where there is none."""
    alike = np.eye(len(rows))
    for (i, one), (j, other) in combinations(enumerate(rows), 2):
        if one.layer == other.layer and one.scored and other.scored:
            a, b = one.found.direction, other.found.direction
            alike[i, j] = alike[j, i] = a @ b / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-12)
    return alike


def _consistency(rows: Sequence[_Row]) -> dict[str, dict[str, float]]:
    """Of each concept found at several layers, how far they agree on how much of it is in an example: the mean
    correlation of what each two read."""
    found: dict[str, dict[str, float]] = {}
    for name in {row.name for row in rows}:
        read = [[*row.readings.values()] for row in rows if row.name == name and row.scored]
        pairs = [np.corrcoef(one, other)[0, 1] for one, other in combinations(read, 2)]
        if pairs:
            found[name] = {"consistency": float(np.mean(pairs))}
    return found


def _text(concepts: Sequence[Concept], label: str, layered: bool) -> str:
    """What speaks for and against the target, what is no more than chance, and what was not found."""

    def named(chosen: Sequence[Concept]) -> str:
        return ", ".join(c.name + (f" at {c.layer}" if layered else "") for c in chosen)

    told = sorted((c for c in concepts if c.score is not None), key=lambda c: -abs(c.score or 0))
    sure = [c for c in told if c.numbers["q"] < 0.05 and abs(c.score or 0) > (c.interval or 0)]
    sides = [[c for c in sure if (c.score or 0) * sign > 0] for sign in (1, -1)]
    said = [f"{side} {label}: {named(some)}" for side, some in zip(("For", "Against"), sides, strict=True) if some]
    for words, some in (
        ("No more than by chance", [c for c in told if c not in sure]),
        ("Not found in the network", [c for c in concepts if c.score is None]),
    ):
        said += [f"{words}: {named(some)}"] if some else []
    return ". ".join(said) + "."
