"""Numbers with a name, in words.

Without PyTorch, so that Slicer's panels can say them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping


def amount(name: str, value: float) -> str:
    """12.3 of "diameter_mm" or "diameter (mm)" is "diameter 12.3 mm"."""
    words, unit = _unit(name)
    return " ".join(filter(None, [words.replace("_", " "), f"{value:.3g}", unit]))


def amounts(numbers: Mapping[str, float]) -> list[str]:
    """The same of several, those with a unit first."""
    return [amount(*known) for known in sorted(numbers.items(), key=lambda known: not _unit(known[0])[1])]


def _unit(name: str) -> tuple[str, str]:
    found = re.fullmatch(r"(.*?)(?:[ _]\(?(mm|mL|HU|%)\)?)?", name, re.DOTALL)
    return (found[1], found[2] or "") if found else (name, "")
