"""Rules over a cohort: how often they hold, and those that the cohort's own predictions and attributes make.

Silva et al., "Towards complementary explanations using deep neural networks", 2018.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from MedXAILib.cohort.intervals import whose
from MedXAILib.cohort.plan import Subject
from MedXAILib.cohort.tables import Said
from MedXAILib.engines.rule_fit import Cases, covers, grown, halves, judged
from MedXAILib.rule import Rule

NONE = "none applies"
_DEPTH, _LEAF = 3, 5
_FEWEST = 40
"""Half of the cases choose the rules, and half judge them."""
_NO_NUMBERS = ("label", "patient", "participant", "split")
"""Columns of a plan that may be numbers and measure nothing."""


@dataclass(frozen=True)
class Known:
    """What is known of a case: numbers by name, and what the network says of it ("": unknown)."""

    subject: Subject
    values: Mapping[str, float]
    says: str


def measured(subject: Subject) -> dict[str, float]:
    """The numbers that the plan knows of a case."""
    found = {}
    for name, cell in subject.meta.items():
        if name not in _NO_NUMBERS:
            with suppress(ValueError):
                found[name] = float(cell)
    return {name: value for name, value in found.items() if math.isfinite(value)}


def by_rules(what: str, rules: Sequence[Rule], known: Known) -> Iterator[Said]:
    """Of each rule, whether the network says so of a case that it covers; and whether none covers it."""
    label, decided = known.subject.meta.get("label", ""), False
    for rule in rules:
        unknown = any(condition.feature not in known.values for condition in rule.conditions)
        applies = not unknown and _applies(rule, known.values)
        right = float(known.says == rule.says) if known.says and applies else math.nan
        more = {
            "completeness": math.nan if unknown else float(applies),
            "decides": math.nan if unknown else float(applies and not decided),
            "truth": float(label == rule.says) if label and applies else math.nan,
        }
        yield Said(what, phrase(rule), right, more=more, share=True)
        decided |= applies
    yield Said(what, NONE, math.nan, more={"completeness": float(not decided)}, example=None if decided else 0.0)


def phrase(rule: Rule) -> str:
    """A rule in words, without how often it holds."""
    where = " and ".join(condition.phrase for condition in rule.conditions)
    return f"{f'if {where}' if where else 'otherwise'}: {rule.says}"


def surrogate(known: Sequence[Known], seed: int) -> Iterator[tuple[Subject, Iterator[Said]]]:
    """Rules for what the network says of the whole cohort, by all that is known of every case: a tree on half of the
    patients chooses them, and what is said of each case of the other half judges them. None of too few cases."""
    known = [one for one in known if one.says and one.values]
    names = tuple(name for name in (known[0].values if known else ()) if all(name in one.values for one in known))
    if len(known) < _FEWEST or not names or len({one.says for one in known}) < 2:
        return
    cases = Cases(
        features=names,
        values=np.array([[one.values[name] for name in names] for one in known]),
        says=np.array([one.says for one in known]),
        labels=np.array([one.subject.meta.get("label", "") for one in known]),
        patients=np.array([whose(one.subject) for one in known]),
        units={name: "mm" for name in names if name.endswith("_mm")},
    )
    choosing, judging = halves(cases, seed)
    if len(np.unique(choosing.says)) < 2 or not len(judging):
        return
    rules = [rule for rule in grown(choosing, _DEPTH, _LEAF, seed) if judged(rule, judging, seed)]
    judges = set(judging.patients)
    for one in known:
        if rules and whose(one.subject) in judges:
            yield one.subject, by_rules("surrogate", rules, one)


def _applies(rule: Rule, values: Mapping[str, float]) -> bool:
    return not rule.conditions or bool(covers(rule, {name: np.array([value]) for name, value in values.items()})[0])
