"""Concepts as a table: what each is worth to the network, in numbers and as a bar to the side that it speaks for."""

from html import escape

from slicer.i18n import tr as _

from MedXAISlicerLib import concepts

# Told apart by nearly everyone, and seen as well on white as on black.
_FOR, _AGAINST, _FAINT = "#d97706", "#2f7fd6", "#808080"
_HALF = 44  # of the bars, pixels
_ALIKE = 0.5
"""Concepts whose cosine is less are not worth a word."""


class ConceptTable:
    """What concepts are to a network. `leading` are the concepts, of which those that have a map lead to it."""

    warning = _("That a network goes by a concept does not mean that it is there. Check it against the image.")
    help = _(
        "A concept without a score could not be told from others by the network, or not reliably: that is no sign that "
        "it does not matter."
    )

    def __init__(self, node):
        self._node, self._known = node, concepts.read(node)
        self.text, self.leading = "\n".join(concepts.about(node)), self._known["concepts"]

    @property
    def legend(self):
        """How to read it."""
        lines = []
        if any(concept["map"] is not None for concept in self.leading):
            lines.append(_("Underlined concepts have a map, of what speaks for the concept: click one to see it."))
        if any(concept["score"] is not None for concept in self.leading):
            lines.append(_("Orange bars, to the right, speak for the answer, blue ones, to the left, against it."))
        if any(concept["score"] is None for concept in self.leading):
            lines.append(self.help)
        return "\n".join(lines)

    def html(self, active, marked):
        """It as rich text, with the concept `active` (an index, or None) in the style `marked`."""
        scored = [c for c in self.leading if c["score"] is not None]
        most = max((abs(c["score"]) + (c["interval"] or 0) for c in scored), default=0) or 1
        heads = {_("Concept"): "left", _("In this scan"): "right", self._known["scored"]: "right", "": "left"}
        head = "".join(
            f'<td align="{side}" valign="bottom" style="color: {_FAINT}">{escape(text)}</td>'
            for text, side in heads.items()
        )
        rows = "".join(
            f"<tr><td>{self._name(index, marked if index == active else '')}</td>{_cells(concept, most)}</tr>"
            for index, concept in enumerate(self.leading)
        )
        text = f"<p>{escape(self._known['text'])}</p>" if self._known["text"] else ""
        return f'{text}<table width="100%" cellspacing="0" cellpadding="2"><tr>{head}</tr>{rows}</table>'

    def follow(self, index):
        """Show what a concept leads to."""
        concepts.showConcept(self._node, index)

    def _name(self, index, style):
        """The name of a concept as rich text, and its layer where there are several."""
        concept = self.leading[index]
        look = f'style="{style}" title="{escape(self._help(index))}"'
        name = f"<span {look}>{escape(concept['name'])}</span>"
        if concept["map"] is not None:
            name = f'<a href="concept:{index}" {look}>{escape(concept["name"])}</a>'
        if len({one["layer"] for one in self.leading} - {""}) > 1:
            where = _("at {layer}").format(layer=concept["layer"])
            name += f' <span style="color: {_FAINT}">{escape(where)}</span>'
        return name

    def _help(self, index):
        """What else is known of a concept, for whoever holds the mouse over it."""
        concept = self.leading[index]
        lines = [_("Click to see its map over the scan.")] if concept["map"] is not None else []
        lines += [_("Looked for at {layer}.").format(layer=concept["layer"])] if concept["layer"] else []
        numbers = ", ".join(f"{name} {number:.3g}" for name, number in concept["numbers"].items())
        lines += [_("Known of it: {numbers}.").format(numbers=numbers)] if numbers else []
        cosines = self._known["alike"][index] if self._known["alike"] else [0.0] * len(self.leading)
        alike = [(c["name"], cosine) for c, cosine in zip(self.leading, cosines, strict=True) if c is not concept]
        near = ", ".join(f"{name} ({cosine:.2f})" for name, cosine in alike if abs(cosine) >= _ALIKE)
        lines += [_("To the network it is much like (cosine): {near}.").format(near=near)] if near else []
        return " ".join(lines)


def _cells(concept, most):
    """What follows the name of a concept in its row; `most` is the longest bar."""
    there = f'<td align="right">{escape(concepts.amount(concept))}</td>'
    said = escape(concepts.score(concept))
    if concept["score"] is None:
        return f'{there}<td colspan="2" style="color: {_FAINT}">{said}</td>'
    return f'{there}<td align="right">{said}</td><td width="{2 * _HALF}">{_bar(concept["score"] / most)}</td>'


def _bar(share):
    """From the middle to the right for what speaks for the answer, and to the left for what speaks against it."""
    length = round(_HALF * min(abs(share), 1))
    parts = [(_HALF - length, ""), (length, _AGAINST), (1, _FAINT), (_HALF, "")]
    if share >= 0:
        parts = [(_HALF, ""), (1, _FAINT), (length, _FOR), (_HALF - length, "")]
    cells = "".join(f'<td width="{width}" bgcolor="{colour}"></td>' for width, colour in parts if width)
    return f'<table cellspacing="0" cellpadding="0"><tr>{cells}</tr></table>'
