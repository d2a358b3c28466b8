"""The map of all cases in two dimensions, with the way of a scan's variants among them."""

import numpy as np
import qt

_SIZE, _MARGIN, _DOT = 320, 14, 4  # pixels
# Told apart by nearly everyone, and seen as well on white as on black.
_COLOURS = "#d97706", "#2f7fd6", "#3f9142", "#b05bc4", "#c94f4f", "#808080"


class CohortMap:
    """Cases as dots, each of which can be clicked: `onChosen(case)` follows, with None when nothing is chosen any
    more."""

    def __init__(self, onChosen):
        self._scene = qt.QGraphicsScene()
        self.view = qt.QGraphicsView(self._scene)
        self.view.objectName = "cohortView"
        self.view.setRenderHint(qt.QPainter.Antialiasing)
        self.view.setFixedSize(_SIZE + 4, _SIZE + 4)
        self._onChosen = onChosen
        self._cases, self._way = [], []
        self._now = self._ring = None
        self._scene.connect("selectionChanged()", self._onSelection)

    def show(self, said):
        """Show the cohort of a traversal, as `traversals.read` has it."""
        self._scene.blockSignals(True)
        self._scene.clear()
        self._scene.setSceneRect(0, 0, _SIZE, _SIZE)
        self._cases = said["cohort"]
        places = np.array([(case["x"], case["y"]) for case in self._cases] + said["path"])
        low, span = places.min(axis=0), np.ptp(places, axis=0).clip(1e-9)
        placed = _MARGIN + (places - low) / span * (_SIZE - 2 * _MARGIN)
        # Up is where y is greater.
        placed[:, 1] = _SIZE - placed[:, 1]
        dots, self._way = placed[: len(self._cases)].tolist(), placed[len(self._cases) :].tolist()
        colours = colourOf(self._cases)
        for index, (case, place) in enumerate(zip(self._cases, dots, strict=True)):
            dot = self._circle(place, _DOT, qt.QPen(qt.Qt.NoPen), qt.QBrush(qt.QColor(colours[case["label"]])))
            dot.setOpacity(0.7)
            dot.setFlag(qt.QGraphicsItem.ItemIsSelectable, True)
            dot.setData(0, index)
            dot.setToolTip(f"{case['label']}, {case['uid']}")
        pen = qt.QPen(self.view.palette.color(qt.QPalette.Text))
        pen.setWidthF(1.5)
        for (x, y), (toX, toY) in zip(self._way, self._way[1:], strict=False):
            self._scene.addLine(x, y, toX, toY, pen)
        self._circle(self._way[said["here"]], _DOT + 2, pen)
        self._now = self._circle((0, 0), _DOT + 1, pen, qt.QBrush(pen.color()))
        pen.setWidthF(2.5)
        self._ring = self._circle((0, 0), _DOT + 4, pen)
        self._ring.setVisible(False)
        self._scene.blockSignals(False)

    def setStep(self, index):
        """Mark the step that is shown."""
        self._now.setPos(*self._way[index])

    def _circle(self, place, radius, pen, brush=None):
        circle = self._scene.addEllipse(-radius, -radius, 2 * radius, 2 * radius, pen, brush or qt.QBrush())
        circle.setPos(*place)
        return circle

    def _onSelection(self):
        chosen = self._scene.selectedItems()
        self._ring.setVisible(bool(chosen))
        if chosen:
            self._ring.setPos(chosen[0].pos())
        self._onChosen(self._cases[chosen[0].data(0)] if chosen else None)


def colourOf(cases):
    """The colour of each label."""
    labels = sorted({case["label"] for case in cases})
    return {label: _COLOURS[index % len(_COLOURS)] for index, label in enumerate(labels)}
