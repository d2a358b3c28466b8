"""Comparisons: two maps of one scan, or a scan and cases like it, side by side in slice views of their own.

A scene keeps its views and what they show, but not the description of a layout: what is compared is kept at the layout
node, from which `restore` makes the description again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import slicer

from MedXAISlicerLib import captions, cases, display, geometry, results

MOST_CASES = 4

_LAYOUTS = {"maps": 4710, "cases": 4711}
_PLANES = {"maps": ("Axial", "Coronal", "Sagittal"), "cases": ("Axial", "Coronal")}
# As Slicer's own views of these planes have them.
_COLOURS = {
    "Axial": slicer.vtkMRMLSliceNode.GetRedColor(),
    "Coronal": slicer.vtkMRMLSliceNode.GetGreenColor(),
    "Sagittal": slicer.vtkMRMLSliceNode.GetYellowColor(),
}
_COMPARISON = "MedXAI.Comparison"
_COMPARED = "MedXAI.Compared"

# What is drawn where it is in the patient, in every view: in those of another patient it would be anywhere.
_PLACED = ("vtkMRMLSegmentationDisplayNode", "vtkMRMLModelDisplayNode", "vtkMRMLMarkupsDisplayNode")
_KEPT_OUT = "MedXAI.KeptOut"

# Views of one group move together when they are linked; Slicer's own are in the first ones.
_GROUP = 71


@dataclass(frozen=True, eq=False)
class _Column:
    """What the views above one another show."""

    label: str
    group: int
    volume: object
    map: object
    place: list
    width: float


def compareMaps(first, second):
    """Show two maps of one scan side by side, in linked views.

    Raises:
        MedXAIError: when they are not of one scan, or it is not there any more.
    """
    from MedXAILib.errors import MedXAIError

    scans = {results.part(node, "Source") for node in (first, second)}
    if len(scans) > 1 or None in scans:
        raise MedXAIError(
            f"'{first.GetName()}' and '{second.GetName()}' are not maps of one scan in the scene: choose two that are."
        )
    _begin("maps", [first, second], [])


def compareCases(node, indices):
    """Show a scan and some of the cases similar to it, each in a column of views that move by themselves.

    Raises:
        MedXAIError: for no case, more than `MOST_CASES`, or one without an image.
    """
    from MedXAILib.errors import MedXAIError

    indices = list(indices)
    if not 1 <= len(indices) <= MOST_CASES:
        raise MedXAIError(f"{len(indices)} cases were chosen to compare: choose 1 to {MOST_CASES}.")
    if results.part(node, "Source") is None:
        raise MedXAIError(f"The scan of '{node.GetName()}' is not in the scene any more: load it again.")
    found = cases.cases(node)
    for index in indices:
        if found[index]["volume"] is None:
            raise MedXAIError(f"There is no image of the case '{found[index]['uid']}' in the scene: leave it out.")
    _begin("cases", [node], indices)


def leave():
    """Go back to the layout that was there before a comparison."""
    layoutNode = _layoutNode()
    if layoutNode is None:
        return
    layoutNode.SetViewArrangement(_before(layoutNode))
    layoutNode.RemoveAttribute(_COMPARISON)
    layoutNode.RemoveNodeReferenceIDs(_COMPARED)
    _letIn()


def leaveIfShown(nodes):
    """Leave a comparison that shows any of these nodes."""
    layoutNode = _layoutNode()
    if _comparison(layoutNode) is not None and not set(_compared(layoutNode)).isdisjoint(nodes):
        leave()


def restore():
    """After a scene was loaded: show its comparison again, if it was saved with one, slices where they were."""
    kind = current()
    if kind is None:
        return
    layoutNode = _layoutNode()
    if None in _compared(layoutNode) or not all(results.part(node, "Source") for node in _compared(layoutNode)):
        leave()
        return
    _fill(layoutNode)


def current():
    """Which comparison is on the screen: maps, cases, or None."""
    layoutNode = _layoutNode()
    comparison = _comparison(layoutNode)
    if comparison is None or layoutNode.GetViewArrangement() != _LAYOUTS[comparison["kind"]]:
        return None
    return comparison["kind"]


def comparedCases(node):
    """Which of the cases similar to a scan are on the screen, by their index."""
    if current() != "cases" or _compared(_layoutNode()) != [node]:
        return []
    return _comparison(_layoutNode())["indices"]


def _layoutNode():
    return slicer.mrmlScene.GetFirstNodeByClass("vtkMRMLLayoutNode")


def _comparison(layoutNode):
    return json.loads((layoutNode and layoutNode.GetAttribute(_COMPARISON)) or "null")


def _before(layoutNode):
    """The layout to go back to."""
    now = layoutNode.GetViewArrangement()
    if now not in _LAYOUTS.values():
        return now
    # A closed scene takes along what is known of its comparison, but leaves its layout on the screen.
    before = (_comparison(layoutNode) or {}).get("before")
    return before if before and layoutNode.IsLayoutDescription(before) else layoutNode.SlicerLayoutConventionalView


def _compared(layoutNode):
    return [
        layoutNode.GetNthNodeReference(_COMPARED, i) for i in range(layoutNode.GetNumberOfNodeReferences(_COMPARED))
    ]


def _begin(kind, nodes, indices):
    layoutNode = _layoutNode() or slicer.mrmlScene.AddNewNodeByClass("vtkMRMLLayoutNode")
    comparison = {"kind": kind, "before": _before(layoutNode), "indices": indices}
    layoutNode.SetAttribute(_COMPARISON, json.dumps(comparison))
    layoutNode.RemoveNodeReferenceIDs(_COMPARED)
    for node in nodes:
        layoutNode.AddNodeReferenceID(_COMPARED, node.GetID())
    opacity = display.currentOpacity()
    views = _fill(layoutNode)
    _keepApart(kind, views)
    for column, plane, sliceNode, compositeNode in views:
        sliceNode.SetOrientation(plane)
        sliceNode.SetLayoutColor(_COLOURS[plane])
        width, height, _ = sliceNode.GetDimensions()
        pixel = column.width / min(width, height)
        sliceNode.SetFieldOfView(width * pixel, height * pixel, sliceNode.GetFieldOfView()[2])
        sliceNode.JumpSliceByCentering(*column.place)
        compositeNode.SetForegroundOpacity(opacity)
        compositeNode.SetLinkedControl(kind == "maps")
        compositeNode.SetHotLinkedControl(kind == "maps")


def _fill(layoutNode):
    """Have the views of the comparison, with what belongs into each; they stay where they are.

    Returns (column, plane, slice node, composite node) of each.
    """
    comparison = _comparison(layoutNode)
    kind = comparison["kind"]
    columns = _columns(kind, _compared(layoutNode), comparison["indices"])
    tags = [[f"MedXAI{kind.title()}{i + 1}{plane}" for plane in _PLANES[kind]] for i in range(len(columns))]
    # The application makes its views now; what is in them is known only afterwards.
    _apply(layoutNode, _LAYOUTS[kind], _description(tags))
    views = []
    for column, tagsOfColumn in zip(columns, tags, strict=True):
        for tag, plane in zip(tagsOfColumn, _PLANES[kind], strict=True):
            sliceNode, compositeNode = _view("vtkMRMLSliceNode", tag), _view("vtkMRMLSliceCompositeNode", tag)
            sliceNode.SetLayoutLabel(column.label)
            # A scene saves only whether there is a group: after loading all would be in the same.
            sliceNode.SetViewGroup(column.group)
            compositeNode.SetBackgroundVolumeID(column.volume.GetID())
            compositeNode.SetForegroundVolumeID(column.map.GetID() if column.map else None)
            views.append((column, plane, sliceNode, compositeNode))
    return views


def _keepApart(kind, views):
    """Keep what was drawn in the scan out of the views of other cases, the hot spots of a map out of the other's."""
    _letIn()
    for own in {column for column, *_ in views}:
        others = [sliceNode for column, _, sliceNode, _ in views if column is not own]
        if kind == "maps":
            spots = results.part(own.map, "HotSpots")
            _keepOut([] if spots is None else [spots.GetDisplayNode()], others)
        elif own is views[0][0]:
            _keepOut(_placed(), others)


def _keepOut(displayNodes, sliceNodes):
    elsewhere = [n.GetID() for n in slicer.util.getNodesByClass("vtkMRMLAbstractViewNode") if n not in sliceNodes]
    for displayNode in displayNodes:
        # Who chose views for it already is right.
        if not displayNode.GetNumberOfViewNodeIDs():
            displayNode.SetViewNodeIDs(elsewhere)
            displayNode.SetAttribute(_KEPT_OUT, "1")


def _letIn():
    for displayNode in _placed():
        if displayNode.GetAttribute(_KEPT_OUT):
            displayNode.RemoveAllViewNodeIDs()
            displayNode.RemoveAttribute(_KEPT_OUT)


def _placed():
    return [node for kind in _PLACED for node in slicer.util.getNodesByClass(kind)]


def _columns(kind, nodes, indices):
    if kind == "maps":
        scan = results.part(nodes[0], "Source")
        return [_Column(_label(node), _GROUP, scan, node, geometry.peak(nodes[0]), _width(scan)) for node in nodes]
    (node,) = nodes
    scan, found = results.part(node, "Source"), cases.cases(node)
    chosen = [found[i] for i in indices if found[i]["volume"] is not None]
    # One scale for all: sizes are compared by eye.
    width = max((_width(case["volume"]) for case in chosen), default=_width(scan))
    query = next(iter(results.maps(node)), None)
    return [
        _Column("This scan", _GROUP, scan, query, _placeOfQuery(node, scan, query), width),
        *(
            _Column(
                results.safeText(f"{case['label']} {case['similarity']:.2f}"),
                _GROUP + 1 + i,
                case["volume"],
                case["map"],
                cases.middle(case),
                width,
            )
            for i, case in enumerate(chosen)
        ),
    ]


def _label(mapNode):
    return results.title(mapNode) if results.kind(mapNode) else mapNode.GetName()


def _placeOfQuery(node, scan, query):
    if query is not None:
        return geometry.peak(query)
    region = np.array(results.provenance(node).get("region") or [])
    if not region.size:
        return cases.bounds(scan).mean(axis=1).tolist()
    return captions.inScene(region.reshape(-1, 3).mean(axis=0), scan)


def _width(volumeNode):
    return float(np.ptp(cases.bounds(volumeNode), axis=1).max())


def _description(tags):
    """The layout as Slicer describes it: columns of views."""
    view = '<item><view class="vtkMRMLSliceNode" singletontag="{}"/></item>'
    columns = (
        f'<item><layout type="vertical">{"".join(view.format(tag) for tag in column)}</layout></item>'
        for column in tags
    )
    return f'<layout type="horizontal" split="true">{"".join(columns)}</layout>'


def _apply(layoutNode, layout, description):
    if layoutNode.IsLayoutDescription(layout):
        layoutNode.SetLayoutDescription(layout, description)
    else:
        layoutNode.AddLayoutDescription(layout, description)
    layoutNode.SetViewArrangement(layout)


def _view(kind, tag):
    """The slice or composite node of a view; without the application nobody else makes them."""
    node = slicer.mrmlScene.GetSingletonNode(tag, kind)
    if node is None:
        node = slicer.mrmlScene.CreateNodeByClass(kind)
        node.UnRegister(None)
        node.SetSingletonTag(tag)
        node.SetName(tag)
        node = slicer.mrmlScene.AddNode(node)
    return node
