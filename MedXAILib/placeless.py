"""What is said without the folders that it names: they name people and machines, and what is said is sent around."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

_ROOT = r"(?:/|[A-Za-z]:[\\/]|\\\\)"
# An apostrophe in a name ("O'Brien") does not end what is quoted.
_PATH = re.compile(rf"(?<='){_ROOT}(?:[^']|'(?=\w))*(?=')|(?<![\w.:/\\]){_ROOT}[^\s'\"]*[\\/][^\s'\"]*")


def without_folders(text: str) -> str:
    """`text` with the absolute paths in it, quoted or free of spaces, by their last name alone."""
    return _PATH.sub(lambda found: PureWindowsPath(found[0]).name or found[0], text)


def placeless(value: Any) -> Any:
    """Paths without their folders, in lists and mappings, too."""
    if isinstance(value, Mapping):
        return {name: placeless(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [placeless(one) for one in value]
    kinds = (PurePosixPath, PureWindowsPath)
    return next((kind(value).name for kind in kinds if isinstance(value, str) and kind(value).is_absolute()), value)
