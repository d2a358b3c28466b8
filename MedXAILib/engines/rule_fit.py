"""Rules that say when a network says what: chosen by a tree, judged by cases that did not choose them.

Silva et al., "Towards complementary explanations using deep neural networks", 2018.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy.stats import binomtest  # type: ignore[import-untyped]
from sklearn.tree import DecisionTreeClassifier  # type: ignore[import-untyped]

from MedXAILib.rule import Condition, Interval, Rule

FEWEST = 2
"""A rule for fewer cases is the description of one."""

_RELATIONS: tuple[Literal["<=", ">"], ...] = ("<=", ">")
_DRAWS = 1000
_ENDS = (2.5, 97.5)


@dataclass(frozen=True, eq=False)
class Cases:
    """What rules are made of: `values` (N, F) of `features`, what the network `says` of each case, its `labels` ("" is
    unknown) and whose it is (`patients`), all (N,) texts. `units` has those of the features that have one."""

    features: tuple[str, ...]
    values: np.ndarray
    says: np.ndarray
    labels: np.ndarray
    patients: np.ndarray
    units: Mapping[str, str]

    def __len__(self) -> int:
        return len(self.values)

    def part(self, rows: np.ndarray) -> Cases:
        """The cases `rows` (mask or indices)."""
        chosen = {name: getattr(self, name)[rows] for name in ("values", "says", "labels", "patients")}
        return replace(self, **chosen)

    def of(self, features: Sequence[str]) -> Cases:
        """The same cases by some of the features."""
        columns = [self.features.index(name) for name in features]
        return replace(self, features=tuple(features), values=self.values[:, columns])


def halves(cases: Cases, seed: int) -> tuple[Cases, Cases]:
    """Those that choose the rules, and those that judge them: of each patient all or none."""
    patients = np.unique(cases.patients)
    chosen = np.random.default_rng(seed).permutation(patients)[: (len(patients) + 1) // 2]
    choose = np.isin(cases.patients, chosen)
    return cases.part(choose), cases.part(~choose)


def grown(cases: Cases, depth: int, leaf: int, seed: int, weights: np.ndarray | None = None) -> list[Rule]:
    """The leaves of a tree for what the network says of `cases`, `depth` conditions deep at most and of `leaf` cases at
    least. No two rules cover the same, and together they cover everything; nothing is judged yet."""
    chooser = DecisionTreeClassifier(max_depth=depth, min_samples_leaf=leaf, random_state=seed)
    tree = chooser.fit(cases.values, cases.says, weights).tree_

    def below(node: int) -> list[tuple[list[Condition], str]]:
        if tree.children_left[node] < 0:
            return [([], str(chooser.classes_[tree.value[node][0].argmax()]))]
        sides = [below(side[node]) for side in (tree.children_left, tree.children_right)]
        # What is said on either side needs no condition.
        if len({says for side in sides for _, says in side}) == 1:
            return [([], sides[0][0][1])]
        feature, threshold = cases.features[tree.feature[node]], float(tree.threshold[node])
        unit = cases.units.get(feature, "")
        return [
            ([Condition(feature, relation, threshold, unit), *conditions], says)
            for relation, side in zip(_RELATIONS, sides, strict=True)
            for conditions, says in side
        ]

    return [Rule(merged(conditions), says, 0.0, 0.0, 0) for conditions, says in below(0)]


def nearest(cases: Cases, point: np.ndarray, says: str, count: int) -> tuple[Cases, np.ndarray]:
    """The `count` cases nearest to `point` (F,) of which the network `says` that, and as many of which it says
    otherwise, with weights (M,) that fall with the distance. Features count in their own spread."""
    spread = cases.values.std(0)
    away = np.sqrt((((cases.values - point) / np.where(spread > 0, spread, 1)) ** 2).mean(1))
    order = np.argsort(away, kind="stable")
    alike = cases.says[order] == says
    rows = np.concatenate([order[alike][:count], order[~alike][:count]])
    return cases.part(rows), 1 / (1 + away[rows])


def merged(conditions: Sequence[Condition]) -> tuple[Condition, ...]:
    """The same with one condition for each feature and side: what is more than 14 is more than 12 anyway."""
    tightest: dict[tuple[str, str], Condition] = {}
    for condition in conditions:
        key = condition.feature, condition.relation
        tighter = min if condition.relation == "<=" else max
        tightest[key] = tighter(tightest.get(key, condition), condition, key=lambda one: one.threshold)
    return tuple(tightest.values())


def covers(rule: Rule, values: Mapping[str, np.ndarray]) -> np.ndarray:
    """Of which cases all conditions of `rule` hold, by the values (N,) of each feature; of what is NaN none does."""
    held = [
        values[c.feature] <= c.threshold if c.relation == "<=" else values[c.feature] > c.threshold
        for c in rule.conditions
    ]
    return np.logical_and.reduce(held) if held else np.ones(len(next(iter(values.values()))), bool)


def judged(rule: Rule, cases: Cases, seed: int) -> Rule | None:
    """`rule` by `cases` that did not choose it; None when it covers fewer than two, or may well be no better than to
    say the same of all of them.

    The intervals are of 95 %: those of a bootstrap over patients, or of Wilson where they are wider. A bootstrap knows
    no doubt of what is always so.
    """
    covered = covers(rule, dict(zip(cases.features, cases.values.T, strict=True)))
    right = covered & (cases.says == rule.says)
    count, known = int(covered.sum()), covered & (cases.labels != "")
    if count < FEWEST:
        return None
    correctness = _interval(right, covered, cases.patients, seed)
    if correctness[0] <= float((cases.says == rule.says).mean()):
        return None
    return replace(
        rule,
        completeness=count / len(cases),
        correctness=int(right.sum()) / count,
        cases=count,
        completeness_interval=_interval(covered, np.ones(len(cases), bool), cases.patients, seed),
        correctness_interval=correctness,
        truth=float((cases.labels[known] == rule.says).mean()) if known.any() else None,
    )


def _interval(part: np.ndarray, whole: np.ndarray, patients: np.ndarray, seed: int) -> Interval:
    """Of the share that `part` (N,) is of `whole` (N,), both bool."""
    _, whose = np.unique(patients, return_inverse=True)
    sums = np.stack([np.bincount(whose, of) for of in (part, whole)], axis=1)
    draws = np.random.default_rng(seed).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), _DRAWS) @ sums
    drawn = draws[draws[:, 1] > 0]
    low, high = np.percentile(drawn[:, 0] / drawn[:, 1], _ENDS)
    exact = binomtest(int(part.sum()), int(whole.sum())).proportion_ci(method="wilson")
    return float(min(low, exact.low)), float(max(high, exact.high))
