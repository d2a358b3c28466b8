"""How near are the words of a network to those of a reader, and does it look at the image to find them?

BLEU-1 to 4 of the whole corpus (Papineni et al. 2002), ROUGE-L (Lin 2004) and CIDEr-D (Vedantam et al. 2015) as the
COCO captioning evaluation computes them. METEOR-es is METEOR (Banerjee and Lavie 2005) with exact and stem matches only
and a short stemmer of our own: no synonyms, so that no dictionary is needed; its values are not those of the Java
program.

A caption can be fluent and wrong, or a good guess that has seen no image. So what counts is the findings that it
states, and each number stands beside the same for the captions of other images (`shuffled_...`) and for the one that is
commonest among the references (`most_frequent_...`).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, pairwise

import torch

from MedXAILib.errors import MedXAIError

Words = Sequence[str]
Facts = Mapping[str, str]

_N = 4
# As COCO has them.
_TINY, _SMALL = 1e-15, 1e-9
_ROUGE_BETA = 1.2
_CIDER_SIGMA = 6.0
# Of METEOR's second version, which NLTK has.
_ALPHA, _BETA, _GAMMA = 0.9, 3.0, 0.5
_ENDINGS = ("ations", "ation", "ings", "ing", "ies", "ed", "es", "s", "ly", "e")


def wording(
    captions: Sequence[Words],
    references: Sequence[Sequence[Words]],
    read: Callable[[Words], Facts] | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """All of it: `captions`, each a list of words, beside one or more `references` each.

    `read` gives the findings that a text states, for `f1_...`; all references of an image are to state the same.

    Raises:
        MedXAIError: when there are fewer than two captions, or not as many references, or one has none.
    """
    if len(captions) < 2 or len(captions) != len(references) or not all(references):
        raise MedXAIError(
            f"There are {len(captions)} captions and references for {sum(map(bool, references))}: give two captions or "
            "more, with at least one reference each."
        )
    common, _ = Counter(tuple(words) for words in chain.from_iterable(references)).most_common(1)[0]
    told = {"": captions, "shuffled_": shuffled(captions, seed), "most_frequent_": [common] * len(captions)}
    return {
        prefix + name: value for prefix, said in told.items() for name, value in _scores(said, references, read).items()
    }


def shuffled(captions: Sequence[Words], seed: int = 0) -> list[Words]:
    """Every caption in another's place, in a random order."""
    order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(seed)).tolist()
    # Each takes what belongs to the next in that order, so that none keeps its own.
    after = dict(zip(order, [*order[1:], order[0]], strict=True))
    return [captions[after[i]] for i in range(len(captions))]


def finding_f1(said: Sequence[Facts], true: Sequence[Facts]) -> dict[str, float]:
    """For each finding the F1 score of each of its values, averaged over the values that occur in truth (macro F1), and
    `all`, their mean: a value that is said and not true counts against it, and one that is true and not said."""
    pairs = list(zip(said, true, strict=True))
    found = {}
    for finding in dict.fromkeys(chain.from_iterable(true)):
        scores = []
        for value in sorted({facts[finding] for facts in true if finding in facts}):
            both = [(s.get(finding) == value, t.get(finding) == value) for s, t in pairs]
            scores.append(2 * sum(s and t for s, t in both) / sum(s + t for s, t in both))
        found[finding] = sum(scores) / len(scores)
    return {**found, "all": sum(found.values()) / len(found)}


def bleu(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """BLEU-1 to BLEU-4 of the corpus; a caption's length is held against that of its nearest reference."""
    right, guessed, length, nearest = [0] * _N, [0] * _N, 0, 0
    for caption, several in zip(captions, references, strict=True):
        length += len(caption)
        nearest += min((abs(len(r) - len(caption)), len(r)) for r in several)[1]
        for n in range(_N):
            most: Counter[Words] = Counter()
            for reference in several:
                most |= _grams(reference, n + 1)
            guessed[n] += max(0, len(caption) - n)
            right[n] += (_grams(caption, n + 1) & most).total()
    short = min(1.0, math.exp(1 - (nearest + _SMALL) / (length + _TINY)))
    precision = [(r + _TINY) / (g + _SMALL) for r, g in zip(right, guessed, strict=True)]
    return [short * math.prod(precision[:n]) ** (1 / n) for n in range(1, _N + 1)]


def rouge_l(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """The longest common subsequence as an F score that favours recall, mean over captions."""
    scores = []
    for caption, several in zip(captions, references, strict=True):
        shared = [(_common(caption, r), len(r)) for r in several]
        precision = max(s for s, _ in shared) / max(1, len(caption))
        recall = max(s / max(1, length) for s, length in shared)
        favoured = _ROUGE_BETA**2
        both = recall + favoured * precision
        scores.append((1 + favoured) * precision * recall / both if both else 0.0)
    return sum(scores) / len(scores)


def cider_d(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """How alike the rare n-grams are, clipped and held against the difference in length, mean over captions; 0 to 10.

    What is rare is judged by the references of this corpus.
    """
    seen: Counter[Words] = Counter()
    for several in references:
        seen.update({gram for r in several for n in range(_N) for gram in _grams(r, n + 1)})
    images = math.log(len(references))

    def weighed(words: Words, n: int) -> dict[Words, float]:
        return {gram: count * (images - math.log(max(1, seen[gram]))) for gram, count in _grams(words, n).items()}

    total = 0.0
    for caption, several in zip(captions, references, strict=True):
        for reference in several:
            penalty = math.exp(-((len(caption) - len(reference)) ** 2) / (2 * _CIDER_SIGMA**2))
            for n in range(1, _N + 1):
                one, other = weighed(caption, n), weighed(reference, n)
                norm = math.hypot(*one.values()) * math.hypot(*other.values())
                shared = sum(min(value, other[gram]) * other[gram] for gram, value in one.items() if gram in other)
                total += penalty * (shared / norm if norm else shared) / len(several)
    return 10 * total / _N / len(captions)


def meteor_es(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> float:
    """METEOR with exact and stem matches, mean over captions of the best reference of each."""
    pairs = zip(captions, references, strict=True)
    return sum(max(_meteor(caption, r) for r in several) for caption, several in pairs) / len(captions)


def stem(word: str) -> str:
    """A word without a common English ending, when three letters or more are left of it."""
    ending = next((e for e in _ENDINGS if word.endswith(e) and len(word) - len(e) >= 3), "")
    return word.removesuffix(ending)


def _scores(
    captions: Sequence[Words], references: Sequence[Sequence[Words]], read: Callable[[Words], Facts] | None
) -> dict[str, float]:
    found = {f"bleu_{n + 1}": value for n, value in enumerate(bleu(captions, references))}
    found |= {
        "rouge_l": rouge_l(captions, references),
        "meteor_es": meteor_es(captions, references),
        "cider_d": cider_d(captions, references),
    }
    if read is not None:
        f1 = finding_f1([read(words) for words in captions], [read(several[0]) for several in references])
        found |= {f"f1_{finding}": value for finding, value in f1.items()}
    return found


def _grams(words: Words, n: int) -> Counter[Words]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _common(one: Words, other: Words) -> int:
    """The length of the longest common subsequence."""
    row: dict[int, int] = defaultdict(int)
    for a in one:
        above = dict(row)
        for j, b in enumerate(other):
            row[j] = above.get(j - 1, 0) + 1 if a == b else max(row[j], row.get(j - 1, 0))
    return row.get(len(other) - 1, 0)


def _meteor(caption: Words, reference: Words) -> float:
    matches = _aligned(caption, reference)
    if not matches:
        return 0.0
    precision, recall = len(matches) / len(caption), len(matches) / len(reference)
    mean = precision * recall / (_ALPHA * precision + (1 - _ALPHA) * recall)
    chunks = 1 + sum(b != (a[0] + 1, a[1] + 1) for a, b in pairwise(matches))
    return mean * (1 - _GAMMA * (chunks / len(matches)) ** _BETA)


def _aligned(caption: Words, reference: Words) -> list[tuple[int, int]]:
    """Which word of the caption is which of the reference: the same words, then those of the same stem; the last first,
    as NLTK does."""
    left, right = dict(enumerate(caption)), dict(enumerate(reference))
    matches = []
    for form in (str, stem):
        for i in sorted(left, reverse=True):
            j = next((j for j in sorted(right, reverse=True) if form(left[i]) == form(right[j])), None)
            if j is not None:
                matches.append((i, j))
                del left[i], right[j]
    return sorted(matches)
