"""A small network that says in words what it sees in a lung patch, and where it looks for each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from MedXAILib.networks.lung_nodule import LungNoduleClassifier

END = 0
"""The word that begins and ends a sentence and fills up what is shorter than others."""


class Attention(NamedTuple):
    """Where each of T words looks: the share of each place of the grid (N, T, *grid) and of the `sentinel` (N, T),
    which sum to 1, and what is seen there (N, T, K)."""

    grid: Tensor
    sentinel: Tensor
    seen: Tensor


class Captioner(nn.Module):
    """Image (N, 1, D, H, W), at least 24 voxels a side -> features (N, K, D / 4, H / 4, W / 4), which words come from.

    The features are those of `LungNoduleClassifier` at `evidence`. Words, as indices into `vocabulary`, are not an
    output but methods, because what the next word is depends on those before it.

    Without `attention` the mean and maximum of the features are the first thing that an LSTM reads, and the only that
    it ever sees of the image (Vinyals et al., "Show and tell", 2015). With it, the LSTM sees the words alone: before
    each word it looks at places of the grid or, for a word that the others tell, at a sentinel of its own (Lu et al.,
    "Knowing when to look", 2017), and a second time at tokens of the `findings` (the values of each) that
    `finding_head` sees in the patch as a whole (dual attention, as in Zhang et al., "TandemNet", 2017), which in
    training are left out as often as not; without findings there is no second look. `seen_head` reads the findings off
    what a word looks at, for the visual-word constraint in training.
    """

    def __init__(
        self,
        vocabulary: Sequence[str],
        findings: Mapping[str, Sequence[str]],
        attention: bool = True,
        width: int = 16,
        hidden: int = 96,
    ) -> None:
        super().__init__()
        self.vocabulary = tuple(vocabulary)
        self.findings = {name: tuple(values) for name, values in findings.items()}
        self.attention = attention
        trunk = LungNoduleClassifier(width=width)
        self.stem, self.texture, self.shape, self.evidence = trunk.stem, trunk.texture, trunk.shape, trunk.evidence
        seen, values = 4 * width, sum(map(len, self.findings.values()))
        self.words = nn.Embedding(1 + len(self.vocabulary), hidden)
        self.cell = nn.LSTMCell(hidden, hidden)
        self.speak = nn.Linear(hidden, 1 + len(self.vocabulary))
        if values:
            self.finding_head = nn.Linear(2 * seen, values)
        if not attention:
            self.image = nn.Sequential(nn.BatchNorm1d(2 * seen), nn.Linear(2 * seen, hidden))
            return
        self.gate = nn.Linear(2 * hidden, hidden)
        self.query = nn.Linear(hidden, seen)
        self.key = nn.Linear(seen, seen, bias=False)
        self.sentinel_key = nn.Linear(hidden, seen)
        self.value = nn.Linear(seen, hidden)
        if values:
            self.seen_head = nn.Linear(seen, values)
            self.tokens = nn.Parameter(torch.randn(values, hidden) / hidden**0.5)
            self.token_query = nn.Linear(hidden, hidden)

    def forward(self, image: Tensor) -> Tensor:
        found: Tensor = self.evidence(self.shape(self.texture(self.stem(image))), F.avg_pool3d(image, 4))
        return found

    def log_probabilities(self, features: Tensor, words: Tensor, findings: Tensor | float = 1.0) -> Tensor:
        """The log-probability of every word, `END` first, after each of `words` (N, T) up to there: (N, T + 1, V + 1).

        At t = 0 nothing has been said. `findings` (a number, or N) is how much the second look, at them, counts.
        """
        return self.attended(features, words, findings)[0]

    def attended(
        self, features: Tensor, words: Tensor, findings: Tensor | float = 1.0
    ) -> tuple[Tensor, Attention | None]:
        """`log_probabilities`, and where each of the T + 1 words looks; None of a network without attention."""
        return self._look(features, *self._read(features, words), findings)

    def finding_scores(self, features: Tensor) -> dict[str, Tensor]:
        """Logits (N, values) of each finding, from the patch as a whole."""
        return self.by_finding(self.finding_head(pooled(features)))

    def by_finding(self, scores: Tensor) -> dict[str, Tensor]:
        """Logits (N, all values) by finding, each (N, values)."""
        split = scores.split([len(values) for values in self.findings.values()], dim=-1)
        return dict(zip(self.findings, split, strict=True))

    @torch.no_grad()
    def beam(self, features: Tensor, width: int = 3, longest: int = 40) -> Tensor:
        """The most probable words (N, T) by beam search, filled up with `END`; up to `longest` of them."""
        count, choices = len(features), 1 + len(self.vocabulary)
        kept = features.repeat_interleave(width, 0)
        words = torch.zeros(count * width, 0, dtype=torch.long, device=features.device)
        # At first all beams are one.
        score = torch.full((count, width), -torch.inf, device=features.device)
        score[:, 0] = 0
        over = torch.zeros(count, width, dtype=torch.bool, device=features.device)
        only_end = torch.full((choices,), -torch.inf, device=features.device)
        only_end[END] = 0
        while words.shape[1] < longest and not bool(over.all()):
            hidden, sentinel = self._read(kept, words)
            after = self._look(kept, hidden[:, -1:], sentinel[:, -1:])[0].reshape(count, width, choices)
            after = torch.where(over[..., None], only_end, after)
            score, best = (score[..., None] + after).flatten(1).topk(width, dim=1)
            parent, word = best // choices, best % choices
            rows = (parent + width * torch.arange(count, device=features.device)[:, None]).flatten()
            words = torch.cat([words[rows], word.reshape(-1, 1)], dim=1)
            over = over.gather(1, parent) | (word == END)
        return words.reshape(count, width, -1)[:, 0]

    def _read(self, features: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """The LSTM's state and the sentinel before each word, both (N, T + 1, hidden)."""
        said = self.words(F.pad(words, (1, 0), value=END))
        h = c = said.new_zeros(len(said), said.shape[2])
        if not self.attention:
            h, c = self.cell(self.image(pooled(features)), (h, c))
        states, sentinels = [], []
        for word in said.unbind(1):
            before = h
            h, c = self.cell(word, (h, c))
            states.append(h)
            if self.attention:
                sentinels.append(self.gate(torch.cat([word, before], 1)).sigmoid() * c.tanh())
        return torch.stack(states, 1), torch.stack(sentinels or states, 1)

    def _look(
        self, features: Tensor, hidden: Tensor, sentinel: Tensor, findings: Tensor | float = 1.0
    ) -> tuple[Tensor, Attention | None]:
        """From what `_read` gives to what `attended` does."""
        if not self.attention:
            return self.speak(hidden).log_softmax(2), None
        flat = features.flatten(2).mT
        query = self.query(hidden)
        scores = torch.cat([query @ self.key(flat).mT, (query * self.sentinel_key(sentinel)).sum(2, keepdim=True)], 2)
        share = (scores / query.shape[2] ** 0.5).softmax(2)
        places, beta = share[..., :-1], share[..., -1:]
        seen = places @ flat
        state = hidden + self.value(seen) + beta * sentinel
        if self.findings:
            second = self._tokens(features, hidden)
            state = state + torch.as_tensor(findings, device=hidden.device).reshape(-1, 1, 1) * second
        grid = places.reshape(*places.shape[:2], *features.shape[2:])
        # What is seen as if nothing had gone to the sentinel.
        looked = Attention(grid, beta[..., 0], seen / places.sum(2, keepdim=True).clamp_min(1e-6))
        return self.speak(state).log_softmax(2), looked

    def _tokens(self, features: Tensor, hidden: Tensor) -> Tensor:
        """What the second look sees: of each finding a token, by how probable its values are."""
        likely = torch.cat([scores.softmax(1) for scores in self.finding_scores(features).values()], 1)
        parts = (likely[..., None] * self.tokens).split([len(values) for values in self.findings.values()], 1)
        tokens = torch.stack([part.sum(1) for part in parts], 1)
        share = (self.token_query(hidden) @ tokens.mT / hidden.shape[2] ** 0.5).softmax(2)
        return share @ tokens


def pooled(features: Tensor) -> Tensor:
    """The means, then the maxima of features (N, K, ...) over space: (N, 2 K)."""
    return torch.cat([features.flatten(2).mean(2), features.flatten(2).amax(2)], dim=1)
