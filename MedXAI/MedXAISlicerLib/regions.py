"""Where to look: from regions of interest, segments and points of the scene to a centre, box or mask in a volume."""

from __future__ import annotations

import itertools

import numpy as np
import slicer
import vtk
from vtk.util.numpy_support import numpy_to_vtk, vtk_to_numpy

from MedXAISlicerLib import geometry


def inVolume(volumeNode, region, asCentre=False):
    """A region of the scene as a volume has it below its parent transform, for `MedXAILib.explain`.

    Args:
        volumeNode: the volume; its parent transform must be linear.
        region: a `vtkMRMLMarkupsROINode`, the first point of another markups node, a segment as (segmentation node,
            segment ID or name), or what markups and segments come down to: a centre (x, y, z) or a box of two opposite
            corners, in RAS mm of the scene.
        asCentre: take the centre of a box or segment, for networks that look at a patch of fixed size.

    Returns:
        A centre, or a box of two corners, in RAS mm. A box that a transform turns becomes the upright box around it.

    Raises:
        MedXAIError: for an empty region or one that does not exist, and what is no region.
    """
    toVolume = geometry.transformBetween(None, volumeNode.GetParentTransformNode())
    if isinstance(region, slicer.vtkMRMLMarkupsROINode):
        points = _transformed(_cornersOfROI(region), toVolume)
    elif isinstance(region, slicer.vtkMRMLMarkupsNode):
        points = _transformed(_firstPoint(region), toVolume)
    elif isinstance(region, tuple) and isinstance(region[0], slicer.vtkMRMLSegmentationNode):
        segmentationNode, segment = region
        toVolume = geometry.transformBetween(
            segmentationNode.GetParentTransformNode(), volumeNode.GetParentTransformNode()
        )
        points = _transformed(_voxelsOfSegment(segmentationNode, segment), toVolume)
        if asCentre:
            # A segment is seldom the middle of its own box.
            return tuple(points.mean(axis=0).tolist())
    else:
        points = _transformed(_pointOrCorners(region), toVolume)
    low, high = points.min(axis=0), points.max(axis=0)
    if asCentre or len(points) == 1:
        return tuple(((low + high) / 2).tolist())
    return tuple(low.tolist()), tuple(high.tolist())


def maskIn(volumeNode, segmentationNode, segment):
    """A segment, by its ID or name, as a mask for `MedXAILib.SegmentationTarget` or a method: a volume as a request to
    the worker holds it, on the segment's own grid, in the RAS that the volume node has below its parent transform.

    Raises:
        MedXAIError: for an empty segment or one that does not exist, and one that a transform bends.
    """
    from MedXAILib.errors import MedXAIError

    toVolume = vtk.vtkMatrix4x4()
    if not slicer.vtkMRMLTransformNode.GetMatrixTransformBetweenNodes(
        segmentationNode.GetParentTransformNode(), volumeNode.GetParentTransformNode(), toVolume
    ):
        raise MedXAIError(
            f"'{segmentationNode.GetName()}' is bent by a transform, and masks are straight grids only: harden the "
            "transform first (Data module, right click)."
        )
    voxels, toRas = _labelmapOfSegment(segmentationNode, segment)
    drawn = np.argwhere(voxels)
    low, high = drawn.min(axis=0), drawn.max(axis=0) + 1
    part = tuple(map(slice, low, high))
    # As MedXAILib counts, (k, j, i), from the first voxel of the part.
    affine = (slicer.util.arrayFromVTKMatrix(toVolume) @ toRas)[:, [2, 1, 0, 3]]
    affine[:, 3] = affine @ (*low, 1)
    return {"data": (voxels[part] != 0).astype(np.uint8)[None], "affine": affine, "source": segment}


def asParameter(volumeNode, value):
    """What a parameter of a method is set to, as a request to the worker holds it: a region of interest becomes its
    box, as `inVolume`, a segment (node, ID or name) its mask, as `maskIn`; anything else is as it is."""
    if isinstance(value, slicer.vtkMRMLMarkupsROINode):
        return inVolume(volumeNode, value)
    if isinstance(value, tuple) and value and isinstance(value[0], slicer.vtkMRMLSegmentationNode):
        return maskIn(volumeNode, *value)
    return value


def _transformed(points, transform):
    before, after = vtk.vtkPoints(), vtk.vtkPoints()
    before.SetData(numpy_to_vtk(np.array(list(points), dtype=float)))
    transform.TransformPoints(before, after)
    return vtk_to_numpy(after.GetData())


def _pointOrCorners(region):
    from MedXAILib.errors import MedXAIError

    try:
        points = np.asarray(region, dtype=float)
    except (TypeError, ValueError):
        points = np.zeros(0)
    if points.shape not in ((3,), (2, 3)) or not np.isfinite(points).all():
        raise MedXAIError(
            "A region is a region of interest, a point of a markup, a segment (node, name), a centre (x, y, z) or a "
            f"box ((x0, y0, z0), (x1, y1, z1)) in RAS mm, not {region!r:.80}."
        )
    return [points] if points.ndim == 1 else itertools.product(*points.T)


def _cornersOfROI(roiNode):
    from MedXAILib.errors import MedXAIError

    half = np.array(roiNode.GetSize()) / 2
    if not half.all():
        raise MedXAIError(f"The region of interest '{roiNode.GetName()}' is empty: draw it, or choose another.")
    toWorld = slicer.util.arrayFromVTKMatrix(roiNode.GetObjectToWorldMatrix())
    return [(toWorld @ [*half * signs, 1])[:3] for signs in itertools.product((-1, 1), repeat=3)]


def _firstPoint(markupsNode):
    from MedXAILib.errors import MedXAIError

    if not markupsNode.GetNumberOfControlPoints():
        raise MedXAIError(f"'{markupsNode.GetName()}' has no point: place one, or choose another.")
    return [markupsNode.GetNthControlPointPositionWorld(0)]


def _voxelsOfSegment(segmentationNode, segment):
    """The middles of a segment's voxels, in RAS mm below the segmentation's own transform."""
    voxels, toRas = _labelmapOfSegment(segmentationNode, segment)
    k, j, i = np.nonzero(voxels)
    return (toRas @ np.stack([i, j, k, np.ones_like(i)]))[:3].T


def _labelmapOfSegment(segmentationNode, segment):
    """A segment's voxels (k, j, i), which are not all zero, with the 4x4 from (i, j, k, 1) to RAS mm below the
    segmentation's own transform."""
    from MedXAILib.errors import MedXAIError, unknown

    segmentation = segmentationNode.GetSegmentation()
    ids = list(segmentation.GetSegmentIDs())
    names = {segmentation.GetSegment(i).GetName(): i for i in ids}
    segmentId = segment if segment in ids else names.get(segment)
    if segmentId is None:
        raise unknown("segment", segment, names)
    labelmap = slicer.vtkOrientedImageData()
    if not segmentationNode.CreateBinaryLabelmapRepresentation() or not (
        segmentationNode.GetBinaryLabelmapRepresentation(segmentId, labelmap)
    ):
        raise MedXAIError(
            f"The segment '{segment}' has no voxels: create its binary labelmap in the Segmentations module."
        )
    (i0, i1, j0, j1, k0, k1) = labelmap.GetExtent()
    scalars = labelmap.GetPointData().GetScalars()
    array = vtk_to_numpy(scalars) if scalars else np.zeros(0)
    voxels = array.reshape(max(k1 - k0 + 1, 0), max(j1 - j0 + 1, 0), max(i1 - i0 + 1, 0))
    if not voxels.any():
        raise MedXAIError(f"The segment '{segment}' is empty: draw it, or choose another.")
    toRas = vtk.vtkMatrix4x4()
    labelmap.GetImageToWorldMatrix(toRas)
    start = np.eye(4)
    start[:3, 3] = i0, j0, k0
    return voxels.copy(), slicer.util.arrayFromVTKMatrix(toRas) @ start


def placeAroundMiddle(roiNode, volumeNode):
    """Put a region of interest around the middle of a volume, a third of it wide, where it is seen at once."""
    bounds = np.zeros(6)
    volumeNode.GetRASBounds(bounds)
    low, high = bounds[::2], bounds[1::2]
    roiNode.SetCenter((low + high) / 2)
    roiNode.SetSize((high - low) / 3)
