"""Models from files and from Python code. Nothing is ever unpickled."""

from __future__ import annotations

import importlib
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from MedXAILib.bundle import is_bundle, load_bundle, sha256
from MedXAILib.errors import MedXAIError, Untrusted, unknown
from MedXAILib.model import Model, Source

_ENTRY_POINT = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")

# The only operators by which a TorchScript program reaches the disk.
_DISK = re.compile(r"\b(?:torch\.|ops\.aten\.|aten::)?(?:save|from_file)\s*\(")


def load_model(source: Source, trust: bool = False, **known: Any) -> Model:
    """A model from a MONAI bundle (folder or zip), a Python entry point ``"package.module:function"`` that returns a
    `Model` or a network, or a TorchScript file.

    Args:
        trust: whether code that the file brings along may run. Only ever say so for files from people you trust.
        known: what the source does not say, as for `Model`: task, class_names, patch_size, …

    Raises:
        Untrusted: when it would run code and `trust` was not given; `code` holds that code, and is another when
            anything in the source is.
        MedXAIError: when it is missing, damaged, a pickle, or no model.
    """
    if callable(source):
        return _made(source(), f"{source.__module__}:{source.__qualname__}", known)
    path = Path(source)
    if is_code(str(source)):
        return _from_code(str(source), known)
    if not path.exists():
        raise MedXAIError(
            f"There is no model '{source}': give a MONAI bundle, 'package.module:function', or a file.ts."
        )
    if is_bundle(path):
        return load_bundle(path, trust, known)
    if path.is_dir():
        raise MedXAIError(f"'{path}' is no MONAI bundle: it has no configs/metadata.json.")
    return _from_torchscript(path, trust, known)


def is_code(source: str) -> bool:
    """Whether this is 'package.module:function', which runs when it is loaded, and no path."""
    return bool(_ENTRY_POINT.fullmatch(source)) and not Path(source).exists()


def _made(made: Any, source: str, known: dict[str, Any]) -> Model:
    if isinstance(made, nn.Module):
        return Model(made, source=source, **known)
    if not isinstance(made, Model):
        raise MedXAIError(f"'{source}' returns {type(made).__name__}: it must return a network or a Model.")
    for name, value in known.items():
        setattr(made, name, value)
    made.source = source
    return made


def _from_code(entry: str, known: dict[str, Any]) -> Model:
    module_name, name = entry.split(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise MedXAIError(f"'{module_name}' cannot be imported ({error}): install it or check its name.") from error
    if not callable(getattr(module, name, None)):
        raise unknown(f"function in {module_name}", name, [n for n in dir(module) if not n.startswith("_")])
    return _made(getattr(module, name)(), entry, known)


def _from_torchscript(path: Path, trust: bool, known: dict[str, Any]) -> Model:
    code = _torchscript_code(path)
    if code is None:
        raise MedXAIError(
            f"'{path.name}' is a pickled checkpoint, which could run anything when opened, so it is not: export the "
            "network as a MONAI bundle with safetensors weights or as TorchScript, or build it in Python "
            "('package.module:function')."
        )
    reaching = [line.strip() for line in code.splitlines() if _DISK.search(line)]
    if reaching and not trust:
        raise Untrusted(
            f"'{path.name}' reads or writes files when it runs: pass trust=True only if you trust its maker.",
            "\n".join([*reaching, f"# The whole file: SHA-256 {sha256(path)}"]),
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            network = torch.jit.load(str(path), map_location="cpu")
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise MedXAIError(f"'{path.name}' is a damaged TorchScript file ({reason}): export it again.") from error
    return Model(network, source=str(path), **{"name": path.stem, **known})


def _torchscript_code(path: Path) -> str | None:
    """The program in a TorchScript archive; None when the file is anything else."""
    if not zipfile.is_zipfile(path):
        if path.suffix.lower() in (".ts", ".torchscript"):
            raise MedXAIError(f"'{path.name}' is a damaged TorchScript file: export it again.")
        return None
    with zipfile.ZipFile(path) as archive:
        parts = [n for n in archive.namelist() if "/code/" in n and n.endswith(".py")]
        return "\n".join(archive.read(n).decode("utf-8", "replace") for n in parts) if parts else None
