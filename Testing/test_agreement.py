"""Explanations of one scan by several methods and of several kinds: do they agree?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import MedXAILib as mx
from MedXAILib.explanation import Provenance
from MedXAILib.trust import agreement

SHAPE = (10, 12, 14)
AFFINE = np.array([[0.0, 0.1, 2.0, 5.0], [0.3, 1.0, 0.0, -7.0], [4.0, 0.0, -0.2, 1.0], [0.0, 0.0, 0.0, 1.0]])


def made(method: str, target: str = "malignant", scan: str = "this") -> Provenance:
    return Provenance(
        method=method,
        parameters={},
        target={},
        target_label=target,
        model={},
        volume={"fingerprint": scan},
        versions={},
        seed=0,
        device="cpu",
        created="2026-01-01T00:00:00+00:00",
        seconds=1.0,
        peak_memory=0,
        forwards=1,
        backwards=0,
    )


def blob(*centre: int) -> Tensor:
    """A map that is highest at `centre`, and zero beyond four voxels."""
    index = torch.stack(torch.meshgrid(*map(torch.arange, SHAPE), indexing="ij"), -1).float()
    return (4 - (index - torch.tensor(centre).float()).norm(dim=-1)).clamp_min(0)


def saliency(*centre: int, **of: Any) -> mx.SaliencyMap:
    return mx.SaliencyMap(made(**{"method": "gradient", **of}), {}, blob(*centre)[None], AFFINE, signed=False)


def caption(text: str, *words: tuple[str, Tensor]) -> mx.Caption:
    known = [mx.Word(w, text.index(w), text.index(w) + len(w), 0.9, i) for i, (w, _) in enumerate(words)]
    return mx.Caption(
        made("captioning", "the report"), {}, text, tuple(known), torch.stack([m for _, m in words]), AFFINE
    )


def concepts(*known: tuple[str, float, Tensor]) -> mx.ConceptScores:
    of = tuple(mx.Concept(name, score, map=i) for i, (name, score, _) in enumerate(known))
    return mx.ConceptScores(made("semantic"), {}, of, "share", "", torch.stack([m for *_, m in known]), AFFINE)


def test_the_same_place_and_another_one() -> None:
    same = agreement.judge([saliency(4, 5, 6), saliency(4, 5, 6, method="lime")])
    assert same.light == "good"
    assert same.values == {
        "gradient and lime: overlap": pytest.approx(1, abs=0.02),
        "gradient and lime: correlation": pytest.approx(1),
        "gradient and lime: peaks apart (mm)": 0.0,
    }
    apart = agreement.judge([saliency(4, 5, 3), saliency(4, 5, 12)])
    assert apart.light == "poor" and apart.values["gradient and gradient: overlap"] < 0.05
    # Nine voxels along the last axis, each of which is (2, 0, -0.2) mm.
    assert apart.values["gradient and gradient: peaks apart (mm)"] == pytest.approx(9 * np.hypot(2.0, 0.2))


def test_space_that_no_map_speaks_of_does_not_count_as_agreement() -> None:
    """Otherwise two maps of a small region of a large scan would always agree."""
    near, far = (saliency(4, 5, 3), saliency(4, 5, 8))
    large = [
        mx.SaliencyMap(m.provenance, {}, torch.nn.functional.pad(m.data, (0, 60, 0, 60, 0, 60)), AFFINE, signed=False)
        for m in (near, far)
    ]
    small = agreement.judge([near, far])
    assert agreement.judge(large).values == pytest.approx(small.values)


def test_words_concepts_and_cases_say_where_and_why() -> None:
    spiculated, solid = blob(4, 5, 6), blob(4, 5, 7)
    told = caption("A spiculated solid nodule.", ("spiculated", spiculated), ("solid", solid))
    scored = concepts(("spiculation", 1.5, spiculated), ("diameter", -0.2, blob(4, 5, 12)))
    similar = mx.SimilarCases(made("similar_cases"), {}, (mx.Case("a", "b", 0.5),), spiculated[None], AFFINE)
    found = agreement.judge([saliency(4, 5, 6), told, scored, similar])
    assert found.light == "good" and "4 explanations" in found.sentence
    assert found.values["reasons in common"] == 1 and found.values["reasons"] == 3
    assert "spiculated" in found.sentence
    # What matters more points more: the place of a concept that hardly matters is not where the peak is.
    shown = agreement.where(scored)
    assert shown is not None and torch.equal(shown.data[0], 1.5 * spiculated / 4 + 0.2 * blob(4, 5, 12) / 4)


def test_one_scan_and_one_answer() -> None:
    own = saliency(4, 5, 6)
    for others in ([], [saliency(4, 5, 6, target="benign")], [saliency(4, 5, 6, scan="another")]):
        with pytest.raises(mx.MedXAIError, match="at least two explanations of one scan and one answer"):
            agreement.judge([own, *others])
    mute = mx.ConceptScores(made("tcav"), {}, (mx.Concept("size", 1.0),), "score")
    with pytest.raises(mx.MedXAIError, match="say where"):
        agreement.judge([own, mute])
    batch = mx.SaliencyMap(own.provenance, {}, own.data[None], AFFINE, signed=False, batched=True)
    with pytest.raises(mx.MedXAIError, match="batch of maps"):
        agreement.judge([batch, batch])
