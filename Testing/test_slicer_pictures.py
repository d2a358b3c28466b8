"""What a radiologist sees in Slicer: pictures of a network's explanation of a real nodule, drawn off the screen."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

slicer = pytest.importorskip("slicer")

import slicer_scene  # noqa: E402
from slicer_scene import SliceView, SpaceView  # noqa: E402

import MedXAILib as mx  # noqa: E402
from MedXAILib.resources import path  # noqa: E402
from MedXAISlicerLib import display, geometry, mrml, results  # noqa: E402


@pytest.fixture(scope="module")
def chest():
    """A network's explanation of a real nodule, in the three slice views and the 3-D view."""
    with slicer_scene.opened() as app:
        planes = {"Red": "Axial", "Green": "Coronal", "Yellow": "Sagittal"}
        views = [SliceView(app, *named, size=(300, 300)) for named in planes.items()]
        for view in views:
            view.node.SetRulerType(view.node.RulerTypeThin)
            view.node.SetOrientationMarkerType(view.node.OrientationMarkerTypeCube)
            view.node.SetOrientationMarkerSize(view.node.OrientationMarkerSizeSmall)
        for view in views[:2]:
            view.node.SetSliceVisible(True)
        space = SpaceView(app, size=(340, 604))
        scan = slicer_scene.read_volume(path("SampleData/chest_ct_nodule.nrrd"), "Chest CT")
        scan.GetDisplayNode().AutoWindowLevelOff()
        scan.GetDisplayNode().SetWindowLevelMinMax(-1350, 150)
        mask = slicer_scene.read_volume(path("SampleData/chest_ct_nodule_mask.nrrd"), "Nodule")
        nodule = slicer.util.arrayFromVolume(mask) > 0
        segmentation = slicer_scene.add_segmentation(scan, nodule, "Nodule")
        app.scene.RemoveNode(mask)
        segmentation.SetDisplayVisibility(False)
        yield scan, nodule, segmentation, views, space


def framed(picture: np.ndarray) -> np.ndarray:
    return np.pad(picture, ((2, 2), (2, 2), (0, 0)), constant_values=40)


def written(name: str, tmp_path: Path, upper: list[np.ndarray], lower: list[np.ndarray], right: np.ndarray) -> None:
    """Write pictures side by side, to the documentation when MEDXAI_PICTURES names its folder."""
    target = Path(os.environ.get("MEDXAI_PICTURES", tmp_path)) / name
    rows = [np.concatenate([framed(p) for p in row], axis=1) for row in (upper, lower)]
    sheet = np.concatenate([np.concatenate(rows), framed(right)], axis=1)
    Image.fromarray(sheet).save(target, optimize=True)
    assert target.stat().st_size <= 300_000


@slicer_scene.needs_graphics
@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
def test_pictures_of_a_nodule(chest, tmp_path, signed):
    scan, nodule, segmentation, views, space = chest
    made = mrml.explain(
        scan,
        mx.load_model(path("Models/lung_nodule")),
        "hirescam",
        target="malignant",
        region=(segmentation, "Nodule"),
        positive=not signed,
    )
    array = slicer.util.arrayFromVolume(made)
    assert nodule[np.unravel_index(array.argmax(), array.shape)]
    for view in views:
        view.fit(zoom=2.5)
    display.jumpToPeak(made)
    over = [view.picture() for view in views]
    for view in views:
        view.composite.SetForegroundOpacity(0)
    results.part(made, "HotSpots").GetDisplayNode().SetVisibility2D(False)
    slicer.modules.colors.logic().GetColorLegendDisplayNode(made).SetVisibility(False)
    alone = [view.picture() for view in views]
    display.overlay(made)
    # What the hot spots stand out from.
    views[1].logic.SetSliceOffset(views[1].logic.GetSliceOffset() - 25)
    space.look(geometry.peak(made), from_=(-75, 125, 95))
    coloured = [(np.ptp(p.astype(int), axis=2) > 40).mean() for p in (*over, space.picture(), *alone)]
    assert min(coloured[:4]) > 0.002
    assert max(coloured[4:]) == 0
    written(f"slicer-{'signed' if signed else 'unsigned'}.png", tmp_path, alone, over, space.picture())
