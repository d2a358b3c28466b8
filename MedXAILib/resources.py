"""Where the files that ship with MedXAI are."""

from __future__ import annotations

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
