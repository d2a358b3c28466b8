"""Hot spots of a map in the scene, as nested segments with their statistics."""

import numpy as np
import slicer
import vtk
from vtk.util.numpy_support import numpy_to_vtk

from MedXAISlicerLib import geometry, results

# From the largest to the smallest; unlike the colours of maps, so that the outlines are seen on them.
_OUTER, _INNER = np.array([90, 255, 170]) / 255, np.array([255, 255, 255]) / 255

# Voxels. The surface of more holds up the user interface, and of a scattered gradient it takes minutes: Show 3D makes
# it on demand.
_LARGEST_SURFACE = 20_000

_COLUMNS = ("Volume (mL)", "Mean", "Maximum", "Threshold")


def addHotSpots(mapNode, found=None):
    """Add a segmentation of the hot spots, on the grid and under the transform of the map, and a table about them."""
    if found is None:
        from MedXAILib.hotspots import find

        found = find(slicer.util.arrayFromVolume(mapNode))
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
            _labelmap(mapNode, spot), spot.name, colour.tolist()
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
        first.InsertNextValue(spot.name)
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
