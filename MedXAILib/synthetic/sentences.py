"""What can be said of a patch with a nodule, in several wordings, and what of it a text says.

Only findings that an image of the patch can show. Where in the patch the nodule lies is none:
the patch is put about it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import product

from torch import Tensor

from MedXAILib.synthetic.lung_nodules import ATTRIBUTES
from MedXAILib.tokens import tokens

Facts = dict[str, str]
"""A value of `FINDINGS` by finding."""

FINDINGS = {
    "nodule": ("absent", "present"),
    "size": ("small", "medium", "large"),
    "solidity": ("ground-glass", "part-solid", "solid"),
    "calcification": ("absent", "present"),
    "spiculation": ("absent", "present"),
}
NONE: Facts = {"nodule": "absent"}

_MEDIUM_MM, _LARGE_MM = 11.0, 17.0
_GLASS, _SOLID = 0.1, 0.9

# {a} is where it shows whether there is a nodule at all.
_ALWAYS: dict[str, dict[str, str]] = {
    "size": {"small": "small", "medium": "medium-sized", "large": "large"},
    "solidity": {value: value for value in FINDINGS["solidity"]},
}
_WORDINGS: tuple[tuple[str, Mapping[str, Mapping[str, str]]], ...] = (
    (
        "there is {a} {size} {solidity} {nodule} . its margin is {spiculation} and it is {calcification} .",
        {
            "spiculation": {"absent": "not spiculated", "present": "spiculated"},
            "calcification": {"absent": "not calcified", "present": "calcified"},
        },
    ),
    (
        "{a} {spiculation} {solidity} {nodule} of {size} size is seen , {calcification} .",
        {
            "spiculation": {"absent": "nonspiculated", "present": "spiculated"},
            "calcification": {"absent": "without calcification", "present": "with calcification"},
        },
    ),
    (
        "{size} {calcification} {nodule} of {solidity} density {spiculation} .",
        {
            "spiculation": {"absent": "without spicules", "present": "with spicules"},
            "calcification": {"absent": "noncalcified", "present": "calcified"},
        },
    ),
    (
        "this patch shows {a} {nodule} that is {size} and {solidity} ; it has {calcification} and {spiculation} .",
        {
            "spiculation": {"absent": "no spicules", "present": "many spicules"},
            "calcification": {"absent": "no calcium", "present": "some calcium"},
        },
    ),
)
_WITHOUT = (
    "there is no nodule .",
    "no nodule is seen .",
    "clear lung without a nodule .",
    "this patch shows no nodule .",
)
WORDINGS = len(_WORDINGS)


def facts_of(attributes: Tensor) -> Facts:
    """What a nodule's attributes (7,), in the order of `ATTRIBUTES`, amount to; NaN where there is none."""
    known = dict(zip(ATTRIBUTES, attributes.tolist(), strict=True))
    if known["diameter_mm"] != known["diameter_mm"]:
        return dict(NONE)
    solidity = known["solidity"]
    return {
        "nodule": "present",
        "size": size_of(known["diameter_mm"]),
        "solidity": "ground-glass" if solidity < _GLASS else "solid" if solidity > _SOLID else "part-solid",
        "calcification": FINDINGS["calcification"][known["calcification"] > 0],
        "spiculation": FINDINGS["spiculation"][known["spiculation"] > 0],
    }


def size_of(diameter: float) -> str:
    """The size band of a diameter in mm."""
    return "small" if diameter < _MEDIUM_MM else "medium" if diameter < _LARGE_MM else "large"


def sentence(facts: Facts, wording: int) -> tuple[list[str], list[str | None]]:
    """The facts in words, in one of `WORDINGS` ways, and what each word states: a finding, "" when it states none, and
    None where it depends on whether there is a nodule at all, which nobody can point at."""
    if facts["nodule"] == "absent":
        words = _WITHOUT[wording].split()
        return words, [None] * len(words)
    pattern, phrases = _WORDINGS[wording]
    phrases = {**_ALWAYS, **phrases}
    said: list[tuple[str, str | None]] = []
    for part in pattern.split():
        finding = part.strip("{}")
        if finding == part:
            said.append((part, ""))
        elif finding == "a":
            said.append((finding, None))
        elif finding == "nodule":
            said.append((finding, finding))
        else:
            said += [(word, finding) for word in phrases[finding][facts[finding]].split()]
    return [word for word, _ in said], [finding for _, finding in said]


def references(facts: Facts) -> list[list[str]]:
    """The facts in all wordings."""
    return [sentence(facts, wording)[0] for wording in range(WORDINGS)]


def vocabulary() -> list[str]:
    """Every word of every sentence, in alphabetical order."""
    values = product(*(values for finding, values in FINDINGS.items() if finding != "nodule"))
    every = [dict(zip(FINDINGS, ("present", *v), strict=True)) for v in values]
    return sorted({word for facts in (NONE, *every) for words in references(facts) for word in words})


# What a text may call a finding, as a regular expression of whole words, and the value that this states.
_LEXICON: tuple[tuple[str, str, str], ...] = (
    ("nodule", "present", r"nodules?|mass(?:es)?|lesions?|opacity|opacities"),
    ("nodule", "absent", r"clear lungs?|lungs? (?:is|are) clear"),
    ("size", "small", r"small|tiny|little|sub-?centimet(?:er|re)"),
    ("size", "medium", r"medium(?:-sized)?|intermediate|moderate(?:ly)?(?:-sized)?|mid-?sized?"),
    ("size", "large", r"large|big|bulky"),
    ("solidity", "part-solid", r"part(?:ly|ially)?[- ]solid|semi-?solid|sub-?solid|mixed"),
    ("solidity", "ground-glass", r"ground[- ]glass|ggn|ggo|non-?solid|pure glass"),
    ("solidity", "solid", r"solid"),
    ("calcification", "absent", r"non-?calcified|uncalcified"),
    ("calcification", "present", r"calcifications?|calcified|calcium|calcific"),
    ("spiculation", "absent", r"non-?spiculated|unspiculated|smooth(?:ly)?|well-defined|circumscribed"),
    ("spiculation", "present", r"spiculations?|spiculated|spicules?|spiky|spikes"),
)
_TERM = re.compile("|".join(rf"(?P<_{i}>(?<![\w-])(?:{words})(?![\w-]))" for i, (_, _, words) in enumerate(_LEXICON)))
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(mm|cm)\b")
# What ends the reach of a negation: the end of a clause, or what begins another statement.
_CLAUSE = re.compile(r" [.;:,!?](?= |$)| but | however | although ")
_BEFORE = re.compile(
    r"(?<![\w-])(?:no|not|without|neither|nor|never|absence of|lacks?|lacking|free of|negative for)(?![\w-])"
)
_AFTER = re.compile(
    r"^ (?:(?:is|are|was|were) )?"
    r"(?:not (?:seen|present|visible|found|identified|detected)|absent|excluded|ruled out)(?![\w-])"
)
_STOPS = re.compile(r" (?:and|with|which|that|has|is|are) ")
_OPPOSITE = {"absent": "present", "present": "absent"}


def read(text: str | Sequence[str]) -> Facts:
    """What a text, or a list of words, says of a nodule: by a list of words and the reach of negations.

    A negation reaches what follows it in its clause, up to "and" or "with"; "not seen" or "absent" what it follows.
    Sizes in mm or cm count as their size band. A text without a nodule says nothing else of it.
    """
    found: Facts = {}
    plain = " ".join(tokens(text) if isinstance(text, str) else text)
    for clause in _CLAUSE.split(f" {plain} "):
        for term in _TERM.finditer(clause):
            finding, value, _ = _LEXICON[int((term.lastgroup or "_0")[1:])]
            if _negated(clause[: term.start()], clause[term.end() :]):
                if value not in _OPPOSITE:
                    continue
                value = _OPPOSITE[value]
            # "No other nodule" takes nothing back.
            if (finding, value) == ("nodule", "absent") and finding in found:
                continue
            found[finding] = value
        for size in _SIZE.finditer(clause):
            found["size"] = size_of(float(size[1]) * (10 if size[2] == "cm" else 1))
    if found and "nodule" not in found:
        found["nodule"] = "present"
    return dict(NONE) if found.get("nodule") == "absent" else found


def _negated(before: str, after: str) -> bool:
    _, *reach = _BEFORE.split(before)
    return (bool(reach) and not _STOPS.search(reach[-1])) or bool(_AFTER.match(after))
