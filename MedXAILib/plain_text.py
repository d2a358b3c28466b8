"""Text of unknown origin, made fit for a terminal."""

from __future__ import annotations

from rich.markup import escape


def visible(text: str) -> str:
    """`text` of unknown origin with its control characters spelt out, so that it cannot hide a part of itself."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def plain(text: str) -> str:
    """`text` of unknown origin for a table: neither control characters nor markup do anything."""
    return escape(visible(text))
