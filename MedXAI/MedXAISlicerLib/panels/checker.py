"""The trust card of a map: what a few quick checks found of it, and the button that makes them."""

import math
from html import escape

from slicer.i18n import tr as _

from MedXAISlicerLib import asking, results
from MedXAISlicerLib.panels import progress
from MedXAISlicerLib.panels.model_chooser import forPerson, trusts
from MedXAISlicerLib.panels.region_chooser import RegionChooser

# As in MedXAILib.trust.card, which needs PyTorch: how many times as long as its map a card takes at most, and what the
# checks are called.
_LIMIT = 10
_TITLES = {
    "validity": _("Does it meet the segmentation?"),
    "randomisation": _("Does it depend on what the network learnt?"),
    "faithfulness": _("Does the answer depend on what the map marks?"),
    "stability": _("Does a tiny change of the scan change it?"),
    "discrimination": _("Is it about this answer?"),
    "channels": _("Which channel does the answer come from?"),
    "additivity": _("Do its values mean amounts?"),
    "permuted": _("Does it depend on the labels that were learnt?"),
    "repeatability": _("Would another training give the same map?"),
}


class Checker:
    """The part of the panel that shows the card of one map; what is being checked goes on whatever is shown."""

    def __init__(self, ui, logic):
        self.running = None
        self._ui, self._logic, self._node = ui, logic, None
        self._compared = RegionChooser(None, self._update, self._update, mask=True)
        self._compared.widget.toolTip = ui.comparedLabel.toolTip
        ui.comparedWidget.layout().addWidget(self._compared.widget)
        ui.checkButton.connect("clicked(bool)", self._checkOrCancel)
        ui.progressBar.visible = False

    def show(self, node):
        """Show the card of an explanation, if it is one that can have a card; None when there is none."""
        if node is not self._node and self.running is None:
            self._ui.statusLabel.text = ""
        self._node = node if node is not None and results.kind(node) == "SaliencyMap" else None
        self._ui.cardBox.visible = self._node is not None
        if self._node is None:
            return
        card = results.card(self._node)
        self._ui.cardLabel.text = _("Not checked yet.") if card is None else _found(card)
        self._ui.numbersLabel.text = "" if card is None else _numbers(card)
        self._ui.numbersButton.visible = bool(self._ui.numbersLabel.text)
        self._update()

    def cancel(self):
        """Stop what is being checked."""
        if self.running is not None:
            self.running.cancel()

    def _update(self):
        """Say what the button does."""
        ui, busy = self._ui, self.running is not None
        ui.checkButton.text = _("Cancel") if busy else _("Check this map")
        ui.comparedWidget.enabled = not busy
        if busy or self._node is None:
            ui.checkButton.enabled, ui.checkButton.toolTip = True, _("Stop at once; the scene stays as it is")
            return
        hindrance = self._hindrance()
        ui.checkButton.enabled = not hindrance
        said = hindrance or _(
            "Asks the network again: with scrambled weights, so that it has forgotten what it learnt; without what the "
            "map marks; and, if time allows, with a slightly changed scan. This takes at most about ten times as long "
            "as the map did, and Slicer can be used meanwhile."
        )
        # As rich text, because Qt wraps no other tool tip.
        ui.checkButton.toolTip = f"<p>{said}</p>"
        seconds = math.ceil(_LIMIT * results.provenance(self._node)["seconds"])
        ui.estimateLabel.text = _("up to about {time}").format(time=progress.roughly(seconds))

    def _hindrance(self):
        """Why the map cannot be checked, in words; empty when it can."""
        if results.part(self._node, "Source") is None:
            return _("The scan is not in the scene any more: without it the network cannot be asked again.")
        if results.isPartial(self._node):
            return _("This map was stopped early: let it be computed to the end to check it.")
        if not results.provenance(self._node)["model"].get("source"):
            return _("This network is not in a file: without one it cannot be asked again.")
        chosen = self._compared.value()
        if chosen is not None and chosen[0] in (results.part(node, "HotSpots") for node in results.findExplanations()):
            return _("These hot spots come from a map: compare with a segment drawn on the scan, or with none.")
        return ""

    def _checkOrCancel(self, _checked=False):
        if self.running is None:
            self._begin(self._node)
        else:
            self.running.cancel()
            self._ui.statusLabel.text = _("Stopping…")

    def _begin(self, node):
        from MedXAILib.errors import MedXAIError

        try:
            if not self._logic.ready:
                self._logic.install()
            self.running = asking.Checking(node, self._compared.value(), onChange=self._changed)
        except MedXAIError as error:
            self._ui.statusLabel.text = forPerson(error)
            return
        self._ui.statusLabel.text = _("Starting…")
        self._ui.progressBar.setRange(0, 0)
        self._ui.progressBar.visible = True
        self._update()

    def _changed(self, run):
        from MedXAILib.errors import Untrusted

        if not run.finished:
            if not run.stopping and run.progress is not None:
                self._say(run, progress.show(self._ui.progressBar, run.progress))
            return
        self.running = None
        self._ui.progressBar.visible = False
        self._say(run, "" if run.error is None else forPerson(run.error))
        self.show(self._node)
        # The network may bring code of its own that the person now allows.
        if isinstance(run.error, Untrusted) and trusts(run.error):
            self._begin(run.mapNode)

    def _say(self, run, text):
        other = text and run.mapNode is not self._node
        self._ui.statusLabel.text = f"{results.title(run.mapNode)}: {text}" if other else text


def _found(card):
    """What was found, with lights, and what was not looked for."""
    from MedXAILib.trust.finding import COLOURS

    lines = []
    for found in card["findings"]:
        word, colour = COLOURS[found["light"]]
        said = f"<b>{escape(found['title'])}</b> {escape(found['sentence'], quote=False)}"
        lines.append(f'<span style="color: {colour}">● <b>{word}</b></span>: {said}')
    if lines:
        lines.append(_("The lights are about the map: none says that the answer is right."))
    for name, why in card["left_out"].items():
        title = _TITLES.get(name, name)
        lines.append(escape(_("Left out: {title} ({why})").format(title=title, why=forPerson(why)), quote=False))
    return "".join(f"<p>{line}</p>" for line in lines)


def _numbers(card):
    rows = []
    for found in card["findings"]:
        rows.append(f"<tr><td colspan=2><b>{escape(found['title'])}</b></td></tr>")
        for name, value in found["values"].items():
            rows.append(f"<tr><td>{escape(name)}&nbsp;&nbsp;</td><td align=right>{value:.3g}</td></tr>")
    return f"<table>{''.join(rows)}</table>" if rows else ""
