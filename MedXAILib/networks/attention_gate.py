"""Additive grid attention: how much each unit of a layer counts, told by itself and by what is around it.

Schlemper et al., "Attention gated networks: learning to leverage salient regions in medical images", 2019. That the
coefficients of a scan sum to 1 is of Jetley et al., "Learn to pay attention", 2018.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class AttentionGate(nn.Module):
    """Features (N, C, ...) and a coarser gating signal (N, S, ...) -> the features, each unit times its coefficient.

    The grids lie evenly over one another: a unit of the signal over so many units of the features.
    """

    def __init__(self, features: int, signal: int, hidden: int) -> None:
        super().__init__()
        self.of_features = nn.Conv3d(features, hidden, 1)
        self.of_signal = nn.Conv3d(signal, hidden, 1, bias=False)
        self.psi = nn.Conv3d(hidden, 1, 1, bias=False)

    def forward(self, features: Tensor, signal: Tensor) -> Tensor:
        return features * self.coefficients(features, signal)

    def coefficients(self, features: Tensor, signal: Tensor) -> Tensor:
        """(N, 1, ...) on the grid of the features; those of a scan sum to 1."""
        around = F.interpolate(self.of_signal(signal), size=features.shape[2:], mode="trilinear")
        scores = self.psi((self.of_features(features) + around).relu())
        return scores.flatten(2).softmax(2).view_as(scores)
