"""Cases that a network finds similar to the scan: as cards, and beside the scan."""

import tempfile
from collections import Counter
from html import escape
from pathlib import Path

import qt
import slicer
import vtk
from slicer.i18n import tr as _

from MedXAISlicerLib import cases, layouts, results
from MedXAISlicerLib.panels.panel import Panel

ALIKE = 0.5
"""Where no case reaches this similarity, a person is warned."""


class CasesPanel(Panel):
    """Similar cases as cards, the most similar one first."""

    uiFile = "Cases.ui"
    title = _("Cases")

    def __init__(self, logic):
        super().__init__(logic)
        self._chosen = []
        self.ui.casesList.connect("itemSelectionChanged()", self._onSelection)
        self.ui.casesList.connect("doubleClicked(QModelIndex)", self._onDoubleClick)
        self.ui.showBesideButton.connect("clicked(bool)", self._onShowBeside)
        layoutNode = slicer.mrmlScene.GetFirstNodeByClass("vtkMRMLLayoutNode")
        if layoutNode is not None:
            self.addObserver(layoutNode, vtk.vtkCommand.ModifiedEvent, self._refreshButton)
        self.show(None)

    def show(self, node):
        isOther = node is not self.node
        if isOther and self.node is not None and layouts.current() == "cases":
            layouts.leave()
        super().show(node)
        kind = results.kind(node) if node is not None else None
        found = cases.cases(node) if kind == "SimilarCases" else []
        # Places in the explanation, in the order of the cards.
        self._indices = sorted(range(len(found)), key=lambda index: -found[index]["similarity"])
        self.ui.emptyLabel.text = {
            None: _("Choose an explanation above to see the cases that are similar to the scan."),
            "SimilarCases": _("The network found no similar case."),
        }.get(kind, _("This explanation does not look for similar cases."))
        self.ui.emptyLabel.visible = not found
        self.ui.casesWidget.visible = bool(found)
        self.ui.summaryLabel.text = _summary(found)
        self.ui.dissimilarLabel.visible = all(case["similarity"] < ALIKE for case in found)
        self._fill(found)
        self._choose((layouts.comparedCases(node) or self._withImage()[:1]) if isOther else self._chosen)

    def _fill(self, found):
        """Make the cards."""
        casesList = self.ui.casesList
        wasBlocked = casesList.blockSignals(True)
        casesList.clear()
        for row, index in enumerate(self._indices):
            case = found[index]
            casesList.addItem(f"{case['label']}\n" + _("Similarity {value:.2f}").format(value=case["similarity"]))
            card = casesList.item(row)
            card.setIcon(_icon(cases.thumbnail(self.node, index, size=2 * casesList.iconSize.width())))
            card.setToolTip(_toolTip(case))
            if case["volume"] is None:
                card.setFlags(qt.Qt.ItemIsEnabled)
        casesList.blockSignals(wasBlocked)

    def _choose(self, indices):
        """Choose cases by their places in the explanation."""
        self._chosen = indices
        wasBlocked = self.ui.casesList.blockSignals(True)
        for row, index in enumerate(self._indices):
            self.ui.casesList.item(row).setSelected(index in indices)
        self.ui.casesList.blockSignals(wasBlocked)
        self.ui.chosenLabel.text = (
            _("{count} chosen, as many as fit beside the scan.")
            if len(indices) == layouts.MOST_CASES
            else _("{count} chosen. Click on up to {most} cards, or double-click on one to see it alone.")
        ).format(count=len(indices), most=layouts.MOST_CASES)
        self._refreshButton()

    def _compare(self, shown):
        """Show cases beside the scan, the most similar one first; without any, the views as they were before."""
        shown = [index for index in self._withImage() if index in shown]
        if shown:
            layouts.compareCases(self.node, shown)
        else:
            layouts.leave()
        self._refreshButton()

    def _withImage(self):
        """The cases that can be shown beside the scan, the most similar one first."""
        if not self._indices or results.part(self.node, "Source") is None:
            return []
        found = cases.cases(self.node)
        return [index for index in self._indices if found[index]["volume"] is not None]

    def _refreshButton(self, *_event):
        button = self.ui.showBesideButton
        isShown = layouts.current() == "cases"
        button.checked = isShown
        button.text = _("Leave the comparison") if isShown else _("Show beside the scan")
        button.enabled = bool(self._chosen)
        button.toolTip = (
            _("Show the scan and the chosen cases side by side; once more for the views that were there before.")
            if self._chosen
            else _("Choose a case first: click on its card.")
        )

    def _onSelection(self):
        selected = [index for row, index in enumerate(self._indices) if self.ui.casesList.item(row).isSelected()]
        # What was chosen first stays.
        chosen = sorted(selected, key=lambda index: index not in self._chosen)[: layouts.MOST_CASES]
        self._choose(chosen)
        if layouts.current() == "cases":
            self._compare(chosen)

    def _onDoubleClick(self, modelIndex):
        self._choose([index for index in self._withImage() if index == self._indices[modelIndex.row()]])
        self._compare(self._chosen)

    def _onShowBeside(self, checked):
        self._compare(self._chosen if checked else [])


def _summary(found):
    """How many of the cases have which label."""
    counts = Counter(case["label"] for case in found).most_common()
    labels = ", ".join(_("{count} {label}").format(count=count, label=label) for label, count in counts)
    return _("The {count} most similar cases: {labels}.").format(count=len(found), labels=labels)


def _toolTip(case):
    lines = [
        _("Case {uid}").format(uid=case["uid"]) + (f", {case['source']}" if case["source"] else ""),
        _("Similarity {value:.2f}: the greater, the more alike the case and the scan look to the network. ").format(
            value=case["similarity"]
        )
        + _("It is not a probability, and the label is that of the case, not of the scan."),
    ]
    if case["volume"] is None:
        lines.append(_("Its image is not in the scene: it cannot be shown beside the scan."))
    # As rich text, because Qt wraps no other tool tip.
    return "".join(f"<p>{escape(line)}</p>" for line in lines)


def _icon(picture):
    """A picture (H, W, 3) as an icon, by way of a file: every binding of Qt reads one, few agree on memory."""
    height, width, _channels = picture.shape
    with tempfile.TemporaryDirectory(prefix="medxai-") as folder:
        path = Path(folder) / "card.ppm"
        path.write_bytes(b"P6 %d %d 255\n" % (width, height) + picture.tobytes())
        pixmap = qt.QPixmap(str(path))
    icon = qt.QIcon(pixmap)
    # Without it Qt would tint the picture of a chosen card.
    icon.addPixmap(pixmap, qt.QIcon.Selected)
    return icon
