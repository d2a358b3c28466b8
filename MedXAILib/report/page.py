"""The page one can hand to a colleague: what the network said, the picture, how to read it, where it comes from.

It is one file without scripts or links, so that it opens anywhere and asks nobody for anything.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image

from MedXAILib import __version__
from MedXAILib.explanation import Explanation, SaliencyMap
from MedXAILib.model import Prediction
from MedXAILib.registry import EXPLAINERS
from MedXAILib.report import interval
from MedXAILib.report.localisation import Localisation
from MedXAILib.report.methods import question, title
from MedXAILib.report.montage import FAINTEST
from MedXAILib.report.residuals import residual
from MedXAILib.trust import agreement
from MedXAILib.trust.card import CHECKS, TrustCard
from MedXAILib.trust.finding import COLOURS

RESEARCH_ONLY = "For research only. Not for diagnosis or treatment."


@dataclass(frozen=True)
class Shown:
    """A map with its picture and, where there was a segmentation, how well it meets that."""

    explanation: SaliencyMap
    picture: Image.Image
    localisation: Localisation | None = None
    card: TrustCard | None = None


def page(shown: Shown, prediction: Prediction | None = None, others: Sequence[Shown] = (), caution: str = "") -> str:
    """The HTML page of an explanation, UTF-8.

    `others` are maps of the same question by other methods, to compare; `caution` is what everybody must know who reads
    an answer of this network.
    """
    made = shown.explanation.provenance
    parts = [
        f"<h1>Why “{escape(made.target_label)}”?</h1>",
        f"<p class=lead>{escape(title(made.method))}, asked of {escape(str(made.model.get('name') or 'a network'))} "
        f"about {escape(Path(made.volume.get('source') or 'a scan').name)}.</p>",
        f"<p class=warning>{RESEARCH_ONLY} {escape(caution)}</p>",
        _partial(shown.explanation),
        said(prediction, made.target_label),
        _picture(shown),
        _meets(shown.localisation),
        trusted(shown.card),
        _reading(shown.explanation),
        checks(shown.explanation),
        _others(shown, others),
        provenance(shown.explanation),
    ]
    return document(f"Why {made.target_label}: {title(made.method)}", parts, created=made.created)


def document(name: str, parts: Iterable[str], style: str = "", created: str = "") -> str:
    """The HTML page called `name`, in the look of all pages; `style` is what else its `parts` need, and `created` (ISO
    8601) when what it tells was made."""
    date = f'<meta name="date" content="{escape(created)}">\n' if created else ""
    body = "\n".join(part for part in parts if part)
    return _PAGE.format(title=escape(name), version=__version__, date=date, style=_STYLE + style, body=body)


def _partial(explanation: SaliencyMap) -> str:
    if not explanation.provenance.partial:
        return ""
    said = "This map is partial: it was stopped early, and what was not reached has no colour."
    return f"<p class=warning><strong>{said}</strong></p>"


def said(prediction: Prediction | None, label: str) -> str:
    """What the network said, `label` above all."""
    if prediction is None or not prediction.scores:
        return ""
    rows = []
    for name, score in sorted(prediction.scores.items(), key=lambda item: -item[1]):
        # A regression's value is not a share of anything.
        bar = f'<progress max=1 value="{score:.4f}"></progress>' if 0 <= score <= 1 else ""
        chosen = ' class="chosen"' if name == label else ""
        rows.append(f"<tr{chosen}><th>{escape(name)}</th><td class=number>{score:.3f}</td><td>{bar}</td></tr>")
    return f"<h2>What the network said</h2><table>{''.join(rows)}</table>"


def _picture(shown: Shown) -> str:
    made = shown.explanation.provenance
    of = f"Planes through the peak of the map of {title(made.method)} for {made.target_label}"
    return f"<figure>{image(shown.picture, of)}</figure>"


def image(shown: Image.Image, of: str) -> str:
    """A picture within the page; `of` is what it shows."""
    kept = io.BytesIO()
    shown.save(kept, "PNG", optimize=True)
    coded = base64.b64encode(kept.getvalue()).decode()
    return f'<img alt="{escape(of, quote=True)}" src="data:image/png;base64,{coded}">'


def _meets(localisation: Localisation | None) -> str:
    if localisation is None:
        return ""
    return f"<h2>Does it meet the segmentation?</h2>{listed(localisation.words())}"


def trusted(card: TrustCard | None) -> str:
    """What a trust card says; nothing when there is none."""
    if card is None:
        return ""
    items, rows = [], []
    for found in card.findings:
        items.append(f"<li>{lamp(*COLOURS[found.light])}: {escape(found.title)} {escape(found.sentence)}</li>")
        for name, value in found.values.items():
            cells = f"<td>{escape(name)}</td><td class=number>{value:.3g}</td>"
            rows.append(f"<tr><th>{escape(found.check)}</th>{cells}</tr>")
    missing = [f"Left out: {CHECKS[name].title} ({why})." for name, why in card.left_out.items()]
    numbers = f"<details><summary>The numbers behind it</summary><table>{''.join(rows)}</table></details>"
    said = "<p>The lights are about the explanation: none says that the answer is right.</p>"
    lights = f"<ul class=lights>{''.join(items)}</ul>{said}"
    return f"<h2>How far can it be trusted?</h2>{lights}{listed(missing)}{numbers}"


def lamp(word: str, colour: str) -> str:
    """A light in its colour, and what it is called."""
    return f'<span style="color:{colour}" aria-hidden=true>●</span> <strong>{word}</strong>'


def _reading(explanation: SaliencyMap) -> str:
    made = explanation.provenance
    sides = (
        "Orange and yellow places speak for the answer, blue places against it; where there is no colour, neither."
        if explanation.signed
        else "The brighter the colour, the more a place matters to the answer. What speaks against it is not shown."
    )
    lines = [
        "Above is the scan alone, below the same planes with the map; the ticks point at the map's peak. The patient's "
        "right is on the left, and all planes have one scale.",
        f"{sides} Colours are scaled to each map: do not compare their brightness between maps, and what is "
        f"below {FAINTEST:.0%} of the largest value has none.",
        "A coloured place is one that this network used. It does not mean that there is disease, nor that the answer "
        "is right: a network can be wrong for a good-looking reason, and right for a bad one.",
        "If the colour lies where nothing explains the answer (the skin, a tube, the edge of the scan), distrust the "
        "answer.",
    ]
    if made.method in EXPLAINERS:
        taxonomy = EXPLAINERS[made.method].taxonomy
        lines += [
            f"{title(made.method)} asks: {question(made.method)}",
            f"Its strengths: {taxonomy.strengths}.",
            f"Its limits: {taxonomy.limits}.",
        ]
    return f"<h2>How to read it</h2>{listed(lines)}"


def checks(explanation: Explanation) -> str:
    """By how much an explanation misses what theory demands of it, and its notes."""
    meant = [(residual(name), value) for name, value in explanation.residual.items()]
    items = [f'<li><abbr title="{escape(r.help)}">{escape(r.sentence(value))}</abbr>.</li>' for r, value in meant]
    lines = list(explanation.provenance.notes)
    if isinstance(explanation, SaliencyMap) and explanation.interval is not None:
        sure = interval.in_words(explanation.data.numpy(), explanation.interval.numpy())
        lines = [f"{sure}."] * bool(sure) + lines
    checks = f"<ul>{''.join(items)}</ul>" if items else ""
    return f"<h2>Checks and notes</h2>{checks}{listed(lines)}" if items or lines else ""


def _others(shown: Shown, others: Sequence[Shown]) -> str:
    if not others:
        return ""
    found = agreement.judge([one.explanation for one in (shown, *others)])
    agree = f"<ul class=lights><li>{lamp(*COLOURS[found.light])}: {escape(found.sentence)}</li></ul>"
    parts = [f"<h2>The same question, asked in other ways</h2>{agree}"]
    for other in others:
        method = other.explanation.provenance.method
        words = other.localisation.words() if other.localisation else []
        parts.append(
            f"<h3>{escape(title(method))}</h3><p>{escape(question(method))}</p>{_picture(other)}{listed(words)}"
        )
    return "".join(parts)


def provenance(explanation: Explanation) -> str:
    """Where an explanation comes from, behind a fold."""
    rows: list[tuple[str, object]] = []
    for name, value in explanation.provenance.model_dump(mode="json").items():
        if isinstance(value, dict):
            rows += [(f"{name}: {key}", item) for key, item in value.items()]
        elif name != "notes":
            rows.append((name, value))
    return origin((name.replace("_", " "), value) for name, value in rows)


def origin(rows: Iterable[tuple[str, object]]) -> str:
    """Where what is on a page comes from, behind a fold."""
    cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(_plain(value))}</td></tr>" for name, value in rows)
    return f"<details><summary>Where this comes from</summary><table>{cells}</table></details>"


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def listed(lines: Iterable[str]) -> str:
    """Lines as a list; nothing when there are none."""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #fff; --faint: #63686f; --line: #d9dce0; --warn: #8a4b00; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8ea; --paper: #141416; --faint: #a0a4aa; --line: #34363b; --warn: #ffb757; }
}
body { margin: 0 auto; padding: 2rem 1rem; max-width: 82rem; color: var(--ink); background: var(--paper);
       font: 1rem/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.8rem; overflow-wrap: anywhere; } h2 { margin: 2rem 0 .5rem; font-size: 1.25rem; }
p, li { max-width: 50rem; } .lead { margin: .3rem 0; color: var(--faint); } .warning { color: var(--warn); }
figure { margin: 1.5rem 0; } img { display: block; width: 100%; max-width: 1308px; height: auto; border-radius: 6px; }
table { border-collapse: collapse; } th, td { padding: .25rem 1rem .25rem 0; text-align: left; vertical-align: top; }
th { font-weight: normal; } td { overflow-wrap: anywhere; } tr + tr { border-top: 1px solid var(--line); }
.lights { list-style: none; padding-left: 0; } .lights li { margin: .4rem 0; }
.number { font-variant-numeric: tabular-nums; } .chosen { font-weight: bold; } .chosen th { font-weight: bold; }
progress { width: 14rem; height: .8rem; accent-color: #b45309; }
summary { margin-top: 2rem; cursor: pointer; color: var(--faint); }
details table { margin-top: .5rem; font-size: .85rem; color: var(--faint); }
@media print { body { padding: 0; max-width: none; color: #000; background: #fff; } figure { break-inside: avoid; } }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="generator" content="MedXAI {version}">
{date}<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
