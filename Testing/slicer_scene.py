"""A Slicer scene and its views without the application, on the slicer-core package.

Nothing of MRML is imitated: scene, logics, slice views and 3-D views are Slicer's own. What only the application does
is done here as it does it: bringing the logics of its modules together, laying an image into a slice view, and reading
and writing scene bundles.
"""

from __future__ import annotations

import contextlib
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import slicer
import vtk
from vtk.util.numpy_support import vtk_to_numpy

# The name of a module in `slicer.modules`, the class of its logic, and what other logics find it by.
_LOGICS = {
    "colors": ("vtkSlicerColorLogic", "Colors"),
    "volumes": ("vtkSlicerVolumesLogic", "Volumes"),
    "segmentations": ("vtkSlicerSegmentationsModuleLogic", "Segmentations"),
    "subjecthierarchy": ("vtkSlicerSubjectHierarchyModuleLogic", "SubjectHierarchy"),
    "volumerendering": ("vtkSlicerVolumeRenderingLogic", "VolumeRendering"),
    "markups": ("vtkSlicerMarkupsLogic", "Markups"),
    "tables": ("vtkSlicerTablesLogic", "Tables"),
    "texts": ("vtkSlicerTextsLogic", "Texts"),
    "sequences": ("vtkSlicerSequencesLogic", "Sequences"),
}
_IN_SLICES = ("vtkMRMLModelSliceDisplayableManager", "vtkMRMLSegmentationsDisplayableManager2D")
_IN_SPACE = (
    "vtkMRMLCameraDisplayableManager",
    "vtkMRMLViewDisplayableManager",
    "vtkMRMLModelDisplayableManager",
    "vtkMRMLSegmentationsDisplayableManager3D",
    "vtkMRMLVolumeRenderingDisplayableManager",
)
_IN_BOTH = (
    "vtkMRMLOrientationMarkerDisplayableManager",
    "vtkMRMLRulerDisplayableManager",
    "vtkMRMLColorLegendDisplayableManager",
)


@contextlib.contextmanager
def opened() -> Iterator[SimpleNamespace]:
    """An empty scene as `slicer.mrmlScene`, and `slicer.modules` with the logics; gives `.scene` and `.logic`."""
    scene = slicer.vtkMRMLScene()
    app = slicer.vtkSlicerApplicationLogic()
    app.SetMRMLScene(scene)
    app.GetColorLogic().SetMRMLScene(scene)
    app.GetColorLogic().AddDefaultColorNodes()
    app.SetSliceLogics(vtk.vtkCollection())
    app.SetViewLogics(vtk.vtkCollection())
    slicer.vtkMRMLSliceNode.AddDefaultSliceOrientationPresets(scene, True)
    before = getattr(slicer, "mrmlScene", None), getattr(slicer, "modules", None)
    slicer.mrmlScene, slicer.modules = scene, SimpleNamespace()
    for module, (kind, name) in _LOGICS.items():
        logic = getattr(slicer, kind)()
        logic.SetMRMLApplicationLogic(app)
        logic.SetMRMLScene(scene)
        app.SetModuleLogic(name, logic)
        setattr(slicer.modules, module, SimpleNamespace(logic=lambda logic=logic: logic))
    try:
        yield SimpleNamespace(scene=scene, logic=app)
    finally:
        scene.Clear(True)
        slicer.mrmlScene, slicer.modules = before


def save(path: Path) -> None:
    """Write the scene as a bundle (.mrb)."""
    assert slicer.mrmlScene.WriteToMRB(str(path))


def load(path: Path, cache: Path) -> None:
    """Read a bundle (.mrb) into the empty scene, unpacked to the folder `cache`."""
    remote, manager = slicer.vtkMRMLRemoteIOLogic(), slicer.vtkDataIOManagerLogic()
    remote.GetCacheManager().SetRemoteCacheDirectory(str(cache))
    remote.SetMRMLScene(slicer.mrmlScene)
    remote.AddDataIOToScene()
    manager.SetMRMLApplicationLogic(slicer.modules.volumes.logic().GetMRMLApplicationLogic())
    manager.SetAndObserveDataIOManager(remote.GetDataIOManager())
    try:
        assert slicer.mrmlScene.ReadFromMRB(str(path), True)
    finally:
        remote.RemoveDataIOFromScene()


def read_volume(path: Path, name: str):
    """Read an image (NRRD) as a scalar volume."""
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", name)
    storage = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLVolumeArchetypeStorageNode")
    storage.SetFileName(str(path))
    assert storage.ReadData(node)
    node.SetAndObserveStorageNodeID(storage.GetID())
    node.CreateDefaultDisplayNodes()
    return node


def add_segmentation(volume, mask: np.ndarray, name: str):
    """A segmentation of one segment: `mask` on the grid and under the transform of a volume."""
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode")
    node.SetAndObserveTransformNodeID(volume.GetTransformNodeID())
    node.SetReferenceImageGeometryParameterFromVolumeNode(volume)
    segment = node.GetSegmentation().AddEmptySegment(name, name)
    slicer.util.updateSegmentBinaryLabelmapFromArray(mask.astype(np.uint8), node, segment, volume)
    return node


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


@functools.cache
def can_draw() -> bool:
    """Whether this machine draws off the screen, tried in a process of its own because VTK may end it."""
    code = "import vtk; w = vtk.vtkRenderWindow(); w.OffScreenRenderingOn(); w.Render(); exit(not w.SupportsOpenGL())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


needs_graphics = pytest.mark.skipif(
    not can_draw(), reason="drawing off the screen needs OpenGL: apt install libegl1 libgl1"
)


class _View:
    """A window that is nowhere on the screen."""

    def __init__(self, factory, managers, logic, size) -> None:
        self.window = vtk.vtkRenderWindow()
        self.window.SetOffScreenRendering(True)
        self.window.SetMultiSamples(0)
        self.window.SetSize(*size)
        self.renderer = vtk.vtkRenderer()
        self.window.AddRenderer(self.renderer)
        self.interactor = vtk.vtkRenderWindowInteractor()
        self.interactor.SetRenderWindow(self.window)
        factory = factory.GetInstance()
        factory.SetMRMLApplicationLogic(logic)
        for manager in (*managers, *_IN_BOTH):
            if not factory.IsDisplayableManagerRegistered(manager):
                factory.RegisterDisplayableManager(manager)
        self.group = slicer.vtkMRMLDisplayableManagerGroup()
        self.group.Initialize(factory, self.renderer)

    def picture(self) -> np.ndarray:
        """What it shows, (height, width, 3), uint8."""
        self.window.Render()
        grab = vtk.vtkWindowToImageFilter()
        grab.SetInput(self.window)
        grab.ReadFrontBufferOff()
        grab.Update()
        image = grab.GetOutput()
        width, height, _ = image.GetDimensions()
        return vtk_to_numpy(image.GetPointData().GetScalars()).reshape(height, width, -1)[::-1]


class SliceWindow(_View):
    """A window on the slice of a slice logic."""

    def __init__(self, app_logic, logic, size) -> None:
        super().__init__(slicer.vtkMRMLSliceViewDisplayableManagerFactory, _IN_SLICES, app_logic, size)
        self.logic = logic
        self.renderer.GetActiveCamera().ParallelProjectionOn()
        self.group.SetMRMLDisplayableNode(logic.GetSliceNode())
        # The blended image of the slice is RGBA bytes; the application's widget lays it under what the managers draw.
        self.mapper = vtk.vtkImageMapper()
        self.mapper.SetColorWindow(255)
        self.mapper.SetColorLevel(127.5)
        self.actor = vtk.vtkActor2D()
        self.actor.SetMapper(self.mapper)
        self.actor.GetProperty().SetDisplayLocationToBackground()
        self.renderer.AddViewProp(self.actor)

    def picture(self) -> np.ndarray:
        connection = self.logic.GetImageDataConnection()
        self.actor.SetVisibility(connection is not None)
        self.mapper.SetInputConnection(connection)
        return super().picture()


class SliceView(SliceWindow):
    """One of the slice views. `name` is that of Slicer's own: Red, Green, Yellow."""

    def __init__(self, app, name: str, orientation: str, size=(480, 480)) -> None:
        logic = slicer.vtkMRMLSliceLogic()
        logic.SetMRMLApplicationLogic(app.logic)
        logic.SetMRMLScene(app.scene)
        app.logic.GetSliceLogics().AddItem(logic)
        self.node = logic.AddSliceNode(name)
        self.node.SetOrientation(orientation)
        self.composite = logic.GetSliceCompositeNode()
        super().__init__(app.logic, logic, size)

    def fit(self, zoom: float = 1.0) -> None:
        """Fit the background volume, then look `zoom` times closer."""
        self.logic.ResizeSliceNode(*self.window.GetSize())
        self.logic.FitSliceToBackground()
        width, height, depth = self.node.GetFieldOfView()
        self.node.SetFieldOfView(width / zoom, height / zoom, depth)


class SpaceView(_View):
    """The 3-D view."""

    def __init__(self, app, size=(480, 480)) -> None:
        super().__init__(slicer.vtkMRMLThreeDViewDisplayableManagerFactory, _IN_SPACE, app.logic, size)
        self.renderer.SetUseDepthPeeling(True)
        self.renderer.SetUseDepthPeelingForVolumes(True)
        self.logic = slicer.vtkMRMLViewLogic()
        self.logic.SetMRMLApplicationLogic(app.logic)
        self.logic.SetMRMLScene(app.scene)
        app.logic.GetViewLogics().AddItem(self.logic)
        self.node = self.logic.AddViewNode("1")
        self.node.SetBackgroundColor(0, 0, 0)
        self.node.SetBackgroundColor2(0, 0, 0)
        self.node.SetBoxVisible(False)
        self.node.SetAxisLabelsVisible(False)
        self.node.SetOrientationMarkerType(self.node.OrientationMarkerTypeCube)
        self.node.SetOrientationMarkerSize(self.node.OrientationMarkerSizeSmall)
        self.group.SetMRMLDisplayableNode(self.node)

    def look(self, point, from_) -> None:
        """Look at a point in RAS mm from so many mm beside it, with the patient's head up."""
        camera = self.renderer.GetActiveCamera()
        camera.SetFocalPoint(point)
        camera.SetPosition(np.add(point, from_))
        camera.SetViewUp(0, 0, 1)
        self.renderer.ResetCameraClippingRange()
