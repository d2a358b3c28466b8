"""What MedXAI says when it cannot do what was asked: one line, naming the thing and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MedXAIError(Exception):
    """Something the person can mend. The message is one line: what is wrong, then what to do about it."""


class Cancelled(MedXAIError):
    """The person, or the program on their behalf, asked the run to stop."""


class OutOfMemory(MedXAIError):
    """Even the smallest piece of the work did not fit in memory."""


class Untrusted(MedXAIError):
    """A model file would run code of its own and nobody has said that it may. `code` holds what it would run."""

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code


class NotInstalled(MedXAIError):
    """A package is missing that only some methods need: `requirement` is what pip has to install."""

    def __init__(self, message: str, requirement: str = "") -> None:
        super().__init__(message)
        self.requirement = requirement


def unknown(what: str, name: object, known: Iterable[str]) -> MedXAIError:
    """The error for a name that does not exist, with the nearest names that do."""
    names = list(known)
    near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.4)
    hint = (
        f"did you mean {', '.join(near)}?"
        if near
        else f"known are {', '.join(names[:12])}" + (f" and {len(names) - 12} more." if len(names) > 12 else ".")
    )
    return MedXAIError(f"There is no {what} '{name}': {hint}")
