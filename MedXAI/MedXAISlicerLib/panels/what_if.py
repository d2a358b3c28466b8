"""What the network would say, were the concepts that it decides by otherwise."""

import math
from functools import partial
from html import escape

import ctk
import qt
from slicer.i18n import tr as _

from MedXAISlicerLib import concepts, results


class WhatIf:
    """A slider for each concept, and what the network would say beside what it does say. All of it follows from the
    numbers of the answer: nothing is asked of the network."""

    def __init__(self, ui):
        self._ui = ui
        self._concepts, self._sliders = [], {}
        self._task = self._asked = ""
        ui.resetButton.connect("clicked(bool)", self._onReset)
        self.show(None)

    def show(self, node):
        """Offer the concepts of an explanation, if the decision follows from them; None for no explanation."""
        from MedXAILib.textual.intervention import carry_decision

        found = [] if node is None else concepts.read(node)["concepts"]
        self._concepts = found if carry_decision(found) else []
        if self._concepts:
            made = results.provenance(node)
            self._task, self._asked = made["model"]["task"], made["target_label"]
        self._ui.whatIfButton.visible = bool(self._concepts)
        layout = self._ui.slidersWidget.layout()
        while layout.rowCount():
            layout.removeRow(0)
        self._sliders = {concept["name"]: _slider(concept) for concept in self._concepts[:-1]}
        for name, slider in self._sliders.items():
            label = qt.QLabel(name)
            label.textFormat = qt.Qt.PlainText
            layout.addRow(label, slider)
            slider.connect("valueChanged(double)", partial(self._onMoved, name))
        if self._concepts:
            self._set({concept["name"]: concept["value"] for concept in self._concepts[:-1]})

    def _set(self, values):
        """Let the concepts have these values, by name."""
        self._values = values
        for name, slider in self._sliders.items():
            wasBlocked = slider.blockSignals(True)
            slider.value = values[name]
            slider.blockSignals(wasBlocked)
        self._ui.resetButton.enabled = values != self._seen()
        self._say()

    def _seen(self):
        """What the network takes the concepts for, by name."""
        return {concept["name"]: concept["numbers"]["predicted"] for concept in self._concepts[:-1]}

    def _say(self):
        from MedXAILib.textual.intervention import intervened, probabilities

        says, would = (intervened(self._concepts, changes) for changes in ({}, self._values))
        now, then = (probabilities(scores, self._task) for scores in (says, would))
        percent, isChanged = self._task not in ("regression", "embedding"), self._values != self._seen()
        rows = ""
        for of in sorted(now, key=lambda of: of != self._asked):
            before, after = (f"{p:.0%}" if percent else f"{p:.3g}" for p in (now[of], then[of]))
            cells = [f"<b>{after}</b>", _("instead of {before}").format(before=before) if isChanged else ""]
            if percent:
                cells.append(_("(score {score:+.1f})").format(score=would[of]))
            rows += f"<tr>{''.join(f'<td>{cell}&nbsp;&nbsp;</td>' for cell in (escape(of), *cells))}</tr>"
        heading = _("The network would say") if isChanged else _("The network says")
        self._ui.wouldLabel.text = f"{heading}<table>{rows}</table>"

    def _onMoved(self, name, value):
        from MedXAILib.textual.intervention import changed

        scales = {concept["name"]: concept["scale"] for concept in self._concepts[:-1]}
        self._set(changed(self._values, scales, {name: value}))

    def _onReset(self, _checked):
        self._set(self._seen())


def _slider(concept):
    """A slider over the values that a concept may have: of what is measured, twice what is seen or usual."""
    seen, usual = concept["numbers"]["predicted"], concept["numbers"]["reference"]
    slider = ctk.ctkSliderWidget()
    slider.objectName = f"{concept['name']}Slider"
    slider.toolTip = _(
        "The network takes it for {seen:.3g}; on average it was {usual:.3g} where the network learnt."
    ).format(seen=seen, usual=usual)
    low, high = 0.0, 1.0
    if concept["unit"]:
        known = 0.0, seen, usual, concept["value"]
        low, high = _rounded(2 * min(known)), _rounded(2 * max(known)) or 1.0
        slider.suffix = f" {concept['unit']}"
    slider.decimals = 2 if high - low < 10 else 1
    slider.minimum, slider.maximum, slider.singleStep = low, high, (high - low) / 100
    return slider


def _rounded(value):
    """To the next of 1, 2, ... 10, 20, ... away from zero."""
    if not value:
        return 0.0
    unit = 10 ** math.floor(math.log10(abs(value)))
    return math.copysign(math.ceil(abs(value) / unit) * unit, value)
