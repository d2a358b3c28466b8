"""Hot spots: the voxels that hold most of what speaks for the target, as nested segments with their statistics."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import slicer
import vtk
from vtk.util.numpy_support import numpy_to_vtk

from MedXAISlicerLib import geometry, results

SHARES = (0.5, 0.25, 0.1)
"""The parts of all positive values together that the hot spots hold."""

# From the largest to the smallest; unlike the colours of maps, so that the outlines are seen on them.
_OUTER, _INNER = np.array([90, 255, 170]) / 255, np.array([255, 255, 255]) / 255

# Voxels. The surface of more holds up the user interface, and of a scattered gradient it takes minutes: Show 3D makes
# it on demand.
_LARGEST_SURFACE = 20_000

_COLUMNS = ("Volume (mL)", "Mean", "Maximum", "Threshold")


@dataclass(frozen=True)
class HotSpot:
    """The smallest set of voxels that holds `share` of the positive values: those of at least `threshold`.

    `mask` is the box around them, whose first voxel is `corner` (k, j, i).
    """

    share: float
    threshold: float
    corner: tuple[int, int, int]
    mask: np.ndarray
    voxels: int
    mean: float
    maximum: float


def find(array, shares=SHARES):
    """The hot spots of an array (D, H, W), on any thread. One without positive values has empty ones."""
    places = np.nonzero(array > 0)
    values = array[places]
    falling = np.sort(values)[::-1]
    held = np.cumsum(falling, dtype=np.float64)
    found = []
    for share in shares:
        if not values.size:
            found.append(HotSpot(share, np.inf, (0, 0, 0), np.zeros((0, 0, 0), bool), 0, 0.0, 0.0))
            continue
        threshold = falling[np.searchsorted(held, share * held[-1])]
        inside = values >= threshold
        where = np.stack([axis[inside] for axis in places])
        corner = where.min(axis=1)
        mask = np.zeros(where.max(axis=1) + 1 - corner, bool)
        mask[tuple(where - corner[:, None])] = True
        in_it = values[inside]
        found.append(
            HotSpot(
                share,
                float(threshold),
                tuple(corner.tolist()),
                mask,
                in_it.size,
                float(in_it.mean(dtype=np.float64)),
                float(in_it.max()),
            )
        )
    return found


def addHotSpots(mapNode, found=None):
    """Add a segmentation of the hot spots, on the grid and under the transform of the map, and a table about them."""
    found = find(slicer.util.arrayFromVolume(mapNode)) if found is None else found
    segmentationNode = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", f"{mapNode.GetName()} hot spots")
    # Before the geometry: this is kept below the transform, and a loaded segmentation is resampled to it.
    segmentationNode.SetAndObserveTransformNodeID(mapNode.GetTransformNodeID())
    segmentationNode.SetReferenceImageGeometryParameterFromVolumeNode(mapNode)
    segmentationNode.CreateDefaultDisplayNodes()
    displayNode = segmentationNode.GetDisplayNode()
    for rank, spot in enumerate(found):
        inner = rank / max(1, len(found) - 1)
        colour = (1 - inner) * _OUTER + inner * _INNER
        segmentId = segmentationNode.AddSegmentFromBinaryLabelmapRepresentation(
            _labelmap(mapNode, spot), _name(spot), colour.tolist()
        )
        # An outer shell must let the inner ones be seen.
        displayNode.SetSegmentOpacity3D(segmentId, (rank + 1) / len(found))
        # More than one outline would hide the colours.
        displayNode.SetSegmentVisibility2DOutline(segmentId, rank == 0)
    displayNode.SetVisibility2DFill(False)
    if max(spot.voxels for spot in found) <= _LARGEST_SURFACE:
        segmentationNode.CreateClosedSurfaceRepresentation()
    results.setPart(mapNode, "HotSpots", segmentationNode)
    results.setPart(mapNode, "Statistics", _addTable(mapNode, segmentationNode.GetName(), found))
    return segmentationNode


def _name(spot):
    return f"{spot.share:.0%} of what speaks for it"


def _labelmap(mapNode, spot):
    """A hot spot as Slicer's segments hold it: only the box around it, in RAS below the parent transform."""
    image = slicer.vtkOrientedImageData()
    extent = [(first, first + size - 1) for first, size in zip(spot.corner, spot.mask.shape, strict=True)]
    image.SetExtent(*[end for axis in reversed(extent) for end in axis])
    scalars = numpy_to_vtk(spot.mask.astype(np.uint8).ravel(), deep=True)
    scalars.SetName("ImageScalars")
    image.GetPointData().SetScalars(scalars)
    toRas = vtk.vtkMatrix4x4()
    mapNode.GetIJKToRASMatrix(toRas)
    image.SetImageToWorldMatrix(toRas)
    return image


def _addTable(mapNode, name, found):
    voxelVolume = abs(np.linalg.det(geometry.ijkToWorld(mapNode)[:3, :3])) / 1000
    tableNode = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLTableNode", f"{name} statistics")
    first = vtk.vtkStringArray()
    first.SetName("Hot spot")
    for spot in found:
        first.InsertNextValue(_name(spot))
    tableNode.AddColumn(first)
    rows = [
        (spot.voxels * voxelVolume, spot.mean, spot.maximum, spot.threshold if spot.voxels else 0) for spot in found
    ]
    for title, values in zip(_COLUMNS, np.transpose(rows), strict=True):
        column = numpy_to_vtk(np.array(values, dtype=float), deep=True)
        column.SetName(title)
        tableNode.AddColumn(column)
    tableNode.SetUseColumnTitleAsColumnHeader(True)
    tableNode.SetLocked(True)
    return tableNode
