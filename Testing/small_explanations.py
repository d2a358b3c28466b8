"""A caption and similar cases of a real nodule, and variants and rules of computed ones, made from the demo network:
small, but nothing in them is invented.

The methods that write captions, search archives, draw variants and find rules make the same kinds of explanation. Here
the caption's words are thresholds of the seven attributes that the network answers beside its class, the archive is a
handful of synthetic nodules in the lung of another patient, the variants are one of these computed larger and larger,
and the rules are one threshold each.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

import MedXAILib as mx
from MedXAILib.explanation import Provenance
from MedXAILib.grid import resample
from MedXAILib.report.localisation import peak
from MedXAILib.resources import path
from MedXAILib.synthetic.lung_nodules import (
    ATTRIBUTES,
    CLASSES,
    HU_RANGE,
    SPACING_MM,
    Backgrounds,
    Nodules,
    draw,
    render,
    synthesise,
)
from MedXAILib.target import read_layers

NODULE = (21.9, 120.5, -611.5)
"""Of the chest CT, RAS mm."""

_HEAD = "attribute_head"


def chest() -> mx.Volume:
    """The chest CT with the nodule, cropped to 90 mm around it."""
    scan = mx.load_volume(path("SampleData/chest_ct_nodule.nrrd"))
    low = np.floor(scan.to_index(NODULE) - 45 / np.array(scan.spacing)).astype(int)
    high = np.ceil(scan.to_index(NODULE) + 45 / np.array(scan.spacing)).astype(int)
    box = tuple(slice(max(a, 0), b) for a, b in zip(low, high, strict=True))
    affine = scan.affine.copy()
    affine[:3, 3] = scan.to_point([s.start for s in box])
    return mx.Volume(scan.data[(slice(None), *box)].clone(), affine, "chest_ct_nodule.nrrd")


def caption(volume: mx.Volume, region: Sequence[float] = NODULE) -> mx.Caption:
    """What the network says about the nodule at `region`, in a sentence.

    The confidence of an attribute is the network's own degree of it (or of its absence), 0 to 1; that of the class its
    probability.
    """
    model = _model()
    output = _read(model, volume, region)
    said = dict(zip(ATTRIBUTES, output[_HEAD][0].tolist(), strict=True))
    probabilities = output[None][0].softmax(0)
    best = int(probabilities.argmax())
    degree = {name: min(max(said[name], 0.0), 1.0) for name in ("spiculation", "solidity", "calcification")}
    phrases: list[tuple[str, mx.target.Target | None, float | None]] = [
        ("A ", None, None),
        _phrase("spiculated", "smooth", "spiculation", degree),
        (", ", None, None),
        _phrase("solid", "part-solid", "solidity", degree),
        (" nodule of ", None, None),
        (f"{said['diameter_mm']:.0f} mm", _attribute("diameter_mm"), None),
        (", ", None, None),
        _phrase("calcified", "not calcified", "calcification", degree),
        ("; it looks ", None, None),
        (CLASSES[best], mx.ClassTarget(best), float(probabilities[best])),
        (".", None, None),
    ]
    made = mx.explain(model, volume, "hirescam", target=[t for _, t, _ in phrases if t is not None], region=region)
    text, words, maps = "", [], iter(enumerate(made))
    for phrase, target, confidence in phrases:
        at = len(text), len(text) + len(phrase)
        if target is not None:
            index, seen = next(maps)
            words.append(mx.Word(phrase, *at, confidence, index, tuple(float(v) for v in peak(seen))))
        elif confidence is not None:
            # Nothing is to be seen of what is not there.
            words.append(mx.Word(phrase, *at, confidence))
        text += phrase
    provenance = _made(made[0].provenance, {"kind": "Caption"}, "caption")
    return mx.Caption(provenance, {}, text, tuple(words), torch.cat([m.data for m in made]), volume.affine)


def similar_cases(volume: mx.Volume, region: Sequence[float] = NODULE, count: int = 6) -> mx.SimilarCases:
    """The synthetic nodules whose embedding is most like that of the nodule at `region` (cosine), and why."""
    embedding = _embedding()
    asked = _read(embedding, volume, region)[None][0]
    archive, patches = _archive()
    likeness = [float(torch.cosine_similarity(asked, _embedded(i), dim=0)) for i in range(len(archive))]
    ranked = sorted(range(len(archive)), key=lambda i: -likeness[i])[:count]
    cases = []
    for i in ranked:
        case = archive[i]
        like = mx.explain(embedding, case, "hirescam", target=mx.EmbeddingTarget(asked), region=_middle(case))
        cases.append(
            mx.Case(
                uid=f"synthetic-{i:02d}",
                label=CLASSES[int(patches.labels[i])],
                similarity=likeness[i],
                source=case.source,
                place=tuple(float(v) for v in peak(like)),
                volume=case,
                map=like.data,
            )
        )
    target = mx.EmbeddingTarget(_embedded(ranked[0]))
    own = mx.explain(embedding, volume, "hirescam", target=target, region=region)
    provenance = _made(own.provenance, {"kind": "SimilarCases", "count": count}, "similar cases")
    return mx.SimilarCases(provenance, {}, tuple(cases), own.data, volume.affine)


def variants(steps: int = 7) -> tuple[mx.Volume, mx.Traversal]:
    """A lobulated synthetic nodule without calcification, computed from 7 to 22 mm across, with what the network says
    of each; the one in the middle is the scan. The map has the embeddings of other nodules, in the plane in which they
    differ most."""
    backgrounds = Backgrounds.training()
    attributes, labels = draw(3, seed=4)
    row = labels.tolist().index(CLASSES.index("benign"))
    for name, value in {"calcification": 0.0, "lobulation": 0.6, "spiculation": 0.0, "solidity": 1.0}.items():
        attributes[row, ATTRIBUTES.index(name)] = value
    sizes = torch.linspace(7, 22, steps)
    images = []
    for size in sizes:
        attributes[row, ATTRIBUTES.index("diameter_mm")] = size
        images.append(render(backgrounds, attributes, labels, seed=4, jitter=0).images[row])
    others = synthesise(backgrounds, 30, seed=5)
    with _model().ready("cpu") as device, torch.no_grad():
        output = read_layers(_model(), torch.stack(images).to(device), (None,))[None]
        known = _embedding().network(torch.cat([torch.stack(images), others.images]).to(device))
    known = known - known.mean(0)
    plane = (known @ torch.linalg.svd(known, full_matrices=False).Vh[:2].T).double()
    here, malignant = steps // 2, CLASSES.index("malignant")
    said = [
        mx.Step(
            float(size - sizes[here]),
            float(scores[malignant]),
            dict(zip(CLASSES, scores.softmax(0).tolist(), strict=True)),
            {"diameter_mm": float(size)},
        )
        for size, scores in zip(sizes, output, strict=True)
    ]
    decisions = output.argmax(1).tolist()
    others_say = [i for i, decision in enumerate(decisions) if decision != decisions[here]]
    flipped = min(others_say, key=lambda i: abs(i - here))
    low, high = HU_RANGE
    # The patch has the axes (R, A, S), a volume (S, A, R).
    data = torch.cat(images).permute(0, 3, 2, 1) * (high - low) + low
    affine = _grid(np.array([30.0, -20.0, 100.0]), np.eye(3), (SPACING_MM,) * 3, data.shape[1:])
    scan = mx.Volume(data[here][None], affine, "synthetic.nrrd")
    cohort = [
        mx.Place(f"synthetic-{i:02d}", CLASSES[int(label)], *place)
        for i, (label, place) in enumerate(zip(others.labels, plane[steps:].tolist(), strict=True))
    ]
    made = mx.explain(_model(), scan, "gradient", "malignant", _middle(scan)).provenance
    return scan, mx.Traversal(
        _made(made, {"kind": "Traversal"}, "malignant"),
        {},
        tuple(said),
        data,
        affine,
        "along the diameter",
        f"The network says otherwise at {sizes[flipped]:.1f} mm.",
        flipped,
        tuple(cohort),
        plane[:steps].numpy(),
    )


def rules(count: int = 60) -> mx.RuleSet:
    """How far one threshold of the diameter, and one of the spiculation, tell when the network calls synthetic nodules
    malignant; they are said of the first of these."""
    nodules = synthesise(Backgrounds.training(), count, seed=6)
    lesions = nodules.labels > 0
    with _model().ready("cpu") as device, torch.no_grad():
        output = read_layers(_model(), nodules.images[lesions].to(device), (None,))[None]
    says = output.argmax(1) == CLASSES.index("malignant")
    attributes = {name: nodules.attributes[lesions, i] for i, name in enumerate(ATTRIBUTES)}
    found = []
    for condition in (mx.Condition("diameter_mm", ">", 15.0, "mm"), mx.Condition("spiculation", ">", 0.0)):
        holds = attributes[condition.feature] > condition.threshold
        share, right = float(holds.float().mean()), float(says[holds].float().mean())
        found.append(mx.Rule((condition,), "malignant", share, right, int(holds.sum()), applies=bool(holds[0])))
    values = {rule.conditions[0].feature: float(attributes[rule.conditions[0].feature][0]) for rule in found}
    made = mx.explain(_model(), chest(), "gradient", "malignant", NODULE).provenance
    return mx.RuleSet(_made(made, {"kind": "RuleSet"}, "malignant"), {}, tuple(found), "", values)


class _Features(nn.Module):
    """What both heads of the demo network see, as an embedding (N, 128)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        return self.network.features(image)


@functools.cache
def _model() -> mx.Model:
    return mx.load_model(path("Models/lung_nodule"))


@functools.cache
def _embedding() -> mx.Model:
    return replace(_model(), network=_Features(_model().network), task="embedding", layers=("network.evidence",))


@functools.cache
def _archive() -> tuple[list[mx.Volume], Nodules]:
    """Synthetic nodules, each on a tilted, anisotropic grid of its own, somewhere else in space."""
    drawn = synthesise(Backgrounds.training(), 12, seed=4)
    lesions = drawn.labels > 0
    patches = replace(drawn, **{name: value[lesions] for name, value in vars(drawn).items()})
    generator = np.random.default_rng(7)
    volumes = []
    for i, image in enumerate(patches.images):
        low, high = HU_RANGE
        # The patch has the axes (R, A, S), a volume (S, A, R).
        data = image.permute(0, 3, 2, 1) * (high - low) + low
        middle = generator.uniform(-200, 200, 3)
        turned, _ = np.linalg.qr(np.eye(3) + generator.uniform(-0.25, 0.25, (3, 3)))
        turned *= np.sign(np.diag(turned))
        upright = _grid(middle, np.eye(3), (SPACING_MM,) * 3, data.shape[1:])
        shape = (22, 50, 64)
        onto = _grid(middle, turned, (2.0 + 0.1 * i, 0.9, 0.7), shape)
        # Air where the patch has no voxels.
        filled = resample(data - low, upright, shape, onto) + low
        volumes.append(mx.Volume(filled, onto, f"archive/synthetic-{i:02d}.nrrd"))
    return volumes, patches


def _grid(middle, turned, spacing, shape) -> np.ndarray:
    """Array index (d, h, w) to RAS mm of a grid of this size about its middle."""
    affine = np.eye(4)
    affine[:3, :3] = turned[:, ::-1] * spacing
    affine[:3, 3] = middle - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine


@functools.cache
def _embedded(index: int) -> Tensor:
    case = _archive()[0][index]
    return _read(_embedding(), case, _middle(case))[None][0]


def _middle(volume: mx.Volume) -> tuple[float, ...]:
    return tuple(float(v) for v in volume.to_point((np.array(volume.shape) - 1) / 2))


def _read(model: mx.Model, volume: mx.Volume, region: Sequence[float]) -> dict[str | None, Tensor]:
    """What the network says about a part of a volume, and what its attribute head says, if it is asked."""
    layers = (None, _HEAD) if model.task == "classification" else (None,)
    with model.ready("cpu") as device, torch.no_grad():
        return read_layers(model, model.prepare(volume, region).x[None].to(device), layers)


def _attribute(name: str) -> mx.RegressionTarget:
    return mx.RegressionTarget(ATTRIBUTES.index(name), layer=_HEAD)


def _phrase(present: str, absent: str, name: str, degree: dict[str, float]):
    """The word for an attribute, its target when it is there, and its degree."""
    if degree[name] > 0.5:
        return present, _attribute(name), degree[name]
    return absent, None, 1 - degree[name]


def _made(provenance: Provenance, target: dict[str, object], label: str) -> Provenance:
    return provenance.model_copy(update={"target": target, "target_label": label})
