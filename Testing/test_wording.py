"""What captions are worth: scores as the field computes them, findings that a text states, and what a guess gets."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch

import MedXAILib as mx
from MedXAILib.synthetic.lung_nodules import ATTRIBUTES, draw
from MedXAILib.synthetic.sentences import (
    FINDINGS,
    NONE,
    WORDINGS,
    facts_of,
    read,
    references,
    sentence,
    vocabulary,
)
from MedXAILib.tokens import tokens, written
from MedXAILib.trust.wording import bleu, cider_d, finding_f1, meteor_es, rouge_l, shuffled, stem, wording

CAPTIONS = [
    "there is a large solid nodule . its margin is spiculated and it is not calcified .",
    "a spiculated part-solid nodule of small size is seen , without calcification .",
    "there is no nodule .",
    "large calcified nodule of solid density with many many spicules .",
    "the lungs are clear",
    "spicules spicules spicules , calcified nodule",
]
REFERENCES = [
    [
        "there is a large part-solid nodule . its margin is spiculated and it is not calcified .",
        "a spiculated solid nodule of large size is seen , without calcifications .",
    ],
    [
        "a nonspiculated part-solid nodule of small size is seen , with calcification .",
        "small calcified nodule of part-solid density without spicules .",
        "there is a small part-solid nodule .",
    ],
    ["no nodules are seen .", "there is no nodule ."],
    ["large calcified nodule of solid density with spicules .", "there is a large solid nodule ."],
    ["there is a small solid nodule with smooth margins .", "no nodule is seen ."],
    ["with spicules , calcified nodule", "spicules and a calcified nodule"],
]
SAID = [caption.split() for caption in CAPTIONS]
TRUE = [[reference.split() for reference in several] for several in REFERENCES]


def test_scores_are_those_of_the_coco_evaluation() -> None:
    # pycocoevalcap 1.2: Bleu(4), Rouge, Cider of the strings above.
    assert bleu(SAID, TRUE) == pytest.approx(
        [0.8392857142707271, 0.7880808515297886, 0.7338640869148478, 0.6916262966335552], abs=1e-9
    )
    assert rouge_l(SAID, TRUE) == pytest.approx(0.7405419670076451, abs=1e-9)
    assert cider_d(SAID, TRUE) == pytest.approx(3.054641322936231, abs=1e-9)


def test_bleu_is_that_of_sacrebleu() -> None:
    # sacrebleu 2.6.0: corpus_bleu(tokenize="none", smooth_method="none") with the first two references of each.
    two = [several[:2] for several in TRUE]
    assert 100 * bleu(SAID, two)[3] == pytest.approx(69.16262966485807, abs=1e-4)


def test_a_short_caption_pays_for_it() -> None:
    # Two of four words: all n-grams right, and exp(1 - 4 / 2) for the length.
    assert bleu([["a", "large"]], [[["a", "large", "solid", "nodule"]]])[:2] == pytest.approx(
        [0.36787944] * 2, abs=1e-6
    )


def test_meteor_is_that_of_nltk_without_synonyms() -> None:
    # nltk 3.10.4: meteor_score with a dictionary that knows no synonyms; its Porter stemmer agrees on these words.
    alone = [meteor_es([caption], [several]) for caption, several in zip(SAID, TRUE, strict=True)]
    expected = [0.9402573529411764, 0.8375715193897013, 0.996, 0.9728931830381106, 0.0, 0.778186274509804]
    assert alone == pytest.approx(expected, abs=1e-9)
    assert meteor_es(SAID, TRUE) == pytest.approx(sum(expected) / 6, abs=1e-9)
    # Three matches by stem and one exact, or exact ones before those by stem.
    reference = [["nodule with smooth margin".split()]]
    assert meteor_es(["nodules with smooth margins".split()], reference) == pytest.approx(0.9921875)
    assert meteor_es(["nodules with smooth margins nodule".split()], reference) == pytest.approx(0.9146341463414633)
    assert stem("calcifications") == stem("calcification") != stem("calcium")


def test_the_score_of_findings_is_the_mean_f1_of_their_values() -> None:
    # large: 1 right, 1 wrongly said, 1 missed: F1 0.5. small: 1 right, 1 wrongly said, 1 missed. Nothing said counts
    # as missed: calcified is said in 0 of 1 cases.
    true = [{"size": "large"}, {"size": "large"}, {"size": "small"}, {"size": "small", "calcification": "present"}]
    said = [{"size": "large"}, {"size": "small"}, {"size": "large"}, {"size": "small"}]
    assert finding_f1(said, true) == pytest.approx({"size": 0.5, "calcification": 0.0, "all": 0.25})
    assert finding_f1(true, true) == {"size": 1.0, "calcification": 1.0, "all": 1.0}


def test_guesses_stand_beside_the_captions() -> None:
    truth = [facts_of(attributes) for attributes in draw(60, seed=3)[0]]
    several = [references(facts) for facts in truth]
    perfect = [words[i % WORDINGS] for i, words in enumerate(several)]
    found = wording(perfect, several, read)
    assert found["bleu_4"] == pytest.approx(1, abs=1e-6) and found["f1_all"] == 1
    assert found["shuffled_bleu_4"] < 0.7 * found["bleu_4"] and found["shuffled_f1_all"] < 0.6
    common = Counter(tuple(words) for r in several for words in r).most_common(1)[0][0]
    assert found["most_frequent_bleu_4"] == pytest.approx(bleu([common] * 60, several)[3])
    assert found["most_frequent_f1_all"] < 0.2


def test_shuffling_leaves_no_caption_in_its_place() -> None:
    captions = [[str(i)] for i in range(7)]
    for seed in range(20):
        moved = shuffled(captions, seed)
        assert sorted(moved) == captions and all(a != b for a, b in zip(moved, captions, strict=True))
    assert shuffled(captions, 0) == shuffled(captions, 0) != shuffled(captions, 1)


def test_scores_need_captions_and_references() -> None:
    with pytest.raises(mx.MedXAIError, match="give two captions or more"):
        wording([["a"]], [[["a"]]])
    with pytest.raises(mx.MedXAIError, match="at least one reference each"):
        wording([["a"], ["b"]], [[["a"]], []])


def every() -> list[dict[str, str]]:
    values = itertools.product(*list(FINDINGS.values())[1:])
    return [NONE, *(dict(zip(FINDINGS, ("present", *v), strict=True)) for v in values)]


def test_whatever_the_wording_the_reader_finds_the_facts() -> None:
    assert len(every()) == 37
    for facts in every():
        for words in references(facts):
            assert read(words) == facts
            assert read(written(words)[0]) == facts
    assert len({tuple(words) for facts in every() for words in references(facts)}) == 37 * WORDINGS


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("A solid nodule of 8 mm; calcifications are not seen. No other nodule.", "present small solid absent -"),
        ("No calcification or spiculation. Part solid lesion, 2.1 cm.", "present large part-solid absent absent"),
        ("Large nodule with smooth margins but without calcium.", "present large - absent absent"),
        ("Spicules are absent, calcification present, subsolid nodule.", "present - part-solid present absent"),
        ("A nodule without spicules and with calcification.", "present - - present absent"),
        ("The nodule is not solid and not large.", "present - - - -"),
        ("Ground glass lesion with a speck of calcium.", "present - ground-glass present -"),
        ("Lungs are clear, no nodule, no calcification.", "absent - - - -"),
        ("The heart is normal.", "- - - - -"),
    ],
)
def test_other_peoples_words_are_read_too(text: str, facts: str) -> None:
    expected = dict(zip(("nodule", "size", "solidity", "calcification", "spiculation"), facts.split(), strict=True))
    assert read(text) == {finding: value for finding, value in expected.items() if value != "-"}


def test_facts_follow_from_the_attributes() -> None:
    rows = {
        "size": (8.0, 1, 0, 0, 1, 0, 1),
        "medium": (11.0, 1, 0, 0, 1, 0, 1),
        "large": (17.0, 1, 0, 1.2, 0.02, 1, 1),
        "glass": (8.0, 1, 0, 0, 0.4, 0, 1),
    }
    assert len(ATTRIBUTES) == 7
    facts = {name: list(facts_of(torch.tensor(row)).values()) for name, row in rows.items()}
    assert facts["size"] == ["present", "small", "solid", "absent", "absent"]
    assert facts["medium"][1] == "medium"
    assert facts["large"] == ["present", "large", "ground-glass", "present", "present"]
    assert facts["glass"][2] == "part-solid"
    assert facts_of(torch.full((7,), torch.nan)) == NONE


def test_words_know_which_finding_they_state() -> None:
    facts = {**every()[1], "size": "large", "spiculation": "absent"}
    for wording_ in range(WORDINGS):
        words, stated = sentence(facts, wording_)
        assert stated[words.index("large")] == "size" and stated[words.index("nodule")] == "nodule"
        assert {f for f in stated if f} == set(FINDINGS)
        assert stated[-1] == "" and words[-1] == "."
        assert "a" not in words or stated[words.index("a")] is None
        # Another value of a finding changes no other words than those that state it.
        for finding in ("size", "calcification"):
            other = next(v for v in FINDINGS[finding] if v != facts[finding])
            changed = sentence({**facts, finding: other}, wording_)
            kept = [[w for w, f in zip(*made, strict=True) if f != finding] for made in ((words, stated), changed)]
            assert kept[0] == kept[1]
    assert sentence(NONE, 0)[1] == [None] * 5


def test_a_text_is_its_words() -> None:
    words = tokens('A 3.5 mm part-solid nodule, "large".  It\'s seen.')
    assert words == ["a", "3.5", "mm", "part-solid", "nodule", ",", '"', "large", '"', ".", "it's", "seen", "."]
    text, starts = written(["this", "is", "large", ",", "that", "is", "not", ".", "no", "nodule", "."])
    assert text == "This is large, that is not. No nodule."
    assert [text[s] for s in starts] == list("Til,tin.Nn.")
    assert tokens(text) == ["this", "is", "large", ",", "that", "is", "not", ".", "no", "nodule", "."]
    assert all(tokens(word) == [word] for word in vocabulary())
