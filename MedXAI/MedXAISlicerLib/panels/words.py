"""What an explanation says in words: a caption or concepts that lead into the scan, rules, or the summary of a map."""

from html import escape

import qt
import slicer
from slicer.i18n import tr as _

from MedXAISlicerLib import display, results
from MedXAISlicerLib.panels.caption_text import CaptionText
from MedXAISlicerLib.panels.concept_table import ConceptTable
from MedXAISlicerLib.panels.panel import Panel
from MedXAISlicerLib.panels.rule_text import RuleText
from MedXAISlicerLib.panels.what_if import WhatIf

# How high a text is, pixels; what is longer is scrolled.
_LEAST, _MOST = 80, 420


class WordsPanel(Panel):
    """The words of an explanation. Those that have a map or a place are links to it."""

    uiFile = "Words.ui"
    title = _("Words")
    followsParts = True

    def __init__(self, logic):
        super().__init__(logic)
        self._said = None
        self.whatIf = WhatIf(self.ui)
        self.ui.textBrowser.connect("anchorClicked(QUrl)", self._onLink)
        self.ui.textBrowser.document.documentLayout().connect("documentSizeChanged(QSizeF)", self._onSize)
        self.ui.hideMapButton.connect("clicked(bool)", self._onHideMap)
        self.ui.copyButton.connect("clicked(bool)", self._onCopy)
        self.show(None)

    def show(self, node):
        isOther = node is not self.node
        super().show(node)
        self._said = said = _said(node)
        self.ui.emptyLabel.text = (
            _("Choose an explanation above to read what it says.")
            if node is None
            else _("The summary of this explanation is not in the scene any more.")
        )
        self.ui.emptyLabel.visible = said is None
        self.ui.wordsWidget.visible = said is not None
        if isOther:
            # What was set stays when something that belongs to it goes.
            self.whatIf.show(node if isinstance(said, ConceptTable) else None)
        if said is None:
            return
        self.ui.legendLabel.text, self.ui.legendLabel.toolTip = said.legend, said.help
        self.ui.legendLabel.visible = bool(said.legend)
        self.ui.hideMapButton.visible = any(one["map"] is not None for one in said.leading)
        self.ui.warningLabel.text = said.warning
        self.ui.warningLabel.visible = bool(said.warning)
        self._highlight(self._shown())

    def _highlight(self, active):
        """Write the text, with one of the words (an index, or None) marked as the one that is shown."""
        self.ui.hideMapButton.enabled = active is not None
        palette = self.ui.textBrowser.palette
        background, colour = palette.color(qt.QPalette.Highlight), palette.color(qt.QPalette.HighlightedText)
        marked = f"background-color: {background.name()}; color: {colour.name()};"
        scrollBar = self.ui.textBrowser.verticalScrollBar()
        scrolled = scrollBar.value
        self.ui.textBrowser.html = self._said.html(active, marked)
        scrollBar.value = scrolled

    def _shown(self):
        """The index of the word whose map lies over the scan, or None."""
        composites = slicer.util.getNodesByClass("vtkMRMLSliceCompositeNode")
        shown = {composite.GetForegroundVolumeID() for composite in composites}
        of = (index for index, one in enumerate(self._said.leading) if one["map"] and one["map"].GetID() in shown)
        return next(of, None)

    def _onLink(self, url):
        index = int(url.toString().rpartition(":")[2])
        self._said.follow(index)
        self._highlight(index)

    def _onSize(self, size):
        wanted = size.height() + 2 * self.ui.textBrowser.frameWidth
        self.ui.textBrowser.setFixedHeight(int(min(max(wanted, _LEAST), _MOST)))

    def _onHideMap(self, _checked):
        for mapNode in results.maps(self.node):
            display.setVisible(mapNode, False)
        slicer.util.setSliceViewerLayers(foreground=None)
        self._highlight(None)

    def _onCopy(self, _checked):
        qt.QApplication.clipboard().setText(self._said.text)


class _Summary:
    """What is said of an explanation that says nothing itself."""

    legend = help = warning = ""
    leading = ()

    def __init__(self, textNode):
        self.text = textNode.GetText()

    def html(self, _active, _marked):
        return f'<p style="white-space: pre-wrap; line-height: 130%">{escape(self.text)}</p>'


def _said(node):
    """What there is to read of an explanation; None when there is nothing."""
    kinds = {"Caption": CaptionText, "ConceptScores": ConceptTable, "RuleSet": RuleText}
    if node is not None and results.kind(node) in kinds:
        return kinds[results.kind(node)](node)
    summary = None if node is None else results.part(node, "Summary")
    return None if summary is None else _Summary(summary)
