"""Weighted least squares, and how far its coefficients can be trusted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Keeps a system that has too few rows solvable, and changes others by no more than rounding.
_JITTER = 1e-11


@dataclass(frozen=True)
class LinearFit:
    """y (M, T) as rows (M, F) times `coefficients` (F, T). `left_out` (M, T) is by how much each row is missed by the
    fit that does not know its group; `influence` (groups, F, T) is what each group changes of the coefficients."""

    coefficients: Tensor
    missed: Tensor
    left_out: Tensor
    influence: Tensor

    @property
    def half(self) -> Tensor:
        """Half the width of the coefficients' 95 % confidence intervals, (F, T)."""
        return 1.96 * self.influence.square().sum(0).sqrt()


def linear_fit(rows: Tensor, y: Tensor, weights: Tensor, ridge: Tensor, group: int = 1) -> LinearFit:
    """Minimise the sum of `weights` (M,) times the squared misses, plus `ridge` (F,) times the squared coefficients, in
    closed form. Every `group` rows that follow each other were drawn together; all in float64.

    The influence is exact, that of leaving the group out (the jackknife, which needs no linear truth nor equal
    variances): MacKinnon and White, "Some heteroskedasticity-consistent covariance matrix estimators", 1985.
    """
    weighted = rows * weights[:, None]
    gram = weighted.T @ rows + ridge.to(rows).diag()
    gram.diagonal().add_(_JITTER * gram.trace() / len(gram))
    factor = torch.linalg.cholesky(gram)
    coefficients = torch.cholesky_solve(weighted.T @ y, factor)
    missed = y - rows @ coefficients

    def grouped(of_rows: Tensor) -> Tensor:
        return of_rows.reshape(-1, group, of_rows.shape[1])

    pull = grouped(torch.cholesky_solve(weighted.T, factor).T)
    known = torch.eye(group, dtype=rows.dtype) - grouped(rows) @ pull.mT
    # A row that decides a coefficient alone has nothing left that could be missed.
    known.diagonal(dim1=1, dim2=2).add_(_JITTER)
    left_out = torch.linalg.solve(known, grouped(missed))
    return LinearFit(coefficients, missed, left_out.flatten(0, 1), torch.einsum("gif,git->gft", pull, left_out))


def explained(y: Tensor, missed: Tensor, weights: Tensor) -> Tensor:
    """The share of the weighted variance of `y` (M, T) that is left when `missed` (M, T) is taken from it, (T,)."""
    share = weights[:, None] / weights.sum()
    around = (share * (y - (share * y).sum(0)).square()).sum(0)
    return 1 - (share * missed.square()).sum(0) / around.clamp_min(1e-300)
