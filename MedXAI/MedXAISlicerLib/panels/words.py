"""What an explanation says in words: a caption whose words lead into the scan, or the summary of a map."""

from html import escape

import qt
import slicer
from slicer.i18n import tr as _

from MedXAISlicerLib import captions, display, results
from MedXAISlicerLib.panels.panel import Panel

UNSURE = 0.5
"""Words of less confidence are marked."""

# Read as well on white as on black.
_GREY = "#767676"


class WordsPanel(Panel):
    """The words of an explanation. Those that have a map or a place are links to it."""

    uiFile = "Words.ui"
    title = _("Words")
    followsParts = True

    def __init__(self, logic):
        super().__init__(logic)
        self.ui.textBrowser.connect("anchorClicked(QUrl)", self._onWord)
        self.ui.hideMapButton.connect("clicked(bool)", self._onHideMap)
        self.ui.copyButton.connect("clicked(bool)", self._onCopy)
        self.show(None)

    def show(self, node):
        super().show(node)
        isCaption = node is not None and results.kind(node) == "Caption"
        textNode = node if isCaption or node is None else results.part(node, "Summary")
        self.ui.emptyLabel.text = (
            _("Choose an explanation above to read what it says.")
            if node is None
            else _("The summary of this explanation is not in the scene any more.")
        )
        self.ui.emptyLabel.visible = textNode is None
        self.ui.wordsWidget.visible = textNode is not None
        self._text = textNode.GetText() if textNode is not None else ""
        self._words = captions.words(node) if isCaption else []
        self.ui.legendLabel.text = self._legend()
        self.ui.legendLabel.visible = bool(self.ui.legendLabel.text)
        self.ui.hideMapButton.visible = any(word["map"] is not None for word in self._words)
        self.ui.warningLabel.visible = isCaption
        self._highlight(self._shownWord())

    def _highlight(self, active):
        """Write the text, with one of the words (an index, or None) marked as the one that is shown."""
        self.ui.hideMapButton.enabled = active is not None
        html, position = "", 0
        for index in sorted(range(len(self._words)), key=lambda index: self._words[index]["start"]):
            start, end = self._words[index]["start"], self._words[index]["end"]
            # A link within a link cannot be clicked.
            if start >= position:
                html += escape(self._text[position:start]) + self._html(index, index == active)
                position = end
        html += escape(self._text[position:])
        scrollBar = self.ui.textBrowser.verticalScrollBar()
        scrolled = scrollBar.value
        self.ui.textBrowser.html = f'<p style="white-space: pre-wrap; line-height: 130%">{html}</p>'
        scrollBar.value = scrolled

    def _html(self, index, isActive):
        word = self._words[index]
        palette = self.ui.textBrowser.palette
        style = ""
        if isActive:
            background, colour = palette.color(qt.QPalette.Highlight), palette.color(qt.QPalette.HighlightedText)
            style = f"background-color: {background.name()}; color: {colour.name()};"
        elif _isUnsure(word):
            style = f"color: {_GREY};"
        if _isUnsure(word):
            style += " font-style: italic;"
        link = f'href="word:{index}"' if _leads(word) else ""
        tag = "a" if link else "span"
        return f'<{tag} {link} style="{style}" title="{escape(_toolTip(word))}">{escape(word["text"])}</{tag}>'

    def _legend(self):
        lines = []
        if any(_leads(word) for word in self._words):
            lines.append(_("Underlined words have a place in the scan: click one to see it."))
        if any(_isUnsure(word) for word in self._words):
            lines.append(_("Grey italics: the network was less than {limit:.0%} sure.").format(limit=UNSURE))
        return "\n".join(lines)

    def _shownWord(self):
        """The index of the word whose map lies over the scan, or None."""
        composites = slicer.util.getNodesByClass("vtkMRMLSliceCompositeNode")
        shown = {composite.GetForegroundVolumeID() for composite in composites}
        of = (index for index, word in enumerate(self._words) if word["map"] and word["map"].GetID() in shown)
        return next(of, None)

    def _onWord(self, url):
        index = int(url.toString().rpartition(":")[2])
        captions.showWord(self.node, index)
        self._highlight(index)

    def _onHideMap(self, _checked):
        for mapNode in results.maps(self.node):
            display.setVisible(mapNode, False)
        slicer.util.setSliceViewerLayers(foreground=None)
        self._highlight(None)

    def _onCopy(self, _checked):
        qt.QApplication.clipboard().setText(self._text)


def _leads(word):
    return word["map"] is not None or word["place"] is not None


def _isUnsure(word):
    return word["confidence"] is not None and word["confidence"] < UNSURE


def _toolTip(word):
    lines = []
    if word["confidence"] is not None:
        lines.append(_("Confidence {confidence:.0%}.").format(confidence=word["confidence"]))
    if word["map"] is not None and word["place"] is not None:
        lines.append(_("Click to see its map over the scan, at its place."))
    elif word["map"] is not None:
        lines.append(_("Click to see its map over the scan."))
    elif word["place"] is not None:
        lines.append(_("Click to go to its place in the scan."))
    return " ".join(lines)
