"""The patches and the networks that every row is measured on, and what is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import MedXAILib as mx
from benchmarks.sanity import patches
from benchmarks.sanity.measures import located
from benchmarks.sanity.patches import STAGES, Patches
from benchmarks.sanity.rows import Maps, Row
from MedXAILib.trust.likeness import Looks, between, likeness
from MedXAILib.trust.randomisation import cascade

DRAWS = 5
"""Cascades, each with weights of its own."""
RANDOMISED = 12
"""Of the synthetic nodules, those that the randomised networks are asked about."""
RANDOMISED_SLOW = 3
"""The same for methods that ask the network about many scans for each map."""


class Bench:
    """The shipped network, its cases, and what becomes of it when its weights are re-drawn."""

    def __init__(self) -> None:
        self.model = patches.demo_model()
        self.synthetic, self.real = patches.synthetic(self.model), patches.real(self.model)
        self.few = self.synthetic[:RANDOMISED]
        self.cascades = [
            [replace(self.model, network=n) for n in cascade(self.model.network, STAGES, self.few.images, seed)]
            for seed in range(DRAWS)
        ]

    def measured(self, row: Row) -> dict[str, Any]:
        """Everything that the page says of a row; why not, where the method refuses this network."""
        try:
            return {
                "synthetic": _where(row.maps, self.model, self.synthetic),
                "real": _where(row.maps, self.model, self.real),
                **randomised(row.maps, self.model, self.cascades, self.few[: RANDOMISED_SLOW if row.slow else None]),
            }
        except mx.MedXAIError as error:
            return {"refused": str(error)}


def _where(maps: Maps, model: mx.Model, some: Patches) -> dict[str, float]:
    found = located(maps(model, some.images, some.labels), some.masks)
    return {"count": len(some), "chance": float(some.masks.float().mean())} | found


def randomised(maps: Maps, model: mx.Model, cascades: Sequence[Sequence[mx.Model]], some: Patches) -> dict[str, Any]:
    """How alike the maps of `some` patches stay while the weights are re-drawn.

    `cascade` has for each draw and each stage the likeness to the map of `model`; `untrained` that of the maps of two
    networks with nothing but re-drawn weights, and how often the peak of such a map is in the nodule.
    """
    own = Looks.of(maps(model, some.images, some.labels))
    steps, last, peaks = [], [], []
    for networks in cascades:
        drawn = [maps(network, some.images, some.labels) for network in networks]
        looks = [Looks.of(one) for one in drawn]
        steps.append([likeness(own, look) for look in looks])
        last.append(looks[-1])
        peaks.append(located(drawn[-1], some.masks)["peak"])
    return {"cascade": steps, "untrained": {**between(last), "peak": sum(peaks) / len(peaks)}}
