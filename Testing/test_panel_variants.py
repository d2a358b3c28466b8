"""The panel of variants: the steps of a traversal, one after the other, beside the scan, and among all cases."""

from __future__ import annotations

import pytest

slicer_host = pytest.importorskip("slicer_host")

import numpy as np  # noqa: E402
import slicer  # noqa: E402
import small_explanations  # noqa: E402
import vtk  # noqa: E402
from slicer_host import qt  # noqa: E402
from test_variants import traversal  # noqa: E402

from MedXAISlicerLib import answers, deleting, layouts, mrml, results, traversals  # noqa: E402


@pytest.fixture
def panel(host):
    from MedXAISlicerLib.panels.variants import VariantsPanel

    panel = VariantsPanel(logic=None)
    panel.widget.resize(460, 900)
    yield panel
    panel.cleanup()


@pytest.fixture
def scan(host):
    node = slicer.util.addVolumeFromArray(np.random.default_rng(0).normal(size=(12, 16, 20)), name="Scan")
    node.CreateDefaultDisplayNodes()
    return node


def add(scan, **changes):
    return mrml.addAnswers(scan, [answers.of(traversal(**changes))])[0]


@pytest.fixture
def node(scan):
    return add(scan)


def row(panel):
    """The step that the table has chosen, which the slider has to have, too."""
    (index,) = {item.row() for item in panel.ui.stepsTable.selectedItems()}
    assert panel.ui.stepSliderWidget.value == index + 1
    return index


def dots(panel):
    """The cases on the map, as (item, index)."""
    items = panel.cohortMap.view.scene().items()
    return [(item, item.data(0)) for item in items if item.data(0) is not None]


def test_steps_are_a_table_whose_flip_is_bold(panel, node):
    panel.show(node)
    table = panel.ui.stepsTable
    heads = [table.horizontalHeaderItem(i).text() for i in range(table.columnCount)]
    assert heads == ["Step", "Remark", "malignant", "benign", "diameter mm"]
    texts = [[table.item(r, c).text() for c in range(table.columnCount)] for r in range(table.rowCount)]
    assert texts[2] == ["+1.5", "the answer flips", "50%", "50%", "10.5"]
    assert [table.item(r, 0).font().bold() for r in range(4)] == [False, False, True, False]
    assert [table.item(r, 0).font().italic() for r in range(4)] == [False, False, False, True]
    assert panel.ui.textLabel.text == "At 10.5 mm the network says malignant."
    assert "no scans of anybody" in panel.ui.madeLabel.text
    assert row(panel) == 2 and panel.ui.strangeLabel.isHidden()


def test_slider_table_and_slicer_choose_the_step(host, panel, node):
    panel.show(node)
    panel.ui.stepSliderWidget.value = 4
    assert traversals.step(node) == 3 == row(panel)
    assert not panel.ui.strangeLabel.isHidden()
    panel.ui.stepsTable.selectRow(0)
    assert traversals.step(node) == 0 == row(panel)
    assert panel.ui.strangeLabel.isHidden()
    results.part(node, "Browser").SetSelectedItemNumber(1)
    host.process()
    assert row(panel) == 1
    # Nothing of it has moved the map of what is changed to another scan.
    assert results.part(node, "Source").GetName() == "Scan"


def test_play_is_that_of_slicer(host, panel, node):
    panel.show(node)
    browser = results.part(node, "Browser")
    panel.ui.playButton.click()
    assert browser.GetPlaybackActive() and panel.ui.playButton.text == "Stop"
    before = row(panel)
    browser.SelectNextItem()
    assert row(panel) == before + 1
    # Somebody stops it in Slicer's own browser.
    browser.SetPlaybackActive(False)
    assert panel.ui.playButton.text == "Play" and not panel.ui.playButton.checked


def test_clicked_dot_says_which_case_it_is(host, panel, node):
    panel.show(node)
    panel.ui.cohortButton.collapsed = False
    panel.widget.show()
    host.process()
    view = panel.cohortMap.view
    assert sorted(index for _, index in dots(panel)) == [0, 1]
    assert "Click a dot" in panel.ui.caseLabel.text
    places = {index: item.pos() for item, index in dots(panel)}
    # To the right and up on the map is where x and y are greater.
    assert places[1].x() > places[0].x() and places[1].y() < places[0].y()
    at = view.mapFromScene(places[1])
    for kind, held in (
        (qt.QEvent.MouseButtonPress, qt.Qt.LeftButton),
        (qt.QEvent.MouseButtonRelease, qt.Qt.NoButton),
    ):
        everywhere = qt.QPointF(view.viewport().mapToGlobal(at))
        event = qt.QMouseEvent(kind, qt.QPointF(at), everywhere, qt.Qt.LeftButton, held, qt.Qt.NoModifier)
        qt.QApplication.sendEvent(view.viewport(), event)
    host.process()
    assert panel.ui.caseLabel.text == 'Case two "2": malignant'
    ring = panel.cohortMap._ring
    assert ring.isVisible() and ring.pos() == places[1]
    assert "malignant" in panel.ui.legendLabel.text and "benign" in panel.ui.legendLabel.text
    tips = {index: item.toolTip() for item, index in dots(panel)}
    assert tips[0] == "benign, one"
    view.scene().clearSelection()
    assert "Click a dot" in panel.ui.caseLabel.text and not ring.isVisible()


def test_map_marks_the_step_that_is_shown(panel, node):
    panel.show(node)
    seen = []
    for index in (0, 3):
        traversals.setStep(node, index)
        seen.append((panel.cohortMap._now.pos().x(), panel.cohortMap._now.pos().y()))
    # The path runs from (0, 0) to (2, 2).
    assert seen[1][0] > seen[0][0] and seen[1][1] < seen[0][1]
    panel.show(node)
    assert panel.cohortMap._now.pos().x() == seen[1][0]


def test_without_a_map_of_all_cases_there_is_none(panel, scan, node):
    panel.show(add(scan, cohort=(), path=None))
    assert panel.ui.cohortButton.isHidden()
    panel.show(node)
    assert not panel.ui.cohortButton.isHidden()
    (case,) = traversal().cohort[:1]
    panel.show(add(scan, cohort=(case,), path=traversal().path * 0))
    assert len(dots(panel)) == 1


def test_variants_are_shown_beside_the_scan_and_away_again(host, panel, node, scan):
    layoutNode = slicer.mrmlScene.GetFirstNodeByClass("vtkMRMLLayoutNode")
    before = layoutNode.GetViewArrangement()
    panel.show(node)
    panel.ui.showBesideButton.click()
    host.process()
    assert layouts.current() == "variants" and "Leave" in panel.ui.showBesideButton.text
    panel.ui.showBesideButton.click()
    host.process()
    assert layoutNode.GetViewArrangement() == before and "Show beside" in panel.ui.showBesideButton.text
    panel.ui.showBesideButton.click()
    panel.show(add(scan))
    assert layouts.current() is None
    slicer.mrmlScene.RemoveNode(scan)
    panel.ui.showBesideButton.click()
    assert "not in the scene any more" in host.dialogs[-1][1]
    assert not panel.ui.showBesideButton.checked


def test_other_kinds_and_none_say_so(host, panel, scan, node):
    assert "Choose an explanation" in panel.ui.emptyLabel.text
    other = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLTextNode")
    other.SetAttribute("MedXAI.Kind", "Caption")
    panel.show(other)
    assert "no variants" in panel.ui.emptyLabel.text and panel.ui.variantsWidget.isHidden()
    panel.show(node)
    assert not panel.ui.variantsWidget.isHidden()
    slicer.mrmlScene.RemoveNode(results.part(node, "Browser"))
    host.process()
    assert "not in the scene any more" in panel.ui.emptyLabel.text and panel.ui.variantsWidget.isHidden()


@pytest.mark.parametrize("remove", [deleting.delete, lambda node: slicer.mrmlScene.Clear(False)])
def test_what_is_gone_is_not_shown_any_more(host, panel, node, remove):
    panel.show(node)
    panel.ui.showBesideButton.click()
    remove(node)
    host.process()
    assert panel.node is None and panel.ui.variantsWidget.isHidden()
    assert layouts.current() is None


def test_asked_again_the_new_one_is_shown(host, panel, scan, node):
    panel.show(node)
    again = add(scan, flipped=None, text="Never.")
    panel.show(again)
    assert panel.ui.textLabel.text == "Never." and row(panel) == 1
    # The first one is not followed any more.
    followed = [results.part(one, "Browser") for one in (node, again)]
    assert [panel.hasObserver(one, vtk.vtkCommand.ModifiedEvent, panel._showStep) for one in followed] == [False, True]


def test_real_nodule_that_grows(host, panel):
    """A nodule computed larger and larger before the demo network: where its answer flips, as its scores have it."""
    volume, told = small_explanations.variants()
    node = slicer.util.addVolumeFromArray(volume.data[0].numpy(), volume.affine[:, [2, 1, 0, 3]], "CT")
    (made,) = mrml.addAnswers(node, [answers.of(told)])
    panel.show(made)
    scores = np.array([[step.scores[name] for name in ("none", "benign", "malignant")] for step in told.steps])
    decisions = scores.argmax(1)
    assert decisions[told.here] == 2 and decisions[told.flipped] == 1
    assert row(panel) == told.flipped
    assert f"{100 * scores[told.flipped, 1]:.0f}%" in [
        panel.ui.stepsTable.item(told.flipped, c).text() for c in range(panel.ui.stepsTable.columnCount)
    ]
    # The smaller nodule has less of what the scan has: the change is negative at its border, and nowhere beyond.
    changed = slicer.util.arrayFromVolume(results.maps(made)[0])
    assert changed.min() < -200 and changed.max() < -changed.min() / 2
    assert len(dots(panel)) == len(told.cohort)


def test_picture(host, panel, node, tmp_path):
    panel.show(node)
    assert host.picture(panel.widget, tmp_path / "variants.png", width=460).stat().st_size > 5000
