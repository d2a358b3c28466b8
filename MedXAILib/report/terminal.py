"""What was told otherwise than with one map, for the terminal: texts and tables."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.table import Table

from MedXAILib.amount import amounts
from MedXAILib.concept_scores import ConceptScores
from MedXAILib.explanation import Explanation
from MedXAILib.plain_text import plain
from MedXAILib.report.cases import TITLES
from MedXAILib.report.traversal import quantities, remarks
from MedXAILib.rule_set import RuleSet
from MedXAILib.similar_cases import SimilarCases
from MedXAILib.traversal import Traversal

_MOST_STEPS = 4


def told(found: Explanation) -> Iterator[str | Table]:
    """Its text, then what else there is."""
    if found.in_words:
        yield found.in_words
    if isinstance(found, ConceptScores):
        yield _concepts(found)
    elif isinstance(found, SimilarCases):
        yield from _cases(found)
    elif isinstance(found, Traversal):
        yield _steps(found)
    elif isinstance(found, RuleSet):
        for rule in found.rules:
            yield f"{'→' if rule.applies else '-'} {rule.sentence}"


def _concepts(found: ConceptScores) -> Table:
    names = list(dict.fromkeys(name for concept in found.concepts for name in concept.numbers))
    layered = len({concept.layer for concept in found.concepts}) > 1
    table = _table("concept", *["layer"] * layered, "in this scan", found.scored, *names)
    for concept in found.concepts:
        value = "" if concept.value is None else f"{concept.value:.3g} {concept.unit}"
        interval = "" if concept.interval is None else f" ± {concept.interval:.2f}"
        score = concept.refused if concept.score is None else f"{concept.score:+.2f}{interval}"
        cells = [concept.name, *[concept.layer] * layered, value, score]
        _row(table, *cells, *(_number(concept.numbers.get(name)) for name in names))
    return table


def _cases(found: SimilarCases) -> Iterator[str | Table]:
    for role, title in TITLES.items():
        cases = [case for case in found.cases if case.role == role]
        if cases:
            yield title
            table = _table("case", "label", found.scored, "what is known of it")
            for case in cases:
                _row(table, case.uid, case.label, f"{case.similarity:.3f}", ", ".join(amounts(case.numbers)))
            yield table


def _steps(found: Traversal) -> Table:
    """The steps side by side; of many, as many as there is room for, with that at which the answer flips."""
    every = len(found.steps)
    chosen = {round(i * (every - 1) / (_MOST_STEPS - 1)) for i in range(_MOST_STEPS)} | {found.here}
    shown = sorted(chosen | ({found.flipped} if found.flipped is not None else set()))
    table = _table("step", *(f"{found.steps[i].position:+.2g}" for i in shown))
    for name, values in quantities(found).items():
        _row(table, name, *(values[i] for i in shown))
    _row(table, "", *(remarks(found, i) for i in shown))
    return table


def _table(*heads: str) -> Table:
    return Table(*map(plain, heads), box=box.SIMPLE)


def _row(table: Table, *cells: str) -> None:
    table.add_row(*map(plain, cells))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
