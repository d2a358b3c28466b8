"""Rules as sentences, of which those that hold for the scan are marked."""

from html import escape

from slicer.i18n import tr as _

from MedXAISlicerLib import rules

_MARK = "#d97706"


class RuleText:
    """When the network says what. Nothing of it leads into the scan."""

    warning = _("Rules describe what the network says, not what is true. Check them against the image.")
    help = _("A rule that covers few cases, or has a wide interval, may be chance.")
    leading = ()

    def __init__(self, node):
        self._known = rules.read(node)
        self.text = "\n".join(rules.about(node))

    @property
    def legend(self):
        """How to read it."""
        return "\n".join([_("Of several rules that hold for the scan (▶) the first counts."), self.help])

    def html(self, _active, _marked):
        """It as rich text."""
        from MedXAILib.amount import amount

        parts = [f"<p>{escape(self._known['text'])}</p>"] if self._known["text"] else []
        if self._known["values"]:
            values = (amount(*known) for known in self._known["values"].items())
            parts.append(_("<p>In this scan: {values}.</p>").format(values=escape(", ".join(values))))
        scopes = {"case": _("For scans like this one"), "all": _("For all cases")}
        for scope, title in scopes.items():
            found = [rule for rule in self._known["rules"] if rule.scope == scope]
            if found:
                parts.append(f"<p><b>{title}</b></p>{''.join(map(_paragraph, found))}")
        return "".join(parts)


def _paragraph(rule):
    if not rule.applies:
        return f'<p style="margin-left: 18px">{escape(rule.sentence)}</p>'
    holds = _("It holds for this scan.")
    return f'<p><span style="color: {_MARK}">▶</span> <b>{escape(rule.sentence)}</b> {holds}</p>'
