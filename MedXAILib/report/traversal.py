"""The page of a traversal: the images as a strip, what the network says along it, and the map of all cases."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from MedXAILib.grid import corners, middle, transform
from MedXAILib.report.montage import Look
from MedXAILib.report.sheet import Figure, Sheet
from MedXAILib.traversal import Step, Traversal
from MedXAILib.volume import Volume

_MOST = 9
_COLOURS = ("#b45309", "#2f7fd6", "#3f9142", "#8e44ad", "#c0392b", "#16a085")


def of_traversal(_volume: Volume, told: Traversal) -> Sheet:
    """The steps as images, with what changes between them and what the network says."""
    heading = f"How would it have to look otherwise, {told.along}?"
    parts = [f"<p class=told>{escape(told.text)}</p>"] if told.text else []
    parts += [_table(told), _map(told)]
    reading = [
        "The images are made by a generative network: they are no scans of anybody. Step 0 is the scan itself. The "
        "lower row shows what was added (orange) or taken away (blue).",
        "Where a step is called strange, no case that the generative network learnt from is like it: what the network "
        "says there means little.",
        "It shows what would change the answer of the network, not what would change in a patient.",
    ]
    strip = Figure("steps", "Step by step", f"the steps {told.along}", _strip(told))
    return Sheet(heading, "".join(parts), reading, [strip], _STYLE)


def _strip(told: Traversal) -> Image.Image:
    scan = Volume(told.images[told.here][None], told.affine)
    field = float(np.ptp(transform(told.affine, corners(scan.shape)), axis=0)[:2].max())
    focus = middle(scan.shape, scan.affine).tolist()
    chosen = np.unique(np.linspace(0, len(told.steps) - 1, min(_MOST, len(told.steps))).round().astype(int))
    gap, head, side = 4, 40, 146
    strip = Image.new("RGB", (len(chosen) * (side + gap) - gap, head + 2 * side + gap), (16, 16, 18))
    draw, font = ImageDraw.Draw(strip), ImageFont.load_default(13)
    look = Look.at(scan, focus, field, side)
    for column, i in enumerate(chosen.tolist()):
        one, x = Volume(told.images[i][None], told.affine), column * (side + gap)
        strip.paste(look.draw(one, focus), (x, head))
        changed = one.data - scan.data
        strip.paste(look.draw(one, focus, changed if bool(changed.any()) else None), (x, head + side + gap))
        step = told.steps[i]
        draw.text((x + 2, 3), f"{step.position:+.2g}", (235, 235, 235), font)
        said = ("strange: " if step.strange else "") + (_said(step) or f"{step.value:+.2f}")
        draw.text((x + 2, 20), said, (255, 183, 87) if i == told.flipped else (165, 165, 165), font)
    return strip


def _said(step: Step) -> str:
    """The first of the names with the highest score."""
    if not step.scores:
        return ""
    name = max(step.scores, key=step.scores.__getitem__)
    return f"{name} {step.scores[name]:.2f}"


def remarks(told: Traversal, step: int) -> str:
    """What is special about a step."""
    special = ["this scan"] * (step == told.here) + ["the answer flips"] * (step == told.flipped)
    return ", ".join(special + ["strange"] * told.steps[step].strange)


def quantities(told: Traversal) -> dict[str, list[str]]:
    """What is known of each step, by name: what is explained, the network's scores, and other numbers."""
    scores = dict.fromkeys(name for step in told.steps for name in step.scores)
    numbers = dict.fromkeys(name for step in told.steps for name in step.numbers)
    found = {f"{told.provenance.target_label}, explained": [f"{step.value:+.2f}" for step in told.steps]}
    found |= {name: [_if_known("{:.2f}", step.scores.get(name)) for step in told.steps] for name in scores}
    return found | {name: [_if_known("{:.3g}", step.numbers.get(name)) for step in told.steps] for name in numbers}


def _if_known(form: str, value: float | None) -> str:
    return "" if value is None else form.format(value)


def _table(told: Traversal) -> str:
    known = quantities(told)
    rows = []
    for i, step in enumerate(told.steps):
        cells = "".join(f"<td class=number>{values[i]}</td>" for values in known.values())
        marked = " class=chosen" if i in (told.here, told.flipped) else ""
        rows.append(f"<tr{marked}><th>{step.position:+.2g}</th><td>{remarks(told, i)}</td>{cells}</tr>")
    head = "".join(f"<td>{escape(name)}</td>" for name in ("step", "", *known))
    return f"<div class=wide><table><tr class=head>{head}</tr>{''.join(rows)}</table></div>"


def _map(told: Traversal) -> str:
    """All cases in two dimensions, and the way of the steps among them."""
    if not told.cohort or told.path is None:
        return ""
    points = np.array([(place.x, place.y) for place in told.cohort] + told.path.tolist())
    low, span = points.min(0), np.ptp(points, axis=0).clip(1e-9)
    placed = (12 + (points - low) / span * 376) * [1, -1] + [0, 400]
    labels = sorted({place.label for place in told.cohort})
    colours = {label: _COLOURS[i % len(_COLOURS)] for i, label in enumerate(labels)}
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colours[place.label]}" fill-opacity=".6">'
        f"<title>{escape(place.label)}, {escape(place.uid)}</title></circle>"
        for place, (x, y) in zip(told.cohort, placed, strict=False)
    )
    way = _way(placed[len(told.cohort) :].tolist(), told.here)
    legend = "".join(f'<li><span style="color:{colours[label]}">●</span> {escape(label)}</li>' for label in labels)
    return (
        f'<h2>Among all cases</h2><svg viewBox="0 0 400 400" class=cohort role=img aria-label="All cases">{dots}{way}'
        f"</svg><ul class=lights>{legend}<li>○ this scan, and the line its way</li></ul>"
    )


def _way(points: Sequence[Sequence[float]], here: int) -> str:
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    x, y = points[here]
    return (
        f'<polyline points="{line}" fill="none" stroke="currentColor" stroke-width="1.5"/>'
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="none" stroke="currentColor" stroke-width="2"/>'
    )


_STYLE = """
.cohort { width: 26rem; max-width: 100%; border: 1px solid var(--line); border-radius: 6px; }
"""
