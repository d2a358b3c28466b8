"""Rules on measures of cases: a rule that made a table is found again, chance makes none, and how rules are judged."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import bootstrap, norm
from torch import Tensor, nn

import MedXAILib as mx
from MedXAILib.engines.rule_fit import Cases, covers, grown, halves, judged, merged, nearest
from MedXAILib.errors import MedXAIError
from MedXAILib.networks.semantic import Attribute
from MedXAILib.rule import Condition, Rule
from MedXAILib.rule_set import RuleSet
from MedXAILib.synthetic.lung_nodules import ATTRIBUTES, rule_logit

SMALL = (1, 4, 4, 4)


def cases(values: np.ndarray, says: Sequence[str], patients: Sequence[str] | None = None, **known: object) -> Cases:
    count, features = values.shape
    return Cases(
        features=tuple(known.pop("features", [f"f{k}" for k in range(features)])),  # type: ignore[call-overload]
        values=values,
        says=np.array(says),
        labels=np.array(known.pop("labels", [""] * count)),
        patients=np.array(patients or [f"p{i}" for i in range(count)]),
        units={},
    )


def by_the_rule(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Solid nodules without lobes, and what the generator's rule says of them: benign if calcified; else malignant if
    spiculated; else malignant above 7 + 17 * 2.6 / 3 mm."""
    random = np.random.default_rng(seed)
    values = np.zeros((count, len(ATTRIBUTES)), np.float32)
    for name, column in {
        "diameter_mm": random.uniform(7, 24, count),
        "elongation": random.uniform(0.55, 1, count),
        "spiculation": random.uniform(0.8, 1.4, count) * (random.random(count) < 0.5),
        "solidity": np.ones(count),
        "calcification": (random.random(count) < 0.3).astype(float),
        "margin_mm": random.uniform(0.5, 1.6, count),
    }.items():
        values[:, ATTRIBUTES.index(name)] = column
    malignant = rule_logit(torch.from_numpy(values)).numpy() > 0
    return values, np.where(malignant, "malignant", "benign")


def recovered(rules: Sequence[Rule]) -> None:
    """Whether these are the rule: its conditions and its thresholds."""
    said = {tuple((c.feature, c.relation) for c in rule.conditions): rule for rule in rules}
    spiky = (("spiculation", ">"), ("calcification", "<="))
    large = (("spiculation", "<="), ("diameter_mm", ">"), ("calcification", "<="))
    by_features = {frozenset(key): rule for key, rule in said.items()}
    assert by_features[frozenset(spiky)].says == "malignant"
    assert by_features[frozenset(large)].says == "malignant"
    for rule in rules:
        for condition in rule.conditions:
            low, high = {
                "spiculation": (0, 0.8),
                "calcification": (0, 1),
                "diameter_mm": (7 + 17 * 2.6 / 3 - 0.4, 7 + 17 * 2.6 / 3 + 0.4),
            }[condition.feature]
            assert low <= condition.threshold <= high


def test_rule_that_made_a_table_is_found_again() -> None:
    values, says = by_the_rule(1200)
    table = cases(values, says.tolist(), features=ATTRIBUTES, labels=says.tolist())
    choosing, judging = halves(table, 0)
    rules = grown(choosing, 3, 5, 0)
    found = [judged(rule, judging, 0) for rule in rules]
    assert all(rule is not None and rule.correctness > 0.97 and rule.truth == rule.correctness for rule in found)
    assert sum(rule.completeness for rule in found if rule) == pytest.approx(1)
    recovered([rule for rule in found if rule])
    # And of nodules that are in no half.
    fresh, truth = by_the_rule(2000, seed=1)
    columns = dict(zip(ATTRIBUTES, fresh.T, strict=True))
    said = np.full(2000, "unknown00")
    for rule in rules:
        said[covers(rule, columns)] = rule.says
    assert (said == truth).mean() > 0.99


def test_chance_makes_no_rule() -> None:
    """Judged by those that chose them, rules of noise look good; by others, they do not."""
    tried = held = flattered = 0
    for seed in range(20):
        random = np.random.default_rng(seed)
        table = cases(random.normal(size=(200, 4)), random.choice(["a", "b"], 200).tolist())
        choosing, judging = halves(table, seed)
        rules = [rule for rule in grown(choosing, 3, 5, seed) if rule.conditions]
        tried += len(rules)
        held += sum(judged(rule, judging, seed) is not None for rule in rules)
        flattered += sum(judged(rule, choosing, seed) is not None for rule in rules)
    assert tried >= 100
    # The lower end of an interval of 95 %.
    assert held <= 0.05 * tried < 0.2 * tried < flattered


def test_of_two_conditions_the_tighter_one_is_left() -> None:
    path = [
        Condition("d", ">", 12.0, "mm"),
        Condition("s", "<=", 0.5),
        Condition("d", ">", 14.0, "mm"),
        Condition("d", "<=", 20.0, "mm"),
        Condition("s", "<=", 0.7),
        Condition("d", "<=", 18.0, "mm"),
    ]
    assert merged(path) == (
        Condition("d", ">", 14.0, "mm"),
        Condition("s", "<=", 0.5),
        Condition("d", "<=", 18.0, "mm"),
    )


@pytest.mark.parametrize(
    ("threshold", "said"), [(-1000.0, "-1000"), (999.7, "1000"), (1234.5678, "1235"), (14.55, "14.6")]
)
def test_thresholds_are_said_as_people_say_them(threshold: float, said: str) -> None:
    assert Condition("mean_HU", ">", threshold, "HU").phrase == f"mean is more than {said} HU"


def test_what_is_said_on_both_sides_needs_no_condition() -> None:
    """A tree splits where it makes a leaf purer, though both leaves say the same."""
    x = np.arange(60.0)[:, None]
    says = ["a"] * 20 + ["b"] * 10 + ["a", "b", "b"] * 10
    (first, second) = grown(cases(x, says), 2, 5, 0)
    assert {first.says, second.says} == {"a", "b"}
    assert first.conditions == (Condition("f0", "<=", 19.5),)
    assert second.conditions == (Condition("f0", ">", 19.5),)


def test_a_rule_in_numbers() -> None:
    x = np.arange(10.0)[:, None]
    says = ["a"] * 3 + ["b"] * 7
    labels = ["a"] * 5 + ["b"] * 3 + ["", ""]
    rule = Rule((Condition("f0", ">", 2.5),), "b", 0, 0, 0)
    nine = cases(np.repeat(x, 9, 0), np.repeat(says, 9).tolist(), labels=np.repeat(labels, 9).tolist())
    told = judged(replace(rule, conditions=(Condition("f0", ">", 1.5),)), nine, 0)
    assert told is not None
    assert (told.cases, told.completeness, told.correctness) == (72, 0.8, 7 / 8)
    # Of six cases the label is known: three benign, three not.
    assert told.truth == 0.5 and told.compactness == 1
    # One case of a class that is rare: better than chance, but the description of one.
    rare = Rule((Condition("f0", "<=", 0.5),), "a", 0, 0, 0)
    assert judged(rare, cases(x, ["a"] + ["b"] * 9), 0) is None
    assert judged(rare, cases(np.r_[x, x], (["a"] + ["b"] * 9) * 2), 0) is not None
    # No better than to say b of all.
    assert judged(replace(rule, conditions=(Condition("f0", ">", -1.0),)), cases(x, says), 0) is None


def wilson(right: int, count: int) -> tuple[float, float]:
    """In closed form (Wilson 1927)."""
    z = norm.ppf(0.975)
    middle = (right + z**2 / 2) / (count + z**2)
    half = z / (count + z**2) * math.sqrt(right * (count - right) / count + z**2 / 4)
    return middle - half, middle + half


def test_intervals() -> None:
    random = np.random.default_rng(0)
    x = random.random((400, 1))
    right = random.random(400) < np.where(x[:, 0] > 0.5, 0.8, 0.2)
    says = np.where(right, "b", "a")
    rule = Rule((Condition("f0", ">", 0.5),), "b", 0, 0, 0)
    told = judged(rule, cases(x, says.tolist()), 0)
    assert told is not None and told.completeness_interval is not None and told.correctness_interval is not None
    over = (x[:, 0] > 0.5).astype(float)
    independent = bootstrap((over,), np.mean, method="percentile", n_resamples=4000, random_state=1).confidence_interval
    assert told.completeness_interval == pytest.approx(tuple(independent), abs=0.02)
    inside = right[over > 0].astype(float)
    independent = bootstrap(
        (inside,), np.mean, method="percentile", n_resamples=4000, random_state=1
    ).confidence_interval
    assert told.correctness_interval == pytest.approx(tuple(independent), abs=0.02)
    # Eight cases of each patient that are all alike say no more than one.
    many = judged(
        rule, cases(np.repeat(x, 8, 0), np.repeat(says, 8).tolist(), np.repeat(np.arange(400), 8).tolist()), 0
    )
    assert many is not None
    assert many.correctness_interval == pytest.approx(told.correctness_interval, abs=0.02)
    # Always right, ten times: a bootstrap would know no doubt.
    sure = judged(rule, cases(np.r_[np.full(10, 0.6), np.full(30, 0.1)][:, None], ["b"] * 10 + ["a"] * 30), 0)
    assert sure is not None and sure.correctness == 1
    assert sure.correctness_interval == pytest.approx(wilson(10, 10), abs=1e-9)


def test_patients_are_in_one_half() -> None:
    patients = [f"p{i // 3}" for i in range(30)]
    one, other = halves(cases(np.arange(30.0)[:, None], ["a", "b"] * 15, patients), 0)
    assert not set(one.patients) & set(other.patients)
    assert (len(one), len(other)) == (15, 15)
    again = halves(cases(np.arange(30.0)[:, None], ["a", "b"] * 15, patients), 0)[0]
    assert (again.values == one.values).all()


def test_nearest_of_either_kind() -> None:
    # The second feature has ten times the spread of the first.
    values = np.array([[0.0, 0], [1, 0], [0, 10], [2, 0], [0, 30], [3, 0]])
    table = cases(values * [1, 1], ["a", "a", "b", "b", "a", "b"])
    spread = values.std(0)
    near, weights = nearest(table, np.array([0.0, 0]), "a", 2)
    away = np.sqrt(((values / spread) ** 2).mean(1))
    assert near.values.tolist() == [[0, 0], [1, 0], [0, 10], [2, 0]]
    assert weights == pytest.approx(1 / (1 + away[[0, 1, 2, 3]]))


def test_what_is_unknown_is_covered_by_no_condition() -> None:
    values = {"d": np.array([1.0, 3.0, math.nan])}
    assert covers(Rule((Condition("d", "<=", 2.0),), "a", 0, 0, 0), values).tolist() == [True, False, False]
    assert covers(Rule((Condition("d", ">", 2.0),), "a", 0, 0, 0), values).tolist() == [False, True, False]


class Bright(nn.Module):
    """Malignant where the voxels are bright on average."""

    def forward(self, image: Tensor) -> Tensor:
        mean = image.mean((1, 2, 3, 4))
        return torch.stack([0.5 - mean, mean - 0.5], dim=1)


def model(network: nn.Module | None = None) -> mx.Model:
    return mx.Model(network or Bright(), class_names=("benign", "malignant"))


def scan(brightness: float = 0.9, seed: int = 0) -> mx.Volume:
    noise = torch.rand(SMALL, generator=torch.Generator().manual_seed(seed))
    return mx.Volume(noise - noise.mean() + brightness, np.eye(4))


def written(path: Path, count: int = 800) -> Path:
    """A table of nodules by the rule, of which nobody has to look at the scans."""
    values, says = by_the_rule(count)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["volume", "label", "said", "site", *ATTRIBUTES])
        for i, (row, said) in enumerate(zip(values, says, strict=True)):
            writer.writerow([f"scan{i}.nrrd", said if i % 2 else "", said, "left", *row])
    return path


def test_a_table_that_knows_what_the_network_said(tmp_path: Path) -> None:
    table = written(tmp_path / "nodules.csv")
    told = mx.tell(model(), scan(), "rules", table=str(table), values="spiculation=1.1, calcification=0, diameter_mm=9")
    assert isinstance(told, RuleSet)
    general = [rule for rule in told.rules if rule.scope == "all"]
    recovered(general)
    # No two of them cover the same, and those that apply are right about the scan.
    assert sum(rule.completeness for rule in general) == pytest.approx(1)
    (applying,) = [rule for rule in general if rule.applies]
    assert applying.says == "malignant" and {c.feature for c in applying.conditions} == {"spiculation", "calcification"}
    assert told.values == pytest.approx({"diameter_mm": 9, "spiculation": 1.1, "calcification": 0})
    assert {c.unit for rule in general for c in rule.conditions if c.feature == "diameter_mm"} == {"mm"}
    assert told.text.startswith(f"{len(general)} rules cover 100% of the 400 cases that judge")
    assert applying.truth is not None
    again = mx.recompute(told, model(), scan())
    assert again.rules == told.rules
    # Where the network says otherwise of the scan, it says so.
    other = mx.tell(model(), scan(0.1), "rules", table=str(table), values="spiculation=1.1, calcification=0")
    assert "Yet of this scan it says benign." in other.text
    unknown = mx.tell(model(), scan(), "rules", table=str(table))
    assert not any(rule.applies for rule in unknown.rules) and "its features are not" in unknown.text
    assert unknown.rules == tuple(replace(rule, applies=False) for rule in general)


def test_a_case_with_an_infinite_number_is_left_out(tmp_path: Path) -> None:
    table = written(tmp_path / "cases.csv", 100)
    lines = table.read_text(encoding="utf-8").splitlines()
    column = lines[0].split(",").index("diameter_mm")
    cells = lines[1].split(",")
    cells[column] = "inf"
    table.write_text("\n".join([lines[0], ",".join(cells), *lines[2:]]), encoding="utf-8")
    told = mx.tell(model(), scan(), "rules", table=str(table))
    assert any("1 cases are left out" in note for note in told.provenance.notes)


def test_the_rule_of_the_neighbourhood(tmp_path: Path) -> None:
    """On the left the network goes by b, on the right by c: one condition cannot say it for all."""
    random = np.random.default_rng(0)
    a, b, c = random.uniform(-1, 1, (3, 1200))
    says = np.where(np.where(a < 0, b, c) > 0, "malignant", "benign")
    path = tmp_path / "table.csv"
    rows = zip(a, b, c, says, strict=True)
    lines = [f"s{i}.nrrd,{x},{y},{z},{said}" for i, (x, y, z, said) in enumerate(rows)]
    path.write_text("\n".join(["volume,a,b,c,said", *lines]), encoding="utf-8")
    for side, feature in ((-0.8, "b"), (0.8, "c")):
        values = f"a={side}, b=0.1, c=0.1"
        told = mx.tell(model(), scan(), "rules", table=str(path), values=values, depth=1, neighbours=30)
        (own,) = [rule for rule in told.rules if rule.scope == "case"]
        assert own.applies and own.says == "malignant"
        (condition,) = own.conditions
        assert (condition.feature, condition.relation) == (feature, ">")
        assert condition.threshold == pytest.approx(0, abs=0.25)
        # Judged by all cases: half of them are on the other side, where it is right by chance.
        assert own.correctness == pytest.approx(0.75, abs=0.06)
        assert told.rules[0] is own or told.rules[0] == own


def test_label_is_what_is_to_be_said_and_no_feature(tmp_path: Path) -> None:
    rows = [f"s.nrrd,{i % 2},{i},{'ab'[i % 2]},{(7 * i) % 13}" for i in range(200)]
    table = tmp_path / "table.csv"
    table.write_text("\n".join(["volume,label,patient,said,noise", *rows]), encoding="utf-8")
    told = mx.tell(model(), scan(), "rules", table=str(table))
    assert told.rules == () and told.text.startswith("No rule holds: by noise one")


class Named(nn.Module):
    """Decides by two attributes, which it names: how bright, and how uneven."""

    attributes = (Attribute("brightness", "HU"), Attribute("uneven", yes="uneven"))
    attribute_layer = "names"

    def __init__(self) -> None:
        super().__init__()
        self.names = nn.Identity()

    @property
    def reference(self) -> Tensor:
        return torch.zeros(2)

    def forward(self, image: Tensor) -> Tensor:
        brightness = 1000 * image.mean((1, 2, 3, 4))
        attributes = self.names(torch.stack([brightness, torch.zeros_like(brightness)], dim=1))
        return torch.stack([500 - attributes[:, 0], attributes[:, 0] - 500], dim=1)


def test_attributes_that_the_network_names_are_read_from_the_scans(tmp_path: Path) -> None:
    import SimpleITK as sitk

    rows = ["volume,label,said,other"]
    for i in range(60):
        sitk.WriteImage(scan((i + 0.5) / 60, seed=i).to_sitk(), str(tmp_path / f"{i}.nrrd"))
        rows.append(f"{i}.nrrd,{'malignant' if i >= 30 else 'benign'},,{i % 7}")
    table = tmp_path / "table.csv"
    table.write_text("\n".join(rows), encoding="utf-8")
    told = mx.tell(model(Named()), scan(0.7), "rules", table=str(table))
    general = [rule for rule in told.rules if rule.scope == "all"]
    assert {(r.says, *[(c.feature, c.relation, c.unit) for c in r.conditions]) for r in general} == {
        ("malignant", ("brightness", ">", "HU")),
        ("benign", ("brightness", "<=", "HU")),
    }
    for rule in general:
        assert rule.conditions[0].threshold == pytest.approx(500, abs=30)
        assert rule.correctness > 0.9 and rule.truth == rule.correctness
        assert rule.applies == (rule.says == "malignant")
    assert told.values == pytest.approx({"brightness": 700, "uneven": 0}, abs=0.01)
    assert told.provenance.forwards >= 60
    # By what is known of them instead, nothing can be said.
    known = mx.tell(model(Named()), scan(0.7), "rules", table=str(table), of="known")
    assert known.rules == () and known.text.startswith(
        "No rule holds: by other one can tell what the network says no better"
    )


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"features": "diametre_mm"}, "diameter_mm"),
        ({"values": "spikes=1"}, "spiculation"),
        ({"values": "diameter_mm=wide"}, "is no value"),
        ({"of": "named"}, "names no attributes"),
        ({"depth": 0}, "depth"),
    ],
)
def test_what_cannot_be_asked_is_refused(asked: dict[str, object], why: str, tmp_path: Path) -> None:
    table = written(tmp_path / "nodules.csv", 100)
    with pytest.raises(MedXAIError, match=why):
        mx.tell(model(), scan(), "rules", table=str(table), **asked)  # type: ignore[arg-type]


def test_too_few_cases_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MedXAIError, match="Rules need 40 cases"):
        mx.tell(model(), scan(), "rules", table=str(written(tmp_path / "few.csv", 30)))
    one = tmp_path / "one.csv"
    one.write_text("volume,patient,said,d\n" + "\n".join(f"a.nrrd,p,{'ab'[i % 2]},{i}" for i in range(60)))
    with pytest.raises(MedXAIError, match="of several patients"):
        mx.tell(model(), scan(), "rules", table=str(one))


def test_library_knows_what_the_network_said(tmp_path: Path) -> None:
    pytest.importorskip("lancedb")
    from MedXAILib.cases.library import Embedder, Library
    from MedXAILib.cases.record import Record
    from MedXAILib.cases.spaces import fingerprint

    values, says = by_the_rule(800)
    vectors = {"plain": np.ones(2)}
    records = [
        Record(f"c{i:03}", f"p{i}", said, said, vectors, meta={**dict(zip(ATTRIBUTES, row.tolist(), strict=True))})
        for i, (row, said) in enumerate(zip(values, says, strict=True))
    ]
    # Of some nothing is known, or nothing was said.
    records += [Record(f"x{i}", f"x{i}", "benign", "malignant", vectors, meta={"made": "real"}) for i in range(5)]
    records += [Record("y", "y", "benign", "", vectors, meta=dict.fromkeys(ATTRIBUTES, 1.0))]
    library = Library.create(tmp_path / "cases", Embedder(fingerprint(model()), "", "It", {"plain": (2, "cosine")}))
    version = library.add(records)
    told = mx.tell(model(), scan(), "rules", library=str(tmp_path / "cases"))
    recovered([rule for rule in told.rules if rule.scope == "all"])
    assert told.provenance.parameters["version"] == version
    assert "5 cases are left out: not all features are known of them." in told.provenance.notes
    # More cases change nothing of what was said before.
    library.add([replace(record, uid=f"z{i}", said="malignant") for i, record in enumerate(records[:400])])
    assert mx.recompute(told, model(), scan()).rules == told.rules
    assert mx.tell(model(), scan(), "rules", library=str(tmp_path / "cases")).rules != told.rules
    other = nn.Sequential(Bright(), nn.Linear(2, 2))
    with pytest.raises(MedXAIError, match="is of It, and knows what that says"):
        mx.tell(model(other), scan(), "rules", library=str(tmp_path / "cases"))
