"""Rows on an axis, as SVG: what plots of pages are made of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

# In pixels: the names, the plot and the numbers beside it; a row, and what is above and below the rows.
NAMES, PLOT, BESIDE, ROW, ABOVE, BELOW = 250, 260, 130, 24, 20, 24


@dataclass(frozen=True)
class Axis:
    """An axis from the first of `ticks` to the last."""

    ticks: tuple[float, ...]
    logarithmic: bool = False

    @classmethod
    def over(cls, values: Iterable[float], logarithmic: bool = False) -> Axis:
        """One with round ticks that holds all of `values`, at least one."""
        ends = [math.log10(value) for value in values] if logarithmic else list(values)
        span = max(ends) - min(ends) or 1.0
        rough = 10.0 ** math.floor(math.log10((max(span, 1.0) if logarithmic else span) / 3))
        step = next(rough * times for times in (1, 2, 5, 10) if span <= 5 * rough * times)
        step = max(1.0, step) if logarithmic else step
        first, last = math.floor(min(ends) / step + 1e-9), math.ceil(max(ends) / step - 1e-9)
        marks = [float(f"{i * step:.12g}") for i in range(first, max(last, first + 1) + 1)]
        return cls(tuple(10.0**mark if logarithmic else mark for mark in marks), logarithmic)

    def at(self, value: float) -> float:
        """Where a value is drawn, in pixels; beyond an end, at it."""
        low, high = self.ticks[0], self.ticks[-1]
        value = min(max(value, low), high)
        share = math.log(value / low, high / low) if self.logarithmic else (value - low) / (high - low)
        return NAMES + share * PLOT

    def drawn(self, rows: int) -> list[str]:
        """Its ticks behind so many rows."""
        bottom = ABOVE + rows * ROW
        return [
            f'<path class=tick d="M{self.at(tick):.1f} {ABOVE}V{bottom}"/>'
            + text(self.at(tick), bottom + 16, f"{tick:g}", "faint", "middle")
            for tick in self.ticks
        ]

    def dot(self, row: int, value: float, ends: tuple[float, float] | None, said: str) -> str:
        """A value in a row (from 0), the ends of its interval if they are known, and what it says in a tip."""
        y, whisker = ABOVE + (row + 0.5) * ROW, ""
        if ends is not None:
            low, high = map(self.at, ends)
            whisker = f'<path class=whisker d="M{low:.1f} {y}H{high:.1f}M{low:.1f} {y - 4}v8M{high:.1f} {y - 4}v8"/>'
        dot = f'<circle class=dot cx="{self.at(value):.1f}" cy="{y}" r="4.5"/>'
        return f"<g><title>{escape(said)}</title>{whisker}{dot}</g>"


def beside(row: int, name: str, said: str) -> str:
    """The name of a row (from 0) on its left, and what it says on its right."""
    y = ABOVE + (row + 0.5) * ROW + 4.5
    return text(NAMES - 14, y, name, anchor="end") + text(NAMES + PLOT + 14, y, said)


def text(x: float, y: float, said: str, kind: str = "", anchor: str = "start") -> str:
    """A text of a plot, faint or on a colour by its `kind`."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(said)}</text>'


def figure(name: str, says: str, drawn: Sequence[str], height: float) -> str:
    """A plot under its name, and what that means."""
    width = NAMES + PLOT + BESIDE
    plot = f'<svg viewBox="0 0 {width} {height:g}" role=img aria-label="{escape(name)}">{"".join(drawn)}</svg>'
    return f"<figure><figcaption><strong>{escape(name)}</strong> {escape(says)}</figcaption>{plot}</figure>"


STYLE = """
:root { --mark: #b45309; } @media (prefers-color-scheme: dark) { :root { --mark: #f0934a; } }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 34rem), 1fr)); gap: 0 2.5rem; }
figure { margin: 1rem 0; } figcaption { color: var(--faint); } figcaption strong { display: block; color: var(--ink); }
svg { display: block; width: 100%; max-width: 46rem; height: auto; margin-top: .4rem; overflow: visible; }
svg text { fill: var(--ink); font: 13px system-ui, sans-serif; font-variant-numeric: tabular-nums; }
svg .faint { fill: var(--faint); font-size: 12px; } svg .inside { fill: #111; font-size: 12px; }
.tick, .track { fill: none; stroke: var(--line); } .blind { stroke: var(--faint); stroke-dasharray: 4 3; }
.dot { fill: var(--mark); } .whisker { fill: none; stroke: var(--mark); stroke-width: 2; }
.wide { overflow-x: auto; } .wide td, .wide th { white-space: nowrap; }
"""
