"""Explanations in words and by concepts: kept, and shown to people."""

from __future__ import annotations

import re
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_explanations
import torch

import MedXAILib as mx
from MedXAILib.report.cases import TITLES
from MedXAILib.report.told import told_page, write_told
from MedXAILib.report.words import of_concepts

AFFINE = np.array([[0.0, 0.1, 2.0, 5.0], [0.3, 1.0, 0.0, -7.0], [4.0, 0.0, -0.2, 1.0], [0.0, 0.0, 0.0, 1.0]])


@pytest.fixture(scope="module")
def chest() -> mx.Volume:
    return small_explanations.chest()


@pytest.fixture(scope="module")
def caption(chest: mx.Volume) -> mx.Caption:
    return small_explanations.caption(chest)


def scores(made: mx.Provenance, **known: Any) -> mx.ConceptScores:
    concepts = (
        mx.Concept("diameter", 1.2, 0.3, 15.2, "mm", map=0, numbers={"weight": 0.3, "p": 0.001}),
        mx.Concept("calcification", -0.7, value=0.02, map=1, numbers={"weight": -4.0}),
        mx.Concept("margin", refused="not told from <random> sets"),
    )
    maps = torch.stack([torch.arange(24.0).reshape(2, 3, 4), torch.arange(24.0).reshape(2, 3, 4) - 9])
    return mx.ConceptScores(made, {"shares": 1e-7}, concepts, "share of the logit", "A nodule.", maps, AFFINE, **known)


def text(page: str) -> str:
    return " ".join(unescape(re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.DOTALL)).split())


def test_concept_scores_survive_a_folder(caption: mx.Caption, tmp_path: Path) -> None:
    made = scores(caption.provenance, alike=np.eye(3) * 0.5)
    read = mx.load_explanation(made.save(tmp_path / "kept"))
    assert isinstance(read, mx.ConceptScores)
    assert read.concepts == made.concepts and read.scored == made.scored and read.text == made.text
    assert torch.equal(read.maps, made.maps) and np.allclose(read.affine, AFFINE)
    assert read.alike is not None and np.array_equal(read.alike, np.eye(3) * 0.5)
    assert read.provenance == made.provenance and read.residual == made.residual


@pytest.mark.parametrize(
    ("known", "says"),
    [
        ({"map": 2}, r"'size' has map 2, and there are 2"),
        ({"score": None}, r"'size' has no score: say why"),
        ({"value": float("nan")}, r"The value of the concept 'size' is nan"),
        ({"numbers": {"p": float("inf")}}, r"The p of the concept 'size' is inf"),
    ],
)
def test_a_concept_that_cannot_be_is_refused(caption: mx.Caption, known: dict[str, Any], says: str) -> None:
    concept = mx.Concept("size", **{"score": 1.0, **known})
    with pytest.raises(mx.MedXAIError, match=says):
        mx.ConceptScores(caption.provenance, {}, (concept,), "score", maps=torch.zeros(2, 1, 1, 1))


def test_each_map_knows_what_it_is_of_and_which_signs_it_has(caption: mx.Caption) -> None:
    of_words = caption.seen()
    by_index = {word.map: word.text for word in caption.words if word.map is not None}
    assert [one.provenance.target_label for one in of_words] == [by_index[i] for i in range(len(of_words))]
    assert all(torch.equal(one.data[0], kept) for one, kept in zip(of_words, caption.maps, strict=True))
    first, second = scores(caption.provenance).seen()
    assert (first.provenance.target_label, first.signed) == ("diameter", False)
    assert (second.provenance.target_label, second.signed) == ("calcification", True)
    assert np.array_equal(first.affine, AFFINE)


def test_the_page_of_a_caption_reads_as_the_caption(chest: mx.Volume, caption: mx.Caption, tmp_path: Path) -> None:
    (tmp_path / "page").mkdir()
    write_told(tmp_path / "page", chest, caption)
    page = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    told = re.search(r"<p class=told>(.*?)</p>", page)
    assert told is not None and unescape(re.sub("<[^>]+>", "", told[1])) == caption.text
    assert page.count("<img ") == len(caption.maps) == len(list((tmp_path / "page").glob("map-*.png")))
    assert "<script" not in page and "check every word" in page and "For research only" in page


def test_the_page_of_concepts_says_what_each_is_worth(chest: mx.Volume, caption: mx.Caption) -> None:
    told = scores(caption.provenance, alike=np.eye(3))
    page = told_page(told, of_concepts(mx.Volume(torch.zeros(1, 2, 3, 4), AFFINE), told))
    shown = text(page)
    assert "diameter 15.2 mm +1.20 ± 0.30 0.3 0.001" in shown
    assert "calcification 0.02 -0.70 -4" in shown
    assert "margin not told from <random> sets" in shown and "<random>" not in page
    # The longest bar reaches as far as score and interval of any concept, half of the axis.
    widths = {side: float(width) for side, width in re.findall(r'class=(for|against) style="width:([\d.]+)%"', page)}
    assert widths == {"for": pytest.approx(50 * 1.2 / 1.5), "against": pytest.approx(50 * 0.7 / 1.5, abs=0.06)}


def written(folder: Path, volume: mx.Volume, told: mx.Explanation) -> str:
    folder.mkdir()
    write_told(folder, volume, told)
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert "<script" not in page and "For research only" in page
    return page


def test_the_page_of_cases_has_a_card_for_each_by_its_role(chest: mx.Volume, tmp_path: Path) -> None:
    found = small_explanations.similar_cases(chest, count=3)
    first, second, third = found.cases
    told = replace(
        found,
        cases=(
            replace(first, role="mistaken", numbers={"diameter_mm": 12.5}),
            replace(second, note="said <benign>", query_map=found.whole_map),
            replace(third, volume=None, map=None, place=None),
        ),
        text="Two are near.",
        scored="cosine",
    )
    page = written(tmp_path / "page", chest, told)
    shown = text(page)
    assert "Two are near." in shown and "said <benign>" in shown and "<benign>" not in page
    # The mistaken one comes after those that are alike, whatever the order in the explanation.
    order = [shown.index(part) for part in (TITLES["alike"], second.uid, third.uid, TITLES["mistaken"], first.uid)]
    assert order == sorted(order)
    assert f"cosine {first.similarity:.3f}; diameter 12.5 mm" in shown
    # A picture of each card, and that of the map of all.
    assert page.count("<img ") == 4
    read = mx.load_explanation(tmp_path / "page")
    assert isinstance(read, mx.SimilarCases) and [case.role for case in read.cases] == ["mistaken", "alike", "alike"]
    kept = read.cases[1].query_map
    assert kept is not None and found.query_map is not None and torch.equal(kept.data, found.query_map)


def test_the_page_of_a_traversal_says_where_the_answer_flips(caption: mx.Caption, tmp_path: Path) -> None:
    steps = [
        mx.Step(float(p), 1.0 - p, {"ill": 1 - 0.3 * p, "well": 0.3 * p}, {"diameter (mm)": 9 + p}, strange=p > 2)
        for p in range(-1, 4)
    ]
    images = torch.linspace(-1000, 100, 5 * 24).reshape(5, 2, 3, 4)
    cohort = (mx.Place("a<1>", "ill", 0, 0), mx.Place("b", "well", 1, 2))
    path = np.stack([np.linspace(0, 1, 5)] * 2, 1)
    told = mx.Traversal(caption.provenance, {}, steps, images, AFFINE, "by size", "It flips.", 3, cohort, path)
    page = written(tmp_path / "page", mx.Volume(images[1][None], AFFINE), told)
    shown = text(page)
    assert "-1 +2.00 1.30 -0.30 8 " in shown and "+0 this scan +1.00 1.00 0.00 9" in shown
    assert "+2 the answer flips -1.00 0.40 0.60 11" in shown and "+3 strange -2.00 0.10 0.90 12" in shown
    assert "<title>ill, a&lt;1&gt;</title>" in page and page.count("<circle") == 3
    read = mx.load_explanation(tmp_path / "page")
    assert isinstance(read, mx.Traversal) and read.steps == tuple(steps) and read.cohort == cohort
    assert torch.allclose(read.images, images) and read.flipped == 3 and read.path is not None
    assert np.allclose(read.path, path)


def test_the_page_of_rules_marks_those_that_hold(chest: mx.Volume, caption: mx.Caption, tmp_path: Path) -> None:
    conditions = (mx.Condition("diameter_mm", ">", 12.34, "mm"), mx.Condition("calcification", "<=", 0.5))
    rule = mx.Rule(conditions, "malignant", 0.31, 0.94, 31, correctness_interval=(0.9, 0.97), truth=0.9, applies=True)
    other = mx.Rule((), "benign", 0.69, 0.8, 69, scope="case")
    told = mx.RuleSet(caption.provenance, {}, (rule, other), "By size.", {"diameter_mm": 15.0})
    page = written(tmp_path / "page", chest, told)
    said = (
        "If diameter is more than 12.3 mm and calcification is at most 0.5: malignant (covers 31% of the cases; the "
        "network says so in 94% of them (90% to 97%), their label in 90%)."
    )
    assert f"<li class=applies>{said} <span class=here>← this scan</span></li>" in page
    assert page.count("<li class=applies>") == 1
    assert "Otherwise: benign (covers 69% of the cases; the network says so in 80% of them)." in text(page)
    read = mx.load_explanation(tmp_path / "page")
    assert isinstance(read, mx.RuleSet) and read.rules == (rule, other) and read.values == {"diameter_mm": 15.0}
