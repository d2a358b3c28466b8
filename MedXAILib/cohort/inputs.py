"""What methods need besides the scan, such as examples of concepts or a library of cases: where that is, and what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from MedXAILib.explainer import Technique
from MedXAILib.registry import make
from MedXAILib.textual.concept_sets import sha256

_PLACES = ("file", "folder", "mask")


def settled(method: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """`parameters` as they hold wherever and whenever the method is asked: paths are absolute, and examples of concepts
    have their SHA-256, so that others are refused later.

    Raises:
        MedXAIError: for an unknown method or parameter, or a value out of range.
    """
    made = make(method, parameters)
    found = dict(parameters)
    for name, paths in _paths(made):
        absolute = [str(Path(path).resolve()) for path in paths]
        found[name] = absolute if isinstance(getattr(made, name), tuple) else absolute[0]
    return found | ({"sha256": known} if (known := getattr(made, "sha256", "")) else {})


def fingerprints(method: str, parameters: Mapping[str, Any]) -> dict[str, str]:
    """The SHA-256 of each file or folder among the `parameters` of an explanation; of a library its version."""
    return {
        path: f"version {parameters['version']}" if name == "library" else sha256(Path(path))
        for name, paths in _paths(make(method, parameters))
        for path in paths
    }


def _paths(made: Technique) -> Iterator[tuple[str, list[str]]]:
    """The parameters that name files or folders, each with those it names."""
    for name, schema in type(made).model_json_schema()["properties"].items():
        # A choice that is open takes the path of a file, too.
        if not (schema.get("format") in _PLACES or schema.get("path") or "examples" in schema):
            continue
        given, choices = getattr(made, name), schema.get("examples", ())
        named = [one for one in (given if isinstance(given, tuple) else (given,)) if isinstance(one, str) and one]
        if named and all(one not in choices and Path(one).exists() for one in named):
            yield name, named
