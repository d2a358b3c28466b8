"""A network's last layer, fitted anew to its optimum on frozen features, and what each case that it learnt from did.

Koh and Liang, "Understanding black-box predictions via influence functions", 2017; in the place of their first order,
one step of Newton's method without the case (Pregibon 1981), which of a linear regression is exactly what leaving the
case out does. An influence is an inner product of what is asked and what is kept of a case.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.linalg import cho_factor, cho_solve  # type: ignore[import-untyped]
from scipy.special import log_softmax, softmax  # type: ignore[import-untyped]

Link = Literal["softmax", "identity"]

LARGEST = 4096
"""Weights of a last layer whose Hessian is inverted; of more, features are brought to their principal components."""

_STEPS, _PRECISE = 100, 1e-10


@dataclass(frozen=True, eq=False)
class Scaling:
    """Features (N, F) of one size: centred, and in units of their spread, which is kept for those that never change. Of
    more than `most` features only so many principal components."""

    middle: np.ndarray
    axes: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray, most: int) -> Scaling:
        """That of `features` (N, F)."""
        middle, spread = features.mean(0, dtype=float), features.std(0, dtype=float)
        spread = np.where(spread > 1e-9 * max(float(spread.max()), 1e-30), spread, 1.0)
        axes = np.diag(1 / spread)
        if features.shape[1] > most:
            scaled = (features - middle) / spread
            axes = axes @ np.linalg.eigh(scaled.T @ scaled)[1][:, ::-1][:, :most]
        return cls(middle, axes)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """(N, F) -> (N, G)."""
        return (features - self.middle) @ self.axes


@dataclass(frozen=True, eq=False)
class LastLayer:
    """A linear layer with the smallest loss of `features` (N, F + 1), the last of which is 1, and answers (N, K).

    `weights` (K, F + 1) are at the optimum; there `wrong` (N, K) is what the answers are missed by, `curvature`
    (N, K, K) that of each case's loss, and `inverse` (K (F + 1), K (F + 1)) that of the Hessian of the whole.
    """

    features: np.ndarray
    weights: np.ndarray
    wrong: np.ndarray
    curvature: np.ndarray
    inverse: np.ndarray

    @classmethod
    def fit(
        cls,
        features: np.ndarray,
        answers: np.ndarray,
        strength: float,
        link: Link = "softmax",
        counts: np.ndarray | None = None,
        start: np.ndarray | None = None,
    ) -> LastLayer:
        """That of `features` (N, F) and `answers` (N, K): classes as 0 and 1 with the cross-entropy as loss (softmax),
        or numbers with half the squared error (identity). To the summed loss comes half of `strength` > 0 times the
        squared weights. `counts` (N,) says how often each case is there; `start` (K, F + 1) are weights nearby."""
        x = np.concatenate([features, np.ones((len(features), 1))], axis=1).astype(float)
        counts = np.ones(len(x)) if counts is None else counts
        weights = np.zeros((answers.shape[1], x.shape[1])) if start is None else start

        def loss(weights: np.ndarray) -> float:
            said = x @ weights.T
            each = -(answers * log_softmax(said, 1)) if link == "softmax" else (said - answers) ** 2 / 2
            return float(counts @ each.sum(1) + strength / 2 * (weights**2).sum())

        for _ in range(_STEPS):
            wrong, curvature = _local(x @ weights.T, answers, link)
            factor = cho_factor(_hessian(x, curvature * counts[:, None, None], strength))
            gradient = (wrong * counts[:, None]).T @ x + strength * weights
            if np.abs(gradient).max() <= _PRECISE * max(1.0, float(counts.sum())):
                break
            step, size, now = cho_solve(factor, gradient.ravel()).reshape(weights.shape), 1.0, loss(weights)
            # Far from the optimum a whole step may be too far.
            while size > _PRECISE and loss(weights - size * step) > now:
                size /= 2
            weights = weights - size * step
        return cls(x, weights, wrong, curvature, cho_solve(factor, np.eye(weights.size)))

    def scores(self, features: np.ndarray) -> np.ndarray:
        """The outputs (M, K) for `features` (M, F)."""
        return features @ self.weights[:, :-1].T + self.weights[:, -1]

    @property
    def kept(self) -> np.ndarray:
        """What is kept of each case (N, K (F + 1)): the gradient of its loss, and by how much more it counts because
        without it the loss is less curved. Its inner product with what is `asked` is its influence."""
        grown = self._grown
        return (grown[:, :, None] * self.features[:, None]).reshape(len(grown), -1)

    def asked(self, features: np.ndarray, output: np.ndarray) -> np.ndarray:
        """What to ask (K (F + 1),) for the influence on `output` (K,) @ scores of `features` (F,): by how much that is
        more than it would be, had a case not been there."""
        change = output[:, None] * np.append(features, 1.0)
        return -self.inverse @ change.ravel()

    @property
    def self_influence(self) -> np.ndarray:
        """By how much (N,) each case's own loss is less than it would be, had it not been there, to first order: great
        for those that only they themselves account for, such as mislabelled ones."""
        return np.einsum("nk,nkl,nl->n", self.wrong, self._leverage, self._grown)

    @property
    def _leverage(self) -> np.ndarray:
        """By how much (N, K, K) the scores of each case change with its own answers, times the curvature."""
        x, (k, f) = self.features, self.weights.shape
        blocks = self.inverse.reshape(k, f, k, f)
        rows = [[np.einsum("nf,nf->n", x @ blocks[a, :, b], x) for b in range(k)] for a in range(k)]
        return np.transpose(rows, (2, 0, 1))

    @property
    def _grown(self) -> np.ndarray:
        own = np.eye(self.wrong.shape[1]) - self.curvature @ self._leverage
        return np.linalg.solve(own, self.wrong[..., None])[..., 0]


def _local(said: np.ndarray, answers: np.ndarray, link: Link) -> tuple[np.ndarray, np.ndarray]:
    """By how much (N, K) what is `said` misses the answers, and the curvature (N, K, K) of the loss in it."""
    one = np.eye(said.shape[1])
    if link == "identity":
        return said - answers, np.broadcast_to(one, (len(said), *one.shape))
    p = softmax(said, axis=1)
    return p - answers, p[:, :, None] * (one - p[:, None])


def _hessian(x: np.ndarray, curvature: np.ndarray, strength: float) -> np.ndarray:
    k, f = curvature.shape[1], x.shape[1]
    found = np.empty((k, f, k, f))
    for a in range(k):
        for b in range(k):
            found[a, :, b] = (x * curvature[:, a, b, None]).T @ x
    return found.reshape(k * f, k * f) + strength * np.eye(k * f)
