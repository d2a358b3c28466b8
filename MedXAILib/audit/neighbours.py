"""Are a case's neighbours, in the eyes of the network, of its own site more than chance and the class make them?"""

from __future__ import annotations

import numpy as np

from MedXAILib.audit.cohort import Cohort
from MedXAILib.audit.groups import Groups
from MedXAILib.audit.outcome import Outcome, Test
from MedXAILib.cases.spaces import space
from MedXAILib.errors import MedXAIError
from MedXAILib.run import Run
from MedXAILib.textual.significance import exceeded

TITLE = "Are its nearest cases of the same site?"

NEAREST = 5

# Of what chance leaves: so much more often of the same site.
_LEAST = 0.1


def check(cohort: Cohort, groups: Groups, run: Run) -> Outcome:
    """How often the nearest cases of the same class are of the same group, against chance; and how often of the same
    class."""
    if cohort.embedding is None:
        raise MedXAIError(cohort.bare)
    vectors = cohort.embedding.astype(np.float64)
    alike = space("plain").similarity(vectors, vectors)
    np.fill_diagonal(alike, -np.inf)
    nearest = np.zeros_like(alike)
    np.put_along_axis(nearest, np.argsort(-alike, axis=1, kind="stable")[:, :NEAREST], 1.0, 1)
    same = groups.strata[:, None] == groups.strata
    pairs = nearest * same
    shared = np.zeros(len(groups.draws))
    for g in range(len(groups.names)):
        member = (groups.draws == g).astype(np.float64)
        shared += ((member @ pairs) * member).sum(1)
    shared /= max(pairs.sum(), 1.0)
    chance = float(shared[1:].mean())
    left = max(1 - chance, 1e-12)
    effect = (shared - chance) / left
    by_class, of_class = float((nearest * same).sum() / nearest.sum()), float(same.mean())
    says = (
        f"Of the nearest cases of the same class {shared[0]:.0%} are of the same {groups.column} ({chance:.0%} by "
        f"chance, lift {shared[0] / chance:.2f}), and of the nearest of all {by_class:.0%} are of the same class "
        f"({of_class:.0%} by chance, lift {by_class / of_class:.2f})"
    )
    test = Test(says, float(effect[0]), _LEAST, exceeded(shared[0], shared[1:]), effect[1:], alarms=False)
    numbers = {"lift": float(shared[0] / chance), "lift of class": by_class / of_class}
    rows = []
    for g, name in enumerate(groups.names):
        own = np.flatnonzero(groups.at == g)
        of_own = pairs[own].sum()
        there = float(pairs[np.ix_(own, own)].sum() / of_own) if of_own else float("nan")
        rows.append({"group": name, "cases": len(own), "same group": there})
    return Outcome([test], numbers, rows)
