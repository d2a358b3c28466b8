"""The Slicer module without the application: on the slicer-core package, where that is installed."""

from __future__ import annotations

import ast
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

slicer = pytest.importorskip("slicer")

import slicer_scene  # noqa: E402
from slicer_scene import oblique_node, rotation  # noqa: E402
from torch import nn  # noqa: E402

import MedXAILib as mx  # noqa: E402
from MedXAILib.errors import MedXAIError  # noqa: E402
from MedXAISlicerLib import geometry, mrml, regions, results  # noqa: E402

SIZE = (5, 6, 7)  # (D, H, W)


@pytest.fixture(autouse=True)
def scene():
    with slicer_scene.opened() as app:
        yield app.scene


def voxels() -> np.ndarray:
    return np.random.default_rng(0).normal(size=SIZE).astype(np.float32)


def test_volume_has_each_voxel_in_its_place():
    array = voxels()
    node, geometry, _ = oblique_node(array)
    scan = mrml.scanOf(node)
    assert scan["data"].shape == (1, *SIZE)
    for k, j, i in product(*map(range, SIZE)):
        assert scan["data"][0, k, j, i] == array[k, j, i]
        np.testing.assert_allclose(scan["affine"] @ (k, j, i, 1), geometry @ (i, j, k, 1), atol=1e-9)


def test_volume_is_a_copy():
    node, *_ = oblique_node(voxels())
    scan = mrml.scanOf(node)
    before = scan["data"].copy()
    slicer.util.arrayFromVolume(node)[:] = 0
    np.testing.assert_array_equal(scan["data"], before)


def test_empty_volume_is_refused():
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "Empty")
    with pytest.raises(MedXAIError, match="'Empty' holds no voxels"):
        mrml.scanOf(node)


def test_vector_volume_has_channels_first():
    array = np.stack([voxels(), -voxels()], axis=-1)
    node, *_ = oblique_node(array, nodeClassName="vtkMRMLVectorVolumeNode")
    np.testing.assert_array_equal(mrml.scanOf(node)["data"], np.moveaxis(array, -1, 0))


def test_labelmap_is_refused():
    node = slicer.util.addVolumeFromArray(
        np.ones(SIZE, np.uint8), name="Lungs", nodeClassName="vtkMRMLLabelMapVolumeNode"
    )
    with pytest.raises(MedXAIError, match="'Lungs' is a label map: choose the scan"):
        mrml.scanOf(node)


def test_volume_that_is_gone_is_refused(scene):
    node, *_ = oblique_node(voxels())
    scene.RemoveNode(node)
    for gone in (node, None):
        with pytest.raises(MedXAIError, match="no volume"):
            mrml.scanOf(gone)


@pytest.mark.parametrize("kind", ["vtkMRMLBSplineTransformNode", "vtkMRMLGridTransformNode"])
def test_bent_volume_is_refused(scene, kind):
    node, *_ = oblique_node(voxels())
    warp = scene.AddNewNodeByClass(kind, "Breathing")
    node.GetParentTransformNode().SetAndObserveTransformNodeID(warp.GetID())
    with pytest.raises(MedXAIError, match="'Breathing', and networks see straight grids"):
        mrml.explain(node, linear_model())
    assert not results.findExplanations()


def test_point_goes_below_the_transform(scene):
    node, geometry_, moved = oblique_node(voxels())
    in_node = geometry_ @ (3, 2, 1, 1)
    point = tuple((moved @ in_node)[:3])
    np.testing.assert_allclose(regions.inVolume(node, point), in_node[:3])
    clicked = scene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode")
    with pytest.raises(MedXAIError, match="no point"):
        regions.inVolume(node, clicked)
    clicked.AddControlPointWorld(*point)
    np.testing.assert_allclose(regions.inVolume(node, clicked), in_node[:3])


def test_region_stays_where_there_is_no_transform():
    node = slicer.util.addVolumeFromArray(voxels())
    assert regions.inVolume(node, (1.0, 2.0, 3.0)) == (1.0, 2.0, 3.0)
    assert regions.inVolume(node, ((0, 5, 0), (4, 0, 6))) == ((0, 0, 0), (4, 5, 6))
    assert regions.inVolume(node, ((0, 5, 0), (4, 0, 6)), asCentre=True) == (2, 2.5, 3)


@pytest.mark.parametrize("region", [5, "nodule", (1, 2), (1, 2, float("nan")), ((1, 2, 3),), (None, "x")])
def test_what_is_no_region_is_refused(region):
    with pytest.raises(MedXAIError, match="A region is"):
        regions.inVolume(slicer.util.addVolumeFromArray(voxels()), region)


def test_turned_box_becomes_the_box_around_it():
    node, _, moved = oblique_node(voxels())
    low, high = regions.inVolume(node, ((0, 0, 0), (4, 5, 6)))
    corners = [(np.linalg.inv(moved) @ (x, y, z, 1))[:3] for x, y, z in product((0, 4), (0, 5), (0, 6))]
    np.testing.assert_allclose(low, np.min(corners, axis=0))
    np.testing.assert_allclose(high, np.max(corners, axis=0))


def test_region_of_interest_is_its_turned_box(scene):
    node, _, moved = oblique_node(voxels())
    roi = scene.AddNewNodeByClass("vtkMRMLMarkupsROINode")
    with pytest.raises(MedXAIError, match="empty"):
        regions.inVolume(node, roi)
    roi.SetCenter(1, 2, 3)
    roi.SetSize(10, 20, 30)
    turned = rotation(0.1, 0.2, -0.3)
    transform = scene.AddNewNodeByClass("vtkMRMLLinearTransformNode")
    transform.SetMatrixTransformToParent(slicer.util.vtkMatrixFromArray(turned))
    roi.SetAndObserveTransformNodeID(transform.GetID())
    down = np.linalg.inv(moved) @ turned
    corners = [(down @ (1 + x, 2 + y, 3 + z, 1))[:3] for x, y, z in product((-5, 5), (-10, 10), (-15, 15))]
    low, high = regions.inVolume(node, roi)
    np.testing.assert_allclose(low, np.min(corners, axis=0))
    np.testing.assert_allclose(high, np.max(corners, axis=0))
    np.testing.assert_allclose(regions.inVolume(node, roi, asCentre=True), (down @ (1, 2, 3, 1))[:3])


def test_segment_is_its_voxels(scene):
    node, geometry_, _ = oblique_node(voxels())
    mask = np.zeros(SIZE, bool)
    mask[1:3, 2:5, 4] = mask[1, 2, 5] = True
    points = (geometry_ @ [*np.argwhere(mask).T[::-1], np.ones(mask.sum())])[:3]
    segmentation = slicer_scene.add_segmentation(node, mask, "Nodule")
    for hardened in (False, True):
        if hardened:
            segmentation.HardenTransform()
        centre = regions.inVolume(node, (segmentation, "Nodule"), asCentre=True)
        np.testing.assert_allclose(centre, points.mean(1), atol=1e-4)
        low, high = regions.inVolume(node, (segmentation, "Nodule"))
        np.testing.assert_allclose(low, points.min(1), atol=1e-4)
        np.testing.assert_allclose(high, points.max(1), atol=1e-4)
    segmentation.GetSegmentation().AddEmptySegment("None", "None")
    with pytest.raises(MedXAIError, match="'None'"):
        regions.inVolume(node, (segmentation, "None"))
    with pytest.raises(MedXAIError, match="did you mean Nodule"):
        regions.inVolume(node, (segmentation, "Nodul"))


def linear_model(channels: int = 1) -> mx.Model:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(channels * int(np.prod(SIZE)), 2))
    return mx.Model(network, class_names=("no", "yes"), channels=channels, spatial_dims=3)


def test_map_lies_on_the_volume_and_says_where_it_came_from():
    node, geometry_, _ = oblique_node(voxels())
    model = linear_model()
    made = mrml.explain(node, model, "gradient", target="yes")
    weights = model.network[1].weight[1].detach().reshape(SIZE)
    np.testing.assert_allclose(slicer.util.arrayFromVolume(made), weights, atol=1e-7)
    np.testing.assert_allclose(geometry.ijkToRas(made), geometry_, atol=1e-9)
    assert made.GetTransformNodeID() == node.GetTransformNodeID()
    assert results.part(made, "Source") is node
    assert results.provenance(made)["method"] == "gradient"
    assert made.GetAttribute("MedXAI.TargetLabel") == "yes"
    assert results.isSigned(made)
    assert results.findExplanations() == [made]


def test_channels_are_summed_and_kept():
    node, *_ = oblique_node(np.stack([voxels(), -voxels()], axis=-1), nodeClassName="vtkMRMLVectorVolumeNode")
    model = linear_model(channels=2)
    made = mrml.explain(node, model, "gradient", target="yes", per_channel=True)
    weights = model.network[1].weight[1].detach().reshape(2, *SIZE).numpy()
    np.testing.assert_allclose(slicer.util.arrayFromVolume(made), weights.sum(0), atol=1e-6)
    kept = results.part(made, "Channels")
    np.testing.assert_allclose(slicer.util.arrayFromVolume(kept), np.moveaxis(weights, 0, -1), atol=1e-7)
    np.testing.assert_allclose(geometry.ijkToWorld(kept), geometry.ijkToWorld(node), atol=1e-9)


def test_several_targets_give_several_maps():
    node, *_ = oblique_node(voxels())
    made = mrml.explain(node, linear_model(), "gradient", target=["yes", "no"])
    assert [m.GetAttribute("MedXAI.TargetLabel") for m in made] == ["yes", "no"]
    assert results.part(made[0], "HotSpots").GetDisplayNode().GetVisibility()
    assert not results.part(made[1], "HotSpots").GetDisplayNode().GetVisibility()


def test_volume_removed_in_mid_run_leaves_nothing_behind(scene):
    node, *_ = oblique_node(voxels())
    run = mx.Run(progress=lambda progress: node.GetScene() and scene.RemoveNode(node))
    with pytest.raises(MedXAIError, match="no volume"):
        mrml.explain(node, linear_model(), "gradient", run=run)
    assert not results.findExplanations()


def test_cancelled_run_leaves_nothing_behind(scene):
    node, *_ = oblique_node(voxels())
    before = scene.GetNumberOfNodes()
    with pytest.raises(mx.errors.Cancelled):
        mrml.explain(node, linear_model(), "gradient", run=mx.Run(cancel=lambda: True))
    assert scene.GetNumberOfNodes() == before


def test_explanation_outlives_its_volume(scene):
    node, *_ = oblique_node(voxels())
    made = mrml.explain(node, linear_model(), "gradient")
    scene.RemoveNode(node)
    assert results.part(made, "Source") is None
    assert results.findExplanations() == [made]
    assert "Scan: Scan" in results.summary(made, [])


def test_results_lie_beside_the_scan_under_its_study():
    node, *_ = oblique_node(voxels())
    hierarchy = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(slicer.mrmlScene)
    study = hierarchy.CreateStudyItem(hierarchy.CreateSubjectItem(hierarchy.GetSceneItemID(), "Patient"), "CT")
    hierarchy.CreateItem(study, node)
    made = mrml.explain(node, linear_model(), "gradient")
    folders = {
        hierarchy.GetItemParent(hierarchy.GetItemByDataNode(n))
        for n in (made, *(results.part(made, name) for name in ("Summary", "HotSpots", "Statistics")))
    }
    assert len(folders) == 1
    assert hierarchy.GetItemParent(folders.pop()) == study


def test_summary_says_what_is_to_be_known():
    node, *_ = oblique_node(voxels())
    made = mrml.explain(node, linear_model(), "gradient", target="yes")
    text = results.part(made, "Summary").GetText()
    for words in (
        "What speaks for 'yes', and against it",
        "Scan: Scan",
        "Method: gradient",
        " mL",
        "not for diagnosis",
    ):
        assert words in text


@pytest.mark.parametrize("path", sorted(Path(mrml.__file__).parent.glob("*.py")), ids=lambda path: path.name)
def test_file_loads_without_what_slicer_lacks(path):
    """Slicer loads its modules before PyTorch and the rest need be installed."""
    text = path.read_text(encoding="utf-8")
    imported = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import):
            imported.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported <= {"MedXAISlicerLib", "numpy", "slicer", "vtk"} | set(sys.stdlib_module_names)
    assert len(text.splitlines()) <= 400
