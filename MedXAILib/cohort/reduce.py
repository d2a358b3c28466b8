"""What a network looks at over a whole cohort: mean and spread of its maps in one space, where in an atlas they lie,
and whether that differs between groups. It follows from the results alone, taken in the order of the plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor

from MedXAILib.cohort.plan import Subject, Unit, read_plan
from MedXAILib.cohort.work import RESULTS, receipt
from MedXAILib.errors import MedXAIError
from MedXAILib.explanation import SaliencyMap, load_explanation
from MedXAILib.run import Run
from MedXAILib.table import write_rows
from MedXAILib.volume import Volume

_DRAWS = 2000


@dataclass(frozen=True)
class Overall:
    """Of one method: the mean of the absolute maps and their variance over cases (D, H, W), on the template's grid; the
    share of each case's absolute map that lies in each region of the atlas; and of how many cases."""

    method: str
    mean: Tensor
    variance: Tensor
    affine: np.ndarray
    shares: Mapping[str, Mapping[str, float]]
    cases: int


@dataclass(frozen=True)
class Share:
    """The mean share of the maps in a region over a group of cases, and its 95 % interval (bootstrap over cases)."""

    region: str
    group: str
    cases: int
    mean: float
    low: float
    high: float


def reduce(
    folder: str | Path,
    template: Volume,
    atlas: Volume | None = None,
    names: Mapping[int, str] | None = None,
    run: Run | None = None,
) -> list[Overall]:
    """What the maps in `folder` have in common, method by method, each map brought to sum to one, so that every case
    counts alike.

    Args:
        template: on whose grid they are laid. A case that has a `transform` in the plan (from points of the template to
            points of the scan, as SimpleITK registers) goes through it, others lie where they are.
        atlas: integer labels, on any grid of the template's space; `names` says what they are.

    Raises:
        MedXAIError: when there is no map.
    """
    folder, run = Path(folder), run or Run()
    labels = None if atlas is None else _labels(atlas, template)
    methods: dict[str, list[Unit]] = {}
    for unit in read_plan(folder).units():
        known = receipt(folder, unit.key)
        if known is not None and known["status"] == "done":
            methods.setdefault(unit.method, []).append(unit)
    found = []
    for method, units in methods.items():
        mean = spread = torch.zeros(template.shape, dtype=torch.float64)
        shares: dict[str, dict[str, float]] = {}
        for subject, values in _placed(folder, units, template, run):
            shares[subject.uid] = {} if labels is None else _shares(values, labels, names or {})
            # Welford: one map is held at a time.
            from_mean = values - mean
            mean = mean + from_mean / len(shares)
            spread = spread + from_mean * (values - mean)
        if shares:
            variance = spread / max(1, len(shares) - 1)
            found.append(Overall(method, mean, variance, template.affine, shares, len(shares)))
    if not found:
        raise MedXAIError(f"'{folder}' holds no map yet: compute it first ('medxai cohort run').")
    return found


def by_group(overall: Overall, subjects: Sequence[Subject], column: str | None = None, seed: int = 0) -> list[Share]:
    """The mean share in each region, of all cases, and of those that have each value of `column` in the plan."""
    group_of = {one.uid: one.meta.get(column, "") if column else "" for one in subjects}
    groups = ["", *sorted({group_of[uid] for uid in overall.shares} - {""})]
    generator = np.random.default_rng(seed)
    rows = []
    for region in sorted({region for shares in overall.shares.values() for region in shares}):
        for group in groups:
            values = np.array([s[region] for uid, s in overall.shares.items() if group in ("", group_of[uid])])
            drawn = values[generator.integers(len(values), size=(_DRAWS, len(values)))].mean(1)
            low, high = np.percentile(drawn, (2.5, 97.5))
            rows.append(Share(region, group or "all", len(values), float(values.mean()), float(low), float(high)))
    return rows


def write(overall: Overall, groups: Sequence[Share], folder: Path) -> None:
    """Write `<method>-mean.nrrd`, `<method>-variance.nrrd`, `<method>-cases.csv` and `<method>-regions.csv`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in (("mean", overall.mean), ("variance", overall.variance)):
        image = Volume(values[None].float(), overall.affine).to_sitk()
        sitk.WriteImage(image, str(folder / f"{overall.method}-{name}.nrrd"), useCompression=True)
    regions = sorted({region for shares in overall.shares.values() for region in shares})
    cases = [[uid, *(shares[region] for region in regions)] for uid, shares in overall.shares.items()]
    write_rows(folder / f"{overall.method}-cases.csv", ["case", *regions], cases)
    heads = ["region", "group", "cases", "mean", "low", "high"]
    rows = [[s.region, s.group, s.cases, s.mean, s.low, s.high] for s in groups]
    write_rows(folder / f"{overall.method}-regions.csv", heads, rows)


def _placed(folder: Path, units: Sequence[Unit], template: Volume, run: Run) -> Iterator[tuple[Subject, Tensor]]:
    """The absolute maps on the grid of the template, (D, H, W), float64, each summing to one; without those of zero."""
    grid = template.to_sitk()
    for done, unit in enumerate(units):
        run.step(done, len(units), f"Putting the maps of {unit.method} together")
        found = load_explanation(folder / RESULTS / unit.key)
        if not isinstance(found, SaliencyMap):
            continue
        image = Volume(found.data.abs().sum(0, keepdim=True), found.affine).to_sitk()
        given = unit.subject.transform
        transform = sitk.Transform(3, sitk.sitkIdentity) if given is None else sitk.ReadTransform(given)
        laid = sitk.Resample(image, grid, transform, sitk.sitkLinear, 0.0, sitk.sitkFloat64)
        values = torch.from_numpy(sitk.GetArrayFromImage(laid))
        if float(values.sum()) > 0:
            yield unit.subject, values / values.sum()


def _labels(atlas: Volume, template: Volume) -> Tensor:
    image = sitk.Resample(
        atlas.to_sitk(), template.to_sitk(), sitk.Transform(3, sitk.sitkIdentity), sitk.sitkNearestNeighbor, 0.0
    )
    return torch.from_numpy(sitk.GetArrayFromImage(image).astype(np.int64))


def _shares(values: Tensor, labels: Tensor, names: Mapping[int, str]) -> dict[str, float]:
    # By their rank: there are atlases with labels of nine digits.
    there, rank = labels.unique(return_inverse=True)
    sums = torch.bincount(rank.flatten(), values.flatten())
    return {
        names.get(label, f"label {label}") if label else "outside": share
        for label, share in zip(there.tolist(), sums.tolist(), strict=True)
    }
