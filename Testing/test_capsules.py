"""Attributes held in capsules: routing by agreement, what each place gave, the nodule drawn again, the network."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import asdict, replace
from functools import cache

import numpy as np
import pytest
import torch
from conftest import oblique_affine
from model_cards import metrics_of
from monai.transforms import Compose, Orientation, Spacing
from small_explanations import NODULE as REAL
from small_explanations import chest
from torch import Tensor, nn

import MedXAILib as mx
from MedXAILib.errors import MedXAIError
from MedXAILib.networks.capsules import CapsuleLungNodule, Capsules, Lengths, around, squashed
from MedXAILib.networks.semantic import ATTRIBUTES, Attribute, SemanticLungNodule
from MedXAILib.report.localisation import peak
from MedXAILib.resources import path
from MedXAILib.synthetic.lung_nodules import CLASSES, Backgrounds, Nodules, draw, synthesise
from MedXAILib.textual.intervention import intervened
from MedXAILib.textual.semantic import REST
from MedXAILib.training import capsules as recipe
from MedXAILib.training import semantic

NAMES = [a.name for a in ATTRIBUTES]


def by_hand(primary: np.ndarray, vote: np.ndarray, iterations: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Routing with a loop over every vote, as Sabour et al. and LaLonde et al. write it: of one sample's primary
    capsules (P, Q, X) the capsules (K, D), the sums of votes (K, D) and what each place adds to the sum (K, X, D)."""

    def squash(s: np.ndarray) -> np.ndarray:
        size = (s**2).sum()
        return size / (1 + size) * s / math.sqrt(size)

    kinds, capsules, depth, _ = vote.shape
    places = primary.shape[-1]
    children = [(p, x) for p in range(kinds) for x in range(places)]
    u = {(p, x): squash(primary[p, :, x]) for p, x in children}
    b = {(p, x, k): 0.0 for p, x in children for k in range(capsules)}
    for _ in range(iterations):
        v, total, added = np.zeros((capsules, depth)), np.zeros((capsules, depth)), np.zeros((capsules, places, depth))
        for k in range(capsules):
            for p, x in children:
                added[k, x] += 1 / (1 + math.exp(-b[p, x, k])) * (vote[p, k] @ u[p, x])
            total[k] = added[k].sum(0)
            v[k] = squash(total[k])
        for p, x in children:
            for k in range(capsules):
                b[p, x, k] += vote[p, k] @ u[p, x] @ v[k]
    return v, total, added


def layer(seed: int = 0, capsules: int = 3) -> tuple[Capsules, Tensor]:
    """2 primary capsules of 3 numbers on a grid of 2 x 3 x 2, routed to capsules of 4, that agree and disagree."""
    generator = torch.Generator().manual_seed(seed)
    module = Capsules(2, 3, capsules, 4)
    module.vote.data = torch.randn(2, capsules, 4, 3, generator=generator)
    return module, torch.randn(2, 6, 2, 3, 2, generator=generator)


def test_a_capsule_is_shorter_than_one_and_points_where_it_did() -> None:
    vectors = torch.tensor([[3.0, 4.0], [0.0, 0.1], [300.0, 400.0], [0.0, 0.0]])
    short = squashed(vectors)
    assert short.norm(dim=1).tolist() == pytest.approx([25 / 26, 0.01 / 1.01, 250000 / 250001, 0])
    assert (short.norm(dim=1) < 1).all()
    assert torch.allclose(nn.functional.cosine_similarity(short[:3], vectors[:3]), torch.ones(3))
    vectors.requires_grad_()
    (gradient,) = torch.autograd.grad(Lengths(4)(squashed(vectors)[None]).sum(), vectors)
    assert gradient.isfinite().all()


def test_routing_is_that_of_a_loop_over_every_vote() -> None:
    module, features = layer()
    with torch.no_grad():
        found, parts = module(features), module.routed(features)
    for i in range(2):
        primary = features[i].reshape(2, 3, 12).numpy().astype(float)
        capsules, total, added = by_hand(primary, module.vote.detach().numpy().astype(float))
        assert np.allclose(found[i].numpy(), capsules, atol=1e-5)
        # Along the sum, and squashed as the sum is.
        size = np.linalg.norm(total, axis=1)[:, None]
        along = (added * (total / size)[:, None]).sum(-1) * size / (1 + size**2)
        assert np.allclose(parts[i].reshape(3, 12).numpy(), along, atol=1e-5)
    # The iterations matter, or nothing of the routing was tested.
    module.iterations = 1
    assert (module(features) - found).abs().max() > 0.05


def test_what_each_place_gave_sums_to_the_length() -> None:
    module, features = layer(1)
    parts, lengths = module.routed(features), module(features).norm(dim=-1)
    assert parts.shape == (2, 3, 2, 3, 2)
    assert torch.allclose(parts.sum((2, 3, 4)), lengths, atol=1e-6)
    assert (parts < 0).any()


def test_no_capsule_takes_from_another() -> None:
    """Weights of a softmax would sum to 1 over the capsules; those of a sigmoid do not know of each other."""
    module, features = layer()
    fewer = Capsules(2, 3, 2, 4)
    fewer.vote.data = module.vote.data[:, :2]
    assert torch.allclose(fewer(features), module(features)[:, :2], atol=1e-6)
    counts, _ = module._route(module._primary(features))
    assert counts.shape == (2, 2, 3, 12) and ((counts > 0) & (counts < 1)).all()
    assert (counts.sum(2) - 1).abs().max() > 0.1
    # Before anything has agreed with anything, half of each vote counts.
    module.iterations = 1
    assert (module._route(module._primary(features))[0] == 0.5).all()


@cache
def lung() -> mx.Model:
    """Weights that nothing was learnt with, but where every capsule is neither empty nor full."""
    torch.manual_seed(0)
    network = CapsuleLungNodule()
    for _ in range(3):
        network(torch.rand(4, 1, 24, 24, 24))  # so that batch normalisation is not the identity
    network.capsules.vote.data *= 220
    network.class_head.scale.uniform_(0.5, 5)
    network.class_head.offset.uniform_(0, 1)
    network.degrees.low[1], network.degrees.high[1] = 5.0, 25.0
    return mx.Model(network.eval(), class_names=CLASSES, layers=("evidence",))


def patch(seed: int = 1) -> Tensor:
    return torch.rand(1, 24, 24, 24, generator=torch.Generator().manual_seed(seed))


def capsules_of(model: mx.Model, x: Tensor) -> tuple[Tensor, Tensor]:
    """Lengths (K,) and what each place gave (K, 6, 6, 6), by the network's own layers."""
    with torch.no_grad():
        network, kept = model.network, []
        handle = network.primary.register_forward_hook(lambda module, inputs, output: kept.append(output))
        lengths = network.features(x[None])[0].norm(dim=-1)
        handle.remove()
        return lengths, network.routed(kept[0])[0]


def test_shares_sum_to_the_logit_and_values_are_lengths() -> None:
    model, x = lung(), patch()
    lengths, parts = capsules_of(model, x)
    assert lengths.min() > 0.02 and lengths.max() < 0.98 and lengths.std() > 0.05
    with torch.no_grad():
        logits = model.network(x[None])[0]
    for index, name in enumerate(CLASSES):
        told = mx.tell(model, x, "capsules", target=name)
        assert [c.name for c in told.concepts] == [*NAMES, REST]
        assert sum(c.score for c in told.concepts) == pytest.approx(float(logits[index]), abs=1e-5)
        assert told.residual["completeness"] < 1e-4 and told.residual["routing"] < 1e-5
    for k, c in enumerate(told.concepts[:-1]):
        # 5 to 25 mm.
        assert c.value == pytest.approx(5 + 20 * float(lengths[k]) if c.unit else float(lengths[k]), abs=1e-5)
        if c.map is not None:
            # Each unit of 4 voxels is the middle of what it looks at; between them it is interpolated.
            assert told.maps[c.map].sum() / 64 == pytest.approx(float(parts[k].sum()), rel=0.25)
    seen = {c.name for c in told.concepts[:-1] if c.map is not None}
    assert seen == ({c.name for c in told.concepts[:-1] if c.unit or c.value > 0.5} if lengths[0] > 0.5 else set())


def test_it_is_asked_as_semantic_is() -> None:
    model, x = lung(), patch()
    told, other = (mx.tell(model, x, name, target="malignant") for name in ("capsules", "semantic"))
    assert [(c.name, c.score, c.weights) for c in told.concepts] == [
        (c.name, c.score, c.weights) for c in other.concepts
    ]
    after = mx.tell(model, x, "capsules", target="malignant", intervene="spiculation=0, diameter=8")
    would = intervened([*map(asdict, told.concepts)], {"spiculation": 0.0, "diameter": 8.0})
    assert sum(c.score for c in after.concepts) == pytest.approx(would["malignant"], abs=1e-4)
    assert mx.recompute(after, model, x).text == after.text


def flipped(model: mx.Model, axis: int) -> mx.Model:
    """The same network in a mirror."""
    network = deepcopy(model.network)
    for module in network.modules():
        if isinstance(module, nn.Conv3d):
            module.weight.data = module.weight.data.flip(axis + 2)
    return replace(model, network=network)


def test_in_a_mirror_it_comes_from_the_mirrored_place() -> None:
    model, x = lung(), torch.rand(1, 24, 32, 40, generator=torch.Generator().manual_seed(3))
    told = mx.tell(model, x, "capsules")
    assert len(told.maps) > 0
    for axis in range(3):
        again = mx.tell(flipped(model, axis), x.flip(axis + 1), "capsules")
        assert torch.allclose(again.maps, told.maps.flip(axis + 1), atol=1e-5)
        assert not torch.allclose(again.maps, told.maps, atol=1e-3)


def test_network_without_capsules_is_refused() -> None:
    named = mx.Model(SemanticLungNodule().eval(), class_names=CLASSES, layers=("evidence",))
    with pytest.raises(MedXAIError, match="has no capsules for its attributes: use"):
        mx.tell(named, patch(), "capsules")


class Own(nn.Module):
    """A person's own: one attribute, the squashed brightness of all voxels."""

    attributes = (Attribute("brightness", yes="bright"),)
    attribute_layer, primary_layer = "degrees", "primary"

    def __init__(self) -> None:
        super().__init__()
        self.primary = nn.Conv3d(1, 1, 1, bias=False)
        nn.init.constant_(self.primary.weight, 1.0)
        self.degrees = nn.Identity()

    @property
    def reference(self) -> Tensor:
        return torch.zeros(1)

    def forward(self, image: Tensor) -> Tensor:
        total = self.primary(image).sum((2, 3, 4))
        return 3 * self.degrees(total / (1 + total))

    def routed(self, primary: Tensor) -> Tensor:
        return primary / (1 + primary.sum())

    def drawn_off(self, image: Tensor, primary: Tensor) -> Tensor:
        return torch.full((1,), 0.0625)


@pytest.mark.parametrize("resampled", [False, True])
def test_maps_are_in_the_place_of_an_oblique_scan(resampled: bool) -> None:
    data = torch.full((1, 9, 21, 15), 0.1)
    data[0, 5:8, 3:6, 10:13] = 20.0
    data[0, 6, 4, 11] = 30.0
    volume = mx.Volume(data, oblique_affine((2.5, 0.8, 1.1)))
    grid = Compose([Orientation("RAS", labels=None), Spacing(1.0, mode="bilinear")]) if resampled else None
    told = mx.tell(mx.Model(Own(), task="regression", preprocessing=grid), volume, "capsules")
    assert told.maps.shape == (1, 9, 21, 15)
    assert torch.equal(torch.tensor(told.affine), torch.tensor(volume.affine))
    off = peak(told.seen()[0]) - volume.to_point((6, 4, 11))
    assert float((off**2).sum()) ** 0.5 < (2.0 if resampled else 1e-6)
    assert told.text.endswith("Drawn again from its capsules, it is 6% off the scan.")
    if not resampled:
        assert torch.allclose(told.maps, data / (1 + data.sum()))


def test_routing_that_misses_the_value_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.full((1, 4, 4, 4), 0.1)
    x[0, 0, 0, 0] = 0.2
    assert mx.tell(mx.Model(Own(), task="regression"), x, "capsules").residual["routing"] < 1e-6
    monkeypatch.setattr(Own, "routed", lambda self, primary: primary / primary.sum())
    missed = mx.tell(mx.Model(Own(), task="regression"), x, "capsules").residual["routing"]
    assert missed == pytest.approx(1 - 6.5 / 7.5)


def test_around_is_what_is_there_and_nothing_outside() -> None:
    images = torch.rand(2, 1, 40, 36, 50, generator=torch.Generator().manual_seed(0))
    cells = images.reshape(2, 20, 2, 18, 2, 25, 2).mean((2, 4, 6))
    # Sixteen cells of two voxels, eight on each side of a centre between two of them.
    found = around(images, torch.tensor([[19.5, 17.5, 23.5], [3.5, 17.5, 23.5]]))[:, 0]
    assert torch.allclose(found[0], cells[0, 2:18, 1:17, 4:20], atol=1e-6)
    assert torch.allclose(found[1, 6:], cells[1, :10, 1:17, 4:20], atol=1e-6)
    assert found[1, :6].abs().max() < 1e-6


def test_what_is_drawn_is_held_against_the_scan_where_it_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    network = lung().network
    image = torch.full((1, 1, 40, 40, 40), 0.3)
    image[0, 0, 20:28, 12:20, 20:28] = 0.7
    parts = torch.zeros(1, 10, 10, 10, 10)
    # Cells 5 and 6, 3 and 4, 5 and 6: voxels 20 to 27, 12 to 19, 20 to 27.
    parts[0, 0, 5:7, 3:5, 5:7] = 0.1
    parts[0, 0, 0, 0, 0] = -5.0
    drawn = torch.zeros(1, 1, 16, 16, 16)
    drawn[0, 0, 6:10, 6:10, 6:10] = 0.5
    monkeypatch.setattr(network, "routed", lambda primary: parts)
    monkeypatch.setattr(network, "redrawn", lambda features: drawn)
    primary = torch.zeros(1, 64, 10, 10, 10)
    assert network.drawn_off(image, primary).tolist() == pytest.approx([0.2])
    drawn[0, 0, 6:10, 6:10, 10:14] = 0.5
    assert network.drawn_off(image, primary).tolist() == pytest.approx([0.2])
    drawn.zero_()
    assert network.drawn_off(image, primary).isnan().all()


@cache
def air() -> Backgrounds:
    """A scan of nothing but noise, in which a nodule may be anywhere."""
    noise = torch.randn(64, 64, 64, generator=torch.Generator().manual_seed(0))
    places = torch.cartesian_prod(*[torch.arange(24, 40)] * 3)
    return Backgrounds(30 * noise - 850, np.eye(4), places, places)


def test_a_batch_turned_over_and_moved_is_still_of_the_same_nodules() -> None:
    first, again, later = (recipe.repeated(air(), 6, seed) for seed in (40, 40, 80))
    assert torch.equal(first.images, again.images)
    known = synthesise(air(), 6, recipe._SEED)
    grid = torch.stack(torch.meshgrid(*[torch.arange(40.0)] * 3, indexing="ij"), dim=-1)
    lesion = known.labels > 0
    assert lesion.sum() >= 3 and not torch.equal(first.images, later.images)
    for turned in (first, later):
        assert torch.equal(turned.labels, known.labels)
        assert torch.equal(turned.attributes[lesion], known.attributes[lesion])
        for i in lesion.nonzero()[:, 0].tolist():
            sums = [patches.masks[i].sum() for patches in (turned, known)]
            assert sums[0] == pytest.approx(float(sums[1]), rel=0.2)
            inside = [patches.images[i][patches.masks[i]].mean() for patches in (turned, known)]
            assert inside[0] == pytest.approx(float(inside[1]), abs=0.02)
            off = [
                (grid * p.masks[i, 0, ..., None]).sum((0, 1, 2)) / p.masks[i].sum() - p.centres[i]
                for p in (turned, known)
            ]
            assert sorted(off[0].abs().tolist()) == pytest.approx(sorted(off[1].abs().tolist()), abs=0.6)


def drawn_nodules(count: int = 12) -> Nodules:
    """Attributes and classes as the recipe draws them, of noise, with a ball for a nodule."""
    attributes, labels = draw(count, seed=5)
    images = torch.rand(count, 1, 40, 40, 40, generator=torch.Generator().manual_seed(3))
    masks = torch.zeros(count, 1, 40, 40, 40, dtype=torch.bool)
    masks[labels > 0, :, 16:24, 16:24, 16:24] = True
    return Nodules(images, masks, labels, attributes, torch.full((count, 3), 19.5), torch.zeros(count, 3))


def test_loss_is_that_of_semantic_and_of_the_drawing() -> None:
    patches = drawn_nodules()
    network = recipe.build().eval()
    value = recipe.loss(network, patches)
    value.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())
    with torch.no_grad():
        features = network.features(patches.images)
        said, logits, drawn = network.named(features), network(patches.images), network.redrawn(features)
    true = semantic.true_attributes(patches.attributes, patches.labels)
    findings, diameters = [], []
    for row, known in zip(said.tolist(), true.tolist(), strict=True):
        for name, p, t in zip(NAMES, row, known, strict=True):
            if name == "diameter":
                diameters += [] if math.isnan(t) else [((p - t) / network.class_head.scale[1].item()) ** 2]
            elif not math.isnan(t):
                findings.append(-math.log(p if t else 1 - p))
    wanted = np.zeros((12, 16, 16, 16))
    cells = patches.images[:, 0].reshape(12, 20, 2, 20, 2, 20, 2).mean((2, 4, 6)).numpy()
    wanted[:, 6:10, 6:10, 6:10] = cells[:, 8:12, 8:12, 8:12]
    wanted[patches.labels.numpy() == 0] = 0
    drawing = ((drawn[:, 0].numpy() - wanted) ** 2).mean()
    expected = nn.functional.cross_entropy(logits, patches.labels).item()
    expected += 3 * (sum(findings) / len(findings) + sum(diameters) / len(diameters)) + 20 * drawing
    assert value.item() == pytest.approx(expected, rel=1e-4)


def test_measures_of_the_capsules_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    patches = drawn_nodules(30)
    network = recipe.build().eval()
    monkeypatch.setattr(recipe.semantic, "measure", lambda *_: {})
    true = recipe.alone(patches)
    lesion = patches.labels > 0
    # What draws the mean nodule explains nothing of how they differ; what draws each as it is, all.
    for drawn, expected in ((true[lesion].mean(0).expand_as(true), 0.0), (true, 1.0)):
        monkeypatch.setattr(network, "redrawn", lambda features, drawn=drawn: drawn)
        assert recipe.measure(network, patches)["drawing_r2"] == pytest.approx(expected, abs=1e-5)
    parts = torch.zeros(30, 10, 10, 10, 10)
    parts[:, 0, 4, 4, 4] = 1
    parts[lesion.nonzero()[:5, 0], 0, 0, 0, 0] = 2
    monkeypatch.setattr(network, "routed", lambda primary: parts)
    monkeypatch.setattr(network, "named", lambda features: lesion[:, None].float())
    assert recipe.measure(network, patches)["routed_pointing"] == pytest.approx(15 / 20)


def metrics(name: str) -> dict[str, float]:
    return metrics_of(path(f"Models/{name}"))


@cache
def shipped() -> mx.Model:
    return mx.load_model(path("Models/lung_nodule_capsules"))


@cache
def unseen() -> Nodules:
    """Patches of the patient that nobody trained on, of a seed that nobody looked at."""
    return synthesise(Backgrounds.test(), 90, seed=104)


def test_attributes_beside_those_of_the_semantic_network() -> None:
    held, plain = metrics("lung_nodule_capsules"), metrics("lung_nodule")
    named = metrics("lung_nodule_semantic")
    card = path("Models/lung_nodule_capsules/docs/README.md").read_text("utf-8")
    for said, name in (("accuracy, three classes", "accuracy"), ("spiculated", "spiculation")):
        row = [f"{of[key + name]:.3f}" for key in ("", "borderline_") for of in (held, named)]
        assert f"| {said} | {' | '.join(row)} |" in card
    for key in ("accuracy", "borderline_accuracy"):
        assert f"{plain[key]:.3f}" in card
        assert held[key] >= plain[key] - 0.04
    for key in ("nodule", "solidity", "calcification", "spiculation"):
        assert held[key] >= named[key] - 0.07
    found = recipe.measure(shipped().network, unseen())
    assert found["accuracy"] >= 0.85 and found["corrected_accuracy"] == 1
    assert min(found[name] for name in ("nodule", "solidity", "calcification", "spiculation")) >= 0.75
    assert found["diameter_mm"] < 2 and found["diameter_r2"] > 0.8
    assert found["routed_pointing"] >= 0.9


def test_the_nodule_drawn_again_is_the_nodule() -> None:
    network, patches = shipped().network, unseen()
    lesion = patches.labels > 0
    with torch.no_grad():
        features = network.features(patches.images)
        drawn, said = network.redrawn(features), network.named(features)
    volume = (drawn > 0.2).sum((1, 2, 3, 4)).float()
    # A nodule twice as wide is drawn larger, and where there is none nothing is.
    known = patches.attributes[lesion, 0]
    assert float(torch.corrcoef(torch.stack([volume[lesion].pow(1 / 3), known]))[0, 1]) > 0.8
    assert volume[~lesion].median() == 0 and (said[~lesion, 0] < 0.5).float().mean() > 0.8
    # Each capsule has a say in it.
    turned = features.clone()
    turned[:, NAMES.index("calcification")] = 0
    assert (network.redrawn(turned) - drawn)[lesion].abs().amax() > 0.02


def test_real_nodule_in_capsules() -> None:
    volume = chest()
    told = mx.tell(shipped(), volume, "capsules", target="malignant", region=REAL)
    by_name = {c.name: c for c in told.concepts}
    assert "nodule of 1" in told.text and "off the scan." in told.text
    # A sphere of its 1.36 mL is 13.8 mm across.
    assert by_name["diameter"].value == pytest.approx(13.8, abs=4)
    assert told.residual["completeness"] < 1e-4 and told.residual["routing"] < 1e-4
    assert told.maps.shape[1:] == volume.shape
    for name in ("nodule", "diameter", "spiculation"):
        assert math.dist(peak(told.seen()[by_name[name].map]), REAL) < 15
