"""What a cohort tells in words and by example: means of made-up explanations by hand, and of real ones once more."""

from __future__ import annotations

import csv
import math
import weakref
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from concept_examples import CHANNELS, drawn, examples
from scipy.stats import bootstrap, false_discovery_control
from torch import Tensor, nn
from typer.testing import CliRunner

import MedXAILib as mx
from MedXAILib.cli import app
from MedXAILib.cohort import told
from MedXAILib.cohort.engine import compute
from MedXAILib.cohort.inputs import fingerprints, settled
from MedXAILib.cohort.intervals import spread
from MedXAILib.cohort.plan import Plan, Subject, make_plan, read_plan
from MedXAILib.cohort.state import state
from MedXAILib.cohort.subjects import find_subjects
from MedXAILib.cohort.tables import Tables
from MedXAILib.cohort.typical import typical
from MedXAILib.cohort.work import RESULTS, receipt, write_receipt
from MedXAILib.concept_scores import Concept
from MedXAILib.explanation import Explanation, Provenance
from MedXAILib.resources import path
from MedXAILib.synthetic.lung_nodules import ATTRIBUTES, CLASSES, SPACING_MM, Backgrounds, synthesise
from MedXAILib.textual.concept_sets import sha256

Rows = dict[tuple[str, ...], dict[str, Any]]


def made(method: str, label: str = "malignant", **parameters: Any) -> Provenance:
    nothing: dict[str, Any] = {"target": {}, "model": {}, "volume": {}, "versions": {}, "device": "cpu", "created": ""}
    cost = {"seconds": 0, "peak_memory": 0, "forwards": 0, "backwards": 0, "seed": 0}
    return Provenance(method=method, target_label=label, parameters=parameters, **nothing, **cost)


def cohort(
    folder: Path, method: str, each: Sequence[Explanation], asked: str | None = None, **columns: Sequence[str]
) -> Path:
    """The folder of a cohort in which case i was explained by the i-th, and the plan knows the i-th of each column."""
    known = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    subjects = [Subject(f"case-{i:02d}", (f"{i}.nrrd",), target=asked, meta=m) for i, m in enumerate(known)]
    plan = Plan("model", "fingerprint", {method: {}}, tuple(subjects or (Subject("none", ("0",)),)))
    plan.save(folder)
    for unit, one in zip(plan.units(), each, strict=True):
        one.save(folder / RESULTS / unit.key)
        write_receipt(folder, unit, {"status": "done"})
    return folder


def reduced(folder: Path, *by: str) -> Tables:
    ((_, tables),) = told.reduce(folder, by)
    return tables


def rows(tables: Tables, what: str) -> Rows:
    """The rows of a table by name, group and target."""
    return {(row[what], row["group"], row["target"]): row for row in tables.rows(what)}


def scores(label: str = "malignant", **concepts: float | None) -> mx.ConceptScores:
    each = [Concept(n, score, refused="" if score is not None else "not known") for n, score in concepts.items()]
    return mx.ConceptScores(made("tcav", label), {}, tuple(each), "score")


def test_intervals_are_of_scipy_and_of_wilson_and_count_patients_once() -> None:
    values = np.random.default_rng(1).gamma(2, size=40)
    mean, low, high = spread(values.tolist(), [str(i) for i in range(40)])
    theirs = bootstrap((values,), np.mean, method="percentile", n_resamples=20000, rng=np.random.default_rng(0))
    assert mean == pytest.approx(values.mean())
    width = high - low
    assert abs(low - theirs.confidence_interval.low) < 0.1 * width
    assert abs(high - theirs.confidence_interval.high) < 0.1 * width
    # What is always so: Wilson's lower end is n / (n + z²).
    assert spread([1.0] * 8, list("abcdefgh"), share=True) == pytest.approx((1, 8 / (8 + 1.959964**2), 1), abs=1e-6)
    # Of two patients with four scans each it is less sure.
    assert spread([1.0] * 8, list("aaaabbbb"), share=True) == pytest.approx((1, 2 / (2 + 1.959964**2), 1), abs=1e-6)
    # The same score of every case is no share.
    assert spread([1.0] * 8, list("abcdefgh")) == (1, 1, 1)
    # A patient's second scan that says the same adds nothing.
    twice = spread([*values.tolist(), *values.tolist()], [str(i) for i in range(40)] * 2)
    assert twice == pytest.approx((mean, low, high))
    assert spread([], [])[0] != spread([], [])[0] and math.isnan(spread([1.0, 2.0], ["a", "a"])[1])


def test_concepts_over_cases_by_target_and_group(tmp_path: Path) -> None:
    spiky = [2.0, 1.0, 3.0, -1.0, 5.0, 6.0]
    each = [
        scores("malignant" if i < 4 else "benign", spiculation=value, lobulation=None) for i, value in enumerate(spiky)
    ]
    sites = ["north", "north", "south", "south", "south", ""]
    tables = reduced(cohort(tmp_path, "tcav", each, site=sites), "site")
    found = rows(tables, "concept")
    whole = found["spiculation", "all", "malignant"]
    assert (whole["cases"], whole["mean"], whole["for"], whole["against"]) == (4, 1.25, 0.75, 0.25)
    assert whole["examples"] == "case-02; case-00; case-01"
    # What is asked of another class is not mixed with it.
    assert found["spiculation", "all", "benign"]["mean"] == 5.5
    assert found["spiculation", "north", "malignant"]["mean"] == 1.5
    assert found["spiculation", "south", "malignant"]["mean"] == 1.0
    assert ("spiculation", "north", "benign") not in found
    unknown = found["lobulation", "all", "malignant"]
    assert unknown["cases"] == 0 and math.isnan(unknown["mean"]) and unknown["refused"] == "not known"
    # Also as it is written.
    tables.write("tcav", tmp_path / "out")
    with (tmp_path / "out" / "tcav-concepts.csv").open(encoding="utf-8", newline="") as file:
        head, *lines = csv.reader(file)
    assert head[:8] == ["concept", "group", "cases", "mean", "low", "high", "by", "target"]
    assert ["spiculation", "south", "1", "5.0", "", "", "site", "benign"] in [line[:8] for line in lines]
    assert all("nan" not in line for line in lines)


def test_a_difference_between_groups_is_found_and_none_where_there_is_none(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    site = ["north", "south"] * 15
    each = [
        scores(marker=float(draw.normal() + 2 * (of == "north")), other=float(draw.normal()), rare=None) for of in site
    ]
    found = {row["region"]: row for row in reduced(cohort(tmp_path, "tcav", each, site=site), "site").differences()}
    values = {
        n: [next(c.score for c in one.concepts if c.name == n) or 0.0 for one in each] for n in ("marker", "other")
    }
    for name, of in values.items():
        assert found[name]["mean"] == pytest.approx(np.mean(of[::2]) - np.mean(of[1::2]))
        assert (found[name]["group"], found[name]["target"], found[name]["of"]) == (
            "north - south",
            "malignant",
            "concept",
        )
    assert found["marker"]["q"] < 0.01 and found["other"]["q"] > 0.05
    # Of two tests the smaller p is doubled, unless the other is smaller than that (Benjamini and Hochberg).
    assert found["marker"]["q"] == pytest.approx(min(2 * found["marker"]["p"], found["other"]["p"]))


class Bent(nn.Module):
    """Scores that are not linear in the pooled channels, so that a concept means something else to each case."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.features = nn.Identity()
        self.head = nn.Sequential(nn.Linear(CHANNELS, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(3 * self.features(x).mean((2, 3, 4)))


def test_tcav_over_a_cohort_is_that_of_a_class_of_the_same_cases(tmp_path: Path) -> None:
    x, there = drawn(40, 1, bright=0, dark=2)
    model = mx.Model(Bent(), class_names=("no", "yes"), channels=CHANNELS, layers=("features",))
    asked = {"draws": 30, "vector": "pattern", "pool": "mean", "maps": "none", "classes": False, "score": "sign"}
    given = examples(x, there)
    each = [mx.tell(model, scan.volume, "tcav", "yes", examples=given, **asked) for scan in given.scans]
    found = rows(reduced(cohort(tmp_path, "tcav", each, site=[""] * 40)), "concept")
    # The method itself, asked about all examples at once.
    own = mx.tell(model, given.scans[0].volume, "tcav", "yes", examples=given, explained="all", **asked)
    assert isinstance(own, mx.ConceptScores)
    mixed = []
    for concept in own.concepts:
        row = found[concept.name, "all", "yes"]
        for number in ("tcav", "alpha_tcav", "magnitude", "p"):
            assert row[number] == pytest.approx(concept.numbers[number], rel=1e-4), (concept.name, number)
        # A score of a single case is its sign.
        assert row["mean"] == pytest.approx(2 * concept.numbers["tcav"] - 1)
        mixed.append(0 < concept.numbers["tcav"] < 1)
    assert any(mixed), "else the cases would all be one"
    ps = [found[name, "all", "yes"]["p"] for name in there]
    assert [found[name, "all", "yes"]["q"] for name in there] == pytest.approx(false_discovery_control(ps))


def prototypes(label: str, **points: tuple[float, float]) -> mx.SimilarCases:
    """Prototypes with their points and similarities."""
    cases = [
        mx.Case(uid, label, p, role="prototype", numbers={"similarity": alike, "weight": p / max(alike, 0.1)})
        for uid, (p, alike) in points.items()
    ]
    return mx.SimilarCases(made("prototypes", label), {}, tuple(cases), scored="points")


def test_prototypes_by_class_and_those_that_are_never_used(tmp_path: Path) -> None:
    each = [
        prototypes("malignant", spiky=(6.0, 0.9), large=(3.0, 0.5), idle=(0.5, 0.1)),
        prototypes("malignant", spiky=(2.0, 0.4), large=(8.0, 0.8), idle=(0.0, 0.0)),
        prototypes("benign", calcified=(4.0, 0.7)),
    ]
    found = rows(reduced(cohort(tmp_path, "prototypes", each, sex=["f", "m", "none"]), "sex"), "prototype")
    spiky = found["spiky", "all", "malignant"]
    assert (spiky["cases"], spiky["mean"], spiky["used"], spiky["similarity"]) == (2, 4.0, 1.0, 0.65)
    assert spiky["share"] == pytest.approx((6 / 9.5 + 2 / 10) / 2)
    assert spiky["examples"] == "case-00; case-01"
    assert found["large", "all", "malignant"]["examples"] == "case-01; case-00"
    assert found["idle", "all", "malignant"]["used"] == 0 and found["calcified", "none", "benign"]["mean"] == 4
    assert found["large", "f", "malignant"]["mean"] == 3 and ("calcified", "f", "benign") not in found


def test_words_are_counted_once_a_case_and_absent_in_others(tmp_path: Path) -> None:
    def caption(text: str, sure: float) -> mx.Caption:
        words, at = [], 0
        for word in text.split():
            words.append(mx.Word(word, at, at + len(word), sure))
            at += len(word) + 1
        return mx.Caption(made("captioning", f"“{text}”"), {}, text, tuple(words))

    each = [caption("A small nodule a", 0.5), caption("no nodule", 0.75), caption("clear lung", 1.0)]
    found = rows(reduced(cohort(tmp_path, "captioning", each, site=list("nss")), "site"), "word")
    shares = {name: row["mean"] for (name, group, _), row in found.items() if group == "all"}
    third = 1 / 3
    expected = {"a": third, "small": third, "nodule": 2 * third, "no": third, "clear": third, "lung": third}
    assert shares == pytest.approx(expected) and next(iter(shares)) == "nodule"
    assert found["nodule", "s", ""]["mean"] == 0.5 and found["small", "s", ""]["mean"] == 0
    assert found["nodule", "all", ""]["confidence"] == 0.625 and found["small", "all", ""]["cases"] == 3


def test_cases_that_come_up_often_and_columns_that_neighbours_share(tmp_path: Path) -> None:
    pytest.importorskip("lancedb")
    from MedXAILib.cases.library import Embedder, Library
    from MedXAILib.cases.record import Record

    library = Library.create(tmp_path / "library", Embedder("f", "m", "m", {"plain": (2, "cosine")}))
    vector = {"plain": np.ones(2)}
    library.add(
        Record(f"old-{i}", f"p{i}", label, "malignant" if i < 8 else "benign", vector, meta={"site": site})
        for i, (label, site) in enumerate(
            zip(["malignant"] * 6 + ["benign"] * 4, ["north"] * 2 + ["south"] * 8, strict=True)
        )
    )

    def neighbours(*uids: str) -> mx.SimilarCases:
        cases = [
            mx.Case(f"old-{uid}", "malignant", 0.9 - i / 10, role="unlike" if i else "alike")
            for i, uid in enumerate(uids)
        ]
        return mx.SimilarCases(made("similar_cases", library=library.path, version=library.version), {}, tuple(cases))

    each = [neighbours("0", "1"), neighbours("0", "2"), neighbours("0", "3"), neighbours()]
    folder = cohort(tmp_path / "c", "similar_cases", each, site=["north"] * 3 + ["south"], label=["malignant"] * 4)
    tables = reduced(folder, "site")
    hubs = rows(tables, "neighbour")
    assert (hubs["old-0", "all", ""]["mean"], hubs["old-0", "all", ""]["cases"]) == (0.75, 4)
    assert hubs["old-1", "north", ""]["mean"] == pytest.approx(1 / 3) and hubs["old-0", "south", ""]["mean"] == 0
    assert hubs["old-0", "all", ""]["by chance"] == pytest.approx(0.2) and hubs["old-0", "all", ""][
        "similarity"
    ] == pytest.approx(0.9)
    assert (hubs["old-0", "all", ""]["for"], hubs["old-1", "all", ""]["for"]) == (1, 0)
    site = rows(tables, "agreement")["site", "all", ""]
    # Of the eight of which the network says malignant two are of the north, and six are malignant.
    assert site["mean"] == pytest.approx((1 + 0.5 + 0.5) / 3) and site["by chance"] == 0.25
    assert rows(tables, "agreement")["label", "all", ""]["by chance"] == 0.75
    # What was found is told without the library, too.
    gone = [replace(one, provenance=made("similar_cases", library=str(tmp_path / "gone"), version=1)) for one in each]
    left = reduced(cohort(tmp_path / "d", "similar_cases", gone, site=["north"] * 4))
    assert rows(left, "neighbour")["old-0", "all", ""]["mean"] == 0.75 and not left.rows("agreement")


LARGE = mx.Rule((mx.Condition("diameter_mm", ">", 15.0, "mm"),), "malignant", 0.5, 0.9, 20)
SPIKY = mx.Rule(
    (mx.Condition("diameter_mm", ">", 10.0, "mm"), mx.Condition("spiculation", ">", 0.5)), "malignant", 0.4, 0.9, 9
)
OWN = mx.Rule((mx.Condition("diameter_mm", "<=", 99.0, "mm"),), "benign", 0.4, 0.9, 9, scope="case")


def test_rules_hold_for_a_cohort_by_what_the_plan_knows_of_it(tmp_path: Path) -> None:
    says = ["malignant", "benign", "malignant", "benign", "malignant"]
    each = [mx.RuleSet(made("rules", of), {}, (OWN, LARGE, SPIKY)) for of in says]
    known = {
        "diameter_mm": ["20", "16", "12", "5", ""],
        "spiculation": ["1", "0", "1", "0", "1"],
        "label": ["malignant", "malignant", "benign", "benign", "benign"],
        "patient": ["1", "2", "3", "4", "5"],
        "site": ["n", "s", "s", "n", "n"],
    }
    found = rows(reduced(cohort(tmp_path, "rules", each, **known), "site"), "rule")
    large = found["if diameter is more than 15 mm: malignant", "all", ""]
    spiky = found["if diameter is more than 10 mm and spiculation is more than 0.5: malignant", "all", ""]
    # Of the last case the diameter is not known: it is no case of either rule.
    assert (large["cases"], large["mean"], large["truth"], large["completeness"]) == (2, 0.5, 1.0, 0.5)
    assert (spiky["cases"], spiky["mean"], spiky["truth"], spiky["completeness"]) == (2, 1.0, 0.5, 0.5)
    # The first that applies decides.
    assert (large["decides"], spiky["decides"]) == (0.5, 0.25)
    none = found["none applies", "all", ""]
    assert (none["completeness"], none["examples"]) == (0.4, "case-03; case-04")
    assert found["if diameter is more than 15 mm: malignant", "n", ""]["mean"] == 1.0
    assert not any("99" in name for name, *_ in found)
    # What is asked of all cases is no prediction.
    asked = rows(reduced(cohort(tmp_path / "asked", "rules", each, asked="malignant", **known)), "rule")
    assert asked["if diameter is more than 15 mm: malignant", "all", ""]["cases"] == 0


def test_a_rule_of_the_cohorts_own_predictions_is_found(tmp_path: Path) -> None:
    sizes = np.random.default_rng(0).uniform(5, 25, 80)
    says = ["malignant" if size > 14 else "benign" for size in sizes]
    each = [
        mx.RuleSet(made("rules", of), {}, (), "", {"diameter_mm": float(s)}) for s, of in zip(sizes, says, strict=True)
    ]
    site = ["north" if i % 2 else "south" for i in range(80)]
    found = rows(reduced(cohort(tmp_path, "rules", each, site=site, label=says), "site"), "surrogate")
    named = {name for name, *_ in found} - {"none applies"}
    limits = sorted(float(name.split(" mm: ")[0].rsplit(" ", 1)[1]) for name in named)
    near = sizes[np.abs(sizes - 14).argsort()[:8]]
    assert len(named) == 2 and all(near.min() <= limit <= near.max() for limit in limits)
    whole = [row for (_, group, _), row in found.items() if group == "all"]
    # Half of the cases choose, and the others judge.
    assert sum(row["cases"] for row in whole) == 40 and sum(row["completeness"] for row in whole) == 1
    assert all(row["mean"] > 0.85 and row["truth"] > 0.85 for row in whole if row["cases"])
    assert {group for _, group, _ in found} == {"all", "north", "south"}
    # Predictions that follow from nothing that is known make no rule.
    mixed = [mx.RuleSet(made("rules", of), {}, (), "", {"x": i % 3}) for i, of in enumerate(says)]
    assert not reduced(cohort(tmp_path / "mixed", "rules", mixed, site=site)).rows("surrogate")


def test_a_few_cases_show_most_of_what_counts(tmp_path: Path) -> None:
    # Importance is the root of what a name adds over all cases: 3 and 4 here; each case shows its part of the largest.
    values = {"a": {"x": 4.0, "y": 1.0}, "b": {"x": -4.0, "y": 7.0}, "c": {"x": 1.0, "y": 8.0}}
    (first, share, names), (second, whole, last) = typical(values)
    assert (first, names) == ("b", ["y", "x"]) and share == pytest.approx((3 + 4 * 7 / 8) / 7)
    assert (second, last) == ("c", ["y"]) and whole == pytest.approx(1)
    # Never worse than 1 - 1/e of the best of all choices (Nemhauser 1978).
    for seed in range(20):
        weights = np.random.default_rng(seed).gamma(0.3, size=(9, 5))
        chosen = typical({str(i): dict(enumerate(row)) for i, row in enumerate(weights.tolist())}, 3)
        importance = np.sqrt(weights.sum(0))
        parts = weights / weights.max(0)
        every = [(parts[list(of)].max(0) @ importance) / importance.sum() for of in combinations(range(9), 3)]
        own = parts[[int(uid) for uid, *_ in chosen]].max(0) @ importance / importance.sum()
        assert chosen[-1][1] == pytest.approx(own) and own >= (1 - 1 / math.e) * max(every)
        assert int(chosen[0][0]) == (parts @ importance).argmax()
    # By table, of all targets together; what is nothing everywhere is shown by nobody.
    each = [scores("malignant", spiky=3.0, idle=0.0), scores("benign", spiky=-2.0), scores("malignant", spiky=1.0)]
    reduced(cohort(tmp_path, "tcav", each, site=["", "", ""])).write("tcav", tmp_path / "out")
    with (tmp_path / "out" / "tcav-typical.csv").open(encoding="utf-8", newline="") as file:
        told_of = [(row["case"], row["of"], row["shows"]) for row in csv.DictReader(file)]
    assert told_of == [("case-00", "concept", "spiky (malignant)"), ("case-01", "concept", "spiky (benign)")]


def test_how_often_a_decision_flips_and_by_how_much(tmp_path: Path) -> None:
    def walk(flipped: int | None, *sizes: float, strange: bool = False) -> mx.Traversal:
        steps = [
            mx.Step(float(i) - 1, 0.0, {}, {"diameter": size}, strange=strange and i == flipped)
            for i, size in enumerate(sizes)
        ]
        return mx.Traversal(
            made("latent"), {}, tuple(steps), torch.zeros(len(sizes), 2, 2, 2), np.eye(4), "", "", flipped
        )

    # The scan itself is the second step of each.
    each = [walk(3, 9, 10, 12, 14), walk(2, 19, 20, 21, strange=True), walk(None, 9, 10, 11), walk(0, 4, 10, 12)]
    found = rows(reduced(cohort(tmp_path, "latent", each, site=["", "", "", ""])), "change")
    flips, size, far = (found[name, "all", "malignant"] for name in ("the decision changes", "diameter", "distance"))
    assert (flips["cases"], flips["mean"]) == (4, 0.75)
    assert (size["cases"], size["mean"], size["strange"]) == (3, pytest.approx((4 + 1 - 6) / 3), pytest.approx(1 / 3))
    assert far["mean"] == pytest.approx((2 + 1 + 1) / 3)


def test_one_explanation_at_a_time_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cohort(tmp_path, "tcav", [scores(x=float(i)) for i in range(4)], site=[""] * 4)
    # What is not done, or not any more, does not count.
    (folder / "receipts" / f"{list(read_plan(folder).units())[2].key}.json").unlink()
    true, held = told.load_explanation, list[Any]()

    def watched(place: Path) -> Explanation:
        assert sum(one() is not None for one in held) <= 1
        found = true(place)
        held.append(weakref.ref(found))
        return found

    monkeypatch.setattr(told, "load_explanation", watched)
    assert rows(reduced(folder), "concept")["x", "all", "malignant"]["mean"] == pytest.approx((0 + 1 + 3) / 3)
    assert len(held) == 3


def nodules(folder: Path, count: int, seed: int) -> Path:
    """A table of computed nodules, of which all is known."""
    folder.mkdir(parents=True)
    affine = np.diag([SPACING_MM, SPACING_MM, SPACING_MM, 1.0])[[2, 1, 0, 3]]
    drawn = synthesise(Backgrounds.training(), count, seed=seed)
    lines = []
    for i, (image, label, known) in enumerate(zip(drawn.images, drawn.labels, drawn.attributes, strict=True)):
        sitk.WriteImage(mx.Volume(image.permute(0, 3, 2, 1) * 1400 - 1000, affine).to_sitk(), str(folder / f"{i}.nrrd"))
        numbers = ["" if math.isnan(v) else f"{v:.4f}" for v in known.tolist()]
        said = "malignant" if known[ATTRIBUTES.index("spiculation")] > 0.3 else "benign"
        lines.append([f"n{i}", f"{i}.nrrd", CLASSES[label], said, "ab"[i % 2], *numbers])
    with (folder / "cases.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["uid", "volume", "label", "said", "site", *ATTRIBUTES], *lines])
    return folder / "cases.csv"


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return nodules(tmp_path_factory.mktemp("examples") / "known", 66, 3)


def test_real_nodules_go_all_the_way(known: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = nodules(tmp_path / "cases", 4, 4)
    monkeypatch.chdir(known.parent)

    def medxai(*args: object, code: int = 0) -> str:
        said = CliRunner().invoke(app, ["cohort", *map(str, args)])
        assert said.exit_code == code, said.output
        return said.output

    # Paths begin where the plan is made, and hold anywhere.
    tcav = "tcav:examples=cases.csv;concepts=spiculation > 0.3,calcification > 0.5;draws=30;vector=pattern;maps=none"
    asked = {
        "lung_nodule_semantic": ("semantic", "rules:table=cases.csv;of=known;features=spiculation,diameter_mm", tcav),
        "lung_nodule_prototypes": ("prototypes",),
    }
    for model, methods in asked.items():
        given = [part for method in methods for part in ("--method", method)]
        medxai("plan", tmp_path / model, "--model", model, "--data", table, *given)
    monkeypatch.chdir(tmp_path)
    for model, methods in asked.items():
        folder, again = tmp_path / model, tmp_path / f"{model}-again"
        read_plan(folder).save(again)
        assert compute(folder) == {"done": 4 * len(methods)}
        # In another order, by parts.
        for shard in (1, 0):
            compute(again, shard=(shard, 2))
        medxai("reduce", folder, "--by", "site", "--out", tmp_path / "out" / model)
        medxai("reduce", again, "--by", "site", "--out", tmp_path / "out" / f"{model}-again")
        files = sorted((tmp_path / "out" / model).iterdir())
        for file in files:
            assert file.read_bytes() == (tmp_path / "out" / f"{model}-again" / file.name).read_bytes(), file.name
        assert {file.name.split("-")[0] for file in files} == {method.split(":")[0] for method in methods}
        _as_one_by_one(mx.load_model(path(f"Models/{model}")), folder, tmp_path / "out" / model)
    units = {unit.method: unit for unit in read_plan(tmp_path / "lung_nodule_semantic").units()}
    for method in ("tcav", "rules"):
        known_of = receipt(tmp_path / "lung_nodule_semantic", units[method].key)
        assert known_of is not None and known_of["files"] == {str(known.resolve()): sha256(known)}


def _as_one_by_one(model: mx.Model, folder: Path, out: Path) -> None:
    """Whether the tables are the means of what each case says by itself, which is asked here anew."""
    plan = read_plan(folder)
    points: dict[tuple[str, str, str], list[float]] = {}
    for unit in plan.units():
        one = mx.tell(model, mx.load_volume(unit.subject.volume[0]), unit.method, **unit.parameters)
        target = one.provenance.target_label
        if isinstance(one, mx.ConceptScores):
            named = {c.name: c.score for c in one.concepts}
        elif isinstance(one, mx.SimilarCases):
            named = {c.uid: c.numbers["points"] for c in one.cases}
        else:
            assert isinstance(one, mx.RuleSet) and one.rules
            continue
        for name, value in named.items():
            assert value is not None
            points.setdefault((unit.method, name, target), []).append(value)
    assert points
    for method, what in (("semantic", "concept"), ("tcav", "concept"), ("prototypes", "prototype")):
        if method in plan.methods:
            with (out / f"{method}-{what}s.csv").open(encoding="utf-8", newline="") as file:
                whole = [row for row in csv.DictReader(file) if not row["by"]]
            told_of = {(method, row[what], row["target"]): row for row in whole}
            mine = {key: of for key, of in points.items() if key[0] == method}
            assert set(told_of) == set(mine)
            for key, of in mine.items():
                assert int(told_of[key]["cases"]) == len(of)
                assert float(told_of[key]["mean"]) == pytest.approx(np.mean(of), rel=1e-5, abs=1e-5), key
    if "rules" in plan.methods:
        with (out / "rules-rules.csv").open(encoding="utf-8", newline="") as file:
            (none,) = [r for r in csv.DictReader(file) if r["rule"] == "none applies" and not r["by"]]
        assert 0 <= float(none["completeness"]) < 1


def test_examples_that_were_changed_since_the_plan_are_refused(known: Path, tmp_path: Path) -> None:
    table = tmp_path / "examples.csv"
    lines = known.read_text(encoding="utf-8").splitlines()
    table.write_text(
        "\n".join(line.replace(",", f",{known.parent}/", 1) if i else line for i, line in enumerate(lines))
    )
    subjects = find_subjects(known)[:1]
    model = path("Models/lung_nodule")
    plan = make_plan(str(model), mx.load_model(model).fingerprint, {"tcav": {"examples": str(table)}}, subjects)
    plan.save(tmp_path / "plan")
    assert read_plan(tmp_path / "plan").methods["tcav"]["sha256"] == sha256(table)
    table.write_text(table.read_text() + "\n")
    assert compute(tmp_path / "plan") == {"refused": 1}
    assert "is not what it was" in state(tmp_path / "plan").troubles[0]["reason"]


def test_what_methods_need_is_settled_when_it_is_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("weights", "vae", "lib"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name, encoding="utf-8")
    (tmp_path / "diameter").touch()
    monkeypatch.chdir(tmp_path)
    assert settled("influence", {"checkpoints": ("weights",), "count": "4"}) == {
        "checkpoints": [str(tmp_path / "weights")],
        "count": "4",
    }
    # What is no path stays, though there is a file of that name.
    assert settled("latent", {"generator": "vae", "along": "diameter"}) == {
        "generator": str(tmp_path / "vae"),
        "along": "diameter",
    }
    assert settled("latent", {"generator": "lung_nodule_vae"}) == {"generator": "lung_nodule_vae"}
    assert fingerprints("latent", {"generator": str(tmp_path / "vae")}) == {
        str(tmp_path / "vae"): sha256(tmp_path / "vae")
    }
    assert fingerprints("similar_cases", {"library": str(tmp_path / "lib"), "version": 7}) == {
        str(tmp_path / "lib"): "version 7"
    }


def test_rules_ask_about_the_cases_of_a_table_once(known: Path) -> None:
    model = mx.load_model(path("Models/lung_nodule_semantic"))
    scan = mx.load_volume(known.parent / "1.nrrd")
    first, second = (mx.tell(model, scan, "rules", table=str(known)) for _ in range(2))
    assert isinstance(first, mx.RuleSet) and isinstance(second, mx.RuleSet)
    assert first.rules == second.rules and first.provenance.notes == second.provenance.notes
    # But for what is asked of the scan itself.
    assert first.provenance.forwards - second.provenance.forwards == 66


def test_maps_need_a_template_and_what_is_told_is_written_anyway(tmp_path: Path) -> None:
    folder = cohort(tmp_path / "c", "tcav", [scores(x=1.0)], site=["a"])
    plan = read_plan(folder)
    both = replace(plan, methods={**plan.methods, "gradient": {}})
    both.save(tmp_path / "both")
    (tmp_path / "c" / RESULTS).rename(tmp_path / "both" / RESULTS)
    (tmp_path / "c" / "receipts").rename(tmp_path / "both" / "receipts")
    said = CliRunner().invoke(app, ["cohort", "reduce", str(tmp_path / "both"), "--out", str(tmp_path / "out")])
    assert said.exit_code != 0 and "give --template" in str(said.exception) + said.output
    assert (tmp_path / "out" / "tcav-concepts.csv").exists()


def test_a_column_that_the_plan_has_not_is_refused(tmp_path: Path) -> None:
    folder = cohort(tmp_path / "c", "tcav", [scores(x=1.0)], site=["a"])
    said = CliRunner().invoke(app, ["cohort", "reduce", str(folder), "--by", "sitee", "--out", str(tmp_path / "out")])
    assert said.exit_code != 0 and "did you mean site?" in said.output
    assert not (tmp_path / "out").exists()
