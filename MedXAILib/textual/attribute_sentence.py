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
    # Of a scale the likeliest is said; that it is not the others goes without saying.
    likeliest = {a.scale: a.name for a in sorted(attributes, key=lambda a: values[a.name]) if a.scale}

    def said(role: str) -> list[str]:
        told = [a for a in attributes if a.role == role and likeliest.get(a.scale, a.name) == a.name]
        return [_hedged(a, values[a.name], bool(a.scale)) for a in told]

    thing = " ".join(filter(None, [", ".join(said("before")), noun.yes if noun else "finding"]))
    sized = " ".join(filter(None, [f"{doubt}{_article(thing)} {thing}", " and ".join(said("of"))]))
    return _capital(", ".join([sized, *said("after")]))


def because(attributes: Sequence[Attribute], values: Mapping[str, float], shares: Mapping[str, float]) -> str:
    """Why, by `shares` of the score: ", because it is spiculated (+2.9), although it is of 8 mm (-1.2)".

    Empty when nothing speaks for or against anything.
    """
    noun = _noun(attributes)
    # Nothing can be said of a nodule that is not there.
    told = [noun] if noun and values[noun.name] <= THERE else attributes
    largest = max(abs(shares[a.name]) for a in told)
    worth = [a for a in told if shares[a.name] and abs(shares[a.name]) >= _WORTH * largest]
    worth.sort(key=lambda a: -abs(shares[a.name]))
    sides: dict[bool, list[str]] = {True: [], False: []}
    for a in worth:
        sides[shares[a.name] > 0].append(f"{predicate(a, values[a.name])} ({shares[a.name]:+.1f})")
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


def _hedged(attribute: Attribute, value: float, alone: bool) -> str:
    """The predicate with its doubt; the likeliest of a scale `alone` is said whatever its probability."""
    if attribute.unit or value >= _SURE or (value <= 1 - _SURE and not alone):
        return predicate(attribute, value)
    return f"possibly {attribute.yes}"


def _noun(attributes: Sequence[Attribute]) -> Attribute | None:
    return next((a for a in attributes if a.role == "noun"), None)


def _article(words: str) -> str:
    return "an" if words[:1] in "aeiou" else "a"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
