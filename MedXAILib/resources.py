"""Where the files that ship with MedXAI are."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from MedXAILib.errors import MedXAIError

_PACKAGE = Path(__file__).resolve().parent


def path(name: str) -> Path:
    """The shipped file or folder `name`, such as ``Models/lung_nodule``, from a checkout or an installed package.

    Raises:
        MedXAIError: when this installation came without it.
    """
    # A wheel carries Resources inside the package; a checkout and an editable install have it beside the package.
    for root in (_PACKAGE / "Resources", _PACKAGE.parent / "Resources"):
        if (root / name).exists():
            return root / name
    raise MedXAIError(f"'{name}' is not part of this installation: reinstall MedXAI, or run from a complete checkout.")


def user_folder() -> Path:
    """Where MedXAI keeps what it makes for itself and can make again: MEDXAI_HOME, or the system's place for that."""
    if told := os.environ.get("MEDXAI_HOME"):
        return Path(told).expanduser().absolute()
    home = Path.home()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local") / "MedXAI"
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "MedXAI"
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "medxai"
