"""Concepts in the panel of words: the table, where a click leads, and what the network would say otherwise."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

slicer_host = pytest.importorskip("slicer_host")

import slicer  # noqa: E402
import slicer_scene  # noqa: E402
from slicer_host import ctk, qt  # noqa: E402
from test_display import MADE  # noqa: E402
from test_words_and_cases import add_scan, blob, everything  # noqa: E402

import MedXAILib as mx  # noqa: E402
from MedXAISlicerLib import answers, colours, concepts, deleting, display, geometry, mrml, results  # noqa: E402

MODEL = {"name": "Network", "task": "classification"}
PEAKS = {"spiculation": (5, 9, 13), "size <mm> & 'more'": (9, 3, 4)}
"""Where the concepts that have a map are seen, (d, h, w)."""
# What each adds to the scores of benign and malignant, by a unit; and the scores at the reference.
WEIGHTS = {
    "spiculation": (-1.0, 2.0),
    "size <mm> & 'more'": (-0.05, 0.1),
    "solid": (0.5, -0.5),
    "part_solid": (-1.0, 1.5),
    "ground_glass": (0.25, 0.0),
}
AT_REFERENCE = (0.3, -0.2)
REFERENCE = {"spiculation": 0.5, "size <mm> & 'more'": 12.0, "solid": 0.5, "part_solid": 0.3, "ground_glass": 0.2}
SEEN = {"spiculation": 0.937, "size <mm> & 'more'": 15.26, "solid": 0.125, "part_solid": 0.75, "ground_glass": 0.125}
AMOUNTS = ["0.94", "15.3 mm", "0.12", "0.75", "0.12"]


def told(scan_affine, seen=SEEN, set_to=SEEN, **made) -> mx.ConceptScores:
    """Concepts that the decision follows from, for malignant. The second map is of the first concept."""
    found = [
        mx.Concept(
            name,
            weights[1] * (set_to[name] - REFERENCE[name]),
            value=set_to[name],
            unit="mm" if name.startswith("size") else "",
            layer="degrees",
            map={"spiculation": 1, "size <mm> & 'more'": 0}.get(name),
            numbers={"weight": weights[1], "reference": REFERENCE[name], "predicted": seen[name]},
            weights=dict(zip(("benign", "malignant"), weights, strict=True)),
            scale="solidity" if "solid" in name or "glass" in name else "",
        )
        for name, weights in WEIGHTS.items()
    ]
    found.append(mx.Concept("all else", -0.2, weights=dict(zip(("benign", "malignant"), AT_REFERENCE, strict=True))))
    maps = torch.tensor(np.stack([blob(PEAKS["size <mm> & 'more'"]), blob(PEAKS["spiculation"])]))
    known = {"model": MODEL, "target_label": "malignant", "method": "semantic", **made}
    text = "A part-solid nodule of 15 mm & more, spiculated."
    made = MADE.model_copy(update=known)
    return mx.ConceptScores(made, {}, tuple(found), "share of the score", text, maps, scan_affine)


def found_in_examples(scan_affine) -> mx.ConceptScores:
    """As tests with examples answer: intervals, a concept that was refused, layers, and cosines."""
    found = (
        mx.Concept("lobulation", 0.8, 0.2, 0.9, layer="stem", map=0, numbers={"p": 0.00123, "accuracy": 0.913}),
        mx.Concept("fat <b>", -0.4, 0.3, layer="stem", numbers={"p": 0.04}),
        mx.Concept("margin", refused="not told from <random> sets", layer="head"),
    )
    alike = np.array([[1, 0.73, 0.0], [0.73, 1, 0.0], [0.0, 0.0, 1]])
    made = MADE.model_copy(update={"method": "tcav"})
    maps = torch.tensor(blob((3, 4, 5)))[None]
    return mx.ConceptScores(made, {}, found, "TCAV", "For it: one.", maps, scan_affine, alike)


@pytest.fixture
def panel(host):
    from MedXAISlicerLib.panels.words import WordsPanel

    panel = WordsPanel(logic=None)
    yield panel
    panel.cleanup()


@pytest.fixture
def scan(host):
    """An oblique scan under a transform, in a slice view; and its affine for the library."""
    node, affine, _ = add_scan()
    slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSliceNode", "Test").SetOrientation("Axial")
    slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSliceCompositeNode", "Test")
    slicer.util.setSliceViewerLayers(background=node)
    return node, affine


@pytest.fixture
def shown(panel, scan):
    """The concepts of `told`, as a person comes to see them."""
    (node,) = mrml.addAnswers(scan[0], [answers.of(told(scan[1]))])
    panel.show(node)
    return node


def foreground():
    (shown,) = {n.GetForegroundVolumeID() for n in slicer.util.getNodesByClass("vtkMRMLSliceCompositeNode")}
    return slicer.mrmlScene.GetNodeByID(shown or "")


def looked_at():
    views = slicer.util.getNodesByClass("vtkMRMLSliceNode")
    middles = [[view.GetSliceToRAS().GetElement(i, 3) for i in range(3)] for view in views]
    np.testing.assert_allclose(middles, [middles[0]] * len(middles), atol=1e-3)
    return middles[0]


def at(scan, voxel):
    d, h, w = voxel
    return (geometry.ijkToWorld(scan) @ (w, h, d, 1))[:3]


def text(panel):
    return panel.ui.textBrowser.toPlainText()


def pieces(panel, known):
    """What is `known(format)` of the pieces of the text, where it is something."""
    found, block = {}, panel.ui.textBrowser.document.begin()
    while block.isValid():
        inside = block.begin()
        while not inside.atEnd():
            key = known(inside.fragment().charFormat())
            if key:
                found[inside.fragment().text()] = key
            inside += 1
        block = block.next()
    return found


def links(panel):
    return [*pieces(panel, lambda look: look.anchorHref())]


def highlighted(panel):
    colour = panel.ui.textBrowser.palette.color(qt.QPalette.Highlight)
    return [*pieces(panel, lambda look: look.background().style() and look.background().color() == colour)]


def place(host, panel, word):
    """The middle of a word in the browser."""
    browser = panel.ui.textBrowser
    panel.widget.resize(460, 700)
    panel.widget.show()
    host.process()
    cursor = browser.document.find(word)
    cursor.setPosition((cursor.selectionStart() + cursor.selectionEnd()) // 2)
    return qt.QPointF(browser.cursorRect(cursor).center())


def click(host, panel, word):
    browser, here = panel.ui.textBrowser, place(host, panel, word)
    everywhere = qt.QPointF(browser.viewport().mapToGlobal(here.toPoint()))
    left, none = qt.Qt.LeftButton, qt.Qt.NoButton
    for kind, held in ((qt.QEvent.MouseButtonPress, left), (qt.QEvent.MouseButtonRelease, none)):
        event = qt.QMouseEvent(kind, here, everywhere, left, held, qt.Qt.NoModifier)
        qt.QApplication.sendEvent(browser.viewport(), event)
    host.process()


def slider(panel, name):
    return panel.ui.slidersWidget.findChild(ctk.ctkSliderWidget, f"{name}Slider")


def said(panel):
    """What the box says: (what it says or would say, instead of what, the score) of each class, and the heading."""
    document = qt.QTextDocument()
    document.setHtml(panel.ui.wouldLabel.text)
    plain = document.toPlainText().replace("\xa0", " ")
    row = r"(benign|malignant)\s+(\S+)(?:\s+instead of (\S+))?\s+\(score (\S+)\)"
    return {found[0]: found[1:] for found in re.findall(row, plain)}, plain.splitlines()[0]


def expected(values):
    """The scores and probabilities of benign and malignant, by the numbers above."""
    scores = np.array(AT_REFERENCE, float)
    for name, weights in WEIGHTS.items():
        scores += np.array(weights) * (values[name] - REFERENCE[name])
    return scores, np.exp(scores) / np.exp(scores).sum()


def assert_says(panel, values, instead=None):
    found, heading = said(panel)
    for index, name in enumerate(("benign", "malignant")):
        scores, chances = expected(values)
        before = "" if instead is None else f"{expected(instead)[1][index]:.0%}"
        assert found[name] == (f"{chances[index]:.0%}", before, f"{scores[index]:+.1f}")
    assert heading == ("The network says" if instead is None else "The network would say")


def test_concepts_are_read_as_a_table(panel, shown):
    lines = [line for line in text(panel).splitlines() if line.strip()]
    assert lines[0] == "A part-solid nodule of 15 mm & more, spiculated."
    rows = [*zip(WEIGHTS, AMOUNTS, ["+0.87", "+0.33", "+0.19", "+0.68", "+0.00"], strict=True)]
    assert lines[1:4] == ["Concept", "In this scan", "share of the score"]
    assert lines[4:] == [cell for row in rows for cell in row] + ["all else", "-0.20"]
    # Of one layer, which need not be said.
    assert "degrees" not in text(panel)
    assert links(panel) == list(PEAKS)
    assert "click one" in panel.ui.legendLabel.text and "Orange" in panel.ui.legendLabel.text
    assert "without a score" not in panel.ui.legendLabel.text
    assert "does not mean that it is there" in panel.ui.warningLabel.text and not panel.ui.warningLabel.isHidden()
    panel.ui.copyButton.click()
    assert "'spiculation' at degrees, 0.94 in this scan: +0.87" in qt.QApplication.clipboard().text()


def test_concepts_of_examples_have_intervals_reasons_and_neighbours(panel, scan):
    panel.show(concepts.addConcepts(scan[0], answers.of(found_in_examples(scan[1]))))
    assert "+0.80 ± 0.20" in text(panel) and "fat <b>" in text(panel)
    assert "margin at head\n\nnot told from <random> sets" in text(panel)
    assert "no sign that it does not matter" in panel.ui.legendLabel.text
    tips = pieces(panel, lambda look: look.toolTip())
    assert "p 0.00123, accuracy 0.913" in tips["lobulation"] and "Click" in tips["lobulation"]
    assert "fat <b> (0.73)" in tips["lobulation"] and "lobulation (0.73)" in tips["fat <b>"]
    assert "Click" not in tips["fat <b>"] and "head" in tips["margin"] and "like" not in tips["margin"]
    assert panel.ui.whatIfButton.isHidden()


def test_bars_are_on_the_side_they_speak_for(host, panel, scan):
    panel.show(concepts.addConcepts(scan[0], answers.of(found_in_examples(scan[1]))))
    sides = {}
    for name in ("lobulation", "fat <b>"):
        height = round(place(host, panel, name).y())
        image = panel.ui.textBrowser.viewport().grab().toImage()
        scale = image.devicePixelRatio()
        row = [image.pixelColor(x, round(height * scale)) for x in range(image.width())]
        sides[name] = {
            hue: [x for x, c in enumerate(row) if abs(c.hue() - hue) < 12 and c.saturation() > 150] for hue in (32, 211)
        }
    orange, blue = sides["lobulation"][32], sides["fat <b>"][211]
    assert not sides["fat <b>"][32] and blue and max(blue) < min(orange)
    # Of 0.8 and -0.4 where 1.0 (0.8 and its interval) is the whole length of 44 pixels.
    assert (len(orange), len(blue)) == pytest.approx((0.8 * 44 * scale, 0.4 * 44 * scale), abs=scale)
    assert sides["lobulation"][211] == []


def test_click_on_a_concept_shows_its_map_at_its_peak(host, panel, scan, shown):
    for name, voxel in PEAKS.items():
        click(host, panel, name)
        np.testing.assert_array_equal(slicer.util.arrayFromVolume(foreground()), blob(voxel))
        np.testing.assert_allclose(looked_at(), at(scan[0], voxel), atol=1e-3)
        assert highlighted(panel) == [name]
    click(host, panel, "ground_glass")
    assert highlighted(panel) == [name]
    panel.ui.hideMapButton.click()
    assert foreground() is None and highlighted(panel) == [] and not panel.ui.hideMapButton.enabled


def test_what_matters_most_is_shown_first(panel, scan, shown):
    np.testing.assert_array_equal(slicer.util.arrayFromVolume(foreground()), blob(PEAKS["spiculation"]))
    assert highlighted(panel) == ["spiculation"]
    (other,) = mrml.addAnswers(scan[0], [answers.of(found_in_examples(scan[1]))])
    assert foreground() in results.maps(other)
    display.show(shown)
    assert foreground() in results.maps(shown)
    mrml.addAnswers(scan[0], [answers.of(told(scan[1], set_to={**SEEN, "size <mm> & 'more'": 40.0}))])
    np.testing.assert_array_equal(slicer.util.arrayFromVolume(foreground()), blob(PEAKS["size <mm> & 'more'"]))


def test_removed_map_is_no_link_and_what_was_set_stays(host, panel, scan, shown):
    slider(panel, "spiculation").value = 0.25
    slicer.mrmlScene.RemoveNode(foreground())
    host.process()
    assert links(panel) == ["size <mm> & 'more'"] and "spiculation" in text(panel)
    assert slider(panel, "spiculation").value == 0.25
    click(host, panel, "size <mm>")
    np.testing.assert_array_equal(slicer.util.arrayFromVolume(foreground()), blob(PEAKS["size <mm> & 'more'"]))


def test_table_is_in_the_scene(shown, scan):
    assert [shown.GetColumnName(i) for i in range(4)] == ["Concept", "Layer", "In this scan", "share of the score"]
    assert [shown.GetCellText(1, i) for i in range(4)] == ["size <mm> & 'more'", "degrees", "15.3 mm", "+0.33"]
    assert results.kind(shown) == "ConceptScores" and results.part(shown, "Source") is scan[0]
    summary = results.part(shown, "Summary").GetText()
    assert "A part-solid nodule" in summary and "'all else': -0.20" in summary


def test_deleting_leaves_the_scan_alone(host, panel, scan):
    # The colours of maps stay in the scene.
    colours.colourNode(signed=False)
    before = set(everything())
    (node,) = mrml.addAnswers(scan[0], [answers.of(told(scan[1]))])
    panel.show(node)
    deleting.delete(node)
    host.process()
    assert set(everything()) == before
    assert panel.node is None and panel.ui.wordsWidget.isHidden() and panel.ui.whatIfButton.isHidden()


def test_nothing_is_left_of_what_was_stopped(host, scan):
    colours.colourNode(signed=False)
    before = set(everything())
    adding = mrml.addingAnswers(scan[0], [answers.of(told(scan[1]))])
    for _ in range(3):
        next(adding)
    assert len(results.maps(results.findExplanations()[0])) == 2
    adding.close()
    assert set(everything()) == before


def test_sliders_begin_with_what_the_network_sees(panel, shown):
    assert not panel.ui.whatIfButton.isHidden() and panel.ui.whatIfButton.collapsed
    for name, value in SEEN.items():
        assert slider(panel, name).value == pytest.approx(value, abs=0.051 if name.startswith("size") else 0.0051)
    assert slider(panel, "all else") is None
    assert not panel.ui.resetButton.enabled
    # Of exactly what it sees, not of what a slider rounds that to.
    assert_says(panel, SEEN)
    assert list(said(panel)[0]) == ["malignant", "benign"]


def test_sliders_have_sensible_ends(panel, shown):
    ends = {name: (slider(panel, name).minimum, slider(panel, name).maximum) for name in WEIGHTS}
    # Twice the 15.26 mm that are seen, and a little more.
    assert ends.pop("size <mm> & 'more'") == (0, 40)
    assert set(ends.values()) == {(0, 1)}
    assert slider(panel, "size <mm> & 'more'").suffix == " mm"


@pytest.mark.parametrize(("name", "value"), [("spiculation", 0.1), ("size <mm> & 'more'", 7.5)])
def test_network_would_say_what_follows_from_the_weights(panel, shown, name, value):
    from MedXAILib.textual.intervention import intervened

    slider(panel, name).value = value
    assert_says(panel, {**SEEN, name: value}, instead=SEEN)
    found = intervened(concepts.read(shown)["concepts"], {name: value})
    assert list(found.values()) == pytest.approx(expected({**SEEN, name: value})[0])
    assert slider(panel, "solid").value == pytest.approx(SEEN["solid"], abs=0.0051)


def test_what_shares_a_scale_shares_the_rest(panel, shown):
    slider(panel, "part_solid").value = 0.5
    values = {**SEEN, "part_solid": 0.5, "solid": 0.25, "ground_glass": 0.25}
    assert [slider(panel, name).value for name in ("solid", "part_solid", "ground_glass")] == [0.25, 0.5, 0.25]
    assert_says(panel, values, instead=SEEN)
    slider(panel, "solid").value = 1.0
    assert [slider(panel, name).value for name in ("solid", "part_solid", "ground_glass")] == [1, 0, 0]
    assert_says(panel, {**values, "solid": 1.0, "part_solid": 0.0, "ground_glass": 0.0}, instead=SEEN)


def test_reset_goes_back_to_what_the_network_sees(panel, shown):
    slider(panel, "spiculation").value = 0.0
    slider(panel, "size <mm> & 'more'").value = 30.0
    assert panel.ui.resetButton.enabled
    panel.ui.resetButton.click()
    assert_says(panel, SEEN)
    assert not panel.ui.resetButton.enabled
    assert slider(panel, "size <mm> & 'more'").value == pytest.approx(15.3)


def test_sliders_begin_with_what_was_asked(panel, scan):
    values = {**SEEN, "spiculation": 0.0}
    panel.show(concepts.addConcepts(scan[0], answers.of(told(scan[1], set_to=values))))
    assert slider(panel, "spiculation").value == 0
    assert_says(panel, values, instead=SEEN)
    panel.ui.resetButton.click()
    assert_says(panel, SEEN)


def test_other_explanation_begins_anew(panel, scan, shown):
    slider(panel, "spiculation").value = 0.0
    panel.show(concepts.addConcepts(scan[0], answers.of(told(scan[1]))))
    assert_says(panel, SEEN)
    panel.show(concepts.addConcepts(scan[0], answers.of(found_in_examples(scan[1]))))
    assert panel.ui.whatIfButton.isHidden() and not panel.ui.slidersWidget.findChildren(ctk.ctkSliderWidget)


def test_answer_that_is_no_probability_is_a_number(panel, scan):
    panel.show(
        concepts.addConcepts(scan[0], answers.of(told(scan[1], model={"name": "Network", "task": "regression"})))
    )
    slider(panel, "spiculation").value = 0.0
    scores, before = expected({**SEEN, "spiculation": 0.0})[0], expected(SEEN)[0]
    for index, name in enumerate(("benign", "malignant")):
        row = f"<td>{name}&nbsp;&nbsp;</td><td><b>{scores[index]:.3g}</b>&nbsp;&nbsp;</td>"
        assert row + f"<td>instead of {before[index]:.3g}&nbsp;" in panel.ui.wouldLabel.text
    assert "score" not in panel.ui.wouldLabel.text


def test_markup_in_the_name_of_a_class_is_shown_as_it_is(panel, scan):
    answer = answers.of(told(scan[1]))
    renamed = [
        {**c, "weights": {"<b>&": c["weights"]["benign"], "malignant": c["weights"]["malignant"]}}
        for c in answer.manifest["concepts"]
    ]
    panel.show(concepts.addConcepts(scan[0], replace(answer, manifest={**answer.manifest, "concepts": renamed})))
    assert "&lt;b&gt;&amp;" in panel.ui.wouldLabel.text
    labels = panel.ui.slidersWidget.findChildren(qt.QLabel)
    assert "size <mm> & 'more'" in [label.text for label in labels]
    assert {label.textFormat for label in labels if label.text in WEIGHTS} == {qt.Qt.PlainText}


def test_saved_scene_brings_it_back(host, panel, scan, shown, tmp_path):
    before, peak = (text(panel), panel.ui.wouldLabel.text), at(scan[0], PEAKS["size <mm> & 'more'"])
    cells = [[shown.GetCellText(r, c) for c in range(4)] for r in range(6)]
    slicer_scene.save(tmp_path / "scene.mrb")
    slicer.mrmlScene.Clear(False)
    host.process()
    assert panel.node is None and panel.ui.wordsWidget.isHidden() and panel.ui.whatIfButton.isHidden()
    slicer_scene.load(tmp_path / "scene.mrb", tmp_path / "cache")
    (node,) = results.findExplanations()
    assert display.restore() is node
    panel.show(node)
    assert (text(panel), panel.ui.wouldLabel.text) == before
    assert [[node.GetCellText(r, c) for c in range(4)] for r in range(6)] == cells
    click(host, panel, "size <mm>")
    np.testing.assert_allclose(looked_at(), peak, atol=1e-2)
    slider(panel, "spiculation").value = 0.1
    assert_says(panel, {**SEEN, "spiculation": 0.1}, instead=SEEN)


def test_concepts_without_maps_show_the_scan_alone(host, panel, scan):
    answer = answers.of(told(scan[1]))
    bare = [{**c, "map": None} for c in answer.manifest["concepts"]]
    manifest = {**answer.manifest, "concepts": bare, "files": []}
    (node,) = mrml.addAnswers(scan[0], [replace(answer, manifest=manifest)])
    panel.show(node)
    assert foreground() is None and links(panel) == [] and panel.ui.hideMapButton.isHidden()
    assert not math.isnan(looked_at()[0])


def test_result_leads_to_the_words(host, shown):
    from MedXAISlicerLib.panels.result import ResultPanel
    from MedXAISlicerLib.parameters import MedXAIParameterNode

    panel = ResultPanel(logic=None)
    panel.setParameterNode(MedXAIParameterNode(host.scene.AddNewNodeByClass("vtkMRMLScriptedModuleNode")))
    panel.show(shown)
    assert "by concepts: see the tab Words" in panel.ui.emptyLabel.text and panel.ui.resultWidget.isHidden()
    panel.cleanup()


def test_network_itself_would_say_so(host, panel):
    """The numbers of the sliders against the shipped network, asked again with the attributes set."""
    import small_explanations

    from MedXAILib.resources import path

    volume = small_explanations.chest()
    network = mx.load_model(path("Models/lung_nodule_semantic"))
    asked = {"target": "malignant", "region": small_explanations.NODULE}
    scan = slicer.util.addVolumeFromArray(volume.data[0].numpy(), volume.affine[:, [2, 1, 0, 3]], "Chest CT")
    (node,) = mrml.addAnswers(scan, [answers.of(mx.tell(network, volume, "semantic", **asked))])
    panel.show(node)
    shown = concepts.read(node)["concepts"][0]["map"] or results.maps(node)[0]
    assert np.linalg.norm(np.subtract(geometry.peak(shown), small_explanations.NODULE)) < 20
    slider(panel, "spiculation").value = 0.0
    slider(panel, "diameter").value = 6.0
    slider(panel, "solid").value = 1.0
    again = mx.tell(network, volume, "semantic", **asked, intervene=("spiculation=0", "diameter=6", "solid=1"))
    row = r"<td>(\w+)&nbsp;&nbsp;</td><td><b>(\d+%)</b>&nbsp;&nbsp;</td><td>instead of (\d+%)&nbsp;"
    found = re.findall(row, panel.ui.wouldLabel.text)
    would = ", ".join(f"{name} {chance}" for name, chance, _ in sorted(found, key=lambda f: "nbm".index(f[0][0])))
    says = ", ".join(f"{name} {chance}" for name, _, chance in sorted(found, key=lambda f: "nbm".index(f[0][0])))
    assert f"the network would say {would}." in again.text and f"The network says {says}." in again.text
    assert would != says
