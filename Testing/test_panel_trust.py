"""The panel about trust, on Slicer's own scene."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

slicer = pytest.importorskip("slicer")
pytest.importorskip("slicer_host")

import slicer_scene  # noqa: E402

from MedXAILib.errors import MedXAIError, Untrusted  # noqa: E402
from MedXAILib.resources import path  # noqa: E402

METHODS = {
    "gradient": {
        "title": "Gradient",
        "paper": "Simonyan 2014",
        "taxonomy": {"strengths": "quick", "limits": "noisy", "section": "3.1.1"},
    }
}
MADE = {
    "method": "gradient",
    "parameters": {"positive": True},
    "target": {"kind": "ClassTarget", "which": 1},
    "target_label": "yes",
    "region": None,
    "model": {"name": "Network", "fingerprint": "01e1", "source": "/models/network"},
    "volume": {"source": "/scans/chest.nrrd", "fingerprint": "4b52", "shape": [1, 3, 4, 5]},
    "versions": {"medxai": "0.1.0", "torch": "2.13.0"},
    "seed": 7,
    "device": "cpu",
    "created": "2026-01-01T00:00:00+00:00",
    "seconds": 131.0,
    "peak_memory": 315_670_528,
    "forwards": 2,
    "backwards": 3,
    "notes": [],
}
CARD = {
    "findings": [
        {
            "check": "randomisation",
            "title": "Does it depend on what the network learnt?",
            "sentence": "The map hardly changes when the network forgets < 1 & all it learnt; beware.",
            "light": "poor",
            "values": {"SSIM: all layers": 0.98765},
        },
        {"check": "other", "title": "Is it other?", "sentence": "Nothing can be said.", "light": None, "values": {}},
    ],
    "left_out": {"additivity": "it would take too long; ask for it", "unheard-of": "it is 2027"},
    "forwards": 30,
    "backwards": 4,
}
SEEN = {"class_names": ["no", "yes"], "patch_size": None, "task": "classification"}


class Worker:
    """Takes requests, and answers as the test says."""

    def __init__(self):
        self.requests, self.cancelled, self._jobs, self._watching = [], False, [], []

    def submit(self, request, onDone=None, onProgress=None, onPartial=None):
        self.requests.append(request)
        self._jobs.append((onDone, onProgress))
        return SimpleNamespace(cancel=self._cancel)

    def watch(self, advance):
        self._watching.append(advance)

    def advance(self):
        self._watching = [advance for advance in self._watching if not advance()]

    def progress(self, done, total, message, seconds_left=None):
        said = SimpleNamespace(done=done, total=total, message=message, seconds_left=seconds_left)
        self._jobs[-1][1](SimpleNamespace(progress=said))

    def answer(self, result=None, error=None):
        self._jobs.pop()[0](SimpleNamespace(result=result, error=error))

    def _cancel(self):
        self.cancelled = True


@pytest.fixture
def worker(monkeypatch):
    from MedXAISlicerLib import workers

    fake = Worker()
    monkeypatch.setattr(workers, "shared", lambda: fake)
    return fake


@pytest.fixture
def panel(host):
    from MedXAISlicerLib.panels.trust import TrustPanel

    panel = TrustPanel(SimpleNamespace(methods=METHODS, ready=True))
    yield panel
    panel.cleanup()


def explanation(kind="vtkMRMLScalarVolumeNode", residual=None, **changed):
    """An explanation node of the scene, whatever its kind."""
    node = slicer.mrmlScene.AddNewNodeByClass(kind)
    node.SetAttribute("MedXAI.Provenance", json.dumps(MADE | changed))
    node.SetAttribute("MedXAI.Residual", json.dumps(residual or {}))
    return node


def mapped(scan=None, **changed):
    """A map of a scan."""
    from MedXAISlicerLib import results

    scan = scan or slicer_scene.oblique_node(np.arange(60, dtype=np.int16).reshape(3, 4, 5))[0]
    node = results.addMapNode(scan, np.linspace(-1, 1, 60, dtype=np.float32).reshape(3, 4, 5), "Map")
    node.SetAttribute("MedXAI.Provenance", json.dumps(MADE | changed))
    node.SetAttribute("MedXAI.Residual", json.dumps({"completeness": 0.02}))
    node.SetAttribute("MedXAI.Kind", "SaliencyMap")
    node.SetAttribute("MedXAI.Signed", "1")
    return node


def words(panel) -> str:
    """Everything that is on the screen, but for what is folded."""
    labels = (panel.ui.theoryLabel, panel.ui.notesLabel, panel.ui.timeLabel, panel.ui.passesLabel)
    return "\n".join(label.text for label in (*labels, panel.ui.memoryLabel, panel.ui.deviceLabel))


def test_the_reminder_is_always_there(host, panel):
    for node in (None, explanation(), explanation("vtkMRMLTextNode"), None):
        panel.show(node)
        assert "does not mean that there is disease" in panel.ui.reminderLabel.text
        assert not panel.ui.reminderLabel.isHidden()
        assert panel.ui.trustWidget.isHidden() == (node is None)
        assert panel.ui.emptyLabel.isHidden() == (node is not None)


@pytest.mark.parametrize(
    ("missed", "word", "shown"),
    [
        (0.0, "good", "less than 0.1%"),
        (0.0099, "good", "1.0%"),
        (0.01, "fair", "1.0%"),
        (0.049, "fair", "4.9%"),
        (0.05, "poor", "5.0%"),
        (3.0, "poor", "300.0%"),
    ],
)
def test_light_has_a_word_beside_it(host, panel, missed, word, shown):
    panel.show(explanation(residual={"completeness": missed}))
    text = panel.ui.theoryLabel.text
    assert "●" in text and word in text and shown in text
    assert sum(other in text for other in ("good", "fair", "poor")) == 1


def test_unknown_theory_goes_by_its_name(host, panel):
    panel.show(explanation(residual={"{symmetry} & more": 0.02, "completeness": 0.001}))
    assert "{symmetry} &amp; more: 2.0%" in panel.ui.theoryLabel.text
    assert panel.ui.theoryLabel.text.count("●") == 2
    panel.show(explanation())
    assert "without a check" in panel.ui.theoryLabel.text


@pytest.mark.parametrize(
    ("name", "missed", "word", "said"),
    [
        ("efficiency", 0.02, "fair", "what taking all of them away changes; they miss it by 2.0%"),
        ("conservation", 0.0002, "good", "it misses it by less than 0.1%"),
        ("unexplained", 0.19, "good", "the linear rule leaves 19.0% of what the network said unexplained"),
        ("unexplained", 0.2, "fair", "leaves 20.0%"),
        ("unforeseen", 0.5, "poor", "does not foresee 50.0%"),
    ],
)
def test_checks_are_in_plain_words(host, panel, name, missed, word, said):
    panel.show(explanation(residual={name: missed}))
    assert f"<b>{word}</b>" in panel.ui.theoryLabel.text and said in panel.ui.theoryLabel.text
    limits = "20% is good, less than 50% fair" if name.startswith("un") else "1% is good, less than 5% fair"
    assert limits in panel.ui.theoryLabel.toolTip and "does not make the network right" in panel.ui.theoryLabel.toolTip


def test_notes_of_the_run_are_all_there(host, panel):
    panel.show(explanation(notes=["Went on with 4 at a time.", "a < b"]))
    assert "Went on with 4 at a time." in panel.ui.notesLabel.text and "a &lt; b" in panel.ui.notesLabel.text
    panel.show(explanation())
    assert "Nothing unusual" in panel.ui.notesLabel.text


def test_costs_are_in_readable_units(host, panel):
    panel.show(explanation())
    for said in ("2 min 11 s", "2 forwards, 3 backwards", "316 MB", "processor (CPU)"):
        assert said in words(panel)
    panel.show(explanation(seconds=0.04, peak_memory=0, device="cuda:0"))
    for said in ("0.0 s", "not measured", "cuda:0"):
        assert said in words(panel)
    panel.show(explanation(peak_memory=80_000_000_000))
    assert "80 GB" in words(panel)


def test_the_method_is_described_once_it_is_known(host, panel):
    panel.show(explanation())
    assert panel.ui.methodBox.title == "The method: Gradient"
    assert panel.ui.strengthsLabel.text == "quick" and panel.ui.limitsLabel.text == "noisy"
    panel.show(explanation(method="of another version"))
    assert panel.ui.methodBox.isHidden()
    for logic in (None, SimpleNamespace(methods={})):
        panel.logic = logic
        panel.show(explanation())
        assert panel.ui.methodBox.isHidden()


def test_origin_can_be_read_and_copied(host, panel):
    import qt

    panel.show(explanation(residual={"completeness": 0.001}))
    for said in ("Network: Network", "01e1", "Scan: chest.nrrd", "the whole scan", "Seed: 7", "torch 2.13.0"):
        assert said in panel.ui.provenanceText.plainText
    panel.ui.copyButton.click()
    copied = json.loads(qt.QApplication.clipboard().text())
    assert copied == {"provenance": MADE, "residual": {"completeness": 0.001}}


@pytest.mark.parametrize(
    ("region", "said"),
    [
        ([21.9, 120.5, -611.4], "Where: R 22, A 120, S -611 mm"),
        ([[0, 1, 2], [3, 4, 5]], "Where: R 0, A 1, S 2 mm to R 3, A 4, S 5 mm"),
    ],
)
def test_place_is_in_words(host, panel, region, said):
    panel.show(explanation(region=region))
    assert said in panel.ui.provenanceText.plainText


def test_it_follows_the_scene(host, panel):
    node, other = explanation(), explanation()
    panel.show(node)
    host.scene.RemoveNode(other)
    assert panel.node is node
    host.scene.RemoveNode(node)
    assert panel.node is None and panel.ui.trustWidget.isHidden()
    panel.show(explanation())
    host.scene.Clear()
    assert panel.node is None


def test_captions_and_cases_cannot_be_checked(host, panel):
    for kind, name in (("vtkMRMLTextNode", "Caption"), ("vtkMRMLTableNode", "SimilarCases")):
        node = explanation(kind)
        node.SetAttribute("MedXAI.Kind", name)
        panel.show(node)
        assert panel.ui.cardBox.isHidden()
    panel.show(mapped())
    assert not panel.ui.cardBox.isHidden() and panel.ui.checkButton.enabled
    assert panel.ui.cardLabel.text == "Not checked yet." and panel.ui.numbersButton.isHidden()
    assert panel.ui.estimateLabel.text == "up to about 22 min"
    for said in ("scrambled", "slightly changed scan", "without what the map marks", "ten times"):
        assert said in panel.ui.checkButton.toolTip


def test_checks_of_the_library_are_known():
    from MedXAILib.trust import card
    from MedXAISlicerLib.panels import checker

    titles = {name: check.title for name, check in card.CHECKS.items()}
    assert titles == checker._TITLES and card.LIMIT == checker._LIMIT
    assert set(CARD) == set(card.TrustCard.from_json(CARD).to_json())


def test_check_asks_about_what_was_explained(host, panel, worker):
    from MedXAISlicerLib import geometry, mrml

    node = mapped()
    scan = node.GetNodeReference("MedXAI.Source")
    panel.show(node)
    panel.ui.checkButton.click()
    assert panel.ui.checkButton.text == "Cancel" and not panel.ui.progressBar.isHidden()
    assert worker.requests == [{"op": "load", "model": "/models/network", "trust": False}]
    worker.answer(SEEN)
    asked = worker.requests[1]
    given, expected = asked.pop("volume"), mrml.scanOf(scan)
    assert given["key"] == expected["key"] and np.array_equal(given["data"], expected["data"])
    map = asked["explanation"].pop("map")
    assert np.array_equal(map["data"], slicer.util.arrayFromVolume(node)[None])
    for one in (map, given):
        np.testing.assert_array_equal(one["affine"], geometry.affine(scan))
    assert asked == {
        "op": "check",
        "model": "/models/network",
        "trust": False,
        "device": None,
        "explanation": {"provenance": MADE, "residual": {"completeness": 0.02}, "signed": True},
        "segmentation": None,
    }
    worker.progress(1, 4, "Is it other?", 12)
    assert panel.ui.statusLabel.text == "Is it other? · about 12 s left"
    assert (panel.ui.progressBar.value, panel.ui.progressBar.maximum) == (1, 4)
    other = mapped(scan)
    panel.show(other)
    worker.progress(2, 4, "Is it other?")
    assert panel.ui.statusLabel.text.startswith("gradient · yes · ") and panel.ui.checkButton.text == "Cancel"
    worker.answer(CARD)
    assert panel.ui.cardLabel.text == "Not checked yet." and panel.ui.checkButton.text == "Check this map"
    assert not panel.ui.statusLabel.text and panel.ui.progressBar.isHidden()
    panel.show(node)
    assert "poor" in panel.ui.cardLabel.text


def test_card_is_in_plain_words_and_stays_with_the_scene(host, panel, tmp_path):
    from MedXAISlicerLib import results

    results.setCard(mapped(), CARD)
    slicer_scene.save(tmp_path / "scene.mrb")
    host.scene.Clear()
    slicer_scene.load(tmp_path / "scene.mrb", tmp_path / "cache")
    (node,) = results.findExplanations()
    assert results.card(node) == CARD
    panel.show(node)
    text = panel.ui.cardLabel.text
    assert (
        '<span style="color: #d9483b">● <b>poor</b></span>: <b>Does it depend on what the network learnt?</b>' in text
    )
    assert "forgets &lt; 1 &amp; all it learnt; beware." in text and "● <b>no verdict</b>" in text
    assert "Left out: Do its values mean amounts? (it would take too long)" in text
    assert "Left out: unheard-of (it is 2027)" in text and "none says that the answer is right" in text
    assert panel.ui.numbersButton.collapsed and not panel.ui.numbersButton.isHidden()
    assert "SSIM: all layers" in panel.ui.numbersLabel.text and "0.988" in panel.ui.numbersLabel.text


def test_segment_and_channels_come_along(host, panel, worker):
    from MedXAISlicerLib import results

    first = slicer_scene.oblique_node(np.ones((3, 4, 5), np.int16))[0]
    second = slicer.util.addVolumeFromArray(np.full((3, 4, 5), 2, np.int16), name="Second")
    second.CopyOrientation(first)
    second.SetAndObserveTransformNodeID(first.GetTransformNodeID())
    node, mask = mapped(first), np.zeros((3, 4, 5), bool)
    channels = np.stack([np.zeros((3, 4, 5)), np.ones((3, 4, 5))], axis=-1)
    results.setPart(node, "Channels", results.addMapNode(first, channels, "Channels"))
    results.setMoreChannels(node, [second])
    mask[1, 2, 3] = True
    lesion = slicer_scene.add_segmentation(first, mask, "lesion")
    panel.show(node)
    chooser = panel.checker._compared
    chooser._nodes.setCurrentNode(lesion)
    results.setPart(node, "HotSpots", lesion)
    panel.show(node)
    assert not panel.ui.checkButton.enabled and "hot spots come from a map" in panel.ui.checkButton.toolTip
    node.RemoveNodeReferenceIDs("MedXAI.HotSpots")
    panel.show(node)
    panel.ui.checkButton.click()
    worker.answer(SEEN)
    asked = worker.requests[1]
    assert asked["volume"]["data"][:, 0, 0, 0].tolist() == [1, 2]
    assert asked["explanation"]["map"]["data"][:, 0, 0, 0].tolist() == [0, 1]
    assert asked["segmentation"]["data"].tolist() == [[[[1]]]]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"partial": True}, "stopped early"),
        ({"model": {"name": "Network", "fingerprint": "01e1", "source": None}}, "not in a file"),
        ({}, "The scan is not in the scene any more"),
    ],
)
def test_what_cannot_be_checked_says_why(host, panel, changed, said):
    node = mapped(**changed)
    panel.show(node)
    if not changed:
        assert panel.ui.checkButton.enabled
        host.scene.RemoveNode(node.GetNodeReference("MedXAI.Source"))
    assert not panel.ui.checkButton.enabled and said in panel.ui.checkButton.toolTip


def test_error_is_shown(host, panel, worker):
    panel.show(mapped())
    panel.ui.checkButton.click()
    worker.answer(SEEN)
    worker.answer(error=MedXAIError("This is not the network that was explained (01e1 then, 02e2 now)."))
    assert panel.ui.statusLabel.text.startswith("This is not the network that was explained")
    assert panel.ui.checkButton.text == "Check this map" and panel.ui.checkButton.enabled
    assert panel.ui.cardLabel.text == "Not checked yet."
    panel.node.GetNodeReference("MedXAI.Source").SetAndObserveTransformNodeID(
        slicer.mrmlScene.AddNewNodeByClass("vtkMRMLBSplineTransformNode").GetID()
    )
    panel.ui.checkButton.click()
    assert "harden the transform first" in panel.ui.statusLabel.text and panel.checker.running is None


def test_code_of_the_network_is_asked_about(host, panel, worker):
    host.reply = True
    panel.show(mapped())
    panel.ui.checkButton.click()
    worker.answer(error=Untrusted("It brings code: pass trust=True only if you trust its maker.", "lambda x: x"))
    assert "let it run only if you trust its maker" in host.dialogs[-1][1]
    assert len(worker.requests) == 2 and panel.ui.checkButton.text == "Cancel"


@pytest.mark.parametrize("way", ["pressed", "map removed", "scene closed"])
def test_check_is_cancelled(host, panel, worker, way):
    node = mapped()
    panel.show(node)
    panel.ui.checkButton.click()
    worker.answer(SEEN)
    if way == "pressed":
        panel.ui.checkButton.click()
        assert panel.ui.statusLabel.text == "Stopping…"
    elif way == "map removed":
        host.scene.RemoveNode(node)
    else:
        host.scene.Clear()
    worker.advance()
    assert worker.cancelled
    worker.answer(error=MedXAIError("It stopped."))
    assert panel.checker.running is None and panel.ui.progressBar.isHidden()
    assert node.GetAttribute("MedXAI.Trust") is None
    if way == "pressed":
        assert panel.ui.statusLabel.text == "Cancelled; the scene is as it was."


def test_shipped_network_is_checked(host, panel, tmp_path):
    """With a real worker, also after the scene was saved and loaded."""
    from MedXAISlicerLib import asking, results, workers

    nodule = (21.9, 120.5, -611.5)
    scan = slicer_scene.read_volume(path("SampleData/chest_ct_nodule.nrrd"), "Chest CT")
    asking.Explaining(scan, path("Models/lung_nodule"), "gradient", "malignant", region=nodule).wait()
    slicer_scene.save(tmp_path / "scene.mrb")
    host.scene.Clear()
    slicer_scene.load(tmp_path / "scene.mrb", tmp_path / "cache")
    (node,) = results.findExplanations()
    truth = slicer_scene.read_volume(path("SampleData/chest_ct_nodule_mask.nrrd"), "Mask")
    drawn = slicer.util.arrayFromVolume(truth) > 0
    lesion = slicer_scene.add_segmentation(results.part(node, "Source"), drawn, "nodule")
    panel.show(node)
    panel.checker._compared._nodes.setCurrentNode(lesion)
    panel.ui.checkButton.click()
    host.until(lambda: panel.checker.running is None)
    assert not panel.ui.statusLabel.text
    found = {one["check"]: one for one in results.card(node)["findings"]}
    assert {"validity", "randomisation", "faithfulness"} <= set(found)
    for one in found.values():
        assert one["sentence"].split(" (")[0].split("<")[0] in panel.ui.cardLabel.text
    assert not [why for why in results.card(node)["left_out"].values() if "too long" not in why]
    assert host.picture(panel.widget, tmp_path / "trust.png", width=460).stat().st_size > 5000
    workers.shared().close()


def test_picture(host, panel, tmp_path):
    scan = slicer.util.addVolumeFromArray(np.zeros((3, 4, 5)), name="Chest")
    node = explanation(residual={"completeness": 0.02})
    node.SetNodeReferenceID("MedXAI.Source", scan.GetID())
    panel.show(node)
    assert "Scan: Chest" in panel.ui.provenanceText.plainText
    assert host.picture(panel.widget, tmp_path / "trust.png", width=460).stat().st_size > 5000


def test_the_card_goes_with_the_map_to_a_folder_and_back(host, tmp_path):
    from MedXAISlicerLib import answers, mrml, results, saving

    node = mapped()
    assert answers.read(saving.save(node, tmp_path / "unchecked")).card is None
    results.setCard(node, CARD)
    (back,) = mrml.addAnswers(results.part(node, "Source"), [answers.read(saving.save(node, tmp_path / "checked"))])
    assert results.card(back) == CARD
