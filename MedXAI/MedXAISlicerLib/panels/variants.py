"""Variants of the scan along a traversal: step by step, beside the scan, and among all cases."""

from html import escape

import qt
import slicer
import vtk
from slicer.i18n import tr as _

from MedXAISlicerLib import layouts, results, traversals
from MedXAISlicerLib.panels.cohort_map import CohortMap, colourOf
from MedXAISlicerLib.panels.panel import Panel


class VariantsPanel(Panel):
    """The steps of a traversal as a table, one of which is shown. Which one is a matter of Slicer's browser of series:
    whoever changes it there changes it here."""

    uiFile = "Variants.ui"
    title = _("Variants")
    followsParts = True

    def __init__(self, logic):
        super().__init__(logic)
        ui = self.ui
        self._said, self._browser = None, None
        self.cohortMap = CohortMap(self._onCase)
        ui.cohortButton.layout().insertWidget(0, self.cohortMap.view)
        ui.stepsTable.verticalHeader().visible = False
        ui.stepSliderWidget.connect("valueChanged(double)", self._onSlider)
        ui.stepsTable.connect("itemSelectionChanged()", self._onRow)
        ui.playButton.connect("clicked(bool)", self._onPlay)
        ui.showBesideButton.connect("clicked(bool)", self._onShowBeside)
        layoutNode = slicer.mrmlScene.GetFirstNodeByClass("vtkMRMLLayoutNode")
        if layoutNode is not None:
            self.addObserver(layoutNode, vtk.vtkCommand.ModifiedEvent, self._refreshButton)
        self.show(None)

    def show(self, node):
        if node is not self.node and self.node is not None and layouts.current() == "variants":
            layouts.leave()
        super().show(node)
        isTraversal = node is not None and results.kind(node) == "Traversal"
        self._follow(results.part(node, "Browser") if isTraversal else None)
        self.ui.emptyLabel.text = (
            _("Choose an explanation above to see how the scan would have to look for another answer.")
            if node is None
            else _("The series of this explanation is not in the scene any more.")
            if isTraversal
            else _("This explanation has no variants of the scan.")
        )
        self.ui.emptyLabel.visible = self._browser is None
        self.ui.variantsWidget.visible = self._browser is not None
        if self._browser is None:
            return
        self._said = said = traversals.read(node)
        self.ui.textLabel.text = said["text"] or _("Along: {along}").format(along=said["along"])
        self._fillTable(traversals.columns(said))
        slider = self.ui.stepSliderWidget
        wasBlocked = slider.blockSignals(True)
        slider.minimum, slider.maximum = 1, max(len(said["steps"]), 2)
        slider.blockSignals(wasBlocked)
        self.ui.cohortButton.visible = bool(said["cohort"]) and said["path"] is not None
        if not self.ui.cohortButton.isHidden():
            self.cohortMap.show(said)
            self.ui.legendLabel.text = _legend(said["cohort"])
            self._onCase(None)
        self._showStep()
        self._refreshButton()

    def _follow(self, browserNode):
        """Follow a browser of series, and none before it."""
        if self._browser is not None:
            self.removeObserver(self._browser, vtk.vtkCommand.ModifiedEvent, self._showStep)
        self._browser = browserNode
        if browserNode is not None:
            self.addObserver(browserNode, vtk.vtkCommand.ModifiedEvent, self._showStep)

    def _fillTable(self, columns):
        table = self.ui.stepsTable
        wasBlocked = table.blockSignals(True)
        table.rowCount, table.columnCount = len(self._said["steps"]), len(columns)
        table.setHorizontalHeaderLabels(list(columns))
        for column, texts in enumerate(columns.values()):
            for row, text in enumerate(texts):
                item = qt.QTableWidgetItem(text)
                font = item.font()
                font.setBold(row == self._said["flipped"])
                font.setItalic(self._said["steps"][row]["strange"])
                item.setFont(font)
                table.setItem(row, column, item)
        table.resizeColumnsToContents()
        table.resizeRowsToContents()
        # All rows are seen: the way is read at a glance.
        height = table.horizontalHeader().height + sum(table.rowHeight(row) for row in range(table.rowCount))
        table.setFixedHeight(min(height + 2 * table.frameWidth + 14, 420))
        table.blockSignals(wasBlocked)

    def _showStep(self, *_event):
        """Show what is said of the step that the series is at."""
        index = traversals.step(self.node)
        for widget, change in (
            (self.ui.stepSliderWidget, lambda slider: setattr(slider, "value", index + 1)),
            (self.ui.stepsTable, lambda table: table.selectRow(index)),
        ):
            wasBlocked = widget.blockSignals(True)
            change(widget)
            widget.blockSignals(wasBlocked)
        self.ui.playButton.checked = self._browser.GetPlaybackActive()
        self.ui.playButton.text = _("Stop") if self.ui.playButton.checked else _("Play")
        self.ui.strangeLabel.visible = self._said["steps"][index]["strange"]
        if not self.ui.cohortButton.isHidden():
            self.cohortMap.setStep(index)

    def _refreshButton(self, *_event):
        button = self.ui.showBesideButton
        button.checked = layouts.current() == "variants"
        button.text = _("Leave the comparison") if button.checked else _("Show beside the scan")

    def _onSlider(self, value):
        traversals.setStep(self.node, round(value) - 1)

    def _onRow(self):
        traversals.setStep(self.node, self.ui.stepsTable.currentRow())

    def _onPlay(self, checked):
        self._browser.SetPlaybackActive(checked)

    def _onShowBeside(self, checked):
        from MedXAILib.errors import MedXAIError

        try:
            if checked:
                layouts.showVariants(self.node)
            else:
                layouts.leave()
        except MedXAIError as error:
            slicer.util.errorDisplay(str(error), windowTitle=_("MedXAI"))
        self._refreshButton()

    def _onCase(self, case):
        self.ui.caseLabel.text = (
            _("Click a dot to see which case it is. The line is the way of the variants, the ring on it the scan.")
            if case is None
            else _("Case {uid}: {label}").format(uid=case["uid"], label=case["label"])
        )


def _legend(cohort):
    """Which colour is which label."""
    dots = (f'<span style="color: {colour}">●</span> {escape(label)}' for label, colour in colourOf(cohort).items())
    return "&nbsp;&nbsp; ".join(dots)
