"""Scans whose voxels are as a Gaussian has them, and what a Gaussian makes of one voxel given others."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from MedXAILib.infills.conditional_gaussian import ConditionalGaussian


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def smooth(*shape: int, seed: int = 0) -> Tensor:
    """Noise in which neighbours are alike, with a mean."""
    x = noise(1, *shape, seed=seed)
    pool = functional.avg_pool3d if len(shape) == 4 else functional.avg_pool2d
    return 3 * pool(x, 3, stride=1, padding=1, count_include_pad=False)[0] + 2


def covariance_of(fitted: ConditionalGaussian, one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """The covariances of voxels at `one` (N, rank) and `two` (M, rank), looked up one by one: (C, N, M)."""
    table = fitted.covariance.numpy()
    middle = np.array(table.shape[1:]) // 2
    found = np.zeros((len(table), len(one), len(two)))
    for i, a in enumerate(one):
        for j, b in enumerate(two):
            place = middle + b - a
            if ((place >= 0) & (place < table.shape[1:])).all():
                found[:, i, j] = table[(slice(None), *place)]
    return found


def conditional(
    fitted: ConditionalGaussian, x: Tensor, unknown: np.ndarray, known: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the voxels at `unknown` given those at `known`, of one channel, by the textbook."""
    s22, s21 = (covariance_of(fitted, unknown, other)[0] for other in (unknown, known))
    s11 = covariance_of(fitted, known, known)[0]
    mean = float(x.double().mean())
    values = x[0].double().numpy()[tuple(known.T)]
    weights = s21 @ np.linalg.inv(s11)
    return mean + weights @ (values - mean), s22 - weights @ s21.T
