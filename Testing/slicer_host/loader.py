"""Loads the .ui files that Qt Designer makes for Slicer."""

import xml.etree.ElementTree as ET

from . import ctk_widgets, mrml_widgets
from .ctk_widgets import ctk
from .pythonqt import QtCore, QtUiTools, QtWidgets, qt


class QUiLoader(QtUiTools.QUiLoader):
    """Knows Slicer's widgets, and makes the connections by which they get the scene."""

    def __init__(self, parent=None):
        super().__init__(parent)
        for kind in (*ctk_widgets.widgets, *mrml_widgets.widgets):
            self.registerCustomWidget(kind)

    def load(self, file, parent=None):
        tree = ET.fromstring(file.readAll().data())
        connections = tree.find("connections")
        scenes = []
        for connection in list(connections if connections is not None else ()):
            if "vtkMRMLScene*" in connection.findtext("signal"):
                connections.remove(connection)
                scenes.append((connection.findtext("sender"), connection.findtext("receiver")))
        for value in tree.iter("set"):
            # Qt reads the flags of its own classes only.
            if value.text.startswith("ctk"):
                flags = [flag.strip().split("::") for flag in value.text.split("|")]
                value.tag, value.text = "number", str(sum(getattr(getattr(ctk, kind), flag) for kind, flag in flags))
        known = {kind.__name__ for kind in (*ctk_widgets.widgets, *mrml_widgets.widgets)}
        unknown = {kind.text for kind in tree.iterfind("customwidgets/customwidget/class")} - known
        if unknown:
            raise NotImplementedError(f"No stand-in for {', '.join(sorted(unknown))}")
        device = QtCore.QBuffer()
        device.setData(ET.tostring(tree))
        device.open(QtCore.QIODevice.ReadOnly)
        widget = super().load(device, parent)
        named = {child.objectName: child for child in (widget, *widget.findChildren(QtWidgets.QWidget))}
        for sender, receiver in scenes:
            named[sender].mrmlSceneChanged.connect(named[receiver].setMRMLScene)
        return widget


qt.QUiLoader = QUiLoader
