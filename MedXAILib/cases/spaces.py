"""The spaces in which scans are compared. A new one is a class and a line in `SPACES`."""

from __future__ import annotations

import hashlib
import inspect
from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from MedXAILib.cases.gradient_space import Gradient
from MedXAILib.cases.space import Places, Space
from MedXAILib.engines.capture import Captured, capture, suggest_layer
from MedXAILib.engines.receptive_field import Following, geometry_of
from MedXAILib.errors import MedXAIError, unknown
from MedXAILib.explainer import Question
from MedXAILib.model import Model, Prepared
from MedXAILib.target import SegmentationTarget, as_target
from MedXAILib.visual.cam_family import spatial

PARTS = 3
"""Along each axis: a case has so many regions."""


@runtime_checkable
class SaysWhere(Protocol):
    """A network that embeds, and says what each place adds."""

    def contributions(self, image: Tensor) -> Tensor:
        """(N, K, *grid), which sum over the grid to the embedding of `image` before it is brought to length one."""


class Pooled(Space):
    """A space whose vectors are sums over the places of a layer's grid."""

    @abstractmethod
    def places(self, model: Model, x: Tensor) -> Places:
        """What each place of `x` (N, C, *spatial) adds to its vector."""

    def embed(self, model: Model, x: Tensor, labels: Sequence[str] | None = None) -> Tensor:
        with torch.no_grad():
            return self.places(model, x).vectors.float().cpu()


class Plain(Pooled):
    """What a network knows of a scan before it decides: means and maxima of its last layer with a spatial layout. Of a
    network that embeds, its embedding."""

    name: ClassVar[str] = "plain"
    title: ClassVar[str] = "All that the network found"

    def places(self, model: Model, x: Tensor) -> Places:
        if model.task == "embedding":
            return _of_embedding(model, x)
        captured, found = _activations(model, x)
        flat = found.flatten(2)
        at_peak = (flat == flat.amax(2, keepdim=True)).to(flat)
        shares = torch.cat([torch.full_like(flat, 1 / flat.shape[2]), at_peak / at_peak.sum(2, keepdim=True)], 1)
        return Places((flat.repeat(1, 2, 1) * shares).unflatten(2, found.shape[2:]), captured)

    def regions(self, model: Model, x: Tensor) -> Tensor:
        """One vector (K,) for each of at most `PARTS` parts of the scan along every axis: (N, R, K), float32 on the
        CPU."""
        embeds = model.task == "embedding"
        values = _of_embedding(model, x).values if embeds else _activations(model, x)[1]
        kinds = ["avg"] if embeds else ["avg", "max"]
        size = [min(PARTS, n) for n in values.shape[2:]]
        pools = [getattr(functional, f"adaptive_{kind}_pool{len(size)}d") for kind in kinds]
        return torch.cat([pool(values, size).flatten(2) for pool in pools], 1).mT.detach().float().cpu()


class Saliency(Pooled):
    """What a network knows of the places that speak for what it says: the mean of its last layer with a spatial layout,
    weighted by the positive part of HiResCAM of the predicted class (of all places alike where nothing speaks for it).

    Silva et al., "Interpretability-guided content-based medical image retrieval", 2020, for the idea; there a network
    learns anew from its saliency maps, here nothing is learnt.
    """

    name: ClassVar[str] = "saliency"
    title: ClassVar[str] = "What speaks for the decision"

    def places(self, model: Model, x: Tensor) -> Places:
        if model.task == "embedding":
            raise MedXAIError(f"{model.name} embeds and decides nothing that a place could speak for: use 'plain'.")
        with model.ready(), torch.enable_grad():
            question = _question(model, x)
            layer = suggest_layer(question)
            values, taken = capture(question, (layer,))
            (gradient,) = question.gradients(values[0], [taken[layer].raw])
            found = spatial(layer, taken[layer])
            speaks = (found * taken[layer].grid(gradient)).sum(1, keepdim=True).relu().cpu().double()  # type: ignore[operator]
        total = speaks.flatten(2).sum(2)[(...,) + (None,) * (speaks.ndim - 2)]
        weights = torch.where(total > 0, speaks / total.clamp_min(1e-30), 1 / speaks[0, 0].numel())
        return Places(found.cpu().double() * weights, taken[layer])


SPACES: dict[str, Space] = {space.name: space for space in (Plain(), Saliency(), Gradient())}


def space(name: str) -> Space:
    """The space called `name`.

    Raises:
        MedXAIError: when there is none.
    """
    if name not in SPACES:
        raise unknown("space", name, SPACES)
    return SPACES[name]


def contributions(model: Model, x: Tensor) -> Tensor:
    """What each place of the network's grid adds to the plain embedding of `x` (N, C, *spatial): (N, K, *grid), whose
    sum over the grid it is."""
    return Plain().places(model, x).values


def said(model: Model, output: Tensor) -> list[str]:
    """What a network says of each scan, by its `output` (N, ...): its class or labels, "" when it names nothing."""
    outputs = output.shape[1] if output.ndim == 2 else 0
    if not outputs or model.task not in ("classification", "multilabel", "ordinal"):
        return [""] * len(output)
    chances = model.probabilities(output)
    if model.task == "classification":
        return [model.class_name(int(k), outputs) for k in chances.argmax(1)]
    names = [model.class_name(k) for k in range(outputs)]
    return [", ".join(n for n, yes in zip(names, row, strict=True) if yes) or "none" for row in chances > 0.5]


def fingerprint(model: Model) -> str:
    """A hash of all that decides what vector a scan has: weights, preprocessing, layer, and the versions of the
    spaces."""
    versions = sorted((space.name, space.version) for space in SPACES.values())
    parts = (model.fingerprint, _described(model.preprocessing), model.patch_size, model.layers[:1], versions, PARTS)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _described(thing: Any) -> Any:
    """What a preprocessing is made of, the same in every process: classes, and the numbers and texts they hold."""
    if thing is None or isinstance(thing, (str, int, float)):
        return thing
    if isinstance(thing, (list, tuple)):
        return [_described(part) for part in thing]
    if isinstance(thing, (set, frozenset)):
        return sorted((_described(part) for part in thing), key=repr)
    if isinstance(thing, dict):
        return [(str(key), _described(part)) for key, part in thing.items()]
    if isinstance(thing, (np.ndarray, Tensor)):
        return np.asarray(thing).tolist()
    if isinstance(thing, (type, torch.dtype)) or inspect.isroutine(thing):
        return getattr(thing, "__qualname__", str(thing))
    if isinstance(thing, partial):
        return _described([thing.func, thing.args, thing.keywords])
    held = {key: part for key, part in getattr(thing, "__dict__", {}).items() if not key.startswith("_")}
    return type(thing).__qualname__, _described(held)


def _of_embedding(model: Model, x: Tensor) -> Places:
    network = model.network
    following = Following(x.ndim - 2)
    with model.ready(), torch.no_grad():
        if isinstance(network, SaysWhere):
            with following:
                found = network.contributions(following.start(x.detach().view_as(x)))
        else:
            found = model.forward(x).flatten(1)
            found = found[(...,) + (None,) * (x.ndim - 2)]
    captured = Captured(found, tuple(x.shape[2:]), geometry_of(found), following.grids)
    return Places(found.cpu().double(), captured)


def _activations(model: Model, x: Tensor) -> tuple[Captured, Tensor]:
    """The layer that a network's plain embedding is of, as (N, K, *grid), float64."""
    with model.ready():
        question = _question(model, x)
        layer = suggest_layer(question)
        question.targets = []
        with torch.no_grad():
            _, taken = capture(question, (layer,))
    return taken[layer], spatial(layer, taken[layer]).cpu().double()


def _question(model: Model, x: Tensor) -> Question:
    # Whatever is in a scan, its layer is the same.
    target = SegmentationTarget(within="everywhere") if model.task == "segmentation" else as_target(None, model)
    seen = [Prepared(one, np.eye(x.ndim - 1)) for one in x]
    return Question(model, x.to(model.device, model.dtype), seen, [target])
