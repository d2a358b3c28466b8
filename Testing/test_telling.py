"""Words, concepts and cases of a network that has forgotten what it learnt."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import numpy as np
import pytest
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
    with pytest.raises(mx.MedXAIError, match="ConceptScores and SimilarCases"):
        telling.likeness(own, cases("x"))


def test_a_caption_is_searched_anew_in_a_network_that_has_forgotten() -> None:
    """And not the same words explained again, which any network can be asked about."""
    model = mx.Model(small(attention=False, seed=1), task="captioning", channels=1)
    volume = mx.Volume(image()[0].float(), np.eye(4))
    told = mx.tell(model, volume, "captioning", check=False)
    found = telling.judge(told, model, volume)
    assert told.text and found.values["lowest"] < 0.5  # type: ignore[attr-defined]
