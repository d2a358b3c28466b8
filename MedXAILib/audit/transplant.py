"""Does the answer change when a case gets the background of another site, more than that of its own?"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from MedXAILib.audit.cohort import Cohort, evidence_of
from MedXAILib.audit.groups import Groups
from MedXAILib.audit.outcome import Outcome, Picture, Test
from MedXAILib.errors import MedXAIError
from MedXAILib.report.localisation import highest
from MedXAILib.run import Run

TITLE = "Does the background of another site change the answer?"

# In standard deviations of the evidence.
_LEAST = 0.1

# A p from which on what stays of recipients is alike at all sites.
_ALIKE = 0.01

# Cases that get every background, and half the voxels over which it is blended in around the anatomy.
_RECIPIENTS, _BLEND = 6, 2

# A forward takes up to so many times its input.
_TIMES = 50


def check(cohort: Cohort, groups: Groups, run: Run) -> Outcome:
    """What the background of each case does to the same few others, anatomy and all; backgrounds of one group against
    those of the others, class for class. What swaps within a group do is what chance is measured by."""
    known = np.array([i for i, mask in enumerate(cohort.anatomy) if mask is not None and not bool(mask.all())])
    if not len(known):
        raise MedXAIError("No case has a mask of its anatomy: give the column 'anatomy' of the plan.")
    cohort, groups = cohort.taken(known), groups.taken(known)
    if len({x.shape for x in cohort.x}) > 1:
        raise MedXAIError("Cases differ in size: backgrounds can be moved only between patches of one size.")
    hosts = _hosts(groups)
    moved = np.zeros((len(cohort), len(hosts), cohort.evidence.shape[1]))
    with cohort.model.ready(run.device) as device, torch.no_grad():

        def transplant(start: int, stop: int) -> None:
            pairs = [divmod(k, len(hosts)) for k in range(start, stop)]
            made = torch.stack([swapped(cohort, hosts[h], donor) for donor, h in pairs])
            found = evidence_of(cohort.model.forward(made.to(device, cohort.model.dtype)).float().cpu()).numpy()
            for (donor, h), evidence in zip(pairs, found, strict=True):
                moved[donor, h] = evidence - cohort.evidence[hosts[h]]

        one = cohort.x[0]
        size = run.fitting(_TIMES * one.nbytes, one[0].numel(), device)
        run.chunks(len(cohort) * len(hosts), size).map(transplant, "Moving backgrounds between cases")
    effects = moved.mean(1)
    found = groups.contrast(effects / cohort.evidence.std(0).clip(1e-12))
    of = cohort.classes[found.column]
    says = (
        f"A background of {found.group} changes the evidence for {of} by {found.effect:+.2f} standard deviations, "
        "against one of the others"
    )
    alike = groups.contrast(_kept(cohort, hosts)).p > _ALIKE
    if not alike:
        says += f"; but the masks differ with the {groups.column}, so that more of a case is kept, which may be why"
    rows = [
        {"case": cohort.uids[i], "group": groups.cells[i]}
        | {f"moves {name}": float(effects[i, m]) for m, name in enumerate(cohort.classes)}
        for i in range(len(cohort))
    ]
    test = Test(says, abs(found.effect), _LEAST, found.p, found.null, alarms=alike)
    return Outcome([test], {"recipients": float(len(hosts))}, rows, _pictures(cohort, groups, hosts[0], effects))


def _kept(cohort: Cohort, hosts: list[int]) -> np.ndarray:
    """(N, 1): the share of the recipients that stays where each case is the donor."""
    masks = [mask for mask in cohort.anatomy if mask is not None]
    own = torch.stack([masks[h] for h in hosts])
    return np.array([[float((own | mask).float().mean())] for mask in masks])


def swapped(cohort: Cohort, host: int, donor: int) -> Tensor:
    """The case `host` (C, *spatial) on the background of `donor`: its own where either has anatomy."""
    own, other = cohort.anatomy[host], cohort.anatomy[donor]
    assert own is not None and other is not None
    kept = (own | other).to(cohort.x[host].dtype)[None, None]
    rank = kept.ndim - 2
    grow = getattr(functional, f"max_pool{rank}d")(kept, 2 * _BLEND + 1, 1, _BLEND)
    blend = getattr(functional, f"avg_pool{rank}d")(grow, 2 * _BLEND + 1, 1, _BLEND, count_include_pad=False)[0]
    return blend * cohort.x[host] + (1 - blend) * cohort.x[donor]


def _hosts(groups: Groups) -> list[int]:
    """Cases that get the backgrounds, as many of each group and class as there are, in turn."""
    random = np.random.default_rng(groups.seed)
    cells = list(zip(groups.strata.tolist(), groups.at.tolist(), strict=True))
    kinds = sorted(set(cells))
    waiting = [random.permutation([i for i, cell in enumerate(cells) if cell == kind]).tolist() for kind in kinds]
    # Where there are more kinds than recipients, they are not all of the first class.
    random.shuffle(waiting)
    found: list[int] = []
    while len(found) < min(_RECIPIENTS, len(cells)):
        found += [one.pop() for one in waiting if one]
    return found[:_RECIPIENTS]


def _pictures(cohort: Cohort, groups: Groups, host: int, effects: np.ndarray) -> list[Picture]:
    """A case as it is, and on the background of one of each group, in the plane that matters most of these."""
    donors = []
    for g in range(len(groups.names)):
        of_group = np.flatnonzero((groups.at == g) & (np.arange(len(cohort)) != host))
        if len(of_group):
            # The one that does what is usual for its group.
            apart = np.abs(effects[of_group] - np.median(effects[of_group], 0)).sum(1)
            donors.append(int(of_group[apart.argmin()]))
    seen = torch.stack([cohort.maps[i] * ~(cohort.anatomy[i] | cohort.anatomy[host]) for i in donors])  # type: ignore[operator]
    focus, affine = highest(seen.nan_to_num().sum(0)), cohort.affines[host]
    title = f"{cohort.uids[host]} (of {groups.cells[host]}) on other backgrounds"
    return [
        Picture(title, "as it is", cohort.x[host][0], affine, focus),
        *(
            Picture(title, f"of {groups.cells[i]}: {cohort.uids[i]}", swapped(cohort, host, i)[0], affine, focus)
            for i in donors
        ),
    ]
