"""docs/benchmarks.md out of the results and curves: python -m benchmarks.table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
RESULTS = Path(__file__).parent / "results"
CURVES, SCANS = RESULTS / "curves", RESULTS / "whole_scan"

INTRODUCTION = """# Benchmarks

MedXAI beside the packages that a person would otherwise use, on the same network, volume and layer, in one process.
`python -m benchmarks` writes this page; [benchmarks/README.md](../benchmarks/README.md) says how it measures.

- **forwards**: processor time at one thread in units of one forward of that network: median, and least to most.
- **times MedXAI**: that time over MedXAI's, run in turn; only where both found the same map, up to what the package
  always does to it (stretching, rescaling). Otherwise it says "different work".
- **peak memory**: growth of a fresh process over what it held after one forward.
- **first call**: the forwards that the first call in that process took.
- **error**: relative L2 distance from the map it should give.
"""


def write() -> None:
    """Write the page from all results and curves."""
    found = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(RESULTS.glob("*.json"))]
    # Those of other programs lie beside them.
    parts = [INTRODUCTION, *(section(result) for result in found if "forward" in result)]
    parts += [whole_scan(json.loads(p.read_text(encoding="utf-8"))) for p in sorted(SCANS.glob("*.json"))]
    curves = sorted(CURVES.glob("*.csv"))
    if curves:
        parts += ["## How costs grow\n", *(_curve(path) for path in curves)]
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text("\n".join(parts), encoding="utf-8")


def figure(name: str) -> Path:
    """Where the figure of a curve is."""
    return PAGE.parent / "images" / f"curve-{name}.svg"


def _curve(path: Path) -> str:
    """A curve, whose file begins with a line that says what it is of."""
    caption = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
    return f"![{path.stem}]({figure(path.stem).relative_to(PAGE.parent)})\n\n{caption}\n"


def whole_scan(result: dict[str, Any]) -> str:
    """What `benchmarks.whole_scan` found of a scan."""
    rows = result["rows"]
    lines = [
        f"## Occlusion of a whole scan: {result['scan']}",
        "",
        f"The network that ships for segmenting nodules, whose window slides over the scan; {result['boxes']} boxes of "
        f"{' x '.join(map(str, result['box']))} voxels are covered, one at a time. Only windows that a box touches and "
        "that the target looks at are asked again. **naive**: inference of the whole scan for every box, tried on some "
        "of them; **difference**: from that, relative to the value.",
        "",
        "| target | boxes | windows asked | naive | times fewer | difference | wall (s) | naive, estimated (s) |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in rows.items():
        target, where = name.split(", ")
        lines.append(
            f"| {target} | {where} | {row['calls']} | {row['naive calls']} | {row['fewer calls']:.0f} | "
            f"{row['largest difference, relative']:.1g} | {row['seconds']:.0f} | {row['naive seconds']:.0f} |"
        )
    return "\n".join([*lines, ""])


def section(result: dict[str, Any]) -> str:
    """One result as a Markdown section."""
    side, machine, forward = result["size"], result["machine"], result["forward"]
    lines = [
        f"## {result['title']}: {result['model']}, {side} x {side} x {side}",
        "",
        "| | forwards | times MedXAI | peak memory (MB) | first call | wall (s) | error | |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
        *(_row(row) for row in result["rows"]),
        "",
        *(_goal(goal) for goal in result["goals"]),
        "" if result["goals"] else None,
        f"Layer `{result['layer']}`; one forward {forward['cpu_seconds']:.3g} s of processor time; "
        f"{result['threads']} thread(s), median of {result['repetitions']}; {machine['processor']}, "
        f"{machine['cores']} cores, {machine['memory_gb']} GB; {result['measured'][:10]}; "
        + ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
        + ".",
        "",
    ]
    return "\n".join(line for line in lines if line is not None)


def _row(row: dict[str, Any]) -> str:
    said = "; ".join(part for part in (row["note"], row.get("reason")) if part)
    if row["status"] == "fails":
        return f"| {row['name']} | fails | | | | | | {said} |"
    low, high = row["forwards_range"]
    ratio = f"{row['ratio']:.2f}" if "ratio" in row else row["status"]
    memory = "" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"
    first = "" if row["first_forwards"] is None else f"{row['first_forwards']:.2f}"
    spread = f"{row['forwards']:.2f} ({low:.2f}–{high:.2f})"
    cells = [row["name"], spread, ratio, memory, first, f"{row['wall_seconds']:.2f}", f"{row['error']:.2g}", said]
    return f"| {' | '.join(cells)} |"


def _goal(goal: dict[str, Any]) -> str:
    asked = f"goal {goal['sense']} {goal['limit']:g}"
    if goal["value"] is None:
        return f"- {goal['text']}: not comparable, {asked}."
    value = f"{goal['value']:.2f}" if goal["value"] >= 0.01 else f"{goal['value']:.1g}"
    return f"- {goal['text']}: {value}, {asked}: {'**missed**' if goal['missed_by'] else 'kept'}."


if __name__ == "__main__":
    write()
