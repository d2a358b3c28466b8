"""Similar cases in the scene: a table, and for each case the part of it that was compared, in its own place."""

from __future__ import annotations

import json

import numpy as np
import slicer
import vtk
from vtk.util.numpy_support import vtk_to_numpy

from MedXAISlicerLib import captions, display, geometry, results


def addCases(volumeNode, answer):
    """Add cases similar to a volume to the scene: a table of them, their volumes and maps, and a summary.

    Returns the table node.
    """
    said = answer.manifest
    columns = {"Case": "uid", "Label": "label", "Similarity": "similarity"}
    tableNode = results.addTable(
        results.safeName(f"{volumeNode.GetName()} similar cases"),
        {title: [case[name] for case in said["cases"]] for title, name in columns.items()},
    )
    results.describe(tableNode, answer)
    results.setPart(tableNode, "Source", volumeNode)
    images = [answer.images[file] for file in said["files"]]
    if said["query_map"] is not None:
        captions.addMap(
            tableNode, "Map", volumeNode, images[said["query_map"]][0], f"{volumeNode.GetName()} likeness to the cases"
        )
    kept = []
    for case in said["cases"]:
        indices = {"volume": None, "map": None}
        if case["volume"] is not None:
            caseNode = _addVolume(volumeNode, *images[case["volume"]], f"{case['label']} {case['uid']}")
            indices["volume"] = results.addPart(tableNode, "CaseVolume", caseNode)
            if case["map"] is not None:
                indices["map"] = captions.addMap(
                    tableNode, "CaseMap", caseNode, images[case["map"]][0], f"{caseNode.GetName()} map"
                )
        kept.append({**case, **indices})
    tableNode.SetAttribute("MedXAI.Cases", json.dumps(kept))
    results.addSummary(tableNode, about(tableNode))
    results.fileBesideSource(tableNode)
    return tableNode


def cases(node):
    """The cases, most similar first as they were found, as in the attribute MedXAI.Cases, but with the nodes of their
    volume and map (None without) and the place in RAS mm of the scene."""
    volumes, maps = results.parts(node, "CaseVolume"), results.parts(node, "CaseMap")
    found = []
    for case in json.loads(node.GetAttribute("MedXAI.Cases")):
        volume = volumes.get(case["volume"])
        place = captions.inScene(case["place"], volume)
        found.append({**case, "volume": volume, "map": maps.get(case["map"]), "place": place})
    return found


def middle(case):
    """Where to look at one of `cases`: its place, or the middle of its volume."""
    if case["place"] is not None:
        return case["place"]
    return bounds(case["volume"]).mean(axis=1).tolist()


def bounds(volumeNode):
    """Where a volume begins and ends along R, A and S, (3, 2), in mm of the scene."""
    ends = np.zeros(6)
    volumeNode.GetRASBounds(ends)
    return ends.reshape(3, 2)


def thumbnail(node, index, size=96):
    """A case in the axial plane through its place, its map over it in the colours of maps: (size, size, 3), uint8.

    As in Slicer's views, the patient's right is on the left, and anterior is up.
    """
    case = cases(node)[index]
    if case["volume"] is None:
        return np.zeros((size, size, 3), np.uint8)
    shown = case["volume"].GetDisplayNode()
    grey = _coloured(_plane(case["volume"], case, size, shown.GetWindowLevelMin()), shown)[..., :3]
    if case["map"] is None:
        return (grey * 255).round().astype(np.uint8)
    over = _coloured(_plane(case["map"], case, size, 0), case["map"].GetDisplayNode())
    alpha = over[..., 3:] * display.OPACITY
    return ((grey * (1 - alpha) + over[..., :3] * alpha) * 255).round().astype(np.uint8)


def about(node):
    """Which cases are similar, in lines."""
    return [
        "Cases that look alike to the network",
        *(f"{i}. {c['label']}, similarity {c['similarity']:.2f}: {c['uid']}" for i, c in enumerate(cases(node), 1)),
    ]


def _plane(volumeNode, case, size, outside):
    """The values (size, size) of a volume in the axial plane through the place of a case, all of the case in it."""
    extent = bounds(case["volume"])
    step = np.ptp(extent[:2], axis=1).max() / size
    right, anterior, _ = extent.mean(axis=1)
    superior = middle(case)[2]
    # From a pixel (column, row) to RAS mm: columns run to the patient's left, rows to posterior.
    toRas = np.diag([-step, -step, 1.0, 1.0])
    toRas[:3, 3] = right + step * (size - 1) / 2, anterior + step * (size - 1) / 2, superior
    toIjk = np.linalg.inv(geometry.ijkToWorld(volumeNode)) @ toRas
    reslice = vtk.vtkImageReslice()
    reslice.SetInputData(volumeNode.GetImageData())
    reslice.SetResliceAxes(slicer.util.vtkMatrixFromArray(toIjk))
    reslice.SetOutputSpacing(1, 1, 1)
    reslice.SetOutputOrigin(0, 0, 0)
    reslice.SetOutputExtent(0, size - 1, 0, size - 1, 0, 0)
    reslice.SetInterpolationModeToLinear()
    reslice.SetBackgroundLevel(outside)
    reslice.Update()
    return vtk_to_numpy(reslice.GetOutput().GetPointData().GetScalars()).reshape(size, size)


def _coloured(values, displayNode):
    """Values (H, W) in the colours and window of a display node: (H, W, 4), 0 to 1."""
    low, high = displayNode.GetWindowLevelMin(), displayNode.GetWindowLevelMax()
    table = displayNode.GetColorNode().GetLookupTable()
    count = table.GetNumberOfTableValues()
    colours = np.array([table.GetTableValue(i) for i in range(count)])
    position = (values - low) / max(high - low, 1e-12) * count
    return colours[np.clip(position, 0, count - 1).astype(int)]


def _addVolume(volumeNode, array, affine, title):
    """Add the part of a case that was compared, in its own place, seen through the window of the scan."""
    node = slicer.util.addVolumeFromArray(
        array if array.ndim == 3 else array[..., 0],
        # Our indices are (d, h, w) = (k, j, i).
        affine[:, [2, 1, 0, 3]],
        results.safeName(title),
        "vtkMRMLScalarVolumeNode",
    )
    node.CreateDefaultDisplayNodes()
    window = volumeNode.GetDisplayNode()
    if window is not None:
        # Two images through two windows cannot be compared by eye.
        node.GetDisplayNode().AutoWindowLevelOff()
        node.GetDisplayNode().SetWindowLevelMinMax(window.GetWindowLevelMin(), window.GetWindowLevelMax())
    return node
