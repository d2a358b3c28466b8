"""The trust card and the comparison of methods over cases, on the shipped network and on small ones."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import MedXAILib as mx
from MedXAILib.cli import app
from MedXAILib.report.case import show, write
from MedXAILib.resources import path
from MedXAILib.trust import card as cards
from MedXAILib.trust import evaluation
from MedXAILib.trust.card import CHECKS, LIMIT, TrustCard, estimate, load_card, trust_card
from MedXAILib.trust.evaluation import Asked, evaluate, read_cases, summary
from MedXAILib.trust.finding import Finding

NODULE = (21.9, 120.5, -611.5)
SCAN, MASK = path("SampleData/chest_ct_nodule.nrrd"), path("SampleData/chest_ct_nodule_mask.nrrd")


@pytest.fixture(scope="module")
def judged() -> mx.Judged:
    model, scan = mx.load_model(path("Models/lung_nodule")), mx.load_volume(SCAN)
    explanation = mx.explain(model, scan, "hirescam", "malignant", NODULE)
    return mx.Judged(explanation, model, scan, mx.load_volume(MASK))


@pytest.fixture(scope="module")
def card(judged) -> TrustCard:
    return trust_card(judged)


def test_a_good_map_of_the_shipped_network_is_judged_within_the_limit(judged, card):
    lights = {found.check: found.light for found in card.findings}
    # In the middle of the patch a nodule is found by whoever points at the middle.
    assert lights["validity"] != "poor" and lights["randomisation"] != "poor" and lights["faithfulness"] != "poor"
    made = judged.explanation.provenance
    own = made.forwards + 2 * made.backwards
    # The last check may go a little over what it was thought to take.
    assert card.forwards + 2 * card.backwards <= 1.3 * LIMIT * own
    assert not any(np.isnan(value) for found in card.findings for value in found.values.values())


def test_the_card_is_the_same_again_and_leaves_the_network_and_the_scan_alone(judged, card):
    before = judged.model.fingerprint, judged.volume.fingerprint
    again = trust_card(replace(judged, run=mx.Run()))
    assert again == card
    assert (judged.model.fingerprint, judged.volume.fingerprint) == before


def test_checks_that_take_too_long_are_left_out_and_said(judged):
    planned = estimate(judged.explanation, limit=1)
    assert "validity" in planned.checks and "randomisation" in planned.left_out
    assert set(planned.checks) | set(planned.left_out) == set(CHECKS)
    assert estimate(judged.explanation, limit=1000).checks == tuple(CHECKS)
    wider = estimate(judged.explanation, limit=1000).seconds
    assert planned.seconds < wider


def test_a_check_that_cannot_be_made_says_why_and_keeps_the_others(judged, monkeypatch):
    def refuses(_: mx.Judged) -> Finding:
        raise mx.MedXAIError("the network is too wild")

    monkeypatch.setitem(cards.CHECKS, "stability", replace(CHECKS["stability"], judge=refuses))
    found = trust_card(replace(judged, run=mx.Run()), ["validity", "stability"])
    assert [f.check for f in found.findings] == ["validity"]
    assert found.left_out == {"stability": "the network is too wild"}
    with pytest.raises(mx.MedXAIError, match=r"no check 'valid'.*validity"):
        trust_card(judged, ["valid"])


def test_a_card_can_be_cancelled(judged):
    with pytest.raises(mx.Cancelled):
        trust_card(replace(judged, run=mx.Run(cancel=lambda: True)))


def test_the_card_is_kept_beside_the_map_and_told_on_the_page(judged, card, tmp_path):
    shown = show(judged.volume, judged.explanation, None, judged.segmentation, card)
    write(tmp_path, shown)
    assert load_card(tmp_path) == card
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    for found in card.findings:
        assert found.title in page
    assert "none says that the answer is right" in page
    assert load_card(tmp_path / "elsewhere") is None


def test_the_command_line_checks_on_demand(tmp_path):
    place = ",".join(map(str, NODULE))
    asked = ["explain", "lung_nodule", str(SCAN), "-m", "gradient", "-t", "malignant", "-r", place, "--check"]
    result = CliRunner().invoke(app, [*asked, "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "Checking the map by" in result.output and "about" in result.output
    assert "scrambled" in " ".join(result.output.split())
    assert json.loads((tmp_path / "out" / "trust.json").read_text(encoding="utf-8"))["findings"]


def table(tmp_path, text: str):
    file = tmp_path / "cases.csv"
    file.write_text(text, encoding="utf-8")
    return file


def test_methods_are_compared_and_what_was_interrupted_goes_on(tmp_path, monkeypatch):
    place = " ".join(map(str, NODULE))
    rows = [f"{SCAN},{MASK},malignant,{place}", f"{SCAN},{MASK},benign,"]
    cases = read_cases(table(tmp_path, "volume,segmentation,target,region\n" + "\n".join(rows) + "\n"))
    model, out = mx.load_model(path("Models/lung_nodule")), tmp_path / "out"
    methods = {"gradient": {}, "attention_rollout": {}}
    stopped = mx.Run(cancel=lambda: len(list(out.glob("cases/*.json"))) >= 2)
    with pytest.raises(mx.Cancelled):
        evaluate(model, cases, methods, out, stopped, ["validity"])
    asked = []
    monkeypatch.setattr(evaluation, "explain", lambda *a, **k: asked.append(a) or mx.explain(*a, **k))
    found = evaluate(model, cases, methods, out, checks=["validity"])
    assert len(asked) == 2
    gradient, rollout = found
    assert gradient["cases"] == 2 and gradient["validity: auprc"] > gradient["validity: random: auprc"]
    assert gradient["validity: auprc ±"] >= 0 and gradient["cost: backwards"] == 1
    # A network of convolutions has no attention, which is said and spoils nothing.
    assert rollout["cases"] == 0
    assert evaluate(model, cases, methods, out, checks=["validity"]) == found
    assert len(asked) == 2
    assert (out / "table.csv").read_text(encoding="utf-8").startswith("method,cases,validity: pointing")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no cases"),
        ("scan\nx.nrrd\n", "column 'volume'"),
        ("volume,shape\nx.nrrd,round\n", "mean nothing here: shape"),
        ("volume\nmissing.nrrd\n", "Row 2 .*no volume 'missing.nrrd'"),
        (f"volume,region\n{SCAN},1 two 3\n", "Row 2 .*'1 two 3' is not three numbers"),
    ],
)
def test_a_bad_table_of_cases_is_named(tmp_path, text, says):
    with pytest.raises(mx.MedXAIError, match=says):
        read_cases(table(tmp_path, text))


def test_intervals_are_students_over_cases():
    def result(value: float) -> dict:
        return {"findings": [{"check": "c", "values": {"n": value}}], "cost": {}}

    row = summary("m", [result(1.0), result(2.0), result(4.0), {"refused": "no"}])
    assert row["cases"] == 3 and row["c: n"] == pytest.approx(7 / 3)
    # 4.303 of two degrees of freedom, times 1.5275 / sqrt(3).
    assert row["c: n ±"] == pytest.approx(4.303 * 1.5275 / 3**0.5, rel=1e-3)


def test_volumes_in_memory_are_cases_too(tmp_path):
    model = mx.load_model(path("Models/lung_nodule"))
    scan = mx.load_volume(SCAN)
    case = Asked("one", scan, None, "malignant", NODULE)
    with pytest.raises(mx.MedXAIError, match=r"no check 'valid'.*validity"):
        evaluate(model, [case], {"gradient": {}}, tmp_path, checks=["valid"])
    with pytest.raises(mx.MedXAIError, match="Semantic attributes answers without a map"):
        evaluate(model, [case], {"semantic": {}}, tmp_path, checks=["validity"])
    (row,) = evaluate(model, [case], {"gradient": {}}, tmp_path, checks=["validity"])
    assert row["cases"] == 1 and "validity: auprc" not in row
    assert torch.equal(scan.data, mx.load_volume(SCAN).data)
