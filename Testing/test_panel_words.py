"""The panel of words: what a person reads of an explanation, and where a click on a word leads."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

slicer_host = pytest.importorskip("slicer_host")

import slicer  # noqa: E402
import small_explanations  # noqa: E402
from slicer_host import qt  # noqa: E402

from MedXAISlicerLib import answers, captions, deleting, display, mrml, results  # noqa: E402

SHIFT = np.array([5.0, -7.0, 11.0])
"""Of the transform that the scan is under, mm."""


@pytest.fixture(scope="module")
def chest():
    return small_explanations.chest()


@pytest.fixture(scope="module")
def answer(chest):
    """A caption of five words, of which all but "not calcified" have a map."""
    return answers.of(small_explanations.caption(chest))


@pytest.fixture
def panel(host):
    from MedXAISlicerLib.panels.words import WordsPanel

    panel = WordsPanel(logic=None)
    yield panel
    panel.cleanup()


@pytest.fixture
def scan(host, chest):
    """The scan under a transform, in a slice view."""
    node = slicer.util.addVolumeFromArray(chest.data[0].numpy(), chest.affine[:, [2, 1, 0, 3]], "Chest CT")
    node.CreateDefaultDisplayNodes()
    moved = np.eye(4)
    moved[:3, 3] = SHIFT
    transform = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLLinearTransformNode")
    transform.SetMatrixTransformToParent(slicer.util.vtkMatrixFromArray(moved))
    node.SetAndObserveTransformNodeID(transform.GetID())
    slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSliceNode", "Test").SetOrientation("Axial")
    slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSliceCompositeNode", "Test")
    slicer.util.setSliceViewerLayers(background=node)
    return node


def looked_at():
    """The middle of each slice view, RAS mm."""
    return [
        [slicer.util.arrayFromVTKMatrix(node.GetSliceToRAS())[i, 3] for i in range(3)]
        for node in slicer.util.getNodesByClass("vtkMRMLSliceNode")
    ]


def layers():
    """(background, foreground) of all slice views, as node IDs."""
    nodes = slicer.util.getNodesByClass("vtkMRMLSliceCompositeNode")
    return {(node.GetBackgroundVolumeID(), node.GetForegroundVolumeID()) for node in nodes}


def characters(panel):
    """The characters that are shown, each with its format."""
    cursor = qt.QTextCursor(panel.ui.textBrowser.document)
    found = []
    while cursor.movePosition(qt.QTextCursor.NextCharacter, qt.QTextCursor.KeepAnchor):
        found.append((cursor.selectedText(), cursor.charFormat()))
        cursor.clearSelection()
    return found


def where(panel, holds):
    """The pieces of the text whose format is of some kind."""
    shown = [character if holds(look) else "\0" for character, look in characters(panel)]
    return [part for part in "".join(shown).split("\0") if part]


def links(panel):
    return where(panel, lambda look: look.isAnchor())


def highlighted(panel):
    colour = panel.ui.textBrowser.palette.color(qt.QPalette.Highlight)
    return where(panel, lambda look: look.background().style() and look.background().color() == colour)


def click(host, panel, word):
    """Press and let go of the mouse in the middle of a word."""
    browser = panel.ui.textBrowser
    panel.widget.resize(460, 400)
    panel.widget.show()
    host.process()
    cursor = browser.document.find(word)
    cursor.setPosition((cursor.selectionStart() + cursor.selectionEnd()) // 2)
    at = qt.QPointF(browser.cursorRect(cursor).center())
    everywhere = qt.QPointF(browser.viewport().mapToGlobal(at.toPoint()))
    left, none = qt.Qt.LeftButton, qt.Qt.NoButton
    for kind, held in ((qt.QEvent.MouseButtonPress, left), (qt.QEvent.MouseButtonRelease, none)):
        event = qt.QMouseEvent(kind, at, everywhere, left, held, qt.Qt.NoModifier)
        qt.QApplication.sendEvent(browser.viewport(), event)
    host.process()


def said(answer, word):
    return next(known for known in answer.manifest["words"] if known["text"] == word)


def with_text(answer, text, words):
    """The caption with another text: `words` are (text, confidence, index of the map or None)."""
    known = []
    for word, confidence, shown in words:
        start = text.index(word)
        known.append(
            {
                "text": word,
                "start": start,
                "end": start + len(word),
                "confidence": confidence,
                "map": shown,
                "place": None,
            }
        )
    return replace(answer, manifest={**answer.manifest, "text": text, "words": known})


def saliency_map(answer):
    """The first word's map as an explanation of its own."""
    file = answer.manifest["files"][0]
    kept = {name: answer.manifest[name] for name in ("provenance", "residual")}
    manifest = {**kept, "kind": "SaliencyMap", "files": [file], "signed": False}
    return replace(answer, manifest=manifest, images={file: answer.images[file]})


def test_caption_is_read_and_its_words_with_maps_are_links(panel, scan, answer):
    panel.show(captions.addCaption(scan, answer))
    assert panel.ui.textBrowser.toPlainText() == answer.manifest["text"]
    with_map = [word["text"] for word in answer.manifest["words"] if word["map"] is not None]
    assert len(with_map) >= 3
    assert links(panel) == with_map
    assert highlighted(panel) == []
    assert not panel.ui.hideMapButton.enabled


def test_click_on_a_word_shows_its_map_at_its_place(host, panel, scan, answer):
    node = captions.addCaption(scan, answer)
    panel.show(node)
    for word in ("malignant", "spiculated"):
        click(host, panel, word)
        expected = said(answer, word)
        ((background, foreground),) = layers()
        assert background == scan.GetID()
        shown = slicer.mrmlScene.GetNodeByID(foreground)
        image, _ = answer.images[answer.manifest["files"][expected["map"]]]
        np.testing.assert_array_equal(slicer.util.arrayFromVolume(shown), image)
        for middle in looked_at():
            np.testing.assert_allclose(middle, expected["place"] + SHIFT, atol=1e-3)
        assert highlighted(panel) == [word]
        assert panel.ui.hideMapButton.enabled


def test_click_beside_links_does_nothing(host, panel, scan, answer):
    panel.show(captions.addCaption(scan, answer))
    before = layers(), looked_at()
    click(host, panel, "not calcified")
    assert (layers(), looked_at()) == before
    assert highlighted(panel) == []


def test_map_is_hidden_again_with_its_legend(host, panel, scan, answer):
    panel.show(captions.addCaption(scan, answer))
    click(host, panel, "malignant")
    ((_, shown),) = layers()
    legend = slicer.modules.colors.logic().GetColorLegendDisplayNode(slicer.mrmlScene.GetNodeByID(shown))
    assert legend.GetVisibility()
    panel.ui.hideMapButton.click()
    host.process()
    assert layers() == {(scan.GetID(), None)}
    assert not legend.GetVisibility()
    assert highlighted(panel) == []
    assert not panel.ui.hideMapButton.enabled


def test_word_that_is_shown_already_is_marked(panel, scan, answer):
    node = captions.addCaption(scan, answer)
    display.show(node)
    panel.show(node)
    assert highlighted(panel) == [links(panel)[0]]


def test_word_with_a_place_and_no_map_leads_to_it(host, panel, scan, answer):
    place = said(answer, "malignant")["place"]
    answer = with_text(answer, "There is a nodule here.", [("nodule", None, None)])
    answer.manifest["words"][0]["place"] = place
    panel.show(captions.addCaption(scan, answer))
    click(host, panel, "nodule")
    assert layers() == {(scan.GetID(), None)}
    for middle in looked_at():
        np.testing.assert_allclose(middle, place + SHIFT, atol=1e-3)
    assert highlighted(panel) == ["nodule"]


def test_markup_in_a_caption_is_shown_as_it_is(host, panel, scan, answer):
    text = 'Nodule <b>&amp; "A" <img src="x"> & größer\n  als 5 mm </p><script>'
    panel.show(captions.addCaption(scan, with_text(answer, text, [("<b>&amp;", 0.9, 0), ("größer", 0.9, 1)])))
    assert panel.ui.textBrowser.toPlainText() == text
    assert links(panel) == ["<b>&amp;", "größer"]
    click(host, panel, "größer")
    assert highlighted(panel) == ["größer"]


def test_unsure_words_are_marked_and_say_how_sure(panel, scan, answer):
    words = [("small", 0.49, 0), ("solid", 0.5, 1), ("nodule", None, 2), ("fat", 0.03, None)]
    panel.show(captions.addCaption(scan, with_text(answer, "A small solid nodule without fat.", words)))
    assert where(panel, lambda look: look.fontItalic()) == ["small", "fat"]
    assert links(panel) == ["small", "solid", "nodule"]
    tips = {}
    for character, look in characters(panel):
        if look.toolTip():
            tips[look.toolTip()] = tips.get(look.toolTip(), "") + character
    said = {word: tip for tip, word in tips.items()}
    assert "49%" in said["small"]
    assert "3%" in said["fat"]
    assert "Click" not in said["fat"]
    assert "%" not in said["nodule"]
    assert "50%" in panel.ui.legendLabel.text


def test_sure_words_need_no_legend_of_unsure_ones(panel, scan, answer):
    panel.show(captions.addCaption(scan, with_text(answer, "A solid nodule.", [("solid", 0.9, 0)])))
    assert "Underlined" in panel.ui.legendLabel.text
    assert "italics" not in panel.ui.legendLabel.text
    panel.show(captions.addCaption(scan, with_text(answer, "A solid nodule.", [("solid", 0.9, None)])))
    assert panel.ui.legendLabel.text == ""


def test_text_is_copied(panel, scan, answer):
    panel.show(captions.addCaption(scan, answer))
    panel.ui.copyButton.click()
    assert qt.QApplication.clipboard().text() == answer.manifest["text"]


def test_phrase_within_a_phrase_is_read_once(panel, scan, answer):
    words = [("nodule", 0.9, 1), ("solid nodule", 0.9, 0)]
    panel.show(captions.addCaption(scan, with_text(answer, "A solid nodule.", words)))
    assert panel.ui.textBrowser.toPlainText() == "A solid nodule."
    assert links(panel) == ["solid nodule"]


def test_summary_of_a_map_is_read_instead(panel, scan, answer):
    (node,) = mrml.addAnswers(scan, [saliency_map(answer)])
    panel.show(node)
    assert panel.ui.textBrowser.toPlainText() == results.part(node, "Summary").GetText()
    assert "hirescam" in panel.ui.textBrowser.toPlainText()
    assert panel.ui.warningLabel.isHidden()
    assert panel.ui.hideMapButton.isHidden()
    slicer.mrmlScene.RemoveNode(results.part(node, "Summary"))
    assert "not in the scene any more" in panel.ui.emptyLabel.text
    assert panel.ui.wordsWidget.isHidden()
    assert not panel.ui.emptyLabel.isHidden()


def test_rules_are_read_and_those_of_the_scan_are_marked(panel, scan):
    from test_variants import rule_set

    told = rule_set()
    (node,) = mrml.addAnswers(scan, [answers.of(told)])
    panel.show(node)
    text = panel.ui.textBrowser.toPlainText()
    order = [
        "Two rules cover every case.",
        "In this scan: diameter 14.2 mm, spiculation 0.8.",
        "For scans like this one",
        told.rules[2].sentence,
        "For all cases",
        f"▶ {told.rules[0].sentence} It holds for this scan.",
        told.rules[1].sentence,
    ]
    assert [line for line in text.split("\n") if line] == order
    bold = [part.strip() for part in where(panel, lambda look: look.fontWeight() > 500)]
    assert bold == [order[2], order[4], told.rules[0].sentence]
    assert links(panel) == []
    assert "not what is true" in panel.ui.warningLabel.text and "▶" in panel.ui.legendLabel.text
    assert panel.ui.hideMapButton.isHidden() and panel.ui.whatIfButton.isHidden()
    panel.ui.copyButton.click()
    assert f"{told.rules[0].sentence} (this scan)" in qt.QApplication.clipboard().text()


def test_real_rules_of_nodules(panel, scan):
    """Of those that the network says it of, there are as many as the sentence has."""
    told = small_explanations.rules()
    (node,) = mrml.addAnswers(scan, [answers.of(told)])
    panel.show(node)
    text = panel.ui.textBrowser.toPlainText()
    for rule in told.rules:
        assert rule.sentence in text
        assert 0 < rule.completeness < 1 and rule.cases == round(rule.completeness * 40)
    assert [rule.applies for rule in told.rules] == [
        told.values[rule.conditions[0].feature] > rule.conditions[0].threshold for rule in told.rules
    ]


def test_nothing_chosen_says_what_to_do(panel):
    assert "Choose an explanation" in panel.ui.emptyLabel.text
    assert panel.ui.wordsWidget.isHidden()


def test_caption_that_is_removed_is_not_shown_any_more(host, panel, scan, answer):
    node = captions.addCaption(scan, answer)
    panel.show(node)
    deleting.delete(node)
    host.process()
    assert panel.node is None
    assert panel.ui.wordsWidget.isHidden()


def test_map_that_is_removed_is_no_link_but_its_place_is(host, panel, scan, answer):
    node = captions.addCaption(scan, answer)
    panel.show(node)
    click(host, panel, "malignant")
    slicer.mrmlScene.RemoveNode(slicer.mrmlScene.GetNodeByID(next(iter(layers()))[1]))
    host.process()
    assert highlighted(panel) == []
    click(host, panel, "malignant")
    assert layers() == {(scan.GetID(), None)}
    np.testing.assert_allclose(looked_at()[0], said(answer, "malignant")["place"] + SHIFT, atol=1e-3)
    click(host, panel, "spiculated")
    shown = slicer.mrmlScene.GetNodeByID(next(iter(layers()))[1])
    image, _ = answer.images[answer.manifest["files"][said(answer, "spiculated")["map"]]]
    np.testing.assert_array_equal(slicer.util.arrayFromVolume(shown), image)


def test_scene_is_closed(host, panel, scan, answer):
    panel.show(captions.addCaption(scan, answer))
    slicer.mrmlScene.Clear(False)
    host.process()
    assert panel.node is None
    assert panel.ui.wordsWidget.isHidden()


def test_second_caption_takes_the_place_of_the_first(host, panel, scan, answer):
    first = captions.addCaption(scan, answer)
    second = captions.addCaption(scan, with_text(answer, "A solid nodule.", [("solid", 0.9, 1)]))
    panel.show(first)
    click(host, panel, "malignant")
    panel.show(second)
    assert panel.ui.textBrowser.toPlainText() == "A solid nodule."
    assert highlighted(panel) == []
    click(host, panel, "solid")
    assert next(iter(layers()))[1] == results.maps(second)[0].GetID()
