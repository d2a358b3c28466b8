"""What of a segmentation network's label is explained, and where: the network answers in every voxel."""

import qt
from slicer.i18n import tr as _

_WITHIN = {
    "predicted": (
        _("Where it is predicted"),
        _("Explains the label in the voxels that the network itself gives it: why does it mark what it marks?"),
    ),
    "everywhere": (
        _("Everywhere"),
        _("Explains the label in all that the network is shown, also where it gives another label."),
    ),
    "segment": (
        _("In a segment"),
        _("Explains the label in a segment, such as a lesion that you have drawn, also where the network misses it."),
    ),
}
_MEASURES = {
    "logit": (
        _("Mean score"),
        _("How strongly the network holds to the label there, on average. The map shows what raises and lowers that."),
    ),
    "volume": (
        _("Volume"),
        _(
            "How many mL the network gives the label there; a voxel that it is unsure of counts in part. The map shows "
            "what makes that more or less."
        ),
    ),
    "dice": (
        _("Dice with the segment"),
        _(
            "How well the network's label agrees with the segment: 1 where they coincide, 0 where they do not meet. "
            "The map shows what helps and what harms that."
        ),
    ),
}

# As in `explain`: Qt reads the flags of an item from this role, 0 so that it cannot be chosen, None as usual.
_FLAGS = qt.Qt.UserRole - 1


class LabelChooser:
    """The rows of the panel that only segmentation networks need, tied to the parameter node."""

    def __init__(self, ui):
        self._ui, self._chosen = ui, None
        for box, choices in ((ui.withinSelector, _WITHIN), (ui.measureSelector, _MEASURES)):
            for name, (title, help) in choices.items():
                box.addItem(title, name)
                box.setItemData(box.count - 1, help, qt.Qt.ToolTipRole)
        ui.withinSelector.connect("activated(int)", self._withinChosen)
        ui.withinSegmentSelector.connect("currentSegmentChanged(QString)", self._segmentChosen)
        ui.measureSelector.connect("activated(int)", self._measureChosen)

    def setParameterNode(self, parameterNode):
        """Show the choices of a scene; None while it is closed."""
        self._chosen = parameterNode
        if parameterNode is not None:
            segment = parameterNode.withinSegment
            self._ui.withinSegmentSelector.setCurrentNode(parameterNode.withinSegmentation)
            self._ui.withinSegmentSelector.setCurrentSegmentID(segment)

    def update(self, segments):
        """Show what is chosen; nothing unless the network segments."""
        ui, chosen = self._ui, self._chosen
        for widget in (ui.withinLabel, ui.withinSelector, ui.measureLabel, ui.measureSelector):
            widget.visible = segments
        inSegment = chosen.labelWithin == "segment"
        ui.withinSegmentSelector.visible = segments and inSegment
        ui.measureSelector.setItemData(ui.measureSelector.findData("dice"), None if inSegment else 0, _FLAGS)
        for box, name in ((ui.withinSelector, chosen.labelWithin), (ui.measureSelector, chosen.labelMeasure)):
            box.currentIndex = box.findData(name)

    def lacks(self):
        """Whether the segment has still to be chosen."""
        return self._chosen.labelWithin == "segment" and None in self._segment()

    def label(self):
        """What is asked of the label, as for `asking.Explaining`."""
        within = self._chosen.labelWithin
        return {
            "within": self._segment() if within == "segment" else within,
            "measure": self._chosen.labelMeasure,
        }

    def _segment(self):
        return self._chosen.withinSegmentation, self._chosen.withinSegment or None

    def _withinChosen(self, index):
        self._chosen.labelWithin = self._ui.withinSelector.itemData(index)
        if self._chosen.labelWithin != "segment" and self._chosen.labelMeasure == "dice":
            # There is nothing left to agree with.
            self._chosen.labelMeasure = "logit"

    def _segmentChosen(self, segmentID):
        if self._chosen is not None:
            self._chosen.withinSegmentation = self._ui.withinSegmentSelector.currentNode()
            self._chosen.withinSegment = segmentID or ""

    def _measureChosen(self, index):
        self._chosen.labelMeasure = self._ui.measureSelector.itemData(index)
