"""A saliency map: what it says in a sentence, how it is shown, its hot spots, and beside another map."""

import math
from datetime import datetime
from html import escape
from pathlib import Path

import numpy as np
import qt
import slicer
import vtk
from slicer.i18n import tr as _

from MedXAISlicerLib import colours, deleting, display, layouts, results, saving
from MedXAISlicerLib.panels.panel import Panel

_STEPS = 65  # of the drawn colours


class ResultPanel(Panel):
    """Shows one map, and follows it: what is removed from the scene or shown otherwise is so here."""

    uiFile = "Result.ui"
    title = _("Result")
    followsParts = True

    def __init__(self, logic):
        super().__init__(logic)
        ui = self.ui
        ui.comparedSelector.addAttribute("vtkMRMLScalarVolumeNode", "MedXAI.Provenance")
        # Room for a long one from the start, so that nothing below it moves from map to map.
        ui.headlineLabel.minimumHeight = 2 * ui.headlineLabel.fontMetrics().lineSpacing()
        ui.spotsTable.horizontalHeader().setSectionResizeMode(qt.QHeaderView.ResizeToContents)
        ui.spotsTable.verticalHeader().visible = False
        ui.opacitySlider.connect("valueChanged(double)", self._onOpacity)
        ui.thresholdSlider.connect("valueChanged(double)", self._onThreshold)
        ui.legendCheckBox.connect("clicked(bool)", self._onLegend)
        ui.cloudCheckBox.connect("clicked(bool)", self._onCloud)
        ui.peakButton.connect("clicked(bool)", self._onPeak)
        ui.channelComboBox.connect("activated(int)", self._onChannel)
        ui.answerComboBox.connect("activated(int)", self._onAnswer)
        ui.comparedSelector.connect("currentNodeChanged(vtkMRMLNode*)", self._onCompared)
        ui.compareButton.connect("clicked(bool)", self._onCompare)
        ui.outlineCheckBox.connect("clicked(bool)", self._onOutline)
        ui.surfaceCheckBox.connect("clicked(bool)", self._onSurface)
        ui.spotsTable.connect("itemSelectionChanged()", self._onSpot)
        ui.saveButton.connect("clicked(bool)", self._onSave)
        ui.deleteButton.connect("clicked(bool)", self._onDelete)
        layoutNode = slicer.mrmlScene.GetFirstNodeByClass("vtkMRMLLayoutNode")
        if layoutNode is not None:
            self.addObserver(layoutNode, vtk.vtkCommand.ModifiedEvent, self._updateCompare)
        self.show(None)

    def show(self, node):
        if node is not self.node and self.node is not None and layouts.current() == "maps":
            layouts.leave()
        super().show(node)
        kind = results.kind(node) if node is not None else None
        self.ui.emptyLabel.text = {
            None: _("Choose an explanation above, or ask for one, to see where in the scan it lies."),
            "Caption": _("This explanation is in words: see the tab Words."),
            "ConceptScores": _("This explanation is by concepts: see the tab Words."),
            "SimilarCases": _("This explanation is by similar cases: see the tab Cases."),
            "Traversal": _("This explanation is by variants of the scan: see the tab Variants."),
            "RuleSet": _("This explanation is by rules: see the tab Words."),
        }.get(kind, "")
        isMap = kind == "SaliencyMap"
        self.ui.emptyLabel.visible = not isMap
        self.ui.resultWidget.visible = isMap
        if not isMap:
            self.node = None
            return
        self._fillHeadline()
        self._fillNotes()
        self._fillDisplay()
        self._fillChannels()
        self._fillAnswers()
        self._fillSpots()
        self._updateCompare()
        summary = results.part(node, "Summary")
        self.ui.summaryButton.visible = summary is not None
        self.ui.summaryText.plainText = summary.GetText() if summary is not None else ""

    # What the scene holds

    def _fillHeadline(self):
        made, sourceNode = results.provenance(self.node), results.part(self.node, "Source")
        said = (
            _("What speaks for <b>{target}</b> in {scan} (orange), and against it (blue)")
            if results.isSigned(self.node)
            else _("What speaks for <b>{target}</b> in {scan}: the brighter, the more")
        )
        scan = sourceNode.GetName() if sourceNode is not None else _("a scan that is not in the scene any more")
        self.ui.headlineLabel.text = said.format(target=escape(made["target_label"]), scan=escape(scan))
        created = datetime.fromisoformat(made["created"]).astimezone()
        network = made["model"].get("name") or _("network without a name")
        self.ui.headlineLabel.toolTip = ""
        if results.isPartial(self.node):
            self.ui.headlineLabel.text = _("<b>Partial:</b> {said}").format(said=self.ui.headlineLabel.text)
            self.ui.headlineLabel.toolTip = _("It was stopped early: what was not reached has no colour.")
        self.ui.detailsLabel.text = f"{results.methodTitle(self.node)} · {network} · {created:%H:%M}"
        self.ui.detailsLabel.toolTip = _("Computed on {date} in {seconds:.1f} s").format(
            date=f"{created:%Y-%m-%d %H:%M}", seconds=made["seconds"]
        )

    def _fillNotes(self):
        notes = [escape(note) for note in results.provenance(self.node).get("notes", [])]
        interval = results.part(self.node, "Interval")
        if interval is not None:
            from MedXAILib.report.interval import in_words

            channels = results.part(self.node, "Channels") or self.node
            notes.append(in_words(*(slicer.util.arrayFromVolume(node) for node in (channels, interval))))
        self.ui.notesLabel.text = "<br>".join(filter(None, notes))
        self.ui.notesLabel.visible = bool(self.ui.notesLabel.text)

    def _fillDisplay(self):
        self.ui.opacitySlider.value = display.currentOpacity()
        self.ui.thresholdSlider.value = display.threshold(self.node)
        self.ui.legendCheckBox.checked = display.hasLegend(self.node)
        self.ui.cloudCheckBox.checked = display.hasCloud(self.node)
        target, signed = self.node.GetAttribute("MedXAI.TargetLabel"), results.isSigned(self.node)
        self.ui.lowLabel.text = _("against {target}").format(target=target) if signed else _("less important")
        self.ui.highLabel.text = _("for {target}").format(target=target) if signed else _("more important")
        self._drawColours()

    def _drawColours(self):
        signed, faintest = results.isSigned(self.node), display.threshold(self.node)
        positions = np.linspace(-1 if signed else 0, 1, _STEPS)
        stops = ", ".join(
            f"stop:{i / (_STEPS - 1):.4f} rgba({red:.0f}, {green:.0f}, {blue:.0f}, {255 if shown else 0})"
            for i, ((red, green, blue), shown) in enumerate(
                zip(colours.interpolated(positions, signed) * 255, abs(positions) >= faintest, strict=True)
            )
        )
        self.ui.colourBar.styleSheet = f"background: qlineargradient(x1:0, y1:0, x2:1, y2:0, {stops})"

    def _fillChannels(self):
        box, count = self.ui.channelComboBox, display.countChannels(self.node)
        box.clear()
        box.addItem(_("All together"))
        for index in range(count):
            box.addItem(_("Channel {number}").format(number=index + 1))
        chosen = display.channel(self.node)
        box.currentIndex = 0 if chosen is None else chosen + 1
        box.visible = self.ui.channelLabel.visible = count > 0

    def _fillAnswers(self):
        box, found = self.ui.answerComboBox, _answers(self.node)
        box.clear()
        for target, node in found.items():
            box.addItem(target, node.GetID())
        box.currentIndex = list(found.values()).index(self.node)
        box.visible = self.ui.answerLabel.visible = len(found) > 1

    def _fillSpots(self):
        spots, statistics = (results.part(self.node, name) for name in ("HotSpots", "Statistics"))
        table = self.ui.spotsTable
        self.ui.spotsButton.visible = spots is not None and statistics is not None
        if spots is None or statistics is None:
            return
        displayNode = spots.GetDisplayNode()
        hasSurface = spots.GetSegmentation().ContainsRepresentation("Closed surface")
        self.ui.outlineCheckBox.checked = displayNode.GetVisibility2D()
        self.ui.surfaceCheckBox.checked = hasSurface and displayNode.GetVisibility3D()
        self.ui.surfaceCheckBox.enabled = hasSurface
        self.ui.surfaceCheckBox.toolTip = (
            _("Show the hot spots as surfaces in 3-D.")
            if hasSurface
            else _("These hot spots are large: Show 3D in the module Segmentations makes their surfaces.")
        )
        wasBlocked = table.blockSignals(True)
        table.rowCount, table.columnCount = statistics.GetNumberOfRows(), 4
        table.setHorizontalHeaderLabels([_("Hot spot"), _("mL"), _("Mean"), _("Maximum")])
        for row in range(table.rowCount):
            for column in range(table.columnCount):
                table.setItem(row, column, _cell(statistics.GetCellText(row, column), column))
        table.horizontalHeader().setSectionResizeMode(0, qt.QHeaderView.Stretch)
        table.clearSelection()
        table.blockSignals(wasBlocked)

    def _updateCompare(self, *_event):
        if self.node is None:
            return
        other, button = self.ui.comparedSelector.currentNode(), self.ui.compareButton
        source = results.part(self.node, "Source")
        canCompare = other not in (None, self.node) and source is not None and results.part(other, "Source") is source
        button.checked = layouts.current() == "maps"
        button.enabled = canCompare or button.checked
        button.toolTip = (
            _("Show both maps in linked views; once more for the views that were there before.")
            if canCompare
            else _("Choose another map of the same scan first.")
        )

    # What the person does

    def _onOpacity(self, value):
        display.setOpacity(value)

    def _onThreshold(self, value):
        if self.node is not None and not math.isclose(value, display.threshold(self.node), abs_tol=1e-6):
            display.setThreshold(self.node, value)
            self._drawColours()

    def _onLegend(self, checked):
        display.setLegend(self.node, checked)

    def _onCloud(self, checked):
        display.setCloud(self.node, checked)

    def _onPeak(self, _checked):
        display.jumpToPeak(self.node)

    def _onChannel(self, index):
        display.showChannel(self.node, index - 1 if index > 0 else None)

    def _onAnswer(self, index):
        node = slicer.mrmlScene.GetNodeByID(self.ui.answerComboBox.itemData(index))
        if self.parameterNode is not None:
            self.parameterNode.explanation = node
        # Whoever follows the parameter node has shown it already.
        if self.node is not node:
            display.show(node)
            self.show(node)

    def _onCompared(self, _node):
        self._updateCompare()
        if self.ui.compareButton.checked:
            self._onCompare(True)

    def _onCompare(self, checked):
        from MedXAILib.errors import MedXAIError

        try:
            other = self.ui.comparedSelector.currentNode()
            if checked and other not in (None, self.node):
                layouts.compareMaps(self.node, other)
            else:
                layouts.leave()
        except MedXAIError as error:
            slicer.util.errorDisplay(str(error), windowTitle=_("MedXAI"))
        self._updateCompare()

    def _onOutline(self, checked):
        results.part(self.node, "HotSpots").GetDisplayNode().SetVisibility2D(checked)

    def _onSurface(self, checked):
        results.part(self.node, "HotSpots").GetDisplayNode().SetVisibility3D(checked)

    def _onSpot(self):
        display.outline(self.node, self.ui.spotsTable.currentRow())
        display.jumpToPeak(self.node)

    def _onSave(self, _checked):
        from MedXAILib.errors import MedXAIError

        folder = qt.QFileDialog.getExistingDirectory(self.widget, _("Save into a new folder in"))
        if not folder:
            return
        try:
            saved = saving.save(self.node, Path(folder) / self.node.GetName())
        except MedXAIError as error:
            slicer.util.errorDisplay(str(error), windowTitle=_("MedXAI"))
            return
        slicer.util.infoDisplay(_("Saved as '{folder}'.").format(folder=saved), windowTitle=_("MedXAI"))

    def _onDelete(self, _checked):
        asked = _("Delete this explanation and what belongs to it? The scan stays.\n\n{title}")
        if slicer.util.confirmYesNoDisplay(asked.format(title=results.title(self.node)), windowTitle=_("MedXAI")):
            deleting.delete(self.node)


def _answers(node):
    """The maps that the same was asked for, by their answer: this one, and the latest for each of the others."""
    found = {
        other.GetAttribute("MedXAI.TargetLabel"): other
        for other in results.findExplanations()
        if results.kind(other) == "SaliencyMap" and _asked(other) == _asked(node)
    }
    return {**found, node.GetAttribute("MedXAI.TargetLabel"): node}


def _asked(node):
    """What was asked, but for the answer."""
    made = results.provenance(node)
    return results.part(node, "Source"), made["method"], made.get("region"), made["model"].get("fingerprint")


def _cell(text, column):
    """A cell of the statistics: the first is a name, the others are numbers."""
    if column == 0:
        return qt.QTableWidgetItem(text)
    item = qt.QTableWidgetItem(f"{float(text):.2f}" if column == 1 else f"{float(text):.3g}")
    item.setTextAlignment(qt.Qt.AlignRight | qt.Qt.AlignVCenter)
    return item
