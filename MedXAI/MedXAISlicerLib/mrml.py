"""Volumes of the Slicer scene, explained: from nodes to MedXAILib and back.

Uses slicer, vtk and numpy only, so that it runs (and is tested) without the application. MedXAILib is imported where it
is used, because Slicer loads its modules before PyTorch need be installed.
"""

from __future__ import annotations

import numpy as np
import slicer

from MedXAISlicerLib import (
    answers,
    captions,
    cases,
    concepts,
    deleting,
    display,
    geometry,
    hotspots,
    regions,
    results,
    rules,
    traversals,
)

# Grids whose voxels are nowhere further apart than this are one, mm.
_SAME_PLACE = 1e-3


def explain(volumeNode, model, method="gradcam", target=None, region=None, **parameters):
    """Explain what a model in memory says about a volume of the scene, here and now, and show it.

    Args:
        volumeNode: scalar volume node, vector volume node for several channels, or a list of nodes as channels.
        model: a `MedXAILib.Model` or `Ensemble`. One in a file is for `explaining.Explaining`, which blocks nobody.
        method, target, parameters: as for `MedXAILib.explain`; `run` is among the parameters, and regions of the scene
            as for `regions.asParameter` may be.
        region: where to look, as for `regions.inVolume`: a region of interest, a segment, a point or a box. A network
            that looks at patches looks around its centre.

    Returns:
        The explanation node, in the place of the volume, from which `results.part` finds what belongs to it; a list of
        them for a list of targets, with the first one shown.

    Raises:
        MedXAIError: what is wrong, and the remedy; nothing was added to the scene.
    """
    import MedXAILib as mx

    volume = _volume(scanOf(volumeNode))
    member = model.models[0] if isinstance(model, mx.Ensemble) else model
    sourceNode = volumeNode[0] if isinstance(volumeNode, (list, tuple)) else volumeNode
    if region is not None:
        region = regions.inVolume(sourceNode, region, asCentre=member.patch_size is not None)
    given = {name: regions.asParameter(sourceNode, value) for name, value in parameters.items()}
    given = {name: _volume(v) if isinstance(v, dict) and "data" in v else v for name, v in given.items()}
    made = mx.explain(model, volume, method, target=target, region=region, **given)
    several = isinstance(made, list)
    nodes = addAnswers(sourceNode, [answers.of(explanation) for explanation in (made if several else [made])])
    return nodes if several else nodes[0]


def scanOf(volumeNode):
    """The voxels of a node, or of several as channels, as a request to the worker holds them (docs/worker.md).

    They are a copy, in the RAS that the node has below its parent transform.

    Raises:
        MedXAIError: when there is no such volume, it is empty, a labelmap, or under a transform that bends it; when
            several are not on one grid.
    """
    from MedXAILib.errors import MedXAIError

    nodes = volumeNode if isinstance(volumeNode, (list, tuple)) else [volumeNode]
    for node in nodes:
        _check(node)
    first = nodes[0]
    channels = []
    for node in nodes:
        array = slicer.util.arrayFromVolume(node)  # (D, H, W) or (D, H, W, C): a view of the scene's own memory
        if array.shape[:3] != slicer.util.arrayFromVolume(first).shape[:3] or not _together(node, first):
            raise MedXAIError(
                f"'{node.GetName()}' is not on the grid of '{first.GetName()}': resample it to that volume first "
                "(module Resample Scalar/Vector/DWI Volume)."
            )
        channels.append(np.moveaxis(array, -1, 0) if array.ndim == 4 else array[None])
    return {
        "data": np.concatenate(channels),
        "affine": geometry.affine(first),
        "source": " + ".join(node.GetName() for node in nodes),
        "key": " ".join(
            f"{node.GetID()} {node.GetImageData().GetMTime()} {hash(geometry.ijkToRas(node).tobytes())}"
            for node in nodes
        ),
    }


def _volume(given):
    """A volume, as a request to the worker holds it, for the library in this process."""
    import torch

    import MedXAILib as mx

    return mx.Volume(torch.from_numpy(given["data"].astype(np.float32)), given["affine"], given["source"])


def _check(node):
    from MedXAILib.errors import MedXAIError

    if node is None or node.GetScene() is None:
        raise MedXAIError("There is no volume (any more): choose one that is in the scene.")
    name = node.GetName()
    if node.IsA("vtkMRMLLabelMapVolumeNode"):
        raise MedXAIError(f"'{name}' is a label map: choose the scan that it belongs to.")
    if node.GetImageData() is None or not node.GetImageData().GetNumberOfPoints():
        raise MedXAIError(f"The volume '{name}' holds no voxels: load or choose another.")
    bentBy = node.GetParentTransformNode()
    while bentBy is not None and bentBy.IsLinear():
        bentBy = bentBy.GetParentTransformNode()
    if bentBy is not None:
        raise MedXAIError(
            f"'{name}' is bent by the transform '{bentBy.GetName()}', and networks see straight grids only: "
            "harden the transform first (Data module, right click), which resamples the volume."
        )


def _together(node, other):
    """Whether the corners of two volumes of the same size are in the same places of the scene."""
    i, j, k = node.GetImageData().GetDimensions()
    corners = np.array([(a, b, c, 1) for a in (0, i) for b in (0, j) for c in (0, k)]).T
    apart = (geometry.ijkToWorld(node) - geometry.ijkToWorld(other)) @ corners
    return np.abs(apart).max() <= _SAME_PLACE


def addAnswers(volumeNode, found):
    """Add explanations of a volume to the scene, whatever their kind, and show the first. Returns their nodes.

    Raises:
        MedXAIError: when the volume is not there any more, or they are of something else; nothing was added.
    """
    adding = addingAnswers(volumeNode, found)
    while True:
        try:
            next(adding)
        except StopIteration as done:
            return done.value


def addingAnswers(volumeNode, found):
    """The same in steps, for a user interface that must not stand still: a generator, whose value are the nodes. Closed
    before its end, it takes away what it has added."""
    _check(volumeNode)
    nodes = []
    try:
        for answer in found:
            for node in _STEPS[answer.kind](volumeNode, answer):
                if node not in nodes:
                    nodes.append(node)
                yield
        display.show(nodes[0])
    except BaseException:
        for node in nodes:
            # A scene that was closed has taken them away.
            if node.GetScene() is not None:
                deleting.delete(node)
        raise
    return nodes


def addSaliency(volumeNode, answer):
    """Add a saliency map of a volume to the scene: map, colours, hot spots with statistics, and summary.

    Several channels are summed, which is what they say together; each stays in the part Channels, a vector volume.
    Returns the volume node of the map.

    Raises:
        MedXAIError: when it is a map of something else.
    """
    *_, mapNode = _addingSaliency(volumeNode, answer)
    return mapNode


def _addingSaliency(volumeNode, answer):
    from MedXAILib.errors import MedXAIError

    array, affine = answer.images[answer.manifest["files"][0]]
    made = answer.provenance
    if array.shape[:3] != slicer.util.arrayFromVolume(volumeNode).shape[:3] or not np.allclose(
        affine, geometry.affine(volumeNode), atol=_SAME_PLACE
    ):
        raise MedXAIError(
            f"This map of '{made['volume'].get('source')}' is not on the grid of '{volumeNode.GetName()}': choose the "
            "volume that was explained."
        )
    partial = " (partial)" if made.get("partial") else ""
    mapNode = results.addMapNode(
        volumeNode, answer.map, f"{volumeNode.GetName()} {made['method']} {made['target_label']}{partial}"
    )
    results.describe(mapNode, answer)
    mapNode.SetAttribute("MedXAI.Signed", str(int(answer.manifest["signed"])))
    display.colour(mapNode, answer.window)
    yield mapNode
    if array.ndim == 4:
        results.setPart(mapNode, "Channels", results.addMapNode(volumeNode, array, f"{mapNode.GetName()} channels"))
        yield mapNode
    if answer.interval is not None:
        interval = results.addMapNode(volumeNode, answer.interval, f"{mapNode.GetName()} 95 percent interval")
        results.setPart(mapNode, "Interval", interval)
        yield mapNode
    hotspots.addHotSpots(mapNode, answer.hotSpots)
    yield mapNode
    results.addSummary(mapNode, _about(mapNode))
    results.fileBesideSource(mapNode)
    yield mapNode


def _about(mapNode):
    lines = [
        f"What speaks for '{mapNode.GetAttribute('MedXAI.TargetLabel')}'"
        + (", and against it" if results.isSigned(mapNode) else ""),
        f"Strongest at {results.inWords(geometry.peak(mapNode))}",
    ]
    table = results.part(mapNode, "Statistics")
    if table is not None:
        lines += [
            f"{table.GetCellText(row, 0)} lies in {float(table.GetCellText(row, 1)):.2f} mL"
            for row in range(table.GetNumberOfRows())
        ]
    return lines


_STEPS = {
    "SaliencyMap": _addingSaliency,
    "Caption": lambda volumeNode, answer: [captions.addCaption(volumeNode, answer)],
    "ConceptScores": concepts.addingConcepts,
    "SimilarCases": cases.addingCases,
    "Traversal": traversals.addingTraversal,
    "RuleSet": lambda volumeNode, answer: [rules.addRules(volumeNode, answer)],
}
