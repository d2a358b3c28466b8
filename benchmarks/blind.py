"""Explainers that know nothing of the network: what the checks of the trust card make of them is what a light is worth.

They are in nobody's registry but that of a process which measures.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

import MedXAILib as mx
from benchmarks.sanity import rows
from MedXAILib.explainer import Attribution, Explainer, Question, Taxonomy, perturbation


def _noise(model: mx.Model, x: Tensor, labels: Tensor) -> Tensor:
    return torch.rand(len(x), *x.shape[2:], generator=torch.Generator().manual_seed(0))


class _Blind(Explainer):
    """The same whatever the network is: `reference` has its maps."""

    paper: ClassVar[str] = ""
    taxonomy: ClassVar[Taxonomy] = perturbation("", "")
    reference: ClassVar[rows.Row]

    @property
    def signed(self) -> bool:
        return False

    def attribute(self, question: Question) -> list[Attribution]:
        question.bind()
        x = question.x
        found = self.reference.maps(question.model, x, torch.zeros(len(x)))[:, None]
        return [Attribution(found) for _ in question.targets]


def _explainer(row: rows.Row) -> type[Explainer]:
    class Of(_Blind):
        id: ClassVar[str] = row.slug
        title: ClassVar[str] = row.name
        reference: ClassVar[rows.Row] = row

    return Of


BLIND = {row.slug: _explainer(row) for row in (*rows.REFERENCES, rows.Row("Noise", _noise))}
"""By id, as in the registry."""
