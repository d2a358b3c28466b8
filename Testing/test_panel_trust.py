"""The panel about trust, on Slicer's own scene."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

slicer = pytest.importorskip("slicer")
pytest.importorskip("slicer_host")

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


@pytest.fixture
def panel(host):
    from MedXAISlicerLib.panels.trust import TrustPanel

    panel = TrustPanel(SimpleNamespace(methods=METHODS))
    yield panel
    panel.cleanup()


def explanation(kind="vtkMRMLScalarVolumeNode", residual=None, **changed):
    """An explanation node of the scene, whatever its kind."""
    node = slicer.mrmlScene.AddNewNodeByClass(kind)
    node.SetAttribute("MedXAI.Provenance", json.dumps(MADE | changed))
    node.SetAttribute("MedXAI.Residual", json.dumps(residual or {}))
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


def test_picture(host, panel, tmp_path):
    scan = slicer.util.addVolumeFromArray(np.zeros((3, 4, 5)), name="Chest")
    node = explanation(residual={"completeness": 0.02})
    node.SetNodeReferenceID("MedXAI.Source", scan.GetID())
    panel.show(node)
    assert "Scan: Chest" in panel.ui.provenanceText.plainText
    assert host.picture(panel.widget, tmp_path / "trust.png", width=460).stat().st_size > 5000
