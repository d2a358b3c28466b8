"""What is said of a method to somebody who has to choose one."""

import html

import qt
from slicer.i18n import tr as _

_ANSWERS = {
    "SaliencyMap": _("Where: a map"),
    "Caption": _("In words: a caption"),
    "ConceptScores": _("In words: concepts"),
    "SimilarCases": _("By example: similar cases"),
    "Traversal": _("By example: variants of the scan"),
    "RuleSet": _("In words: rules"),
}

# A role that Qt itself reads the flags of an item from: 0 makes it a heading.
_FLAGS = qt.Qt.UserRole - 1


def described(method):
    """A method for somebody who does not know it, as rich text."""
    taxonomy = method["taxonomy"]
    lines = [
        f"<b>{html.escape(method['title'])}</b>",
        _("Good: {text}").format(text=html.escape(taxonomy["strengths"])),
        _("Limits: {text}").format(text=html.escape(taxonomy["limits"])),
        _("{built}, {applies}, {scope}; section {section} of the survey").format(
            built=taxonomy["built"],
            applies=taxonomy["applies"],
            scope=" / ".join(taxonomy["scope"]),
            section=taxonomy["section"],
        ),
        f"<i>{html.escape(method['paper'])}</i>",
    ]
    return "<p>" + "</p><p>".join(lines) + "</p>"


def listed(box, methods):
    """List methods in a combo box by what they answer with."""
    box.blockSignals(True)
    box.clear()
    for kind, heading in _ANSWERS.items():
        of_it = [method for method in methods if method["kind"] == kind]
        if not of_it:
            continue
        box.addItem(heading)
        box.setItemData(box.count - 1, 0, _FLAGS)
        for method in of_it:
            box.addItem(method["title"], method["id"])
            box.setItemData(box.count - 1, described(method), qt.Qt.ToolTipRole)
    box.blockSignals(False)
