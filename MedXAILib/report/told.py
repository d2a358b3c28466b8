"""What was told in words or by concepts, made ready for people: the page, with a picture of each of its maps."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image

from MedXAILib.caption import Caption
from MedXAILib.concept_scores import Concept, ConceptScores
from MedXAILib.explanation import Explanation, ImageFormat
from MedXAILib.model import Prediction
from MedXAILib.report.case import PAGE
from MedXAILib.report.methods import question, title
from MedXAILib.report.montage import montage
from MedXAILib.report.page import RESEARCH_ONLY, checks, document, listed, picture, provenance, said, trusted
from MedXAILib.trust.card import TrustCard
from MedXAILib.volume import Volume

UNSURE = 0.5
"""Words of less confidence are marked."""

Told = Caption | ConceptScores


def write_told(
    folder: Path,
    volume: Volume,
    told: Explanation,
    prediction: Prediction | None = None,
    card: TrustCard | None = None,
    image_format: ImageFormat = "nrrd",
) -> None:
    """Fill the empty `folder` with an explanation of `volume` in words or by concepts, its trust card, and its page;
    others than these two kinds have no page."""
    told.save(folder, image_format)
    if card is not None:
        card.save(folder)
    if not isinstance(told, Caption | ConceptScores):
        return
    pictures = []
    for i, one in enumerate(told.seen()):
        shown = montage(volume, one, title=f'Where "{one.provenance.target_label}" is seen')
        shown.save(folder / f"map-{i}.png", optimize=True)
        pictures.append((one.provenance.target_label, shown))
    (folder / PAGE).write_text(told_page(told, pictures, prediction, card), encoding="utf-8")


def told_page(
    told: Told,
    pictures: Sequence[tuple[str, Image.Image]],
    prediction: Prediction | None = None,
    card: TrustCard | None = None,
) -> str:
    """The HTML page, UTF-8; `pictures` are of its maps, each with what it is of."""
    made = told.provenance
    name = title(made.method)
    heading = "What the network says" if isinstance(told, Caption) else f"Why “{made.target_label}”, by concepts?"
    asked = f"{name}, asked of {made.model.get('name') or 'a network'} about "
    asked += Path(made.volume.get("source") or "a scan").name
    parts = [
        f"<h1>{escape(heading)}</h1>",
        f"<p class=lead>{escape(asked)}.</p>",
        f"<p class=warning>{RESEARCH_ONLY}</p>",
        _caption(told) if isinstance(told, Caption) else _concepts(told),
        said(prediction, made.target_label),
        *(f"<h2>Where “{escape(of)}” is seen</h2>{picture(shown, of)}" for of, shown in pictures),
        trusted(card),
        _reading(told, bool(pictures)),
        checks(told),
        provenance(told),
    ]
    return document(f"{heading}: {name}", parts, _STYLE)


def _caption(told: Caption) -> str:
    html, position = "", 0
    for word in sorted(told.words, key=lambda word: word.start):
        if word.start < position:
            continue
        kind = "unsure" if word.confidence is not None and word.confidence < UNSURE else "sure"
        tip = "" if word.confidence is None else f"confidence {word.confidence:.0%}"
        html += escape(told.text[position : word.start])
        html += f'<span class="{kind} {"seen" * (word.map is not None)}" title="{tip}">{escape(word.text)}</span>'
        position = word.end
    rows = [
        f"<tr><th>{escape(word.text)}</th><td class=number>{sure:.2f}</td><td>{_bar(sure)}</td></tr>"
        for word in told.words
        if (sure := word.confidence) is not None
    ]
    table = f"<details><summary>How sure each word is</summary><table>{''.join(rows)}</table></details>" if rows else ""
    return f"<p class=told>{html}{escape(told.text[position:])}</p>{table}"


def _concepts(told: ConceptScores) -> str:
    names = list(dict.fromkeys(name for concept in told.concepts for name in concept.numbers))
    valued = any(concept.value is not None for concept in told.concepts)
    layered = len({concept.layer for concept in told.concepts}) > 1
    heads = ["concept", *["layer"] * layered, *["in this scan"] * valued, told.scored, "", *names]
    most = max((abs(c.score) + (c.interval or 0) for c in told.concepts if c.score is not None), default=0) or 1
    rows = "".join(_row(concept, names, valued, layered, most) for concept in told.concepts)
    head = "".join(f"<td>{escape(name)}</td>" for name in heads)
    text = f"<p class=told>{escape(told.text)}</p>" if told.text else ""
    return f"{text}<div class=wide><table><tr class=head>{head}</tr>{rows}</table></div>{_alike(told)}"


def _row(concept: Concept, names: Sequence[str], valued: bool, layered: bool, most: float) -> str:
    cells = [f"<td>{escape(concept.layer)}</td>"] * layered
    if valued:
        value = "" if concept.value is None else f"{concept.value:.3g} {concept.unit}"
        cells.append(f"<td class=number>{escape(value)}</td>")
    if concept.score is None:
        cells.append(f"<td colspan=2 class=refused>{escape(concept.refused)}</td>")
    else:
        interval = "" if concept.interval is None else f" ± {concept.interval:.2f}"
        cells.append(f"<td class=number>{concept.score:+.2f}{interval}</td>")
        cells.append(f"<td>{_signed_bar(concept.score / most)}</td>")
    numbers = (concept.numbers.get(name) for name in names)
    cells += [f"<td class=number>{'' if number is None else f'{number:.3g}'}</td>" for number in numbers]
    return f"<tr><th>{escape(concept.name)}</th>{''.join(cells)}</tr>"


def _bar(share: float) -> str:
    return f'<progress max=1 value="{share:.4f}"></progress>'


def _signed_bar(share: float) -> str:
    """From the middle to the right for what speaks for the answer, and to the left for what speaks against it."""
    side = "for" if share >= 0 else "against"
    return f'<span class=axis><span class={side} style="width:{50 * abs(share):.1f}%"></span></span>'


def _alike(told: ConceptScores) -> str:
    if told.alike is None or len(told.concepts) < 2:
        return ""
    names = [escape(concept.name) for concept in told.concepts]
    rows = "".join(
        f"<tr><th>{name}</th>{''.join(f'<td class=number>{value:.2f}</td>' for value in row)}</tr>"
        for name, row in zip(names, told.alike, strict=True)
    )
    head = "".join(f"<td>{name}</td>" for name in ["", *names])
    return (
        "<details><summary>How alike the concepts are to the network (cosine; near 1, one may stand for the other)"
        f"</summary><div class=wide><table><tr class=head>{head}</tr>{rows}</table></div></details>"
    )


def _reading(told: Told, pictured: bool) -> str:
    lines = [f"{title(told.provenance.method)} asks: {question(told.provenance.method)}"]
    if isinstance(told, Caption):
        lines += [
            "The text is made by a network: check every word against the image. A fluent sentence is no sign that it "
            "is right, and readers believe text more than they should.",
            f"Grey italics: the network was less than {UNSURE:.0%} sure of the word after the words before it.",
        ]
    else:
        lines.append(
            "Bars to the right speak for the answer, bars to the left against it. A concept without a score could not "
            "be told from others by the network, or not reliably: that is no sign that it does not matter."
        )
    if pictured:
        lines.append(
            "The pictures show the scan above and the same planes with the map below; colours are scaled to each map. "
            "A coloured place is one that the network used. It does not mean that there is disease."
        )
    return f"<h2>How to read it</h2>{listed(lines)}"


_STYLE = """
.told { font-size: 1.2rem; line-height: 1.6; } .seen { border-bottom: 2px solid #b45309; }
.unsure { font-style: italic; color: var(--faint); } .refused { color: var(--faint); }
.wide { overflow-x: auto; } .wide td { white-space: nowrap; } .wide .refused { white-space: normal; }
.head td { color: var(--faint); font-size: .85rem; }
.axis { position: relative; display: block; width: 14rem; height: .8rem; margin-top: .35rem;
        background: linear-gradient(var(--line), var(--line)) center / 1px 100% no-repeat; }
.axis span { position: absolute; top: 0; bottom: 0; border-radius: 2px; }
.for { left: 50%; background: #b45309; } .against { right: 50%; background: #2f7fd6; }
"""
