"""The page of a comparison of methods over a set of cases: every number in a plot, the lights, the table, and what was
refused and why. Like the page of an explanation, it is one file without scripts or links; its plots are SVG.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from html import escape
from typing import Any

from MedXAILib.report.methods import title
from MedXAILib.report.page import RESEARCH_ONLY, document
from MedXAILib.report.plot import ABOVE, BELOW, NAMES, PLOT, ROW, STYLE, Axis, beside, figure, text
from MedXAILib.trust.card import CHECKS
from MedXAILib.trust.finding import COLOURS

Rows = Sequence[Mapping[str, Any]]
"""Of the table of `evaluate`."""
Results = Mapping[str, Sequence[Mapping[str, Any]]]
"""By method, those of the cases."""


@dataclass(frozen=True)
class Number:
    """A number `name` of the table as it is drawn: what it is called, what it says, and whether `more` is better.

    `most` is what it can be at most, `blind` what a map has by chance. Costs, which have a `unit` and are the number
    times `scale`, span orders of magnitude, so that their axis is logarithmic; below `least` they are nothing.
    """

    name: str
    title: str
    says: str
    more: bool = True
    most: float = 1.0
    blind: float | None = None
    unit: str = ""
    scale: float = 1.0
    least: float = 0.0

    def of(self, row: Mapping[str, Any]) -> tuple[float, float]:
        """Its mean in a row that has it, and half the width of the 95 % confidence interval."""
        return row[self.name] * self.scale, row[f"{self.name} ±"] * self.scale

    def in_words(self, row: Mapping[str, Any]) -> str:
        """The same, to be read."""
        mean, half = self.of(row)
        if self.unit and mean < self.least:
            return f"under {self.least:g} {self.unit}"
        digits = ".2g" if self.unit else ".2f"
        sure = f" ± {half:{digits}}" if math.isfinite(half) else ""
        return f"{mean:{digits}}{sure} {self.unit}".rstrip()


NUMBERS = {
    "Is it right?": (
        Number("validity: pointing", "Hits", "How often the strongest place lies in the segmentation"),
        Number("validity: auprc", "AUPRC", "Area under the precision-recall curve, against the segmentation"),
        Number(
            "faithfulness: blur: score",
            "Faithfulness",
            "Insertion less deletion: does the answer hang on what is marked?",
            most=math.inf,
            blind=0.0,
        ),
        Number("additivity: sensitivity-n", "Amounts", "Do its values foresee what the answer loses?", blind=0.0),
    ),
    "Is it robust?": (
        Number("stability: noise", "Faint noise", "How alike the map stays when the scan gets noise"),
        Number("stability: shift", "A voxel’s shift", "How alike the map stays when the scan moves"),
        Number(
            "randomisation: likeness",
            "Scrambled network",
            "How alike the map stays when the network has forgotten",
            more=False,
        ),
        Number("discrimination: likeness", "Second class", "How alike the map of the runner-up is", more=False),
        Number("permuted: likeness", "Permuted labels", "How alike the map is that they teach", more=False),
        Number("repeatability: likeness", "Other trainings", "How alike the maps are that they give"),
    ),
    "What does it cost?": (
        Number("cost: seconds", "Time", "For one map", more=False, most=math.inf, unit="s"),
        Number(
            "cost: peak_memory",
            "Memory",
            "For one map, over what was held before",
            more=False,
            most=math.inf,
            unit="MB",
            scale=1e-6,
            least=1.0,
        ),
    ),
}
"""What is drawn, by the question that it answers; what nobody measured is left out."""

_BLIND = ("centre", "intensity", "random")


def page(network: str, rows: Rows, results: Results) -> str:
    """The HTML page, UTF-8, of the `rows` and `results` of an evaluation of the model called `network`."""
    cases = max(map(len, results.values()), default=0)
    what = f"{_count(len(results), 'method')}, asked of {escape(network)} about {_count(cases, 'case')}."
    parts = [
        "<h1>Which maps can be trusted?</h1>",
        f"<p class=lead>{what}</p>",
        f"<p class=warning>{RESEARCH_ONLY}</p>",
        *(_section(question, [_dots(number, rows) for number in numbers]) for question, numbers in NUMBERS.items()),
        _section("What the checks say", _lights(results), _legend()),
        _table(rows),
        _refused(results),
        _left_out(results),
        _reading(),
    ]
    return document(f"Methods compared: {network}", parts, STYLE + _STYLE)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _section(heading: str, plots: Iterable[str], legend: str = "") -> str:
    drawn = "".join(plots)
    return f"<h2>{escape(heading)}</h2>{legend}<div class=plots>{drawn}</div>" if drawn else ""


def _dots(number: Number, rows: Rows) -> str:
    """Methods on one axis, the best above: mean and 95 % confidence interval as dot and whisker."""
    shown = sorted((row for row in rows if number.name in row), key=lambda row: number.of(row)[0], reverse=number.more)
    reference, named = _reference(number, shown)
    ends = _ends(number, shown, reference)
    if not ends:
        return ""
    axis, bottom = Axis.over(ends, bool(number.unit)), ABOVE + len(shown) * ROW
    drawn = axis.drawn(len(shown))
    drawn.append(text(NAMES + PLOT + 14, bottom + 16, "better →" if number.more else "← better", "faint"))
    if reference is not None:
        x = axis.at(reference)
        drawn.append(f'<path class=blind d="M{x:.1f} {ABOVE - 4}V{bottom}"/>{text(x, 11, named, "faint", "middle")}')
    for i, row in enumerate(shown):
        (mean, half), said, name = number.of(row), number.in_words(row), title(row["method"])
        known = (mean - half, mean + half) if math.isfinite(half) else None
        drawn.append(axis.dot(i, mean, known, f"{name}: {said}, {_count(row['cases'], 'case')}"))
        drawn.append(beside(i, name, said))
    return figure(number.title, number.says, drawn, bottom + BELOW)


def _reference(number: Number, rows: Rows) -> tuple[float | None, str]:
    """What a map has that knows nothing of the network, and how: the best one, over the most cases; or by chance."""
    check, _, name = number.name.partition(": ")
    most = max(rows, key=lambda row: int(row["cases"]), default={})
    known = [float(most[there]) for blind in _BLIND if (there := f"{check}: {blind}: {name}") in most]
    return (max(known), "knows nothing") if known else (number.blind, "by chance")


def _ends(number: Number, rows: Rows, reference: float | None) -> list[float]:
    """What an axis must hold: the intervals of `number` in all `rows` and the `reference`; nothing for nothing."""
    known = [(mean, half if math.isfinite(half) else 0.0) for mean, half in map(number.of, rows)]
    ends = [end for mean, half in known for end in (mean - half, mean, min(mean + half, number.most))]
    if number.unit:
        ends = [end for end in ends if end > number.least]
        return ends + ([number.least] if ends and number.least else [])
    return ends and [*ends, 0.0, 1.0, *([] if reference is None else [reference])]


def _lights(results: Results) -> Iterator[str]:
    """For each check how many of each method's maps got which light, the greenest method above."""
    counts: dict[str, dict[str, Counter[str | None]]] = defaultdict(dict)
    for method, of_method in results.items():
        for found in (found for result in of_method for found in result.get("findings", ())):
            counts[found["check"]].setdefault(method, Counter())[found["light"]] += 1
    for check, by_method in counts.items():
        # A check that gives no lights has nothing to count.
        if any(light for count in by_method.values() for light in count):
            most = max(count.total() for count in by_method.values())
            named = CHECKS[check].title if check in CHECKS else check
            yield figure(named, check.capitalize(), list(_bars(by_method, most)), len(by_method) * ROW + 4)


def _bars(by_method: Mapping[str, Counter[str | None]], most: int) -> Iterator[str]:
    lights = tuple(COLOURS)
    shown = sorted(by_method.items(), key=lambda item: [-item[1][light] / item[1].total() for light in lights])
    for i, (method, count) in enumerate(shown):
        x, y = float(NAMES), i * ROW + 2
        yield text(NAMES - 14, y + ROW / 2 + 2.5, title(method), anchor="end")
        yield f'<rect class=track x="{x}" y="{y}" width="{PLOT}" height="{ROW - 4}"/>'
        for light in lights:
            if count[light]:
                word, colour = COLOURS[light]
                width = PLOT * count[light] / most
                told = f"<title>{escape(title(method))}: {count[light]} {word}</title>"
                bar = f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{ROW - 4}" fill="{colour}"/>'
                yield f"<g>{told}{bar}</g>"
                if width > 9 * len(str(count[light])):
                    yield text(x + width / 2, y + ROW / 2 + 2.5, str(count[light]), "inside", "middle")
                x += width
        yield text(NAMES + PLOT + 14, y + ROW / 2 + 2.5, f"of {count.total()}")


def _legend() -> str:
    lamps = (f'<span style="color:{colour}" aria-hidden=true>■</span> {word}' for word, colour in COLOURS.values())
    return f"<p class=legend>{'&emsp;'.join(lamps)}</p>"


def _table(rows: Rows) -> str:
    shown = [number for numbers in NUMBERS.values() for number in numbers if any(number.name in row for row in rows)]
    heads = "".join(f"<th>{escape(number.title)}</th>" for number in shown)
    lines = []
    for row in rows:
        cells = [number.in_words(row) if number.name in row else "" for number in shown]
        said = "".join(f"<td class=number>{escape(cell)}</td>" for cell in [str(row["cases"]), *cells])
        lines.append(f"<tr><th>{escape(title(row['method']))}</th>{said}</tr>")
    table = f"<table><tr><th>Method</th><th>Cases</th>{heads}</tr>{''.join(lines)}</table>"
    return f"<h2>The same in numbers</h2><p>Every number there is stands in table.csv.</p><div class=wide>{table}</div>"


def _refused(results: Results) -> str:
    each = (
        (result["refused"], method, result["case"])
        for method, of_method in results.items()
        for result in of_method
        if "refused" in result
    )
    return reasons("What was refused, and why", each, results)


def _left_out(results: Results) -> str:
    each = (
        (f"{check}: {why}", method, result["case"])
        for method, of_method in results.items()
        for result in of_method
        for check, why in result.get("left_out", {}).items()
    )
    return reasons("Checks that could not be made", each, results)


def reasons(heading: str, each: Iterable[tuple[str, str, str]], results: Mapping[str, Sized]) -> str:
    """Each (why, method, case), by why; by method, `results` are as many as there are cases."""
    groups: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for why, method, case in each:
        groups[why][method].append(case)
    lines = []
    for why, by_method in groups.items():
        counts = [f"{title(method)}, {len(c)} of {len(results[method])} cases" for method, c in by_method.items()]
        said = counts[0] if len(counts) == 1 else f"{len(counts)} methods, {sum(map(len, by_method.values()))} maps"
        which = "<br>".join(
            f"{escape(count)}: {escape(', '.join(cases))}"
            for count, cases in zip(counts, by_method.values(), strict=True)
        )
        told = f"<details class=which><summary>{escape(said)}</summary>{which}</details>"
        lines.append(f"<tr><td>{escape(why)}</td><td>{told}</td></tr>")
    return f"<h2>{escape(heading)}</h2><table>{''.join(lines)}</table>" if lines else ""


def _reading() -> str:
    lines = [
        "A dot is the mean over the cases that were not refused, the whisker its 95 % confidence interval (Student’s "
        "t). Where two whiskers overlap much, these cases do not tell which method is better; where methods refused "
        "different cases, they are not compared on the same.",
        "The dashed line is what a map gets that knows nothing of the network (the best of the middle of what it looks "
        "at, the brightness of the scan, and noise), or what is got by chance. A method near it adds little.",
        "“How alike” is Pearson’s correlation of two maps: 1 is the same map, 0 has nothing in common.",
        "Time and memory are of the machine this ran on.",
        "All of this is about maps of one network on these cases. A map can show faithfully and stably what a network "
        "uses, and the network can be wrong.",
    ]
    return f"<h2>How to read it</h2><ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


_STYLE = """
.legend { margin: 0; } .which summary { margin: 0; color: inherit; white-space: nowrap; }
"""
