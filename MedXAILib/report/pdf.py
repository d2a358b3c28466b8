"""A page on paper: the HTML that MedXAI writes as a PDF, A4, by ReportLab.

It takes from the page alone: its text, tables, pictures and plots, and its own style sheet for colours and sizes. What
is folded is printed open. The same page gives the same bytes.
"""

from __future__ import annotations

import base64
import io
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from html import escape
from html.parser import HTMLParser
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from MedXAILib.errors import MedXAIError
from MedXAILib.report.case import PAGE, PRINTED
from MedXAILib.report.page import RESEARCH_ONLY
from MedXAILib.resources import path

try:
    from reportlab import platypus, rl_config
    from reportlab.graphics import shapes
    from reportlab.lib.colors import HexColor
    from reportlab.lib.pagesizes import A4
    from reportlab.lib.styles import ParagraphStyle
    from reportlab.pdfbase import pdfmetrics
    from reportlab.pdfbase.ttfonts import TTFont
    from reportlab.pdfgen.canvas import Canvas
except ImportError as error:
    raise MedXAIError("PDFs need ReportLab: install it by pip install 'medxai[pdf]'.") from error

# In points: the text, the least that a table is made to, the margins, what a pixel of a picture or a plot is at most,
# and what is around the text of a cell.
_TEXT, _LEAST, _MARGIN, _PIXEL, _BESIDE, _ABOVE = 9.0, 4.5, 42.0, 0.6, 4.0, 1.5
_WIDTH, _HEIGHT = A4[0] - 2 * _MARGIN, A4[1] - 2 * _MARGIN
# In heights of the text: no word keeps a column of a table wider, and how long a bar is.
_LONGEST, _BAR = 15.0, 9.0
_INK, _LINE, _FAINT = HexColor("#1c1e21"), HexColor("#d9dce0"), HexColor("#63686f")
# What HTML does not close, and what is part of a line.
_VOID, _INLINE = ("meta", "img", "br"), ("strong", "span", "abbr", "br")
_HEADINGS = ("h1", "h2", "h3")
_PNG = "data:image/png;base64,"
# Written where the font has no letter.
_BOX, _SPACES = "□", " \n\t"
# As many letters are a number at most.
_NUMBER = 24
# Letters of the font are wider than those for which plots leave room.
_NARROWER = 0.9


def print_page(folder: str | Path) -> Path:
    """Write the page in `folder`, of whatever it is, as a PDF beside it.

    Raises:
        MedXAIError: when there is no page.
    """
    page = Path(folder) / PAGE
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise MedXAIError(f"'{folder}' holds no page ({PAGE}): give a folder that one was written to.") from error
    printed = page.with_name(PRINTED)
    printed.write_bytes(pdf(text))
    return printed


def pdf(page: str) -> bytes:
    """The PDF of a page that MedXAI wrote."""
    _register()
    tree, kept = _Tree(page), io.BytesIO()
    made_by, date = tree.meta.get("generator", "MedXAI"), _date(tree.meta.get("date", ""))
    paper = platypus.BaseDocTemplate(
        kept,
        pagesize=A4,
        title=tree.title,
        author=made_by,
        creator=made_by,
        subject=RESEARCH_ONLY,
        lang="en",
        invariant=1,
    )
    frame = platypus.Frame(_MARGIN, _MARGIN, _WIDTH, _HEIGHT, 0, 0, 0, 0)
    paper.addPageTemplates(platypus.PageTemplate(frames=[frame], onPage=lambda on, _: _foot(on, made_by, date)))
    plain = ParagraphStyle("", fontName="MedXAI", fontSize=_TEXT, leading=1.35 * _TEXT, textColor=_INK, spaceAfter=3)
    printed = _Printer(tree.style).blocks(tree.body, plain, _WIDTH)
    paper.build([*_together(printed), _Pages()])
    return kept.getvalue()


@dataclass
class _Node:
    """A tag of a page; `inside` are the selectors of those that it is in."""

    tag: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)
    inside: frozenset[str] = frozenset()
    children: list[_Node | str] = field(default_factory=list)

    @property
    def selectors(self) -> frozenset[str]:
        return frozenset([self.tag, *(f".{name}" for name in self.attributes.get("class", "").split())])

    @property
    def nodes(self) -> list[_Node]:
        return [child for child in self.children if isinstance(child, _Node)]

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    @property
    def picture(self) -> bytes:
        """A PNG that is in the page itself; empty for anything else."""
        source = self.attributes.get("src", "")
        return base64.b64decode(source[len(_PNG) :]) if self.tag == "img" and source.startswith(_PNG) else b""

    @property
    def bar(self) -> bool:
        return self.tag == "progress" or ".axis" in self.selectors

    def all(self, tag: str) -> Iterator[_Node]:
        """Those of one tag within it, in order; not those within each other."""
        for node in self.nodes:
            yield from [node] if node.tag == tag else node.all(tag)

    def number(self, name: str, missing: float = 0.0) -> float:
        return float(self.attributes.get(name, missing))


class _Tree(HTMLParser):
    """A page as it is nested."""

    def __init__(self, page: str) -> None:
        super().__init__()
        whole = _Node()
        self._open = [whole]
        self.feed(page)
        self.body = next(whole.all("body"), whole)
        self.title = next((title.text for head in whole.all("head") for title in head.all("title")), "")
        self.style = "".join(style.text for style in whole.all("style"))
        self.meta = {meta.attributes.get("name", ""): meta.attributes.get("content", "") for meta in whole.all("meta")}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in _VOID:
            self._open.append(self._open[-1].nodes[-1])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        around = self._open[-1]
        known = {name: value or "" for name, value in attrs}
        around.children.append(_Node(tag, known, around.inside | around.selectors))

    def handle_endtag(self, tag: str) -> None:
        if tag in [node.tag for node in self._open]:
            while self._open.pop().tag != tag:
                pass

    def handle_data(self, data: str) -> None:
        self._open[-1].children.append(data)


class _Printer:
    """Makes of a page what ReportLab lays out, in the looks of its style sheet."""

    def __init__(self, style: str) -> None:
        # How it looks elsewhere than on a light screen.
        style = re.sub(r"@media[^{]*\{(?:[^{}]*\{[^{}]*\})*[^{}]*\}", "", style)
        self._rules = [
            (selector.split(), _properties(said))
            for selectors, said in re.findall(r"([^{}]+)\{([^{}]*)\}", style)
            for selector in selectors.split(",")
        ]
        self._values = {name: value for _, said in self._rules for name, value in said.items()}
        self._headings, self._level = 0, -1

    def look(self, node: _Node) -> dict[str, str]:
        """What the style sheet says of a node, and the node itself."""
        found: dict[str, str] = {}
        for (*around, last), said in self._rules:
            if last in node.selectors and (not around or (len(around) == 1 and around[0] in node.inside)):
                found |= said
        found |= _properties(node.attributes.get("style", ""))
        return {k: re.sub(r"var\((--\w+)\)", lambda m: self._values.get(m[1], ""), v) for k, v in found.items()}

    def styled(self, style: ParagraphStyle, node: _Node) -> ParagraphStyle:
        """`style`, but for what the node says of it."""
        look = self.look(node)
        size = float(look["font-size"][:-3]) * _TEXT if look.get("font-size", "").endswith("rem") else style.fontSize
        bold = {"bold": "MedXAI-Bold", "normal": "MedXAI"}.get(look.get("font-weight", ""), style.fontName)
        return ParagraphStyle(
            node.tag,
            parent=style,
            fontName="MedXAI-Bold" if node.tag in _HEADINGS else bold,
            fontSize=size,
            leading=1.35 * size,
            textColor=_colour(look.get("color")) or style.textColor,
        )

    def blocks(self, node: _Node, style: ParagraphStyle, width: float) -> list[Any]:
        """What is in a node, below each other."""
        made: list[Any] = []
        for inline, children in groupby(node.children, _in_line):
            part = _Node(children=list(children))
            if not inline:
                made += [one for child in part.nodes for one in self.block(child, self.styled(style, child), width)]
            elif part.text.strip():
                made.append(platypus.Paragraph(self.markup(part), style))
        return made

    def block(self, node: _Node, style: ParagraphStyle, width: float) -> list[Any]:
        if node.tag in _HEADINGS:
            return [self.heading(node, style)]
        if node.tag in ("p", "figcaption", "summary"):
            folded = node.tag == "summary"
            kept = ParagraphStyle("", parent=style, keepWithNext=node.tag != "p", spaceBefore=6 * folded)
            return [platypus.Paragraph(self.markup(node), kept)] if node.text.strip() else []
        if node.tag in ("ul", "ol"):
            return self.items(node, style)
        if node.tag == "table":
            return self.table(node, style, width)
        if node.tag == "figure":
            return [*self.blocks(node, style, width), platypus.Spacer(0, 6)]
        if node.picture:
            return [_picture(node, width)]
        if node.tag == "svg":
            return [self.plot(node, width)]
        if node.bar:
            return [self.bar(node, style.fontSize)]
        if self.look(node).get("display") == "flex":
            return [self.cards(node, style, width)]
        return self.blocks(node, style, width)

    def heading(self, node: _Node, style: ParagraphStyle) -> Any:
        self._headings += 1
        # Bookmarks are nested without gaps.
        self._level = min(_HEADINGS.index(node.tag), self._level + 1)
        space = 0.0 if node.tag == "h1" else 0.9 * style.fontSize
        own = ParagraphStyle("", parent=style, keepWithNext=True, spaceBefore=space)
        said = " ".join(_printable(node.text).split())
        made = _Heading(self.markup(node), own)
        made.bookmark = said, f"heading-{self._headings}", self._level
        return made

    def markup(self, node: _Node) -> str:
        """What is in a line, in the words of ReportLab."""
        said = ""
        for child in node.children:
            if isinstance(child, str):
                text = _printable(child)
                said += escape(_whole(text) if ".number" in node.selectors else text)
                continue
            look, inner = self.look(child), "<br/>" if child.tag == "br" else self.markup(child)
            if colour := _colour(look.get("color")):
                inner = f'<font color="#{colour.hexval()[2:]}">{inner}</font>'
            marks = {
                "b": child.tag == "strong" or look.get("font-weight") == "bold",
                "i": look.get("font-style") == "italic",
                "u": "border-bottom" in look,
            }
            for mark in (mark for mark, there in marks.items() if there):
                inner = f"<{mark}>{inner}</{mark}>"
            said += inner
        return said

    def items(self, node: _Node, style: ParagraphStyle) -> list[Any]:
        bare, made = self.look(node).get("list-style") == "none", []
        for i, item in enumerate(node.all("li"), 1):
            own = ParagraphStyle(
                "", parent=self.styled(style, item), bulletFontName="MedXAI", leftIndent=0 if bare else 14
            )
            bullet = None if bare else f"{i}." if node.tag == "ol" else "•"
            made.append(platypus.Paragraph(self.markup(item), own, bulletText=bullet))
        return made

    def table(self, node: _Node, style: ParagraphStyle, width: float) -> list[Any]:
        """As wide as it needs; too wide, its lines are broken, then its text is made smaller, and then words are
        broken."""
        rows = [(self.styled(style, row), row) for row in node.all("tr")]
        cells = [[(self.styled(own, cell), cell) for cell in row.nodes] for own, row in rows]
        count = max((sum(_span(cell) for _, cell in row) for row in cells), default=0)
        if not count:
            return []
        want, least = np.full((2, count), 0.1)
        spans = []
        for y, row in enumerate(cells):
            x = 0
            for own, cell in row:
                if _span(cell) == 1:
                    needs = self._needs(own, cell)
                    want[x], least[x] = np.maximum((want[x], least[x]), needs)
                else:
                    spans.append(("SPAN", (x, y), (x + _span(cell) - 1, y)))
                x += _span(cell)
        room = width - 2 * _BESIDE * count
        smaller = min(1.0, max(_LEAST / style.fontSize, room / least.sum()))
        # One long text takes no room from short ones.
        want, least = np.minimum(smaller * want, room), smaller * least
        spare = max(0.0, room - least.sum()) / max(1e-9, (want - least).sum())
        widths = least + min(1.0, spare) * (want - least)
        widths = widths * min(1.0, room / widths.sum()) + 2 * _BESIDE
        laid: list[list[Any]] = [[] for _ in cells]
        for line, row in zip(laid, cells, strict=True):
            for own, cell in row:
                size = smaller * own.fontSize
                fitting = ParagraphStyle("", parent=own, fontSize=size, leading=1.3 * size, spaceAfter=0)
                line += [self.blocks(cell, fitting, widths[len(line)]), *[""] * (_span(cell) - 1)]
            line += [""] * (count - len(line))
        first = rows[0][1]
        headed = ".head" in first.selectors or all(cell.tag == "th" for cell in first.nodes)
        look = [
            ("VALIGN", (0, 0), (-1, -1), "TOP"),
            ("LEFTPADDING", (0, 0), (-1, -1), 0),
            ("RIGHTPADDING", (0, 0), (-1, -1), 2 * _BESIDE),
            ("TOPPADDING", (0, 0), (-1, -1), _ABOVE),
            ("BOTTOMPADDING", (0, 0), (-1, -1), _ABOVE + 1),
            ("LINEBELOW", (0, 0), (-1, -2), 0.4, _LINE),
            *spans,
        ]
        return [_table(laid, widths.tolist(), look, int(headed and len(rows) > 1))]

    def _needs(self, style: ParagraphStyle, cell: _Node) -> tuple[float, float]:
        """In points, how wide a cell is in one line, and how wide it must be at least."""
        text, bars = _printable(cell.text).strip(), [node for node in cell.nodes if node.bar]
        parts = [text] if ".number" in cell.selectors and len(text) <= _NUMBER else text.split()
        line, *words = (pdfmetrics.stringWidth(part, style.fontName, 1.02 * style.fontSize) for part in (text, *parts))
        bar = _BAR * style.fontSize if bars else 0.0
        return max(line, bar), max(min(max(words, default=0.0), _LONGEST * style.fontSize), bar)

    def bar(self, node: _Node, size: float) -> Any:
        """A share of a whole from the left, or of a half from the middle."""
        long, high = _BAR * size, 0.6 * size
        drawn = shapes.Drawing(long, high + 1)
        drawn.add(shapes.Rect(0, 0, long, high, fillColor=_LINE, strokeColor=None))
        if node.tag == "progress":
            start, share, colour = 0.0, node.number("value") / node.number("max", 1.0), self.look(node)["accent-color"]
        else:
            (side,) = node.nodes
            look = self.look(side)
            share, colour = float(look["width"][:-1]) / 100, look["background"]
            start = 0.5 if "left" in look else 0.5 - share
        drawn.add(shapes.Rect(start * long, 0, share * long, high, fillColor=_colour(colour) or _INK, strokeColor=None))
        return drawn

    def cards(self, node: _Node, style: ParagraphStyle, width: float) -> Any:
        """As many beside each other as their pictures leave room for, but two at least."""
        widest = max((_size(picture)[0] for picture in node.all("img") if picture.picture), default=0)
        count = max(2, int(width / (_PIXEL * widest + 12)))
        cards = [self.blocks(card, self.styled(style, card), width / count - 12) for card in node.nodes]
        rows = [
            [*cards[i : i + count], *[""] * (count - len(cards[i : i + count]))] for i in range(0, len(cards), count)
        ]
        look = [
            ("VALIGN", (0, 0), (-1, -1), "TOP"),
            ("LEFTPADDING", (0, 0), (-1, -1), 0),
            ("BOTTOMPADDING", (0, 0), (-1, -1), 10),
        ]
        return _table(rows, [width / count] * count, look) if rows else platypus.Spacer(0, 0)

    def plot(self, node: _Node, width: float) -> Any:
        """An SVG of the few shapes that pages have."""
        *_, wide, high = map(float, node.attributes["viewbox"].split())
        scale = min(_PIXEL, width / wide, 0.8 * _HEIGHT / high)
        drawn = shapes.Drawing(scale * wide, scale * high)
        drawn.hAlign = "LEFT"
        # The ordinate of SVG points down.
        inside = shapes.Group(transform=(scale, 0, 0, scale, 0, 0))
        for shape in self.shapes(node, high):
            inside.add(shape)
        drawn.add(inside)
        return drawn

    def shapes(self, node: _Node, high: float) -> Iterator[Any]:
        for child in node.nodes:
            known, look = child.attributes, self.look(child)
            dash = look.get("stroke-dasharray")
            looks = {
                "fillColor": _paint(known.get("fill") or look.get("fill") or ("" if child.tag == "path" else "ink")),
                "fillOpacity": child.number("fill-opacity", 1.0),
                "strokeColor": _paint(known.get("stroke") or look.get("stroke", "")),
                "strokeWidth": child.number("stroke-width", float(look.get("stroke-width", 1))),
                "strokeDashArray": [float(part) for part in dash.split()] if dash else None,
            }
            if child.tag == "g":
                yield from self.shapes(child, high)
            elif child.tag == "circle":
                yield shapes.Circle(child.number("cx"), high - child.number("cy"), child.number("r"), **looks)
            elif child.tag == "rect":
                tall = child.number("height")
                yield shapes.Rect(
                    child.number("x"), high - child.number("y") - tall, child.number("width"), tall, **looks
                )
            elif child.tag == "polyline":
                points = [tuple(map(float, point.split(","))) for point in known["points"].split()]
                yield _path([("M" if i == 0 else "L", x, high - y) for i, (x, y) in enumerate(points)], looks)
            elif child.tag == "path":
                yield _path([(how, x, high - y) for how, x, y in _steps(known["d"])], looks)
            elif child.tag == "text":
                size = float((look.get("font-size") or look.get("font", "13px")).split("px")[0])
                yield shapes.String(
                    child.number("x"),
                    high - child.number("y"),
                    _printable(child.text),
                    fontName="MedXAI",
                    fontSize=_NARROWER * size,
                    fillColor=looks["fillColor"],
                    textAnchor=known.get("text-anchor", "start"),
                )


class _Heading(platypus.Paragraph):
    """One that is found in the list of bookmarks."""

    bookmark: tuple[str, str, int] | None = None
    """What it says, its key and its level."""

    def split(self, *room: float) -> list[Any]:
        parts: list[Any] = super().split(*room)
        for first in parts[:1]:
            first.bookmark = self.bookmark
        return parts

    def draw(self) -> None:
        if self.bookmark is not None:
            said, key, level = self.bookmark
            self.canv.bookmarkHorizontal(key, 0, self.height)
            self.canv.addOutlineEntry(said, key, level)
        super().draw()


class _Pages(platypus.Flowable):
    """The last on the paper: says how many pages there are, where each of them asks for it."""

    def wrap(self, *_room: float) -> tuple[float, float]:
        return 0.0, 0.0

    def draw(self) -> None:
        self.canv.beginForm("pages")
        _small(self.canv)
        self.canv.drawString(0, 0, str(self.canv.getPageNumber()))
        self.canv.endForm()


def _foot(canvas: Canvas, made_by: str, date: str) -> None:
    """What stands on every page."""
    canvas.setDateFormatter(lambda *_: date)
    canvas.saveState()
    _small(canvas)
    canvas.drawString(_MARGIN, 0.55 * _MARGIN, RESEARCH_ONLY)
    canvas.drawRightString(A4[0] - _MARGIN - 14, 0.55 * _MARGIN, f"{made_by} · page {canvas.getPageNumber()} of")
    canvas.translate(A4[0] - _MARGIN - 11, 0.55 * _MARGIN)
    canvas.doForm("pages")
    canvas.restoreState()


def _small(canvas: Canvas) -> None:
    canvas.setFont("MedXAI", 7.5)
    canvas.setFillColor(_FAINT)


def _together(printed: Sequence[Any]) -> Iterator[Any]:
    """Headings with what follows them; before a table there must be room for some of it, not for all."""
    for one, following in zip(printed, [*printed[1:], None], strict=False):
        if one.getKeepWithNext() and isinstance(following, platypus.Table):
            one.keepWithNext = False
            yield platypus.CondPageBreak(_HEIGHT / 4)
        yield one


def _table(rows: list[list[Any]], widths: list[float], look: list[Any], heads: int = 0) -> Any:
    return platypus.Table(rows, widths, repeatRows=heads, style=look, hAlign="LEFT", splitInRow=1, spaceAfter=6)


def _picture(node: _Node, width: float) -> Any:
    """Every pixel of it, on no more than the width and most of the height of a page."""
    wide, high = _size(node)
    scale = min(_PIXEL, width / wide, 0.85 * _HEIGHT / high)
    return platypus.Image(io.BytesIO(node.picture), scale * wide, scale * high, hAlign="LEFT")


def _size(picture: _Node) -> tuple[int, int]:
    return Image.open(io.BytesIO(picture.picture)).size


def _path(steps: Sequence[tuple[str, float, float]], looks: Mapping[str, Any]) -> Any:
    drawn = shapes.Path(**looks)
    for how, x, y in steps:
        (drawn.moveTo if how == "M" else drawn.lineTo)(x, y)
    return drawn


def _steps(said: str) -> Iterator[tuple[str, float, float]]:
    """Where the path of an SVG goes, of straight lines along the axes."""
    x = y = 0.0
    for how, numbers in re.findall(r"([MHVhv])([^MHVhv]*)", said):
        values = [float(number) for number in numbers.split()]
        if how == "M":
            x, y = values
        elif how in "Hh":
            x = values[0] + (x if how == "h" else 0.0)
        else:
            y = values[0] + (y if how == "v" else 0.0)
        yield how.replace("h", "L"), x, y


def _in_line(child: _Node | str) -> bool:
    return isinstance(child, str) or (child.tag in _INLINE and not child.bar)


def _span(cell: _Node) -> int:
    return int(cell.number("colspan", 1))


def _properties(said: str) -> dict[str, str]:
    pairs = (part.partition(":") for part in said.split(";") if ":" in part)
    return {name.strip(): value.strip() for name, _, value in pairs}


def _colour(said: str | None) -> Any:
    """None for what is no colour in hexadecimal digits."""
    if not re.fullmatch(r"#([0-9a-f]{3}|[0-9a-f]{6})", said or ""):
        return None
    return HexColor(said if said and len(said) == 7 else "#" + "".join(2 * digit for digit in (said or "")[1:]))


def _paint(said: str) -> Any:
    return _INK if said in ("ink", "currentColor") else _colour(said)


def _printable(text: str) -> str:
    """In letters that the font has."""
    known = pdfmetrics.getFont("MedXAI").face.charToGlyph
    composed = unicodedata.normalize("NFC", text)
    return "".join(letter if letter in _SPACES or ord(letter) in known else _BOX for letter in composed)


def _whole(text: str) -> str:
    """A number with its unit in one line; more than that is text after all."""
    return text.replace(" ", "\xa0") if len(text) <= _NUMBER else text


def _date(said: str) -> str:
    """As PDF writes them; empty for none."""
    if not said:
        return ""
    moment = datetime.fromisoformat(said)
    return f"{moment.replace(tzinfo=moment.tzinfo or timezone.utc).astimezone(timezone.utc):D:%Y%m%d%H%M%SZ}"


def _register() -> None:
    # Bytes, not letters that stand for them: a fifth smaller.
    rl_config.useA85 = 0
    if "MedXAI" in pdfmetrics.getRegisteredFontNames():
        return
    for name, file in {"MedXAI": "", "MedXAI-Bold": "-Bold", "MedXAI-Oblique": "-Oblique"}.items():
        pdfmetrics.registerFont(TTFont(name, path(f"Fonts/DejaVuSans{file}.ttf")))
    pdfmetrics.registerFontFamily("MedXAI", "MedXAI", "MedXAI-Bold", "MedXAI-Oblique", "MedXAI-Bold")
