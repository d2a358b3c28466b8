"""When a network says what, as rules on measures and words that a person knows.

Silva et al., "Towards complementary explanations using deep neural networks", 2018.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from pydantic import Field

from MedXAILib.cases.library import Library
from MedXAILib.cases.record import Record
from MedXAILib.cases.spaces import fingerprint, said
from MedXAILib.engines.rule_fit import Cases, covers, grown, halves, judged, nearest
from MedXAILib.errors import Cancelled, MedXAIError, OutOfMemory, unknown
from MedXAILib.example_based.library_method import LibraryMethod
from MedXAILib.explainer import Folder, Names, Question, Taxonomy
from MedXAILib.explanation import Explanation
from MedXAILib.model import Model
from MedXAILib.rule import Rule
from MedXAILib.rule_set import RuleSet
from MedXAILib.table import Row, read_rows
from MedXAILib.target import read_layers
from MedXAILib.textual.attribute_sentence import listed
from MedXAILib.textual.semantic import NamesAttributes
from MedXAILib.volume import Volume, load_volume

_FEWEST = 40
"""Half of the cases choose the rules, and half judge them."""
_UNITS = ("mm", "cm", "ml", "hu")
_NO_FEATURES = ("volume", "region", "label", "patient", "uid", "said", "split", "report", "segmentation")
"""Columns of a table with a meaning of their own."""

_Featured = tuple[Record, Mapping[str, float]]
# Cases and why others were left out, by network; they go when it goes.
_KNOWN: WeakKeyDictionary[Model, dict[Any, tuple[list[_Featured], list[str]]]] = WeakKeyDictionary()


class Rules(LibraryMethod):
    """When does the network say what, for all cases and for those near this one?

    A tree on half of the patients chooses the rules, and the other half judges them: how many cases a rule covers
    (completeness), of how many of those the network says it (correctness), and how many conditions it has
    (compactness). What is no better than to say the same of every case is left out. Rules are of what a person knows of
    the cases, or of what the network takes for their attributes, if it names them.
    """

    id: ClassVar[str] = "rules"
    title: ClassVar[str] = "Rules"
    paper: ClassVar[str] = "Silva 2018"
    kind: ClassVar[str] = "RuleSet"
    taxonomy: ClassVar[Taxonomy] = Taxonomy(
        "3.3",
        "example-based",
        "post hoc",
        "model-agnostic",
        ("local", "global"),
        strengths="short, in a reader's own terms; says for how many cases it holds, and how often it is wrong",
        limits="of what was measured only; that a rule agrees with the network does not make it the network's reason",
    )

    library: Folder = Field(
        "",
        description="library of cases of this network, as medxai cases build makes them; demonstration nodules "
        "when left out",
    )
    table: str = Field(
        "",
        json_schema_extra={"path": True},
        description="CSV file in place of a library: volume, label, patient, what the network said, and numbers",
    )
    of: Literal["", "known", "named"] = Field(
        "",
        description="what rules are about: numbers known of the cases, or attributes that the network names (which "
        "looks at all their scans); the latter when left out and the network names any",
    )
    features: Names = Field((), description="the only features of which rules are made, such as diameter_mm")
    values: Names = Field((), description="features of this scan, such as diameter_mm=14, where they are known numbers")
    depth: int = Field(3, ge=1, le=6, description="conditions of a rule, at most")
    leaf: int = Field(5, ge=2, description="cases that a rule must cover among those that choose it")
    neighbours: int = Field(
        40, ge=5, description="cases near the scan that choose its own rule: so many alike, and so many unlike"
    )
    anew: bool = Field(
        False, description="ask the network what it says of each case, whatever the library or table has of it"
    )

    @classmethod
    def asked_again(cls, told: Explanation) -> Mapping[str, Any]:
        # What the other network said is in the library.
        return {"anew": True}

    def tell(self, question: Question, volume: Volume) -> Callable[..., Explanation]:
        run, model = question.run, question.model
        network = model.network
        if self.of == "named" and not isinstance(network, NamesAttributes):
            raise MedXAIError(f"{model.name} names no attributes: choose of='known', or lung_nodule_semantic.")
        named = network if isinstance(network, NamesAttributes) and self.of != "known" else None
        cases = _made(self._known(question, named), self.features, named)
        whole = np.isfinite(cases.values).all(1)
        if not whole.all():
            run.note(f"{(~whole).sum()} cases are left out: not all features are known of them.")
        cases = cases.part(whole)
        if self.anew and len(np.unique(cases.says)) == 1:
            return partial(RuleSet, residual={}, rules=(), text=f"The network says {cases.says[0]} of every case.")
        if len(cases) < _FEWEST or len(np.unique(cases.patients)) < 2 or len(np.unique(cases.says)) < 2:
            raise MedXAIError(
                f"Rules need {_FEWEST} cases or more of several patients, of which the network says different things, "
                f"and there are {len(cases)} of which all is known: add cases, or name fewer features."
            )
        with torch.no_grad():
            (says,) = said(model, model.forward(question.x))
        run.cost.forwards += 1
        here = self._here(question, named, cases.features)
        choosing, judging = halves(cases, run.seed)
        found = grown(choosing, self.depth, self.leaf, run.seed)
        found += self._own(choosing, here, says, run.seed) if here else []
        holding = [rule for rule in (judged(rule, judging, run.seed) for rule in found) if rule is not None]
        rules = [replace(rule, applies=_applies(rule, here)) for rule in holding]
        rules.sort(key=lambda rule: (rule.scope == "all", -rule.completeness))
        text = _text(rules, judging, says, here)
        return partial(RuleSet, residual={}, rules=tuple(rules), text=text, values=here)

    def _own(self, choosing: Cases, here: Mapping[str, float], says: str, seed: int) -> list[Rule]:
        """The rule that those near the scan choose and that applies to it."""
        near, weights = nearest(choosing.of(list(here)), np.array(list(here.values())), says, self.neighbours)
        found = grown(near, self.depth, self.leaf, seed, weights)
        return [replace(rule, scope="case") for rule in found if rule.conditions and _applies(rule, here)]

    def _known(self, question: Question, named: NamesAttributes | None) -> list[_Featured]:
        """Each case, with its features; what was asked of this network before is not asked again."""
        library = None if self.table else self._opened(question)
        rows = read_rows(Path(self.table)) if library is None else []
        scans = [row.table.parent / row["volume"] for row in rows]
        changed = [scan.stat().st_mtime_ns for scan in scans if scan.exists()]
        source = (repr(rows), *changed) if library is None else (library.path, library.version)
        known = _KNOWN.setdefault(question.model, {})
        key = fingerprint(question.model), source, named is not None, self.anew
        if key not in known:
            left: list[str] = []
            held = None if library is None else self._held(question, named, library, left)
            known[key] = list(held or self._listed(question, named, rows)), left
        found, left = known[key]
        for why in left:
            question.run.note(f"Left out: {why}")
        return found

    def _opened(self, question: Question) -> Library:
        """
        Raises:
            MedXAIError: for a library that another network embedded.
        """
        library, model = self.opened(question), question.model
        if not self.anew and library.embedder.fingerprint != fingerprint(model):
            raise MedXAIError(
                f"The library '{library.path}' is of {library.embedder.name}, and knows what that says: give one that "
                f"{model.name} embedded."
            )
        return library

    def _listed(self, question: Question, named: NamesAttributes | None, rows: Sequence[Row]) -> Iterator[_Featured]:
        for i, row in enumerate(rows):
            question.run.step(i, len(rows), self.title)
            record = Record(f"row {row.number}", row["patient"] or row["volume"], row["label"], row["said"])
            if named is None and record.said and not self.anew:
                yield record, _cells(row)
                continue
            record = replace(record, region=row.point("region"))
            record, attributes = _asked(question, named, record, load_volume(row.volume))
            yield record, attributes if named else _cells(row)

    def _held(
        self, question: Question, named: NamesAttributes | None, library: Library, left: list[str]
    ) -> Iterator[_Featured]:
        """The cases of a library, with their features; why some had to be left out is added to `left`."""
        records = library.records(whole=False)
        for i, record in enumerate(records):
            question.run.step(i, len(records), self.title)
            if named is None and not self.anew:
                yield record, _numbers(record.meta)
                continue
            try:
                record, attributes = _asked(question, named, record, library.volume(record))
            except (Cancelled, OutOfMemory):
                raise
            except MedXAIError as error:
                left.append(str(error))
            else:
                yield record, attributes if named else _numbers(record.meta)

    def _here(self, question: Question, named: NamesAttributes | None, features: Sequence[str]) -> dict[str, float]:
        """What is known of the features of the scan."""
        if named is not None:
            values = read_layers(question.model, question.x, [named.attribute_layer])[named.attribute_layer][0]
            return {a.name: v for a, v in zip(named.attributes, values.tolist(), strict=True) if a.name in features}
        found = {}
        for given in self.values:
            name, _, value = (part.strip() for part in given.partition("="))
            if name not in features:
                raise unknown("feature", name, features)
            try:
                found[name] = float(value)
            except ValueError as error:
                raise MedXAIError(f"'{given}' is no value: write name=number, such as {features[0]}=14.") from error
        return {name: found[name] for name in features if name in found}


def _asked(
    question: Question, named: NamesAttributes | None, record: Record, scan: Volume
) -> tuple[Record, dict[str, float]]:
    """What the network says of a case, and what it takes for its attributes."""
    model = question.model
    seen = model.prepare(scan, record.region)
    layers = [] if named is None else [named.attribute_layer]
    with torch.no_grad():
        read = read_layers(model, seen.x[None].to(question.x), [None, *layers])
    question.run.cost.forwards += 1
    (says,) = said(model, read[None])
    values = read[layers[0]][0].tolist() if layers else []
    names = [a.name for a in named.attributes] if named is not None else []
    return replace(record, said=says), dict(zip(names, values, strict=True))


def _numbers(meta: Mapping[str, float | str]) -> dict[str, float]:
    return {name: float(value) for name, value in meta.items() if not isinstance(value, str)}


def _cells(row: Row) -> dict[str, float]:
    """The numbers in columns that have no meaning of their own."""
    found = {}
    for name, cell in row.cells.items():
        if name not in _NO_FEATURES:
            with suppress(ValueError):
                found[name] = float(cell)
    return found


def _made(
    known: Sequence[tuple[Record, Mapping[str, float]]], wanted: Sequence[str], named: NamesAttributes | None
) -> Cases:
    """The cases of which what the network says is known, by the `wanted` features, or by all that half of them have."""
    units = {} if named is None else {a.name: a.unit for a in named.attributes}
    known = [(record, values) for record, values in known if record.said]
    every = dict.fromkeys(name for _, values in known for name in values)
    for name in wanted:
        if name not in every:
            raise unknown("feature", name, every) if every else MedXAIError(f"No case has a feature '{name}'.")
    often = [name for name in every if 2 * sum(name in values for _, values in known) >= len(known)]
    features = tuple(wanted or often)
    if not features:
        raise MedXAIError("Nothing is known of the cases that rules could be about: give them numbers.")
    return Cases(
        features=features,
        values=np.array([[values.get(name, math.nan) for name in features] for _, values in known]),
        says=np.array([record.said for record, _ in known]),
        labels=np.array([record.label for record, _ in known]),
        patients=np.array([record.patient for record, _ in known]),
        units={name: unit for name in features if (unit := name.rpartition("_")[2]).lower() in _UNITS} | units,
    )


def _applies(rule: Rule, here: Mapping[str, float]) -> bool:
    if any(condition.feature not in here for condition in rule.conditions):
        return False
    return bool(covers(rule, {name: np.array([value]) for name, value in here.items()})[0])


def _text(rules: Sequence[Rule], judging: Cases, says: str, here: Mapping[str, float]) -> str:
    """The rules for all in a sentence, and that of the scan."""
    general = [rule for rule in rules if rule.scope == "all"]
    if not general:
        return (
            f"No rule holds: by {listed(judging.features)} one can tell what the network says no better than by saying "
            "the same of every case."
        )
    # They cover different cases.
    covered = sum(rule.cases for rule in general)
    right = sum(rule.correctness * rule.cases for rule in general) / covered
    many = "One rule covers" if len(general) == 1 else f"{len(general)} rules cover"
    text = f"{many} {covered / len(judging):.0%} of the {len(judging)} cases that judge, and the network says so in "
    text += f"{right:.0%} of them."
    if not here:
        return f"{text} Which of them applies to this scan is not known: its features are not."
    own = next((rule for rule in rules if rule.applies), None)
    if own is None:
        return f"{text} None applies to this scan, of which it says {says}."
    against = "" if own.says == says else f" Yet of this scan it says {says}."
    return f"{text} Of this scan: {own.sentence}{against}"
