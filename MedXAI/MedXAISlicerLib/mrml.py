"""Volumes of the Slicer scene, explained: from nodes to MedXAILib and back.

Uses slicer, vtk and numpy only, so that it runs (and is tested) without the application. MedXAILib is imported where it
is used, because Slicer loads its modules before PyTorch need be installed.
"""

from __future__ import annotations

import json
import re

import numpy as np
import slicer

from MedXAISlicerLib import display, geometry, hotspots, regions, results


def explain(volumeNode, modelSource, method="gradcam", target=None, region=None, **parameters):
    """Explain what a model says about a volume of the scene, and show it.

    Args:
        volumeNode: scalar volume node, or vector volume node for several channels.
        modelSource: what `MedXAILib.load_model` takes, or a model or ensemble that is in memory already.
        method, target, parameters: as for `MedXAILib.explain`; `run` is among the parameters.
        region: where to look, as for `regions.inVolume`: a region of interest, a segment, a point or a box. A network
            that looks at patches looks around its centre.

    Returns:
        The volume node of the map, in the place of `volumeNode`, from which `results.part` finds what belongs to it; a
        list of them for a list of targets, with the first one shown.

    Raises:
        MedXAIError: what is wrong, and the remedy; nothing was added to the scene.
    """
    import MedXAILib as mx
    from MedXAILib.errors import MedXAIError

    volume = volumeFromNode(volumeNode)
    model = modelSource if isinstance(modelSource, (mx.Model, mx.Ensemble)) else mx.load_model(modelSource)
    member = model.models[0] if isinstance(model, mx.Ensemble) else model
    if region is not None:
        region = regions.inVolume(volumeNode, region, asCentre=member.patch_size is not None)
    made = mx.explain(model, volume, method, target=target, region=region, **parameters)
    if volumeNode.GetScene() is None:
        raise MedXAIError("The volume was removed while it was explained: load it again, or choose another.")
    maps = [addExplanation(volumeNode, saliency) for saliency in (made if isinstance(made, list) else [made])]
    display.show(maps[0])
    return maps if isinstance(made, list) else maps[0]


def volumeFromNode(volumeNode):
    """The voxels of a node as `MedXAILib.Volume`, in the RAS that the node has below its parent transform.

    Raises:
        MedXAIError: when there is no such volume, it is empty, a labelmap, or under a transform that bends it.
    """
    import torch

    from MedXAILib.errors import MedXAIError
    from MedXAILib.volume import Volume

    if volumeNode is None or volumeNode.GetScene() is None:
        raise MedXAIError("There is no volume (any more): choose one that is in the scene.")
    name = volumeNode.GetName()
    if volumeNode.IsA("vtkMRMLLabelMapVolumeNode"):
        raise MedXAIError(f"'{name}' is a label map: choose the scan that it belongs to.")
    if volumeNode.GetImageData() is None or not volumeNode.GetImageData().GetNumberOfPoints():
        raise MedXAIError(f"The volume '{name}' holds no voxels: load or choose another.")
    bentBy = volumeNode.GetParentTransformNode()
    while bentBy is not None and bentBy.IsLinear():
        bentBy = bentBy.GetParentTransformNode()
    if bentBy is not None:
        raise MedXAIError(
            f"'{name}' is bent by the transform '{bentBy.GetName()}', and networks see straight grids only: "
            "harden the transform first (Data module, right click), which resamples the volume."
        )
    array = slicer.util.arrayFromVolume(volumeNode)  # (D, H, W) or (D, H, W, C): a view of the scene's own memory
    channelsFirst = np.moveaxis(array, -1, 0) if array.ndim == 4 else array[None]
    # Our indices are (d, h, w) = (k, j, i).
    affine = geometry.ijkToRas(volumeNode)[:, [2, 1, 0, 3]]
    return Volume(torch.tensor(channelsFirst, dtype=torch.float32), affine, name)


def addExplanation(volumeNode, saliency):
    """Add a `MedXAILib.SaliencyMap` of a volume to the scene: map, colours, hot spots with statistics, and summary.

    Several channels are summed, which is what they say together; each stays in the part Channels, a vector volume.
    Returns the volume node of the map.
    """
    data = saliency.data.numpy()
    made = saliency.provenance
    mapNode = addMapNode(volumeNode, data.sum(axis=0), f"{volumeNode.GetName()} {made.method} {made.target_label}")
    for name, value in {
        "Provenance": made.model_dump_json(),
        "Residual": json.dumps(saliency.residual),
        "Method": made.method,
        "TargetLabel": made.target_label,
        "Signed": str(int(saliency.signed)),
    }.items():
        mapNode.SetAttribute(f"MedXAI.{name}", value)
    if len(data) > 1:
        channelsNode = addMapNode(volumeNode, np.moveaxis(data, 0, -1), f"{mapNode.GetName()} channels")
        results.setPart(mapNode, "Channels", channelsNode)
    display.colour(mapNode)
    hotspots.addHotSpots(mapNode)
    results.addSummary(mapNode)
    results.fileBesideSource(mapNode)
    return mapNode


def addMapNode(volumeNode, array, name):
    """Add an array (D, H, W) or (D, H, W, C) to the scene: on the grid and under the transform of `volumeNode`."""
    node = slicer.util.addVolumeFromArray(
        array,
        # A scene with a file named after "&" cannot be read again: only what is safe in file names.
        name=slicer.mrmlScene.GenerateUniqueName(re.sub(r"[^\w .+-]", "", name)),
        nodeClassName="vtkMRMLScalarVolumeNode" if array.ndim == 3 else "vtkMRMLVectorVolumeNode",
    )
    node.CopyOrientation(volumeNode)
    node.SetAndObserveTransformNodeID(volumeNode.GetTransformNodeID())
    results.setPart(node, "Source", volumeNode)
    return node
