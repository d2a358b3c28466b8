"""What an explanation is in the scene: a map, and what belongs to it, found from the map by reference.

Everything is nodes, attributes and references, so that a saved scene brings explanations back as they were.
"""

from __future__ import annotations

import json

import slicer

from MedXAISlicerLib import geometry

PARTS = ("Summary", "HotSpots", "Statistics", "Channels")


def findExplanations():
    """The maps of all explanations in the scene, oldest first."""
    found = [n for n in slicer.util.getNodesByClass("vtkMRMLScalarVolumeNode") if n.GetAttribute("MedXAI.Provenance")]
    return sorted(found, key=lambda node: provenance(node).get("created", ""))


def provenance(mapNode):
    """How a map was made, as `MedXAILib.explanation.Provenance` has it."""
    return json.loads(mapNode.GetAttribute("MedXAI.Provenance"))


def residual(mapNode):
    """By how much a map misses what theory demands of it (relative), by name."""
    return json.loads(mapNode.GetAttribute("MedXAI.Residual") or "{}")


def part(mapNode, name):
    """What belongs to a map, by name (one of `PARTS`, Source or OwnColours); None when it is not there (any more)."""
    return mapNode.GetNodeReference(f"MedXAI.{name}")


def setPart(mapNode, name, node):
    """Make a node belong to a map."""
    mapNode.SetNodeReferenceID(f"MedXAI.{name}", node.GetID())


def isSigned(mapNode):
    """Whether a map speaks for (positive) and against (negative) the target, and not only for it."""
    return mapNode.GetAttribute("MedXAI.Signed") == "1"


def addSummary(mapNode):
    """Add what is to be known about a map, in words, as a text node."""
    textNode = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLTextNode", f"{mapNode.GetName()} summary")
    textNode.SetText(summary(mapNode))
    setPart(mapNode, "Summary", textNode)
    return textNode


def summary(mapNode):
    """What is to be known about a map, in words."""
    made = provenance(mapNode)
    sourceNode = part(mapNode, "Source")
    right, anterior, superior = geometry.peak(mapNode)
    lines = [
        f"What speaks for '{made['target_label']}'" + (", and against it" if isSigned(mapNode) else ""),
        f"Scan: {sourceNode.GetName() if sourceNode else made['volume'].get('source')}",
        f"Network: {made['model'].get('name')}",
        f"Method: {made['method']}" + "".join(f", {k} {v}" for k, v in made["parameters"].items() if v not in ([], "")),
        f"Strongest at R {right:.0f}, A {anterior:.0f}, S {superior:.0f} mm",
    ]
    table = part(mapNode, "Statistics")
    if table is not None:
        lines += [
            f"{table.GetCellText(row, 0)} lies in {float(table.GetCellText(row, 1)):.2f} mL"
            for row in range(table.GetNumberOfRows())
        ]
    lines += [f"Departs from theory ({name}) by {value:.1%}" for name, value in residual(mapNode).items()]
    lines += [f"Note: {note}" for note in made.get("notes", [])]
    lines += [
        f"Computed {made['created']} in {made['seconds']:.1f} s on {made['device']}",
        "A coloured place is one that this network used: it does not mean that there is disease.",
        "For research only, not for diagnosis.",
    ]
    return "\n".join(lines)


def fileBesideSource(mapNode):
    """Put an explanation into a folder beside its scan in the subject hierarchy: under the same study."""
    hierarchyNode = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(slicer.mrmlScene)
    sourceItem = hierarchyNode.GetItemByDataNode(part(mapNode, "Source"))
    beside = hierarchyNode.GetItemParent(sourceItem) if sourceItem else hierarchyNode.GetSceneItemID()
    folder = hierarchyNode.CreateFolderItem(beside, mapNode.GetName())
    for node in filter(None, [mapNode, *(part(mapNode, name) for name in PARTS)]):
        # The application gives every node an item; without it there is none yet.
        item = hierarchyNode.GetItemByDataNode(node) or hierarchyNode.CreateItem(folder, node)
        hierarchyNode.SetItemParent(item, folder)
    return folder
