"""A study is read through the panel: every answer is kept, and nothing tells the truth, the file or the arm."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

slicer_host = pytest.importorskip("slicer_host")

import plain_map  # noqa: E402
import slicer  # noqa: E402
from conftest import oblique_affine  # noqa: E402
from dicom_series import write_series  # noqa: E402
from slicer_host import qt  # noqa: E402

import MedXAILib as mx  # noqa: E402
from MedXAILib.study.allocation import trials  # noqa: E402
from MedXAILib.study.design import read_study  # noqa: E402
from MedXAILib.study.journal import read  # noqa: E402
from MedXAILib.study.results import readings  # noqa: E402
from MedXAISlicerLib import answers, geometry, mrml, results, studies  # noqa: E402

SHAPE = (9, 14, 11)
SPOT = (4, 6, 7)
"""Where the map of each scan is strongest, (d, h, w)."""
# None of it may be read by a reader; names of arms are part of other words.
SECRETS = ("secret", "hirescam", "unmistakable", "placebo", "of-another")


def blob(shape, spot):
    away = np.meshgrid(*(np.arange(n) - at for n, at in zip(shape, spot, strict=True)), indexing="ij")
    return torch.from_numpy(np.exp(-sum(axis**2 for axis in away) / 6)).float()


def saved(folder, shape=SHAPE, affine=None, spot=SPOT):
    """A map that tells everything about itself."""
    made = {
        "method": "hirescam",
        "target_label": "unmistakable",
        "volume": {"source": "secret-scan.nrrd"},
        "model": {"name": "secret network", "task": "classification"},
        "notes": ["the secret is out"],
        "parameters": {"layer": "secret"},
    }
    affine = oblique_affine() if affine is None else affine
    plain_map.saliency(blob(shape, spot)[None], affine, **made).save(folder)


@pytest.fixture
def make(tmp_path):
    """Writes a study with these arms, of 2 cases and as many to practise on as asked for; gives its design file."""

    def study(arms, practice=0, folder="study", explanations=None, **changed):
        root = tmp_path / folder
        root.mkdir()
        generator = torch.Generator().manual_seed(0)
        for i in range(2 + practice):
            volume = mx.Volume(torch.randn(1, *SHAPE, generator=generator) + 100 * i, oblique_affine())
            write(volume, root / f"secret-{i}.nrrd")
        saved(root / "own")
        other = np.diag([3.0, 2.0, -1.5, 1.0])[:, [2, 1, 0, 3]]
        other[:3, 3] = 500, 500, 500
        saved(root / "of-another", (20, 10, 30), other, (15, 2, 4))
        given = {"map": "own", "placebo": "of-another", **(explanations or {})}
        design = {
            "name": "nodules",
            "question": "Is the nodule malignant?",
            "answers": ["benign", "malignant"],
            "arms": arms,
            "readers": ["r1", "r2"],
            "cases": "cases.csv",
            "wrong": 0.5,
            **changed,
        }
        (root / "design.json").write_text(json.dumps(design), encoding="utf-8")
        with (root / "cases.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["uid", "volume", "truth", "answer", "score", "training", *given])
            for i in range(2 + practice):
                truth = ("benign", "malignant")[i % 2]
                told = ("malignant", "malignant")[i % 2], 0.75, "yes" if i >= 2 else ""
                writer.writerow([f"secret-{i}", f"secret-{i}.nrrd", truth, *told, *given.values()])
        return root / "design.json"

    return study


def write(volume, path):
    sitk.WriteImage(volume.to_sitk(), str(path))


@pytest.fixture
def panel(host):
    from MedXAISlicerLib.panels.study import StudyPanel

    for name in ("Red", "Yellow"):
        slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSliceCompositeNode", name)
    panel = StudyPanel(logic=None)
    yield panel
    panel.cleanup()


def begin(panel, design, reader="r1"):
    panel.ui.designPathLineEdit.currentPath = str(design)
    panel.ui.readerSelector.currentText = reader
    panel.ui.beginButton.click()


def answer(panel, text="malignant", sure=80):
    panel._buttons[text].click()
    panel.ui.confidenceSlider.value = sure
    if panel.ui.placeWidget.isVisibleTo(panel.widget):
        panel.ui.whereButton.click()
        panel.sitting.point.AddControlPoint(1, 2, 3)
    assert panel.ui.nextButton.enabled, panel.ui.nextButton.toolTip
    panel.ui.nextButton.click()


def events(design, reader="r1"):
    return read(design.parent / studies.JOURNALS / f"{reader}.jsonl")[0]


def nodes():
    scene = slicer.mrmlScene
    return {scene.GetNthNode(i).GetID() for i in range(scene.GetNumberOfNodes())}


def told(panel):
    """All that a reader can come across: what the panel writes, and what the nodes of the scene say of themselves."""
    texts = []
    for widget in panel.widget.findChildren(qt.QWidget):
        texts += [getattr(widget, name, "") for name in ("text", "toolTip", "plainText")]
    scene = slicer.mrmlScene
    for node in (scene.GetNthNode(i) for i in range(scene.GetNumberOfNodes())):
        texts += [node.GetName() or "", *(node.GetAttribute(name) or "" for name in node.GetAttributeNames())]
        texts += [node.GetText() or ""] if node.IsA("vtkMRMLTextNode") else []
        texts += [node.GetFileName() or ""] if node.IsA("vtkMRMLStorageNode") else []
    return "\n".join(text for text in texts if isinstance(text, str))


def layers():
    found = slicer.util.getNodesByClass("vtkMRMLSliceCompositeNode")
    return {(node.GetBackgroundVolumeID(), node.GetForegroundVolumeID()) for node in found}


def test_a_whole_study_is_read(panel, make):
    design = make(["ai+map"], practice=1, localise=True)
    expected = trials(read_study(design), "r1")
    begin(panel, design)
    for i, trial in enumerate(expected):
        assert panel.ui.progressLabel.text == f"Scan {i + 1} of 3" + (", to practise on" if i == 0 else "")
        scan = mx.load_volume(trial.case.volume)
        assert np.array_equal(slicer.util.arrayFromVolume(panel.sitting.scan), scan.data[0].numpy())
        assert np.allclose(geometry.affine(panel.sitting.scan), scan.affine)
        assert layers() == {(panel.sitting.scan.GetID(), panel.sitting.maps[0].GetID())}
        assert panel.ui.saidLabel.text == "The network says: malignant (score 0.75)"
        answer(panel, ("benign", "malignant")[i % 2], 10 * (i + 1))
    assert "Thank you" in panel.ui.messageLabel.text
    assert not panel.ui.trialWidget.isVisibleTo(panel.widget)
    found = readings(read_study(design), design.parent / studies.JOURNALS)
    assert [(r.case, r.answer, r.confidence, (r.x, r.y, r.z)) for r in found] == [
        (t.case.uid, a, c, (1, 2, 3)) for t, a, c in zip(expected[1:], ("malignant", "benign"), (20, 30), strict=True)
    ]


def test_a_scan_may_be_a_dicom_folder(panel, make):
    design = make(["none"])
    data = torch.arange(9 * 14 * 11).reshape(1, 9, 14, 11).float()
    for i in range(2):
        (design.parent / f"secret-{i}.nrrd").unlink()
        write_series(mx.Volume(data, oblique_affine()), design.parent / f"secret-{i}.nrrd")
    begin(panel, design)
    expected = mx.load_volume(design.parent / "secret-0.nrrd")
    assert np.array_equal(slicer.util.arrayFromVolume(panel.sitting.scan), expected.data[0].numpy())
    assert np.allclose(geometry.affine(panel.sitting.scan), expected.affine)
    panel.ui.stopButton.click()
    # Of two series nobody knows which one it is.
    for folder in design.parent.glob("secret-*.nrrd"):
        for file in folder.iterdir():
            file.rename(file.with_suffix(".first"))
        write_series(mx.Volume(data, oblique_affine()), folder)
    begin(panel, design)
    assert "holds 2 DICOM series" in events(design)[-1]["why"]


def test_where_the_reader_pointed_is_in_the_scan_s_own_file(panel, make):
    design = make(["none"], localise=True)
    begin(panel, design)
    ijk, scan = (8, 3, 5), panel.sitting.scan
    panel._buttons["malignant"].click()
    panel.ui.confidenceSlider.value = 50
    panel.ui.whereButton.click()
    panel.sitting.point.AddControlPoint(*(geometry.ijkToRas(scan) @ (*ijk, 1))[:3])
    case = panel.sitting.trial.case
    panel.ui.nextButton.click()
    (told,) = (event["point"] for event in events(design) if event["event"] == "answer")
    # SimpleITK places in LPS mm.
    assert sitk.ReadImage(str(case.volume)).TransformPhysicalPointToIndex((-told[0], -told[1], told[2])) == ijk


def test_seconds_begin_when_the_scan_is_there(panel, make, monkeypatch):
    design = make(["map"])
    now = [0.0]

    def slowly(action):
        def load(path):
            now[0] += 60
            return action(path)

        return load

    monkeypatch.setattr(studies, "_read", slowly(studies._read))
    monkeypatch.setattr(answers, "read", slowly(answers.read))
    monkeypatch.setattr(studies, "Sitting", partial(studies.Sitting, clock=lambda: now[0]))
    begin(panel, design)
    for seconds in (4, 7):
        now[0] += seconds
        answer(panel)
    assert now[0] == 4 * 60 + 4 + 7, "loading takes a minute each"
    assert [event["seconds"] for event in events(design) if event["event"] == "answer"] == [4, 7]


def test_nothing_is_kept_before_everything_is_answered(panel, make):
    design = make(["none"], localise=True)
    begin(panel, design)
    ui = panel.ui
    assert not ui.nextButton.enabled
    assert "choose an answer and move the slider" in ui.nextButton.toolTip
    panel._buttons["malignant"].click()
    ui.confidenceSlider.value = 50
    assert ui.nextButton.toolTip == "First show where."
    panel._buttons["benign"].click()
    assert ui.nextButton.enabled, "of what is not there, nobody can say where it is"
    assert not panel._buttons["malignant"].checked
    panel._buttons["malignant"].click()
    ui.whereButton.click()
    panel.sitting.point.AddControlPoint(4, 5, 6)
    assert ui.nextButton.enabled
    assert ui.placeLabel.text == "R 4, A 5, S 6 mm"
    # Another place.
    ui.whereButton.click()
    assert (ui.placeLabel.text, ui.nextButton.enabled) == ("Not shown yet", False)
    panel.sitting.point.AddControlPoint(7, 8, 9)
    ui.nextButton.click()
    assert events(design)[-2]["point"] == [7, 8, 9]
    # The next one begins with nothing.
    assert not ui.nextButton.enabled
    assert not any(button.checked for button in panel._buttons.values())
    assert (ui.confidenceSlider.value, panel.sitting.place, ui.placeLabel.text) == (0, None, "Not shown yet")
    panel._buttons["benign"].click()
    assert ui.nextButton.toolTip == "First move the slider to say how sure you are."


@pytest.mark.parametrize("arm", ["none", "ai", "map", "placebo", "ai+map", "ai+placebo"])
def test_nothing_tells_the_truth_the_file_or_the_arm(panel, make, arm):
    begin(panel, make([arm]))
    text = told(panel)
    assert "Is the nodule malignant?" in text, "this does look at texts"
    assert not [secret for secret in SECRETS if secret in text]
    assert "+" not in arm or arm not in text
    assert ("The network says" in text) == ("ai" in arm)
    assert panel.ui.overlayCheckBox.isVisibleTo(panel.widget) == ("map" in arm or "placebo" in arm)


def test_a_placebo_differs_from_the_map_in_its_values_alone(panel, make):
    texts, arrays, looks = [], [], []
    for arm, folder in (("ai+map", "one"), ("ai+placebo", "two")):
        begin(panel, make([arm], folder=folder))
        (shown,) = panel.sitting.maps
        assert np.allclose(geometry.affine(shown), oblique_affine())
        arrays.append(slicer.util.arrayFromVolume(shown).copy())
        looks.append((shown.GetDisplayNode().GetColorNode().GetName(), results.isSigned(shown)))
        # But for what is computed of the values, and how many nodes there were before.
        text = re.sub(r"-?\d+(\.\d+)?", "#", re.sub(r"_\d+\b|/(one|two)/", "", told(panel)))
        texts.append(sorted(text.split("\n")))
        panel.ui.stopButton.click()
    assert texts[0] == texts[1]
    assert looks[0] == looks[1]
    assert np.allclose(arrays[0], blob(SHAPE, SPOT), atol=1e-6)
    assert arrays[1].shape == SHAPE
    assert np.abs(arrays[0] - arrays[1]).max() > 0.5


def test_a_placebo_keeps_its_place_in_the_box_about_the_scan():
    """Of a grid that runs along R, A and S in other directions, the same part of the patient."""
    own = np.diag([2.0, 2.0, 2.0, 1.0])
    own[:3, :3] = own[:3, [2, 1, 0]]
    array = blob((20, 20, 20), (15, 5, 10)).numpy()  # three quarters up, a quarter to anterior
    onto = np.eye(4)
    # Slices run down, rows to posterior, voxels are of other sizes, and it lies far away.
    onto[:3, :3] = np.array([[0, 0, 1.0], [0, -2.0, 0], [-4.0, 0, 0]])
    onto[:3, 3] = 900, -70, 3
    made = studies._stretched(array, own, (10, 40, 30), onto)
    at = (np.array(np.unravel_index(made.argmax(), made.shape)) + 0.5) / made.shape
    assert at == pytest.approx(np.array([1 - 15.5 / 20, 1 - 5.5 / 20, 10.5 / 20]), abs=0.06)
    assert studies._stretched(array, own, array.shape, own) == pytest.approx(array, abs=1e-6)


def test_looks_at_the_map_are_put_down(panel, make):
    design = make(["map"])
    begin(panel, design)
    (scan, map_), button = (panel.sitting.scan.GetID(), panel.sitting.maps[0].GetID()), panel.ui.overlayCheckBox
    spots = results.part(panel.sitting.maps[0], "HotSpots").GetDisplayNode()
    assert layers() == {(scan, map_)}
    button.click()
    assert (layers(), spots.GetVisibility()) == ({(scan, None)}, 0)
    button.click()
    assert (layers(), spots.GetVisibility()) == ({(scan, map_)}, 1)
    answer(panel)
    looks = [(event["trial"], event["shown"]) for event in events(design) if event["event"] == "look"]
    assert looks == [(0, False), (0, True)]
    assert [r.looks for r in readings(read_study(design), design.parent / studies.JOURNALS)] == [2]


def test_the_former_scan_and_all_about_it_are_gone(panel, make):
    before = nodes()

    def added():
        return Counter(slicer.mrmlScene.GetNodeByID(node).GetClassName() for node in nodes() - before)

    begin(panel, make(["ai+map"], localise=True))
    first, of_one = panel.sitting.scan, added()
    assert of_one["vtkMRMLScalarVolumeNode"] == 2
    answer(panel)
    assert first.GetScene() is None
    assert (panel.sitting.scan.GetName(), panel.sitting.point) == ("Scan", None)
    assert added() == of_one
    answer(panel)
    # Colours are made once for all maps of a scene.
    assert set(added()) <= {"vtkMRMLColorTableNode", "vtkMRMLSubjectHierarchyNode", "vtkMRMLProceduralColorNode"}, (
        added()
    )


def test_after_a_crash_it_goes_on_at_the_open_scan(host, panel, make):
    from MedXAISlicerLib.panels.study import StudyPanel

    design = make(["map"])
    begin(panel, design)
    answer(panel)
    assert panel.ui.progressLabel.text == "Scan 2 of 2"
    # Nothing is closed: the process is gone, and with it the scene.
    again = StudyPanel(logic=None)
    begin(again, design)
    assert again.ui.progressLabel.text == "Scan 2 of 2"
    answer(again, "benign", 5)
    assert "Thank you" in again.ui.messageLabel.text
    assert [e["answer"] for e in events(design) if e["event"] == "answer"] == ["malignant", "benign"]
    again.cleanup()


_READER = """
import os
import sys
from pathlib import Path

# Which takes seconds: once for all readers.
import slicer_host


def read():
    with slicer_host.running(Path(sys.argv[2])):
        import slicer
        from MedXAISlicerLib.panels.study import StudyPanel

        slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSliceCompositeNode", "Red")
        panel = StudyPanel(logic=None)
        panel.ui.designPathLineEdit.currentPath = sys.argv[1]
        panel.ui.readerSelector.currentText = "r1"
        panel.ui.beginButton.click()
        while panel.sitting is not None:
            trial = panel.sitting.trial.index
            for done, click in {
                "open": lambda: None,
                "look": panel.ui.overlayCheckBox.click,
                "chosen": panel._buttons["malignant"].click,
                "paused": panel.ui.pauseButton.click,
                "gone on": panel.ui.pauseButton.click,
                "sure": lambda: setattr(panel.ui.confidenceSlider, "value", 10 * trial + 5),
                "kept": panel.ui.nextButton.click,
            }.items():
                click()
                print(trial, done, panel.ui.progressLabel.text, os.getpid(), sep="|", flush=True)


for _ in range(int(sys.argv[3])):
    if not os.fork():
        read()
        os._exit(0)
    print("gone", os.wait()[1], sep="|", flush=True)
"""


def test_killed_at_any_moment_it_loses_the_open_trial_at_most(make):
    design = make(["map", "ai+map"], practice=4, washout_days=0)
    expected = trials(read_study(design), "r1")
    assert len(expected) == 8
    draw, kept, journal = random.Random(5), [], design.parent / studies.JOURNALS / "r1.jsonl"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    moments = ("look", "kept", "paused", "sure", None)
    args = [sys.executable, "-c", _READER, str(design), str(design.parent / "host"), str(len(moments))]
    with subprocess.Popen(args, stdout=subprocess.PIPE, text=True, encoding="utf-8", env=environment) as process:
        for moment in moments:
            before = journal.read_bytes() if journal.exists() else b""
            after = len(kept) + draw.randint(0, 1)
            lines = []
            for line in process.stdout:
                lines.append(line.strip().split("|"))
                if lines[-1][0] == "gone":
                    break
                if moment is not None and lines[-1][:2] == [str(after), moment]:
                    # Somewhere in what comes next.
                    time.sleep(draw.uniform(0, 0.02))
                    os.kill(int(lines[-1][-1]), signal.SIGKILL)
            (first, done, progress, _), *_between, (_gone, status) = lines
            assert (int(first), done) == (len(kept), "open"), "it goes on at the trial that was open"
            assert progress.startswith(f"Scan {len(kept) + 1} of 8")
            told = [line for line in lines if line[1] == "kept"]
            answers_ = [event for event in events(design) if event["event"] == "answer"]
            # Nothing written before was touched, each answer that was seen to be kept is there, and at most one more.
            assert journal.read_bytes().startswith(before)
            assert [event["trial"] for event in answers_] == list(range(len(answers_)))
            assert [event["confidence"] for event in answers_] == [10 * i + 5 for i in range(len(answers_))]
            assert 0 <= len(answers_) - (len(kept) + len(told)) <= 1
            kept = answers_
            assert int(status) == (0 if moment is None else signal.SIGKILL)
    assert len(kept) == 8


def test_a_session_that_may_not_begin_says_when(panel, make):
    begin(panel, make(["none", "ai"], washout_days=2))
    answer(panel)
    answer(panel)
    when = datetime.now(timezone.utc) + timedelta(days=2)
    assert f"Session 2 of r1 begins on {when:%d %B %Y}" in panel.ui.messageLabel.text
    assert panel.ui.startWidget.isVisibleTo(panel.widget)


def test_a_pause_hides_the_scan_and_stops_the_clock(panel, make):
    design = make(["map"])
    begin(panel, design)
    now, sitting, shown = [100.0], panel.sitting, layers()
    sitting._clock, sitting._since = lambda: now[0], 100.0
    now[0] += 7
    panel.ui.pauseButton.click()
    assert layers() == {(None, None)}
    assert not panel.ui.readWidget.isVisibleTo(panel.widget)
    now[0] += 1000
    panel.ui.pauseButton.click()
    assert layers() == shown
    assert panel.ui.readWidget.isVisibleTo(panel.widget)
    now[0] += 5
    answer(panel)
    (answered,) = [event for event in events(design) if event["event"] == "answer"]
    assert answered["seconds"] == 12
    assert [event["event"] for event in events(design)[1:4]] == ["begin", "pause", "resume"]


def test_the_time_that_is_left_is_told(panel, make):
    begin(panel, make(["none"], seconds=30))
    now, sitting = [0.0], panel.sitting
    sitting._clock, sitting._since = lambda: now[0], 0.0
    for now[0], says in ((12.0, "18 s left"), (30.0, "Time is over: please answer.")):
        panel._timer.timeout.emit()
        assert panel.ui.timeLabel.text == says
    assert panel._timer.isActive()
    panel.ui.stopButton.click()
    assert not panel._timer.isActive()


@pytest.mark.parametrize("leave", ["scene", "scan"])
def test_without_its_scan_a_study_is_left(panel, make, leave):
    design = make(["map"])
    begin(panel, design)
    if leave == "scene":
        # As the module does before a scene is closed.
        panel.setParameterNode(None)
        slicer.mrmlScene.Clear()
    else:
        slicer.mrmlScene.RemoveNode(panel.sitting.scan)
    assert panel.sitting is None
    assert "go on where you are" in panel.ui.messageLabel.text
    begin(panel, design)
    assert panel.ui.progressLabel.text == "Scan 1 of 2"


def test_what_cannot_be_shown_tells_no_secret(panel, make):
    design = make(["placebo"])
    (design.parent / "of-another" / "explanation.json").write_text("{}", encoding="utf-8")
    before = nodes()
    begin(panel, design)
    assert panel.ui.messageLabel.text.startswith("Trial 1 cannot be shown: tell those who run the study")
    assert not [secret for secret in SECRETS if secret in told(panel)]
    assert events(design)[-1]["event"] == "failed"
    assert "of-another" in events(design)[-1]["why"]
    assert not [one for one in nodes() - before if slicer.mrmlScene.GetNodeByID(one).IsA("vtkMRMLVolumeNode")]


def test_the_map_of_another_grid_is_no_map_of_the_scan(panel, make):
    design = make(["map"], explanations={"map": "of-another"})
    begin(panel, design)
    assert "cannot be shown" in panel.ui.messageLabel.text
    assert "not on the grid" in events(design)[-1]["why"]


def test_an_arm_of_words_cases_and_prototypes_is_shown_in_their_views(panel, make):
    shown = {"text": "words", "cases": "alike", "prototypes": "parts"}
    design = make(["text+cases+prototypes"], explanations=shown)
    affine, map_ = oblique_affine(), blob(SHAPE, SPOT)
    made = plain_map.saliency(map_[None], affine, volume={"source": "secret-scan.nrrd"}, notes=["secret"]).provenance
    words = (mx.Word("solid", 2, 7, 0.9, 0, None),)
    mx.Caption(made, {}, "A solid nodule.", words, map_[None], affine).save(design.parent / "words")
    for folder, role in (("alike", "alike"), ("parts", "prototype")):
        known = mx.Volume(map_[None], affine, f"{role}.nrrd")
        cases = tuple(mx.Case(f"{role} {i}", "benign", 0.5, role=role, volume=known) for i in range(2))
        mx.SimilarCases(made, {}, cases, None, affine).save(design.parent / folder)
    begin(panel, design)
    assert not panel.ui.saidLabel.isVisibleTo(panel.widget)
    views = [panel._views[part] for part in shown]
    assert all(view.widget.isVisibleTo(panel.widget) for view in views)
    browser, overlay = views[0].ui.textBrowser, panel.ui.overlayCheckBox
    assert browser.plainText.strip() == "A solid nodule."
    for view, role in zip(views[1:], ("alike", "prototype"), strict=True):
        assert f"Case {role} 0" in view.ui.casesList.item(0).toolTip()
    assert [secret for secret in SECRETS if secret in told(panel)] == []
    # A click on a word is a look at its map, too.
    views[0].ui.hideMapButton.click()
    assert (overlay.checked, {front for _, front in layers()}) == (False, {None})
    browser.anchorClicked.emit(qt.QUrl("word:0"))
    assert (overlay.checked, {front for _, front in layers()}) == (True, {panel.sitting.maps[0].GetID()})
    assert [event["shown"] for event in events(design) if event["event"] == "look"] == [False, True]
    panel.ui.pauseButton.click()
    assert all(view.node is None for view in views)
    panel.ui.pauseButton.click()
    assert [view.node for view in views] == list(panel.sitting.explanations.values())
    before = [view.node for view in views]
    answer(panel)
    assert all(node.GetScene() is None for node in before)
    assert [view.node for view in views] == list(panel.sitting.explanations.values())


@pytest.mark.parametrize(("part", "folder"), [("text", "own"), ("map", "words")])
def test_what_is_of_another_kind_is_not_shown(panel, make, part, folder):
    design = make([part], explanations={part: folder})
    affine, map_ = oblique_affine(), blob(SHAPE, SPOT)
    made = plain_map.saliency(map_[None], affine).provenance
    mx.Caption(made, {}, "Nothing.", (), map_[None][:0], affine).save(design.parent / "words")
    begin(panel, design)
    assert "cannot be shown" in panel.ui.messageLabel.text
    assert f"'{part}' shows a" in events(design)[-1]["why"]


def test_nobody_reads_as_another_by_accident(panel, make):
    design = make(["none"])
    ui = panel.ui
    ui.designPathLineEdit.currentPath = str(design)
    assert not ui.beginButton.enabled
    begin(panel, design, "r2")
    ui.stopButton.click()
    assert ui.readerSelector.currentText == "r2"
    assert ui.beginButton.enabled
    assert not (design.parent / studies.JOURNALS / "r1.jsonl").exists()


def test_what_was_explained_before_goes_out_of_sight(panel, make):
    before = slicer.util.addVolumeFromArray(np.zeros(SHAPE), oblique_affine()[:, [2, 1, 0, 3]], "Scan of before")
    shown = answers.of(plain_map.saliency(blob(SHAPE, SPOT)[None], oblique_affine()))
    (map_,) = mrml.addAnswers(before, [shown])
    assert layers() == {(before.GetID(), map_.GetID())}
    begin(panel, make(["none"]))
    assert layers() == {(panel.sitting.scan.GetID(), None)}
    assert not results.part(map_, "HotSpots").GetDisplayNode().GetVisibility()


def test_no_study_is_opened_of_what_is_none(panel, tmp_path):
    (tmp_path / "design.json").write_text("{}", encoding="utf-8")
    panel.ui.designPathLineEdit.currentPath = str(tmp_path / "design.json")
    assert "is no design of a study" in panel.ui.messageLabel.text
    assert not panel.ui.beginButton.enabled


def test_it_stays_out_of_the_way(host):
    module = host.open("MedXAI")
    host.until(lambda: module.logic.methods)
    assert module.studyPanel.widget in module.ui.studyCollapsibleButton.findChildren(qt.QWidget)
    assert module.ui.studyCollapsibleButton.collapsed
    assert module.studyPanel._views == {}
    host.close()


def test_picture(host, panel, make, tmp_path):
    """What the documentation shows."""
    begin(panel, make(["ai+map"], localise=True))
    panel._buttons["malignant"].click()
    panel.ui.whereButton.click()
    panel.sitting.point.AddControlPoint(22, 120, -612)
    panel.ui.confidenceSlider.value = 85
    picture = host.picture(panel.widget, Path(os.environ.get("MEDXAI_PICTURES") or tmp_path) / "panel-study.png")
    assert picture.stat().st_size <= 300_000
