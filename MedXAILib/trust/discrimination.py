"""Does a map say why it is this class, or only where the network looks?

Rudin, "Stop explaining black box machine learning models for high stakes decisions", 2019: maps of the class that is
right and of one that is wrong can look the same, and then explain neither.
"""

from __future__ import annotations

from dataclasses import replace

from MedXAILib.target import ClassTarget
from MedXAILib.trust.finding import Finding, light
from MedXAILib.trust.judged import Judged
from MedXAILib.trust.likeness import correlation, extent

TITLE = "Is it about this answer?"

# As for networks that are scrambled: half-way from nothing in common to the same picture, and clearly beyond.
_GOOD, _FAIR = 0.5, 0.8


def judge(judged: Judged) -> Finding | None:
    """How alike (Pearson, with sign) the map is to that of the most likely other class.

    With sign, because what speaks against the one of two classes may well speak for the other. None when it is not the
    score of a class that was explained: the lead over another class sets two classes apart already.
    """
    model, target = judged.model, judged.target
    if (
        model.task != "classification"
        or not isinstance(target, ClassTarget)
        or target.layer
        or target.versus is not None
    ):
        return None
    output = model.predict(judged.volume, judged.explanation.provenance.region).output
    scores = model.probabilities(output)[0].clone()
    assert isinstance(target.which, int)
    if len(scores) < 2:
        return None
    scores[target.which] = -1.0
    other = int(scores.argmax())
    box = extent(judged.explanation.data)
    if box is None:
        return Finding("discrimination", TITLE, "The map is the same everywhere: it tells no classes apart.", None, {})
    found = judged.again(target=replace(target, which=other)).data
    alike = correlation(judged.explanation.data[box], found[box])
    this, that = (f"'{model.class_name(index, output.shape[1])}'" for index in (target.which, other))
    colour = light(alike, _GOOD, _FAIR)
    sentence = {
        "good": f"The map for {that} is another one ({alike:.2f} alike): this one is about why it is {this}.",
        "fair": f"The map for {that} is much the same ({alike:.2f} alike): only in part is it about {this}.",
        "poor": f"The map for {that} looks the same ({alike:.2f} alike): it shows what the network looks at, not why "
        f"it decided for {this}.",
    }[colour]
    return Finding("discrimination", TITLE, sentence, colour, {"likeness": alike, "other": float(other)})
