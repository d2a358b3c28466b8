"""Similar cases in the scene: a table, and for each case the part of it that was compared, in its own place."""

from __future__ import annotations

import json

import numpy as np
import slicer
import vtk
from vtk.util.numpy_support import vtk_to_numpy

from MedXAISlicerLib import captions, display, geometry, results, windows

ROLES = {
    "alike": "",
    "unlike": "said otherwise",
    "mistaken": "network wrong",
    "helpful": "for",
    "harmful": "against",
    "prototype": "prototype",
}
"""Why a case is shown, in the order in which they are, in a word or two; nothing of the usual one."""


def addCases(volumeNode, answer):
    """Add cases similar to a volume to the scene: a table of them, their volumes and maps, and a summary.

    Returns the table node.
    """
    *_, tableNode = addingCases(volumeNode, answer)
    return tableNode


def addingCases(volumeNode, answer):
    """The same in steps: a generator of the table node."""
    said = answer.manifest
    columns = {"Case": "uid", "Label": "label", said["scored"].capitalize(): "similarity", "Role": "role"}
    tableNode = results.addTable(
        results.safeName(f"{volumeNode.GetName()} {(answer.provenance.get('title') or 'similar cases').lower()}"),
        {title: [case[name] for case in said["cases"]] for title, name in columns.items()},
    )
    results.describe(tableNode, answer)
    results.setPart(tableNode, "Source", volumeNode)
    images = [answer.images[file] for file in said["files"]]
    query = None
    if said["query_map"] is not None:
        title = f"{volumeNode.GetName()} likeness to the cases"
        query = _addMap(tableNode, "Map", volumeNode, images[said["query_map"]][0], title)
    kept = []
    _keep(tableNode, said, kept)
    for case in said["cases"]:
        indices = {"volume": None, "map": None, "query_map": query}
        if case["query_map"] is not None:
            indices["query_map"] = _addQueryMap(tableNode, volumeNode, *images[case["query_map"]], case["uid"])
        if case["volume"] is not None:
            caseNode = _addVolume(volumeNode, *images[case["volume"]], f"{case['label']} {case['uid']}")
            indices["volume"] = results.addPart(tableNode, "CaseVolume", caseNode)
            if case["map"] is not None:
                title = f"{caseNode.GetName()} map"
                indices["map"] = _addMap(tableNode, "CaseMap", caseNode, images[case["map"]][0], title)
        kept.append({**case, **indices})
        _keep(tableNode, said, kept)
        yield tableNode
    results.addSummary(tableNode, about(tableNode))
    results.fileBesideSource(tableNode)
    yield tableNode


def read(node):
    """What is known, as in the attribute MedXAI.Cases: `text`, what their similarity is called (`scored`), and the
    `cases`, in the order in which they were found. Of each the nodes of its volume, its map, and the map of the scan
    for this case are there (None without), and its place in RAS mm of the scene."""
    said = json.loads(node.GetAttribute("MedXAI.Cases"))
    volumes, maps, queries = (results.parts(node, name) for name in ("CaseVolume", "CaseMap", "Map"))
    found = []
    for case in said["cases"]:
        volume = volumes.get(case["volume"])
        nodes = {"volume": volume, "map": maps.get(case["map"]), "query_map": queries.get(case["query_map"])}
        found.append({**case, **nodes, "place": captions.inScene(case["place"], volume)})
    return {**said, "cases": found}


def cases(node):
    """The cases of `read`."""
    return read(node)["cases"]


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
    said = read(node)
    lines = [said["text"] or "Cases that look alike to the network"]
    for i, case in enumerate(said["cases"], 1):
        role = f", {ROLES[case['role']]}" if ROLES[case["role"]] else ""
        lines.append(f"{i}. {case['label']}, {said['scored']} {number(case['similarity'])}{role}: {case['uid']}")
    return lines


def number(value):
    """A similarity or a score in few digits, which may be large, or much less than 1."""
    return f"{value:.2f}" if 0.1 <= abs(value) < 100 or not value else f"{value:.3g}"


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


def _keep(tableNode, said, kept):
    tableNode.SetAttribute("MedXAI.Cases", json.dumps({"scored": said["scored"], "text": said["text"], "cases": kept}))


def _addMap(tableNode, name, volumeNode, array, title):
    # Such a map is smooth, of few places: there are no stray voxels, and most of a nodule is above any percentile.
    limit = float(np.abs(array).max()) or 1.0
    index = captions.addMap(tableNode, name, volumeNode, array, title, limit)
    results.parts(tableNode, name)[index].SetAttribute("MedXAI.Meaning", "Likeness")
    return index


def _addQueryMap(tableNode, volumeNode, array, affine, uid):
    """Add where in the scan the likeness to one case lies, a part of its grid. Returns its index among the maps."""
    index = _addMap(tableNode, "Map", volumeNode, array, f"{volumeNode.GetName()} likeness to {uid}")
    results.parts(tableNode, "Map")[index].SetOrigin(affine[:3, 3])
    return index


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
    windows.copyWindow(node.GetDisplayNode(), volumeNode.GetDisplayNode())
    return node
