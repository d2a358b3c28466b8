"""Do words, concepts, cases, variants and rules depend on what the network learnt? As `randomisation` asks of maps.

The survey (section 4.3) knows of nobody who has asked this of textual and example-based explanations.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from statistics import mean
from typing import Any

import numpy as np

from MedXAILib.caption import Caption
from MedXAILib.concept_scores import ConceptScores
from MedXAILib.errors import MedXAIError
from MedXAILib.explainer import Question, Teller
from MedXAILib.explanation import Explanation
from MedXAILib.model import Model
from MedXAILib.registry import methods
from MedXAILib.request import check_explained, tell
from MedXAILib.rule import Rule
from MedXAILib.rule_set import RuleSet
from MedXAILib.run import Run
from MedXAILib.similar_cases import SimilarCases
from MedXAILib.target import CaptionTarget, from_spec
from MedXAILib.traversal import Traversal
from MedXAILib.trust.finding import Finding, light
from MedXAILib.trust.randomisation import DRAWS, TITLE, layers, scrambled, upper_third
from MedXAILib.trust.wording import rouge_l
from MedXAILib.volume import Volume

# As for maps.
_GOOD, _FAIR = 0.5, 0.8

# Of two concepts the correlation is always 1, whatever became of them.
_FEWEST = 3
_FEW = f"Nothing can be said: it takes {_FEWEST} concepts that differ in what they mean to the network."

_NONE = "Nothing can be said: none was found."


def judge(
    told: Explanation, model: Model, volume: Volume, run: Run | None = None, given: Mapping[str, Any] | None = None
) -> Finding:
    """How alike (see `likeness`) an explanation stays when the upper third of the layers is re-drawn: the mean of
    three draws. `given` has those of its parameters that were in memory, of which its provenance has but the
    fingerprint. There is no verdict on fewer than three concepts, on concepts that all count the same, or on no case
    or rule.

    Raises:
        MedXAIError: when `model` or `volume` is not the one that was explained, or the network cannot be re-drawn.
    """
    run = run if run is not None else Run()
    made = told.provenance
    check_explained(made, model, volume)
    if isinstance(told, ConceptScores) and (len(_scores(told)) < _FEWEST or len({*_scores(told).values()}) < 2):
        return Finding("randomisation", TITLE, _FEW, None, {})
    if (isinstance(told, SimilarCases) and not told.cases) or (isinstance(told, RuleSet) and not told.rules):
        return Finding("randomisation", TITLE, _NONE, None, {})
    target = from_spec(made.target)
    # What a caption says is to be found again.
    anew = replace(target, caption=None) if isinstance(target, CaptionTarget) else target
    technique = methods()[made.method]
    assert issubclass(technique, Teller)
    asked = {**made.parameters, **(given or {}), **technique.asked_again(told)}
    with model.ready(run.device) as device, model.keeping_last():
        seen = model.prepare(volume, made.region)
        question = Question(model, seen.x[None].to(device, model.dtype), [seen], [target], run)
        question.bind()
        upper = upper_third(layers(question))
        found = []
        for draw, network in enumerate(scrambled(model.network, upper, question.x, made.seed)):
            run.step(draw, DRAWS, "Asking a network that has forgotten")
            quiet = replace(run, seed=made.seed, progress=None, partial=None)
            again = tell(model.with_network(network), volume, made.method, anew, made.region, quiet, **asked)
            found.append(likeness(told, again))
    alike = mean(found)
    colour = light(alike, _GOOD, _FAIR)
    when = f"({alike:.2f} alike) when the upper third of the network's weights was scrambled"
    sentence = {
        "good": f"What is said changed {when}: it depends on what the network learnt.",
        "fair": f"What is said changed only in part {when}: read it with caution.",
        "poor": f"What is said barely changed {when}: do not read it as evidence.",
    }[colour]
    return Finding(
        "randomisation", TITLE, sentence, colour, {"likeness": alike, "lowest": min(found), "highest": max(found)}
    )


def likeness(one: Explanation, other: Explanation) -> float:
    """How alike two explanations of one kind are, 0 to 1: of captions ROUGE-L, of concepts the correlation of their
    scores (sign aside; what has no score counts as 0), of similar cases the share that both name. Prototypes are always
    the same: of them it is the share of the points that both give. Of variants on the way to another decision it is the
    cosine between what changes, and 0 of contrary ones; on a way that is given all networks are shown the same, and it
    is the share of what both add to the value. Of rules it is how alike each is to the nearest of the others (see
    `_same_rule`), on average.

    Raises:
        MedXAIError: for explanations of other kinds.
    """
    if isinstance(one, Caption) and isinstance(other, Caption):
        return rouge_l([_words(other.text)], [[_words(one.text)]])
    if isinstance(one, ConceptScores) and isinstance(other, ConceptScores):
        mine, theirs = _scores(one), _scores(other)
        values = np.array([[mine.get(key, 0.0), theirs.get(key, 0.0)] for key in {**mine, **theirs}]).T
        even = values.size == 0 or (values.min(axis=1) == values.max(axis=1)).any()
        return 0.0 if even else abs(float(np.corrcoef(values)[0, 1]))
    if isinstance(one, SimilarCases) and isinstance(other, SimilarCases):
        if any(case.role == "prototype" for case in one.cases):
            return _shared(*({case.uid: case.similarity for case in cases.cases} for cases in (one, other)))
        mine_too, theirs_too = ({case.uid for case in cases.cases} for cases in (one, other))
        return len(mine_too & theirs_too) / max(1, len(mine_too | theirs_too))
    if isinstance(one, Traversal) and isinstance(other, Traversal):
        if not one.along.startswith("towards "):
            return _shared(_added(one), _added(other))
        a, b = ((t.images[-1] - t.images[t.here]).double().flatten().numpy() for t in (one, other))
        return max(0.0, float(a @ b)) / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-12)
    if isinstance(one, RuleSet) and isinstance(other, RuleSet):
        pairs = [(rule, other.rules) for rule in one.rules] + [(rule, one.rules) for rule in other.rules]
        return mean(max((_same_rule(rule, of) for of in others), default=0.0) for rule, others in pairs) if pairs else 0
    raise MedXAIError(f"How alike {type(one).__name__} and {type(other).__name__} are has no measure.")


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"[\w-]+", text.lower()))


def _scores(told: ConceptScores) -> Mapping[tuple[str, str], float]:
    return {(concept.name, concept.layer): concept.score or 0.0 for concept in told.concepts}


def _shared(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    """The share of points, of one sign, that both have in common."""
    pairs = [(one.get(uid, 0.0), other.get(uid, 0.0)) for uid in {**one, **other}]
    common = sum(min(abs(a), abs(b)) for a, b in pairs if a * b > 0)
    return common / max(sum(max(abs(a), abs(b)) for a, b in pairs), 1e-12)


def _added(told: Traversal) -> Mapping[str, float]:
    return {str(i): step.value - told.steps[told.here].value for i, step in enumerate(told.steps)}


def _same_rule(one: Rule, other: Rule) -> float:
    """The share of conditions that both rules have, each by how near its thresholds are (the ratio of the smaller to
    the greater; none of opposite signs); 0 where they say otherwise."""
    mine, theirs = ({(c.feature, c.relation): c.threshold for c in rule.conditions} for rule in (one, other))
    if one.says != other.says or not mine | theirs:
        return float(one.says == other.says)
    shared = [(value, theirs[key]) for key, value in mine.items() if key in theirs]
    near = [max(0.0, 1 - abs(a - b) / max(abs(a), abs(b), 1e-12)) for a, b in shared]
    return sum(near) / len(mine | theirs)
