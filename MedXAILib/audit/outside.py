"""Does the network look past the anatomy more at one site than at another?"""

from __future__ import annotations

import numpy as np

from MedXAILib.audit.cohort import Cohort
from MedXAILib.audit.groups import Groups
from MedXAILib.audit.outcome import Outcome, Test
from MedXAILib.errors import MedXAIError
from MedXAILib.run import Run

TITLE = "Does it look past the anatomy?"

# Of the mass of a map: so much more at one site than at others is a finding.
_LEAST = 0.05

_DRAWS = 2000


def check(cohort: Cohort, groups: Groups, run: Run) -> Outcome:
    """The share of each map outside the anatomy, over the share of the volume there, by group."""
    known = np.array([i for i, mask in enumerate(cohort.anatomy) if mask is not None and cohort.maps[i].sum() > 0])
    if not len(known):
        raise MedXAIError("No case has a map and a mask of its anatomy: give the column 'anatomy' of the plan.")
    cohort, groups = cohort.taken(known), groups.taken(known)
    pairs = list(zip(cohort.maps, cohort.anatomy, strict=True))
    share = np.array([float(heat[~mask].sum() / heat.sum()) for heat, mask in pairs])  # type: ignore[operator]
    volume = np.array([1 - float(mask.float().mean()) for _, mask in pairs])  # type: ignore[union-attr]
    found = groups.contrast((share - volume)[:, None])
    random = np.random.default_rng(groups.seed)
    rows = []
    for g, name in enumerate(groups.names):
        own = share[groups.at == g]
        low, high = np.percentile(own[random.integers(len(own), size=(_DRAWS, len(own)))].mean(1), (2.5, 97.5))
        expected = float(volume[groups.at == g].mean())
        one = {"place": "outside", "group": name, "cases": len(own), "mean": float(own.mean())}
        rows.append({**one, "low": float(low), "high": float(high), "expected": expected})
    says = (
        f"Of the maps, {share.mean():.0%} lie outside the anatomy ({volume.mean():.0%} of the volume), and "
        f"{abs(found.effect):.1%} {'more' if found.effect > 0 else 'less'} at {found.group} than elsewhere"
    )
    numbers = {"share": float(share.mean()), "volume": float(volume.mean())}
    return Outcome([Test(says, abs(found.effect), _LEAST, found.p, found.null)], numbers, rows)
