"""Whether groups of a cohort differ: permutation tests of what each case says, region by region."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import rankdata  # type: ignore[import-untyped]

from MedXAILib.cohort.intervals import whose
from MedXAILib.cohort.plan import Subject
from MedXAILib.textual.significance import benjamini_hochberg

_FEWEST = 5
# The smallest p is 0.0001, which is still found among the regions of a large atlas.
_PERMUTATIONS, _AT_ONCE, _DRAWS = 9999, 1111, 2000
# A column of numbers with no more different ones than this is one of categories, such as 0 and 1.
_CATEGORIES = 5
_UNKNOWN = ("", "n/a", "nan")


@dataclass(frozen=True)
class Difference:
    """By how much the mean share of a region in one `group` exceeds that in another, or how the share goes with a
    number (Spearman's rank correlation), which is what `effect` says; its 95 % interval (bootstrap); `p` by
    permutation, and `q`, the share of false discoveries (Benjamini and Hochberg 1995). Where it was not tested, both
    are NaN, and `note` says why."""

    region: str
    group: str
    cases: int
    mean: float
    low: float
    high: float
    by: str
    effect: str
    p: float
    q: float = math.nan
    note: str = ""


def differences(
    shares: Mapping[str, Mapping[str, float]], subjects: Sequence[Subject], columns: Sequence[str], seed: int = 0
) -> list[Difference]:
    """How the `shares` of the cases, by uid and region, differ with what the plan knows of them in `columns`.

    A column of more than five different numbers is correlated, any other makes groups: two are held against each other,
    each of more against all others. Cases of which it is not known are left out. Scans of one patient (`whose`)
    count as one, their mean, for they are not independent; a column that tells them apart is not tested. All that is
    tested here has its `q` together.
    """
    of = {one.uid: one for one in subjects}
    found = [row for column in columns for row in _of_column(shares, of, column, np.random.default_rng(seed))]
    tested = [i for i, row in enumerate(found) if not math.isnan(row.p)]
    for i, q in zip(tested, benjamini_hochberg([found[i].p for i in tested]), strict=True):
        found[i] = replace(found[i], q=float(q))
    return found


def grouped(subjects: Sequence[Subject], column: str) -> dict[str, str]:
    """The group of each case of which `column` is known: what it says or, for numbers, the side of the median."""
    known, numbers = _known(subjects, column)
    if numbers is None:
        return known
    median = float(np.median(list(numbers.values())))
    return {uid: f"{'up to' if number <= median else 'above'} {median:g}" for uid, number in numbers.items()}


def _known(subjects: Sequence[Subject], column: str) -> tuple[dict[str, str], dict[str, float] | None]:
    """What is known of cases, by uid; and as numbers, if it is many of them."""
    known = {one.uid: one.meta.get(column, "").strip() for one in subjects}
    known = {uid: said for uid, said in known.items() if said.lower() not in _UNKNOWN}
    try:
        numbers = {uid: float(said) for uid, said in known.items()}
    except ValueError:
        return known, None
    many = len(set(numbers.values())) > _CATEGORIES and all(map(math.isfinite, numbers.values()))
    return known, numbers if many else None


def _of_column(
    shares: Mapping[str, Mapping[str, float]], of: Mapping[str, Subject], column: str, random: np.random.Generator
) -> list[Difference]:
    known, numbers = _known([of[uid] for uid in shares], column)
    rows: dict[tuple[str, str], list[str]] = {}
    for uid, said in known.items():
        rows.setdefault((whose(of[uid]), said if numbers is None else ""), []).append(uid)
    regions = sorted({region for one in shares.values() for region in one})
    y = np.array([[np.mean([shares[uid][region] for uid in uids]) for region in regions] for uids in rows.values()])
    if not y.size:
        return []
    twice = len(rows) > len({patient for patient, _ in rows})
    if numbers is not None:
        x = rankdata([np.mean([numbers[uid] for uid in uids]) for uids in rows.values()])
        contrasts = [("all", "rank correlation", len(x), x)]
        y = rankdata(y, axis=0)
    else:
        groups = [said for _, said in rows]
        names = sorted(set(groups))
        # Of two groups, one against the other says it all.
        pairs = [(names[0], names[1])] if len(names) == 2 else [(name, "others") for name in names if len(names) > 2]
        contrasts = []
        for name, other in pairs:
            x = np.array([float(group == name) for group in groups])
            contrasts.append((f"{name} - {other}", "difference of means", int(min(x.sum(), (1 - x).sum())), x))
    found = []
    for group, effect, fewest, x in contrasts:
        note = "scans of one patient are in several groups" if twice else ""
        note = note or (f"{fewest} cases are fewer than {_FEWEST}" if fewest < _FEWEST else "")
        p = np.full(len(regions), math.nan) if note else _chance(x, y, random)
        mean, (low, high) = _effect(x, y, numbers is not None), _interval(x, y, numbers is not None, random)
        for i, region in enumerate(regions):
            ends = float(mean[i]), float(low[i]), float(high[i])
            found.append(Difference(region, group, len(x), *ends, column, effect, float(p[i]), note=note))
    return found


def _effect(x: np.ndarray, y: np.ndarray, ranks: bool, weights: np.ndarray | None = None) -> np.ndarray:
    """Of each column of `y` (N, R) the slope over `x` (N,), which of 0 and 1 is the difference of the means, or the
    correlation; for each row of `weights` (B, N)."""
    w = np.ones((1, len(x))) if weights is None else weights
    total = w.sum(1, keepdims=True)
    mean_x, mean_y = (w @ x)[:, None] / total, w @ y / total
    var_x = (w @ x**2)[:, None] / total - mean_x**2
    var_y = w @ y**2 / total - mean_y**2
    with np.errstate(invalid="ignore", divide="ignore"):
        found = (w @ (x[:, None] * y) / total - mean_x * mean_y) / (np.sqrt(var_x * var_y) if ranks else var_x)
    return found[0] if weights is None else found


def _interval(x: np.ndarray, y: np.ndarray, ranks: bool, random: np.random.Generator) -> np.ndarray:
    drawn = random.multinomial(len(x), np.full(len(x), 1 / len(x)), _DRAWS).astype(float)
    # A draw without any of a group, or of one value only, says nothing.
    return np.nan_to_num(np.nanpercentile(_effect(x, y, ranks, drawn), (2.5, 97.5), axis=0))


def _chance(x: np.ndarray, y: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The two-sided p of each column of `y` (N, R) having nothing to do with `x` (N,), by permutation."""
    apart = y - y.mean(0)
    # Cases that are dealt out anew may give the same number but for rounding, which where all say the same is all.
    least = np.abs((x - x.mean()) @ apart) - 1e-12 * np.abs(x - x.mean()) @ np.abs(y)
    count = np.ones(y.shape[1])
    for _ in range(_PERMUTATIONS // _AT_ONCE):
        dealt = random.permuted(np.tile(x - x.mean(), (_AT_ONCE, 1)), axis=1)
        count += (np.abs(dealt @ apart) >= least).sum(0)
    return count / (1 + _PERMUTATIONS)
