"""What is said of a method to somebody who has to choose one."""

import html

from slicer.i18n import tr as _


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
