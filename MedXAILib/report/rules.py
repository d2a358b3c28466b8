"""The page of rules: sentences, those that hold for the scan marked."""

from __future__ import annotations

from html import escape

from MedXAILib.report.sheet import Sheet
from MedXAILib.rule import Rule
from MedXAILib.rule_set import RuleSet
from MedXAILib.volume import Volume


def of_rules(_volume: Volume, told: RuleSet) -> Sheet:
    """The rules for the scan and its like, and those for all cases."""
    parts = [f"<p class=told>{escape(told.text)}</p>"] if told.text else []
    for scope, title in (("case", "For scans like this one"), ("all", "For all cases")):
        rules = [rule for rule in told.rules if rule.scope == scope]
        if rules:
            parts.append(f"<h2>{title}</h2><ol>{''.join(map(_item, rules))}</ol>")
    values = "".join(
        f"<tr><th>{escape(name.replace('_', ' '))}</th><td class=number>{value:.3g}</td></tr>"
        for name, value in told.values.items()
    )
    if values:
        parts.append(f"<h2>In this scan</h2><table>{values}</table>")
    reading = [
        "Rules describe what the network says, not what is true. Of several that hold, the first counts.",
        "A rule that covers few cases, or has a wide interval, may be chance.",
    ]
    return Sheet("When does the network say what?", "".join(parts), reading, style=_STYLE)


def _item(rule: Rule) -> str:
    if not rule.applies:
        return f"<li>{escape(rule.sentence)}</li>"
    return f"<li class=applies>{escape(rule.sentence)} <span class=here>← this scan</span></li>"


_STYLE = """
.applies { font-weight: bold; } .here { color: #b45309; }
"""
