"""Comparisons: two maps of one scan, a scan and cases like it, or a scan and its variants, in slice views of their own.

A scene keeps its views and what they show, but not the description of a layout: what is compared is kept at the layout
node, from which `restore` makes the description again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import chain

import numpy as np
import slicer

from MedXAISlicerLib import captions, cases, display, geometry, results, windows

MOST_CASES = 4

_LAYOUTS = {"maps": 4710, "cases": 4711, "variants": 4712}
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


_windows = windows.LinkedWindows()


@dataclass(frozen=True, eq=False)
class _View:
    """What one view shows, in which plane; those of one `group` are linked."""

    tag: str
    plane: str
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

    Where maps of the scan say for each case what in the scan is like it, several cases are each below the scan with the
    map for this case.

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


def showVariants(node):
    """Show a scan, the variant of it that is played, and what was changed in that, in linked views.

    Raises:
        MedXAIError: when the scan or the series is not in the scene any more.
    """
    from MedXAILib.errors import MedXAIError

    for name in ("Source", "Variant"):
        if results.part(node, name) is None:
            raise MedXAIError(f"The {name.lower()} of '{node.GetName()}' is not in the scene any more: ask again.")
    _begin("variants", [node], [])


def leave():
    """Go back to the layout that was there before a comparison."""
    layoutNode = _layoutNode()
    if layoutNode is None:
        return
    layoutNode.SetViewArrangement(_before(layoutNode))
    layoutNode.RemoveAttribute(_COMPARISON)
    layoutNode.RemoveNodeReferenceIDs(_COMPARED)
    _windows.link([])
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
    """Which comparison is on the screen: maps, cases, variants, or None."""
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
    _keepApart(kind, [view for view, *_ in views], [sliceNode for _, sliceNode, _ in views])
    for view, sliceNode, compositeNode in views:
        sliceNode.SetOrientation(view.plane)
        sliceNode.SetLayoutColor(_COLOURS[view.plane])
        width, height, _ = sliceNode.GetDimensions()
        pixel = view.width / min(width, height)
        sliceNode.SetFieldOfView(width * pixel, height * pixel, sliceNode.GetFieldOfView()[2])
        sliceNode.JumpSliceByCentering(*view.place)
        compositeNode.SetForegroundOpacity(opacity)
        compositeNode.SetLinkedControl(kind != "cases")
        compositeNode.SetHotLinkedControl(kind != "cases")


def _fill(layoutNode):
    """Have the views of the comparison, with what belongs into each; they stay where they are.

    Returns (view, slice node, composite node) of each.
    """
    comparison = _comparison(layoutNode)
    kind = comparison["kind"]
    columns = _COLUMNS[kind](_compared(layoutNode), comparison["indices"])
    # The application makes its views now; what is in them is known only afterwards.
    _apply(layoutNode, _LAYOUTS[kind], _description(columns))
    views = []
    for view in chain(*columns):
        sliceNode, compositeNode = (
            _node(of_view, view.tag) for of_view in ("vtkMRMLSliceNode", "vtkMRMLSliceCompositeNode")
        )
        sliceNode.SetLayoutLabel(view.label)
        # A scene saves only whether there is a group: after loading all would be in the same.
        sliceNode.SetViewGroup(view.group)
        compositeNode.SetBackgroundVolumeID(view.volume.GetID())
        compositeNode.SetForegroundVolumeID(view.map.GetID() if view.map else None)
        views.append((view, sliceNode, compositeNode))
    _windows.link(dict.fromkeys(view.volume for view, *_ in views))
    return views


def _keepApart(kind, views, sliceNodes):
    """Keep what was drawn in the scan out of the views of other cases, the hot spots of a map out of the other's."""
    _letIn()
    if kind == "maps":
        for own in dict.fromkeys(view.map for view in views):
            spots = results.part(own, "HotSpots")
            others = [node for view, node in zip(views, sliceNodes, strict=True) if view.map is not own]
            _keepOut([] if spots is None else [spots.GetDisplayNode()], others)
    elif kind == "cases":
        scan = views[0].volume
        _keepOut(_placed(), [node for view, node in zip(views, sliceNodes, strict=True) if view.volume is not scan])


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


def _column(kind, number, planes, *shown):
    """A column of views on the same, in several planes."""
    return [_View(f"MedXAI{kind.title()}{number}{plane}", plane, *shown) for plane in planes]


def _mapColumns(nodes, _indices):
    scan = results.part(nodes[0], "Source")
    place, width = geometry.peak(nodes[0]), _width(scan)
    planes = ("Axial", "Coronal", "Sagittal")
    return [
        _column("maps", i, planes, _label(node), _GROUP, scan, node, place, width) for i, node in enumerate(nodes, 1)
    ]


def _caseColumns(nodes, indices):
    (node,) = nodes
    scan, found = results.part(node, "Source"), cases.cases(node)
    chosen = [found[i] for i in indices if found[i]["volume"] is not None]
    # One scale for all: sizes are compared by eye.
    width = max((_width(case["volume"]) for case in chosen), default=_width(scan))

    def ofScan(query):
        return "This scan", _GROUP, scan, query, _placeOfQuery(node, scan, query), width

    def ofCase(case, number):
        return _labelOf(case), _GROUP + number, case["volume"], case["map"], cases.middle(case), width

    queries = [case["query_map"] for case in chosen]
    if len(set(queries)) > 1:
        return [
            [
                _View(f"MedXAICases{number}Scan", "Axial", *ofScan(case["query_map"])),
                _View(f"MedXAICases{number}Axial", "Axial", *ofCase(case, number)),
            ]
            for number, case in enumerate(chosen, 1)
        ]
    planes = ("Axial", "Coronal")
    columns = [_column("cases", 1, planes, *ofScan(next(iter(queries), None)))]
    return columns + [
        _column("cases", number + 1, planes, *ofCase(case, number)) for number, case in enumerate(chosen, 1)
    ]


def _variantColumns(nodes, _indices):
    (node,) = nodes
    scan, variant = (results.part(node, name) for name in ("Source", "Variant"))
    change = next(iter(results.maps(node)), None)
    place, width = cases.bounds(variant).mean(axis=1).tolist(), _width(variant)
    shown = {
        "This scan": (scan, None),
        "Variant": (variant, None),
        "Changed: orange added, blue removed": (variant, change),
    }
    return [
        _column("variants", number, ("Axial", "Coronal"), label, _GROUP, *layers, place, width)
        for number, (label, layers) in enumerate(shown.items(), 1)
    ]


_COLUMNS = {"maps": _mapColumns, "cases": _caseColumns, "variants": _variantColumns}


def _labelOf(case):
    role = f", {cases.ROLES[case['role']]}" if cases.ROLES[case["role"]] else ""
    return results.safeText(f"{case['label']} {cases.number(case['similarity'])}{role}")


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


def _description(columns):
    """The layout as Slicer describes it: columns of views."""
    view = '<item><view class="vtkMRMLSliceNode" singletontag="{}"/></item>'
    described = (
        f'<item><layout type="vertical">{"".join(view.format(one.tag) for one in column)}</layout></item>'
        for column in columns
    )
    return f'<layout type="horizontal" split="true">{"".join(described)}</layout>'


def _apply(layoutNode, layout, description):
    if layoutNode.IsLayoutDescription(layout):
        layoutNode.SetLayoutDescription(layout, description)
    else:
        layoutNode.AddLayoutDescription(layout, description)
    layoutNode.SetViewArrangement(layout)


def _node(kind, tag):
    """The slice or composite node of a view; without the application nobody else makes them."""
    node = slicer.mrmlScene.GetSingletonNode(tag, kind)
    if node is None:
        node = slicer.mrmlScene.CreateNodeByClass(kind)
        node.UnRegister(None)
        node.SetSingletonTag(tag)
        node.SetName(tag)
        node = slicer.mrmlScene.AddNode(node)
    return node
