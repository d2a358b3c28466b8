"""One map from several models, as ensembles of networks are explained (Jiang 2019, Lee 2019b in the survey)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from MedXAILib.errors import MedXAIError
from MedXAILib.explanation import SaliencyMap
from MedXAILib.model import Model


@dataclass(frozen=True)
class Ensemble:
    """Several models of one question, each with its weight, such as its validation accuracy (equal when left out)."""

    models: Sequence[Model]
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if not self.models:
            raise MedXAIError("An ensemble needs at least one model.")
        if self.weights is not None and (
            len(self.weights) != len(self.models) or min(self.weights) < 0 or sum(self.weights) <= 0
        ):
            raise MedXAIError(f"An ensemble of {len(self.models)} models needs as many weights, none negative.")


def combine(ensemble: Ensemble, maps: Sequence[SaliencyMap]) -> SaliencyMap:
    """The weighted mean of the members' maps, each scaled to a largest absolute value of 1."""
    weights = torch.tensor(ensemble.weights or [1.0] * len(maps))
    data = torch.zeros_like(maps[0].data)
    for weight, member in zip(weights / weights.sum(), maps, strict=True):
        flat = member.data.flatten(1 if member.batched else 0)
        largest = flat.abs().amax(-1).clamp_min(1e-12)
        data += weight * member.data / largest.reshape(-1, *[1] * (data.ndim - 1))
    first = maps[0].provenance
    made = [m.provenance for m in maps]
    provenance = first.model_copy(
        update={
            "model": {
                "name": " + ".join(p.model["name"] for p in made),
                "members": [p.model for p in made],
                "weights": weights.tolist(),
            },
            "target_label": ", ".join(dict.fromkeys(p.target_label for p in made)),
            "seconds": sum(p.seconds for p in made),
            "peak_memory": max(p.peak_memory for p in made),
            "forwards": sum(p.forwards for p in made),
            "backwards": sum(p.backwards for p in made),
            "notes": list(dict.fromkeys(note for p in made for note in p.notes)),
        }
    )
    residual = {name: max(m.residual[name] for m in maps) for name in maps[0].residual}
    return SaliencyMap(provenance, residual, data, maps[0].affine, maps[0].signed, maps[0].batched)
