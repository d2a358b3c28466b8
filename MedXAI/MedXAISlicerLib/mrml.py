"""Volumes of the Slicer scene, explained: from nodes to MedXAILib and back.

Uses slicer, vtk and numpy only, so that it runs (and is tested) without the application. MedXAILib is imported where it
is used, because Slicer loads its modules before PyTorch need be installed.
"""

from __future__ import annotations

import itertools

import numpy as np
import slicer
import vtk


def explain(volumeNode, modelSource, method="gradcam", target=None, regionRAS=None, **parameters):
    """Explain what a model says about a volume of the scene.

    Args:
        volumeNode: scalar volume node, or vector volume node for several channels.
        modelSource: what `MedXAILib.load_model` takes, or a model or ensemble that is in memory already.
        method, target, parameters: as for `MedXAILib.explain`.
        regionRAS: centre, or box of two opposite corners, in RAS mm of the scene, as markups have it.

    Returns:
        A new volume node with the map, in the place of `volumeNode`.

    Raises:
        MedXAIError: what is wrong, and the remedy.
    """
    import MedXAILib as mx

    model = modelSource if isinstance(modelSource, (mx.Model, mx.Ensemble)) else mx.load_model(modelSource)
    region = None if regionRAS is None else regionBelowTransform(volumeNode, regionRAS)
    saliency = mx.explain(model, volumeFromNode(volumeNode), method, target=target, region=region, **parameters)
    name = f"{volumeNode.GetName()} {method}"
    return addMapNode(volumeNode, saliency.data.numpy(), name, saliency.provenance.model_dump_json())


def volumeFromNode(volumeNode):
    """The voxels of a node as `MedXAILib.Volume`, in the RAS that the node has below its parent transform.

    Raises:
        MedXAIError: when the node is empty.
    """
    import torch

    from MedXAILib.errors import MedXAIError
    from MedXAILib.volume import Volume

    if volumeNode.GetImageData() is None:
        raise MedXAIError(f"The volume '{volumeNode.GetName()}' holds no voxels: load or choose another.")
    array = slicer.util.arrayFromVolume(volumeNode)  # (D, H, W) or (D, H, W, C): a view of the scene's own memory
    channelsFirst = np.moveaxis(array, -1, 0) if array.ndim == 4 else array[None]
    ijkToRas = vtk.vtkMatrix4x4()
    volumeNode.GetIJKToRASMatrix(ijkToRas)
    # Our indices are (d, h, w) = (k, j, i).
    affine = slicer.util.arrayFromVTKMatrix(ijkToRas)[:, [2, 1, 0, 3]]
    return Volume(torch.tensor(channelsFirst, dtype=torch.float32), affine, volumeNode.GetName())


def regionBelowTransform(volumeNode, regionRAS):
    """A centre or box in the scene's RAS mm as the node has it below its parent transform.

    A box that the transform turns becomes the upright box around it.
    """
    toNode = vtk.vtkGeneralTransform()
    slicer.vtkMRMLTransformNode.GetTransformBetweenNodes(None, volumeNode.GetParentTransformNode(), toNode)
    if np.ndim(regionRAS) == 1:
        return toNode.TransformPoint(regionRAS)
    corners = np.array([toNode.TransformPoint(corner) for corner in itertools.product(*np.transpose(regionRAS))])
    return tuple(corners.min(axis=0)), tuple(corners.max(axis=0))


def addMapNode(volumeNode, data, name, provenance):
    """Add a map (C, D, H, W) to the scene: on the grid and under the transform of `volumeNode`.

    `provenance` (JSON) stays with the node, and so does a reference to the volume, when the scene is saved.
    """
    scalar = len(data) == 1
    node = slicer.util.addVolumeFromArray(
        data[0] if scalar else np.moveaxis(data, 0, -1),
        name=slicer.mrmlScene.GenerateUniqueName(name),
        nodeClassName="vtkMRMLScalarVolumeNode" if scalar else "vtkMRMLVectorVolumeNode",
    )
    node.CopyOrientation(volumeNode)
    node.SetAndObserveTransformNodeID(volumeNode.GetTransformNodeID())
    node.SetNodeReferenceID("MedXAI.Source", volumeNode.GetID())
    node.SetAttribute("MedXAI.Provenance", provenance)
    return node
