"""Where things of the scene are."""

from __future__ import annotations

import numpy as np
import slicer
import vtk


def ijkToRas(volumeNode):
    """4x4 from voxel index (i, j, k, 1) to RAS mm below the volume's parent transform."""
    matrix = vtk.vtkMatrix4x4()
    volumeNode.GetIJKToRASMatrix(matrix)
    return slicer.util.arrayFromVTKMatrix(matrix)


def affine(volumeNode):
    """4x4 from voxel index (d, h, w, 1) = (k, j, i, 1), as MedXAILib counts, to RAS mm below the parent transform."""
    return ijkToRas(volumeNode)[:, [2, 1, 0, 3]]


def ijkToWorld(volumeNode):
    """4x4 from voxel index (i, j, k, 1) to RAS mm of the scene; the parent transform must be linear."""
    toWorld = vtk.vtkMatrix4x4()
    slicer.vtkMRMLTransformNode.GetMatrixTransformBetweenNodes(volumeNode.GetParentTransformNode(), None, toWorld)
    return slicer.util.arrayFromVTKMatrix(toWorld) @ ijkToRas(volumeNode)


def transformBetween(fromNode, toNode):
    """The transform from below one transform node to below another; None is the scene itself."""
    transform = vtk.vtkGeneralTransform()
    slicer.vtkMRMLTransformNode.GetTransformBetweenNodes(fromNode, toNode, transform)
    return transform


def peak(mapNode):
    """The point in RAS mm of the scene that speaks most for the target; where nothing does, most against it. Of several
    that do as much, as in a supervoxel, the one nearest to their middle."""
    array = slicer.util.arrayFromVolume(mapNode)
    array = array if array.max() > 0 else np.abs(array)
    top = np.argwhere(array == array.max())
    k, j, i = top[np.square(top - top.mean(0)).sum(1).argmin()]
    return (ijkToWorld(mapNode) @ (i, j, k, 1))[:3].tolist()
