"""The page of what is told in words or by concepts, with a picture of each of its maps."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from MedXAILib.caption import Caption
from MedXAILib.concept_scores import Concept, ConceptScores
from MedXAILib.explanation import SaliencyMap
from MedXAILib.report.montage import montage
from MedXAILib.report.sheet import Figure, Sheet
from MedXAILib.volume import Volume

UNSURE = 0.5
"""Words of less confidence are marked."""


def of_caption(volume: Volume, told: Caption) -> Sheet:
    """What the network says, every word with how sure it is and where it is seen."""
    reading = [
        "The text is made by a network: check every word against the image. A fluent sentence is no sign that it "
        "is right, and readers believe text more than they should.",
        f"Grey italics: the network was less than {UNSURE:.0%} sure of the word after the words before it.",
    ]
    return _sheet("What the network says", _caption(told), reading, volume, told.seen())


def of_concepts(volume: Volume, told: ConceptScores) -> Sheet:
    """Concepts, each with its score as a bar."""
    reading = [
        "Bars to the right speak for the answer, bars to the left against it. A concept without a score could not "
        "be told from others by the network, or not reliably: that is no sign that it does not matter."
    ]
    heading = f"Why “{told.provenance.target_label}”, by concepts?"
    return _sheet(heading, _concepts(told), reading, volume, told.seen())


def _sheet(heading: str, body: str, reading: list[str], volume: Volume, seen: Sequence[SaliencyMap]) -> Sheet:
    figures = []
    for i, one in enumerate(seen):
        of = one.provenance.target_label
        picture = montage(volume, one, title=f'Where "{of}" is seen')
        figures.append(
            Figure(f"map-{i}", f"Where “{of}” is seen", f"Planes through the peak of the map of {of}", picture)
        )
    if figures:
        reading.append(
            "The pictures show the scan above and the same planes with the map below; colours are scaled to each map. "
            "A coloured place is one that the network used. It does not mean that there is disease."
        )
    return Sheet(heading, body, reading, figures, _STYLE)


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


_STYLE = """
.seen { border-bottom: 2px solid #b45309; }
.unsure { font-style: italic; color: var(--faint); } .refused { color: var(--faint); }
.wide .refused { white-space: normal; }
.axis { position: relative; display: block; width: 14rem; height: .8rem; margin-top: .35rem;
        background: linear-gradient(var(--line), var(--line)) center / 1px 100% no-repeat; }
.axis span { position: absolute; top: 0; bottom: 0; border-radius: 2px; }
.for { left: 50%; background: #b45309; } .against { right: 50%; background: #2f7fd6; }
"""
