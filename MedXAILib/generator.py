"""What finds words: a network whose output can be put in words, or somebody else's report generator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from MedXAILib.errors import MedXAIError, unknown
from MedXAILib.tokens import tokens
from MedXAILib.volume import Volume

BEAMS = 3
"""Beams when nobody says how many."""


@runtime_checkable
class Decoder(Protocol):
    """A network whose output (N, ...), here called features, words are found in.

    Words are numbers: 0 begins and ends a caption and fills up what is shorter than others, 1 is the first word of
    `vocabulary`. A network that also has `attended(features, words)`, as `MedXAILib.networks.captioner` has, can tell
    where it looks for each word.
    """

    @property
    def vocabulary(self) -> Sequence[str]:
        """The words that it knows."""

    def log_probabilities(self, features: Tensor, words: Tensor) -> Tensor:
        """The log-probability of each word, 0 first, after each of `words` (N, T) up to there: (N, T + 1, V + 1)."""

    def beam(self, features: Tensor, width: int = BEAMS) -> Tensor:
        """The most probable words (N, T) that beam search of this width finds."""


@dataclass(frozen=True, eq=False)
class Token:
    """A word of a report, or a punctuation mark, with its log-probability and where it was looked for (1, D, H, W), on
    any grid, if that is known."""

    text: str
    log_probability: float | None = None
    attention: Volume | None = None


class ReportGenerator(Protocol):
    """Somebody else's report generator, however it works."""

    def generate(self, volume: Volume) -> Sequence[Token]:
        """The report of a scan, word by word."""


class External(nn.Module):
    """A report generator as the network of a model: `Model(External(generator), task="captioning")`.

    Its captions can be shown with what it tells of them itself; nothing else of it can be explained.
    """

    def __init__(self, generator: ReportGenerator) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, image: Tensor) -> Tensor:
        return image.new_zeros(len(image), 1)


def decoder(network: object, name: str) -> Decoder:
    """`network`, called `name`, as what finds words.

    Raises:
        MedXAIError: when it does not.
    """
    if not isinstance(network, Decoder):
        raise MedXAIError(
            f"{name} finds no words: a captioning network has `vocabulary`, `log_probabilities` and `beam` (see "
            "MedXAILib.generator), and a report generator is wrapped in External."
        )
    return network


def spoken(network: Decoder, words: Tensor) -> list[str]:
    """The words of the numbers (T,)."""
    return [network.vocabulary[word - 1] for word in words.tolist() if word]


def numbered(network: Decoder, captions: Sequence[str]) -> Tensor:
    """The numbers (N, T) of the words of captions.

    Raises:
        MedXAIError: for a word that the network does not know, naming the nearest.
    """
    number = {word: i + 1 for i, word in enumerate(network.vocabulary)}
    rows = []
    for caption in captions:
        # What the network says itself may be spelt otherwise than a person would.
        words = caption.split() if all(word in number for word in caption.split()) else tokens(caption)
        for word in words:
            if word not in number:
                raise unknown("word in the network's vocabulary", word, network.vocabulary)
        rows.append(torch.tensor([number[word] for word in words], dtype=torch.long))
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)
