"""What a network says in words.

Vinyals et al., "Show and tell: a neural image caption generator", 2015; Singh et al., "From chest X-rays to radiology
reports", 2019.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from MedXAILib.caption import Caption, Word
from MedXAILib.explainer import Question, Taxonomy, Teller
from MedXAILib.explanation import Explanation
from MedXAILib.generator import Decoder, External, Token, decoder, numbered, spoken
from MedXAILib.grid import resample, transform
from MedXAILib.infills.choice import infill
from MedXAILib.report.localisation import highest
from MedXAILib.target import CaptionTarget
from MedXAILib.tokens import written
from MedXAILib.visual.hirescam import HiResCAM
from MedXAILib.volume import Volume

_IMAGE = "change by the image"
_STEPS = 6
"""Points of the curves of the deletion check: few, because every word has one."""
_FAIR = 0.15
"""The score of the deletion check, 0 by chance, below which the reader is warned."""


class Captioning(Teller):
    """What does a captioning network say, how sure is it of each word, and where does the word come from?

    A word comes from the image if the network would find it less, or more, probable had it seen nothing (features of
    0); others follow from the words before them. The map of the former is HiResCAM of the word's log-probability.
    """

    id: ClassVar[str] = "captioning"
    title: ClassVar[str] = "Caption"
    paper: ClassVar[str] = "Vinyals 2015"
    kind: ClassVar[str] = "Caption"
    bare: ClassVar[Mapping[str, Any]] = {"check": False, "least": 1e9}
    taxonomy: ClassVar[Taxonomy] = Taxonomy(
        "3.2",
        "textual",
        "model-based",
        "model-specific",
        ("local",),
        strengths="says what it sees as a reader would; each word with its probability and the map of its gradient",
        limits="fluent whether right or wrong: words of a likely report need no image; only for captioning networks",
    )

    width: int = Field(3, ge=1, le=20, description="beams of the search for the most probable caption")
    least: float = Field(
        0.1, ge=0, description="what the image changes in a word's log-probability, from which the word comes from it"
    )
    check: bool = Field(True, description="whether to delete what each map marks and see if the word goes")

    def tell(self, question: Question, volume: Volume) -> Callable[..., Explanation]:
        if isinstance(question.model.network, External):
            return _reported(question.model.network.generator.generate(volume), volume)
        network = decoder(question.model.network, question.model.name)
        features, asked = self._settled(question, network)
        question.bound = asked.bound
        words = numbered(network, [_said(asked)]).to(features.device)
        with torch.no_grad():
            seen, blind = (_of_words(network, f, words) for f in (features, torch.zeros_like(features)))
        numbers = {t: {_IMAGE: change} for t, change in enumerate((seen - blind).tolist())}
        maps = self.maps(asked, features, words, numbers)
        return self._caption(asked, spoken(network, words[0]), seen.exp().tolist(), maps, numbers, volume)

    def _settled(self, question: Question, network: Decoder) -> tuple[Tensor, Question]:
        """The features (1, ...), and the question about what the person said, or a search of this width found."""
        (target,) = question.targets
        with torch.no_grad():
            features = question.model.forward(question.x)
            question.run.cost.forwards += 1
            if not isinstance(target, CaptionTarget) or target.caption is None:
                target = CaptionTarget(caption=" ".join(spoken(network, network.beam(features, self.width)[0])))
        asked = Question(question.model, question.x, question.seen, [target], question.run)
        asked.bind()
        return features, asked

    def maps(
        self, question: Question, features: Tensor, words: Tensor, numbers: dict[int, dict[str, float]]
    ) -> dict[int, Tensor]:
        """The map (1, 1, *spatial) on the network's input grid of each word that has one; what is found out about words
        on the way is added to the `numbers` of each."""
        maps = self.gradients(question, [t for t in numbers if self.from_image(numbers[t])])
        for t, map in maps.items():
            numbers[t] |= self.checked(question, t, {"gradient": map})
        return maps

    def from_image(self, numbers: dict[str, float]) -> bool:
        """Whether a word with these numbers comes from the image."""
        return abs(numbers[_IMAGE]) >= self.least

    def gradients(self, question: Question, words: Sequence[int]) -> dict[int, Tensor]:
        """HiResCAM of the log-probability of each word."""
        asked = _about(question, words)
        found = HiResCAM.model_validate({}).attribute(asked) if words else []
        return {t: attribution.values for t, attribution in zip(words, found, strict=True)}

    def checked(self, question: Question, word: int, maps: dict[str, Tensor]) -> dict[str, float]:
        """What is left of a word when what each of its maps marks is deleted, against the reverse: insertion less
        deletion (see `MedXAILib.trust.faithfulness`)."""
        if not self.check:
            return {}
        # Which needs what this is registered in.
        from MedXAILib.trust.faithfulness import curves

        asked = _about(question, [word])
        found = {}
        for name, map in maps.items():
            of_map = curves(asked, map[0].sum(0).detach(), infill(asked, "blur"), _STEPS)
            if of_map is not None:
                found[f"{name}: deletion check"] = of_map.score
        return found

    def _caption(
        self,
        question: Question,
        said: Sequence[str],
        confidence: Sequence[float],
        maps: dict[int, Tensor],
        numbers: dict[int, dict[str, float]],
        volume: Volume,
    ) -> Callable[..., Explanation]:
        placed = {
            t: resample(map[0].float().cpu(), question.seen[0].affine, volume.shape, volume.affine)
            for t, map in maps.items()
        }
        poor = [f"'{said[t]}'" for t in maps if any(v < _FAIR for n, v in numbers[t].items() if "deletion" in n)]
        if poor:
            question.run.note(
                f"What a map of {', '.join(dict.fromkeys(poor))} marks is hardly what the word comes from: its "
                f"deletion check is below {_FAIR}, where chance is 0."
            )
        return made(said, confidence, placed, numbers, volume)


def made(
    said: Sequence[str],
    confidence: Sequence[float | None],
    maps: dict[int, Tensor],
    numbers: dict[int, dict[str, float]],
    volume: Volume,
) -> Callable[..., Explanation]:
    """What makes a caption of words, with the map (1, D, H, W) of those that have one, on the grid of `volume`."""
    text, starts = written(said)
    shape = volume.shape
    if len(shape) < 3:
        # A plain image has no maps: those of a caption are of volumes.
        maps, shape = {}, (1, 1, 1)
    words = []
    for t, (word, start) in enumerate(zip(said, starts, strict=True)):
        if not any(letter.isalnum() for letter in word):
            continue
        of_map = maps.get(t)
        place = None if of_map is None or not bool(of_map.any()) else _peak(of_map, volume)
        index = None if of_map is None else list(maps).index(t)
        end = start + len(word)
        words.append(Word(text[start:end], start, end, confidence[t], index, place, numbers.get(t, {})))
    stacked = torch.cat(list(maps.values())) if maps else torch.zeros(0, *shape)
    return partial(Caption, residual={}, text=text, words=tuple(words), maps=stacked, affine=volume.affine)


def _reported(report: Sequence[Token], volume: Volume) -> Callable[..., Explanation]:
    """The caption of somebody else's generator."""
    maps = {
        t: resample(token.attention.data, token.attention.affine, volume.shape, volume.affine)
        for t, token in enumerate(report)
        if token.attention is not None
    }
    sure = [None if p is None else float(np.exp(p)) for p in (token.log_probability for token in report)]
    return made([token.text for token in report], sure, maps, {}, volume)


def _peak(map: Tensor, volume: Volume) -> tuple[float, float, float]:
    r, a, s = transform(volume.affine, np.array(highest(map[0]))).tolist()
    return r, a, s


def _said(question: Question) -> str:
    (target,) = question.targets
    assert isinstance(target, CaptionTarget) and isinstance(target.caption, str)
    return target.caption


def _about(question: Question, words: Sequence[int]) -> Question:
    """The question of each of `words` of the caption that was settled."""
    targets = [CaptionTarget(t, _said(question)) for t in words]
    return Question(question.model, question.x, question.seen, targets, question.run)


def _of_words(network: Decoder, features: Tensor, words: Tensor) -> Tensor:
    """The log-probability (T,) of each of `words` (1, T) after those before it."""
    scores = network.log_probabilities(features, words)[0, :-1]
    return scores.gather(1, words[0, :, None])[:, 0]
