"""Sentences of attributes, as in a report: "A part-solid nodule of 14 mm, spiculated, not calcified"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from MedXAILib.networks.semantic import Attribute

THERE, _SURE = 0.5, 0.65
"""The probability above which a finding is there, and that above which without doubt. So it is with its absence."""

# Shares below this part of the largest are not worth a word; nor are more than so many.
_WORTH, _MOST = 0.1, 3


def described(attributes: Sequence[Attribute], values: Mapping[str, float]) -> str:
    """What is seen, without a full stop, by `values` of the names. Where no attribute is a noun it is a "finding"."""
    noun = _noun(attributes)
    value = values[noun.name] if noun else 1.0
    doubt = "possibly " if 1 - _SURE < value < _SURE else ""
    if noun and value <= THERE:
        return _capital(doubt + predicate(noun, value))
    told = _told(attributes, values)

    def said(role: str) -> list[str]:
        return [_hedged(a, values[a.name]) for a in told if a.role == role]

    thing = " ".join(filter(None, [", ".join(said("before")), noun.yes if noun else "finding"]))
    sized = " ".join(filter(None, [f"{doubt}{_article(thing)} {thing}", " and ".join(said("of"))]))
    return _capital(", ".join([sized, *said("after")]))


def because(attributes: Sequence[Attribute], values: Mapping[str, float], shares: Mapping[str, float]) -> str:
    """Why, by `shares` of the score: ", because it is spiculated (+2.9), although it is of 8 mm (-1.2)".

    Empty when nothing speaks for or against anything.
    """
    noun = _noun(attributes)
    # Nothing can be said of a nodule that is not there.
    told = [noun] if noun and values[noun.name] <= THERE else _told(attributes, values)
    parts = [(sum(shares[b.name] for b in attributes if b == a or (a.scale and b.scale == a.scale)), a) for a in told]
    largest = max(abs(share) for share, _ in parts)
    sides: dict[bool, list[str]] = {True: [], False: []}
    for share, a in sorted(parts, key=lambda part: -abs(part[0])):
        if share and abs(share) >= _WORTH * largest:
            said = a.yes if a.scale else predicate(a, values[a.name])
            sides[share > 0].append(f"{said} ({share:+.1f})")
    favour = sum(shares.values()) > 0
    return "".join(
        f", {word} it is {listed(sides[side][:_MOST])}"
        for word, side in (("because", favour), ("although", not favour))
        if sides[side]
    )


def predicate(attribute: Attribute, value: float) -> str:
    """What an attribute says of something: "it is ..."."""
    if attribute.unit:
        # Two digits, and no exponent.
        amount = f"{float(f'{value:.2g}'):g} {attribute.unit}"
        return f"of {amount}" if attribute.role == "of" else f"of {attribute.name} {amount}"
    negation, there = ("no", f"{_article(attribute.yes)} ") if attribute.role == "noun" else ("not", "")
    return there + attribute.yes if value > THERE else attribute.no or f"{negation} {attribute.yes}"


def listed(parts: Sequence[str]) -> str:
    """Several things in a sentence: "a, b and c"."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def _told(attributes: Sequence[Attribute], values: Mapping[str, float]) -> list[Attribute]:
    """All but those of a scale that are not its likeliest: that it is not those goes without saying."""
    likeliest = {a.scale: a for a in sorted(attributes, key=lambda a: values[a.name]) if a.scale}
    return [a for a in attributes if likeliest.get(a.scale, a) == a]


def _hedged(attribute: Attribute, value: float) -> str:
    if attribute.unit or value >= _SURE or (value <= 1 - _SURE and not attribute.scale):
        return predicate(attribute, value)
    return f"possibly {attribute.yes}"


def _noun(attributes: Sequence[Attribute]) -> Attribute | None:
    return next((a for a in attributes if a.role == "noun"), None)


def _article(words: str) -> str:
    return "an" if words[:1] in "aeiou" else "a"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
