"""The module as a person uses it: opened, clicked through, saved and loaded again, on a real scan and a real worker."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageChops

slicer = pytest.importorskip("slicer")

import slicer_host  # noqa: E402
import slicer_scene  # noqa: E402
import small_explanations  # noqa: E402
from slicer_host import ctk  # noqa: E402

import MedXAILib as mx  # noqa: E402
from MedXAILib.resources import path  # noqa: E402
from MedXAILib.run import Run  # noqa: E402

NODULE = (21.9, 120.5, -611.5)


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    with slicer_host.running(tmp_path_factory.mktemp("slicer")) as host:
        yield host
        host.close()


@pytest.fixture(scope="module")
def module(host):
    """The module's widget, opened once: a person does not restart Slicer for each scan either."""
    widget = host.open("MedXAI")
    host.until(lambda: widget.logic.methods and widget.explainPanel.chooser.model)
    return widget


@pytest.fixture
def scan(host, module):
    """A chest CT, just loaded into an empty scene, and looked at around its nodule."""
    slicer.mrmlScene.Clear()
    host.dialogs.clear()
    host.reply = True
    node = slicer_scene.read_volume(path("SampleData/chest_ct_nodule.nrrd"), "Chest CT")
    node.GetDisplayNode().AutoWindowLevelOff()
    node.GetDisplayNode().SetWindowLevelMinMax(-1350, 150)
    choices = module.explainPanel.parameterNode
    choices.inputVolume = node
    choices.regionKind = "point"
    choices.point = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", "Look here")
    choices.point.AddControlPoint(NODULE)
    module.explainPanel.setParameterNode(choices)
    host.until(lambda: module.explainPanel.chooser.model)
    return node


def choose(box, data):
    """Choose an entry of a combo box, as a person does."""
    index = box.findData(data)
    assert index >= 0, data
    box.setCurrentIndex(index)
    box.activated.emit(index)


def press(button):
    assert button.enabled, button.toolTip
    button.click()


def explained(host, module, method="hirescam", target="malignant", **parameters):
    """Press Explain and wait for what comes of it."""
    panel = module.explainPanel
    choose(panel.ui.methodSelector, method)
    choose(panel.ui.targetSelector, target)
    panel.parameterNode.methodParameters = json.dumps({method: parameters})
    press(panel.ui.explainButton)
    host.until(lambda: panel.running is None)
    assert not panel.ui.statusLabel.text, panel.ui.statusLabel.text
    return module.logic.explanations()[-1]


def begun(host, panel):
    """Press Explain for something long, and wait until it computes."""
    choose(panel.ui.methodSelector, "integrated_gradients")
    slow = {"steps": 1000, "max_steps": 10000, "tolerance": 1e-9}
    panel.parameterNode.methodParameters = json.dumps({"integrated_gradients": slow})
    press(panel.ui.explainButton)
    host.until(lambda: panel.running.progress is not None and panel.running.progress.done)


def nodes():
    return {slicer.mrmlScene.GetNthNode(i).GetID() for i in range(slicer.mrmlScene.GetNumberOfNodes())}


def test_scan_is_explained(host, module, scan):
    panel = module.explainPanel
    press(panel.ui.predictButton)
    host.until(lambda: panel.running is None)
    answers = [panel.ui.targetSelector.itemText(i) for i in range(panel.ui.targetSelector.count)]
    assert answers[-1].startswith("malignant (99.")
    assert answers[0] == "What it predicts: malignant"
    made = explained(host, module)
    # What it said was about that place.
    panel.parameterNode.regionKind = "whole"
    assert panel.ui.targetSelector.itemText(0) == "What it predicts"
    assert np.linalg.norm(np.subtract(peak(made), NODULE)) < 15
    assert module.ui.explanationSelector.currentNode() is made
    assert made.GetAttribute("MedXAI.TargetLabel") == "malignant"
    assert not host.dialogs


def peak(mapNode):
    from MedXAISlicerLib import geometry

    return geometry.peak(mapNode)


def test_scripts_get_the_scores(module, scan):
    scores = module.logic.predict(scan, path("Models/lung_nodule"), region=NODULE)
    assert scores["malignant"] == pytest.approx(0.9995, abs=1e-3)


def test_history_brings_an_explanation_back(host, module, scan):
    first, second = explained(host, module), explained(host, module, "gradcam", "benign")
    assert module.explainPanel.parameterNode.explanation is second
    module.ui.explanationSelector.setCurrentNode(first)
    host.process()
    from MedXAISlicerLib import results

    shown = [results.part(node, "HotSpots").GetDisplayNode().GetVisibility() for node in (first, second)]
    assert shown == [1, 0]


def test_parameters_are_those_of_the_form(host, module, scan):
    panel = module.explainPanel
    choose(panel.ui.methodSelector, "smoothgrad")
    import qt

    panel.form.widget.findChild(qt.QSpinBox, "samplesParameter").setValue(3)
    made = explained(host, module, "smoothgrad", **json.loads(panel.parameterNode.methodParameters)["smoothgrad"])
    assert json.loads(made.GetAttribute("MedXAI.Provenance"))["parameters"]["samples"] == 3
    choose(panel.ui.methodSelector, "gradcam")
    choose(panel.ui.methodSelector, "smoothgrad")
    assert panel.form.values() == {"samples": 3}


def test_cancel_leaves_the_scene_as_it_was(host, module, scan):
    panel, before = module.explainPanel, nodes()
    begun(host, panel)
    assert panel.ui.explainButton.text == "Cancel"
    assert not panel.ui.progressBar.isHidden()
    press(panel.ui.explainButton)
    host.until(lambda: panel.running is None)
    assert panel.ui.explainButton.text == "Explain"
    assert "Cancelled" in panel.ui.statusLabel.text
    assert nodes() == before


def occluding(host, panel, window=2.5, stride=2.5):
    """Press Explain for a method that covers one window after the other, and wait until something of it is shown."""
    choose(panel.ui.methodSelector, "occlusion")
    choose(panel.ui.targetSelector, "malignant")
    panel.parameterNode.methodParameters = json.dumps({"occlusion": {"window": [window], "stride": [stride]}})
    press(panel.ui.explainButton)
    assert panel.ui.explainButton.text == "Cancel"
    host.until(lambda: panel.running.canFinish)


def test_map_so_far_is_kept(host, module, scan):
    panel, result = module.explainPanel, module.panels[0]
    occluding(host, panel)
    assert panel.ui.explainButton.text == "Stop and keep the map"
    assert "marked as partial" in panel.ui.explainButton.toolTip
    assert panel.ui.progressBar.maximum > panel.ui.progressBar.value > 0
    press(panel.ui.explainButton)
    # What still has to be computed can be left.
    assert panel.ui.explainButton.text == "Discard"
    assert "keep the map" in panel.ui.statusLabel.text
    host.until(lambda: panel.running is None)
    assert panel.ui.explainButton.text == "Explain"
    assert "the map is partial" in panel.ui.statusLabel.text
    (made,) = module.logic.explanations()
    assert module.ui.explanationSelector.currentNode() is made and made.GetName().endswith("(partial)")
    assert result.ui.headlineLabel.text.startswith("<b>Partial:</b> What speaks for")
    assert result.ui.notesLabel.text.startswith("Stopped early, at step") and not result.ui.notesLabel.isHidden()
    host.reply = True
    press(result.ui.deleteButton)
    assert "malignant (partial)" in host.dialogs[-1][1] and not module.logic.explanations()


def test_what_if_a_region_were_replaced(host, module, scan):
    """A box of the scene around the nodule, without which the network says something else; then a segment."""
    panel, result = module.explainPanel, module.panels[0]
    choose(panel.ui.methodSelector, "counterfactual_infill")
    choose(panel.ui.targetSelector, "malignant")
    assert not panel.ui.explainButton.enabled
    assert panel.ui.explainButton.toolTip == "Within: choose a region of interest or a segment first"
    roi = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsROINode", "Nodule")
    roi.SetCenter(NODULE)
    roi.SetSize(30, 30, 30)
    nodule = slicer_scene.read_volume(path("SampleData/chest_ct_nodule_mask.nrrd"), "Mask")
    segmentation = slicer_scene.add_segmentation(scan, slicer.util.arrayFromVolume(nodule) > 0, "Nodule")
    for chosen in (roi, segmentation):
        panel.whereForm.widget.findChild(slicer.qMRMLNodeComboBox).setCurrentNode(chosen)
        press(panel.ui.explainButton)
        host.until(lambda: panel.running is None)
        made = module.logic.explanations()[-1]
        (was, now) = re.search(r"malignant: ([\d.]+) → ([\d.]+) with this region", result.ui.notesLabel.text).groups()
        if chosen is roi:
            assert float(was) > 0.99 and float(now) < 0.5
            asked = json.loads(made.GetAttribute("MedXAI.Provenance"))["parameters"]["within"]
            np.testing.assert_allclose(asked, [np.subtract(NODULE, 15), np.add(NODULE, 15)])
        else:
            # Its voxels, but for those at its border, where the network's grid is another.
            drawn, there = (slicer.util.arrayFromVolume(node) != 0 for node in (nodule, made))
            assert 2 * (there & drawn).sum() / (there.sum() + drawn.sum()) > 0.75


def test_map_so_far_is_discarded(host, module, scan):
    panel, before = module.explainPanel, nodes()
    occluding(host, panel)
    press(panel.ui.explainButton)
    press(panel.ui.explainButton)
    assert panel.ui.explainButton.text == "Cancel"
    host.until(lambda: panel.running is None)
    assert "the scene is as it was" in panel.ui.statusLabel.text
    left = {slicer.mrmlScene.GetNodeByID(node_id).GetName() for node_id in nodes() - before}
    assert left <= {"MedXAI signed", "MedXAI unsigned"}


@pytest.mark.parametrize("way", ["scan removed", "scene closed"])
def test_scan_gone_in_mid_run(host, module, scan, way):
    panel = module.explainPanel
    begun(host, panel)
    if way == "scan removed":
        slicer.mrmlScene.RemoveNode(scan)
    else:
        slicer.mrmlScene.Clear()
    host.until(lambda: panel.running is None)
    assert "removed while" in panel.ui.statusLabel.text
    assert not module.logic.explanations()
    assert not panel.ui.explainButton.enabled
    assert "scan" in panel.ui.explainButton.toolTip


def test_another_scene_has_its_own_choices(host, module, scan):
    """The panel shows what the scene says, not what was chosen in the scene before."""
    panel = module.explainPanel
    choose(panel.ui.methodSelector, "integrated_gradients")
    slicer.mrmlScene.Clear()
    host.process()
    box = panel.ui.methodSelector
    assert box.itemData(box.currentIndex) == panel.parameterNode.method == "gradcam"
    assert "fuse" in panel.form._rows


def test_what_is_lacking_is_said(host, module, scan):
    panel, choices = module.explainPanel, module.explainPanel.parameterNode
    choices.regionKind = "roi"
    assert not panel.ui.explainButton.enabled
    assert "where to look" in panel.ui.explainButton.toolTip
    choices.regionKind = "whole"
    assert panel.ui.explainButton.enabled
    choices.inputVolume = None
    assert "Choose a scan" in panel.ui.explainButton.toolTip


def test_point_is_placed_with_a_click(host, module, scan):
    panel = module.explainPanel
    press(panel.ui.pointButton)
    selection = slicer.mrmlScene.GetFirstNodeByClass("vtkMRMLSelectionNode")
    assert selection.GetActivePlaceNodeID() == panel.parameterNode.point.GetID()
    interaction = slicer.mrmlScene.GetFirstNodeByClass("vtkMRMLInteractionNode")
    assert interaction.GetCurrentInteractionMode() == interaction.Place
    # The point there was is gone: there can be only one.
    assert not panel.parameterNode.point.GetNumberOfControlPoints()
    press(panel.ui.explainButton)
    host.until(lambda: panel.running is None)
    assert "has no point: place one" in panel.ui.statusLabel.text


def test_new_region_of_interest_lies_in_the_scan(host, module, scan):
    panel = module.explainPanel
    roi = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLMarkupsROINode")
    panel._roiAdded(roi)
    bounds = np.zeros(6)
    scan.GetRASBounds(bounds)
    np.testing.assert_allclose(roi.GetCenter(), bounds.reshape(3, 2).mean(axis=1))


@pytest.mark.parametrize("allowed", [True, False])
def test_code_of_a_network_is_asked_about_once(host, module, scan, tmp_path, allowed):
    bundle = tmp_path / "own code"
    shutil.copytree(path("Models/lung_nodule"), bundle)
    configuration = bundle / "configs" / "inference.json"
    said = json.loads(configuration.read_text(encoding="utf-8"))
    own = {"_target_": "Lambdad", "keys": "image", "func": f"$lambda x: x if {allowed} else x"}
    said["preprocessing"]["transforms"].append(own)
    configuration.write_text(json.dumps(said), encoding="utf-8")
    panel = module.explainPanel
    host.reply = allowed
    host.files.append(str(bundle))
    choose(panel.ui.modelSelector, "folder")
    host.until(lambda: host.dialogs)
    ((_, asked),) = host.dialogs
    assert "let it run only if you trust its maker" in asked
    if allowed:
        host.until(lambda: panel.chooser.model)
        made = explained(host, module)
        assert json.loads(made.GetAttribute("MedXAI.Provenance"))["model"]["source"] == str(bundle)
        from MedXAISlicerLib import settings

        assert settings.get("recentModels")[0] == str(bundle)
        panel.chooser.load()
        host.until(lambda: panel.chooser.model)
        assert len(host.dialogs) == 1
    else:
        host.process()
        assert panel.chooser.model is None
    choose(panel.ui.modelSelector, str(path("Models/lung_nodule")))
    host.until(lambda: panel.chooser.model)


def test_path_can_be_typed(host, module, scan, monkeypatch):
    import qt

    panel = module.explainPanel
    monkeypatch.setattr(qt.QInputDialog, "getText", lambda *_: ("/far/away/bundle", True))
    choose(panel.ui.modelSelector, "path")
    host.until(lambda: "There is no model '/far/away/bundle'" in panel.ui.modelInfoLabel.text)
    choose(panel.ui.modelSelector, str(path("Models/lung_nodule")))
    host.until(lambda: panel.chooser.model)


def test_saved_scene_comes_back(host, module, scan, tmp_path):
    first, second = explained(host, module), explained(host, module, "gradcam")
    from MedXAISlicerLib import layouts

    layouts.compareMaps(first, second)
    names = {first.GetName(), second.GetName()}
    array, text = slicer.util.arrayFromVolume(second).copy(), module.explainPanel.parameterNode.methodParameters
    bundle = tmp_path / "scene.mrb"
    slicer_scene.save(bundle)
    slicer.mrmlScene.Clear()
    host.process()
    assert module.ui.explanationSelector.currentNode() is None
    slicer_scene.load(bundle, tmp_path / "cache")
    host.process()
    choices = module.explainPanel.parameterNode
    np.testing.assert_array_equal(slicer.util.arrayFromVolume(choices.explanation), array)
    assert choices.inputVolume.GetName() == "Chest CT"
    assert choices.methodParameters == text
    assert choices.method == "gradcam"
    assert layouts.current() == "maps"
    compared = [n for n in slicer.util.getNodesByClass("vtkMRMLSliceCompositeNode") if "Maps" in n.GetLayoutName()]
    shown = {slicer.mrmlScene.GetNodeByID(node.GetForegroundVolumeID()).GetName() for node in compared}
    assert shown == names
    layouts.leave()


def test_closing_a_scene_leaves_a_comparison(host, module, scan):
    from MedXAISlicerLib import layouts

    before = slicer.app.layoutManager().layout
    layouts.compareMaps(explained(host, module), explained(host, module, "gradcam"))
    assert slicer.app.layoutManager().layout != before
    slicer.mrmlScene.Clear()
    host.process()
    assert slicer.app.layoutManager().layout == before


def test_scan_that_is_there_is_chosen_when_the_module_is_opened(host, module, scan):
    explained(host, module)
    module.explainPanel.parameterNode.inputVolume = None
    module.enter()
    assert module.explainPanel.parameterNode.inputVolume is scan


def test_two_scans_as_channels(host, module, scan):
    """The form offers as many scans as the network has channels."""
    panel = module.explainPanel
    panel.chooser.model = {**panel.chooser.model, "channels": 3}
    panel._fillChannels()
    layout = panel.ui.channelsWidget.layout()
    assert layout.count() == 2
    other = slicer.util.addVolumeFromArray(slicer.util.arrayFromVolume(scan), name="Other")
    layout.itemAt(0).widget().setCurrentNode(other)
    assert panel.parameterNode.moreChannels == [other]
    # It is not on the grid of the scan.
    press(panel.ui.explainButton)
    assert "'Other' is not on the grid of 'Chest CT'" in panel.ui.statusLabel.text
    panel.parameterNode.moreChannels = []
    panel.chooser.load()
    host.until(lambda: panel.chooser.model)


def test_folder_of_an_explanation_is_opened(host, module, scan, tmp_path):
    whole = mx.load_volume(path("SampleData/chest_ct_nodule.nrrd"))
    made = mx.explain(mx.load_model(path("Models/lung_nodule")), whole, "hirescam", "malignant", region=NODULE)
    host.files += [str(made.save(tmp_path / "explanation")), str(tmp_path)]
    press(module.ui.openButton)
    host.process()
    opened = module.ui.explanationSelector.currentNode()
    np.testing.assert_array_equal(slicer.util.arrayFromVolume(opened), made.data[0])
    press(module.ui.openButton)
    assert "holds no explanation" in host.dialogs[-1][1]
    other = slicer.util.addVolumeFromArray(np.zeros((3, 4, 5)), name="Other")
    module.explainPanel.parameterNode.inputVolume = other
    host.files.append(str(tmp_path / "explanation"))
    press(module.ui.openButton)
    assert "is not on the grid of 'Other'" in host.dialogs[-1][1]
    assert module.logic.explanations() == [opened]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Computed nodules that the demo network has embedded."""
    pytest.importorskip("lancedb")
    from MedXAILib.cases.demo import demo_library

    folder = tmp_path_factory.mktemp("cases") / "library"
    demo_library(mx.load_model(path("Models/lung_nodule")), Run(), folder, rounds=2)
    return folder


def similar(host, module, library):
    """The cases of a library that is chosen as a person does."""
    panel = module.explainPanel
    choose(panel.ui.methodSelector, "similar_cases")
    choose(panel.ui.targetSelector, "malignant")
    host.files.append(str(library))
    press(panel.whereForm.widget.findChild(ctk.ctkPathLineEdit, "libraryParameter")._browse)
    press(panel.ui.explainButton)
    host.until(lambda: panel.running is None)
    assert not panel.ui.statusLabel.text
    return panel.parameterNode.explanation


def test_similar_cases_of_a_library_are_beside_the_scan(host, module, scan, library):
    from MedXAISlicerLib import cases, geometry, layouts

    shown = module.panels[2]
    said = cases.read(similar(host, module, library))
    assert {case["role"] for case in said["cases"]} >= {"alike", "unlike"}
    assert said["scored"] == "cosine similarity" and shown.ui.textLabel.text == said["text"]
    for case in said["cases"]:
        # What is alike is the nodule, here and there.
        assert np.linalg.norm(np.subtract(geometry.peak(case["query_map"]), NODULE)) < 15
        assert np.linalg.norm(np.subtract(geometry.peak(case["map"]), case["place"])) < 1e-2
    press(shown.ui.showBesideButton)
    assert layouts.current() == "cases"
    press(shown.ui.showBesideButton)
    line = module.explainPanel.whereForm.widget.findChild(ctk.ctkPathLineEdit, "libraryParameter")
    assert line._edit.itemText(0) == str(library)


def test_self_test_of_the_module(host, module, monkeypatch):
    monkeypatch.setattr(slicer.util, "loadVolume", lambda file: slicer_scene.read_volume(Path(file), "CT"))
    slicer.selfTests["MedXAI"]()
    assert len(module.logic.explanations()) == 1


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return Path(os.environ.get("MEDXAI_PICTURES") or tmp_path_factory.mktemp("pictures"))


@slicer_scene.needs_graphics
def test_pictures(host, module, scan, library, pictures):
    """What the documentation shows."""
    from MedXAISlicerLib import answers, layouts, mrml

    def picture(panel, name):
        module.ui.panelsTabWidget.setCurrentIndex(module.panels.index(panel) if panel in module.panels else 0)
        host.process()
        trim(host.picture(panel.widget, pictures / f"panel-{name}.png"))

    panel, (result, words, cases, variants, trust) = module.explainPanel, module.panels
    press(panel.ui.predictButton)
    host.until(lambda: panel.running is None)
    first = explained(host, module, "integrated_gradients")
    second = explained(host, module)
    press(trust.ui.checkButton)
    host.until(lambda: trust.checker.running is None)
    picture(trust, "trust")
    module.ui.panelsTabWidget.setCurrentIndex(0)
    host.window(pictures / "slicer-window.png")
    for node in slicer.util.getNodesByClass("vtkMRMLSliceNode"):
        width, height, depth = node.GetFieldOfView()
        node.SetFieldOfView(width / 3, height / 3, depth)
    module.logic.show(panel.parameterNode.explanation)
    window(host, pictures / "slicer-window.png")
    picture(panel, "explain")
    picture(result, "result")
    module.ui.settingsCollapsibleButton.collapsed = False
    picture(module.settingsPanel, "settings")
    module.ui.settingsCollapsibleButton.collapsed = True
    occluding(host, panel, 8, 4)
    host.until(lambda: panel.running.progress.done >= 250)
    press(panel.ui.explainButton)
    host.until(lambda: panel.running is None)
    module.ui.panelsTabWidget.setCurrentIndex(0)
    host.process()
    window(host, pictures / "slicer-partial.png")
    layouts.compareMaps(first, second)
    host.window(pictures / "slicer-maps.png")
    for node in slicer.util.getNodesByClass("vtkMRMLSliceNode"):
        width, height, depth = node.GetFieldOfView()
        node.SetFieldOfView(width / 3, height / 3, depth)
        node.JumpSliceByCentering(*peak(second))
    window(host, pictures / "slicer-maps.png")
    layouts.leave()
    whole = mx.load_volume(path("SampleData/chest_ct_nodule.nrrd"))
    (node,) = mrml.addAnswers(scan, [answers.of(small_explanations.caption(whole, NODULE))])
    panel.parameterNode.explanation = node
    picture(words, "words")
    named = path("Models/lung_nodule_semantic")
    node = module.logic.explain(scan, named, "semantic", target="malignant", region=NODULE)
    panel.parameterNode.explanation = node
    module.ui.explainCollapsibleButton.collapsed = True
    words.ui.whatIfButton.collapsed = False
    for name, value in {"spiculation": 0.05, "calcification": 0.9}.items():
        words.ui.slidersWidget.findChild(ctk.ctkSliderWidget, f"{name}Slider").value = value
    for view in slicer.util.getNodesByClass("vtkMRMLSliceNode"):
        width, height, depth = view.GetFieldOfView()
        view.SetFieldOfView(width * 2, height * 2, depth)
    module.logic.show(node)
    window(host, pictures / "slicer-concepts.png")
    words.ui.whatIfButton.collapsed = True
    module.ui.explainCollapsibleButton.collapsed = False
    node = similar(host, module, library)
    picture(cases, "cases")
    module.ui.explainCollapsibleButton.collapsed = True
    for row in (2, 6, 9):
        cases.ui.casesList.item(row).setSelected(True)
    press(cases.ui.showBesideButton)
    host.process()
    window(host, pictures / "slicer-cases.png")
    layouts.leave()
    volume, told = small_explanations.variants()
    computed = slicer.util.addVolumeFromArray(volume.data[0].numpy(), volume.affine[:, [2, 1, 0, 3]], "Computed nodule")
    (node,) = mrml.addAnswers(computed, [answers.of(told)])
    panel.parameterNode.explanation = node
    variants.ui.cohortButton.collapsed = False
    picture(variants, "variants")
    variants.ui.cohortButton.collapsed = True
    lung_nodule, along = path("Models/lung_nodule"), {"along": "diameter"}
    node = module.logic.explain(scan, lung_nodule, "latent", "malignant", along, region=NODULE)
    panel.parameterNode.explanation = node
    press(variants.ui.showBesideButton)
    host.process()
    window(host, pictures / "slicer-variants.png")
    layouts.leave()
    (node,) = mrml.addAnswers(computed, [answers.of(small_explanations.rules())])
    panel.parameterNode.explanation = node
    picture(words, "rules")
    module.ui.explainCollapsibleButton.collapsed = False


def trim(file):
    """Cut what is empty below a panel, which is as high as the highest of them."""
    image = Image.open(file).convert("RGB")
    background = Image.new("RGB", image.size, image.getpixel((image.width - 1, image.height - 1)))
    *_, bottom = ImageChops.difference(image, background).getbbox()
    image.crop((0, 0, image.width, min(bottom + 12, image.height))).save(file, optimize=True)


def window(host, file):
    """A picture of the module and its views."""
    host.window(file)
    Image.open(file).save(file, optimize=True)
    assert file.stat().st_size < 500_000
