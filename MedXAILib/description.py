"""What a program has to know of a method to offer it: what it is called, what it is for, what can be set."""

from __future__ import annotations

import inspect
from dataclasses import asdict, dataclass
from typing import Any, Literal

from MedXAILib.explainer import Technique

Type = Literal["bool", "int", "float", "choice", "text", "list"]
Format = Literal["", "numbers", "region", "mask", "file", "folder"]

_TYPES: dict[str, Type] = {"boolean": "bool", "integer": "int", "number": "float", "array": "list"}


@dataclass(frozen=True)
class Parameter:
    """A parameter of a method. A "list" is one of names, or one of "numbers" where its `format` says so; a "choice"
    that is `open` also takes the path of a file. A "text" of the format "region" is a part of the scan, and may be a
    box in RAS mm or a `Volume` instead; one of the format "mask" may be a `Volume`, and one of the format "file" is the
    path of a file or folder, of the format "folder" that of a folder."""

    name: str
    type: Type
    format: Format
    default: Any
    choices: tuple[str, ...]
    open: bool
    minimum: float | None
    maximum: float | None
    help: str


def parameters(kind: type[Technique]) -> list[Parameter]:
    """The parameters of a method, in their order."""
    return [_parameter(name, schema) for name, schema in kind.model_json_schema()["properties"].items()]


def question(kind: type[Technique]) -> str:
    """What a method asks, in a line."""
    return (inspect.getdoc(kind) or "").splitlines()[0]


def describe(kind: type[Technique]) -> dict[str, Any]:
    """All there is to say of a method, as JSON takes it."""
    return {
        "id": kind.id,
        "title": kind.title,
        "question": question(kind),
        "paper": kind.paper,
        "kind": kind.kind,
        "taxonomy": asdict(kind.taxonomy),
        "layered": kind.layered,
        "anytime": kind.anytime,
        "signed": kind().signed,
        "parameters": [asdict(p) for p in parameters(kind)],
    }


def _parameter(name: str, schema: dict[str, Any]) -> Parameter:
    choices = tuple(schema.get("enum", schema.get("examples", ())))
    return Parameter(
        name,
        "choice" if choices else _TYPES.get(schema.get("type", ""), "text"),
        _format(schema),
        schema.get("default"),
        choices,
        "examples" in schema,
        schema.get("minimum"),
        schema.get("maximum"),
        schema.get("description", ""),
    )


def _format(schema: dict[str, Any]) -> Format:
    if schema.get("items", {}).get("type") in ("number", "integer"):
        return "numbers"
    # Other formats are of no concern to whoever offers the method.
    return next((known for known in ("region", "mask", "file", "folder") if schema.get("format") == known), "")
