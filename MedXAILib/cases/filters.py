"""What must hold of a case, as people write it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from MedXAILib.cases.record import NAMES
from MedXAILib.errors import MedXAIError

_NUMBER = r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})?\.\.({_NUMBER})?")


def conditions(texts: Sequence[str]) -> dict[str, Any]:
    """Filters such as "diameter_mm=10..20", "diameter_mm=..8" and "label=benign|malignant", as `Library.search` takes
    them. Of a name that is given again, any of its values will do.

    Raises:
        MedXAIError: for what is no filter.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, _, value = (part.strip() for part in text.partition("="))
        ends = _RANGE.fullmatch(value)
        wrong = value == ".." or name in NAMES or name in found if ends else ".." in value
        if not (name and value) or wrong:
            raise MedXAIError(f"'{text}' is no filter: write name=value, name=one|other, or name=10..20 for numbers.")
        if ends:
            low, high = (None if end is None else float(end) for end in ends.groups())
            found[name] = (low, high)
        else:
            found.setdefault(name, set()).update(
                one for part in value.split("|") for one in _values(name, part.strip())
            )
    return found


def _values(name: str, text: str) -> list[str | float]:
    """A value, which of what is no name may be a number or a text that looks like one."""
    try:
        number = float(text)
    except ValueError:
        return [text]
    return [text] if name in NAMES or not math.isfinite(number) else [text, number]
