"""The stand-in for Slicer's application does what Slicer does, and is gone afterwards."""

from __future__ import annotations

import sys
import time

import numpy as np
import pytest

slicer_host = pytest.importorskip("slicer_host")
slicer = pytest.importorskip("slicer")

from slicer_scene import needs_graphics  # noqa: E402

_MODULE = """
from typing import Annotated, Union

import slicer
from slicer.i18n import tr as _
from slicer.parameterNodeWrapper import Choice, WithinRange, parameterNodeWrapper
from slicer.ScriptedLoadableModule import *

@parameterNodeWrapper
class TinyParameterNode:
    scan: slicer.vtkMRMLScalarVolumeNode
    more: list[slicer.vtkMRMLScalarVolumeNode]
    result: Union[slicer.vtkMRMLScalarVolumeNode, slicer.vtkMRMLTextNode, None]
    name: str = "first"
    kind: Annotated[str, Choice(["near", "far"])] = "far"
    loud: bool
    opacity: Annotated[float, WithinRange(0, 1)] = 0.25

class Tiny(ScriptedLoadableModule):
    def __init__(self, parent):
        ScriptedLoadableModule.__init__(self, parent)
        parent.title = _("Tiny")

class TinyWidget(ScriptedLoadableModuleWidget):
    def setup(self):
        ScriptedLoadableModuleWidget.setup(self)
        self.events = ["setup"]
        widget = slicer.util.loadUI(self.resourcePath("UI/Tiny.ui"))
        widget.setMRMLScene(slicer.mrmlScene)
        self.layout.addWidget(widget)
        self.ui = slicer.util.childWidgetVariables(widget)
        self.ui.applyButton.connect("clicked(bool)", self.onApply)
        self.logic = TinyLogic()
        self.pn = self.logic.getParameterNode()
        self.tag = self.pn.connectGui(widget)

    def onApply(self, checked):
        with slicer.util.tryWithErrorDisplay(_("It failed")):
            if slicer.util.confirmOkCancelDisplay(_("Do it?")):
                raise ValueError("no scan")

    def enter(self):
        self.events.append("enter")

    def exit(self):
        self.events.append("exit")

    def cleanup(self):
        self.events.append("cleanup")
        self.pn.disconnectGui(self.tag)

class TinyLogic(ScriptedLoadableModuleLogic):
    def getParameterNode(self):
        return TinyParameterNode(ScriptedLoadableModuleLogic.getParameterNode(self))

class TinyTest(ScriptedLoadableModuleTest):
    def runTest(self):
        type(self).ran = True
"""


_VOLUMES = "<property name='nodeTypes'><stringlist><string>vtkMRMLVolumeNode</string></stringlist></property>"
_NONE = "<property name='noneEnabled'><bool>true</bool></property>"
_WIDGETS = {
    "scanSelector": (
        "qMRMLNodeComboBox",
        _VOLUMES + "<property name='noneEnabled'><bool>true</bool></property>",
        "scan",
    ),
    "lostSelector": ("qMRMLNodeComboBox", _VOLUMES, ""),
    "nameEdit": ("QLineEdit", "", "name"),
    "kindSelector": ("QComboBox", "", "kind"),
    "loudCheckBox": ("QCheckBox", "", "loud"),
    "opacitySlider": ("ctkSliderWidget", "", "opacity"),
}
_INSIDE = "".join(
    f"<item><widget class='{kind}' name='{name}'>{properties}"
    f"<property name='SlicerParameterName' stdset='0'><string>{parameter}</string></property></widget></item>"
    for name, (kind, properties, parameter) in _WIDGETS.items()
)
_CUSTOM = "".join(
    f"<customwidget><class>{kind}</class><extends>QWidget</extends><header/><container>1</container></customwidget>"
    for kind in ("qMRMLWidget", "ctkCollapsibleButton", "qMRMLNodeComboBox", "ctkSliderWidget")
)
_UI = f"""<ui version="4.0"><class>Tiny</class><widget class="qMRMLWidget" name="Tiny"><layout class="QVBoxLayout">
<item><widget class="ctkCollapsibleButton" name="partButton"><layout class="QVBoxLayout">{_INSIDE}</layout></widget>
</item><item><widget class="QPushButton" name="applyButton"/></item></layout></widget>
<customwidgets>{_CUSTOM}</customwidgets>
<connections><connection><sender>Tiny</sender><signal>mrmlSceneChanged(vtkMRMLScene*)</signal>
<receiver>scanSelector</receiver><slot>setMRMLScene(vtkMRMLScene*)</slot></connection></connections></ui>"""


@pytest.fixture
def host(tmp_path):
    (tmp_path / "Resources" / "UI").mkdir(parents=True)
    (tmp_path / "Tiny.py").write_text(_MODULE, encoding="utf-8")
    (tmp_path / "Resources" / "UI" / "Tiny.ui").write_text(_UI, encoding="utf-8")
    with slicer_host.running(tmp_path) as running:
        yield running


@pytest.fixture
def tiny(host, tmp_path):
    return host.open("Tiny", tmp_path)


def _scan(name="Scan", value=1.0):
    node = slicer.util.addVolumeFromArray(np.full((20, 20, 20), value, np.float32), np.eye(4), name)
    node.CreateDefaultDisplayNodes()
    return node


def test_a_module_lives_as_in_slicer(host, tiny, tmp_path):
    assert slicer.modules.TinyWidget is tiny
    assert slicer.util.modulePath("Tiny") == str(tmp_path / "Tiny.py")
    assert slicer.modules.tiny.title == "Tiny"
    assert tiny.logic.getParameterNode().parameterNode is tiny.pn.parameterNode
    slicer.selfTests["Tiny"]()
    assert sys.modules["Tiny"].TinyTest.ran
    slicer.util.selectModule("Data")
    slicer.util.selectModule("Tiny")
    quitting = []
    slicer.app.connect("aboutToQuit()", lambda: quitting.append(list(tiny.events)))
    host.close()
    assert quitting == [["setup", "enter", "exit", "enter"]]
    assert tiny.events == ["setup", "enter", "exit", "enter", "exit", "cleanup"]


def test_widgets_and_parameters_follow_one_another(tiny):
    scan, other, ui, pn = _scan(), _scan("Other"), tiny.ui, tiny.pn
    assert (ui.nameEdit.text, ui.kindSelector.currentText, ui.loudCheckBox.checked) == ("first", "far", False)
    assert (ui.opacitySlider.value, ui.opacitySlider.maximum) == (0.25, 1)
    pn.scan, pn.name, pn.kind, pn.loud, pn.opacity = scan, "second", "near", True, 0.5
    assert ui.scanSelector.currentNode() is scan
    assert (ui.nameEdit.text, ui.kindSelector.currentIndex, ui.loudCheckBox.checked) == ("second", 0, True)
    assert ui.opacitySlider.value == 0.5
    ui.scanSelector.setCurrentNode(other)
    ui.nameEdit.text, ui.kindSelector.currentIndex, ui.opacitySlider.value = "third", 1, 0.75
    ui.loudCheckBox.click()
    assert (pn.scan, pn.name, pn.kind, pn.loud, pn.opacity) == (other, "third", "far", False, 0.75)
    pn.disconnectGui(tiny.tag)
    ui.nameEdit.text = "fourth"
    pn.kind = "near"
    assert (pn.name, ui.kindSelector.currentText) == ("third", "far")


def test_parameters_are_in_the_node_as_slicer_keeps_them(tiny):
    scan, other, pn = _scan(), _scan("Other"), tiny.pn
    node = pn.parameterNode
    pn.scan, pn.more, pn.result, pn.loud = scan, [scan, other], other, True
    assert (node.GetNodeReference("scan"), node.GetParameter("more.len")) == (scan, "2")
    assert (node.GetNodeReference("more.1"), node.GetNodeReference("result.0")) == (other, other)
    assert (node.GetParameter("loud"), node.GetParameter("opacity")) == ("True", "0.25")
    pn.result = None
    assert pn.result is None
    assert node.GetNodeReference("result.0") is None
    pn.more.pop()
    assert list(tiny.logic.getParameterNode().more) == [scan]
    for name, wrong in (
        ("opacity", 1.5),
        ("kind", "beside"),
        ("name", 3),
        ("result", pn.parameterNode),
        ("loud", None),
    ):
        with pytest.raises((TypeError, ValueError)):
            setattr(pn, name, wrong)


def test_what_slicer_cannot_tie_to_a_widget_is_refused(tiny):
    import ctk
    import qt

    for name, widget in (("name", ctk.ctkPathLineEdit()), ("name", qt.QComboBox()), ("more", tiny.ui.scanSelector)):
        with pytest.raises((RuntimeError, TypeError)):
            tiny.pn.connectParametersToGui({name: widget})


def test_a_node_selector_follows_the_scene(tiny):
    selector, changes = tiny.ui.scanSelector, []
    selector.connect("currentNodeChanged(vtkMRMLNode*)", changes.append)
    scan, hidden = _scan(), _scan("Hidden")
    hidden.SetHideFromEditors(True)
    hidden.Modified()
    assert selector.nodeCount() == 1
    assert selector.currentNode() is None
    selector.setCurrentNode(scan)
    selector.setCurrentNode(hidden)
    assert selector.currentNode() is None
    selector.currentNodeID = scan.GetID()
    scan.SetName("Renamed")
    assert selector.currentNode() is scan
    slicer.mrmlScene.RemoveNode(scan)
    assert changes == [scan, None, scan, None]
    selector.addAttribute("vtkMRMLScalarVolumeNode", "Kind", "map")
    plain = _scan("Plain")
    assert selector.nodeCount() == 0
    plain.SetAttribute("Kind", "map")
    assert selector.nodeFromIndex(0) is plain
    assert tiny.ui.lostSelector.nodeCount() == 0, "the .ui file gives it no scene"
    slicer.mrmlScene.Clear(0)
    assert selector.nodeCount() == 0


def test_a_segment_selector_follows_the_segmentation(host):
    selector, chosen = slicer.qMRMLSegmentSelectorWidget(), []
    selector.connect("currentSegmentChanged(QString)", chosen.append)
    selector.setMRMLScene(slicer.mrmlScene)
    node = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLSegmentationNode")
    node.GetSegmentation().AddEmptySegment("one")
    selector.setCurrentNode(node)
    node.GetSegmentation().AddEmptySegment("two")
    selector.setCurrentSegmentID("two")
    node.GetSegmentation().RemoveSegment("two")
    assert chosen == ["one", "two", "one"]


def test_dialogs_are_answered_and_written_down(host, tiny):
    import qt

    host.reply = False
    tiny.ui.applyButton.click()
    host.reply = True
    tiny.ui.applyButton.click()
    with pytest.raises(ValueError, match="no scan"):
        host.process()
    assert host.dialogs == [("confirm", "Do it?")] * 2 + [("error", "It failed\n\nno scan")]
    assert qt.QMessageBox.question(None, "Title", "Sure?") == qt.QMessageBox.Yes
    host.files += ["/a/b.nrrd", "/a"]
    assert qt.QFileDialog.getOpenFileName(None, "Open") == "/a/b.nrrd"
    assert qt.QFileDialog.getExistingDirectory() == "/a"
    assert qt.QFileDialog.getExistingDirectory() == ""
    slicer.util.delayDisplay("Wait", 5000)
    assert host.dialogs[-2:] == [("confirm", "Sure?"), ("info", "Wait")]


def test_qt_speaks_as_pythonqt_does(host):
    import qt

    button, heard = qt.QPushButton("A"), []
    button.name = "applyButton"
    assert (button.text, button.objectName, button.className()) == ("A", "applyButton", "QPushButton")
    button.setText("B")
    button.setEnabled(False)
    assert (button.text, button.isEnabled(), button.visible) == ("B", False, False)
    button.enabled = True
    slot = heard.append
    button.connect("clicked(bool)", slot)
    button.connect("clicked()", lambda: heard.append("plain"))
    button.click()
    assert button.disconnect("clicked(bool)", slot)
    button.click()
    assert heard == [False, "plain", "plain"]
    with pytest.raises(ValueError, match="clicked"):
        button.connect("clicked(int)", slot)
    with pytest.raises(TypeError):
        button.text()
    qt.QSettings().setValue("Tiny/count", 3)
    assert slicer.util.settingsValue("Tiny/count", 0, converter=int) == 3
    button.txet = "C"
    assert list(slicer_host.pythonqt.strays(button)) == ["QPushButton applyButton has no property txet"]
    del button.txet


def test_properties_are_written_whatever_was_looked_at_before(host, tmp_path):
    import qt
    from PySide6.QtTest import QTest

    label, edit = qt.QLabel("A"), qt.QLineEdit()
    host.picture(label, tmp_path / "label.png")
    host.process()
    label.text = "B"
    QTest.keyClicks(edit, "abc")
    edit.enabled = label.visible = False
    assert label.isVisible() is False
    label.setText(edit.text)
    edit.text = "d"
    assert (label.text, edit.displayText, edit.isEnabled()) == ("abc", "d", False)


def test_a_collapsed_part_hides_what_is_in_it_until_it_is_opened(host, tiny):
    part, ui = tiny.ui.partButton, tiny.ui
    host.picture(tiny.parent, host.folder / "open.png")
    ui.loudCheckBox.visible = False
    part.collapsed = True
    assert not ui.nameEdit.visible
    part.collapsed = False
    assert ui.nameEdit.visible
    assert not ui.loudCheckBox.visible


def test_errors_of_slots_fail_the_test(host):
    import qt

    timer = qt.QTimer()
    timer.connect("timeout()", lambda: 1 / 0)
    timer.start(1)
    with pytest.raises(ZeroDivisionError):
        host.until(lambda: False, seconds=30)
    timer.stop()


def test_waiting_serves_events_and_notes_the_longest_time_that_none_was(host):
    import qt

    timer, fired = qt.QTimer(), []
    timer.timeout.connect(lambda: fired.append(time.sleep(0.05)))
    timer.start(1)
    host.until(lambda: len(fired) > 2)
    timer.stop()
    assert host.longest_block >= 50
    with pytest.raises(AssertionError, match="Not within"):
        host.until(lambda: False, seconds=0.05)


def test_pictures_show_text(host, tiny, tmp_path):
    import qt

    def pixels(text):
        tiny.ui.applyButton.text = text
        image = qt.QImage(str(host.picture(tiny.parent, tmp_path / "panel.png")))
        image = image.convertToFormat(qt.QImage.Format_Grayscale8)
        return np.frombuffer(image.constBits(), np.uint8).reshape(image.height(), -1)[:, : image.width()].copy()

    first, second = pixels("mmmm"), pixels("iiii")
    assert first.shape[1] == 460
    rows, columns = np.nonzero(first != second)
    assert len(rows) > 20
    assert np.ptp(rows) < 20 < np.ptp(columns), "the letters, and nothing else, are different"
    assert first[rows, columns].min() < 60


def test_layouts_have_slicers_views(host):
    manager, changed = slicer.app.layoutManager(), []
    assert set(manager.sliceViewNames()) == {"Red", "Green", "Yellow"}
    manager.layoutChanged.connect(changed.append)
    node = manager.layoutLogic().GetLayoutNode()
    manager.setLayout(node.SlicerLayoutOneUpRedSliceView)
    assert (manager.sliceViewNames(), changed) == (("Red",), [node.SlicerLayoutOneUpRedSliceView])
    scan = _scan()
    slicer.util.setSliceViewerLayers(background=scan)
    assert manager.sliceWidget("Red").mrmlSliceCompositeNode().GetBackgroundVolumeID() == scan.GetID()
    assert manager.sliceWidget("Red").sliceLogic().GetSliceNode().GetOrientation() == "Axial"


@needs_graphics
def test_the_window_shows_panel_views_and_widgets_of_the_module(host, tmp_path):
    import qt

    manager = slicer.app.layoutManager()
    label = qt.QLabel()
    label.autoFillBackground = True
    colours = qt.QPalette()
    colours.setColor(qt.QPalette.Window, qt.QColor(0, 0, 255))
    label.palette = colours
    factory = slicer.qSlicerSingletonViewFactory()
    factory.setWidget(label)
    factory.setTagName("ours")
    manager.registerViewFactory(factory)
    node = manager.layoutLogic().GetLayoutNode()
    view = '<view class="vtkMRMLSliceNode" singletontag="Mine"><property name="orientation" action="default">Axial'
    view += '</property><property name="viewcolor" action="default">#00FF00</property></view>'
    node.AddLayoutDescription(900, f'<layout type="horizontal"><item>{view}</item><item><ours/></item></layout>')
    manager.setLayout(900)
    scan = _scan()
    scan.GetDisplayNode().AutoWindowLevelOff()
    scan.GetDisplayNode().SetWindowLevelMinMax(0, 1)
    slicer.util.setSliceViewerLayers(background=scan, fit=True)
    image = qt.QImage(str(host.window(tmp_path / "window.png", size=(602, 220))))
    seen = [image.pixelColor(x, y).getRgb()[:3] for x, y in ((290, 5), (150, 120), (5, 120), (450, 100))]
    assert seen == [(0, 255, 0), (255, 255, 255), (0, 0, 0), (0, 0, 255)]


def test_nothing_is_left_behind(tmp_path):
    before = set(vars(slicer)), slicer.util.delayDisplay, sys.excepthook
    with slicer_host.running(tmp_path):
        import qt

        assert qt.QLabel("text").text == "text"
    assert not {"qt", "ctk", "slicer.i18n", "slicer.parameterNodeWrapper"} & set(sys.modules)
    assert (set(vars(slicer)), slicer.util.delayDisplay, sys.excepthook) == before
    with slicer_host.running(tmp_path):
        import qt

        assert qt.QLabel("text").text == "text"
