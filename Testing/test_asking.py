"""From the scene to the worker and back: a real worker, a real network, Slicer's own scene."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

slicer = pytest.importorskip("slicer")

import slicer_scene  # noqa: E402

import MedXAILib as mx  # noqa: E402
from MedXAILib.errors import Cancelled, MedXAIError, Untrusted  # noqa: E402
from MedXAILib.resources import path  # noqa: E402
from MedXAISlicerLib import answers, asking, geometry, mrml, results, settings, workers  # noqa: E402

NETWORK = path("Models/lung_nodule")
# Long enough to be interrupted.
SLOW = {"steps": 1000, "max_steps": 10000, "tolerance": 1e-9}


@pytest.fixture(scope="module")
def worker():
    one = workers.Worker()
    yield one
    one.close()


@pytest.fixture(autouse=True)
def scene():
    with slicer_scene.opened() as app:
        yield app.scene


@pytest.fixture
def scan(scene):
    """A nodule on a tilted grid, under a transform."""
    array = np.random.default_rng(3).normal(-700, 60, (40, 60, 90)).astype(np.int16)
    d, h, w = np.ogrid[:40, :60, :90]
    array[(2.5 * (d - 20)) ** 2 + (1.3 * (h - 30)) ** 2 + (0.7 * (w - 45)) ** 2 < 8**2] = 40
    node, *_ = slicer_scene.oblique_node(array)
    return node


def middle(node):
    return tuple((geometry.ijkToWorld(node) @ (45, 30, 20, 1))[:3])


def nodes_of(scene):
    return {scene.GetNthNode(i).GetID() for i in range(scene.GetNumberOfNodes())}


def files_of(worker):
    folder = worker.log.parent
    return [p for p in folder.rglob("*") if p.is_file() and p != worker.log]


def begun(explaining, worker):
    """Wait until it computes."""
    while explaining.progress is None or explaining.progress.done < 1:
        worker.poll(0.05)
        assert not explaining.finished, explaining.error
    return explaining


def test_map_is_that_of_the_library(scan, worker):
    before = slicer.util.arrayFromVolume(scan).copy()
    made = asking.Explaining(
        scan, NETWORK, "hirescam", ["malignant", "benign"], {"positive": False}, middle(scan), worker=worker
    ).wait()
    given = mrml.scanOf(scan)
    volume = mx.Volume(torch.from_numpy(given["data"].astype(np.float32)), given["affine"])
    below = np.linalg.inv(geometry.ijkToWorld(scan) @ np.linalg.inv(geometry.ijkToRas(scan))) @ (*middle(scan), 1)
    expected = mx.explain(
        mx.load_model(NETWORK),
        volume,
        "hirescam",
        target=["malignant", "benign"],
        region=tuple(below[:3]),
        positive=False,
    )
    for node, saliency in zip(made, expected, strict=True):
        assert np.count_nonzero(saliency.data) > 1000
        np.testing.assert_allclose(slicer.util.arrayFromVolume(node), saliency.data[0], atol=1e-5)
        np.testing.assert_allclose(geometry.ijkToWorld(node), geometry.ijkToWorld(scan), atol=1e-9)
        assert results.part(node, "Source") is scan
    assert results.provenance(made[0])["model"]["fingerprint"] == expected[0].provenance.model["fingerprint"]
    assert np.array_equal(slicer.util.arrayFromVolume(scan), before)
    assert not files_of(worker)


def test_network_for_patches_looks_around_the_middle_of_a_box(scan, worker):
    box = tuple(np.subtract(middle(scan), (4, 5, 6))), tuple(np.add(middle(scan), (4, 5, 6)))
    (made,) = asking.Explaining(scan, NETWORK, "gradcam", "malignant", region=box, worker=worker).wait()
    np.testing.assert_allclose(results.provenance(made)["region"], (geometry.ijkToRas(scan) @ (45, 30, 20, 1))[:3])


def test_map_of_another_place_is_refused(scan):
    place = geometry.ijkToRas(scan)[:, [2, 1, 0, 3]]
    made = {"method": "gradcam", "target_label": "x", "volume": {"source": "Other"}}
    manifest = {"kind": "SaliencyMap", "files": ["map"], "provenance": made, "residual": {}, "signed": False}
    place[0, 3] += 1
    answer = answers.Answer(manifest, {"map": (np.ones((40, 60, 90), np.float32), place)})
    with pytest.raises(MedXAIError, match="This map of 'Other' is not on the grid of 'Scan'"):
        mrml.addAnswers(scan, [answer])


def test_model_predicts(scan, worker):
    asked = asking.Predicting(scan, NETWORK, middle(scan), worker=worker)
    asked.wait()
    assert sum(asked.scores.values()) == pytest.approx(1, abs=1e-5)
    assert list(asked.scores) == asked.model["class_names"] == ["none", "benign", "malignant"]


def test_network_that_writes_says_it_in_words(scan, worker):
    asked = asking.Predicting(scan, path("Models/lung_nodule_captioning"), middle(scan), worker=worker)
    asked.wait()
    assert not asked.scores and "nodule" in asked.text


def test_voxels_changed_in_between_are_seen(scan, worker):
    def predicted():
        asked = asking.Predicting(scan, NETWORK, middle(scan), worker=worker)
        asked.wait()
        return asked.scores

    first = predicted()
    slicer.util.arrayFromVolume(scan)[15:25] -= 300
    slicer.util.arrayFromVolumeModified(scan)
    assert predicted() != first


def test_scan_that_moved_is_another(scan, worker):
    before = mrml.scanOf(scan)["key"]
    scan.SetOrigin(1, 2, 3)
    assert mrml.scanOf(scan)["key"] != before


def test_cancelled_run_leaves_nothing(scan, worker, scene):
    before = nodes_of(scene)
    explaining = begun(
        asking.Explaining(scan, NETWORK, "integrated_gradients", "malignant", SLOW, middle(scan), worker=worker), worker
    )
    explaining.cancel()
    with pytest.raises(Cancelled):
        explaining.wait()
    assert explaining.state == "cancelled"
    assert nodes_of(scene) == before
    assert not files_of(worker)


@pytest.mark.parametrize("way", ["removed", "closed"])
def test_scan_gone_in_mid_run(scan, worker, scene, way):
    explaining = begun(
        asking.Explaining(scan, NETWORK, "integrated_gradients", "malignant", SLOW, middle(scan), worker=worker), worker
    )
    if way == "removed":
        scene.RemoveNode(scan)
    else:
        scene.Clear()
    with pytest.raises(MedXAIError, match="removed while"):
        explaining.wait()
    assert not results.findExplanations()
    assert not files_of(worker)


@pytest.mark.parametrize("way", ["cancelled", "removed", "closed"])
def test_stopped_while_the_result_is_added(scan, worker, scene, way):
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(scene)
    items, before = hierarchy.GetNumberOfItems(), nodes_of(scene)
    explaining = asking.Explaining(scan, NETWORK, "gradcam", ["malignant", "benign"], {}, middle(scan), worker=worker)
    while not results.findExplanations():
        worker.poll(0.05)
    assert not explaining.finished
    if way == "cancelled":
        explaining.cancel()
    elif way == "removed":
        scene.RemoveNode(scan)
    else:
        scene.Clear()
    with pytest.raises(MedXAIError):
        explaining.wait()
    assert not results.findExplanations()
    if way == "cancelled":
        # The colour table of the scene is for all maps.
        left = [scene.GetNodeByID(node_id).GetName() for node_id in nodes_of(scene) - before]
        assert left == ["MedXAI unsigned"]
        assert hierarchy.GetNumberOfItems() == items


def test_worker_killed_ten_times(scan, worker, scene):
    for _ in range(10):
        explaining = begun(
            asking.Explaining(scan, NETWORK, "integrated_gradients", "malignant", SLOW, middle(scan), worker=worker),
            worker,
        )
        before = nodes_of(scene)
        for process in psutil.Process().children(recursive=True):
            if "MedXAILib.worker" in " ".join(process.cmdline()):
                process.kill()
        with pytest.raises(MedXAIError, match="The worker stopped"):
            explaining.wait()
        assert nodes_of(scene) == before
    (made,) = asking.Explaining(scan, NETWORK, "gradcam", None, region=middle(scan), worker=worker).wait()
    assert results.findExplanations() == [made]
    assert not files_of(worker)


def test_closed_worker_ends_what_runs(scan):
    one = workers.Worker()
    explaining = begun(
        asking.Explaining(scan, NETWORK, "integrated_gradients", "malignant", SLOW, middle(scan), worker=one), one
    )
    folder = one.log.parent
    one.close()
    assert explaining.finished
    assert not folder.exists()
    assert not [p for p in psutil.Process().children(recursive=True) if str(folder) in " ".join(p.cmdline())]


def test_growing_map_is_shown_and_taken_away(scan, worker, scene):
    seen = []

    def changed(explaining):
        seen.extend(
            n.GetName() for n in slicer.util.getNodesByClass("vtkMRMLScalarVolumeNode") if "so far" in n.GetName()
        )

    parameters = {"samples": 300}
    explaining = asking.Explaining(
        scan, NETWORK, "smoothgrad", "malignant", parameters, middle(scan), onChange=changed, worker=worker
    )
    (made,) = explaining.wait()
    assert seen
    assert not [n for n in slicer.util.getNodesByClass("vtkMRMLScalarVolumeNode") if n not in (scan, made)]


def occluding(scan, worker, **options):
    """Covers one small window of the scan after the other, until somebody has seen something of it."""
    parameters = {"window": [2.5], "stride": [2.5]}
    explaining = asking.Explaining(
        scan, NETWORK, "occlusion", "malignant", parameters, middle(scan), anytime=True, worker=worker, **options
    )
    while not explaining.canFinish:
        worker.poll(0.05)
        assert not explaining.finished, explaining.error
    return explaining


def test_map_so_far_is_kept(scan, worker, scene, tmp_path):
    reached, both = [], []

    def changed(explaining):
        node = explaining._partialNode
        if node is not None and node.GetScene() is not None:
            array = slicer.util.arrayFromVolume(node)
            reached.extend({np.count_nonzero(array)} - {*reached})
            low = node.GetDisplayNode().GetWindowLevelMin()
            assert low < 0 if array.min() < 0 else low == 0
            both.append(array.min() < 0)

    explaining = occluding(scan, worker, onChange=changed)
    while len(reached) < 2:
        worker.poll(0.05)
    assert explaining.progress.seconds_left > 0 and any(both)
    explaining.finish()
    assert explaining.stopping and not explaining.canFinish and not explaining.cancelled
    (made,) = explaining.wait()
    array = slicer.util.arrayFromVolume(made).copy()
    assert 0 < reached[0] < reached[1] <= np.count_nonzero(array)
    assert made.GetName().endswith("Scan occlusion malignant (partial)")
    assert results.isPartial(made) and "malignant (partial) ·" in results.title(made)
    assert "Note: Stopped early, at step" in results.part(made, "Summary").GetText()
    assert slicer.modules.colors.logic().GetColorLegendDisplayNode(made).GetTitleText() == "For / against (partial)"
    volumes = slicer.util.getNodesByClass("vtkMRMLScalarVolumeNode")
    assert sorted(node.GetName() for node in volumes) == ["Scan", made.GetName()]
    slicer_scene.save(tmp_path / "scene.mrb")
    scene.Clear()
    slicer_scene.load(tmp_path / "scene.mrb", tmp_path / "cache")
    (made,) = results.findExplanations()
    assert results.isPartial(made) and made.GetName().endswith("(partial)")
    assert np.array_equal(slicer.util.arrayFromVolume(made), array)


def test_map_so_far_can_be_discarded(scan, worker, scene):
    before = nodes_of(scene)
    explaining = occluding(scan, worker)
    explaining.finish()
    explaining.cancel()
    with pytest.raises(Cancelled):
        explaining.wait()
    left = {scene.GetNodeByID(node_id).GetName() for node_id in nodes_of(scene) - before}
    assert left <= {"MedXAI signed", "MedXAI unsigned"}
    assert not files_of(worker)


def test_without_a_map_so_far_to_end_early_is_to_cancel(scan, worker):
    explaining = asking.Explaining(scan, NETWORK, "gradcam", "malignant", {}, middle(scan), anytime=True, worker=worker)
    explaining.finish()
    with pytest.raises(Cancelled):
        explaining.wait()


def test_code_of_a_network_runs_only_when_allowed(scan, worker, tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "_memory", {})
    bundle = tmp_path / "bundle with spaces é"
    shutil.copytree(NETWORK, bundle)
    configuration = bundle / "configs" / "inference.json"
    said = json.loads(configuration.read_text(encoding="utf-8"))
    said["preprocessing"]["transforms"].append({"_target_": "Lambdad", "keys": "image", "func": "$lambda x: x"})
    configuration.write_text(json.dumps(said), encoding="utf-8")
    with pytest.raises(Untrusted) as asked:
        asking.Predicting(scan, bundle, middle(scan), worker=worker).wait()
    assert "lambda x: x" in asked.value.code
    settings.trust(asked.value.code)
    allowed = asking.Predicting(scan, bundle, middle(scan), worker=worker)
    allowed.wait()
    assert allowed.scores


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"model": Path("nowhere")}, "There is no model 'nowhere'"),
        ({"method": "gradcan"}, "did you mean gradcam"),
        ({"target": "cyst"}, "cyst"),
        ({"parameters": {"fuse": "median"}}, "fuse"),
        ({"region": (0.0, 0.0)}, "A region is"),
    ],
)
def test_what_cannot_be_asked_is_refused(scan, worker, scene, fields, said):
    before = nodes_of(scene)
    request = {"model": NETWORK, "method": "gradcam", "region": middle(scan), **fields}
    with pytest.raises(MedXAIError, match=said):
        asking.Explaining(scan, **request, worker=worker).wait()
    assert nodes_of(scene) == before


def test_channels_must_lie_on_one_grid(scan):
    other = slicer.util.addVolumeFromArray(np.zeros((40, 60, 90), np.int16), name="Other")
    with pytest.raises(MedXAIError, match="'Other' is not on the grid of 'Scan'"):
        mrml.scanOf([scan, other])
    other.CopyOrientation(scan)
    with pytest.raises(MedXAIError, match="'Other' is not on the grid of 'Scan'"):
        mrml.scanOf([scan, other])
    other.SetAndObserveTransformNodeID(scan.GetTransformNodeID())
    assert mrml.scanOf([scan, other])["data"].shape == (2, 40, 60, 90)


def test_map_of_several_channels_is_checked(scan, worker, tmp_path):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv3d(2, 2, 3), torch.nn.AdaptiveAvgPool3d(1), torch.nn.Flatten())
    torch.jit.script(network).save(str(tmp_path / "network.ts"))
    second = slicer.util.addVolumeFromArray(slicer.util.arrayFromVolume(scan)[::-1].copy(), name="Second")
    second.CopyOrientation(scan)
    second.SetAndObserveTransformNodeID(scan.GetTransformNodeID())
    (made,) = asking.Explaining([scan, second], tmp_path / "network.ts", "gradient", 0, worker=worker).wait()
    assert results.scans(made) == [scan, second] and results.card(made) is None
    asking.Checking(made, worker=worker).wait()
    assert results.card(made)["findings"] and not files_of(worker)
    slicer.util.arrayFromVolume(second)[:] = 0
    slicer.util.arrayFromVolumeModified(second)
    with pytest.raises(MedXAIError, match="not the volume that was explained"):
        asking.Checking(made, worker=worker).wait()
