"""A decision by likeness to parts of training cases: this looks like that.

Chen et al., "This looks like that: deep learning for interpretable image recognition", 2019; Wei, Tam and Tang,
"MProtoNet: a case-based interpretable model for brain tumor classification with 3D multi-parametric MRI", 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from MedXAILib.errors import MedXAIError
from MedXAILib.explainer import Question, Taxonomy, Teller
from MedXAILib.explanation import Explanation
from MedXAILib.grid import pasted, resample_part, shifted, transform
from MedXAILib.networks.prototypes import Looked, Origin
from MedXAILib.report.localisation import highest
from MedXAILib.similar_cases import Case, SimilarCases
from MedXAILib.volume import Volume


@runtime_checkable
class HasPrototypes(Protocol):
    """What a network has to have to be asked for its prototypes.

    `looked` says where each of them looks in images and how alike that is, `class_head` makes logits of similarities.
    `cases()` are the images that they come from (P, 1, D, H, W), about which `origins` say more: axes (R, A, S), of
    `spacing_mm`, with `intensities` (low, high) of a scan as 0 and 1.
    """

    class_head: nn.Module
    origins: Sequence[Origin]
    spacing_mm: float
    intensities: tuple[float, float]

    def looked(self, image: Tensor) -> Looked:
        """Of images (N, 1, D, H, W)."""

    def cases(self) -> Tensor:
        """Images (P, 1, D, H, W)."""


class PrototypeParts(Teller):
    """Which parts of training cases does the network find in this scan, and what does each add to the score?

    The points of a prototype are its similarity times its weight. The points of all that count sum to the score.
    """

    id: ClassVar[str] = "prototypes"
    title: ClassVar[str] = "Prototypes"
    paper: ClassVar[str] = "Wei 2023"
    kind: ClassVar[str] = "SimilarCases"
    taxonomy: ClassVar[Taxonomy] = Taxonomy(
        "3.3",
        "example-based",
        "model-based",
        "model-specific",
        ("local", "global"),
        strengths="exact: points sum to the score; each stands for a part of a case that can be looked at",
        limits="only of networks that learnt prototypes; alike to the network need not be alike to a radiologist",
    )

    def tell(self, question: Question, volume: Volume) -> Callable[..., Explanation]:
        network, bound = _with_prototypes(question), question.bound[0]
        run = question.run
        run.step(0, 2, self.title)
        with torch.no_grad():
            looked = network.looked(question.x)
            there = network.looked(network.cases().to(question.x))
        run.cost.forwards += 1 + len(network.origins)
        run.step(1, 2, self.title)
        similarities = looked.similarities[0]
        given = looked.similarities.clone().requires_grad_()
        weights = question.gradients(bound.value(network.class_head(given)), [given])[0][0]
        points = similarities * weights
        placed = _on(looked.masks * points.reshape(1, -1, 1, 1, 1), question.x.shape[2:])[0]
        maps, where = resample_part(placed, question.seen[0].affine, volume.shape, volume.affine)
        corner = shifted(volume.affine, np.array([side.start for side in where]))
        own = _on(there.masks, network.cases().shape[2:])
        names = question.model.class_names
        cases = [
            _case(
                network,
                i,
                names,
                own[i, i],
                # None where the network looks between two slices.
                Volume(maps[i : i + 1], corner) if maps.numel() else None,
                {"similarity": float(similarities[i]), "weight": float(weights[i]), "points": float(points[i])},
            )
            for i in points.abs().argsort(descending=True).tolist()
            if weights[i]
        ]
        (value,) = question.values(question.x)
        missed = abs(float(value) - float(points.sum())) / max(abs(float(value)), 1e-6)
        return partial(
            SimilarCases,
            residual={"sum of points": missed},
            cases=tuple(cases),
            query_map=pasted(maps.sum(0, keepdim=True), where, volume.shape),
            affine=volume.affine,
            scored="points",
            text=_text(bound.label, float(value), cases),
        )


def _with_prototypes(question: Question) -> HasPrototypes:
    network = question.model.network
    if not isinstance(network, HasPrototypes):
        raise MedXAIError(
            f"{question.model.name} has no prototypes: use a network that has, as lung_nodule_prototypes, or "
            "similar_cases, which takes any network."
        )
    if not all(origin.uid for origin in network.origins):
        raise MedXAIError(
            f"The prototypes of {question.model.name} come from no case: train it to the end, with medxai train."
        )
    if question.bound[0].target.layer is not None:
        raise MedXAIError("Prototypes speak for what the network puts out: leave the layer of the target out.")
    return network


def _on(masks: Tensor, size: Sequence[int]) -> Tensor:
    """Masks (N, P, *grid) on the voxels of an image of `size`, on the CPU."""
    return F.interpolate(masks, size=tuple(size), mode="trilinear").float().cpu()


def _case(
    network: HasPrototypes,
    i: int,
    names: Sequence[str],
    mask: Tensor,
    query_map: Volume | None,
    numbers: Mapping[str, float],
) -> Case:
    origin = network.origins[i]
    low, high = network.intensities
    affine = np.diag([*[network.spacing_mm] * 3, 1.0])
    affine[:3, 3] = origin.corner
    crop = Volume((low + (high - low) * network.cases()[i]).float().cpu(), affine)
    label = names[origin.of] if origin.of < len(names) else str(origin.of)
    place: Any = tuple(float(v) for v in transform(affine, np.array(highest(mask))))
    return Case(
        uid=origin.uid,
        label=label,
        similarity=numbers["points"],
        place=place,
        volume=crop,
        map=mask[None],
        role="prototype",
        note=_note(label, numbers),
        numbers={**numbers, **origin.meta},
        query_map=query_map,
    )


def _note(label: str, numbers: Mapping[str, float]) -> str:
    return (
        f"A prototype of {label}, which is a part of this training case: {numbers['similarity']:.2f} alike, times "
        f"{numbers['weight']:+.1f}, makes {numbers['points']:+.1f} points."
    )


def _text(label: str, score: float, cases: Sequence[Case]) -> str:
    if not cases:
        return f"No prototype counts for {label}."
    first = cases[0]
    several = f"{len(cases)} prototypes sum" if len(cases) > 1 else "one prototype come"
    share = f"the most, {first.similarity:+.1f}, are for a part like that of '{first.uid}' ({first.label})"
    return f"The points of {several} to the score of {label}, {score:.1f}; {share}."
