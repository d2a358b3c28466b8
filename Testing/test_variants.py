"""Traversals and rules in Slicer: the variants of a scan as a series, what is said of each, what is saved."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch

slicer = pytest.importorskip("slicer")

import slicer_scene  # noqa: E402
from conftest import oblique_affine  # noqa: E402
from slicer_scene import SliceView  # noqa: E402
from test_display import MADE  # noqa: E402
from test_layouts import in_layout, opened, shown  # noqa: E402
from test_words_and_cases import add_scan, blob, everything, upright  # noqa: E402

import MedXAILib as mx  # noqa: E402
from MedXAILib.errors import MedXAIError  # noqa: E402
from MedXAILib.traversal import Place, Step, Traversal  # noqa: E402
from MedXAISlicerLib import answers, deleting, display, geometry, layouts, mrml, results, rules, traversals  # noqa: E402

SIZE = (6, 8, 10)
POSITIONS = (-1.0, 0.0, 1.5, 3.0)


@pytest.fixture
def app():
    with opened() as app:
        yield app


def image(number: int) -> np.ndarray:
    """What a step looks like: the more of it, the further along."""
    return (0.1 * np.arange(480).reshape(SIZE) + number * blob((3, 4, 5), SIZE)).astype(np.float32)


def traversal(**changes) -> Traversal:
    steps = tuple(
        Step(
            position,
            value=-2.0 + i,
            scores={"malignant": 0.1 + 0.2 * i, "benign": 0.9 - 0.2 * i},
            numbers={"diameter_mm": 8 + 1.25 * i} if i else {},
            strange=i == 3,
        )
        for i, position in enumerate(POSITIONS)
    )
    cohort = (Place("one", "benign", -1.0, 0.5), Place('two "2"', "malignant", 3.0, 2.5))
    known = {
        "steps": steps,
        "images": torch.tensor(np.stack([image(i) for i in range(4)])),
        "affine": oblique_affine((2.5, 0.8, 1.1)),
        "along": "diameter",
        "text": "At 10.5 mm the network says malignant.",
        "flipped": 2,
        "cohort": cohort,
        "path": np.array([(0.0, 0.0), (0.5, 0.5), (1.0, 1.5), (2.0, 2.0)]),
        **changes,
    }
    return Traversal(MADE, {}, **known)


def add_traversal(**changes):
    """The scan of `oblique_node` under its transform, and variants of it on a grid of their own."""
    scan, *_ = add_scan()
    told = traversal(**changes)
    return scan, mrml.addAnswers(scan, [answers.of(told)])[0], told


def rule_set() -> mx.RuleSet:
    over = mx.Condition("diameter_mm", ">", 12.3, "mm")
    spiky = mx.Condition("spiculation", ">", 0.5)
    found = (
        mx.Rule((over, spiky), "malignant <i>", 0.31, 0.94, 62, None, (0.9, 0.97), 0.8, True),
        mx.Rule((), "benign <b>", 0.69, 0.5, 138),
        mx.Rule((over,), "malignant", 0.4, 1.0, 8, scope="case"),
    )
    return mx.RuleSet(MADE, {}, found, "Two rules cover every case.", {"diameter_mm": 14.2, "spiculation": 0.8})


def add_rules():
    scan, *_ = add_scan()
    told = rule_set()
    return scan, mrml.addAnswers(scan, [answers.of(told)])[0], told


def played(node):
    """The variant and what is changed in it, as they are now."""
    return [slicer.util.arrayFromVolume(n) for n in (results.part(node, "Variant"), *results.maps(node))]


def test_every_step_is_played_in_its_place(app):
    scan, node, told = add_traversal()
    variant, (change,) = results.part(node, "Variant"), results.maps(node)
    moved = geometry.ijkToWorld(scan) @ np.linalg.inv(geometry.ijkToRas(scan))
    for index in (0, 3, 1, 2):
        traversals.setStep(node, index)
        assert traversals.step(node) == index
        seen, changed = played(node)
        np.testing.assert_array_equal(seen, told.images[index])
        np.testing.assert_allclose(changed, (index - 1) * blob((3, 4, 5), SIZE), atol=1e-5)
        for volume in (variant, change):
            expected = moved @ told.affine[:, [2, 1, 0, 3]]
            np.testing.assert_allclose(geometry.ijkToWorld(volume), expected, atol=1e-5)
            assert results.part(volume, "Source") is scan
        assert results.isSigned(change)
    shown_through = variant.GetDisplayNode()
    assert (shown_through.GetWindowLevelMin(), shown_through.GetWindowLevelMax()) == (-2, 3)


def test_changes_have_one_scale_about_zero(app):
    _, node, _ = add_traversal()
    (change,) = results.maps(node)
    most = 2 * blob((3, 4, 5), SIZE)
    for index in range(4):
        traversals.setStep(node, index)
        shown = change.GetDisplayNode()
        limit = shown.GetWindowLevelMax()
        assert shown.GetWindowLevelMin() == -limit
        assert limit == pytest.approx(np.percentile(most[most > 1e-6], 99), rel=0.02)


def test_step_at_which_the_answer_flips_is_shown_first(app):
    composite = app.scene.AddNewNodeByClass("vtkMRMLSliceCompositeNode")
    scan, node, _ = add_traversal()
    assert traversals.step(node) == 2
    assert composite.GetBackgroundVolumeID() == scan.GetID()
    assert [composite.GetForegroundVolumeID()] == [m.GetID() for m in results.maps(node)]
    legend = slicer.modules.colors.logic().GetColorLegendDisplayNode(results.maps(node)[0])
    assert legend.GetTitleText() == "Added / taken away"
    _, never, _ = add_traversal(flipped=None)
    assert traversals.step(never) == 1  # the scan itself


def test_slicer_plays_it(app):
    _, node, _ = add_traversal()
    browser = results.part(node, "Browser")
    traversals.setStep(node, 0)
    browser.SetPlaybackRateFps(1000)
    browser.SetPlaybackActive(True)
    sequences = slicer.modules.sequences.logic()
    seen = set()
    deadline = time.monotonic() + 30
    while len(seen) < 4 and time.monotonic() < deadline:
        sequences.UpdateAllProxyNodes()
        seen.add(traversals.step(node))
    assert seen == {0, 1, 2, 3}


def test_table_says_what_the_network_says_at_each_step(app):
    _, node, _ = add_traversal()
    titles = [node.GetColumnName(i) for i in range(node.GetNumberOfColumns())]
    assert titles == ["Step", "Remark", "malignant", "benign", "diameter mm"]
    rows = [[node.GetCellText(r, c) for c in range(5)] for r in range(4)]
    assert [[row[0], *row[2:]] for row in rows] == [
        ["-1", "10%", "90%", ""],
        ["+0", "30%", "70%", "9.25"],
        ["+1.5", "50%", "50%", "10.5"],
        ["+3", "70%", "30%", "11.8"],
    ]
    assert [row[1] for row in rows] == ["", "this scan", "the answer flips", "strange"]
    text = results.part(node, "Summary").GetText()
    for words in ("At 10.5 mm the network says malignant.", "along: diameter", "the answer flips", "not for diagnosis"):
        assert words in text


def test_rules_are_sentences_of_which_one_is_of_this_scan(app):
    _, node, told = add_rules()
    text = results.part(node, "Summary").GetText()
    assert f"{told.rules[0].sentence} (this scan)" in text and f"{told.rules[1].sentence}\n" in text
    assert "Two rules cover every case." in text
    assert node.GetCellText(0, 4) == "applies" and node.GetCellText(1, 4) == ""
    assert rules.read(node)["rules"] == list(told.rules)
    assert rules.read(node)["values"] == told.values
    assert results.maps(node) == []


def test_variants_are_beside_the_scan_and_move_with_it(app):
    scan, node, _ = add_traversal()
    layouts.showVariants(node)
    assert layouts.current() == "variants"
    columns = shown(app.layout)
    variant, (change,) = results.part(node, "Variant"), results.maps(node)
    expected = [
        ("This scan", scan, None),
        ("Variant", variant, None),
        ("Changed: orange added, blue removed", variant, change),
    ]
    middle = (geometry.ijkToWorld(variant) @ (4.5, 3.5, 2.5, 1))[:3]
    for column, (label, volume, over) in zip(columns, expected, strict=True):
        assert [seen["orientation"] for seen in column] == ["Axial", "Coronal"]
        for seen in column:
            assert seen["label"] == label and seen["linked"]
            assert [seen["background"], seen["foreground"]] == [volume.GetName(), over and over.GetName()]
            np.testing.assert_allclose(seen["at"], middle, atol=1e-4)
    assert len({seen["group"] for column in columns for seen in column}) == 1
    scan.GetDisplayNode().SetWindowLevelMinMax(-10, 20)
    for index in (0, 3):
        traversals.setStep(node, index)
        window = variant.GetDisplayNode()
        assert (window.GetWindowLevelMin(), window.GetWindowLevelMax()) == pytest.approx((-10, 20))
    layouts.leave()
    assert layouts.current() is None


def test_what_is_gone_cannot_be_shown_beside(app):
    _, node, _ = add_traversal()
    app.scene.RemoveNode(results.part(node, "Variant"))
    with pytest.raises(MedXAIError, match="variant of 'Scan variants' is not in the scene"):
        layouts.showVariants(node)
    assert layouts.current() is None


@pytest.mark.parametrize("add", [add_traversal, add_rules])
def test_deleting_leaves_the_scene_as_it_was(app, add):
    add()
    before = set(everything())
    scan, node, _ = add()
    if add is add_traversal:
        layouts.showVariants(node)
        display.setThreshold(results.maps(node)[0], 0.4)
        display.render(results.maps(node)[0])
    deleting.delete(node)
    left = set(everything()) - before
    of_scan = {scan.GetID(), scan.GetDisplayNode().GetID(), scan.GetTransformNodeID()}
    views = {i for i, n in everything().items() if n.IsA("vtkMRMLSliceNode") or n.IsA("vtkMRMLSliceCompositeNode")}
    assert left - of_scan - views == set()
    assert layouts.current() is None
    assert len(results.findExplanations()) == 1


def test_what_was_added_halfway_is_taken_away(app):
    """As when a person cancels while an answer is put into the scene."""
    scan, *_ = add_scan()
    before = set(everything())
    for steps in range(1, 4):
        adding = mrml.addingAnswers(scan, [answers.of(traversal())])
        for _ in range(steps):
            next(adding)
        adding.close()
        shared = {
            i for i, n in everything().items() if n.IsA("vtkMRMLColorTableNode") and n.GetAttribute("MedXAI.Colours")
        }
        assert set(everything()) - before - shared == set()


def test_saved_scene_plays_on(tmp_path: Path):
    with opened() as app:
        _, node, _ = add_traversal()
        layouts.showVariants(node)
        traversals.setStep(node, 3)
        before = [upright(n) for n in (results.part(node, "Variant"), *results.maps(node))]
        known, summary = traversals.read(node), results.part(node, "Summary").GetText()
        views = shown(app.layout)
        slicer_scene.save(tmp_path / "scene.mrb")
    with opened() as app:
        slicer_scene.load(tmp_path / "scene.mrb", tmp_path / "cache")
        layouts.restore()
        (node,) = results.findExplanations()
        assert traversals.read(node) == known and results.part(node, "Summary").GetText() == summary
        assert traversals.step(node) == 3
        after = [upright(n) for n in (results.part(node, "Variant"), *results.maps(node))]
        for (values, where), (was, was_at) in zip(after, before, strict=True):
            np.testing.assert_allclose(values, was, atol=1e-5)
            np.testing.assert_allclose(where, was_at, atol=1e-3)
        assert layouts.current() == "variants"
        for now, was in zip(shown(app.layout), views, strict=True):
            assert [v["background"] for v in now] == [v["background"] for v in was]
            assert [v["foreground"] for v in now] == [v["foreground"] for v in was]
        traversals.setStep(node, 0)
        seen, changed = upright(results.part(node, "Variant")), upright(results.maps(node)[0])
        assert np.ptp(seen[0]) > 0
        np.testing.assert_allclose(sorted(changed[0].ravel()), sorted((-blob((3, 4, 5), SIZE)).ravel()), atol=1e-4)
        assert results.isSigned(results.maps(node)[0])
        remaining = len(everything())
        deleting.delete(node)
        assert not results.findExplanations() and len(everything()) < remaining
        assert not slicer.util.getNodesByClass("vtkMRMLSequenceNode")


def test_saved_scene_keeps_rules(tmp_path: Path):
    with opened():
        _, node, _ = add_rules()
        known = rules.read(node)
        slicer_scene.save(tmp_path / "scene.mrb")
    with opened():
        slicer_scene.load(tmp_path / "scene.mrb", tmp_path / "cache")
        (node,) = results.findExplanations()
        assert rules.read(node) == known


def test_one_step_is_no_way_but_can_be_seen(app):
    only = traversal()
    _, node, _ = add_traversal(
        steps=only.steps[1:2], images=only.images[1:2], flipped=None, cohort=(), path=None, text=""
    )
    assert traversals.step(node) == 0
    assert traversals.about(node)[0] == "Variants of the scan along: diameter"
    assert not played(node)[1].any()


@slicer_scene.needs_graphics
def test_views_show_the_step_that_is_played(app):
    _, node, _ = add_traversal()
    view = SliceView(app, "MedXAIVariants2Axial", "Axial", (120, 120))
    view.logic.ResizeSliceNode(120, 120)
    layouts.showVariants(node)
    assert view.node is in_layout(app.layout)[1][0][0]
    results.part(node, "Source").GetDisplayNode().SetWindowLevelMinMax(0, 50)
    pictures = []
    for index in (0, 3):
        traversals.setStep(node, index)
        pictures.append(view.picture().astype(int))
    difference = pictures[1] - pictures[0]
    assert difference.max() > 10 and difference.min() > -4
    assert np.abs(np.argwhere(difference.max(axis=2) == difference.max()).mean(axis=0) - 60).max() < 15
