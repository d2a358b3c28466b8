"""From a text to its words, and back."""

from __future__ import annotations

import re
from collections.abc import Sequence

_TOKEN = re.compile(r"\w+(?:[-'.]\w+)*|[^\w\s]")
_CLOSES = set(".,;:!?)")


def tokens(text: str) -> list[str]:
    """The words and punctuation marks of a text, in lower case: "Large, part-solid." is large|,|part-solid|."""
    return _TOKEN.findall(text.lower())


def written(words: Sequence[str]) -> tuple[str, list[int]]:
    """Words as a text, each sentence with a capital letter, and where in it each word begins."""
    text, starts = "", []
    for word in words:
        text += "" if not text or word in _CLOSES else " "
        starts.append(len(text))
        text += word[:1].upper() + word[1:] if text.rstrip()[-1:] in ("", ".") else word
    return text, starts
