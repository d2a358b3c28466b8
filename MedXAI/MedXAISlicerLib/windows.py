"""Window and level of images that are compared: two images through two windows cannot be compared by eye."""

from __future__ import annotations

import slicer
import vtk
from slicer.util import VTKObservationMixin


class LinkedWindows(VTKObservationMixin):
    """Lets volumes be seen through one window: whoever changes that of one changes that of all."""

    def __init__(self):
        VTKObservationMixin.__init__(self)
        # By name, so that nothing of a closed scene is held.
        self._displays = []

    def link(self, volumeNodes):
        """From now on let these volumes have one window, at first that of the first; with none, nothing is linked."""
        self.removeObservers()
        displays = [node.GetDisplayNode() for node in volumeNodes if node.GetDisplayNode() is not None]
        self._displays = [displayNode.GetID() for displayNode in displays]
        for displayNode in displays:
            copyWindow(displayNode, displays[0])
            self.addObserver(displayNode, vtk.vtkCommand.ModifiedEvent, self._follow)

    def _follow(self, changed, _event):
        for displayNode in filter(None, map(slicer.mrmlScene.GetNodeByID, self._displays)):
            copyWindow(displayNode, changed)


def copyWindow(displayNode, other):
    """Let what a display node shows be seen through the window of another, if there is one."""
    window = None if other is None else (other.GetWindow(), other.GetLevel())
    if window not in (None, (displayNode.GetWindow(), displayNode.GetLevel())):
        modifying = displayNode.StartModify()
        displayNode.AutoWindowLevelOff()
        displayNode.SetWindowLevel(*window)
        displayNode.EndModify(modifying)
