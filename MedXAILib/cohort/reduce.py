"""What a network looks at over a whole cohort: mean and spread of its maps in one space, where in an atlas they lie,
and whether that differs between groups. It follows from the results alone, taken in the order of the plan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor

from MedXAILib.cohort.differences import Difference, differences, grouped
from MedXAILib.cohort.engine import carry_out
from MedXAILib.cohort.intervals import spread, whose
from MedXAILib.cohort.plan import Subject, Unit
from MedXAILib.cohort.registration import registered
from MedXAILib.cohort.state import explained
from MedXAILib.cohort.sums import Summing, discard, merged, prepare
from MedXAILib.cohort.told import maps
from MedXAILib.errors import MedXAIError
from MedXAILib.run import Run
from MedXAILib.table import without_nan, write_rows
from MedXAILib.volume import Volume


@dataclass(frozen=True)
class Overall:
    """Of one method: the mean of the absolute maps and their variance over cases (D, H, W), on the template's grid; the
    share of each case's absolute map that lies in each region of the atlas; of how many cases, and why others were left
    out.

    Of signed maps, `contributions` are the sums of each case's map, as it is, over the regions. They add up to what the
    map explains: for Deep SHAP, by how much the output differs from that of the baseline.
    """

    method: str
    mean: Tensor
    variance: Tensor
    affine: np.ndarray
    shares: Mapping[str, Mapping[str, float]]
    cases: int
    contributions: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Share:
    """The mean share of the maps in a region over a group of cases, those of one value of the column `by` (all: ""),
    and its 95 % interval (bootstrap over cases)."""

    region: str
    group: str
    cases: int
    mean: float
    low: float
    high: float
    by: str = ""


def reduce(
    folder: str | Path,
    template: Volume,
    atlas: Volume | None = None,
    names: Mapping[int, str] | None = None,
    run: Run | None = None,
    workers: int = 0,
    scheduler: str | None = None,
) -> list[Overall]:
    """What the maps in `folder` have in common, method by method, each map brought to sum to one, so that every case
    counts alike.

    Args:
        template: on whose grid they are laid. A case goes through the `transform` that it has in the plan (from points
            of the template to points of the scan, as SimpleITK registers), or else through the one that `register`
            found. In a cohort that was not registered, others lie where they are.
        atlas: integer labels, on any grid of the template's space; `names` says what they are.
        workers, scheduler: as for `compute`. The result does not depend on them, to the last bit.

    Raises:
        MedXAIError: when there is no map, or none on the template, or the cohort was registered to another
            template, or in part only.
    """
    folder = Path(folder).resolve()
    found, left_out = registered(folder, template)
    methods: dict[str, list[tuple[Unit, str | None]]] = {method: [] for method in maps(folder)}
    for unit in explained(folder):
        uid = unit.subject.uid
        if unit.method in methods and uid not in left_out:
            methods[unit.method].append((unit, unit.subject.transform or found.get(uid)))
    place, pieces = prepare(folder, template, atlas, names or {}, methods)
    carry_out(Summing(place), list(pieces), "Putting the maps together", workers, scheduler, run=run)
    overall = []
    for method in methods:
        sums = merged(place, [piece for piece in pieces if piece.rpartition(".")[0] == method])
        if count := len(sums.shares):
            mean, squares = torch.from_numpy(sums.maps / count)
            variance = (squares - mean**2).clamp(min=0) * (count / max(1, count - 1))
            out = left_out | sums.left_out
            made = Overall(method, mean, variance, template.affine, sums.shares, count, sums.contributions, out)
            overall.append(made)
    discard(place)
    if not overall and any(methods.values()):
        raise MedXAIError("No map lies on the template, or all are zero there: is it the template of these scans?")
    if not overall:
        raise MedXAIError(f"'{folder}' holds no map yet: compute it first ('medxai cohort run').")
    return overall


def by_group(
    shares: Mapping[str, Mapping[str, float]], subjects: Sequence[Subject], columns: Sequence[str] = ()
) -> list[Share]:
    """The mean of what each case says of each region, its `shares` or `contributions`: of all cases, and of those of
    each group by `columns` of the plan."""
    of = {one.uid: one for one in subjects}
    split = [("", dict.fromkeys(shares, "all")), *((column, grouped(subjects, column)) for column in columns)]
    rows = []
    for region in sorted({region for one in shares.values() for region in one}):
        for column, group_of in split:
            for group in sorted({group_of[uid] for uid in shares if uid in group_of}):
                among = [uid for uid in shares if group_of.get(uid) == group]
                ends = spread([shares[uid][region] for uid in among], [whose(of[uid]) for uid in among])
                rows.append(Share(region, group, len(among), *ends, column))
    return rows


def write(overall: Overall, subjects: Sequence[Subject], columns: Sequence[str], folder: Path) -> None:
    """Write what is known of a method over all cases, and by groups by `columns` of the plan, as `<method>-` and

    - `mean.nrrd`, `variance.nrrd`; `error.nrrd`, the standard error of the mean, in its unit; and `variation.nrrd`, the
      standard deviation over the mean: 0 where all cases are alike, more than 1 where few of them make the mean;
    - `cases.csv` and `regions.csv`, the shares; of signed maps `contributions.csv`, where `importance` is the mean of
      their sizes; `differences.csv` between groups; `left-out.csv`, if any case was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    deviation = overall.variance.sqrt()
    images = {
        "mean": overall.mean,
        "variance": overall.variance,
        "error": deviation / math.sqrt(overall.cases),
        # Where no map says anything, nothing varies.
        "variation": (deviation / overall.mean).nan_to_num(0.0),
    }
    for name, values in images.items():
        image = Volume(values[None].float(), overall.affine).to_sitk()
        sitk.WriteImage(image, str(folder / f"{overall.method}-{name}.nrrd"), useCompression=True)
    heads = ["region", "group", "cases", "mean", "low", "high", "by"]
    shares, signed = overall.shares, overall.contributions
    sizes = {uid: {region: abs(value) for region, value in one.items()} for uid, one in signed.items()}
    pairs = zip(by_group(signed, subjects, columns), by_group(sizes, subjects, columns), strict=True)
    regions = sorted({region for one in shares.values() for region in one})
    tables: dict[str, tuple[list[str], list[list[object]]]] = {
        "cases": (["case", *regions], [[uid, *(one[region] for region in regions)] for uid, one in shares.items()]),
        "regions": (heads, [[*vars(one).values()] for one in by_group(shares, subjects, columns)]),
        "contributions": ([*heads, "importance"], [[*vars(one).values(), size.mean] for one, size in pairs]),
        "differences": (
            [one.name for one in fields(Difference)],
            [[*vars(one).values()] for one in differences(shares, subjects, columns)],
        ),
        "left-out": (["case", "reason"], [[*one] for one in overall.left_out.items()]),
    }
    for name, (names, rows) in tables.items():
        if rows or name in ("cases", "regions"):
            write_rows(folder / f"{overall.method}-{name}.csv", names, without_nan(rows))
