"""The Slicer module without the application: on the slicer-core package, where that is installed."""

from __future__ import annotations

import importlib
import json
import sys
import unittest
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch

slicer = pytest.importorskip("slicer")

import vtk  # noqa: E402
from torch import nn  # noqa: E402

import MedXAILib as mx  # noqa: E402
from MedXAILib.errors import MedXAIError  # noqa: E402
from MedXAISlicerLib import mrml  # noqa: E402

SIZE = (5, 6, 7)  # (D, H, W)


@pytest.fixture(autouse=True)
def scene():
    slicer.mrmlScene = slicer.vtkMRMLScene()
    yield slicer.mrmlScene
    slicer.mrmlScene.Clear(True)


def rotation(x: float, y: float, z: float) -> np.ndarray:
    """4x4, turning about x, then y, then z (radians)."""
    turned = np.eye(4)
    for angle, (a, b) in ((x, (1, 2)), (y, (2, 0)), (z, (0, 1))):
        step = np.eye(4)
        step[[a, b], [a, b]] = np.cos(angle)
        step[b, a] = np.sin(angle)
        step[a, b] = -np.sin(angle)
        turned = step @ turned
    return turned


def oblique_node(array: np.ndarray, **options):
    """A volume node with a tilted grid of 0.7 x 1.3 x 2.5 mm, under a transform that turns and shifts it."""
    geometry = rotation(0.3, -0.5, 1.1) @ np.diag([0.7, 1.3, 2.5, 1])
    geometry[:3, 3] = 12, -34, 56
    node = slicer.util.addVolumeFromArray(array, geometry, "Scan", **options)
    moved = rotation(-0.2, 0.4, 0.9)
    moved[:3, 3] = -7, 8, 9
    transform = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLLinearTransformNode")
    transform.SetMatrixTransformToParent(slicer.util.vtkMatrixFromArray(moved))
    node.SetAndObserveTransformNodeID(transform.GetID())
    return node, geometry, moved


def ijk_to_ras(node) -> np.ndarray:
    matrix = vtk.vtkMatrix4x4()
    node.GetIJKToRASMatrix(matrix)
    return slicer.util.arrayFromVTKMatrix(matrix)


def voxels() -> np.ndarray:
    return np.random.default_rng(0).normal(size=SIZE).astype(np.float32)


def test_volume_has_each_voxel_in_its_place():
    array = voxels()
    node, geometry, _ = oblique_node(array)
    volume = mrml.volumeFromNode(node)
    assert volume.shape == SIZE
    np.testing.assert_allclose(volume.spacing, (2.5, 1.3, 0.7))
    for k, j, i in product(*map(range, SIZE)):
        assert volume.data[0, k, j, i] == array[k, j, i]
        np.testing.assert_allclose(volume.to_point((k, j, i)), (geometry @ (i, j, k, 1))[:3], atol=1e-9)


def test_volume_is_a_copy():
    node, *_ = oblique_node(voxels())
    volume = mrml.volumeFromNode(node)
    before = volume.data.clone()
    slicer.util.arrayFromVolume(node)[:] = 0
    assert torch.equal(volume.data, before)


def test_empty_volume_is_refused():
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "Empty")
    with pytest.raises(MedXAIError, match="'Empty' holds no voxels"):
        mrml.volumeFromNode(node)


def test_vector_volume_has_channels_first():
    array = np.stack([voxels(), -voxels()], axis=-1)
    node, *_ = oblique_node(array, nodeClassName="vtkMRMLVectorVolumeNode")
    np.testing.assert_array_equal(mrml.volumeFromNode(node).data.numpy(), np.moveaxis(array, -1, 0))


def test_centre_goes_below_the_transform():
    node, geometry, moved = oblique_node(voxels())
    in_node = geometry @ (3, 2, 1, 1)
    np.testing.assert_allclose(mrml.regionBelowTransform(node, tuple((moved @ in_node)[:3])), in_node[:3])


def test_region_stays_where_there_is_no_transform():
    node = slicer.util.addVolumeFromArray(voxels())
    assert mrml.regionBelowTransform(node, (1.0, 2.0, 3.0)) == (1.0, 2.0, 3.0)
    assert mrml.regionBelowTransform(node, ((0, 5, 0), (4, 0, 6))) == ((0, 0, 0), (4, 5, 6))


def test_turned_box_becomes_the_box_around_it():
    node, _, moved = oblique_node(voxels())
    low, high = mrml.regionBelowTransform(node, ((0, 0, 0), (4, 5, 6)))
    corners = [(np.linalg.inv(moved) @ (x, y, z, 1))[:3] for x, y, z in product((0, 4), (0, 5), (0, 6))]
    np.testing.assert_allclose(low, np.min(corners, axis=0))
    np.testing.assert_allclose(high, np.max(corners, axis=0))


def test_map_lies_on_the_volume_and_says_where_it_came_from():
    array = voxels()
    node, geometry, _ = oblique_node(array)
    network = nn.Sequential(nn.Flatten(), nn.Linear(array.size, 2))
    model = mx.Model(network, class_names=("no", "yes"), channels=1, spatial_dims=3)
    made = mrml.explain(node, model, "gradient", target="yes")
    weights = network[1].weight[1].detach().reshape(SIZE)
    np.testing.assert_allclose(slicer.util.arrayFromVolume(made), weights, atol=1e-7)
    np.testing.assert_allclose(ijk_to_ras(made), geometry, atol=1e-9)
    assert made.GetTransformNodeID() == node.GetTransformNodeID()
    assert made.GetNodeReference("MedXAI.Source") is node
    assert json.loads(made.GetAttribute("MedXAI.Provenance"))["method"] == "gradient"


def test_map_of_several_channels_is_a_vector_volume():
    node, *_ = oblique_node(voxels())
    data = np.stack([voxels(), -voxels()])
    made = mrml.addMapNode(node, data, "Map", "{}")
    np.testing.assert_array_equal(slicer.util.arrayFromVolume(made), np.moveaxis(data, 0, -1))


@pytest.fixture
def module(monkeypatch):
    """MedXAI.py, on stand-ins for what only the application has: base classes, translation, module logics."""

    class Module:
        def __init__(self, parent):
            self.parent = parent

    bases = SimpleNamespace(
        ScriptedLoadableModule=Module,
        ScriptedLoadableModuleLogic=object,
        ScriptedLoadableModuleTest=unittest.TestCase,
        ScriptedLoadableModuleWidget=object,
    )
    monkeypatch.setitem(sys.modules, "slicer.ScriptedLoadableModule", bases)
    monkeypatch.setitem(sys.modules, "slicer.i18n", SimpleNamespace(tr=str, translate=lambda context, text: text))
    volumes = slicer.vtkSlicerVolumesLogic()
    modules = SimpleNamespace(volumes=SimpleNamespace(logic=lambda: volumes))
    monkeypatch.setattr(slicer, "modules", modules, raising=False)
    monkeypatch.delitem(sys.modules, "MedXAI", raising=False)
    return importlib.import_module("MedXAI")


def test_module_says_what_it_is(module):
    parent = module.MedXAI(SimpleNamespace()).parent
    assert parent.title == "MedXAI"
    assert "not for diagnosis" in parent.helpText


def test_self_test_of_the_module(module):
    module.MedXAITest("runTest").debug()
