"""The page of an audit: what each check says, what was not asked, and pictures of what the network looks at by site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

from MedXAILib.audit.audit import CHECKS, WORDS, Audit
from MedXAILib.audit.outcome import Picture
from MedXAILib.grid import corners, middle, transform
from MedXAILib.report.methods import title
from MedXAILib.report.montage import Look
from MedXAILib.report.page import RESEARCH_ONLY, document, image, lamp, listed, origin
from MedXAILib.trust.finding import Finding
from MedXAILib.volume import Volume

_READING = (
    "Cases are compared only with cases of their own class: a site may see sicker patients than another, and no check "
    "takes that for a shortcut. What chance gives is measured by dealing the sites out anew within classes, and every "
    "p is corrected for all that was asked on this page (Holm).",
    "An alarm says that the network's answers or maps differ by site beyond the class, by as much as stated or more. A "
    "warning says that the network can see the site, not that it uses it. No sign means that as much as stated would "
    "stand out from chance; where cases are too few for that, the check cannot say.",
    "Sites may differ within a class for good reasons, such as larger lesions. That looks the same to all checks but "
    "the one that moves backgrounds (given masks that are made alike): name what may differ (--within) to compare like "
    "with like.",
    "Nothing here says that the network is right, and what no column names is not looked for.",
)


def page(audit: Audit, made: Mapping[str, Any]) -> str:
    """The HTML page, UTF-8; `made` says where the cohort comes from."""
    by, network, method = (
        ", ".join(map(escape, made["by"])),
        made["model"]["name"] or "A network",
        title(made["method"]),
    )
    parts = [
        f"<h1>Does the network lean on the {by}?</h1>",
        f"<p class=lead>{escape(f'{network}, {audit.cases} cases, maps of {method}')}.</p>",
        f"<p class=warning>{RESEARCH_ONLY}</p>",
        f"<p><strong>{_verdict(audit)}</strong></p>",
        listed(made["notes"]),
        *(_finding(found, audit.tables[found.check], audit.pictures[found.check]) for found in audit.findings),
        _left_out(audit),
        f"<h2>How to read it</h2>{listed(_READING)}",
        _behind(audit, made),
    ]
    return document(f"Audit by {', '.join(made['by'])}", parts, _STYLE)


def _verdict(audit: Audit) -> str:
    counts = {light: sum(found.light == light for found in audit.findings) for light in WORDS}
    if audit.alarm:
        return f"{counts['poor']} of {len(audit.findings)} checks raise an alarm: a shortcut is likely."
    if not audit.findings:
        return "Nothing could be asked, and nothing is known: see below."
    said = "No alarm, but a warning: see below" if counts["fair"] else "No alarm"
    silent = {"had too few cases to say": counts[None], "could not be asked": len(audit.left_out)}
    return "; ".join([said, *(f"{count} of the checks {why}" for why, count in silent.items() if count)]) + "."


def _finding(found: Finding, table: Sequence[Mapping[str, Any]], pictures: Sequence[Picture]) -> str:
    column = escape(found.check.partition(":")[2])
    shown = "".join(_row(group, list(alike)) for group, alike in groupby(pictures, key=lambda one: one.group))
    numbers = _table(table) if len(table) <= _ROWS else ""
    said = f"<p>{lamp(*WORDS[found.light])}: {escape(found.sentence)}</p>"
    return f"<h2>{escape(found.title)} ({column})</h2>{said}{numbers}{shown}"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    heads = "".join(f"<th>{escape(head)}</th>" for head in rows[0])
    cells = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row.values()] for row in rows]
    body = "".join(f"<tr>{''.join(f'<td class=number>{escape(cell)}</td>' for cell in row)}</tr>" for row in cells)
    return f"<table class=numbers><tr>{heads}</tr>{body}</table>"


def _row(group: str, pictures: Sequence[Picture]) -> str:
    cards, look = [], None
    for one in pictures:
        volume = Volume(one.scan[None].float().cpu(), _straight(one.affine))
        centre = middle(volume.shape, volume.affine)
        field = float(np.ptp(transform(volume.affine, corners(volume.shape)), axis=0).max())
        focus = [*centre[:2], *volume.to_point(one.focus)[2:]]
        look = look or Look.at(volume, focus, field, _PIXELS)
        heat = None if one.heat is None else one.heat[None].float().cpu()
        drawn = image(look.draw(volume, focus, heat), f"{group}: {one.title}")
        cards.append(f"<figure>{drawn}<figcaption>{escape(one.title)}</figcaption></figure>")
    return f"<h3>{escape(group)}</h3><div class=shown>{''.join(cards)}</div>"


def _straight(affine: np.ndarray) -> np.ndarray:
    """The affine with its axes along those of the patient that are nearest: an oblique patch is cut along its own
    planes."""
    axes = affine[:-1, :-1]
    length = np.linalg.norm(axes, axis=0)
    found = np.eye(len(affine))
    found[:-1, :-1] = 0
    for row, column in zip(*linear_sum_assignment(-np.abs(axes / length)), strict=True):
        found[row, column] = np.sign(axes[row, column]) * length[column]
    return found


def _left_out(audit: Audit) -> str:
    lines = [
        f"{CHECKS[key.partition(':')[0]].title} ({key.partition(':')[2]}): {why}" for key, why in audit.left_out.items()
    ]
    return f"<h2>Not asked</h2>{listed(lines)}" if lines else ""


def _behind(audit: Audit, made: Mapping[str, Any]) -> str:
    numbers = "".join(
        f"<tr><th>{escape(found.check)}</th><td>{escape(name)}</td><td class=number>{value:.3g}</td></tr>"
        for found in audit.findings
        for name, value in found.values.items()
    )
    return f"<details><summary>The numbers behind it</summary><table>{numbers}</table></details>{origin(made.items())}"


# Pixels of a picture, and rows of a table that is shown.
_PIXELS, _ROWS = 220, 20

_STYLE = """
.numbers { margin: .3rem 0; font-size: .85rem; color: var(--faint); }
h3 { margin: 1rem 0 .3rem; font-size: 1rem; } .shown { display: flex; flex-wrap: wrap; gap: .8rem; }
.shown figure { margin: 0; } .shown img { width: 220px; }
figcaption { max-width: 220px; font-size: .85rem; color: var(--faint); overflow-wrap: anywhere; }
"""
