"""The panel that asks: the label of a segmentation network within a segment, and the form of a method's parameters."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

slicer = pytest.importorskip("slicer")

import slicer_host  # noqa: E402
import slicer_scene  # noqa: E402
from slicer_host import ctk, qt  # noqa: E402

import MedXAILib as mx  # noqa: E402
from MedXAILib.description import describe  # noqa: E402
from MedXAILib.registry import EXPLAINERS  # noqa: E402
from MedXAILib.resources import path  # noqa: E402

NETWORK = path("Models/lung_nodule_segmentation")
# Where to look (i, j, k).
AT = (45, 30, 20)


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    with slicer_host.running(tmp_path_factory.mktemp("slicer")) as host:
        yield host
        host.close()


@pytest.fixture(scope="module")
def module(host):
    widget = host.open("MedXAI")
    host.until(lambda: widget.logic.methods and widget.explainPanel.chooser.model)
    return widget


@pytest.fixture
def mask():
    """A part of the nodule and of what is beside it."""
    mask = np.zeros((40, 60, 90), bool)
    mask[18:24, 24:31, 36:60] = True
    return mask


@pytest.fixture
def scan(host, module):
    """A nodule on a tilted grid, under a transform, before the segmentation network."""
    slicer.mrmlScene.Clear()
    host.process()
    array = np.random.default_rng(3).normal(-850, 40, (40, 60, 90)).astype(np.int16)
    d, h, w = np.ogrid[:40, :60, :90]
    array[(2.5 * (d - 20)) ** 2 + (1.3 * (h - 30)) ** 2 + (0.7 * (w - 45)) ** 2 < 8**2] = 40
    node, *_ = slicer_scene.oblique_node(array)
    # No multiple of the network's 1.25 mm, whose voxels would lie halfway between those of a mask.
    node.SetSpacing(0.73, 1.37, 2.3)
    panel, choices = module.explainPanel, module.explainPanel.parameterNode
    choices.inputVolume, choices.regionKind = node, "point"
    choices.point = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode")
    from MedXAISlicerLib import geometry

    choices.point.AddControlPoint((geometry.ijkToWorld(node) @ (*AT, 1))[:3])
    panel.chooser.choose(str(NETWORK))
    panel.chooser.load()
    host.until(lambda: panel.chooser.model)
    choose(panel.ui.methodSelector, "gradient")
    return node


def choose(box, data):
    """Choose an entry of a combo box, as a person does."""
    index = box.findData(data)
    assert index >= 0, data
    box.setCurrentIndex(index)
    box.activated.emit(index)


def explained(host, panel):
    panel.ui.explainButton.click()
    host.until(lambda: panel.running is None)


def of_library(node, target):
    """What the library makes of the same scan, below its transform."""
    from MedXAISlicerLib import geometry, mrml

    given = mrml.scanOf(node)
    volume = mx.Volume(torch.from_numpy(given["data"].astype(np.float32)), given["affine"])
    at = (geometry.ijkToRas(node) @ (*AT, 1))[:3]
    return mx.explain(mx.load_model(NETWORK), volume, "gradient", target=target, region=tuple(at))


def assert_same(made, expected):
    scale = float(expected.data.abs().max())
    assert scale > 0
    np.testing.assert_allclose(slicer.util.arrayFromVolume(made), expected.data[0], atol=1e-4 * scale)


@pytest.mark.parametrize("place", ["under the transform of the scan", "under none"])
@pytest.mark.parametrize("measure", ["logit", "volume", "dice"])
def test_label_is_explained_within_a_segment(host, module, scan, mask, measure, place):
    from MedXAISlicerLib import geometry, results

    panel = module.explainPanel
    segmentation = slicer_scene.add_segmentation(scan, mask, "lesion")
    if place == "under none":
        segmentation.HardenTransform()
        assert segmentation.GetParentTransformNode() is None
    choose(panel.ui.targetSelector, "nodule")
    choose(panel.ui.withinSelector, "segment")
    assert "Choose the segment" in panel.ui.explainButton.toolTip
    assert not panel.ui.explainButton.enabled
    panel.ui.withinSegmentSelector.setCurrentNode(segmentation)
    choose(panel.ui.measureSelector, measure)
    explained(host, panel)
    assert not panel.ui.statusLabel.text
    (made,) = module.logic.explanations()
    within = mx.Volume(torch.from_numpy(mask[None].astype(np.float32)), geometry.affine(scan))
    expected = of_library(scan, mx.SegmentationTarget("nodule", within, measure))
    assert_same(made, expected)
    said = results.provenance(made)["target"]
    assert {**said, "within": None} == {
        "kind": "SegmentationTarget",
        "which": 1,
        "within": None,
        "measure": measure,
    }
    assert said["within"]["mask"]
    assert made.GetAttribute("MedXAI.TargetLabel") == f"nodule ({measure})"


@pytest.mark.parametrize("within", ["predicted", "everywhere"])
def test_label_is_explained_elsewhere(host, module, scan, within):
    from MedXAISlicerLib import results

    panel = module.explainPanel
    choose(panel.ui.withinSelector, within)
    choose(panel.ui.measureSelector, "volume")
    explained(host, panel)
    (made,) = module.logic.explanations()
    expected = of_library(scan, mx.SegmentationTarget(1, within, "volume"))
    assert_same(made, expected)
    assert results.provenance(made)["target"]["within"] == within


def test_only_segmentation_networks_are_asked_where(host, module, scan):
    panel = module.explainPanel
    rows = ("withinLabel", "withinSelector", "measureLabel", "measureSelector")

    def hidden():
        return [getattr(panel.ui, name).isHidden() for name in (*rows, "withinSegmentSelector")]

    assert hidden() == [False, False, False, False, True]
    choose(panel.ui.withinSelector, "segment")
    assert hidden() == [False] * 5
    panel.chooser.choose(str(path("Models/lung_nodule")))
    panel.chooser.load()
    host.until(lambda: panel.chooser.model)
    assert hidden() == [True] * 5
    # What was left chosen is nothing to a classifier.
    assert panel.ui.explainButton.enabled
    explained(host, panel)
    assert not panel.ui.statusLabel.text
    assert json.loads(module.logic.explanations()[-1].GetAttribute("MedXAI.Provenance"))["target"]["kind"] == (
        "ClassTarget"
    )


def test_a_network_with_a_window_is_asked_about_the_whole_scan(host, module, scan):
    panel = module.explainPanel
    assert "over a whole scan" in panel.ui.modelInfoLabel.text
    panel.parameterNode.regionKind = "whole"
    explained(host, panel)
    assert not panel.ui.statusLabel.text and len(module.logic.explanations()) == 1
    panel.chooser.choose(str(path("Models/lung_nodule")))
    panel.chooser.load()
    host.until(lambda: panel.chooser.model)
    assert "over a whole scan" not in panel.ui.modelInfoLabel.text
    explained(host, panel)
    assert panel.ui.statusLabel.text.endswith("say where to look, such as around a point.")


def test_dice_needs_a_segment(host, module, scan):
    import qt

    panel = module.explainPanel
    box = panel.ui.measureSelector

    def can_be_chosen():
        return bool(box.model().index(box.findData("dice"), 0).flags() & qt.Qt.ItemIsEnabled)

    assert not can_be_chosen()
    choose(panel.ui.withinSelector, "segment")
    assert can_be_chosen()
    choose(box, "dice")
    choose(panel.ui.withinSelector, "everywhere")
    assert panel.parameterNode.labelMeasure == box.itemData(box.currentIndex) == "logit"


def test_choices_are_those_of_the_scene(host, module, scan, mask, tmp_path):
    panel = module.explainPanel
    segmentation = slicer_scene.add_segmentation(scan, mask, "lesion")
    segmentation.GetSegmentation().AddEmptySegment("first", "first")
    choose(panel.ui.withinSelector, "segment")
    panel.ui.withinSegmentSelector.setCurrentNode(segmentation)
    panel.ui.withinSegmentSelector.setCurrentSegmentID("first")
    choose(panel.ui.measureSelector, "dice")
    slicer_scene.save(tmp_path / "scene.mrb")
    slicer.mrmlScene.Clear()
    host.process()
    assert panel.ui.withinSelector.itemData(panel.ui.withinSelector.currentIndex) == "predicted"
    slicer_scene.load(tmp_path / "scene.mrb", tmp_path / "cache")
    host.process()
    host.until(lambda: panel.chooser.path == str(NETWORK))
    panel.chooser.load()
    host.until(lambda: panel.chooser.model)
    ui = panel.ui
    assert ui.withinSelector.itemData(ui.withinSelector.currentIndex) == "segment"
    assert ui.measureSelector.itemData(ui.measureSelector.currentIndex) == "dice"
    assert ui.withinSegmentSelector.currentSegmentID() == panel.parameterNode.withinSegment == "first"
    # An empty segment, which only shows when it is read.
    explained(host, panel)
    assert "The segment 'first' is empty" in ui.statusLabel.text


def test_bent_segment_is_refused(host, module, scan, mask):
    panel = module.explainPanel
    segmentation = slicer_scene.add_segmentation(scan, mask, "lesion")
    bend = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLBSplineTransformNode")
    segmentation.SetAndObserveTransformNodeID(bend.GetID())
    choose(panel.ui.withinSelector, "segment")
    panel.ui.withinSegmentSelector.setCurrentNode(segmentation)
    explained(host, panel)
    assert "harden the transform first" in panel.ui.statusLabel.text


def test_segment_elsewhere_is_said_for_people(host, module, scan, mask):
    panel = module.explainPanel
    segmentation = slicer_scene.add_segmentation(scan, np.roll(mask, 18, axis=0), "lesion")
    choose(panel.ui.withinSelector, "segment")
    panel.ui.withinSegmentSelector.setCurrentNode(segmentation)
    explained(host, panel)
    assert panel.ui.statusLabel.text.endswith("choose another class, or explain it everywhere.")


def test_volumes_of_labels_are_no_probabilities(host, module, scan):
    panel = module.explainPanel
    panel.ui.predictButton.click()
    host.until(lambda: panel.running is None)
    answers = [panel.ui.targetSelector.itemText(i) for i in range(panel.ui.targetSelector.count)]
    assert answers[0] == "The first label beyond the background"
    assert answers[2].startswith("nodule (")
    assert answers[2].endswith(" mL)")


def form(method, values=None):
    from MedXAISlicerLib.panels.parameter_form import ParameterForm

    shown = ParameterForm(lambda: None)
    shown.show(describe(EXPLAINERS[method])["parameters"], values or {}, ["stem", "head"])
    return shown


def line(shown, name):
    import qt

    return shown.widget.findChild(qt.QLineEdit, f"{name}Parameter")


@pytest.mark.parametrize("method, name", [("gradcam", "layers"), ("lrp", "layer")])
def test_layers_are_completed(host, method, name):
    completer = line(form(method), name).completer()
    assert [completer.model().index(i, 0).data() for i in range(completer.model().rowCount())] == ["stem", "head"]


def test_layers_are_suggested_by_the_network(host):
    assert line(form("gradcam"), "layers").placeholderText == "as the network suggests"


def test_files_are_no_layers(host):
    shown = form("gradient_shap")
    background = line(shown, "background")
    assert background.completer() is None
    assert background.placeholderText == background.text == "zero, minimum, mean, blur"
    background.setText("healthy/*.nrrd, mean")
    assert shown.values() == {"background": ["healthy/*.nrrd", "mean"]}
    # Nothing typed is what the placeholder says.
    background.setText("")
    assert shown.values() == {}


def test_numbers_are_typed_with_commas_between(host):
    shown = form("occlusion", {"window": [10.0, 7.5]})
    window = line(shown, "window")
    assert window.text == "10, 7.5" and line(shown, "stride").placeholderText == "as suits the scan"
    window.setText(" 10, 10;5 ")
    assert shown.values() == {"window": [10.0, 10.0, 5.0]} and not shown.problem()
    for wrong in ("ten", "10, 1O", "nan", "1e999"):
        window.setText(wrong)
        assert shown.problem() == "Window: type a number, or several with commas between"
    window.setText("")
    assert shown.values() == {} and not shown.problem()


def typed(panel, name, text):
    """Type into a line of the form, and leave it."""
    window = line(panel.form, name)
    window.setText(text)
    window.editingFinished.emit()


def test_what_is_no_number_is_not_asked(host, module, scan):
    panel = module.explainPanel
    choose(panel.ui.methodSelector, "occlusion")
    typed(panel, "window", "12")
    typed(panel, "window", "twelve")
    said = "Window: type a number, or several with commas between"
    assert panel.ui.statusLabel.text == panel.ui.explainButton.toolTip == said
    assert not panel.ui.explainButton.enabled
    assert json.loads(panel.parameterNode.methodParameters) == {"occlusion": {"window": [12.0]}}
    typed(panel, "window", "9, 9")
    assert panel.ui.explainButton.enabled and not panel.ui.statusLabel.text
    explained(host, panel)
    assert "2 sizes for 3 axes: give one, or one for each axis" in panel.ui.statusLabel.text


@pytest.fixture
def with_regions(module, scan, monkeypatch):
    """A method that wants to know a place, and may be told an organ."""
    text = {"type": "text", "default": "", "choices": [], "open": False, "minimum": None, "maximum": None, "help": "?"}
    where = [{**text, "name": "within", "format": "region"}, {**text, "name": "organ", "format": "mask"}]
    method = module.logic.methods["occlusion"]
    method = {**method, "parameters": [*where, *method["parameters"]]}
    monkeypatch.setitem(module.logic.methods, "occlusion", method)
    choose(module.explainPanel.ui.methodSelector, "occlusion")
    return module.explainPanel


def selectors(panel, name):
    import qt

    row = panel.whereForm.widget.findChild(qt.QWidget, f"{name}Parameter")
    return row.findChild(slicer.qMRMLNodeComboBox), row.findChild(slicer.qMRMLSegmentSelectorWidget)


def test_a_parameter_can_be_a_region_of_the_scene(host, module, scan, mask, with_regions, tmp_path):
    panel = with_regions
    assert not panel.ui.whereWidget.isHidden()
    roi = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsROINode", "Box")
    segmentation = slicer_scene.add_segmentation(scan, mask, "lesion")
    nodes, segments = selectors(panel, "within")
    organs, organ = selectors(panel, "organ")
    assert segments.isHidden() and organs.nodeCount() == 1
    nodes.setCurrentNode(roi)
    assert panel._changedParameters() == {"within": roi}
    added = nodes.addNode("vtkMRMLMarkupsROINode")
    assert panel._changedParameters() == {"within": added} and min(added.GetSize()) > 0
    nodes.setCurrentNode(segmentation)
    organs.setCurrentNode(segmentation)
    assert not segments.isHidden() and not organ.isHidden()
    assert panel._changedParameters() == {"within": (segmentation, "lesion"), "organ": (segmentation, "lesion")}
    organs.setCurrentNode(None)
    choose(panel.ui.methodSelector, "gradient")
    assert panel.ui.whereWidget.isHidden()
    segmentation.SetName("Renamed")
    slicer_scene.save(tmp_path / "scene.mrb")
    slicer.mrmlScene.Clear()
    host.process()
    slicer_scene.load(tmp_path / "scene.mrb", tmp_path / "cache")
    host.process()
    host.until(lambda: panel.chooser.model)
    choose(panel.ui.methodSelector, "occlusion")
    nodes, segments = selectors(panel, "within")
    assert (nodes.currentNode().GetName(), segments.currentSegmentID()) == ("Renamed", "lesion")
    slicer.mrmlScene.RemoveNode(nodes.currentNode())
    assert panel._changedParameters() == {}


def test_regions_are_asked_as_boxes_and_masks(scan, mask):
    from MedXAISlicerLib import geometry, regions

    segmentation = slicer_scene.add_segmentation(scan, mask, "lesion")
    roi = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsROINode")
    regions.placeAroundMiddle(roi, scan)
    assert regions.asParameter(scan, roi) == regions.inVolume(scan, roi)
    given = regions.asParameter(scan, (segmentation, "lesion"))
    place = geometry.ijkToRas(scan) @ (36, 24, 18, 1)
    np.testing.assert_allclose((given["affine"] @ (0, 0, 0, 1))[:3], place[:3], atol=1e-6)
    assert given["data"].shape == (1, 6, 7, 24) and given["data"].all()
    for value in (3, "slic", (10.0, 5.0), [1, 2], ()):
        assert regions.asParameter(scan, value) is value


def test_methods_are_listed_by_what_they_answer_with(module, scan):
    box = module.explainPanel.ui.methodSelector
    listed, heading = {}, ""
    for index in range(box.count):
        method = box.itemData(index)
        heading = heading if method else box.itemText(index)
        if method:
            listed.setdefault(heading, []).append(method)
    assert sorted(m for of_it in listed.values() for m in of_it) == sorted(mx.methods())
    kinds = {heading: {mx.methods()[m].kind for m in of_it} for heading, of_it in listed.items()}
    assert kinds["Where: a map"] == {"SaliencyMap"} and {"tcav", "rcv", "semantic"} <= {*listed["In words: concepts"]}
    assert kinds["In words: a caption"] == {"Caption"} and all(len(of_it) == 1 for of_it in kinds.values())


def test_caption_is_of_no_answer(module, scan, monkeypatch):
    panel, targets = module.explainPanel, []
    box = panel.ui.targetSelector
    choose(box, "nodule")
    choose(panel.ui.methodSelector, "captioning")
    assert not box.enabled and "no answer to choose" in box.toolTip
    monkeypatch.setattr(panel, "_begin", lambda kind, **asked: targets.append(asked["target"]))
    panel.ui.explainButton.click()
    choose(panel.ui.methodSelector, "gradient")
    panel.ui.explainButton.click()
    assert targets == [None, "nodule"]
    assert box.enabled and "to explain" in box.toolTip


def test_examples_are_a_file_that_is_part_of_the_question(host, module, scan, tmp_path):
    panel = module.explainPanel
    choose(panel.ui.methodSelector, "tcav")
    assert not panel.ui.whereWidget.isHidden() and line(panel.form, "examples") is None
    explained(host, panel)
    assert "needs examples of what to look for" in panel.ui.statusLabel.text
    (browse,) = panel.whereForm.widget.findChildren(qt.QToolButton)
    table = tmp_path / "examples.csv"
    table.write_text("volume,bright\nnowhere.nrrd,1\n", encoding="utf-8")
    host.files.append(str(table))
    browse.click()
    assert json.loads(panel.parameterNode.methodParameters)["tcav"] == {"examples": str(table)}
    explained(host, panel)
    assert "nowhere.nrrd" in panel.ui.statusLabel.text
    choose(panel.ui.methodSelector, "gradient")
    assert panel.ui.whereWidget.isHidden()
    choose(panel.ui.methodSelector, "tcav")
    assert panel.whereForm.values() == {"examples": str(table)}


def test_folder_that_was_used_is_offered_again(host, module, scan, monkeypatch, tmp_path):
    panel = module.explainPanel
    text = {"type": "text", "default": "", "choices": [], "open": False, "minimum": None, "maximum": None, "help": "?"}
    for method in ("gradient", "occlusion"):
        known = module.logic.methods[method]
        library = {**text, "name": "library", "format": "folder"}
        with_library = {**known, "parameters": [library, *known["parameters"]]}
        monkeypatch.setitem(module.logic.methods, method, with_library)
    choose(panel.ui.methodSelector, "occlusion")
    (browse,) = panel.whereForm.widget.findChildren(qt.QToolButton)
    assert browse.parent().filters == ctk.ctkPathLineEdit.Dirs
    host.files.append(str(tmp_path))
    browse.click()
    assert panel._changedParameters() == {"library": str(tmp_path)} and "library" not in panel.form.values()
    # As after an answer: these methods have no such parameter in truth, and would be refused.
    panel.whereForm.remember()
    choose(panel.ui.methodSelector, "gradient")
    (box,) = panel.whereForm.widget.findChildren(qt.QComboBox)
    assert [box.itemText(i) for i in range(box.count)] == [str(tmp_path)]
    assert box.currentText == "" and panel._changedParameters() == {}
    box.setCurrentText(box.itemText(0))
    assert panel._changedParameters() == {"library": str(tmp_path)}


@pytest.mark.parametrize("agrees", [True, False])
def test_what_a_method_needs_is_offered_to_be_installed(module, scan, monkeypatch, agrees):
    from types import SimpleNamespace

    from MedXAILib import protocol, worker
    from MedXAILib.errors import MedXAIError, NotInstalled
    from MedXAISlicerLib import install, settings

    panel, asked = module.explainPanel, []

    def ensure(parent=None, also=()):
        asked.extend(also)
        if not agrees:
            raise MedXAIError("MedXAI cannot compute without LanceDB.")

    monkeypatch.setattr(install, "ensure", ensure)
    # As it comes from the worker.
    error = protocol.error(worker._described(NotInstalled("Libraries need LanceDB.", "lancedb>=0.40")))
    panel._failed(SimpleNamespace(error=error))
    assert asked == ["lancedb>=0.40"]
    said = "It is installed: press Explain again." if agrees else "MedXAI cannot compute without LanceDB."
    assert panel.ui.statusLabel.text == said
    settings.set("workerCommand", "ssh gpu-host python -m MedXAILib.worker")
    panel._failed(SimpleNamespace(error=error))
    settings.set("workerCommand", "")
    assert asked == ["lancedb>=0.40"] and panel.ui.statusLabel.text == "Libraries need LanceDB."
    panel._failed(SimpleNamespace(error=MedXAIError("Something else.")))
    assert asked == ["lancedb>=0.40"]
