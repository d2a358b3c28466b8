"""What an explanation that is not one map has on its page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class Figure:
    """A picture, written as `<name>.png` and shown under `heading`; `of` says what it is of."""

    name: str
    heading: str
    of: str
    image: Image.Image


@dataclass(frozen=True)
class Sheet:
    """`body` is HTML that needs `style`; `reading` says how to read it, in lines."""

    heading: str
    body: str
    reading: Sequence[str]
    figures: Sequence[Figure] = ()
    style: str = ""
