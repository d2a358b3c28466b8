"""docs/sanity.md out of the results."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import MedXAILib as mx
from benchmarks.sanity import prose, rows
from benchmarks.sanity.patches import STAGES

PAGE = Path(__file__).parents[2] / "docs" / "sanity.md"
RESULTS = Path(__file__).parents[1] / "results" / "sanity"
WIDTH = "width"
"""Not a row, but the result of `width.py`."""

Result = Mapping[str, Any]


def results() -> list[dict[str, Any]]:
    """What was measured of every row, in the order of the table."""
    return [_read(row.slug) for row in rows.every() if (RESULTS / f"{row.slug}.json").exists()]


def width() -> dict[str, Any]:
    """What was measured of wider networks."""
    return _read(WIDTH)


def _read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def rounded(values: Any) -> Any:
    """Three digits behind the point, which is more than repeats."""
    if isinstance(values, dict):
        return {key: rounded(value) for key, value in values.items()}
    if isinstance(values, list):
        return [rounded(value) for value in values]
    return round(values, 3) if isinstance(values, float) else values


def write() -> None:
    """Write the page from all results."""
    PAGE.write_text(markdown(results(), width()), encoding="utf-8")


def markdown(found: Sequence[Result], wider: Result) -> str:
    """The page."""
    measured = [row for row in found if "refused" not in row]
    refused = [f"- {row['name']}: {row['refused']}" for row in found if "refused" in row]
    limits = thresholds(measured)
    numbers = {row["name"]: row for row in measured}
    parts = [
        prose.INTRODUCTION,
        _where(measured),
        prose.where(numbers),
        prose.RANDOMISED.format(**limits),
        _cascade(measured, limits),
        prose.CLASS_HEAD,
        prose.failing(numbers, {row["name"]: of_top(row, limits) for row in measured}),
        prose.ALL_NEW,
        _all_new(measured, limits),
        prose.all_new(numbers),
        prose.WIDER,
        _wider(wider),
        prose.wider(wider),
        prose.REFUSED,
        "\n".join(refused) + "\n",
        prose.MEASURED,
        _machine([*found, wider]),
    ]
    return "\n".join(parts) + "\n"


def thresholds(found: Sequence[Result]) -> dict[str, float]:
    """The likeness that is half-way from chance, the gradients of two networks that have no weights in common, to the
    edge detector."""
    by_name = {row["name"]: row["untrained"] for row in found}
    chance, edges = by_name["Gradient"], by_name[rows.EDGES.name]
    return {measure: (chance[measure] + edges[measure]) / 2 for measure in ("correlation", "rank")}


def at(row: Result, stage: int, measure: str) -> list[float]:
    """The likeness after a stage, of every draw."""
    return [draw[stage][measure] for draw in row["cascade"]]


def verdict(values: Sequence[float], limit: float) -> str:
    """Whether the mean of the draws is below the limit or above it, by more than two standard errors."""
    margin = 2 * stdev(values) / math.sqrt(len(values))
    if mean(values) + margin < limit:
        return "passes"
    return "**fails**" if mean(values) - margin > limit else "undecided"


def of_top(row: Result, limits: Mapping[str, float]) -> str:
    """Whether a map notices that the class head and the layer before it are new."""
    return verdict(at(row, 1, "correlation"), limits["correlation"])


def of_weights(row: Result, limits: Mapping[str, float]) -> str:
    """Whether a map notices that everything is new."""
    return verdict(at(row, -1, "rank"), limits["rank"])


def _where(found: Sequence[Result]) -> str:
    chance = [found[0][part]["chance"] for part in ("synthetic", "synthetic", "real", "real", "synthetic")]
    lines = [["Chance: an even map", *map(_two, chance)]]
    for row in found:
        values = [row[part][key] for part in ("synthetic", "real") for key in ("peak", "mass")]
        lines.append([row["name"], *map(_two, (*values, row["untrained"]["peak"]))])
    return _table(["", "synthetic: peak", "mass", "real: peak", "mass", "untrained: peak"], lines)


def _cascade(found: Sequence[Result], limits: Mapping[str, float]) -> str:
    lines = []
    for row in found:
        stages = [mean(at(row, stage, "correlation")) for stage in range(len(STAGES))]
        numbers = (mean(at(row, 0, "signed")), *stages, mean(stages))
        lines.append([row["name"], *map(_two, numbers), of_top(row, limits)])
    return _table(["", f"{STAGES[0]}, signed", *STAGES, "mean", f"up to {STAGES[1]}"], lines, words=1)


def _all_new(found: Sequence[Result], limits: Mapping[str, float]) -> str:
    chance = next(row["untrained"] for row in found if row["name"] == "Gradient")
    middle = [chance[key] for key in ("rank", "overlap")]
    lines = [["Chance: gradients of two untrained networks", "", *map(_two, middle), _two(chance["rank"]), ""]]
    for row in found:
        along = mean(v for stage in range(len(STAGES)) for v in at(row, stage, "rank"))
        numbers = [along, mean(at(row, -1, "rank")), mean(at(row, -1, "overlap")), row["untrained"]["rank"]]
        lines.append([row["name"], *map(_two, numbers), of_weights(row, limits)])
    return _table(["", "cascade: rank", "all new: rank", "overlap", "two untrained: rank", "all new"], lines, words=1)


def _wider(wider: Result) -> str:
    lines = []
    for method in dict.fromkeys(each["method"] for each in wider["found"]):
        of_method = [each for each in wider["found"] if each["method"] == method]
        values = [each[key] for key in ("correlation", "scan") for each in of_method]
        lines.append([mx.methods()[method].title, *map(_two, values)])
    widths = [str(width) for width in wider["widths"]]
    two, scan = f"two networks: {widths[0]}", f"map and scan: {widths[0]}"
    return _table(["filters in the first layer", two, *widths[1:], scan, *widths[1:]], lines)


def _table(head: Sequence[str], lines: Sequence[Sequence[str]], words: int = 0) -> str:
    """A table of names and numbers, whose last columns are `words`."""
    kinds = ["---", *["---:"] * (len(head) - 1 - words), *["---"] * words]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, kinds, *lines)) + "\n"


def _two(value: float) -> str:
    return f"{value:.2f}".replace("-0.00", "0.00")


def _machine(found: Sequence[Result]) -> str:
    days = sorted({row["measured"][:10] for row in found})
    machines = sorted({f"{m['processor']}, {m['cores']} cores" for m in (row["machine"] for row in found)})
    versions = sorted({f"{name} {v}" for row in found for name, v in row["versions"].items() if v})
    return (
        f"Measured with one thread in {sum(row['cpu_seconds'] for row in found) / 60:.0f} minutes of processor time "
        f"({'; '.join(machines)}), {' to '.join(dict.fromkeys((days[0], days[-1])))}; {', '.join(versions)}."
    )
