"""What a network would say of other attributes, by plain numbers: against the network's own arithmetic."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from test_semantic import Own, lung, patch
from torch import nn

import MedXAILib as mx
from MedXAILib.textual.intervention import carry_decision, intervened, probabilities


@pytest.mark.parametrize("task", ["classification", "multilabel", "ordinal", "regression"])
@pytest.mark.parametrize("size", [1.0, 9000.0])
def test_probabilities_are_those_of_the_model(task: str, size: float) -> None:
    scores = size * torch.randn(3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model = mx.Model(nn.Flatten(), task=task, class_names=("a", "b", "c"))  # type: ignore[arg-type]
    found = probabilities(dict(zip("abc", scores.tolist(), strict=True)), task)
    np.testing.assert_allclose([*found.values()], model.probabilities(scores[None])[0].numpy(), atol=1e-12)


def test_one_score_is_that_of_the_second_class() -> None:
    model = mx.Model(nn.Flatten(), class_names=("no", "yes"))
    for score in (-700.0, -1.5, 0.0, 2.5):
        expected = model.probabilities(torch.tensor([[score]], dtype=torch.float64))[0, 1]
        assert probabilities({"yes": score}, "classification")["yes"] == pytest.approx(float(expected), abs=1e-15)


def test_decision_that_does_not_follow_from_the_concepts_is_not_changed() -> None:
    x = patch()
    concepts = mx.tell(mx.Model(Own(linear=False), task="regression"), x, "semantic").concepts
    assert not any(c.weights for c in concepts)
    told = [*map(asdict, concepts)]
    assert not carry_decision(told) and not carry_decision([])
    with pytest.raises(mx.MedXAIError, match="no weights that the decision follows from"):
        intervened(told, {})
    assert carry_decision([*map(asdict, mx.tell(mx.Model(Own(), task="regression"), x, "semantic").concepts)])


def test_weights_are_kept_and_checked(tmp_path) -> None:
    told = mx.tell(lung(), patch(), "semantic")
    read = mx.load_explanation(told.save(tmp_path / "told"))
    assert isinstance(read, mx.ConceptScores) and read.concepts == told.concepts
    assert [c.scale for c in read.concepts if c.scale] == ["solidity"] * 3
    # What a person reads is not mixed with them.
    assert {name for c in read.concepts for name in c.numbers} == {"weight", "reference", "predicted"}
    wrong = replace(told.concepts[0], weights={"none": float("nan")})
    with pytest.raises(mx.MedXAIError, match="weight for none of the concept 'nodule' is nan"):
        replace(told, concepts=(wrong, *told.concepts[1:]), alike=None)
