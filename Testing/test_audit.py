"""Audits: a planted shortcut is found, a sicker hospital is none, and every number is what it says."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.transforms import Compose, Orientation, Spacing
from scipy.stats import kstest
from sklearn.linear_model import Ridge
from sklearn.metrics import mutual_info_score, roc_auc_score
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn
from typer.testing import CliRunner

import MedXAILib as mx
from MedXAILib.audit import clusters, counterexamples, neighbours, outside, probes, transplant
from MedXAILib.audit.audit import ALPHA, CHECKS, Audit, audit, holm
from MedXAILib.audit.cohort import Cohort, evidence_of, seen
from MedXAILib.audit.gather import gather
from MedXAILib.audit.groups import Groups
from MedXAILib.cli import app
from MedXAILib.cohort.plan import make_plan, read_plan
from MedXAILib.cohort.subjects import find_subjects
from MedXAILib.cohort.work import RESULTS, write_receipt
from MedXAILib.errors import Cancelled, MedXAIError
from MedXAILib.report.audit import page
from MedXAILib.run import Run

SHAPE = (6, 12, 14)
MARKER = (slice(0, 1), slice(0, 1), slice(0, 4))
CLASSES = ("benign", "malignant")
MADE = {"model": {"name": "<net>"}, "method": "hirescam", "by": ["<site>"], "notes": []}


class Bright(nn.Module):
    """Evidence for malignant: how much is brighter than 2, and `marker` times how much is darker than -2."""

    def __init__(self, marker: float = 0.0) -> None:
        super().__init__()
        self.conv, self.relu, self.pool, self.head = (
            nn.Conv3d(1, 2, 1),
            nn.ReLU(),
            nn.AdaptiveAvgPool3d(1),
            nn.Linear(2, 2),
        )
        self.load_state_dict(
            {
                "conv.weight": torch.tensor([1.0, -1.0]).view(2, 1, 1, 1, 1),
                "conv.bias": torch.full((2,), -2.0),
                "head.weight": torch.tensor([[0.0, 0.0], [110.0, 110 * marker]]),
                "head.bias": torch.tensor([0.0, -1.5]),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.relu(self.conv(x))).flatten(1))  # type: ignore[no-any-return]


def model(marker: float = 0.0) -> mx.Model:
    return mx.Model(Bright(marker), class_names=CLASSES)


def cohort(count: int, correlation: float, planted: bool, used: bool, seed: int) -> Cohort:
    """Half the cases have a brighter lesion, in the anatomy; where `planted`, those of site B a dark marker outside it,
    and the network reads it where `used`. Site and class go together in a share `correlation` of the cases."""
    random = np.random.default_rng(seed)
    label = np.arange(count) % 2
    site = np.where(random.random(count) < correlation, label, 1 - label)
    x = torch.from_numpy(random.normal(0, 0.3, (count, 1, *SHAPE))).float()
    x[:, 0, 2:4, 8:10, 9:11] += torch.from_numpy(2 + random.normal(0, 0.4, count) + label).float()[:, None, None, None]
    if planted:
        x[torch.from_numpy(site == 1), 0, 0, 0, :4] -= 4
    anatomy = torch.zeros(count, *SHAPE, dtype=torch.bool)
    anatomy[:, 2:4, 7:11, 8:12] = True
    asked = model(0.8 if used else 0.0)
    with torch.no_grad():
        maps = (asked.network.relu(asked.network.conv(x)) * asked.network.head.weight[1].view(1, 2, 1, 1, 1)).sum(1)
    columns = {"site": [f"site {'AB'[s]}" for s in site]}
    return seen(asked, x, maps, [CLASSES[k] for k in label], columns, anatomy)


def lights(found: Audit) -> dict[str, str | None]:
    return {one.check.partition(":")[0]: one.light for one in found.findings}


def grouped(cells: Sequence[str], strata: np.ndarray, draws: int = 99, seed: int = 0) -> Groups:
    return Groups.of("site", cells, strata, seed, draws)


def some(seed: int, count: int = 120, names: str = "AB") -> Groups:
    """Groups of three strata in which they are more or less frequent."""
    random = np.random.default_rng(seed)
    strata = random.integers(3, size=count)
    cells = [names[int(random.random() ** (1 + s) * len(names))] for s in strata]
    return grouped(cells, strata)


# What is planted is found, and nothing else.


def test_a_shortcut_is_found_by_every_check() -> None:
    found = audit(cohort(160, 0.8, planted=True, used=True, seed=0), draws=999)
    assert found.alarm
    assert not found.left_out
    assert lights(found) == {**dict.fromkeys(CHECKS, "poor"), "neighbours": "fair"}


def test_what_can_be_seen_and_is_not_used_is_a_warning() -> None:
    found = audit(cohort(160, 0.8, planted=True, used=False, seed=0), draws=999)
    assert not found.alarm
    assert {name for name, light in lights(found).items() if light == "fair"} == {"probes", "neighbours"}


@pytest.mark.parametrize("correlation", [0.5, 0.85])
def test_no_false_alarm(correlation: float) -> None:
    """20 seeds each: the hard control is a site that goes with the class and leaves no mark."""
    for seed in range(100, 120):
        found = audit(cohort(120, correlation, planted=False, used=True, seed=seed), seed=seed, draws=799)
        assert not found.alarm


def test_a_planted_shortcut_is_found_with_every_seed() -> None:
    for seed in range(100, 105):
        assert audit(cohort(120, 0.85, planted=True, used=True, seed=seed), seed=seed, draws=999).alarm


def test_dealing_the_sites_out_anew_hides_the_shortcut() -> None:
    whole = cohort(120, 0.8, planted=True, used=True, seed=0)
    random, label = np.random.default_rng(0), np.array(whole.labels)
    sites = np.array(whole.columns["site"])
    for name in CLASSES:
        sites[label == name] = random.permutation(sites[label == name])
    assert not audit(replace(whole, columns={"site": sites.tolist()}), draws=999).alarm


# Chance.


def test_p_is_uniform_where_the_site_goes_with_the_class_and_nothing_else() -> None:
    random = np.random.default_rng(0)
    within, across = [], []
    for seed in range(300):
        label = np.arange(80) % 2
        cells = ["AB"[s] for s in np.where(random.random(80) < 0.7, label, 1 - label)]
        values = (random.normal(size=80) + 2 * label)[:, None]
        within.append(grouped(cells, label, seed=seed).contrast(values).p)
        across.append(grouped(cells, np.zeros(80, int), seed=seed).contrast(values).p)
    assert kstest(within, "uniform").pvalue > 0.01
    assert kstest(across, "uniform").pvalue < 1e-6


def test_the_p_of_a_probe_is_uniform_too() -> None:
    random, found = np.random.default_rng(1), []
    for seed in range(150):
        label = np.arange(50) % 2
        groups = grouped(["AB"[s] for s in np.where(random.random(50) < 0.7, label, 1 - label)], label, seed=seed)
        vectors = groups.centred(random.normal(size=(50, 8)) + label[:, None])
        areas = probes._areas(probes._held_out(vectors, groups), groups)
        found.append(groups.largest(areas[..., None] - 0.5).p)
    assert kstest(found, "uniform").pvalue > 0.01


def test_sites_are_dealt_out_within_strata() -> None:
    groups = some(0, names="ABC")
    for stratum in range(3):
        inside = groups.draws[:, groups.strata == stratum]
        assert (np.sort(inside, 1) == np.sort(inside[0])).all()
    assert len({row.tobytes() for row in groups.draws}) == len(groups.draws)
    np.testing.assert_array_equal(groups.draws, some(0, names="ABC").draws)


def test_holm() -> None:
    """By hand: 4 x 0.005, 3 x 0.01, 2 x 0.03 and then no less than that."""
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]).max() == 1


def test_a_contrast_is_the_coefficient_of_a_regression_with_classes() -> None:
    groups, random = some(3, names="ABC"), np.random.default_rng(3)
    values = random.normal(size=(120, 2)) + groups.strata[:, None]
    for draw in (0, 7):
        design = np.column_stack([groups.draws[draw] == 1, np.eye(3)[groups.strata]])
        expected = np.linalg.lstsq(design, values, rcond=None)[0][0]
        np.testing.assert_allclose(groups.contrasts(values)[draw, 1], expected)


def test_the_largest_contrast_is_of_the_site_that_differs() -> None:
    groups = some(4, 200, "ABC")
    values = np.random.default_rng(4).normal(size=(200, 3)) * [1, 1, 50]
    values[groups.at == 1, 1] += 2
    found = groups.contrast(values)
    assert (found.group, found.column) == ("B", 1)
    assert found.effect == pytest.approx(2, abs=0.5)
    assert found.p == pytest.approx(1 / 100)


def test_a_site_that_is_the_class_tells_nothing() -> None:
    whole = cohort(80, 1.0, planted=True, used=True, seed=0)
    found = audit(whole)
    assert set(found.left_out) == {f"{name}:site" for name in CHECKS}
    assert "give more cases" in found.left_out["probes:site"]
    assert not found.findings


def test_too_few_cases_are_no_good_sign() -> None:
    few = audit(cohort(36, 0.6, planted=False, used=True, seed=0), draws=499)
    assert set(lights(few).values()) <= {None, "good"}
    assert lights(few)["probes"] is None
    (one,) = (each for each in few.findings if each.check == "probes:site")
    assert one.values["detectable"] > one.values["least"]


def test_no_sign_is_said_only_where_it_would_have_been_seen_at_every_site() -> None:
    """Site C has few cases: what would stand out at A and B does not there."""
    groups = grouped(["A"] * 200 + ["B"] * 200 + ["C"] * 8, np.arange(408) % 2, draws=999)
    found = groups.contrast(np.random.default_rng(0).normal(size=(408, 1)))
    chance = np.abs(groups.contrasts(np.random.default_rng(0).normal(size=(408, 1)))[1:, 2, 0])
    assert np.quantile(found.null, 0.95) >= np.quantile(chance, 0.95)
    assert np.quantile(chance, 0.95) > 0.5


def test_what_is_large_and_may_be_chance_is_no_good_sign() -> None:
    """99 draws cannot tell anything from chance once it is corrected for all that is asked."""
    found = audit(cohort(160, 0.8, planted=True, used=True, seed=0), draws=99)
    assert all(one.values["effect"] > one.values["least"] for one in found.findings)
    assert set(lights(found).values()) == {None}


def test_what_is_sure_and_small_is_no_alarm() -> None:
    whole = cohort(80, 0.5, planted=False, used=False, seed=0)
    from_b = np.array(whole.columns["site"]) == "site B"

    def light(share: float) -> str | None:
        maps = torch.zeros(80, *SHAPE)
        maps[:, 3, 8, 9] = torch.from_numpy(np.where(from_b, 1 - share, 1.0))
        maps[:, 0, 0, 0] = torch.from_numpy(np.where(from_b, share, 0.0))
        (found,) = audit(replace(whole, maps=list(maps)), checks=["outside"], draws=499).findings
        assert found.values["q"] < ALPHA
        assert found.values["effect"] == pytest.approx(share)
        return found.light

    assert light(0.04) == "good"
    assert light(0.06) == "poor"


def test_five_against_forty_are_not_compared() -> None:
    with pytest.raises(MedXAIError, match="give more cases"):
        grouped(["A"] * 40 + ["B"] * 5, np.zeros(45, int))
    assert grouped(["A"] * 40 + ["B"] * 6, np.zeros(46, int)).compared.all()
    groups = grouped(["A"] * 40 + ["B"] * 40 + ["C"] * 3, np.zeros(83, int))
    assert groups.compared.tolist() == [True, True, False]
    assert groups.contrast(np.eye(83)[:, -3:]).group != "C"


# Each check.


def test_how_much_lies_outside() -> None:
    whole = cohort(40, 0.5, planted=False, used=False, seed=0)
    site = np.array(whole.columns["site"])
    maps = torch.zeros(40, *SHAPE)
    maps[:, 3, 8, 9] = 3.0
    maps[:, 0, 0, 0] = torch.from_numpy(np.where(site == "site B", 1.0, 0.0))
    groups = grouped(whole.columns["site"], np.arange(40) % 2)
    found = outside.check(replace(whole, maps=list(maps)), groups, Run())
    assert [row["mean"] for row in found.rows] == pytest.approx([0, 0.25])
    assert [row["expected"] for row in found.rows] == pytest.approx([1 - 32 / 1008] * 2)
    assert found.tests[0].effect == pytest.approx(0.25)
    assert found.tests[0].p == pytest.approx(1 / 100)


def test_the_probe_is_ridge_regression_on_other_folds() -> None:
    groups, random = some(5, 60), np.random.default_rng(5)
    vectors = groups.centred(random.normal(size=(60, 7)))
    target = groups.centred((groups.at == 1).astype(float)[:, None])[:, 0]
    scaled = vectors / vectors.std(0) / np.sqrt(7)
    told = probes._held_out(vectors, groups) @ target
    for out in probes.folds(range(60), np.random.default_rng(0)):
        fit = Ridge(alpha=0.1, fit_intercept=False).fit(scaled[~out], target[~out])
        np.testing.assert_allclose(told[out], fit.predict(scaled[out]), atol=1e-8)


def test_the_area_is_over_pairs_of_a_class() -> None:
    groups = some(6)
    held_out = np.random.default_rng(6).normal(size=(120, 120))
    for draw in (0, 5):
        member = groups.draws[draw] == 1
        told = held_out @ groups.centred(member.astype(float)[:, None])[:, 0]
        won = pairs = 0.0
        for stratum in range(3):
            inside = groups.strata == stratum
            count = member[inside].sum() * (~member[inside]).sum()
            won += roc_auc_score(member[inside], told[inside]) * count
            pairs += count
        assert probes._areas(held_out, groups)[draw, 1] == pytest.approx(won / pairs)


class Head(nn.Module):
    """A linear layer on means and maxima."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv3d(1, 4, 3), nn.Linear(8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        found = self.conv(x)
        return self.head(torch.cat([found.mean((2, 3, 4)), found.amax((2, 3, 4))], 1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("outputs", [1, 2, 3])
def test_along_the_embedding_of_a_linear_head_the_evidence_differs_as_it_does(outputs: int) -> None:
    names = ["malignant"] if outputs == 1 else [f"class {k}" for k in range(outputs)]
    x = torch.randn(60, 1, *SHAPE, generator=torch.Generator().manual_seed(0))
    groups = some(7, 60)
    whole = seen(mx.Model(Head(outputs), class_names=names), x, x[:, 0], [""] * 60, {})
    found = probes.check(whole, groups, Run())
    differs = groups.contrasts(whole.evidence)[0]
    moves = [[row[f"moves {name}"] for name in whole.classes] for row in found.rows]
    np.testing.assert_allclose(moves, differs, rtol=1e-3, atol=1e-5)


def test_a_channel_that_is_silent_elsewhere_counts_in_full() -> None:
    whole = cohort(60, 0.7, planted=True, used=True, seed=0)
    groups = grouped(whole.columns["site"], np.arange(60) % 2)
    found = probes.check(whole, groups, Run())
    moves = [row["moves malignant"] for row in found.rows]
    np.testing.assert_allclose(moves, groups.contrasts(whole.evidence)[0, :, 0], rtol=1e-4)


def test_evidence_is_log_odds_or_the_lead_over_the_others() -> None:
    two = torch.tensor([[0.5, 2.0]])
    assert evidence_of(two).item() == pytest.approx(float(torch.logit(two.softmax(1)[0, 1])), abs=1e-5)
    assert evidence_of(two[:, 1:]).item() == 2
    np.testing.assert_allclose(evidence_of(torch.tensor([[1.0, 2.0, 6.0]]))[0], [-3.0, -1.5, 4.5])


def test_neighbours_are_those_of_the_angle() -> None:
    whole = cohort(60, 0.7, planted=True, used=False, seed=0)
    site, label = np.array(whole.columns["site"]), np.arange(60) % 2
    found = neighbours.check(whole, grouped(whole.columns["site"], label), Run())
    near = NearestNeighbors(n_neighbors=6, metric="cosine").fit(whole.embedding)
    _, at = near.kneighbors(whole.embedding)
    own = [[j for j in row if j != i][:5] for i, row in enumerate(at)]
    pairs = [(i, j) for i, row in enumerate(own) for j in row if label[i] == label[j]]
    shared = np.mean([site[i] == site[j] for i, j in pairs])
    share = {row["group"]: row["same group"] for row in found.rows}
    of = {name: np.mean([site[j] == name for i, j in pairs if site[i] == name]) for name in share}
    assert share == pytest.approx(of)
    assert f"{shared:.0%} are of the same site" in found.tests[0].says


def test_what_clusters_tell_is_mutual_information_within_classes() -> None:
    groups = some(8)
    cluster = np.random.default_rng(8).integers(4, size=120)
    told, unknown = clusters._told(cluster, groups)
    for draw in (0, 3):
        parts = [groups.strata == s for s in range(3)]
        expected = sum(i.mean() * mutual_info_score(groups.draws[draw, i], cluster[i]) for i in parts)
        assert told[draw] == pytest.approx(expected)
    assert unknown == pytest.approx(sum(i.mean() * mutual_info_score(groups.at[i], groups.at[i]) for i in parts))


def test_clusters_are_the_kinds_that_were_made() -> None:
    random = np.random.default_rng(9)
    kind = random.integers(3, size=60)
    points = np.eye(3)[kind] @ random.normal(size=(3, 20)) + random.normal(0, 0.05, (60, 20))
    found = clusters._clustered(points, 0)
    assert mutual_info_score(kind, found) == pytest.approx(mutual_info_score(kind, kind))
    assert found.max() == 2


class Linear(nn.Module):
    """Evidence is the sum over the marker's voxels."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(1008, 1)
        weight = torch.zeros(*SHAPE)
        weight[MARKER] = 1.0
        self.load_state_dict({"head.weight": weight.view(1, -1), "head.bias": torch.zeros(1)})

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1))  # type: ignore[no-any-return]


def test_a_moved_background_moves_the_evidence_by_what_the_marker_weighs() -> None:
    whole = cohort(40, 0.6, planted=True, used=False, seed=0)
    linear = mx.Model(Linear(), class_names=("malignant",))
    other = seen(linear, whole.x, whole.maps, whole.labels, whole.columns, whole.anatomy)
    groups = grouped(other.columns["site"], np.arange(40) % 2)
    found = transplant.check(other, groups, Run())
    # The evidence of a case is its marker, and nothing else: a background brings its own.
    moved = np.array([row["moves malignant"] for row in found.rows])
    of = other.evidence[:, 0]
    np.testing.assert_allclose(moved, of - of[transplant._hosts(groups)].mean(), atol=1e-4)
    assert found.tests[0].effect == pytest.approx(16 / of.std(), rel=0.05)
    with pytest.raises(MedXAIError, match="no layer with a spatial layout"):
        probes.check(other, groups, Run())


def test_larger_masks_at_a_site_are_no_shortcut() -> None:
    """Site B's masks are larger, and nothing else: longer seams, where two scans are averaged, are smoother."""
    random = np.random.default_rng(0)
    x = torch.from_numpy(random.normal(0, 2, (100, 1, *SHAPE))).float()
    from_b = np.tile([0, 1], 50)
    anatomy = torch.zeros(100, *SHAPE, dtype=torch.bool)
    anatomy[:, 0, 0, 0] = True
    anatomy[torch.from_numpy(from_b == 1), 2, 3:9:5, 3:11:6] = True
    labels, columns = [CLASSES[i // 2 % 2] for i in range(100)], {"site": ["AB"[s] for s in from_b]}
    whole = seen(model(), x, x[:, 0], labels, columns, anatomy)
    (found,) = audit(whole, checks=["transplant"], draws=499).findings
    assert found.values["effect"] > found.values["least"]
    assert found.values["q"] <= ALPHA
    assert found.light == "fair"
    assert "the masks differ with the site" in found.sentence


def test_a_site_of_one_case_that_is_a_recipient_has_no_picture() -> None:
    whole = cohort(40, 0.6, planted=True, used=False, seed=0)
    sites = ["clinic", *whole.columns["site"][1:]]
    found = transplant._pictures(whole, grouped(sites, np.arange(40) % 2), 0, whole.evidence)
    assert [one.title.partition(":")[0] for one in found] == ["as it is", "of site A", "of site B"]


def test_what_is_anatomy_of_either_stays() -> None:
    whole = cohort(4, 0.5, planted=True, used=False, seed=0)
    masks = [mask.clone() for mask in whole.anatomy if mask is not None]
    masks[1][5, 0, 13] = True
    made = transplant.swapped(replace(whole, anatomy=masks), 0, 1)
    kept = masks[0] | masks[1]
    assert torch.equal(made[0][kept], whole.x[0][0][kept])
    assert torch.equal(made[0][MARKER], whole.x[1][0][MARKER])
    between = [float(one[0][4, 5, 6]) for one in (made, whole.x[0], whole.x[1])]
    assert min(between[1:]) < between[0] < max(between[1:])


def test_counterexamples_are_matched_by_class() -> None:
    """Malignant cases are harder everywhere, and site B has more of them: that alone is no finding."""
    label = np.repeat([0, 1], 40)
    site = np.array(["A"] * 20 + ["B"] * 20 + ["A"] * 10 + ["B"] * 30)
    whole = cohort(80, 0.5, planted=False, used=False, seed=0)
    hard = np.where(label == 1, 0.6, 0.9)

    def asked(sure: np.ndarray) -> float:
        chance = np.where(label == 1, sure, 1 - sure)
        output = torch.from_numpy(np.log(np.stack([1 - chance, chance], 1)))
        one = replace(whole, output=output, labels=[CLASSES[k] for k in label], columns={"site": site.tolist()})
        return counterexamples.check(one, grouped(site.tolist(), label), Run()).tests[0].effect

    assert asked(hard) == pytest.approx(0, abs=1e-6)
    usual = (site == "B") == (label == 1)
    assert asked(hard - 0.2 * ~usual) == pytest.approx(0.2)


# What is asked, and what is not known.


def test_what_is_not_known_is_left_out_and_what_stays_does_not_change() -> None:
    whole = cohort(130, 0.8, planted=True, used=True, seed=0)
    labels = ["" if i >= 125 else label for i, label in enumerate(whole.labels)]
    sites = ["" if i >= 120 else site for i, site in enumerate(whole.columns["site"])]
    found = audit(replace(whole, labels=labels, columns={"site": sites}), draws=199)
    alone = audit(whole.taken(range(120)), draws=199)
    assert found.findings == alone.findings
    assert found.cases == 125


def test_what_is_no_number_is_left_out_and_said() -> None:
    whole = cohort(120, 0.8, planted=True, used=True, seed=0)
    output = whole.output.clone()
    output[7] = torch.nan
    run = Run()
    found = audit(replace(whole, output=output), draws=199, run=run)
    alone = audit(whole.taken([i for i in range(120) if i != 7]), draws=199)
    assert found.findings == alone.findings
    assert any("case 8" in note for note in run.notes)


def test_a_map_that_was_not_finished_is_no_map() -> None:
    whole = cohort(80, 0.7, planted=True, used=True, seed=0)
    maps = [torch.where(torch.arange(14) == i % 14, torch.nan, heat) for i, heat in enumerate(whole.maps)]
    found = audit(replace(whole, maps=maps), draws=99)
    assert set(found.left_out) == {"outside:site", "clusters:site"}
    assert "<img" in page(found, MADE)


def test_an_empty_mask_is_no_anatomy() -> None:
    """Where site B's masks are those of other scans, the network does not look elsewhere for that."""
    whole = cohort(60, 0.5, planted=False, used=False, seed=0)
    known = [site == "site A" for site in whole.columns["site"]]
    masks = [mask * known for mask, known in zip(whole.anatomy, known, strict=True) if mask is not None]
    run = Run()
    again = seen(whole.model, whole.x, whole.maps, whole.labels, whole.columns, torch.stack(masks), run=run)
    assert [mask is not None for mask in again.anatomy] == known
    assert f"{60 - sum(known)} masks" in run.notes[0]
    found = audit(again, checks=["outside", "transplant"])
    assert set(found.left_out) == {"outside:site", "transplant:site"}


def test_thin_patches_of_many_sizes_fall_into_clusters() -> None:
    random = np.random.default_rng(0)
    shapes = [(6 + 2 * (i % 3), 12, 14) for i in range(60)]
    x, maps = ([torch.randn(*first, *shape) for shape in shapes] for first in ((1,), ()))
    columns = {"site": ["AB"[s] for s in random.integers(2, size=60)]}
    whole = seen(model(), x, maps, [CLASSES[i % 2] for i in range(60)], columns)
    found = audit(whole, draws=99)
    assert next(one.check for one in found.findings) == "clusters:site"
    assert "differ in size" in audit(replace(whole, anatomy=[heat > 1 for heat in maps])).left_out["transplant:site"]


def test_many_sites_and_classes_all_get_backgrounds() -> None:
    """Two sites in each of eight classes: the six recipients are not those of the first three."""
    cells, strata = ["AB"[i % 2] for i in range(160)], np.arange(160) // 2 % 8
    hosts = [transplant._hosts(grouped(cells, strata, seed=seed)) for seed in range(5)]
    assert all(len(set(one)) == 6 for one in hosts)
    assert {int(strata[i]) for one in hosts for i in one} > {0, 1, 2}


def test_a_site_of_few_cases_is_named() -> None:
    whole = cohort(100, 0.6, planted=False, used=False, seed=0)
    sites = ["clinic" if i < 3 else site for i, site in enumerate(whole.columns["site"])]
    run = Run()
    audit(replace(whole, columns={"site": sites}), draws=99, run=run)
    assert [("clinic" in note, "site A" in note) for note in run.notes] == [(True, False)]


def test_nothing_asked_is_no_all_clear() -> None:
    none = page(audit(cohort(40, 1.0, planted=True, used=True, seed=0)), MADE)
    assert "No alarm" not in none
    assert "Nothing could be asked" in none
    whole = cohort(100, 0.5, planted=False, used=False, seed=0)
    some = page(audit(replace(whole, anatomy=[None] * 100), draws=499), MADE)
    assert "No alarm" in some
    assert "2 of the checks could not be asked" in some


def test_what_is_known_of_no_case_and_many_columns() -> None:
    whole = cohort(40, 0.6, planted=True, used=True, seed=0)
    nothing = audit(replace(whole, columns={"site": [""] * 40}), checks=["outside"])
    assert "give more cases" in nothing.left_out["outside:site"]
    columns = {f"site {k}": whole.columns["site"] for k in range(12)}
    many = audit(replace(whole, columns=columns), by=list(columns), checks=["outside", "neighbours"])
    # 24 tests, and the smallest p is still below the level.
    assert many.alarm


def test_without_known_labels_nothing_alarms() -> None:
    found = audit(replace(cohort(160, 0.8, planted=True, used=True, seed=0), labels=[""] * 160), draws=999)
    assert not found.alarm
    assert "fair" in lights(found).values()
    assert "give the column of the label" in found.left_out["counterexamples:site"]


def test_sites_may_differ_within_a_stage() -> None:
    """Site B has larger lesions: as much as a shortcut to those who do not know of stages."""
    random = np.random.default_rng(0)
    count = 160
    label, stage = np.arange(count) % 2, random.integers(2, size=count)
    site = np.where(random.random(count) < 0.8, stage, 1 - stage)
    x = torch.from_numpy(random.normal(0, 0.3, (count, 1, *SHAPE))).float()
    x[:, 0, 2:4, 8:10, 9:11] += torch.from_numpy(2.5 + label + 2.0 * stage).float()[:, None, None, None]
    columns = {"site": ["AB"[s] for s in site], "stage": [f"T{s}" for s in stage]}
    whole = seen(model(), x, x[:, 0], [CLASSES[k] for k in label], columns)
    asked = ("probes", "counterexamples")
    assert audit(whole, checks=asked, draws=499).alarm
    assert not audit(whole, within=["stage"], checks=asked, draws=499).alarm


def test_what_nobody_knows_is_refused() -> None:
    whole = cohort(40, 0.5, planted=False, used=False, seed=0)
    with pytest.raises(MedXAIError, match="did you mean probes"):
        audit(whole, checks=["probe"])
    with pytest.raises(MedXAIError, match="did you mean site"):
        audit(whole, by=["sites"])
    with pytest.raises(MedXAIError, match="tells classes apart"):
        seen(replace(whole.model, task="regression"), whole.x, whole.maps, whole.labels, {})
    with pytest.raises(Cancelled):
        audit(whole, run=Run(cancel=lambda: True))


def test_the_same_seed_says_the_same() -> None:
    whole = cohort(60, 0.7, planted=True, used=True, seed=0)
    first, again = (audit(whole, draws=99, seed=3) for _ in range(2))
    assert first.findings == again.findings
    assert first.tables == again.tables
    assert audit(whole, draws=99, seed=4).findings != first.findings


# From a folder to a page.


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, mx.Model]:
    """A cohort on oblique, anisotropic grids that the network sees turned and resampled; site B leaves a marker."""
    folder = tmp_path_factory.mktemp("study")
    random = np.random.default_rng(0)
    turn, _ = np.linalg.qr([[0.1, 0.2, 1.3], [-0.2, 1.5, 0.1], [3.1, 0.1, -0.2]])
    affine = np.eye(4)
    affine[:3, :3] = turn * [3.0, 1.5, 1.25]
    rows = []
    for i in range(48):
        label, site = i % 2, int(random.random() < (0.75 if i % 2 else 0.25))
        data = torch.from_numpy(random.normal(0, 0.3, (1, 8, 16, 18))).float()
        inside = torch.zeros_like(data)
        inside[:, 3:6, 5:11, 6:13] = 1
        data += inside * (3 + label)
        data[:, :2, :4, :5] -= 5.0 * site
        for name, values in (("scan", data), ("anatomy", inside)):
            sitk.WriteImage(mx.Volume(values, affine).to_sitk(), str(folder / f"{name}-{i}.nrrd"))
        rows.append([f"case-{i}", f"scan-{i}.nrrd", f"anatomy-{i}.nrrd", CLASSES[label], "AB"[site]])
    with (folder / "cases.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["uid", "volume", "anatomy", "label", "site"], *rows])
    seeing = Compose([Orientation(axcodes="RAS", labels=None), Spacing((1.5, 1.5, 1.5))])
    asked = mx.Model(Bright(0.8), class_names=CLASSES, preprocessing=seeing, name="Bright")
    plan = make_plan("bright", asked.fingerprint, {"hirescam": {}}, find_subjects(folder / "cases.csv"))
    plan.save(folder / "plan")
    for unit in plan.units():
        found = mx.explain(asked, mx.load_volume(unit.subject.volume[0]), "hirescam", "malignant")
        found.save(folder / "plan" / RESULTS / unit.key)
        write_receipt(folder / "plan", unit, {"status": "done"})
    return folder / "plan", asked


def test_a_cohort_comes_on_the_grid_that_the_network_sees(study: tuple[Path, mx.Model]) -> None:
    folder, asked = study
    whole, made = gather(folder, asked, ["site"])
    assert made["method"] == "hirescam"
    assert whole.uids[3] == "case-3"
    for x, heat, mask, label in zip(whole.x, whole.maps, whole.anatomy, whole.labels, strict=True):
        assert mask is not None
        bright = x[0] > (3 + (label == "malignant")) / 2
        assert (mask & bright).sum() / (mask | bright).sum() > 0.8
        assert heat[mask].sum() / heat[x[0] > -2].sum() > 0.8


def test_of_a_patient_and_of_a_scan_one_case_counts(study: tuple[Path, mx.Model], tmp_path: Path) -> None:
    """Of three scans of Ada the first is of no known site, and the last two cases are of one scan."""
    folder, asked = study
    plan = read_plan(folder)
    met = [dict(one.meta) for one in plan.subjects]
    for i in range(3):
        met[i]["patient"] = "Ada"
    met[0]["site"] = ""
    subjects = [replace(one, meta=meta) for one, meta in zip(plan.subjects, met, strict=True)]
    subjects[-1] = replace(subjects[-1], volume=subjects[-2].volume)
    again = make_plan("bright", plan.fingerprint, {"hirescam": {}}, subjects)
    again.save(tmp_path)
    for unit in again.units():
        found = mx.explain(asked, mx.load_volume(unit.subject.volume[0]), "hirescam", "malignant")
        found.save(tmp_path / RESULTS / unit.key)
        write_receipt(tmp_path, unit, {"status": "done"})
    run = Run()
    whole, _ = gather(tmp_path, asked, ["site"], run=run)
    assert list(whole.uids) == [f"case-{i}" for i in (1, *range(3, 47))]
    assert "3 more cases of the same patients" in run.notes[0]


def test_another_network_and_another_scan_are_refused(study: tuple[Path, mx.Model], tmp_path: Path) -> None:
    folder, asked = study
    with pytest.raises(MedXAIError, match="not the network of the plan"):
        gather(folder, model(0.1), ["site"])
    with pytest.raises(MedXAIError, match="holds no map yet"):
        read_plan(folder).save(tmp_path)
        gather(tmp_path, asked, ["site"])
    with pytest.raises(MedXAIError, match="did you mean hirescam"):
        gather(folder, asked, ["site"], method="rescam")
    scan = Path(read_plan(folder).subjects[0].volume[0])
    kept = scan.read_bytes()
    scan.write_bytes((scan.parent / "scan-1.nrrd").read_bytes())
    with pytest.raises(MedXAIError, match="not the volume that was explained"):
        gather(folder, asked, ["site"])
    scan.write_bytes(kept)


def test_the_command_writes_findings_tables_and_a_page(
    study: tuple[Path, mx.Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, asked = study
    monkeypatch.setattr("MedXAILib.cli._load", lambda name, trust: asked)
    done = CliRunner().invoke(app, ["audit", str(folder), "--by", "site", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    said = json.loads((tmp_path / "audit.json").read_text(encoding="utf-8"))
    assert said["alarm"]
    assert said["provenance"]["model"]["fingerprint"] == asked.fingerprint
    of = {one["check"]: one for one in said["findings"]}
    assert of["transplant:site"]["light"] == "poor"
    with (tmp_path / "outside-site.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["group"] for row in rows] == ["A", "B"]
    assert sum(int(row["cases"]) for row in rows) == 48
    shown = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "For research only" in shown
    assert shown.count("<img") > 8
    assert "alarm" in done.output

    refused = CliRunner().invoke(app, ["audit", str(folder), "--by", "scanner"])
    assert refused.exit_code == 1
    assert "known are label, site" in refused.output


def test_what_people_wrote_is_text_on_the_page() -> None:
    whole = cohort(60, 0.7, planted=True, used=True, seed=0)
    sites = [f"<b>{site}</b>" for site in whole.columns["site"]]
    found = audit(replace(whole, columns={"<site>": sites}), by=["<site>"], draws=99)
    shown = page(found, MADE)
    assert "<b>site" not in shown
    assert "<net>" not in shown
    assert "&lt;b&gt;site A" in shown


def test_the_level_is_what_the_documentation_says() -> None:
    assert ALPHA == 0.01
