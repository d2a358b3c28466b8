"""Multiple instance learning: what each place of a scan contributes to the scan's score, from the network itself.

Schwab et al., "Localization of critical findings in chest X-ray without local annotations using multi-instance
learning", 2020; Araújo et al., "DR|GRADUATE", 2020, with a map for each grade.
"""

from __future__ import annotations

from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from MedXAILib.engines.capture import capture
from MedXAILib.errors import MedXAIError
from MedXAILib.explainer import Attribution, Explainer, Question, Taxonomy
from MedXAILib.visual.cam_family import space, spatial


@runtime_checkable
class Bag(Protocol):
    """A network that pools what it says of the places of a scan: `MultipleInstanceClassifier`, or a person's own.

    The output of its layer `instances`, (N, K, *grid), is the part of each place in each of its K scores. `pooled`
    makes the scores (N, K) of the sums of these parts over the grid, (N, K).
    """

    instances: nn.Module

    def pooled(self, total: Tensor) -> Tensor: ...


class MIL(Explainer):
    """Which places of a scan does a network take for what it says of the whole?

    The map is what the network pools: the parts of its instances in the score, at the places they look at. Of a
    noisy-or they are -log(1 - p), zero or more, and add up to -log(1 - P); of attention they are the weight times the
    score of an instance, for (positive) or against (negative), and add up to the logit. The residual is by how much the
    network's answer and that of the summed parts differ.
    """

    id: ClassVar[str] = "mil"
    title: ClassVar[str] = "Multiple instance learning"
    paper: ClassVar[str] = "Schwab 2020"
    taxonomy: ClassVar[Taxonomy] = Taxonomy(
        "3.1.3",
        "visual",
        "model-based",
        "model-specific",
        ("local",),
        strengths="exact: the map is what the network pools; learnt from labels of whole scans; a map for each grade",
        limits="only networks that pool instances; as coarse as their grid; each place is judged by itself",
    )

    def attribute(self, question: Question) -> list[Attribution]:
        network = question.model.network
        if not isinstance(network, Bag):
            raise MedXAIError(
                f"{question.model.name} pools no instances: use a network with `instances` and `pooled`, such as the "
                "bundle lung_mil, or hirescam."
            )
        if any(target.layer for target in question.targets):
            raise MedXAIError(f"{self.title} explains what the network says, not a layer: leave the layer out.")
        values, taken = capture(question, ("instances",))
        parts = spatial("instances", taken["instances"])
        said = network.pooled(parts.sum(space(parts))).detach().requires_grad_()
        found = []
        for bound, value in zip(question.bound, values, strict=True):
            again = bound.value(said)
            # Of which scores the value consists: one of them, or the lead of one over another.
            (weights,) = torch.autograd.grad(again.sum(), said)
            map_ = torch.einsum("nk,nk...->n...", weights, parts)[:, None]
            missed = ((again - value).abs() / value.abs().clamp_min(1e-12)).detach()
            found.append(Attribution(taken["instances"].place(map_), {"pooling": float(missed.max())}))
        return found
