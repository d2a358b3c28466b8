"""What the registry says about the methods, for people: parameters in words, and `docs/methods.md`."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from MedXAILib import description
from MedXAILib.explainer import Technique
from MedXAILib.registry import EXPLAINERS

_TYPES = {
    "int": "whole number",
    "float": "number",
    "bool": "true or false",
    "list": "names, with commas between",
    "text": "text",
}


@dataclass(frozen=True)
class Parameter:
    """A parameter of a method in words, as a person types it."""

    name: str
    type: str
    default: str
    range: str
    help: str


def parameters(kind: type[Technique]) -> list[Parameter]:
    """The parameters of a method, in their order."""
    return [_in_words(p) for p in description.parameters(kind)]


def title(method: str) -> str:
    """What a method is called; its id when it is not in the registry (any more)."""
    return EXPLAINERS[method].title if method in EXPLAINERS else method


def question(method: str) -> str:
    """What a method asks, in a line."""
    return description.question(EXPLAINERS[method])


def markdown() -> str:
    """The methods as a document."""
    rows = [
        (
            f"`{name}`",
            kind.title,
            kind.paper,
            kind.taxonomy.family,
            kind.taxonomy.built,
            kind.taxonomy.applies,
            ", ".join(kind.taxonomy.scope),
        )
        for name, kind in EXPLAINERS.items()
    ]
    heads = ("id", "method", "paper", "family", "built", "applies", "scope")
    return _INTRODUCTION + _table(heads, rows) + "".join(map(_section, EXPLAINERS))


_INTRODUCTION = """# Methods

Families, and what "built", "applies" and "scope" mean, follow van der Velden et al. 2022 (Medical Image Analysis 79,
102470): post hoc methods explain a network that is already trained, model-based ones are part of it; model-specific
methods look inside, model-agnostic ones only ask; local explanations are of one case, global ones of many.

This page is made by `medxai methods --markdown` from the same descriptions that the program itself goes by.

"""


def _section(name: str) -> str:
    kind = EXPLAINERS[name]
    paragraphs = "\n\n".join(" ".join(p.split()) for p in (inspect.getdoc(kind) or "").split("\n\n"))
    facts = f"- good: {kind.taxonomy.strengths}\n- limits: {kind.taxonomy.limits}\n- from: {kind.paper}; section "
    rows = [(f"`{p.name}`", p.type, p.default, p.range, p.help) for p in parameters(kind)]
    heads = ("parameter", "type", "default", "range", "what it does")
    return (
        f"\n## {name}\n\n**{kind.title}.** {paragraphs}\n\n{facts}{kind.taxonomy.section} of the survey\n\n"
        + _table(heads, rows)
    )


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _in_words(parameter: description.Parameter) -> Parameter:
    choices = [*parameter.choices, "a file"] if parameter.open else parameter.choices
    kind = " or ".join(choices) or _TYPES[parameter.type]
    limits = _range(parameter.minimum, parameter.maximum)
    return Parameter(parameter.name, kind, _typed(parameter.default), limits, parameter.help)


def _range(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return "" if low is high else f"from {low:g}" if high is None else f"to {high:g}"
    return f"{low:g} to {high:g}"


def _typed(default: object) -> str:
    if isinstance(default, (list, tuple)):
        return ",".join(default) or "(none)"
    return str(default).lower() if isinstance(default, bool) else str(default)
