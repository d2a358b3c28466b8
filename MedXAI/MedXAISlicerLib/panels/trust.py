"""How far an explanation can be trusted: by theory, by how it was computed, and by what its method is known for."""

import json
from datetime import datetime
from html import escape
from pathlib import PurePath

import qt
from slicer.i18n import tr as _

from MedXAISlicerLib import results
from MedXAISlicerLib.panels.checker import Checker
from MedXAISlicerLib.panels.panel import Panel

# From the least to the greatest residual.
_LIGHTS = "good", "fair", "poor"


class TrustPanel(Panel):
    """Says what is known of an explanation of any kind; that colour is not disease stays on the screen always."""

    uiFile = "Trust.ui"
    title = _("Trust")
    followsParts = True

    def __init__(self, logic):
        super().__init__(logic)
        self.checker = Checker(self.ui, logic)
        self.ui.copyButton.connect("clicked(bool)", self._onCopy)
        self.show(None)

    def cleanup(self):
        self.checker.cancel()
        super().cleanup()

    def show(self, node):
        super().show(node)
        self.checker.show(node)
        self.ui.emptyLabel.text = _("Choose an explanation above to see how far it can be trusted.")
        self.ui.emptyLabel.visible = node is None
        self.ui.trustWidget.visible = node is not None
        if node is None:
            return
        made = results.provenance(node)
        residual = results.residual(node)
        self.ui.theoryLabel.text = _list(_checked(*one) for one in residual.items()) or _(
            "This explanation comes without a check against theory."
        )
        self.ui.theoryLabel.toolTip = _paragraphs(map(_explained, residual))
        self.ui.notesLabel.text = _list(escape(note) for note in made.get("notes", [])) or _(
            "Nothing unusual: it was computed as asked."
        )
        self._fillMethod(made)
        self.ui.timeLabel.text = _duration(made["seconds"])
        self.ui.passesLabel.text = _("{forwards} forwards, {backwards} backwards").format(**made)
        self.ui.memoryLabel.text = _size(made["peak_memory"]) if made["peak_memory"] else _("not measured")
        self.ui.deviceLabel.text = _("processor (CPU)") if made["device"] == "cpu" else made["device"]
        self.ui.provenanceText.plainText = _origin(node, made)

    def _fillMethod(self, made):
        method = (getattr(self.logic, "methods", None) or {}).get(made["method"])
        self.ui.methodBox.visible = method is not None
        if method is None:
            return
        self.ui.methodBox.title = _("The method: {title}").format(title=method["title"])
        self.ui.strengthsLabel.text = method["taxonomy"]["strengths"]
        self.ui.limitsLabel.text = method["taxonomy"]["limits"]
        self.ui.paperLabel.text = _("{paper}; section {section} of van der Velden 2022").format(
            paper=method["paper"], section=method["taxonomy"]["section"]
        )

    def _onCopy(self, _checked):
        made, residual = results.provenance(self.node), results.residual(self.node)
        text = json.dumps({"provenance": made, "residual": residual}, indent=2, ensure_ascii=False)
        qt.QApplication.clipboard().setText(text)


def _checked(name, value):
    """A residual as a light and a sentence."""
    from MedXAILib.report.residuals import residual
    from MedXAILib.trust.finding import COLOURS

    meant = residual(name)
    word, colour = COLOURS[_LIGHTS[sum(not value < limit for limit in (meant.good, meant.fair))]]
    return f'<span style="color: {colour}">● <b>{word}</b></span>: {escape(meant.sentence(value), quote=False)}'


def _explained(name):
    """What a residual means, and where its lights change."""
    from MedXAILib.report.residuals import residual

    meant = residual(name)
    limits = _("Less than {good:.0%} is good, less than {fair:.0%} fair, more is poor.")
    return f"{meant.help} {limits.format(good=meant.good, fair=meant.fair)}"


def _paragraphs(lines):
    """Lines as rich text, because Qt wraps no other tool tip."""
    said = [*lines, _("That a check is good does not make the network right.")]
    return "".join(f"<p>{escape(line)}</p>" for line in said)


def _list(lines):
    return "<br>".join(lines)


def _duration(seconds):
    if seconds < 60:
        return _("{seconds:.1f} s").format(seconds=seconds)
    return _("{minutes:.0f} min {seconds:.0f} s").format(minutes=seconds // 60, seconds=seconds % 60)


def _size(count):
    """Bytes in the largest unit of which there is one."""
    units = ("B", "kB", "MB", "GB", "TB")
    power = min(len(units) - 1, (len(str(int(count))) - 1) // 3)
    return f"{count / 1000**power:.3g} {units[power]}"


def _origin(node, made):
    """Where an explanation comes from, line by line."""
    sourceNode, model, volume = results.part(node, "Source"), made["model"], made["volume"]
    scan = sourceNode.GetName() if sourceNode is not None else PurePath(str(volume.get("source"))).name
    rows = {
        _("Network"): model.get("name"),
        _("Network's files"): model.get("source"),
        _("Network's fingerprint"): model.get("fingerprint"),
        _("Scan"): scan,
        _("Scan's fingerprint"): volume.get("fingerprint"),
        _("Answer"): made["target_label"],
        _("Where"): _where(made.get("region")),
        _("Method"): made["method"],
        _("Parameters"): ", ".join(f"{name} {value}" for name, value in made["parameters"].items()),
        _("Seed"): made["seed"],
        _("Created"): f"{datetime.fromisoformat(made['created']).astimezone():%Y-%m-%d %H:%M:%S}",
        _("Versions"): ", ".join(f"{name} {version}" for name, version in made["versions"].items()),
    }
    return "\n".join(f"{name}: {value}" for name, value in rows.items() if value not in (None, ""))


def _where(region):
    """A centre or a box of two corners, below the scan's own transform, in words."""
    if not region:
        return _("the whole scan")
    corners = region if isinstance(region[0], list) else [region]
    return _(" to ").join(results.inWords(corner) for corner in corners)
