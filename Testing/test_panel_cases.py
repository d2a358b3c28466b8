"""The panel of similar cases: its cards, what can be chosen, and the cases beside the scan."""

from __future__ import annotations

from dataclasses import replace

import pytest

slicer_host = pytest.importorskip("slicer_host")

import slicer  # noqa: E402
import small_explanations  # noqa: E402
from slicer_host import qt  # noqa: E402

from MedXAISlicerLib import answers, cases, deleting, display, layouts  # noqa: E402


@pytest.fixture(scope="module")
def chest():
    return small_explanations.chest()


@pytest.fixture(scope="module")
def answer(chest):
    """Six cases, the most similar first: four malignant, two benign."""
    return answers.of(small_explanations.similar_cases(chest))


@pytest.fixture
def layoutNode(host):
    node = slicer.mrmlScene.GetFirstNodeByClass("vtkMRMLLayoutNode")
    node = node or slicer.mrmlScene.AddNewNodeByClass("vtkMRMLLayoutNode")
    node.SetViewArrangement(node.SlicerLayoutFourUpView)
    return node


@pytest.fixture
def panel(layoutNode):
    from MedXAISlicerLib.panels.cases import CasesPanel

    panel = CasesPanel(logic=None)
    yield panel
    panel.cleanup()


@pytest.fixture
def scan(host, chest):
    node = slicer.util.addVolumeFromArray(chest.data[0].numpy(), chest.affine[:, [2, 1, 0, 3]], "Chest CT")
    node.CreateDefaultDisplayNodes()
    return node


@pytest.fixture
def node(scan, answer):
    return cases.addCases(scan, answer)


def changed(answer, *changes):
    """The answer with its first cases, each with something changed."""
    known = [{**case, **change} for case, change in zip(answer.manifest["cases"], changes, strict=False)]
    return replace(answer, manifest={**answer.manifest, "cases": known})


def cards(panel):
    return [panel.ui.casesList.item(row) for row in range(panel.ui.casesList.count)]


def chosen(panel):
    return [row for row, card in enumerate(cards(panel)) if card.isSelected()]


def send(host, panel, row, *kinds):
    """Press and let go of the mouse on a card, as a person does."""
    casesList = panel.ui.casesList
    panel.widget.resize(460, 600)
    panel.widget.show()
    host.process()
    at = qt.QPointF(casesList.visualItemRect(cards(panel)[row]).center())
    everywhere = qt.QPointF(casesList.viewport().mapToGlobal(at.toPoint()))
    for kind in kinds:
        held = qt.Qt.NoButton if kind == qt.QEvent.MouseButtonRelease else qt.Qt.LeftButton
        event = qt.QMouseEvent(kind, at, everywhere, qt.Qt.LeftButton, held, qt.Qt.NoModifier)
        qt.QApplication.sendEvent(casesList.viewport(), event)
    host.process()


def click(host, panel, row):
    send(host, panel, row, qt.QEvent.MouseButtonPress, qt.QEvent.MouseButtonRelease)


def double_click(host, panel, row):
    click(host, panel, row)
    send(host, panel, row, qt.QEvent.MouseButtonDblClick, qt.QEvent.MouseButtonRelease)


def beside():
    """The names of the volumes in the views of the comparison, with "Chest CT" first."""
    found = []
    for composite in slicer.util.getNodesByClass("vtkMRMLSliceCompositeNode"):
        layoutNode = slicer.mrmlScene.GetFirstNodeByClass("vtkMRMLLayoutNode")
        if composite.GetSingletonTag() in (layoutNode.GetCurrentLayoutDescription() or ""):
            found.append(slicer.mrmlScene.GetNodeByID(composite.GetBackgroundVolumeID()).GetName())
    return sorted(set(found))


def test_cards_show_the_cases_by_similarity(panel, node, answer):
    panel.show(node)
    known = answer.manifest["cases"]
    assert len(known) == 6
    assert [card.text() for card in cards(panel)] == [f"{case['label']} {case['similarity']:.2f}" for case in known]
    for card, case in zip(cards(panel), known, strict=True):
        assert case["uid"] in card.toolTip() and case["source"] in card.toolTip()
        assert "not a probability" in card.toolTip()
    assert (
        panel.ui.summaryLabel.text == "6 cases: 4 malignant, 2 benign. The number beside the label is the similarity."
    )
    assert panel.ui.textLabel.isHidden()
    assert panel.ui.emptyLabel.isHidden()


def test_cards_are_in_the_order_of_similarity_whatever_the_order_of_the_cases(host, panel, scan, answer):
    answer = changed(answer, {"similarity": 0.2}, {"similarity": 0.9}, {"similarity": 0.6})
    panel.show(cases.addCases(scan, answer))
    assert [card.text().split()[-1] for card in cards(panel)] == ["0.90", "0.60", "0.20"]
    double_click(host, panel, 1)
    names = [case["uid"] for case in answer.manifest["cases"]]
    assert any(names[2] in name for name in beside())
    assert not any(name in shown for shown in beside() for name in names[:2])


def test_icons_are_the_thumbnails(panel, node):
    panel.show(node)
    for index, card in enumerate(cards(panel)):
        expected = cases.thumbnail(node, index, size=240)
        for mode in (qt.QIcon.Normal, qt.QIcon.Selected):
            image = card.icon().pixmap(240, 240, mode).toImage()
            assert (image.width(), image.height()) == (240, 240)
            for row, column in ((20, 120), (108, 64), (150, 128)):
                assert image.pixelColor(column, row).getRgb()[:3] == tuple(expected[row, column])


def test_most_similar_case_is_chosen_first(panel, node):
    panel.show(node)
    assert chosen(panel) == [0]
    assert panel.ui.showBesideButton.enabled
    assert not panel.ui.showBesideButton.checked


def test_at_most_four_can_be_chosen_and_the_first_ones_stay(host, panel, node):
    panel.show(node)
    click(host, panel, 0)
    assert chosen(panel) == []
    assert not panel.ui.showBesideButton.enabled
    assert "Choose a case" in panel.ui.showBesideButton.toolTip
    for row in (5, 4, 3, 2):
        click(host, panel, row)
    assert chosen(panel) == [2, 3, 4, 5]
    assert "as many as fit" in panel.ui.chosenLabel.text
    click(host, panel, 0)
    assert chosen(panel) == [2, 3, 4, 5]
    click(host, panel, 3)
    click(host, panel, 0)
    assert chosen(panel) == [0, 2, 4, 5]


def test_chosen_cases_are_shown_beside_the_scan_and_away_again(host, panel, node, answer, layoutNode):
    uids = [case["uid"] for case in answer.manifest["cases"]]
    panel.show(node)
    click(host, panel, 2)
    panel.ui.showBesideButton.click()
    host.process()
    assert layouts.current() == "cases"
    assert panel.ui.showBesideButton.checked
    assert "Leave" in panel.ui.showBesideButton.text
    assert beside() == sorted(["Chest CT", f"malignant {uids[0]}", f"malignant {uids[2]}"])
    click(host, panel, 4)
    assert beside() == sorted(["Chest CT", *(f"malignant {uids[i]}" for i in (0, 2)), f"benign {uids[4]}"])
    panel.ui.showBesideButton.click()
    host.process()
    assert layouts.current() is None
    assert layoutNode.GetViewArrangement() == layoutNode.SlicerLayoutFourUpView
    assert not panel.ui.showBesideButton.checked
    assert "Show beside" in panel.ui.showBesideButton.text
    assert chosen(panel) == [0, 2, 4]


def test_double_click_shows_one_case_alone(host, panel, node, answer):
    panel.show(node)
    click(host, panel, 1)
    double_click(host, panel, 3)
    assert chosen(panel) == [3]
    assert panel.ui.showBesideButton.checked
    assert beside() == sorted(["Chest CT", f"malignant {answer.manifest['cases'][3]['uid']}"])


def test_no_case_chosen_any_more_leaves_the_comparison(host, panel, node, layoutNode):
    panel.show(node)
    panel.ui.showBesideButton.click()
    click(host, panel, 0)
    assert layouts.current() is None
    assert layoutNode.GetViewArrangement() == layoutNode.SlicerLayoutFourUpView


def test_button_follows_the_layout_that_a_person_chooses(host, panel, node, layoutNode):
    panel.show(node)
    panel.ui.showBesideButton.click()
    layoutNode.SetViewArrangement(layoutNode.SlicerLayoutConventionalView)
    host.process()
    assert not panel.ui.showBesideButton.checked


def test_what_the_method_says_of_them_is_above_the_cards(panel, scan, answer):
    said = "Nothing near: no case is as similar as <99 %> of the cases are."
    told = replace(answer, manifest={**answer.manifest, "text": said})
    panel.show(cases.addCases(scan, told))
    assert panel.ui.textLabel.text == said and not panel.ui.textLabel.isHidden()
    panel.show(cases.addCases(scan, replace(told, manifest={**told.manifest, "cases": []})))
    assert panel.ui.emptyLabel.text == "<b>Nothing near: no case is as similar as &lt;99 %&gt; of the cases are.</b>"
    assert not panel.ui.emptyLabel.isHidden()
    assert panel.ui.casesWidget.isHidden()


ROLES = [
    {"role": "harmful", "similarity": -0.5, "numbers": {"diameter_mm": 8.996}},
    {"role": "alike", "similarity": 0.5, "numbers": {"diameter_mm": 12.34, "points": 2.0, "third": 3.0}},
    {"role": "mistaken", "similarity": 0.8, "note": "It says benign, the label is <malignant>."},
    {"role": "alike", "similarity": 0.9, "numbers": {"diameter_mm": 20.004}},
    {"role": "harmful", "similarity": -2.5},
    {"role": "unlike", "similarity": 123.0},
]


def rows(panel):
    """The label on each card that is seen, and each heading."""
    seen = [card.text().split("\n")[0] for card in cards(panel) if not card.isHidden()]
    return [text.split()[0] if text.split()[0] in ("benign", "malignant") else text for text in seen]


@pytest.fixture
def of_roles(panel, scan, answer):
    answer = replace(answer, manifest={**changed(answer, *ROLES).manifest, "scored": "influence on the logit"})
    node = cases.addCases(scan, answer)
    panel.show(node)
    return node


def test_cards_are_grouped_by_why_they_are_shown(panel, of_roles, answer):
    labels = [case["label"] for case in answer.manifest["cases"]]
    expected = {
        "The network says the same of these": [3, 1],
        "The network says otherwise of these": [5],
        "The network is wrong about these": [2],
        # The most harmful one first.
        "Learning from these speaks against the answer": [4, 0],
    }
    listed = [line for title, indices in expected.items() for line in (title, *(labels[i] for i in indices))]
    assert rows(panel) == listed
    texts = [card.text().split("\n") for card in cards(panel)]
    assert texts[2] == [f"{labels[1]} 0.50", "diameter 12.3 mm", "points 2"]
    assert texts[4] == [f"{labels[5]} 123"]
    assert "Influence on the logit 123:" in cards(panel)[4].toolTip()
    tip = cards(panel)[2].toolTip()
    assert "third 3" in tip and "says the same" in tip
    assert "It says benign, the label is &lt;malignant&gt;." in cards(panel)[6].toolTip()


def test_heading_cannot_be_chosen_and_has_its_own_row(host, panel, of_roles):
    assert chosen(panel) == [1]
    click(host, panel, 0)
    assert chosen(panel) == [1]
    tops = [panel.ui.casesList.visualItemRect(card).top() for card in cards(panel)]
    assert tops[0] < tops[1] == tops[2] < tops[3] < tops[4] < tops[5] < tops[6] < tops[7] < tops[8] == tops[9]


def choose(selector, text):
    index = selector.findText(text)
    assert index >= 0, text
    selector.setCurrentIndex(index)


def test_cases_are_filtered_by_role_label_and_number(host, panel, of_roles, answer):
    ui, labels = panel.ui, [case["label"] for case in answer.manifest["cases"]]
    everything = rows(panel)
    choose(ui.roleSelector, "The network is wrong about these")
    assert rows(panel) == ["The network is wrong about these", labels[2]]
    # What cannot be seen is not chosen any more.
    assert chosen(panel) == [] and not ui.showBesideButton.enabled
    choose(ui.roleSelector, "Any reason")
    assert rows(panel) == everything
    choose(ui.labelSelector, "benign")
    assert [labels[i] for i in (4, 5)] == ["benign", "benign"]
    assert rows(panel) == [
        "The network says otherwise of these",
        "benign",
        "Learning from these speaks against the answer",
        "benign",
    ]
    choose(ui.labelSelector, "Any label")
    assert ui.numberRangeWidget.isHidden()
    choose(ui.numberSelector, "diameter mm")
    assert (ui.numberRangeWidget.minimum, ui.numberRangeWidget.maximum) == (8.99, 20.01)
    seen = [i for i, card in zip(panel._indices, cards(panel), strict=True) if i is not None and not card.isHidden()]
    assert seen == [3, 1, 0]
    ui.numberRangeWidget.setValues(10, 13)
    seen = [i for i, card in zip(panel._indices, cards(panel), strict=True) if i is not None and not card.isHidden()]
    assert seen == [1]
    choose(ui.numberSelector, "Any number")
    assert rows(panel) == everything and ui.numberRangeWidget.isHidden()


def test_filtered_case_leaves_the_comparison(host, panel, of_roles, answer):
    click(host, panel, 6)
    panel.ui.showBesideButton.click()
    assert len(beside()) == 3
    choose(panel.ui.roleSelector, "The network is wrong about these")
    assert beside() == sorted(["Chest CT", f"malignant {answer.manifest['cases'][2]['uid']}"])


def test_opacity_is_that_of_all_maps(panel, node):
    panel.show(node)
    assert panel.ui.opacitySlider.value == pytest.approx(display.OPACITY)
    panel.ui.showBesideButton.click()
    panel.ui.opacitySlider.value = 0.25
    shown = [c for c in slicer.util.getNodesByClass("vtkMRMLSliceCompositeNode") if c.GetForegroundVolumeID()]
    assert len(shown) >= 4 and all(c.GetForegroundOpacity() == 0.25 for c in shown)


def test_where_there_is_nothing_to_tell_apart_there_is_no_filter(panel, node):
    panel.show(node)
    assert panel.ui.roleSelector.isHidden() and panel.ui.numberSelector.isHidden()
    assert not panel.ui.labelSelector.isHidden()


def test_markup_in_a_label_is_shown_as_it_is(panel, scan, answer):
    panel.show(cases.addCases(scan, changed(answer, {"label": "<b>a & b</b>", "uid": "<i>1"})))
    assert cards(panel)[0].text().startswith("<b>a & b</b> 0.")
    assert panel.ui.summaryLabel.textFormat == qt.Qt.PlainText
    assert "<b>a & b</b>" in panel.ui.summaryLabel.text
    assert "&lt;i&gt;1" in cards(panel)[0].toolTip()


def test_case_without_image_cannot_be_chosen(host, panel, scan, answer):
    panel.show(cases.addCases(scan, changed(answer, {"volume": None, "map": None, "place": None}, {}, {})))
    assert chosen(panel) == [1]
    click(host, panel, 0)
    assert chosen(panel) == [1]
    assert "not in the scene" in cards(panel)[0].toolTip()
    double_click(host, panel, 0)
    assert layouts.current() is None


def test_image_that_was_removed_is_left_out(host, panel, node, answer):
    panel.show(node)
    click(host, panel, 1)
    slicer.mrmlScene.RemoveNode(cases.cases(node)[0]["volume"])
    panel.ui.showBesideButton.click()
    host.process()
    assert beside() == sorted(["Chest CT", f"malignant {answer.manifest['cases'][1]['uid']}"])


def test_without_its_scan_nothing_is_shown_beside(host, panel, scan, node):
    panel.show(node)
    slicer.mrmlScene.RemoveNode(scan)
    panel.ui.showBesideButton.click()
    host.process()
    assert layouts.current() is None
    assert not panel.ui.showBesideButton.checked


def test_other_kinds_have_no_cases(panel, scan, node):
    assert "Choose an explanation" in panel.ui.emptyLabel.text
    assert panel.ui.casesWidget.isHidden()
    other = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLTextNode")
    other.SetAttribute("MedXAI.Kind", "Caption")
    panel.show(node)
    panel.show(other)
    assert "does not look for similar cases" in panel.ui.emptyLabel.text
    assert panel.ui.casesWidget.isHidden()
    assert cards(panel) == []


def test_no_case_at_all_is_said(panel, scan, answer):
    panel.show(cases.addCases(scan, changed(answer)))
    assert "no similar case" in panel.ui.emptyLabel.text
    assert panel.ui.casesWidget.isHidden()


def test_other_explanation_leaves_the_comparison(host, panel, scan, node, answer):
    other = cases.addCases(scan, changed(answer, {"label": "other"}))
    panel.show(node)
    click(host, panel, 2)
    panel.ui.showBesideButton.click()
    panel.show(other)
    assert layouts.current() is None
    assert not panel.ui.showBesideButton.checked
    assert [card.text().split()[0] for card in cards(panel)] == ["other"]
    assert chosen(panel) == [0]


def test_same_explanation_again_keeps_what_was_chosen(host, panel, node):
    panel.show(node)
    click(host, panel, 2)
    panel.ui.showBesideButton.click()
    panel.show(node)
    assert chosen(panel) == [0, 2]
    assert layouts.current() == "cases"
    assert panel.ui.showBesideButton.checked


@pytest.mark.parametrize("remove", [deleting.delete, lambda node: slicer.mrmlScene.Clear(False)])
def test_explanation_that_is_gone_is_not_shown_any_more(host, panel, node, remove):
    panel.show(node)
    panel.ui.showBesideButton.click()
    remove(node)
    host.process()
    assert panel.node is None
    assert layouts.current() is None
    assert cards(panel) == []
    assert panel.ui.casesWidget.isHidden()


def test_cases_that_are_compared_already_are_chosen(host, panel, node):
    """As after a scene was loaded that was saved with a comparison."""
    layouts.compareCases(node, [1, 4])
    panel.show(node)
    assert chosen(panel) == [1, 4]
    assert panel.ui.showBesideButton.isChecked()
