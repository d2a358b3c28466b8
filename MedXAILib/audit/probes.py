"""Can the site be read from what the network holds of a case, and does the answer hang on that?

What can be read is not used for that alone: the answer need not change along it. So the difference between sites, a
concept activation vector (Kim et al., "Interpretability beyond feature attribution", 2018; the pattern of the
difference, Haufe et al., "On the interpretation of weight vectors", 2014), is followed to the answer by its gradient.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import rankdata  # type: ignore[import-untyped]

from MedXAILib.audit.cohort import Cohort
from MedXAILib.audit.groups import Groups
from MedXAILib.audit.outcome import Outcome, Test
from MedXAILib.errors import MedXAIError
from MedXAILib.run import Run
from MedXAILib.textual.significance import folds

TITLE = "Does it know the site, and use it?"

# Above one half, of the area under the curve; and in standard deviations of the evidence.
_VISIBLE, _USED = 0.1, 0.2

# Of the ridge regression, in units of the mean length of a case's vector.
_PENALTY = 0.1


def check(cohort: Cohort, groups: Groups, run: Run) -> Outcome:
    """A linear probe, cross-validated within classes; and how the evidence moves between the means of sites."""
    if cohort.embedding is None or cohort.gradients is None:
        raise MedXAIError(cohort.bare)
    vectors = groups.centred(cohort.embedding)
    areas = _areas(_held_out(vectors, groups), groups)
    visible = groups.largest(areas[..., None] - 0.5)
    # Every case moves by as much, so that the mean gradient says how far the evidence does.
    said = np.isfinite(cohort.gradients)
    gradient = np.where(said, cohort.gradients, 0.0).sum(0) / said.sum(0).clip(1)
    moved = groups.contrasts(cohort.embedding) @ gradient.T
    used = groups.largest(moved / cohort.evidence.std(0).clip(1e-12))
    area = visible.effect + 0.5
    reads = f"{visible.group} can be told from the embedding of a case with an area under the curve of {area:.2f}"
    hangs = (
        f"moved from the others to {used.group} in the embedding, a case changes its evidence for "
        f"{cohort.classes[used.column]} by {used.effect:+.2f} standard deviations"
    )
    tests = [
        Test(hangs, abs(used.effect), _USED, used.p, used.null),
        Test(reads, visible.effect, _VISIBLE, visible.p, visible.null, alarms=False),
    ]
    rows = [
        {"group": name, "cases": int((groups.at == g).sum()), "area": float(areas[0, g])}
        | {f"moves {of}": float(moved[0, g, m]) for m, of in enumerate(cohort.classes)}
        for g, name in enumerate(groups.names)
    ]
    return Outcome(tests, {"area": area, "moved": used.effect}, rows)


def _held_out(vectors: np.ndarray, groups: Groups) -> np.ndarray:
    """(N, N): from who is of a group (centred) to what a ridge regression on the other folds says of each case."""
    scaled = vectors / vectors.std(0).clip(1e-12)
    kernel = scaled @ scaled.T
    kernel /= max(float(np.trace(kernel)) / len(kernel), 1e-12)
    found = np.zeros_like(kernel)
    for out in folds(range(len(kernel)), np.random.default_rng(groups.seed)):
        seen = np.flatnonzero(~out)
        inverse = np.linalg.inv(kernel[np.ix_(seen, seen)] + _PENALTY * np.eye(len(seen)))
        found[np.ix_(np.flatnonzero(out), seen)] = kernel[np.ix_(np.flatnonzero(out), seen)] @ inverse
    return found


def _areas(held_out: np.ndarray, groups: Groups) -> np.ndarray:
    """(1 + P, G): how well each group is told from the others of its stratum, over pairs of all strata."""
    found = np.full((len(groups.draws), len(groups.names)), np.nan)
    for g in np.flatnonzero(groups.compared):
        member = groups.draws == g
        told = groups.centred(member.T.astype(np.float64)).T @ held_out.T
        won = pairs = 0.0
        for stratum in np.unique(groups.strata):
            inside = groups.strata == stratum
            own = member[:, inside]
            count, others = int(own[0].sum()), int((~own[0]).sum())
            won = won + (rankdata(told[:, inside], axis=1) * own).sum(1) - count * (count + 1) / 2
            pairs += count * others
        found[:, g] = won / pairs
    return found
