"""Hot spots: the voxels that hold most of what speaks for the target, as nested segments with their statistics."""

from __future__ import annotations

import numpy as np
import slicer
import vtk
from vtk.util.numpy_support import numpy_to_vtk

from MedXAISlicerLib import geometry, results

SHARES = (0.5, 0.25, 0.1)
"""The parts of all positive values together that the hot spots hold."""

# From the largest to the smallest; unlike the colours of maps, so that the outlines are seen on them.
_OUTER, _INNER = np.array([90, 255, 170]) / 255, np.array([255, 255, 255]) / 255

# Voxels. The surface of more, scattered as in gradients of a whole scan, takes minutes: Show 3D makes it on demand.
_LARGEST_SURFACE = 100_000

_COLUMNS = ("Volume (mL)", "Mean", "Maximum", "Threshold")


def addHotSpots(mapNode, shares=SHARES):
    """Add a segmentation of the hot spots, on the grid and under the transform of the map, and a table about them.

    The hot spot of a share is the smallest set of voxels that holds this part of the positive values together, so those
    of smaller shares lie inside. A map without positive values has empty ones.
    """
    segmentationNode = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode", f"{mapNode.GetName()} hot spots")
    # Before the geometry: this is kept below the transform, and a loaded segmentation is resampled to it.
    segmentationNode.SetAndObserveTransformNodeID(mapNode.GetTransformNodeID())
    segmentationNode.SetReferenceImageGeometryParameterFromVolumeNode(mapNode)
    segmentationNode.CreateDefaultDisplayNodes()
    displayNode = segmentationNode.GetDisplayNode()
    array = slicer.util.arrayFromVolume(mapNode)
    voxelVolume = abs(np.linalg.det(geometry.ijkToWorld(mapNode)[:3, :3])) / 1000
    names, rows = [], []
    lowest = thresholds(array, shares)
    for rank, (share, threshold) in enumerate(zip(shares, lowest, strict=True)):
        mask = array >= threshold
        values = array[mask]
        name = f"{share:.0%} of what speaks for it"
        inner = rank / max(1, len(shares) - 1)
        colour = (1 - inner) * _OUTER + inner * _INNER
        segmentId = segmentationNode.AddSegmentFromBinaryLabelmapRepresentation(
            _labelmap(mapNode, mask), name, colour.tolist()
        )
        # An outer shell must let the inner ones be seen.
        displayNode.SetSegmentOpacity3D(segmentId, (rank + 1) / len(shares))
        # More than one outline would hide the colours.
        displayNode.SetSegmentVisibility2DOutline(segmentId, rank == 0)
        names.append(name)
        rows.append(
            (values.size * voxelVolume, values.mean(), values.max(), threshold) if values.size else (0, 0, 0, 0)
        )
    displayNode.SetVisibility2DFill(False)
    if np.count_nonzero(array >= lowest[0]) <= _LARGEST_SURFACE:
        segmentationNode.CreateClosedSurfaceRepresentation()
    results.setPart(mapNode, "HotSpots", segmentationNode)
    results.setPart(mapNode, "Statistics", _addTable(segmentationNode.GetName(), names, rows))
    return segmentationNode


def thresholds(array, shares):
    """The value at which a voxel belongs to the hot spot of each share; infinite where nothing is positive."""
    positive = np.sort(array[array > 0], axis=None)[::-1]
    if not positive.size:
        return [np.inf] * len(shares)
    held = np.cumsum(positive, dtype=np.float64)
    return [float(positive[np.searchsorted(held, share * held[-1])]) for share in shares]


def _labelmap(mapNode, mask):
    """A mask (k, j, i) as Slicer's segments hold it: only the box around it, in RAS below the parent transform."""
    image = slicer.vtkOrientedImageData()
    where = np.nonzero(mask)
    low, high = (
        (np.min(where, axis=1), np.max(where, axis=1)) if where[0].size else (np.zeros(3, int), -np.ones(3, int))
    )
    box = mask[tuple(slice(a, b + 1) for a, b in zip(low, high, strict=True))]
    image.SetExtent(*[int(v) for axis in (2, 1, 0) for v in (low[axis], high[axis])])
    scalars = numpy_to_vtk(box.astype(np.uint8).ravel(), deep=True)
    scalars.SetName("ImageScalars")
    image.GetPointData().SetScalars(scalars)
    toRas = vtk.vtkMatrix4x4()
    mapNode.GetIJKToRASMatrix(toRas)
    image.SetImageToWorldMatrix(toRas)
    return image


def _addTable(name, names, rows):
    tableNode = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLTableNode", f"{name} statistics")
    first = vtk.vtkStringArray()
    first.SetName("Hot spot")
    for text in names:
        first.InsertNextValue(text)
    tableNode.AddColumn(first)
    for title, values in zip(_COLUMNS, np.transpose(rows), strict=True):
        column = numpy_to_vtk(np.array(values, dtype=float), deep=True)
        column.SetName(title)
        tableNode.AddColumn(column)
    tableNode.SetUseColumnTitleAsColumnHeader(True)
    tableNode.SetLocked(True)
    return tableNode
