"""Cases that say something about the scan: as cards, and beside the scan."""

import math
import tempfile
from collections import Counter
from html import escape
from pathlib import Path

import qt
import slicer
import vtk
from slicer.i18n import tr as _

from MedXAISlicerLib import cases, display, layouts, results
from MedXAISlicerLib.panels.panel import Panel

# Why cases are shown: the headings of their cards.
_ROLES = {
    "alike": _("The network says the same of these"),
    "unlike": _("The network says otherwise of these"),
    "mistaken": _("The network is wrong about these"),
    "helpful": _("Learning from these speaks for the answer"),
    "harmful": _("Learning from these speaks against the answer"),
    "prototype": _("Prototypes that the network compares with"),
}

_ON_CARD = 2
"""So many numbers are on a card; all of them are in its tooltip."""


class CasesPanel(Panel):
    """Similar cases as cards, by why they are shown, the most similar one first."""

    uiFile = "Cases.ui"
    title = _("Cases")

    def __init__(self, logic):
        super().__init__(logic)
        self._chosen, self._found = [], []
        ui = self.ui
        ui.casesList.connect("itemSelectionChanged()", self._onSelection)
        ui.casesList.connect("doubleClicked(QModelIndex)", self._onDoubleClick)
        ui.showBesideButton.connect("clicked(bool)", self._onShowBeside)
        for selector in (ui.roleSelector, ui.labelSelector):
            selector.connect("currentIndexChanged(int)", self._filter)
        ui.numberSelector.connect("currentIndexChanged(int)", self._onNumber)
        ui.numberRangeWidget.connect("valuesChanged(double,double)", self._filter)
        ui.opacitySlider.connect("valueChanged(double)", display.setOpacity)
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
        said = cases.read(node) if kind == "SimilarCases" else {"text": "", "scored": "", "cases": []}
        self._found = found = said["cases"]
        self.ui.emptyLabel.text = {
            None: _("Choose an explanation above to see the cases that are similar to the scan."),
            # That there is none is an answer, too.
            "SimilarCases": f"<b>{escape(said['text'] or _('The network found no similar case.'))}</b>",
        }.get(kind, _("This explanation does not look for similar cases."))
        self.ui.emptyLabel.visible = not found
        self.ui.casesWidget.visible = bool(found)
        self.ui.textLabel.text = said["text"]
        self.ui.textLabel.visible = bool(said["text"])
        self.ui.summaryLabel.text = _summary(said)
        if isOther:
            self._fillFilters()
            self.ui.opacitySlider.value = display.currentOpacity()
        self._fill(said["scored"])
        self._choose((layouts.comparedCases(node) or self._withImage()[:1]) if isOther else self._chosen)
        self._filter()

    def _fillFilters(self):
        """Offer what there is to tell the cases apart by."""
        roles = [role for role in _ROLES if any(case["role"] == role for case in self._found)]
        labels = sorted({case["label"] for case in self._found})
        numbers = sorted({name for case in self._found for name in case["numbers"]})
        for selector, everything, choices in (
            (self.ui.roleSelector, _("Any reason"), {_ROLES[role]: role for role in roles}),
            (self.ui.labelSelector, _("Any label"), {label: label for label in labels}),
            (self.ui.numberSelector, _("Any number"), {name.replace("_", " "): name for name in numbers}),
        ):
            wasBlocked = selector.blockSignals(True)
            selector.clear()
            selector.addItem(everything, "")
            for text, data in choices.items():
                selector.addItem(text, data)
            selector.blockSignals(wasBlocked)
            selector.visible = len(choices) > (selector is not self.ui.numberSelector)
        self.ui.numberRangeWidget.visible = False

    def _fill(self, scored):
        """Make the cards, under the headings of why they are shown where there are several."""
        casesList = self.ui.casesList
        wasBlocked = casesList.blockSignals(True)
        casesList.clear()
        # Places in the explanation, in the order of the cards; a heading is none.
        self._indices = []
        for role, heading in _ROLES.items():
            of_it = [index for index, case in enumerate(self._found) if case["role"] == role]
            if of_it and len(of_it) < len(self._found):
                self._addHeading(heading)
            # What speaks most against the answer has the least number.
            sign = 1 if role == "harmful" else -1
            for index in sorted(of_it, key=lambda index: sign * self._found[index]["similarity"]):
                self._addCard(index, scored)
        casesList.blockSignals(wasBlocked)

    def _addHeading(self, text):
        self.ui.casesList.addItem(text)
        item = self.ui.casesList.item(len(self._indices))
        item.setFlags(qt.Qt.NoItemFlags)
        font = item.font()
        font.setBold(True)
        item.setFont(font)
        # Without it Qt would grey what cannot be chosen.
        item.setForeground(qt.QBrush(self.ui.casesList.palette.color(qt.QPalette.Text)))
        # Wider than any panel, so that it has a row of its own.
        item.setSizeHint(qt.QSize(4000, 2 * self.ui.casesList.fontMetrics().lineSpacing()))
        item.setTextAlignment(qt.Qt.AlignLeft | qt.Qt.AlignVCenter)
        self._indices.append(None)

    def _addCard(self, index, scored):
        from MedXAILib.amount import amounts

        casesList, case = self.ui.casesList, self._found[index]
        numbers = amounts(case["numbers"])
        casesList.addItem("\n".join([f"{case['label']} {cases.number(case['similarity'])}", *numbers[:_ON_CARD]]))
        card = casesList.item(len(self._indices))
        card.setIcon(_icon(cases.thumbnail(self.node, index, size=2 * casesList.iconSize.width())))
        card.setToolTip(_toolTip(case, scored, numbers))
        if case["volume"] is None:
            card.setFlags(qt.Qt.ItemIsEnabled)
        self._indices.append(index)

    def _filter(self, *_value):
        """Hide the cards of cases that are not asked for, and choose them no more."""
        role, label, number = (
            selector.itemData(selector.currentIndex)
            for selector in (self.ui.roleSelector, self.ui.labelSelector, self.ui.numberSelector)
        )
        low, high = self.ui.numberRangeWidget.minimumValue, self.ui.numberRangeWidget.maximumValue
        kept = {
            index
            for index, case in enumerate(self._found)
            if role in ("", case["role"])
            and label in ("", case["label"])
            and (not number or low <= case["numbers"].get(number, math.nan) <= high)
        }
        heading = None
        for row, index in enumerate(self._indices):
            item = self.ui.casesList.item(row)
            item.setHidden(index not in kept)
            if index is None:
                heading = item
            elif index in kept and heading is not None:
                heading.setHidden(False)
        if not kept.issuperset(self._chosen):
            self._choose([index for index in self._chosen if index in kept])
            if layouts.current() == "cases":
                self._compare(self._chosen)

    def _onNumber(self, position):
        number, widget = self.ui.numberSelector.itemData(position), self.ui.numberRangeWidget
        values = [case["numbers"][number] for case in self._found if number in case["numbers"]]
        widget.visible = bool(values)
        if values:
            wasBlocked = widget.blockSignals(True)
            # It rounds: nothing at the ends is to be lost.
            widget.setRange(math.floor(100 * min(values)) / 100, math.ceil(100 * max(values)) / 100)
            widget.setValues(widget.minimum, widget.maximum)
            widget.blockSignals(wasBlocked)
        self._filter()

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
        return [index for index in self._indices if index is not None and found[index]["volume"] is not None]

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


def _summary(said):
    """How many of the cases have which label, and what their number is."""
    counts = Counter(case["label"] for case in said["cases"]).most_common()
    labels = ", ".join(_("{count} {label}").format(count=count, label=label) for label, count in counts)
    text = _("{count} cases: {labels}. The number beside the label is the {scored}.")
    return text.format(count=len(said["cases"]), labels=labels, scored=said["scored"])


def _toolTip(case, scored, numbers):
    likeness = _("{scored} {value}: it is not a probability, and the label is that of the case, not of the scan.")
    lines = [
        _("Case {uid}").format(uid=case["uid"]) + (f", {case['source']}" if case["source"] else ""),
        *filter(None, [_ROLES[case["role"]], case["note"], ", ".join(numbers)]),
        likeness.format(scored=scored.capitalize(), value=cases.number(case["similarity"])),
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
