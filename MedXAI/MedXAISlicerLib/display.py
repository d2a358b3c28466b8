"""How an explanation is shown: colours, window, legend, over the scan in slice views, in 3-D, and as a series.

All of it is nodes of the scene and their attributes, so that it works without views and comes back with a saved scene.
"""

from __future__ import annotations

import numpy as np
import slicer

from MedXAISlicerLib import colours, geometry, results

OPACITY = 0.6
"""How much maps cover the scan until somebody changes it."""

# Of the most opaque voxel in a volume rendering, per mm.
_DENSEST = 0.6

# Values that a window is found from: enough for a percentile, of a scan that has many times more.
_SAMPLES = 1_000_000


def show(node):
    """Show one explanation of any kind and hide the others: its map over its scan in all slice views, with legend, hot
    spots in 2-D and 3-D. An explanation without a map shows the scan alone. A caption begins with its first
    map, concepts with that of the one that matters most, similar cases with the map of the scan that was asked about.
    """
    for other in results.findExplanations():
        for mapNode in results.maps(other):
            setVisible(mapNode, False)
    mapNode = next(iter(results.maps(node)), None)
    if mapNode is None:
        slicer.util.setSliceViewerLayers(background=_background(node), foreground=None)
        return
    if mapNode.GetDisplayNode() is None:
        colour(mapNode)
    overlay(mapNode)
    setVisible(mapNode, True)
    jumpToPeak(mapNode)


def showOneOf(node, mapNode, place=None):
    """Lay one of the maps of an explanation over the scan, and move all slices to `place`, or else to where the map is
    strongest; without a map the scan is shown alone."""
    for one in results.maps(node):
        setVisible(one, one is mapNode)
    if mapNode is not None:
        overlay(mapNode)
    elif results.part(node, "Source") is not None:
        slicer.util.setSliceViewerLayers(background=results.part(node, "Source"), foreground=None)
    place = place or (mapNode and geometry.peak(mapNode))
    if place:
        jumpTo(place)


def restore():
    """Show the latest explanation of a loaded scene as when it was made. Returns its node, or None without any."""
    found = results.findExplanations()
    if not found:
        return None
    show(found[-1])
    return found[-1]


def colour(mapNode, limit=None):
    """Give a map its colours, over a window that a few stray voxels do not decide: symmetric about zero when signed."""
    signed = results.isSigned(mapNode)
    mapNode.CreateDefaultDisplayNodes()
    limit = windowLimit(slicer.util.arrayFromVolume(mapNode)) if limit is None else limit
    displayNode = mapNode.GetDisplayNode()
    modifying = displayNode.StartModify()
    displayNode.SetAndObserveColorNodeID(colours.colourNode(signed).GetID())
    displayNode.AutoWindowLevelOff()
    displayNode.SetWindowLevelMinMax(-limit if signed else 0, limit)
    displayNode.InterpolateOn()
    displayNode.EndModify(modifying)


def windowLimit(array):
    """The 99th percentile of what is not zero, as an absolute value; 1 where all is zero."""
    there = array[array != 0]
    some = there[:: max(1, there.size // _SAMPLES)]
    return float(np.percentile(np.abs(some), 99)) if some.size else 1.0


def overlay(mapNode, opacity=None):
    """Lay a map over its scan in every slice view; without views this does nothing. `opacity` (0 to 1) stays that of
    the maps before when it is left out."""
    slicer.util.setSliceViewerLayers(
        background=_background(mapNode),
        foreground=inSlices(mapNode),
        foregroundOpacity=opacity if opacity is not None else currentOpacity(),
    )


def currentOpacity():
    """How much maps cover their scans in slice views."""
    return next((compositeNode.GetForegroundOpacity() for compositeNode in _viewsWithMap()), OPACITY)


def setOpacity(opacity):
    """Set how much maps cover their scans (0 to 1), in every slice view that shows one."""
    for compositeNode in _viewsWithMap():
        compositeNode.SetForegroundOpacity(opacity)


def threshold(mapNode):
    """What is less than this part of the window (0 to 1) is transparent."""
    return float(mapNode.GetAttribute("MedXAI.Threshold") or colours.FAINTEST)


def setThreshold(mapNode, faintest):
    """Make what is less than `faintest` (0 to 1) of the window transparent, for and against alike."""
    node = results.part(mapNode, "OwnColours")
    if node is None:
        # The table of the scene is for all maps: this one needs its own from now on.
        node = colours.addTable(f"{mapNode.GetName()} colours", results.isSigned(mapNode))
        results.setPart(mapNode, "OwnColours", node)
        for volumeNode in filter(None, (mapNode, results.part(mapNode, "Channel"))):
            volumeNode.GetDisplayNode().SetAndObserveColorNodeID(node.GetID())
    colours.fill(node, results.isSigned(mapNode), faintest)
    mapNode.SetAttribute("MedXAI.Threshold", str(faintest))
    if hasCloud(mapNode):
        render(mapNode)


def hasLegend(mapNode):
    """Whether a map comes with a colour legend in the views."""
    return mapNode.GetAttribute("MedXAI.Legend") != "0"


def setLegend(mapNode, wanted):
    """Show a map with a colour legend in the views, or without."""
    mapNode.SetAttribute("MedXAI.Legend", str(int(wanted)))
    _showLegend(inSlices(mapNode), wanted)


def addLegend(mapNode):
    """Add a colour legend that says what the colours mean."""
    legendNode = slicer.modules.colors.logic().AddDefaultColorLegendDisplayNode(mapNode)
    signed = results.isSigned(mapNode)
    partial = " (partial)" if results.isPartial(mapNode) else ""
    title = mapNode.GetAttribute("MedXAI.Meaning") or ("For / against" if signed else "Importance")
    legendNode.SetTitleText(title + partial)
    legendNode.SetNumberOfLabels(3)
    legendNode.SetLabelFormat("%.2g")
    legendNode.SetSize(0.12, 0.4)
    return legendNode


def jumpTo(point):
    """Move every slice view to a point in RAS mm of the scene."""
    slicer.vtkMRMLSliceNode.JumpAllSlices(slicer.mrmlScene, *point, slicer.vtkMRMLSliceNode.CenteredJumpSlice)


def jumpToPeak(mapNode):
    """Move every slice view to where the map is strongest."""
    jumpTo(geometry.peak(mapNode))


def outline(mapNode, row):
    """Outline in slices that hot spot which has this row in the statistics: more than one would hide the colours."""
    spots = results.part(mapNode, "HotSpots")
    for index, segmentId in enumerate(spots.GetSegmentation().GetSegmentIDs()):
        spots.GetDisplayNode().SetSegmentVisibility2DOutline(segmentId, index == row)


def countChannels(mapNode):
    """How many channels a map keeps apart, besides their sum that it is; 0 without any."""
    channels = results.part(mapNode, "Channels")
    return 0 if channels is None else channels.GetImageData().GetNumberOfScalarComponents()


def channel(mapNode):
    """Which channel slices show in the place of a map; None when it is the map itself."""
    index = mapNode.GetAttribute("MedXAI.ShownChannel")
    return int(index) if index and results.part(mapNode, "Channel") is not None else None


def showChannel(mapNode, index):
    """Show one channel of a map in slices; None for their sum, the map itself."""
    before = inSlices(mapNode)
    mapNode.RemoveAttribute("MedXAI.ShownChannel")
    if index is not None:
        _fillChannel(mapNode, index)
        mapNode.SetAttribute("MedXAI.ShownChannel", str(index))
    after = inSlices(mapNode)
    for compositeNode in _viewsWithMap():
        if compositeNode.GetForegroundVolumeID() == before.GetID():
            compositeNode.SetForegroundVolumeID(after.GetID())
    _showLegend(before, False)
    _showLegend(after, hasLegend(mapNode))


def inSlices(mapNode):
    """The volume that slices show of a map: one of its channels, or the map itself."""
    return mapNode if channel(mapNode) is None else results.part(mapNode, "Channel")


def hasCloud(mapNode):
    """Whether a map is shown as a cloud in 3-D."""
    return mapNode.GetAttribute("MedXAI.Cloud") == "1"


def setCloud(mapNode, wanted):
    """Show a map as a cloud in 3-D, or not."""
    mapNode.SetAttribute("MedXAI.Cloud", str(int(wanted)))
    _showCloud(mapNode, wanted)


def render(mapNode):
    """Show a map as a cloud in 3-D, of the colours it has in slices, and as dense as it is strong. Returns its node."""
    mapNode.SetAttribute("MedXAI.Cloud", "1")
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


def setVisible(mapNode, visible):
    """Show or hide what belongs to a map beside its slices: hot spots, legend and cloud, as far as they are wanted."""
    spots = results.part(mapNode, "HotSpots")
    if spots is not None:
        spots.GetDisplayNode().SetVisibility(visible)
    _showLegend(inSlices(mapNode), visible and hasLegend(mapNode))
    _showCloud(mapNode, visible and hasCloud(mapNode))


def sequence(volumeNodes, names, title, browserNode=None):
    """Add copies of volumes on one grid as a series that can be played, in this order; in step with what `browserNode`
    plays already, if there is one.

    Returns the browser node and the volume that changes as it is played, with the place and the display of the first.
    """
    sequenceNode = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSequenceNode", title)
    sequenceNode.SetIndexType(sequenceNode.TextIndex)
    for name, volumeNode in zip(names, volumeNodes, strict=True):
        sequenceNode.SetDataNodeAtValue(volumeNode, name)
    if browserNode is None:
        browserNode = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSequenceBrowserNode", title)
        browserNode.SetAndObserveMasterSequenceNodeID(sequenceNode.GetID())
    else:
        browserNode.AddSynchronizedSequenceNode(sequenceNode)
    playedNode = browserNode.GetProxyNode(sequenceNode)
    playedNode.SetAndObserveTransformNodeID(volumeNodes[0].GetTransformNodeID())
    playedNode.CreateDefaultDisplayNodes()
    playedNode.GetDisplayNode().Copy(volumeNodes[0].GetDisplayNode())
    return browserNode, playedNode


def _background(node):
    sourceNode = results.part(node, "Source")
    return sourceNode if sourceNode is not None else "keep-current"


def _viewsWithMap():
    """What slice views are made of, of those that have a volume in the colours of maps in front."""
    for compositeNode in slicer.util.getNodesByClass("vtkMRMLSliceCompositeNode"):
        volumeNode = slicer.mrmlScene.GetNodeByID(compositeNode.GetForegroundVolumeID() or "")
        displayNode = volumeNode.GetDisplayNode() if volumeNode is not None else None
        if displayNode is not None and colours.isOurs(displayNode.GetColorNode()):
            yield compositeNode


def _showLegend(volumeNode, visible):
    legendNode = slicer.modules.colors.logic().GetColorLegendDisplayNode(volumeNode)
    if legendNode is None and visible:
        legendNode = addLegend(volumeNode)
    if legendNode is not None:
        legendNode.SetVisibility(visible)
        # A legend that was there before its volume was in a view is not drawn until it changes.
        legendNode.Modified()


def _showCloud(mapNode, visible):
    if visible:
        render(mapNode)
        return
    renderingNode = slicer.modules.volumerendering.logic().GetFirstVolumeRenderingDisplayNode(mapNode)
    if renderingNode is not None:
        renderingNode.SetVisibility(False)


def _fillChannel(mapNode, index):
    """Put a channel of a map into the volume that slices show it from. One window for all of them: to be compared."""
    array = slicer.util.arrayFromVolume(results.part(mapNode, "Channels"))
    node = results.part(mapNode, "Channel")
    if node is not None:
        slicer.util.updateVolumeFromArray(node, array[..., index])
        return
    node = results.addMapNode(mapNode, array[..., index], f"{mapNode.GetName()} channel")
    node.SetAttribute("MedXAI.Signed", mapNode.GetAttribute("MedXAI.Signed"))
    colour(node, windowLimit(array))
    node.GetDisplayNode().SetAndObserveColorNodeID(mapNode.GetDisplayNode().GetColorNodeID())
    results.setPart(mapNode, "Channel", node)
