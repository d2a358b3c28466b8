"""What every panel is: widgets from a .ui file, tied to the parameter node, that show one explanation of the scene."""

from pathlib import Path

import slicer
from slicer.util import VTKObservationMixin

_UI = Path(__file__).resolve().parents[2] / "Resources" / "UI"


class Panel(VTKObservationMixin):
    """A part of the module's user interface. `widget` is what to put on the screen, `ui` its named children."""

    uiFile = ""
    title = ""
    followsParts = False
    """Whether the explanation is shown anew when other nodes go, which may have belonged to it."""

    def __init__(self, logic):
        VTKObservationMixin.__init__(self)
        self.logic = logic
        self.widget = slicer.util.loadUI(str(_UI / self.uiFile))
        self.widget.setMRMLScene(slicer.mrmlScene)
        self.ui = slicer.util.childWidgetVariables(self.widget)
        self.parameterNode = None
        self.node = None
        self._guiTag = None
        self.addObserver(slicer.mrmlScene, slicer.vtkMRMLScene.NodeRemovedEvent, self._onNodeRemoved)

    def setParameterNode(self, parameterNode):
        """Tie the widgets that name a parameter to the parameter node; None unties them while a scene is closed."""
        if self.parameterNode is not None:
            self.parameterNode.disconnectGui(self._guiTag)
        self.parameterNode = parameterNode
        if parameterNode is not None:
            self._guiTag = parameterNode.connectGui(self.widget)

    def show(self, node):
        """Show what this panel has to say about an explanation of the scene; None when there is none."""
        self.node = node

    def cleanup(self):
        """Let go of everything that outlives the widgets."""
        self.removeObservers()
        self.setParameterNode(None)

    def _onNodeRemoved(self, *_event):
        if self.node is None:
            return
        if self.node.GetScene() is None:
            self.show(None)
        elif self.followsParts and not slicer.mrmlScene.IsBatchProcessing():
            self.show(self.node)
