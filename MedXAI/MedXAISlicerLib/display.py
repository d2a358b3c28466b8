"""How a map is shown: colours, window, legend, over the scan in slice views, and in 3-D.

All of it is nodes of the scene, so that it works without views and comes back with a saved scene.
"""

from __future__ import annotations

import numpy as np
import slicer

from MedXAISlicerLib import colours, geometry, results

# Of the most opaque voxel in a volume rendering, per mm.
_DENSEST = 0.6


def show(mapNode):
    """Show one map, and hide the others: over its scan in all slice views, hot spots in 2-D and 3-D, legend."""
    for other in results.findExplanations():
        if other is not mapNode:
            _setVisible(other, False)
    if mapNode.GetDisplayNode() is None:
        colour(mapNode)
    overlay(mapNode)
    if slicer.modules.colors.logic().GetColorLegendDisplayNode(mapNode) is None:
        addLegend(mapNode)
    _setVisible(mapNode, True)
    jumpToPeak(mapNode)


def restore():
    """Show the latest explanation of a loaded scene as when it was made. Returns its map, or None without any."""
    found = results.findExplanations()
    if not found:
        return None
    show(found[-1])
    return found[-1]


def colour(mapNode):
    """Give a map its colours, over a window that a few stray voxels do not decide: symmetric about zero when signed."""
    signed = results.isSigned(mapNode)
    mapNode.CreateDefaultDisplayNodes()
    limit = windowLimit(slicer.util.arrayFromVolume(mapNode))
    displayNode = mapNode.GetDisplayNode()
    modifying = displayNode.StartModify()
    displayNode.SetAndObserveColorNodeID(colours.colourNode(signed).GetID())
    displayNode.AutoWindowLevelOff()
    displayNode.SetWindowLevelMinMax(-limit if signed else 0, limit)
    displayNode.InterpolateOn()
    displayNode.EndModify(modifying)


def windowLimit(array):
    """The 99th percentile of what is not zero, as an absolute value; 1 where all is zero."""
    there = np.abs(array[array != 0])
    return float(np.percentile(there, 99)) if there.size else 1.0


def setThreshold(mapNode, faintest):
    """Make what is less than `faintest` (0 to 1) of the window transparent, for and against alike."""
    node = results.part(mapNode, "OwnColours")
    signed = results.isSigned(mapNode)
    if node is None:
        # The table of the scene is for all maps: this one needs its own from now on.
        node = colours.addTable(f"{mapNode.GetName()} colours", signed)
        results.setPart(mapNode, "OwnColours", node)
        mapNode.GetDisplayNode().SetAndObserveColorNodeID(node.GetID())
    colours.fill(node, signed, faintest)


def addLegend(mapNode):
    """Add a colour legend that says what the colours mean."""
    legendNode = slicer.modules.colors.logic().AddDefaultColorLegendDisplayNode(mapNode)
    signed = results.isSigned(mapNode)
    legendNode.SetTitleText("For / against" if signed else "Importance")
    legendNode.SetNumberOfLabels(3)
    legendNode.SetLabelFormat("%.2g")
    legendNode.SetSize(0.12, 0.4)
    return legendNode


def overlay(mapNode, opacity=0.6):
    """Lay a map over its scan in every slice view; without views this does nothing."""
    sourceNode = results.part(mapNode, "Source")
    background = sourceNode if sourceNode is not None else "keep-current"
    slicer.util.setSliceViewerLayers(background=background, foreground=mapNode, foregroundOpacity=opacity)


def jumpToPeak(mapNode):
    """Move every slice view to where the map is strongest."""
    slicer.vtkMRMLSliceNode.JumpAllSlices(
        slicer.mrmlScene, *geometry.peak(mapNode), slicer.vtkMRMLSliceNode.CenteredJumpSlice
    )


def render(mapNode):
    """Show a map as a cloud in 3-D, of the colours it has in slices, and as dense as it is strong. Returns its node."""
    renderingNode = slicer.modules.volumerendering.logic().CreateDefaultVolumeRenderingNodes(mapNode)
    displayNode = mapNode.GetDisplayNode()
    table = displayNode.GetColorNode().GetLookupTable()
    low, high = displayNode.GetWindowLevelMin(), displayNode.GetWindowLevelMax()
    propertyNode = renderingNode.GetVolumePropertyNode()
    colour, opacity = propertyNode.GetColor(), propertyNode.GetScalarOpacity()
    colour.RemoveAllPoints()
    opacity.RemoveAllPoints()
    for i, value in enumerate(np.linspace(low, high, table.GetNumberOfTableValues())):
        *rgb, shown = table.GetTableValue(i)
        colour.AddRGBPoint(value, *rgb)
        opacity.AddPoint(value, shown * _DENSEST * abs(value) / high)
    propertyNode.GetVolumeProperty().ShadeOff()
    propertyNode.GetVolumeProperty().SetInterpolationTypeToLinear()
    renderingNode.SetFollowVolumeDisplayNode(False)
    renderingNode.SetVisibility(True)
    return renderingNode


def _setVisible(mapNode, visible):
    """Show or hide what belongs to a map; a cloud that was not asked for stays hidden."""
    nodes = [results.part(mapNode, "HotSpots"), slicer.modules.colors.logic().GetColorLegendDisplayNode(mapNode)]
    if not visible:
        nodes.append(slicer.modules.volumerendering.logic().GetFirstVolumeRenderingDisplayNode(mapNode))
    for node in filter(None, nodes):
        displayNode = node if isinstance(node, slicer.vtkMRMLDisplayNode) else node.GetDisplayNode()
        displayNode.SetVisibility(visible)
        # A legend that was there before its volume was in a view is not drawn until it changes.
        displayNode.Modified()
