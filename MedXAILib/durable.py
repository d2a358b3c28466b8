"""Files that are there whole and stay."""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from pathlib import Path

from MedXAILib.errors import MedXAIError


def write_durably(path: Path, text: str) -> None:
    """Write a file that is there whole and stays, or not at all."""
    # Another machine that sees the folder may have a process of the same number.
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink()
        raise MedXAIError(f"'{path}' cannot be written ({error.strerror}): free some space, or give leave.") from error
