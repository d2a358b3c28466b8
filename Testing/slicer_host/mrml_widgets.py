"""Slicer's widgets that know the scene."""

import weakref

import slicer
import vtk
from shiboken6 import Shiboken

from .ctk_widgets import ctkSliderWidget, missing
from .pythonqt import qt

_SCENE_CHANGES = ("NodeAddedEvent", "NodeRemovedEvent", "EndBatchProcessEvent", "EndImportEvent", "EndCloseEvent")


class qMRMLWidget(qt.QWidget):
    """A widget that hands on the scene to those that the .ui file connects to it."""

    mrmlSceneChanged = qt.Signal(object)

    def __init__(self, parent=None):
        super().__init__(parent)
        self._scene = None

    def mrmlScene(self):
        return self._scene

    def setMRMLScene(self, scene):
        if scene is not self._scene:
            self._scene = scene
            self.mrmlSceneChanged.emit(scene)


def _observer(widget, change):
    """Calls a method of a widget that may be gone by then."""
    known = weakref.ref(widget)

    def call(*_):
        alive = known()
        if alive is not None and Shiboken.isValid(alive):
            change(alive)

    return call


def _node_observer(widget, change):
    """The same for a node that comes or goes, if it is of a type that the widget shows."""
    known, call = weakref.ref(widget), _observer(widget, change)

    @vtk.calldata_type(vtk.VTK_OBJECT)
    def about(_scene, _event, node):
        alive = known()
        if alive is not None and any(node.IsA(kind) for kind in alive._types):
            call()

    return about


class qMRMLNodeComboBox(qt.QWidget):
    """Chooses one of the scene's nodes, as they come and go."""

    currentNodeChanged = qt.Signal(object)
    currentNodeIDChanged = qt.Signal(str)
    nodeAddedByUser = qt.Signal(object)
    nodeActivated = qt.Signal(object)

    def __init__(self, parent=None):
        super().__init__(parent)
        layout = qt.QHBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        self._box = qt.QComboBox()
        layout.addWidget(self._box)
        self._scene, self._current, self._shown = None, None, []
        self._types, self._hidden_types, self._attributes = [], [], []
        self._children, self._none, self._hidden, self._base, self._none_text = True, False, False, "", "None"
        self._box.activated.connect(self._chosen)
        self._observed = {}

    def mrmlScene(self):
        return self._scene

    def setMRMLScene(self, scene):
        for node, tag in self._observed.values():
            node.RemoveObserver(tag)
        self._observed = {}
        self._scene = scene
        if scene is not None:
            for event in _SCENE_CHANGES:
                observer = _node_observer if event.startswith("Node") else _observer
                call = observer(self, qMRMLNodeComboBox._refresh)
                tag = scene.AddObserver(getattr(slicer.vtkMRMLScene, event), call)
                self._observed[event] = scene, tag
        self._refresh()

    def addAttribute(self, kind, name, value=None):
        self._attributes.append((kind, name, value))
        self._refresh()

    def currentNode(self):
        return self._current

    def setCurrentNode(self, node):
        self._become(node if node in self._nodes() else None)
        self._fill()

    def setCurrentNodeID(self, node_id):
        self.setCurrentNode(self._scene.GetNodeByID(node_id) if self._scene and node_id else None)

    def setCurrentNodeIndex(self, index):
        self.setCurrentNode(self.nodeFromIndex(index))

    def nodeCount(self):
        return len(self._nodes())

    def nodeFromIndex(self, index):
        nodes = self._nodes()
        return nodes[index] if 0 <= index < len(nodes) else None

    def addNode(self, kind=""):
        """As when the person chooses "Create new ..."."""
        kind = kind or self._types[0]
        node = self._scene.AddNewNodeByClass(kind, self._scene.GenerateUniqueName(self._base or kind[len("vtkMRML") :]))
        self.nodeAddedByUser.emit(node)
        self.setCurrentNode(node)
        return node

    def removeCurrentNode(self):
        self._scene.RemoveNode(self._current)

    def _fits(self, node):
        if (node.GetHideFromEditors() and not self._hidden) or any(node.IsA(kind) for kind in self._hidden_types):
            return False
        exact = any(node.GetClassName() == kind for kind in self._types)
        if not exact and not (self._children and any(node.IsA(kind) for kind in self._types)):
            return False
        wanted = [(name, value) for kind, name, value in self._attributes if node.IsA(kind)]
        return all(
            node.GetAttribute(name) is not None if value is None else node.GetAttribute(name) == str(value)
            for name, value in wanted
        )

    def _nodes(self):
        if self._scene is None:
            return []
        of_types = [node for kind in self._types for node in slicer.util.getNodesByClass(kind, self._scene)]
        call = _observer(self, qMRMLNodeComboBox._refresh)
        for node in of_types:
            if node.GetID() not in self._observed:
                self._observed[node.GetID()] = node, node.AddObserver(vtk.vtkCommand.ModifiedEvent, call)
        return [node for node in of_types if self._fits(node)]

    def _refresh(self):
        if self._scene is not None and self._scene.IsBatchProcessing():
            return
        nodes = self._nodes()
        current = self._current if self._current in nodes else None
        if current is None and nodes and not self._none:
            current = nodes[0]
        shown = [(node.GetID(), node.GetName()) for node in nodes]
        if shown != self._shown or current is not self._current:
            self._shown = shown
            self._become(current)
            self._fill()

    def _fill(self):
        self._box.blockSignals(True)
        self._box.clear()
        if self._none:
            self._box.addItem(self._none_text, "")
        for node_id, name in self._shown:
            self._box.addItem(name, node_id)
        self._box.currentIndex = self._box.findData(self._current.GetID() if self._current else "")
        self._box.blockSignals(False)

    def _become(self, node):
        if node is not self._current:
            self._current = node
            self.currentNodeChanged.emit(node)
            self.currentNodeIDChanged.emit(node.GetID() if node else "")

    def _chosen(self, index):
        self.setCurrentNodeID(self._box.itemData(index))
        self.nodeActivated.emit(self._current)

    def _changing(name, kind):
        def write(self, value):
            setattr(self, name, list(value) if kind == "QStringList" else value)
            self._refresh()
            self._fill()

        return qt.Property(kind, lambda self: getattr(self, name), write)

    nodeTypes = _changing("_types", "QStringList")
    hideChildNodeTypes = _changing("_hidden_types", "QStringList")
    showChildNodeTypes = _changing("_children", bool)
    showHidden = _changing("_hidden", bool)
    noneEnabled = _changing("_none", bool)
    noneDisplay = _changing("_none_text", str)
    baseName = _changing("_base", str)
    currentNodeID = qt.Property(
        str,
        lambda self: self._current.GetID() if self._current else "",
        lambda self, value: self.setCurrentNodeID(value),
    )
    # What these allow is in the list's menu, which is left out.
    addEnabled, removeEnabled, renameEnabled, editEnabled, selectNodeUponCreation, interactionNodeSingletonTag = (
        qt.Property(bool, lambda self: True, lambda self, value: None) for _ in range(6)
    )


class qMRMLSegmentSelectorWidget(qt.QWidget):
    """Chooses a segmentation and one of its segments."""

    currentNodeChanged = qt.Signal(object)
    currentSegmentChanged = qt.Signal(str)

    def __init__(self, parent=None):
        super().__init__(parent)
        layout = qt.QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        self._selector, self._box = qMRMLNodeComboBox(), qt.QComboBox()
        self._selector.nodeTypes = ["vtkMRMLSegmentationNode"]
        self._selector.noneEnabled = True
        layout.addWidget(self._selector)
        layout.addWidget(self._box)
        self._segment, self._none, self._observed = "", False, None
        self._selector.currentNodeChanged.connect(self._node_changed)
        self._box.activated.connect(lambda index: self.setCurrentSegmentID(self._box.itemData(index)))

    def setMRMLScene(self, scene):
        self._selector.setMRMLScene(scene)

    def currentNode(self):
        return self._selector.currentNode()

    def currentNodeID(self):
        return self._selector.currentNodeID

    def currentSegmentID(self):
        return self._segment

    def setCurrentNode(self, node):
        self._selector.setCurrentNode(node)

    def setCurrentNodeID(self, node_id):
        self._selector.setCurrentNodeID(node_id)

    def setCurrentSegmentID(self, segment):
        segment = segment if self._box.findData(segment) >= 0 else ""
        self._box.currentIndex = self._box.findData(segment)
        if segment != self._segment:
            self._segment = segment
            self.currentSegmentChanged.emit(segment)

    def _node_changed(self, node):
        if self._observed:
            self._observed[0].RemoveObserver(self._observed[1])
        call = _observer(self, qMRMLSegmentSelectorWidget._refresh)
        self._observed = (node, node.AddObserver(vtk.vtkCommand.AnyEvent, call)) if node else None
        self._refresh()
        self.currentNodeChanged.emit(node)

    def _refresh(self):
        node = self.currentNode()
        segments = node.GetSegmentation().GetSegmentIDs() if node else []
        names = [(node.GetSegmentation().GetSegment(segment).GetName(), segment) for segment in segments]
        names = [("None", "")] * self._none + names
        if names != [(self._box.itemText(i), self._box.itemData(i)) for i in range(self._box.count)]:
            self._box.clear()
            for name, segment in names:
                self._box.addItem(name, segment)
            kept = self._segment if self._segment in segments or self._none else (segments or [""])[0]
            self.setCurrentSegmentID(kept)

    def _set_none(self, none):
        self._none = none
        self._refresh()

    def _set_visible(self, visible):
        self._selector.visible = visible

    noneEnabled = qt.Property(bool, lambda self: self._none, _set_none)
    segmentationNodeSelectorVisible = qt.Property(bool, lambda self: not self._selector.isHidden(), _set_visible)


class qMRMLSliderWidget(ctkSliderWidget):
    """A slider that could know the units of the scene."""

    def setMRMLScene(self, scene):
        pass


only_names = (missing("qMRMLSpinBox"), missing("qMRMLRangeWidget"))
widgets = (qMRMLWidget, qMRMLNodeComboBox, qMRMLSegmentSelectorWidget, qMRMLSliderWidget)
