"""What a network goes by over a whole cohort, in words and by example: concepts, prototypes, rules, words, cases.

One explanation after the other is read, in the order of the plan, and of each only its numbers are kept.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from MedXAILib.caption import Caption
from MedXAILib.cases.library import Library
from MedXAILib.cases.record import Record
from MedXAILib.cohort.plan import Subject, read_plan
from MedXAILib.cohort.state import explained
from MedXAILib.cohort.surrogate import Known, by_rules, measured, surrogate
from MedXAILib.cohort.tables import Said, Tables
from MedXAILib.cohort.work import RESULTS
from MedXAILib.concept_scores import ConceptScores
from MedXAILib.errors import MedXAIError
from MedXAILib.explanation import Explanation, load_explanation
from MedXAILib.registry import EXPLAINERS
from MedXAILib.rule_set import RuleSet
from MedXAILib.run import Run
from MedXAILib.similar_cases import SimilarCases
from MedXAILib.traversal import Traversal

_COUNTS = 0.1
"""Of the points of the strongest prototype: with fewer, another is not used in a case."""
_KNOWN = ("accuracy", "r2")
"""How well a network knows a concept, which is the same for all cases."""


def reduce(folder: str | Path, by: Sequence[str] = (), run: Run | None = None) -> Iterator[tuple[str, Tables]]:
    """What the explanations in `folder` that are no maps have in common, method by method.

    Args:
        by: columns of the plan, by which the cases are told apart, too.
    """
    folder, run = Path(folder), run or Run()
    plan, mapped, done = read_plan(folder), maps(folder), explained(folder)
    for method in (one for one in plan.methods if one not in mapped):
        tables, known = Tables(by), list[Known]()
        units = [unit for unit in done if unit.method == method]
        for i, unit in enumerate(units):
            run.step(i, len(units), f"Putting together what {method} tells")
            told = load_explanation(folder / RESULTS / unit.key)
            case = _known(unit.subject, told)
            tables.add(unit.subject, _KINDS[type(told)](case, told))
            known.append(case)
        for subject, said in surrogate(known, plan.seed):
            tables.add(subject, said)
        yield method, tables


def maps(folder: str | Path) -> list[str]:
    """The methods of the plan in `folder` that answer with maps."""
    return [method for method in read_plan(folder).methods if EXPLAINERS[method].kind == "SaliencyMap"]


def _known(subject: Subject, told: Explanation) -> Known:
    """What the network predicts is known where it was not asked about anything else."""
    own: Mapping[str, float] = {}
    if isinstance(told, RuleSet):
        own = told.values
    elif isinstance(told, ConceptScores):
        # Of those from which the decision follows.
        own = {c.name: c.value for c in told.concepts if c.weights and c.value is not None}
    says = told.provenance.target_label if subject.target is None else ""
    return Known(subject, {**measured(subject), **own} if own or isinstance(told, RuleSet) else {}, says)


def _of_concepts(case: Known, told: ConceptScores) -> Iterator[Said]:
    target = told.provenance.target_label
    layered = len({concept.layer for concept in told.concepts}) > 1
    for one in told.concepts:
        name = f"{one.name} at {one.layer}" if layered else one.name
        score = math.nan if one.score is None else one.score
        more: dict[str, float | str] = {"for": float(score > 0), "against": float(score < 0)}
        if one.score is None:
            more = {"refused": one.refused}
        if one.value is not None:
            more |= {"value": one.value, "unit": one.unit}
        more |= {n: one.numbers[n] for n in (*_KNOWN, "magnitude") if n in one.numbers}
        yield Said("concept", name, score, target, more, one.score, chance=one.chance)
        # Findings of which there is something to see are those that are named.
        if one.weights and one.map is not None and one.value is not None and not one.unit:
            yield Said("word", one.name, 1.0, more={"confidence": one.value}, example=one.value, share=True)


def _of_caption(case: Known, told: Caption) -> Iterator[Said]:
    for word in told.words:
        sure = {} if word.confidence is None else {"confidence": word.confidence}
        yield Said("word", word.text.lower(), 1.0, more=sure, example=word.confidence, share=True)


def _of_cases(case: Known, told: SimilarCases) -> Iterator[Said]:
    if any(one.role == "prototype" for one in told.cases):
        yield from _of_prototypes(told)
        return
    parameters = told.provenance.parameters
    where = str(parameters.get("library", "")), int(parameters.get("version", 0))
    library = _library(*where)
    for one in told.cases:
        speaks = float(one.role in ("alike", "helpful"))
        more: dict[str, float | str] = {"label": one.label, "similarity": one.similarity, "for": speaks}
        if library:
            more["by chance"] = len(told.cases) / len(library)
        yield Said("neighbour", one.uid, 1.0, more=more, example=one.similarity, share=True)
    for column, own in case.subject.meta.items():
        shown = [library[one.uid] for one in told.cases if one.uid in library]
        yield from _agreement(column, own, [record for record in shown if _text(record, column)], where)


def _of_prototypes(told: SimilarCases) -> Iterator[Said]:
    whole = sum(abs(one.similarity) for one in told.cases)
    most = max(abs(one.similarity) for one in told.cases)
    for one in told.cases:
        points = one.similarity
        more: dict[str, float | str] = {
            "label": one.label,
            "used": float(abs(points) >= _COUNTS * most > 0),
            "share": points / whole if whole else math.nan,
            "similarity": one.numbers["similarity"],
            "weight": one.numbers["weight"],
        }
        yield Said("prototype", one.uid, points, told.provenance.target_label, more, one.numbers["similarity"])


def _agreement(column: str, own: str, shown: Sequence[Record], where: tuple[str, int]) -> Iterator[Said]:
    """In what share of the cases `shown` the text in `column` is the case's `own`, and in what share it would be were
    they drawn from those of the library of which the network says the same."""
    if own and shown:
        drawn = [_texts(*where, column, record.said) for record in shown]
        chance = sum(texts[own] / texts.total() for texts in drawn) / len(drawn)
        yield Said(
            "agreement", column, sum(_text(r, column) == own for r in shown) / len(shown), more={"by chance": chance}
        )


@lru_cache(maxsize=1)
def _library(path: str, version: int) -> Mapping[str, Record]:
    """The cases of a library by uid; none of one that is not there any more."""
    try:
        return {record.uid: record for record in Library.open(path, version).records(whole=False)} if path else {}
    except MedXAIError:
        return {}


@lru_cache(maxsize=256)
def _texts(path: str, version: int, column: str, says: str) -> Counter[str]:
    """How often there is what in `column`, among the cases of which the network says that."""
    told = [_text(record, column) for record in _library(path, version).values() if record.said == says]
    return Counter(text for text in told if text)


def _text(record: Record, column: str) -> str:
    found = record.label if column == "label" else record.meta.get(column, "")
    return found if isinstance(found, str) else ""


def _of_rules(case: Known, told: RuleSet) -> Iterator[Said]:
    # A rule about the neighbourhood of one scan is of no other.
    return by_rules("rule", [rule for rule in told.rules if rule.scope == "all"], case)


def _of_traversal(case: Known, told: Traversal) -> Iterator[Said]:
    target, here = told.provenance.target_label, told.steps[told.here]
    yield Said("change", "the decision changes", float(told.flipped is not None), target, share=True)
    if told.flipped is None:
        return
    there = told.steps[told.flipped]
    more = {"strange": float(there.strange)}
    changes = {"distance": abs(there.position - here.position)}
    changes |= {name: there.numbers[name] - now for name, now in here.numbers.items() if name in there.numbers}
    for name, change in changes.items():
        yield Said("change", name, change, target, more)


_KINDS: dict[type[Explanation], Callable[[Known, Any], Iterator[Said]]] = {
    ConceptScores: _of_concepts,
    Caption: _of_caption,
    SimilarCases: _of_cases,
    RuleSet: _of_rules,
    Traversal: _of_traversal,
}
