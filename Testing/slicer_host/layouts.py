"""Stand-in for the layout manager: the real layout logic, and pictures of what it lays out."""

import xml.etree.ElementTree as ET

import numpy as np
import slicer
import vtk

from .pythonqt import qt
from .views import OtherWidget, SliceWidget, SpaceWidget

_BAR = 20


class qSlicerSingletonViewFactory(qt.QObject):
    """Gives a widget of a module its place in a layout."""

    def setWidget(self, widget):
        self._widget = widget

    def widget(self):
        return self._widget

    def setTagName(self, name):
        self._name = name

    def tagName(self):
        return self._name


class LayoutManager(qt.QObject):
    """The views of the current layout."""

    layoutChanged = qt.Signal(int)

    def __init__(self, app_logic):
        super().__init__()
        self._app_logic, self._factories, self._views = app_logic, {}, {}
        self._logic = slicer.vtkMRMLLayoutLogic()
        self._logic.SetMRMLApplicationLogic(app_logic)
        self._logic.SetMRMLScene(slicer.mrmlScene)
        node = self._logic.GetLayoutNode()
        node.SetViewArrangement(node.SlicerLayoutFourUpView)
        self._arrangement = None
        self._tag = node.AddObserver(vtk.vtkCommand.ModifiedEvent, lambda *_: self._changed())
        self._changed()

    def _changed(self):
        found = self._logic.GetViewNodes()
        for node in (found.GetItemAsObject(index) for index in range(found.GetNumberOfItems())):
            known = self._views.get(node.GetID())
            if known is None or known._node is not node:
                kinds = {"vtkMRMLSliceNode": SliceWidget, "vtkMRMLViewNode": SpaceWidget}
                self._views[node.GetID()] = kinds.get(node.GetClassName(), OtherWidget)(self._app_logic, node)
        if self.layout != self._arrangement:
            self._arrangement = self.layout
            self.layoutChanged.emit(self.layout)

    def layoutLogic(self):
        return self._logic

    def setLayout(self, arrangement):
        self._logic.GetLayoutNode().SetViewArrangement(arrangement)

    layout = qt.Property(int, lambda self: self._logic.GetLayoutNode().GetViewArrangement(), setLayout)

    def registerViewFactory(self, factory):
        self._factories[factory.tagName()] = factory

    def _current(self, kind):
        found = self._logic.GetViewNodes()
        nodes = [found.GetItemAsObject(index) for index in range(found.GetNumberOfItems())]
        return [node for node in nodes if node.IsA(kind)]

    def sliceViewNames(self):
        return tuple(node.GetLayoutName() for node in self._current("vtkMRMLSliceNode"))

    def mrmlSliceLogics(self):
        return self._app_logic.GetSliceLogics()

    def sliceWidget(self, name):
        named = [view for view in self._views.values() if isinstance(view, SliceWidget)]
        return next((view for view in named if view.mrmlSliceNode().GetLayoutName() == name), None)

    @property
    def threeDViewCount(self):
        return len(self._current("vtkMRMLViewNode"))

    def threeDWidget(self, index):
        return self._views[self._current("vtkMRMLViewNode")[index].GetID()]

    def resetSliceViews(self):
        for name in self.sliceViewNames():
            self.sliceWidget(name).fitSliceToBackground()

    def resetThreeDViews(self):
        pass

    def draw(self, painter, rect):
        """Paint the views of the layout."""
        description = self._logic.GetLayoutNode().GetCurrentLayoutDescription()
        self._draw(painter, ET.fromstring(description), rect)

    def _draw(self, painter, element, rect):
        if element.tag == "view":
            self._draw_view(
                painter, slicer.mrmlScene.GetSingletonNode(element.get("singletontag"), element.get("class")), rect
            )
        elif element.tag != "layout":
            widget = self._factories[element.tag].widget()
            widget.resize(rect.size())
            painter.drawPixmap(rect.topLeft(), widget.grab())
        else:
            items = element.findall("item")
            for item, part in zip(items, _parts(element.get("type", "horizontal"), items, rect), strict=False):
                self._draw(painter, item[0], part)

    def _draw_view(self, painter, node, rect):
        bar = qt.QRect(rect.left(), rect.top(), rect.width(), _BAR)
        painter.fillRect(bar, qt.QColor.fromRgbF(*node.GetLayoutColor()))
        painter.drawText(bar.adjusted(6, 0, 0, 0), qt.Qt.AlignVCenter, node.GetLayoutLabel() or "")
        pixels = self._views[node.GetID()].draw(rect.width(), rect.height() - _BAR)
        height, width, _ = pixels.shape
        image = qt.QImage(np.ascontiguousarray(pixels).tobytes(), width, height, 3 * width, qt.QImage.Format_RGB888)
        painter.drawImage(rect.left(), rect.top() + _BAR, image)

    def close(self):
        self._logic.GetLayoutNode().RemoveObserver(self._tag)
        for view in self._views.values():
            view.close()
        self._logic.SetMRMLScene(None)


def _parts(kind, items, rect, gap=2):
    """Where the items of a layout are."""
    if kind == "tab":
        return [rect]
    if kind == "grid":
        places = [(int(item.get("row", 0)), int(item.get("column", 0))) for item in items]
    else:
        places = [(0, index) if kind == "horizontal" else (index, 0) for index in range(len(items))]
    rows, columns = (max(place) + 1 for place in zip(*places, strict=True))
    width, height = (rect.width() + gap) // columns, (rect.height() + gap) // rows
    corners = [(rect.left() + column * width, rect.top() + row * height) for row, column in places]
    return [qt.QRect(left, top, width - gap, height - gap) for left, top in corners]
