"""What a check found, in numbers and in words."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Light = Literal["good", "fair", "poor"]

COLOURS: dict[Light | None, tuple[str, str]] = {
    "good": ("good", "#2e9e5b"),
    "fair": ("fair", "#d08a00"),
    "poor": ("poor", "#d9483b"),
    None: ("no verdict", "#8a8f96"),
}
"""What a light is called, and its colour: readable on light and on dark."""


@dataclass(frozen=True)
class Finding:
    """What a `check` found of an explanation: a plain `sentence` for whoever reads the map, a traffic `light` (None
    when it says neither good nor bad), and the numbers `values` behind it."""

    check: str
    title: str
    sentence: str
    light: Light | None
    values: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def light(value: float, good: float, fair: float) -> Light:
    """`good` from that limit on, `fair` from that one; limits that fall from good to fair are for values that should be
    large, those that rise for values that should be small."""
    sign = 1 if good >= fair else -1
    return "good" if sign * value >= sign * good else "fair" if sign * value >= sign * fair else "poor"
