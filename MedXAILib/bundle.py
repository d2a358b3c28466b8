"""Models as MONAI bundles: a network definition, weights, preprocessing and what the model is for.

A configuration can run any code when it is read (``$`` expressions, ``_target_`` of any callable). Here only what the
network, its preprocessing and its inferer refer to is read at all, and only MONAI's and our own networks and transforms
are built without the person's trust.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import pickle
import re
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc import ErrorDuringImport, locate
from types import ModuleType
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.bundle.config_item import ComponentLocator
from monai.data import MetaTensor
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from MedXAILib.errors import MedXAIError, Untrusted
from MedXAILib.model import Model
from MedXAILib.window import Window

_SAFE = ("monai.networks.", "monai.transforms.", "monai.inferers.", "torch.nn.modules.", "MedXAILib.networks.")
# These open files that they are told of, the last as pickles.
_UNSAFE = ("monai.transforms.io.", "monai.networks.nets.transchex.", "monai.networks.nets.cell_sam_wrapper.")

_NETWORK = ("network_def", "network")
_LOADING = ("LoadImage", "EnsureChannelFirst", "EnsureType", "SaveImage", "ToDevice", "AddChannel")
_SLIDING = ("SlidingWindowInferer", "SlidingWindowInfererAdapt")
_WINDOW = ("roi_size", "overlap", "mode", "sigma_scale", "padding_mode", "cval")
_WEIGHTS = ("model.safetensors", "model.pt", "model.pth")


@dataclass(frozen=True)
class Preprocessing:
    """A bundle's transforms of its image, as one function of a MetaTensor (C, X, Y, Z)."""

    transforms: tuple[Any, ...]
    key: str

    def __call__(self, image: MetaTensor) -> Tensor:
        data: dict[str, Any] = {self.key: image}
        for transform in self.transforms:
            data = transform(data)
        return data[self.key]


def is_bundle(path: Path) -> bool:
    """Whether `path` is a MONAI bundle, as a folder or zipped."""
    if path.is_dir():
        return (path / "configs" / "metadata.json").is_file()
    return zipfile.is_zipfile(path) and _root_in(path) is not None


def load_bundle(path: Path, trust: bool, known: dict[str, Any]) -> Model:
    """The model of a bundle (see `MedXAILib.load_model`)."""
    if path.is_dir():
        return _load(path, str(path), trust, known)
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(path) as archive:
        # extractall keeps every member inside the folder, whatever its name says.
        archive.extractall(folder)
        return _load(Path(folder) / (_root_in(path) or ""), str(path), trust, known)


def _root_in(path: Path) -> str | None:
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith("configs/metadata.json"):
                return name.removesuffix("configs/metadata.json")
    return None


def _load(folder: Path, source: str, trust: bool, known: dict[str, Any]) -> Model:
    metadata = _json(folder / "configs" / "metadata.json")
    config = _config(folder)
    definition = next((key for key in _NETWORK if key in config), None)
    if definition is None:
        raise MedXAIError(f"'{source}' defines no network: its inference configuration needs a 'network_def'.")
    parser = ConfigParser({**config, "bundle_root": str(folder)})
    items = [config[definition], *_transforms(parser), _window(parser)]
    if not trust:
        code = "\n".join(dict.fromkeys([*_misread(config), *_code(parser, items)]))
        if code:
            code = "\n".join([code, *_own_files(folder)])
            raise Untrusted(
                f"'{source}' would run code of its own ({len(code.splitlines())} line(s)): read it, and pass "
                "trust=True only if you trust its maker.",
                code,
            )
    try:
        with _importable(folder) if trust else contextlib.nullcontext():
            network = parser.get_parsed_content(definition)
            transforms = tuple(parser.get_parsed_content(f"_preprocessing::{i}") for i in range(len(items) - 2))
            sliding = parser.get_parsed_content("_window")
            window = Window(**sliding) if sliding else None
    except Exception as error:
        reason = str(error.__cause__ or error).strip().splitlines()[-1]
        raise MedXAIError(f"The configuration of '{source}' cannot be built: {reason}") from error
    if not isinstance(network, nn.Module):
        raise MedXAIError(f"The '{definition}' of '{source}' is {type(network).__name__}, not a network.")
    _load_weights(network, folder / "models", source)
    image, channels, spatial = _input(metadata)
    own = metadata.get("medxai", {})
    return Model(
        network,
        **{
            "name": metadata.get("name") or Path(source).stem,
            "source": source,
            "preprocessing": Preprocessing(transforms, image) if transforms else None,
            "channels": channels,
            "patch_size": spatial,
            "window": window,
            "layers": tuple(own.get("layers", ())),
            "retrained": tuple(_beside(Path(source), own.get("retrained"))),
            "permuted": next(_beside(Path(source), own.get("permuted")), None),
            **_output(metadata),
            **known,
        },
    )


def _beside(path: Path, names: str | Iterable[str] | None) -> Iterator[Path]:
    """Other bundles that are there: the one at `path` may have been copied without them, or be one of them.

    Those that are not in the folder which it is in, or below, are not even looked for: whoever made a bundle has no say
    in what is opened of the computer or its network.
    """
    path = path.resolve()
    others = (Path(os.path.normpath(path / name)) for name in ([names] if isinstance(names, str) else names or ()))
    return (other for other in others if other != path and path.parent in other.parents and is_bundle(other))


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Inside, the bundle's own Python files can be imported. Afterwards they are forgotten: the next bundle, too,
    calls its own `scripts`."""
    own = {path.stem for path in folder.iterdir()}

    def loaded() -> dict[str, ModuleType]:
        return {name: module for name, module in sys.modules.items() if name.partition(".")[0] in own}

    others = loaded()
    for name in others:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in loaded():
            del sys.modules[name]
        sys.modules.update(others)


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise MedXAIError(f"'{path.name}' of the bundle cannot be read ({error}): get the bundle again.") from error


def _config(folder: Path) -> dict[str, Any]:
    for name in ("inference.json", "inference.yaml", "inference.yml"):
        path = folder / "configs" / name
        if path.is_file():
            return dict(ConfigParser.load_config_file(str(path)))
    raise MedXAIError(f"'{folder}' has no configs/inference.json: export the bundle with one.")


def _transforms(parser: ConfigParser) -> list[Any]:
    """The configurations of the preprocessing transforms that still have something to do on a volume in memory."""
    config = parser.get("preprocessing")
    chain = config.get("transforms", []) if isinstance(config, dict) else []
    chain = parser.get(chain[1:]) if isinstance(chain, str) and chain.startswith("@") else chain
    kept = [t for t in chain if not str(t.get("_target_", "")).rpartition(".")[2].startswith(_LOADING)]
    parser["_preprocessing"] = kept
    return kept


def _window(parser: ConfigParser) -> dict[str, Any]:
    """The configuration of the window that the inferer slides over a scan; empty when it does not."""
    inferer = parser.get("inferer")
    inferer = parser.get(inferer[1:]) if isinstance(inferer, str) and inferer.startswith("@") else inferer
    slides = isinstance(inferer, dict) and str(inferer.get("_target_", "")).rpartition(".")[2] in _SLIDING
    # Not where it computes, which is for the person to say.
    kept = {key: inferer[key] for key in _WINDOW if key in inferer} if slides else {}
    if slides and "sw_batch_size" in inferer:
        kept["batch"] = inferer["sw_batch_size"]
    parser["_window"] = kept
    return kept


def _code(parser: ConfigParser, items: Any, seen: set[str] | None = None) -> Iterator[str]:
    """Everything that building `items`, and what they refer to, would run beyond what is known to be harmless."""
    seen = set() if seen is None else seen
    if isinstance(items, dict):
        target = items.get("_target_")
        if target is not None and not _harmless(str(target)):
            yield f"_target_: {target}"
        # A debugger runs what it is told on standard input.
        if items.get("_debug_") or items.get("_mode_", "default") not in ("default", "callable"):
            yield f"a debugger in {target}"
        # Which may be got from any address, and what is needed is in the bundle.
        yield from (f"{name}: {value}" for name, value in items.items() if str(name).startswith("pretrained") and value)
        for value in items.values():
            yield from _code(parser, value, seen)
    elif isinstance(items, (list, tuple)):
        for value in items:
            yield from _code(parser, value, seen)
    elif isinstance(items, str):
        # `parser` knows something else by a name that is relative to a place: it may be anything.
        relative = re.search("@[#:]", items)
        if items.startswith(("$", "%")) or relative:
            yield items
        # Of no name: all there is.
        for name in [""] if relative else re.findall(r"@([\w#:]*)", items):
            if name not in seen:
                seen.add(name)
                yield from _code(parser, parser.get(name), seen)


def _misread(config: Any) -> Iterator[str]:
    """What makes MONAI read something else than `_code` does: names that are paths, or the same as others, and other
    files, wherever they are."""
    if isinstance(config, dict):
        names = [str(name).replace("#", "::") for name in config]
        for name, value in zip(names, config.values(), strict=True):
            if not name or "::" in name or names.count(name) > 1:
                yield f"{name}: {value}"
        for value in config.values():
            yield from _misread(value)
    elif isinstance(config, list):
        for value in config:
            yield from _misread(value)
    elif isinstance(config, str) and config.startswith("%"):
        yield config


def _own_files(folder: Path) -> Iterator[str]:
    """What code of the bundle can read or run: its Python files, and a digest of all others, so that nothing there can
    change without this text."""
    others = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        # What Python and the system leave there.
        if not path.is_file() or any(part.startswith(".") or part == "__pycache__" for part in name.parts):
            continue
        if path.suffix == ".py":
            yield f"# {name.as_posix()}"
            yield path.read_bytes().decode("utf-8", "backslashreplace")
        else:
            others.append(f"{name.as_posix()} {sha256(path)}")
    yield f"# All other files of the bundle: SHA-256 {hashlib.sha256(repr(others).encode()).hexdigest()}"


def sha256(path: Path) -> str:
    """The SHA-256 of a file, which may be large."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _harmless(target: str) -> bool:
    found = [target] if "." in target else ComponentLocator(excludes=["apps"]).get_component_module_name(target)
    found = [found] if isinstance(found, str) else found
    names = [name if name.endswith(f".{target}") or "." in target else f"{name}.{target}" for name in found or []]
    return bool(names) and all(_public(name) and _known(name) and _known(_home(name)) for name in names)


def _known(name: str) -> bool:
    return name.startswith(_SAFE) and not name.startswith(_UNSAFE)


def _home(name: str) -> str:
    """Where the class of that name is defined: modules hold what they import, too."""
    try:
        found = locate(name) if _known(name) else None
    except ErrorDuringImport:
        found = None
    return f"{found.__module__}.{found.__qualname__}" if isinstance(found, type) else name


def _public(name: str) -> bool:
    """Whether a dotted name is a class reached through modules alone, so that it is built and nothing more."""
    module, _, attribute = name.rpartition(".")
    return attribute[:1].isupper() and not any(part[:1].isupper() for part in module.split(".")[1:])


def _load_weights(network: nn.Module, folder: Path, source: str) -> None:
    path = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise MedXAIError(f"'{source}' holds no weights ({', '.join(_WEIGHTS)}): get the whole bundle.")
    load_weights(network, path, source)


def load_weights(network: nn.Module, path: Path, source: str) -> None:
    """Give `network` the weights in a file of `source`: its own state, or that of its "model" or "network".

    Raises:
        MedXAIError: when the file is damaged, holds more than weights, or does not fit.
    """
    try:
        # weights_only reads tensors and refuses every other object.
        if path.suffix == ".safetensors":
            state: dict[str, Any] = dict(load_file(path))
        else:
            state = torch.load(path, "cpu", weights_only=True)
        own = next((state[key] for key in ("model", "network") if isinstance(state.get(key), dict)), state)
        network.load_state_dict(own)
    except pickle.UnpicklingError as error:
        raise MedXAIError(
            f"'{path.name}' of '{source}' holds more than weights, which could run anything when opened, so it is not: "
            "save its state_dict as safetensors."
        ) from error
    except (RuntimeError, SafetensorError, OSError, EOFError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise MedXAIError(f"'{path.name}' of '{source}' does not fit the network or is damaged: {reason}") from error


def _input(metadata: dict[str, Any]) -> tuple[str, int | None, tuple[int, ...] | None]:
    """The name, channels and patch size of the image the network takes."""
    inputs = metadata.get("network_data_format", {}).get("inputs", {})
    name = next(iter(inputs), "image")
    spec = inputs.get(name, {})
    shape = spec.get("spatial_shape")
    fixed = shape is not None and all(isinstance(s, int) for s in shape)
    return name, spec.get("num_channels"), tuple(shape) if fixed else None


def _output(metadata: dict[str, Any]) -> dict[str, Any]:
    """The task and class names, from the output's format and channel definition."""
    outputs = metadata.get("network_data_format", {}).get("outputs", {})
    spec = outputs.get(next(iter(outputs), ""), {})
    said = f"{spec.get('format', '')} {spec.get('type', '')} {metadata.get('task', '')}".lower()
    known = {
        "segment": "segmentation",
        "regress": "regression",
        "ordinal": "ordinal",
        "caption": "captioning",
        "classif": "classification",
        "embedding": "embedding",
    }
    task = next((name for word, name in known.items() if word in said), "classification")
    channels = spec.get("channel_def", {})
    return {"task": task, "class_names": tuple(channels[key] for key in sorted(channels, key=int))}
