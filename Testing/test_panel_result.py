"""The panel of a map, clicked through on Slicer's own scene."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

slicer = pytest.importorskip("slicer")
pytest.importorskip("slicer_host")

from slicer_scene import oblique_node  # noqa: E402
from torch import nn  # noqa: E402

import MedXAILib as mx  # noqa: E402

SIZE = (5, 6, 7)  # (D, H, W)


@pytest.fixture
def panel(host):
    from MedXAISlicerLib.panels.result import ResultPanel
    from MedXAISlicerLib.parameters import MedXAIParameterNode

    panel = ResultPanel(logic=None)
    panel.setParameterNode(MedXAIParameterNode(host.scene.AddNewNodeByClass("vtkMRMLScriptedModuleNode")))
    yield panel
    panel.cleanup()


@pytest.fixture
def view(host):
    return host.scene.AddNewNodeByClass("vtkMRMLSliceCompositeNode")


def network(channels: int = 1) -> mx.Model:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Flatten(), nn.Linear(channels * int(np.prod(SIZE)), 3))
    return mx.Model(layers, class_names=("no", "yes", "<b>"), channels=channels, spatial_dims=3)


def scan(channels: int = 1):
    array = np.random.default_rng(0).normal(size=(*SIZE, channels)).astype(np.float32)
    kind = {"nodeClassName": "vtkMRMLVectorVolumeNode"} if channels > 1 else {}
    return oblique_node(array if channels > 1 else array[..., 0], **kind)[0]


def explained(node, target="yes", method="gradient", **parameters):
    """Its map as the panel is given it: shown already."""
    from MedXAISlicerLib import mrml

    return mrml.explain(node, network(parameters.pop("channels", 1)), method, target=target, **parameters)


def legend(node):
    found = slicer.modules.colors.logic().GetColorLegendDisplayNode(node)
    return bool(found is not None and found.GetVisibility())


def opaque(mapNode, value) -> bool:
    """Whether a value of the map is seen in slices."""
    shown = mapNode.GetDisplayNode()
    table = shown.GetColorNode().GetLookupTable()
    low, high = shown.GetWindowLevelMin(), shown.GetWindowLevelMax()
    index = round((value - low) / (high - low) * (table.GetNumberOfTableValues() - 1))
    return table.GetTableValue(index)[3] > 0


def test_without_a_map_it_says_what_to_do(host, panel):
    assert "Choose an explanation" in panel.ui.emptyLabel.text
    assert panel.ui.resultWidget.isHidden() and not panel.ui.emptyLabel.isHidden()
    node = host.scene.AddNewNodeByClass("vtkMRMLTextNode")
    for kind, tab in (("Caption", "Words"), ("SimilarCases", "Cases")):
        node.SetAttribute("MedXAI.Kind", kind)
        panel.show(node)
        assert f"tab {tab}" in panel.ui.emptyLabel.text
        assert panel.ui.resultWidget.isHidden()


def test_headline_is_of_the_map_and_keeps_names_apart_from_markup(host, panel):
    panel.show(explained(scan(), target="<b>"))
    assert "<b>&lt;b&gt;</b> in Scan" in panel.ui.headlineLabel.text
    assert "against it" in panel.ui.headlineLabel.text
    assert "Gradient" in panel.ui.detailsLabel.text
    assert panel.ui.lowLabel.text == "against <b>" and panel.ui.highLabel.text == "for <b>"
    panel.show(explained(scan(), method="vargrad", samples=2))
    assert "against" not in panel.ui.headlineLabel.text + panel.ui.lowLabel.text
    assert not panel.ui.resultWidget.isHidden() and panel.ui.emptyLabel.isHidden()
    assert "What speaks for 'yes'" in panel.ui.summaryText.plainText


def test_how_sure_it_is_is_said_and_saved(host, panel, tmp_path):
    from MedXAISlicerLib import answers, mrml, results, saving

    node = scan()
    made = answers.of(mx.explain(network(), mx.Volume(torch.rand(1, *SIZE), np.eye(4)), "gradient", target="yes"))
    half = np.abs(made.map) / 4
    affine = mrml.scanOf(node)["affine"]
    manifest = {**made.manifest, "intervals": ["interval.nrrd"]}
    manifest["provenance"] = {**made.provenance, "partial": True, "notes": ["a < b"]}
    images = {"map.nrrd": (made.map, affine), "interval.nrrd": (half, affine)}
    (mapNode,) = mrml.addAnswers(node, [answers.Answer(manifest, images)])
    panel.show(mapNode)
    note, sure = panel.ui.notesLabel.text.split("<br>")
    assert note == "a &lt; b" and sure.startswith(f"95 % interval: ± {half.max():.2g} at the strongest voxel")
    assert panel.ui.headlineLabel.text.startswith("<b>Partial:</b> ")
    back = mx.load_explanation(saving.save(mapNode, tmp_path / "saved"))
    assert torch.equal(back.interval, torch.from_numpy(half)[None]) and back.provenance.partial
    panel.show(explained(scan()))
    assert panel.ui.notesLabel.isHidden() and "Partial" not in panel.ui.headlineLabel.text
    interval = results.part(mapNode, "Interval")
    from MedXAISlicerLib import deleting

    deleting.delete(mapNode)
    assert interval.GetScene() is None


def test_opacity_is_that_of_the_views_and_of_the_scene(host, panel, view):
    panel.show(explained(scan()))
    assert panel.ui.opacitySlider.value == pytest.approx(view.GetForegroundOpacity())
    panel.ui.opacitySlider.value = 0.35
    assert view.GetForegroundOpacity() == pytest.approx(0.35)
    assert panel.parameterNode.opacity == pytest.approx(0.35)
    panel.show(explained(scan(), target="no"))
    assert panel.ui.opacitySlider.value == pytest.approx(0.35)
    panel.parameterNode.opacity = 0.8
    assert view.GetForegroundOpacity() == pytest.approx(0.8)


def test_threshold_hides_what_is_fainter_and_belongs_to_the_map(host, panel):
    one, other = explained(scan()), explained(scan(), target="no")
    limit = one.GetDisplayNode().GetWindowLevelMax()
    shared = other.GetDisplayNode().GetColorNode()
    panel.show(one)
    # To look at a map changes nothing of it.
    assert one.GetDisplayNode().GetColorNode() is shared
    assert opaque(one, 0.4 * limit) and opaque(one, -0.4 * limit)
    before = panel.ui.colourBar.styleSheet
    panel.ui.thresholdSlider.value = 0.5
    assert not opaque(one, 0.4 * limit) and not opaque(one, -0.4 * limit)
    assert opaque(one, 0.6 * limit) and opaque(one, -0.6 * limit)
    assert panel.ui.colourBar.styleSheet != before
    assert panel.parameterNode.threshold == pytest.approx(0.5)
    panel.show(other)
    assert panel.ui.thresholdSlider.value == pytest.approx(0.2)
    assert other.GetDisplayNode().GetColorNode() is shared
    panel.show(one)
    assert panel.ui.thresholdSlider.value == pytest.approx(0.5)


def test_legend_and_cloud_come_and_go(host, panel):
    made = explained(scan())
    cloud = slicer.modules.volumerendering.logic().GetFirstVolumeRenderingDisplayNode
    panel.show(made)
    assert panel.ui.legendCheckBox.checked and legend(made)
    assert not panel.ui.cloudCheckBox.checked
    panel.ui.legendCheckBox.click()
    panel.ui.cloudCheckBox.click()
    assert not legend(made)
    assert cloud(made).GetVisibility()
    panel.show(made)
    assert panel.ui.cloudCheckBox.checked and not panel.ui.legendCheckBox.checked
    panel.ui.legendCheckBox.click()
    panel.ui.cloudCheckBox.click()
    assert legend(made)
    assert not cloud(made).GetVisibility()


def test_hot_spots_are_those_of_the_table_and_lead_to_the_strongest(host, panel):
    made = explained(scan())
    view = host.scene.AddNode(slicer.vtkMRMLSliceNode())
    view.JumpSliceByCentering(0, 0, 0)
    panel.show(made)
    table, array = panel.ui.spotsTable, slicer.util.arrayFromVolume(made)
    assert table.rowCount == 3
    assert float(table.item(2, 3).text()) == pytest.approx(array.max(), rel=1e-2)
    spots = panel.node.GetNodeReference("MedXAI.HotSpots")
    ids = spots.GetSegmentation().GetSegmentIDs()
    panel.ui.peakButton.click()
    k, j, i = np.unravel_index(array.argmax(), array.shape)
    strongest = (slicer.util.arrayFromVTKMatrix(_toWorld(made)) @ (i, j, k, 1))[:3]
    np.testing.assert_allclose(_middle(view), strongest, atol=1e-6)
    view.JumpSliceByCentering(0, 0, 0)
    table.selectRow(2)
    np.testing.assert_allclose(_middle(view), strongest, atol=1e-6)
    assert [spots.GetDisplayNode().GetSegmentVisibility2DOutline(i) for i in ids] == [False, False, True]
    panel.ui.outlineCheckBox.click()
    panel.ui.surfaceCheckBox.click()
    assert not spots.GetDisplayNode().GetVisibility2D()
    assert not spots.GetDisplayNode().GetVisibility3D()


def _middle(sliceNode):
    return [sliceNode.GetSliceToRAS().GetElement(axis, 3) for axis in range(3)]


def _toWorld(node):
    import vtk

    toRas, toWorld = vtk.vtkMatrix4x4(), vtk.vtkMatrix4x4()
    node.GetIJKToRASMatrix(toRas)
    node.GetParentTransformNode().GetMatrixTransformToWorld(toWorld)
    vtk.vtkMatrix4x4.Multiply4x4(toWorld, toRas, toWorld)
    return toWorld


def test_hot_spots_that_are_gone_or_without_surface_are_not_offered(host, panel, monkeypatch):
    from MedXAISlicerLib import hotspots, results

    monkeypatch.setattr(hotspots, "_LARGEST_SURFACE", 0)
    made = explained(scan())
    panel.show(made)
    assert not panel.ui.surfaceCheckBox.enabled
    assert "Segmentations" in panel.ui.surfaceCheckBox.toolTip
    assert not panel.ui.spotsButton.isHidden()
    host.scene.RemoveNode(results.part(made, "HotSpots"))
    assert panel.ui.spotsButton.isHidden()
    assert panel.node is made


def test_channels_are_offered_where_there_are_several(host, panel, view):
    panel.show(explained(scan()))
    assert panel.ui.channelComboBox.isHidden()
    made = explained(scan(2), channels=2, per_channel=True)
    panel.show(made)
    box = panel.ui.channelComboBox
    assert not box.isHidden() and box.count == 3
    kept = slicer.util.arrayFromVolume(made.GetNodeReference("MedXAI.Channels"))
    for index in (2, 1):
        box.currentIndex = index
        box.activated.emit(index)
        shown = host.scene.GetNodeByID(view.GetForegroundVolumeID())
        np.testing.assert_array_equal(slicer.util.arrayFromVolume(shown), kept[..., index - 1])
    panel.show(made)
    assert box.currentIndex == 1
    box.activated.emit(0)
    assert view.GetForegroundVolumeID() == made.GetID()


def test_other_answers_to_the_same_question_are_one_click_away(host, panel, view):
    node = scan()
    yes = explained(node)
    panel.show(yes)
    assert panel.ui.answerComboBox.isHidden()
    no, otherMethod, otherScan = explained(node, "no"), explained(node, "no", "smoothgrad"), explained(scan(), "no")
    panel.show(yes)
    box = panel.ui.answerComboBox
    assert not box.isHidden()
    assert [box.itemText(i) for i in range(box.count)] == ["yes", "no"] and box.currentIndex == 0
    box.activated.emit(1)
    assert panel.node is no and panel.parameterNode.explanation is no
    assert view.GetForegroundVolumeID() == no.GetID()
    assert box.currentText == "no"
    for alone in (otherMethod, otherScan):
        panel.show(alone)
        assert box.isHidden()


def test_two_maps_of_one_scan_are_compared(host, panel):
    from MedXAISlicerLib import layouts

    node = scan()
    one, other, elsewhere = explained(node), explained(node, "no"), explained(scan())
    panel.show(one)
    button = panel.ui.compareButton
    for refused in (None, one, elsewhere):
        panel.ui.comparedSelector.setCurrentNode(refused)
        assert not button.enabled and "Choose another map" in button.toolTip
    panel.ui.comparedSelector.setCurrentNode(other)
    assert panel.parameterNode.compared is other
    assert button.enabled
    panel.ui.opacitySlider.value = 0.9
    button.click()
    assert layouts.current() == "maps" and button.checked
    shown = {
        composite.GetForegroundVolumeID(): composite.GetForegroundOpacity()
        for composite in slicer.util.getNodesByClass("vtkMRMLSliceCompositeNode")
        if composite.GetSingletonTag() and composite.GetSingletonTag().startswith("MedXAI")
    }
    assert shown == {one.GetID(): 0.9, other.GetID(): 0.9}
    button.click()
    assert layouts.current() is None and not button.checked
    button.click()
    panel.show(other)
    assert layouts.current() is None and not button.checked


def test_button_follows_the_layout(host, panel):
    from MedXAISlicerLib import layouts

    node = scan()
    one, other = explained(node), explained(node, "no")
    panel.show(one)
    panel.ui.comparedSelector.setCurrentNode(other)
    panel.ui.compareButton.click()
    layouts.leave()
    assert not panel.ui.compareButton.checked


def test_saved_map_is_read_by_the_library(host, panel, tmp_path):
    for made in (explained(scan()), explained(scan(2), channels=2, per_channel=True)):
        panel.show(made)
        host.files.append(str(tmp_path))
        panel.ui.saveButton.click()
        loaded = mx.load_explanation(tmp_path / made.GetName())
        kept = made.GetNodeReference("MedXAI.Channels")
        array = slicer.util.arrayFromVolume(kept or made)
        expected = np.moveaxis(array, -1, 0) if kept else array[None]
        np.testing.assert_array_equal(loaded.data.numpy(), expected)
        assert loaded.provenance.model_dump(mode="json") == json.loads(made.GetAttribute("MedXAI.Provenance"))
        # Its voxels lie where they did below the transform of the scan: as in a file of the scan.
        place = slicer.util.arrayFromVTKMatrix(_toRas(made)) @ (3, 2, 1, 1)
        np.testing.assert_allclose(mx.Volume(loaded.data, loaded.affine).to_point((1, 2, 3)), place[:3], atol=1e-4)
        image = loaded.to_sitk()
        np.testing.assert_allclose(np.diag([-1, -1, 1]) @ image.TransformIndexToPhysicalPoint((3, 2, 1)), place[:3])
        assert host.dialogs[-1][0] == "info"


def _toRas(node):
    import vtk

    matrix = vtk.vtkMatrix4x4()
    node.GetIJKToRASMatrix(matrix)
    return matrix


def test_what_cannot_be_saved_is_said(host, panel, tmp_path):
    made = explained(scan())
    panel.show(made)
    panel.ui.saveButton.click()  # nothing chosen
    assert not host.dialogs
    for folder in (tmp_path / "nowhere", tmp_path):
        (tmp_path / made.GetName()).mkdir(exist_ok=True)
        host.files.append(str(folder))
        panel.ui.saveButton.click()
        kind, text = host.dialogs.pop()
        assert kind == "error" and "choose another folder" in text
    assert not list((tmp_path / made.GetName()).iterdir())


def test_delete_asks_first_and_leaves_the_scan(host, panel):
    node = scan()
    made = explained(node)
    panel.show(made)
    host.reply = False
    panel.ui.deleteButton.click()
    assert panel.node is made and made.GetScene() is host.scene
    host.reply = True
    panel.ui.deleteButton.click()
    assert made.GetScene() is None and node.GetScene() is host.scene
    assert panel.node is None and not panel.ui.emptyLabel.isHidden()
    assert [kind for kind, _ in host.dialogs] == ["confirm", "confirm"]


def test_it_follows_the_scene(host, panel):
    node = scan()
    made, other = explained(node), explained(node, "no")
    panel.show(made)
    assert not panel.ui.answerComboBox.isHidden()
    host.scene.RemoveNode(other)
    assert panel.ui.answerComboBox.isHidden()
    host.scene.RemoveNode(node)
    assert panel.node is made and "not in the scene any more" in panel.ui.headlineLabel.text
    host.scene.RemoveNode(made)
    assert panel.node is None and panel.ui.resultWidget.isHidden()
    panel.show(explained(scan()))
    panel.setParameterNode(None)
    host.scene.Clear()
    assert panel.node is None and panel.ui.resultWidget.isHidden()


def test_map_of_nothing_is_shown(host, panel):
    from MedXAISlicerLib import hotspots

    made = explained(scan())
    slicer.util.arrayFromVolume(made)[:] = 0
    slicer.util.arrayFromVolumeModified(made)
    hotspots.addHotSpots(made)
    panel.show(made)
    assert panel.ui.spotsTable.item(0, 1).text() == "0.00"
    panel.ui.spotsTable.selectRow(0)


def test_picture(host, panel, tmp_path):
    panel.show(explained(scan()))
    assert host.picture(panel.widget, tmp_path / "result.png", width=460).stat().st_size > 5000
