"""Words, concepts and cases of a network that has forgotten what it learnt."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from concept_examples import drawn, examples
from concept_examples import model as pooled_model
from test_captioning import image, small
from torch import Tensor, nn

import MedXAILib as mx
from MedXAILib import registry
from MedXAILib.explainer import Question, Taxonomy, Teller
from MedXAILib.trust import telling
from MedXAILib.volume import Volume

AFFINE = np.array([[0.0, 0.1, 2.0, 5.0], [0.3, 1.0, 0.0, -7.0], [4.0, 0.0, -0.2, 1.0], [0.0, 0.0, 0.0, 1.0]])
TAXONOMY = Taxonomy("3.2", "textual", "post hoc", "model-agnostic", ("local",), "", "")


class Weights(Teller):
    """What does the network's last layer weigh?"""

    id: ClassVar[str] = "weights"
    title: ClassVar[str] = "Weights"
    paper: ClassVar[str] = ""
    kind: ClassVar[str] = "ConceptScores"
    taxonomy: ClassVar[Taxonomy] = TAXONOMY

    def tell(self, question: Question, volume: Volume) -> Callable[..., mx.Explanation]:
        row = question.model.network.head.weight[0]  # type: ignore[union-attr, index]
        concepts = tuple(mx.Concept(str(i), float(w)) for i, w in enumerate(row))
        return partial(mx.ConceptScores, residual={}, concepts=concepts, scored="weight")


class Proverb(Teller):
    """What is always true?"""

    id: ClassVar[str] = "proverb"
    title: ClassVar[str] = "Proverb"
    paper: ClassVar[str] = ""
    kind: ClassVar[str] = "Caption"
    taxonomy: ClassVar[Taxonomy] = TAXONOMY

    def tell(self, question: Question, volume: Volume) -> Callable[..., mx.Explanation]:
        return partial(mx.Caption, residual={}, text="No nodule is seen.")


class Network(nn.Module):
    """Two layers, so that the upper third is both."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(60, 32), nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.head(torch.tanh(self.body(x.flatten(1))))
        return answer


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> tuple[mx.Model, mx.Volume]:
    for kind in (Weights, Proverb):
        monkeypatch.setitem(registry.EXPLAINERS, kind.id, kind)
    torch.manual_seed(5)
    return mx.Model(Network(), channels=1), mx.Volume(torch.rand(1, 3, 4, 5), AFFINE)


def test_what_is_read_off_the_weights_goes_with_them(asked: tuple[mx.Model, mx.Volume]) -> None:
    """The weights of two linear layers that were drawn independently do not correlate: three draws of 32 by some 0.14
    on average."""
    model, volume = asked
    found = telling.judge(mx.tell(model, volume, "weights", 1), model, volume)
    assert found.light == "good" and 0 < found.values["lowest"] <= found.values["likeness"] < 0.4


def test_what_is_said_of_every_network_is_caught(asked: tuple[mx.Model, mx.Volume]) -> None:
    model, volume = asked
    found = telling.judge(mx.tell(model, volume, "proverb", 1), model, volume)
    assert found.light == "poor" and found.values["likeness"] == 1
    assert "barely changed" in found.sentence


def test_the_network_is_as_before_and_another_is_refused(asked: tuple[mx.Model, mx.Volume]) -> None:
    model, volume = asked
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    told = mx.tell(model, volume, "weights", 1)
    first, second = (telling.judge(told, model, volume) for _ in range(2))
    assert first == second
    assert all(torch.equal(before[name], value) for name, value in model.network.state_dict().items())
    with pytest.raises(mx.MedXAIError, match="not the network that was explained"):
        telling.judge(told, mx.Model(Network(), channels=1), volume)


class First(Weights):
    """What do the first of them weigh?"""

    id: ClassVar[str] = "first"
    count: int = 2
    alike: bool = False

    def tell(self, question: Question, volume: Volume) -> Callable[..., mx.Explanation]:
        told = super().tell(question, volume).keywords["concepts"][: self.count]  # type: ignore[attr-defined]
        if self.alike:
            told = tuple(mx.Concept(one.name, refused="not found") for one in told)
        return partial(mx.ConceptScores, residual={}, concepts=told, scored="weight")


@pytest.mark.parametrize(("count", "alike", "verdict"), [(1, False, 0), (2, False, 0), (8, True, 0), (3, False, 1)])
def test_concepts_that_cannot_correlate_have_no_verdict(
    count: int, alike: bool, verdict: int, asked: tuple[mx.Model, mx.Volume], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two numbers always correlate by 1, and one, or equal ones, not at all."""
    monkeypatch.setitem(registry.EXPLAINERS, First.id, First)
    found = telling.judge(mx.tell(*asked, "first", 1, count=count, alike=alike), *asked)
    assert len(found.values) == 3 * verdict and (found.light is not None) == bool(verdict)


def test_examples_in_memory_are_given_again() -> None:
    x, there = drawn(40, 0, bright=0, dark=2, idle=1)
    network, volume = pooled_model(), mx.Volume(x[0], np.eye(4))
    given = examples(x, there)
    told = mx.tell(network, volume, "tcav", "yes", examples=given, vector="pattern", draws=30)
    with pytest.raises(mx.MedXAIError, match="were in memory"):
        telling.judge(told, network, volume)
    found = telling.judge(told, network, volume, given={"examples": given})
    assert 0 <= found.values["lowest"] <= found.values["highest"] <= 1


class Way(Teller):
    """Where would the answer be another? Along what the last layer weighs, or the same for all networks."""

    id: ClassVar[str] = "way"
    title: ClassVar[str] = "Way"
    paper: ClassVar[str] = ""
    kind: ClassVar[str] = "Traversal"
    taxonomy: ClassVar[Taxonomy] = TAXONOMY
    reads: bool = True
    along: str = "towards 0"

    def tell(self, question: Question, volume: Volume) -> Callable[..., mx.Explanation]:
        weights = question.model.network.head.weight[1].detach()  # type: ignore[union-attr, index]
        change = weights if self.reads else torch.ones(32)
        images = torch.stack([0 * change, change]).reshape(2, 2, 4, 4)
        steps = (mx.Step(0.0, 1.0), mx.Step(1.0, 1.0 + (float(weights[0]) if self.reads else 2.0)))
        return partial(mx.Traversal, residual={}, steps=steps, images=images, affine=np.eye(4), along=self.along)


@pytest.mark.parametrize("along", ["towards 0", "along diameter"])
def test_a_way_that_no_network_changes_is_caught(
    along: str, asked: tuple[mx.Model, mx.Volume], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Independent weights do not correlate; for a way that is given only what is said on it counts."""
    monkeypatch.setitem(registry.EXPLAINERS, Way.id, Way)
    own = telling.judge(mx.tell(*asked, "way", 1, along=along), *asked)
    fixed = telling.judge(mx.tell(*asked, "way", 1, along=along, reads=False), *asked)
    assert own.values["likeness"] < 0.5 and own.light == "good"
    assert fixed.values["lowest"] == pytest.approx(1) and fixed.light == "poor"


class Halves(nn.Module):
    """Says "high" where the first half of a scan of two voxels is bright."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(2, 8), nn.Linear(8, 2)
        with torch.no_grad():
            self.body.weight.copy_(torch.tensor([[1.0, 0.0]]).expand(8, 2))
            self.body.bias.zero_()
            self.head.weight.copy_(torch.tensor([[-1.0], [1.0]]).expand(2, 8))
            self.head.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.head(self.body(x.flatten(1)))
        return answer


def halves(folder: Path) -> tuple[mx.Model, str, mx.Volume, str]:
    """A network of `Halves`, a table of cases with what it says, the last of its scans, and what is known of that."""
    rows = []
    for i, (a, b) in enumerate(np.random.default_rng(0).uniform(-1, 1, (80, 2))):
        volume = mx.Volume(torch.tensor([a, b]).reshape(1, 1, 1, 2).float(), np.eye(4))
        sitk.WriteImage(volume.to_sitk(), str(folder / f"{i}.nrrd"))
        rows.append(f"{i}.nrrd,{a},{b},{'high' if a > 0 else 'low'}")
    table = folder / "cases.csv"
    table.write_text("\n".join(["volume,a,b,said", *rows]), encoding="utf-8")
    return mx.Model(Halves(), class_names=("low", "high")), str(table), volume, f"a={a}, b={b}"


def test_rules_are_asked_of_the_network_that_has_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the table has of the former network stays the same, and would make the same rules."""
    model, table, volume, values = halves(tmp_path)
    told = mx.tell(model, volume, "rules", table=table, values=values)
    assert isinstance(told, mx.RuleSet) and {c.feature for rule in told.rules for c in rule.conditions} == {"a"}
    asked_anew = mx.tell(model, volume, "rules", table=table, values=values, anew=True)
    assert isinstance(asked_anew, mx.RuleSet) and asked_anew.rules == told.rules
    found = telling.judge(told, model, volume)
    assert found.values["likeness"] < 0.8 and found.light != "poor"
    monkeypatch.setattr(registry.EXPLAINERS["rules"], "asked_again", classmethod(lambda cls, told: {}))
    assert telling.judge(told, model, volume).values["lowest"] == 1
    # One that says the same of all has no rules, and of no rules there is no verdict.
    silent = Halves()
    with torch.no_grad():
        silent.head.weight.zero_()
        silent.head.bias.copy_(torch.tensor([1.0, 0.0]))
    none = mx.tell(mx.Model(silent, class_names=("low", "high")), volume, "rules", table=table, anew=True)
    assert isinstance(none, mx.RuleSet) and none.rules == () and none.text == "The network says low of every case."
    assert telling.likeness(told, none) == 0
    assert telling.judge(none, mx.Model(silent, class_names=("low", "high")), volume).light is None


def test_what_a_network_said_before_it_learnt_more_is_asked_again(tmp_path: Path) -> None:
    model, table, volume, _ = halves(tmp_path)
    about = []
    for half in (0, 1):
        with torch.no_grad():
            model.network.body.weight.copy_(torch.eye(2)[half].expand(8, 2))
        told = [mx.tell(model, volume, "rules", table=table, anew=True) for _ in range(2)]
        # The scan twice, and each case once.
        assert [one.provenance.forwards for one in told] == [82, 2]
        about.append({c.feature for rule in told[1].rules for c in rule.conditions})
    assert about == [{"a"}, {"b"}]


def made(asked: tuple[mx.Model, mx.Volume]) -> mx.Provenance:
    return mx.tell(*asked, "proverb", 1).provenance


def test_likeness_of_each_kind(asked: tuple[mx.Model, mx.Volume]) -> None:
    provenance = made(asked)

    def concepts(**scores: Any) -> mx.ConceptScores:
        known = [mx.Concept(n, s, refused="" if s is not None else "unsure") for n, s in scores.items()]
        return mx.ConceptScores(provenance, {}, tuple(known), "score")

    def cases(*uids: str) -> mx.SimilarCases:
        return mx.SimilarCases(provenance, {}, tuple(mx.Case(uid, "", 0.5) for uid in uids))

    own = concepts(a=1.0, b=2.0, c=4.0)
    assert telling.likeness(own, concepts(a=-2.0, b=-4.0, c=-8.0)) == pytest.approx(1)
    expected = abs(np.corrcoef([1.0, 2.0, 4.0], [3.0, 0.0, 1.0])[0, 1])
    assert telling.likeness(own, concepts(a=3.0, b=None, c=1.0)) == pytest.approx(expected)
    assert telling.likeness(own, concepts(a=None, b=None, c=None)) == 0
    assert telling.likeness(cases("x", "y"), cases("y", "z")) == pytest.approx(1 / 3)

    def way(along: str, values: list[float], *change: float) -> mx.Traversal:
        images = torch.stack([torch.zeros(len(change)), torch.tensor(change)]).reshape(2, 1, 1, -1)
        steps = tuple(mx.Step(float(i), value) for i, value in enumerate(values))
        return mx.Traversal(provenance, {}, steps, images, np.eye(4), along)

    first = way("towards a", [0, 3], 3, 4)
    assert telling.likeness(first, way("towards b", [0, -3], 6, 8)) == pytest.approx(1)
    assert telling.likeness(first, way("towards a", [0, 3], 4, 3)) == pytest.approx(24 / 25)
    for contrary_or_none in (way("towards a", [0, 3], -3, -4), way("towards a", [0, 3], 0, 0)):
        assert telling.likeness(first, contrary_or_none) == 0
    given = way("along size", [1, 3], 3, 4)
    assert telling.likeness(given, way("along size", [7, 8], 3, 4)) == pytest.approx(1 / 2)
    assert telling.likeness(given, way("along size", [7, 5], 3, 4)) == 0

    def rule(says: str, **limits: float) -> mx.Rule:
        return mx.Rule(tuple(mx.Condition(name, ">", limit) for name, limit in limits.items()), says, 0.5, 1, 9)

    two = mx.RuleSet(provenance, {}, (rule("ill", size=10, density=-600), rule("well", size=4)))
    assert telling.likeness(two, two) == 1
    # Of two conditions one is the same to four fifths, and one is lacking; the other rule says otherwise.
    other = mx.RuleSet(provenance, {}, (rule("ill", size=8), rule("ill", width=4)))
    assert telling.likeness(two, other) == pytest.approx((0.4 + 0 + 0.4 + 0) / 4)
    assert telling.likeness(two, mx.RuleSet(provenance, {}, (rule("ill", density=600),))) == 0
    with pytest.raises(mx.MedXAIError, match="ConceptScores and SimilarCases"):
        telling.likeness(own, cases("x"))


def test_a_caption_is_searched_anew_in_a_network_that_has_forgotten() -> None:
    """And not the same words explained again, which any network can be asked about."""
    model = mx.Model(small(attention=False, seed=1), task="captioning", channels=1)
    volume = mx.Volume(image()[0].float(), np.eye(4))
    told = mx.tell(model, volume, "captioning", check=False)
    found = telling.judge(told, model, volume)
    assert told.text and found.values["lowest"] < 0.5  # type: ignore[attr-defined]
