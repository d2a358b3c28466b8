"""Where a network looks for each word it says, and whether that is what the word comes from.

Lu et al., "Knowing when to look", 2017 (the sentinel); Zhang et al., "TandemNet", 2017, and Lee et al., "Generation of
multimodal justification using visual word constraint model", 2019, for medical images.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from MedXAILib.engines.receptive_field import Following, Geometry, geometry_of
from MedXAILib.errors import MedXAIError
from MedXAILib.explainer import Question, Taxonomy
from MedXAILib.textual.captioning import Captioning
from MedXAILib.trust.likeness import Looks, likeness


class VisualCaptioning(Captioning):
    """Where does a network look for each word, and does the word come from there?

    A word has a map if it takes more from the image than from the sentinel, which stands for the words before it.
    Attention need not be what a word comes from: beside it is HiResCAM of the word's log-probability, what the deletion
    of either map does to the word, and how far the two agree.
    """

    id: ClassVar[str] = "visual_captioning"
    title: ClassVar[str] = "Caption with attention"
    paper: ClassVar[str] = "Lu 2017, Zhang 2017"
    bare: ClassVar[Mapping[str, Any]] = {"check": False, "sentinel": 1e-9}
    taxonomy: ClassVar[Taxonomy] = Taxonomy(
        "3.2",
        "textual",
        "model-based",
        "model-specific",
        ("local",),
        strengths="says what it sees and where it looks for each word, and checks whether the word comes from there",
        limits="as coarse as the grid that is attended to; only for networks that were built with such attention",
    )

    show: Literal["attention", "gradient", "both"] = Field(
        "attention", description="the map of a word: where it looks, what its gradient says, or where both agree"
    )
    sentinel: float = Field(0.5, gt=0, le=1, description="share of the sentinel from which a word has no map")

    def maps(
        self, question: Question, features: Tensor, words: Tensor, numbers: dict[int, dict[str, float]]
    ) -> dict[int, Tensor]:
        looked = _attended(question.model.network, features, words)
        placed = _geometry(question, features).place(looked.grid[0, :-1, None], question.x.shape[2:])
        for t, share in enumerate(looked.sentinel[0, :-1].tolist()):
            numbers[t]["sentinel"] = share
        gradients = self.gradients(question, [t for t in numbers if numbers[t]["sentinel"] < self.sentinel])
        shown = {}
        for t, gradient in gradients.items():
            attention = placed[t : t + 1]
            # What needs no image cannot go with a part of it.
            if self.from_image(numbers[t]):
                numbers[t] |= self.checked(question, t, {"attention": attention, "gradient": gradient})
            numbers[t]["rank correlation"] = likeness(Looks.of(attention.cpu()), Looks.of(gradient.cpu()))["rank"]
            both = (attention / attention.amax() * gradient / gradient.amax().clamp_min(1e-12)).sqrt()
            shown[t] = {"attention": attention, "gradient": gradient, "both": both}[self.show]
        return shown


def _attended(network: Any, features: Tensor, words: Tensor) -> Any:
    """Where each word looks (see `MedXAILib.networks.captioner.Attention`).

    Raises:
        MedXAIError: for a network without attention.
    """
    with torch.no_grad():
        looked = network.attended(features, words)[1] if hasattr(network, "attended") else None
    if looked is None:
        raise MedXAIError(f"{type(network).__name__} attends to nothing when it says a word: use captioning.")
    return looked


def _geometry(question: Question, features: Tensor) -> Geometry:
    """Where in the input the units of the features look."""
    following = Following(question.x.ndim - 2)
    with torch.no_grad(), following:
        found = geometry_of(question.model.forward(following.start(question.x.view_as(question.x))))
    question.run.cost.forwards += 1
    return found or Geometry.spanning(features.shape[2:], question.x.shape[2:])
