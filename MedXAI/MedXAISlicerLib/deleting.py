"""Taking an explanation out of the scene, with all that belongs to it."""

from __future__ import annotations

import slicer

from MedXAISlicerLib import layouts, results

# A node that is removed leaves behind how it is displayed and stored.
_OWNED = ("display", "storage", "volumeProperty")


def delete(node):
    """Remove an explanation from the scene: its node, what belongs to it and its folder. The scan stays."""
    hierarchyNode = slicer.vtkMRMLSubjectHierarchyNode.GetSubjectHierarchyNode(slicer.mrmlScene)
    folder = hierarchyNode.GetItemParent(hierarchyNode.GetItemByDataNode(node))
    everything = [node, *results.belongings(node)]
    layouts.leaveIfShown(everything)
    for one in everything:
        attached = filter(None, [results.part(one, "Channel"), results.part(one, "OwnColours")])
        for gone in (one, *attached):
            # The application removes the item with its node; without it nobody does.
            hierarchyNode.RemoveItem(hierarchyNode.GetItemByDataNode(gone), False, False)
            remove(gone)
    if hierarchyNode.GetItemAttribute(folder, results.FOLDER) and not hierarchyNode.GetNumberOfItemChildren(folder):
        hierarchyNode.RemoveItem(folder)


def remove(node):
    """Remove a node with how it is displayed and stored, which the scene would keep."""
    owned = [node.GetNthNodeReference(role, i) for role in _OWNED for i in range(node.GetNumberOfNodeReferences(role))]
    slicer.mrmlScene.RemoveNode(node)
    for one in filter(None, owned):
        remove(one)
