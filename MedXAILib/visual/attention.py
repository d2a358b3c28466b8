"""The attention of a network that was trained with it.

Jetley et al., "Learn to pay attention", 2018; Schlemper et al., "Attention gated networks: learning to leverage salient
regions in medical images", 2019.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from MedXAILib.engines.gates import read_gates
from MedXAILib.errors import unknown
from MedXAILib.explainer import Attribution, Question, Taxonomy
from MedXAILib.visual.attention_rollout import AttentionRollout
from MedXAILib.visual.cam_family import Fuse, fused


class Attention(AttentionRollout):
    """How much does each place count, by the network's own coefficients?

    They are read at its attention gates, and each unit is put where it looks. Of a transformer, which has no gates, it
    is the rollout of its attention.
    """

    id: ClassVar[str] = "attention"
    title: ClassVar[str] = "Attention"
    paper: ClassVar[str] = "Jetley 2018, Schlemper 2019"
    taxonomy: ClassVar[Taxonomy] = Taxonomy(
        "3.1.1",
        "visual",
        "model-based",
        "model-specific",
        ("local",),
        strengths="one forward; shows the very numbers that the network multiplies its features by",
        limits="the same for every class: it says where the network looks, not what for; what is attended to need not "
        "change the answer, and skips may lead past a gate",
    )
    stitching: ClassVar[Literal["sum", "blend"] | None] = "blend"

    gates: tuple[int, ...] = Field(
        (), description="which gates, counted from 0 in the order of the forward; all when left out"
    )
    fuse: Fuse = Field(
        "mean", description="how the maps of several gates, each scaled to a largest value of 1, become one"
    )

    def attribute(self, question: Question) -> list[Attribution]:
        found = read_gates(question)
        if not found:
            return super().attribute(question)
        grids = [" x ".join(map(str, gate.raw.shape[2:])) for gate in found]
        question.run.note(f"Attention gates, from 0: of {', '.join(grids)} units.")
        known = range(len(found))
        for gate in self.gates:
            if gate not in known:
                raise unknown("attention gate", gate, map(str, known))
        values = fused([found[i].place(found[i].raw) for i in self.gates or known], self.fuse)
        return [Attribution(values) for _ in question.targets]
