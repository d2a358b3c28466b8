"""What an explanation is in the scene: one node of its kind, and what belongs to it, found from it by reference.

A saliency map is a volume node, a caption a text node; concepts, similar cases, rules and the variants of a traversal
are table nodes. Everything is nodes, attributes and references, so that a saved scene brings explanations back as they
were.
"""

from __future__ import annotations

import json
import re
from datetime import datetime

import slicer
import vtk

PARTS = ("Summary", "HotSpots", "Statistics", "Channels", "Interval", "Browser", "Variant")

_SEVERAL = ("Map", "CaseVolume", "CaseMap", "Sequence")
_CLASSES = ("vtkMRMLScalarVolumeNode", "vtkMRMLTextNode", "vtkMRMLTableNode")
FOLDER = "MedXAI.Explanation"
"""The attribute of the folders that explanations are in."""


def findExplanations():
    """The nodes of all explanations in the scene, whatever their kind, oldest first."""
    found = [node for kind in _CLASSES for node in slicer.util.getNodesByClass(kind)]
    return sorted(
        (node for node in found if node.GetAttribute("MedXAI.Provenance")),
        key=lambda node: provenance(node).get("created", ""),
    )


def describe(node, answer):
    """Make a node the explanation that an answer is, of its kind and with how it was made."""
    made = answer.provenance
    for name, value in {
        "Kind": answer.kind,
        "Provenance": json.dumps(made),
        "Residual": json.dumps(answer.manifest["residual"]),
        "Method": made["method"],
        "TargetLabel": safeText(made["target_label"]),
    }.items():
        node.SetAttribute(f"MedXAI.{name}", value)
    if answer.card is not None:
        setCard(node, answer.card)


def kind(node):
    """SaliencyMap, Caption, ConceptScores, SimilarCases, Traversal or RuleSet."""
    return node.GetAttribute("MedXAI.Kind")


def title(node):
    """What an explanation is called in a list: method, target and time of day."""
    made = provenance(node)
    at = datetime.fromisoformat(made["created"]).astimezone()
    partial = " (partial)" if isPartial(node) else ""
    return f"{methodTitle(node)} · {made['target_label']}{partial} · {at:%H:%M}"


def methodTitle(node):
    """What the method of an explanation is called."""
    made = provenance(node)
    return made.get("title") or made["method"]


def provenance(node):
    """How an explanation was made, as `MedXAILib.explanation.Provenance` has it."""
    return json.loads(node.GetAttribute("MedXAI.Provenance"))


def isPartial(node):
    """Whether an explanation was ended early."""
    made = node.GetAttribute("MedXAI.Provenance")
    return made is not None and bool(json.loads(made).get("partial"))


def residual(node):
    """By how much an explanation misses what theory demands of it (relative), by name."""
    return json.loads(node.GetAttribute("MedXAI.Residual") or "{}")


def card(node):
    """The trust card of a map, as `MedXAILib.trust.card.TrustCard.to_json` has it; None as long as it has none."""
    return json.loads(node.GetAttribute("MedXAI.Trust") or "null")


def setCard(node, found):
    """Let a map have a trust card."""
    node.SetAttribute("MedXAI.Trust", json.dumps(found))


def scans(node):
    """The volumes that were explained: the source, and what lay beside it as further channels."""
    role = "MedXAI.MoreChannels"
    beside = [node.GetNthNodeReference(role, i) for i in range(node.GetNumberOfNodeReferences(role))]
    return [part(node, "Source"), *filter(None, beside)]


def setMoreChannels(node, volumeNodes):
    """Note which volumes beside its source were explained as further channels."""
    for volumeNode in volumeNodes:
        node.AddNodeReferenceID("MedXAI.MoreChannels", volumeNode.GetID())


def part(node, name):
    """What belongs to an explanation, by name (one of `PARTS`, Source or OwnColours); None when it is not there (any
    more)."""
    return node.GetNodeReference(f"MedXAI.{name}")


def setPart(node, name, belonging):
    """Make a node belong to an explanation."""
    node.SetNodeReferenceID(f"MedXAI.{name}", belonging.GetID())


def addPart(node, name, belonging):
    """Make a node one of several that belong to an explanation under one name. Returns its index among them."""
    index = len(parts(node, name))
    # References move up when a node before them is removed: the node itself says which one it is.
    belonging.SetAttribute("MedXAI.Index", str(index))
    node.AddNodeReferenceID(f"MedXAI.{name}", belonging.GetID())
    return index


def parts(node, name):
    """The several nodes that belong to an explanation under one name, by index."""
    role = f"MedXAI.{name}"
    found = [node.GetNthNodeReference(role, i) for i in range(node.GetNumberOfNodeReferences(role))]
    return {int(one.GetAttribute("MedXAI.Index")): one for one in found if one is not None}


def maps(node):
    """The maps of an explanation."""
    return [node] if kind(node) == "SaliencyMap" else list(parts(node, "Map").values())


def addMapNode(volumeNode, array, name):
    """Add an array (D, H, W) or (D, H, W, C) to the scene: on the grid and under the transform of `volumeNode`."""
    kind = "Scalar" if array.ndim == 3 else "Vector"
    node = slicer.mrmlScene.AddNewNodeByClass(f"vtkMRML{kind}VolumeNode", safeName(name))
    displayNode = slicer.mrmlScene.AddNewNodeByClass(f"vtkMRML{kind}VolumeDisplayNode")
    # To find a window by itself it would look at every voxel again.
    displayNode.AutoWindowLevelOff()
    node.SetAndObserveDisplayNodeID(displayNode.GetID())
    slicer.util.updateVolumeFromArray(node, array)
    node.CopyOrientation(volumeNode)
    node.SetAndObserveTransformNodeID(volumeNode.GetTransformNodeID())
    setPart(node, "Source", volumeNode)
    return node


def addTable(name, columns):
    """Add a table that nobody is to edit to the scene: lists of texts or of numbers by the titles of their columns."""
    tableNode = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLTableNode", name)
    for title, values in columns.items():
        column = vtk.vtkDoubleArray() if values and isinstance(values[0], float) else vtk.vtkStringArray()
        column.SetName(_cell(title))
        for value in values:
            column.InsertNextValue(_cell(value) if isinstance(value, str) else value)
        tableNode.AddColumn(column)
    tableNode.SetUseColumnTitleAsColumnHeader(True)
    tableNode.SetLocked(True)
    return tableNode


def isSigned(mapNode):
    """Whether a map speaks for (positive) and against (negative) the target, and not only for it."""
    return mapNode.GetAttribute("MedXAI.Signed") == "1"


def safeName(name):
    """A name for a node: unique, and of what is safe in file names only.

    A scene with a file named after "&" cannot be read again.
    """
    return slicer.mrmlScene.GenerateUniqueName(re.sub(r"[^\w .+()-]", "", name))


def safeText(text):
    """A text of the same length that a scene can hold: one with other characters in it cannot be read again."""
    return re.sub("[^\n -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", " ", text)


def _cell(text):
    # Tables are saved as text, where tabs, line ends and quotes would shift the columns.
    return " ".join(safeText(text).replace('"', "'").split())


def addSummary(node, about):
    """Add what is to be known about an explanation, in words, as a text node; it begins with the lines `about` it."""
    textNode = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLTextNode", f"{node.GetName()} summary")
    textNode.SetText(safeText(summary(node, about)))
    setPart(node, "Summary", textNode)
    return textNode


def summary(node, about):
    """What is to be known about an explanation, in words: the lines `about` it, and how it was made."""
    from MedXAILib.report.residuals import residual as meaning

    made = provenance(node)
    sourceNode = part(node, "Source")
    return "\n".join(
        [
            *about,
            f"Scan: {sourceNode.GetName() if sourceNode else made['volume'].get('source')}",
            f"Network: {made['model'].get('name')}",
            f"Method: {made['method']}"
            + "".join(f", {k} {v}" for k, v in made["parameters"].items() if v not in ([], "")),
            *(f"Check: {meaning(name).sentence(value)}" for name, value in residual(node).items()),
            *(f"Note: {note}" for note in made.get("notes", [])),
            f"Computed {made['created']} in {made['seconds']:.1f} s on {made['device']}",
            "A coloured place is one that this network used: it does not mean that there is disease.",
            "For research only, not for diagnosis.",
        ]
    )


def inWords(point):
    """A point in RAS mm, in words."""
    return "R {:.0f}, A {:.0f}, S {:.0f} mm".format(*point)


def fileBesideSource(node):
    """Put an explanation into a folder beside its scan in the subject hierarchy: under the same study."""
    hierarchyNode = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(slicer.mrmlScene)
    sourceItem = hierarchyNode.GetItemByDataNode(part(node, "Source"))
    beside = hierarchyNode.GetItemParent(sourceItem) if sourceItem else hierarchyNode.GetSceneItemID()
    folder = hierarchyNode.CreateFolderItem(beside, node.GetName())
    hierarchyNode.SetItemAttribute(folder, FOLDER, "1")
    for one in [node, *belongings(node)]:
        # The application gives every node an item; without it there is none yet.
        item = hierarchyNode.GetItemByDataNode(one) or hierarchyNode.CreateItem(folder, one)
        hierarchyNode.SetItemParent(item, folder)
    return folder


def belongings(node):
    """All nodes that belong to an explanation, but for its scan."""
    several = [one for name in _SEVERAL for one in parts(node, name).values()]
    return [*filter(None, (part(node, name) for name in PARTS)), *several]
