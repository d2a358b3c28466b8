"""Prototypes: points that sum to the score, parts that are of training cases, and what tells good ones from bad."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import oblique_affine
from model_cards import metrics_of
from small_explanations import NODULE, chest
from torch import Tensor

import MedXAILib as mx
from MedXAILib.errors import MedXAIError
from MedXAILib.grid import resample, transform
from MedXAILib.networks.prototypes import Origin, PrototypeLungNodule
from MedXAILib.report.cases import of_cases
from MedXAILib.resources import path
from MedXAILib.synthetic.lung_nodules import ATTRIBUTES, CLASSES, Backgrounds, synthesise
from MedXAILib.training import prototypes
from MedXAILib.training.table import Patches
from MedXAILib.trust import telling
from MedXAILib.trust.prototype_checks import (
    activation_precision,
    balanced_accuracy,
    incremental,
    places,
    purity,
    stays,
)

ORIGINS = tuple(
    Origin(of, f"case {i}", (10.0 * i, -5.0, 3.0), {"diameter_mm": 8.0 + i}) for i, of in enumerate((0, 1, 1, 2, 2))
)
BUNDLE = "Models/lung_nodule_prototypes"


@cache
def small() -> mx.Model:
    """A network that nothing was learnt with, whose prototypes are what it finds in its crops."""
    torch.manual_seed(0)
    network = PrototypeLungNodule(3, [asdict(origin) for origin in ORIGINS], size=24)
    network(torch.rand(4, 1, 24, 24, 24))  # so that batch normalisation is not the identity
    network.eval()
    network.crops.copy_(torch.randint(0, 256, network.crops.shape))
    with torch.no_grad():
        network.class_head.weight.copy_(torch.tensor([2.0, 3.0, -1.0, 4.0, 1.0]))
        found = network.looked(network.cases()).found
        network.prototypes.weight.copy_(found[range(5), range(5)])
    return mx.Model(network, class_names=CLASSES, layers=("evidence",), patch_size=(24, 24, 24))


def oblique_scan() -> mx.Volume:
    data = torch.rand(1, 30, 80, 60, generator=torch.Generator().manual_seed(3))
    return mx.Volume(data, oblique_affine())


@cache
def plain() -> mx.Model:
    return mx.load_model(path("Models/lung_nodule"))


@cache
def shipped() -> mx.Model:
    return mx.load_model(path(BUNDLE))  # Without trust.


def metadata() -> dict[str, float]:
    return metrics_of(path(BUNDLE))


def test_points_sum_to_the_score_on_an_oblique_scan() -> None:
    scan = oblique_scan()
    model = replace(small(), preprocessing=plain().preprocessing)
    where = tuple(scan.to_point([16, 37, 28]))
    with torch.no_grad():
        logits = model.network(model.prepare(scan, where).x[None])[0]
    for index, name in enumerate(CLASSES):
        told = mx.tell(model, scan, "prototypes", name, region=where)
        assert sum(case.similarity for case in told.cases) == pytest.approx(float(logits[index]), abs=1e-5)
        assert told.residual["sum of points"] <= 1e-5 and told.scored == "points"
        # Those of its own class that have a weight, the most points first.
        own = {origin.uid for i, origin in enumerate(ORIGINS) if origin.of == index and i != 2}
        assert {case.uid for case in told.cases} == own
        assert [c.similarity for c in told.cases] == sorted((c.similarity for c in told.cases), reverse=True)
        for case in told.cases:
            assert case.role == "prototype" and case.label == name and case.similarity >= 0
            points = case.numbers["similarity"] * case.numbers["weight"]
            assert case.similarity == case.numbers["points"] == pytest.approx(points)
            i = int(case.uid[-1])
            assert case.numbers["diameter_mm"] == 8.0 + i
            with torch.no_grad():
                own = model.network.looked(model.network.cases()[i : i + 1]).masks[:, i : i + 1]
            assert torch.allclose(case.map, F.interpolate(own, size=(24, 24, 24), mode="trilinear")[0], atol=1e-6)
        assert told.query_map is not None
        # Each on a part of the scan's own grid, beyond which there is nothing.
        assert all(c.query_map.data.numel() < 0.5 * scan.data.numel() for c in told.cases)
        maps = [resample(c.query_map.data, c.query_map.affine, scan.shape, scan.affine) for c in told.cases]
        assert torch.allclose(told.query_map, torch.stack(maps).sum(0), atol=1e-6)
    lead = mx.tell(model, scan, "prototypes", mx.ClassTarget("malignant", versus="benign"), region=where)
    assert sum(case.similarity for case in lead.cases) == pytest.approx(float(logits[2] - logits[1]), abs=1e-5)
    assert {case.label for case in lead.cases if case.similarity < 0} == {"benign"}
    assert [c.similarity for c in mx.recompute(lead, model, scan).cases] == [c.similarity for c in lead.cases]


def test_the_map_is_where_the_prototype_looks() -> None:
    """A mask put at one unit of the grid by hand: unit i is centred at voxel 4 i + 1.5 of what the network sees."""
    model, scan = small(), chest()
    model = replace(model, preprocessing=plain().preprocessing)
    network = model.network
    before = network.places.forward
    unit = (1, 3, 4)
    logits = torch.zeros(1, 5, 6, 6, 6)
    logits[(0, slice(None), *unit)] = 50.0
    network.places.forward = lambda seen: logits.expand(len(seen), *logits.shape[1:])
    try:
        told = mx.tell(model, scan, "prototypes", "malignant", region=NODULE)
    finally:
        network.places.forward = before
    seen = model.prepare(scan, NODULE)
    expected = transform(seen.affine, 4 * np.array(unit) + 1.5)
    for case in told.cases:
        values = case.query_map.data[0].double()
        grid = torch.stack(torch.meshgrid(*map(torch.arange, values.shape), indexing="ij"), -1).double()
        centre = (values[..., None] * grid).sum((0, 1, 2)) / values.sum()
        # On a grid with slices of 5 mm, that of the scan.
        assert np.linalg.norm(case.query_map.to_point(centre.tolist()) - expected) < 1.5
        assert np.array_equal(case.query_map.affine[:3, :3], scan.affine[:3, :3])
        origin = ORIGINS[int(case.uid[-1])]
        assert case.volume.affine.tolist() == [
            [1.25, 0, 0, origin.corner[0]],
            [0, 1.25, 0, origin.corner[1]],
            [0, 0, 1.25, origin.corner[2]],
            [0, 0, 0, 1],
        ]
        assert np.linalg.norm(np.array(case.place) - transform(case.volume.affine, 4 * np.array(unit) + 1.5)) < 2.5
        assert (case.volume.data.min(), case.volume.data.max()) == (-1000.0, 400.0)


def test_between_thick_slices_there_is_nothing_to_show_but_points(tmp_path: Path) -> None:
    """Slices 70 mm apart, and the network sees 30 mm between two of them."""
    scan = mx.Volume(torch.rand(1, 4, 60, 60), np.diag([70.0, 1, 1, 1]))
    model = replace(small(), preprocessing=plain().preprocessing)
    told = mx.tell(model, scan, "prototypes", "malignant", region=tuple(scan.to_point([1.5, 30, 30])))
    told.save(tmp_path / "told")
    again = mx.load_explanation(tmp_path / "told")
    assert [case.query_map for case in again.cases] == [None] * len(told.cases) and not again.query_map.any()
    assert of_cases(scan, again).body.count("<div class=case>") == len(told.cases) > 0


def test_it_can_be_kept_and_read_again(tmp_path: Path) -> None:
    told = mx.tell(small(), cube(), "prototypes", "malignant")
    told.save(tmp_path / "told")
    again = mx.load_explanation(tmp_path / "told")
    assert again.text == told.text and len(again.cases) == len(told.cases) == 2
    for one, other in zip(told.cases, again.cases, strict=True):
        assert (one.uid, one.role, one.numbers) == (other.uid, other.role, other.numbers)
        assert torch.equal(one.volume.data, other.volume.data) and torch.equal(one.map, other.map)
        assert torch.equal(one.query_map.data, other.query_map.data)
        assert np.allclose(one.query_map.affine, other.query_map.affine)


def cube() -> mx.Volume:
    data = torch.rand(1, 24, 24, 24, generator=torch.Generator().manual_seed(3))
    return mx.Volume(data, oblique_affine())


def test_a_network_without_prototypes_is_refused() -> None:
    with pytest.raises(MedXAIError, match="no prototypes: use a network that has, as lung_nodule_prototypes"):
        mx.tell(plain(), torch.rand(1, 40, 40, 40), "prototypes")
    begun = mx.Model(prototypes.build(), class_names=CLASSES)
    with pytest.raises(MedXAIError, match="come from no case: train it to the end"):
        mx.tell(begun, torch.rand(1, 40, 40, 40), "prototypes")
    with pytest.raises(MedXAIError, match="leave the layer of the target out"):
        mx.tell(small(), torch.rand(1, 24, 24, 24), "prototypes", mx.RegressionTarget(0, layer="class_head"))


def test_similarity_is_the_cosine_of_what_is_seen_where_it_looks() -> None:
    """By NumPy, from the activations alone."""
    network, x = small().network, torch.rand(2, 1, 24, 24, 24)
    kept: dict[str, np.ndarray] = {}
    for name in ("parts", "places"):
        network.get_submodule(name).register_forward_hook(
            lambda _m, _i, y, name=name: kept.update({name: y.detach().double().numpy()})
        )
    with torch.no_grad():
        looked, logits = network.looked(x), network(x).numpy()
    parts, places_ = (kept[name].reshape(2, -1, 6**3) for name in ("parts", "places"))
    shares = np.exp(places_ - places_.max(2, keepdims=True))
    shares /= shares.sum(2, keepdims=True)
    assert np.allclose(looked.masks.flatten(2), shares, atol=1e-6)
    found = np.einsum("npx,nkx->npk", shares, parts)
    own = network.prototypes.weight.detach().double().numpy()
    cosine = (found * own).sum(2) / np.linalg.norm(found, axis=2) / np.linalg.norm(own, axis=1)
    assert np.allclose(looked.similarities, cosine, atol=1e-6)
    weights = network.class_head.weight.detach().numpy()
    of = [origin.of for origin in ORIGINS]
    for n, index in product(range(2), range(3)):
        assert logits[n, index] == pytest.approx(
            sum(max(w, 0) * c for w, c, o in zip(weights, cosine[n], of, strict=True) if o == index), abs=1e-5
        )


def taught(count: int = 24) -> prototypes.Taught:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(count) % 3
    images = torch.rand(count, 1, 24, 24, 24, generator=generator) * 0.4
    for i, label in enumerate(labels.tolist()):
        images[i, 0, 8:12, 8:12, 4 * label + 4 : 4 * label + 8] += 0.2 * label + 0.1 * (i % 2)
    origins = [Origin(label, f"patch {i}") for i, label in enumerate(labels.tolist())]
    return prototypes.Taught(images, labels, origins)


def projected() -> tuple[PrototypeLungNodule, PrototypeLungNodule, prototypes.Taught]:
    """A network before and after, and what it was projected on."""
    torch.manual_seed(2)
    of = [0, 0, 1, 1, 1, 2, 2, 2]
    network = PrototypeLungNodule(3, [{"of": index} for index in of], size=24)
    known = taught()
    optimiser = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(25):
        optimiser.zero_grad()
        prototypes.loss(network, known).backward()
        optimiser.step()
    network.eval()
    before = PrototypeLungNodule(3, [{"of": index} for index in of], size=24).eval()
    before.load_state_dict(network.state_dict())
    halves = (
        prototypes.Taught(known.images[part], known.labels[part], known.origins[part.start : part.stop])
        for part in (slice(0, 10), slice(10, 24))
    )
    prototypes.project(network, halves)
    return before, network, known


def test_prototypes_become_the_nearest_patch_of_their_class() -> None:
    before, after, known = projected()
    grey = (known.images * 255).round()
    with torch.no_grad():
        similarities = before.looked(grey / 255).similarities.numpy()
    of = before.class_head.of.numpy()
    nearest = {}
    for p in range(8):
        own = np.flatnonzero(known.labels.numpy() == of[p])
        nearest[p] = int(own[similarities[own, p].argmax()])
    for p, origin in enumerate(after.origins):
        i = int(origin.uid.split()[1])
        assert origin.of == int(known.labels[i]) and i in [nearest[q] for q in range(8) if of[q] == origin.of]
        assert torch.equal(after.crops[p].float(), grey[i])
    with torch.no_grad():
        own = after.looked(after.cases()).similarities.diagonal()
    assert torch.allclose(own, torch.ones(len(own)), atol=1e-5)
    weights, kept = after.class_head.weight.detach(), after.class_head.of
    with torch.no_grad():
        settled = prototypes._settled(after.looked(grey / 255).similarities, known.labels, kept, len(kept))
    assert torch.allclose(weights, settled, atol=1e-3) and len(weights) < 8 and float(weights.min()) > 0
    for index in range(3):
        assert (weights[kept == index].sort(descending=True).values[1:] >= prototypes._LEAST).all()
    uids = [origin.uid for origin in after.origins]
    assert len(set(uids)) == len(uids) and {origin.of for origin in after.origins} == {0, 1, 2}


def test_parts_of_own_cases_are_where_they_are_in_the_patient() -> None:
    generator = torch.Generator().manual_seed(5)
    images, labels, spots = torch.rand(12, 1, 32, 32, 32, generator=generator) * 0.5, torch.arange(12) % 2, {}
    origins = []
    for i, image in enumerate(images):
        region = np.array([10.0 * i, -20.0, 30.0 + i])
        spot = torch.randint(6, 26, (3,), generator=generator).tolist()
        image[(0, *spot)] = 1.0
        spots[f"row {i}"] = region + 1.25 * (np.array(spot) - 15.5)
        origins.append(Origin(int(labels[i]), f"row {i}", tuple((region - 1.25 * 11.5).tolist())))
    patches = Patches(images, labels, torch.zeros(12, 0), None, [""] * 12)
    batches = [prototypes._taught(origins, patches, 8, seed) for seed in range(3)]
    # As they are trained on, they are flipped and moved.
    assert not all(torch.equal(batch.images, batch.kept) for batch in batches)
    network = PrototypeLungNodule(2, [{"of": index} for index in (0, 0, 1, 1)], size=24).eval()
    prototypes.project(network, batches)
    for origin, crop in zip(network.origins, network.cases(), strict=True):
        found = np.unravel_index(int(crop[0].argmax()), (24, 24, 24))
        assert np.allclose(np.array(origin.corner) + 1.25 * np.array(found), spots[origin.uid])


def test_weights_are_the_best_that_are_not_negative() -> None:
    """Of a convex problem the minimum is where no allowed step goes down (Karush, Kuhn and Tucker)."""
    generator = torch.Generator().manual_seed(4)
    labels, of = torch.arange(60) % 3, torch.tensor([0, 0, 1, 1, 2, 2])
    alike = torch.rand(60, 6, generator=generator) + torch.tensor([0.3, 0.1, 0.2, -0.2, 0.4, 0.0]) * (
        of == labels[:, None]
    )
    w = prototypes._settled(alike, labels, of, 6).double().numpy()
    s = alike.double().numpy()
    logits = np.stack([(s * w)[:, of == index].sum(1) for index in range(3)], 1)
    chances = np.exp(logits - logits.max(1, keepdims=True))
    chances /= chances.sum(1, keepdims=True)
    wrong = chances - np.eye(3)[labels.numpy()]
    gradient = (s * wrong[:, of]).mean(0) + prototypes._SPARSITY
    assert (w >= 0).all() and (w > 0).any() and (w == 0).any()
    assert np.abs(gradient[w > 0]).max() < 1e-4
    assert (gradient[w == 0] > 1e-4).all()


def test_prototypes_that_count_for_little_are_forgotten() -> None:
    of = [0, 0, 1, 1, 1, 1, 1, 1, 1, 2, 2]
    network = PrototypeLungNodule(3, [{"of": index, "uid": str(i)} for i, index in enumerate(of)], size=24)
    weights = torch.tensor([0.1, 0.0, 4.0, 5.0, 1.0, 2.0, 3.0, 0.9, 0.8, 2.0, 0.2])
    network.class_head.weight.data.copy_(weights)
    # The third is from the case of the fourth, which counts for more; a class keeps five, and one at least.
    kept = prototypes._counting(network, [0, 1, 7, 7, 2, 3, 4, 5, 8, 7, 6])
    assert kept == [0, 3, 4, 5, 6, 7, 9]
    prototype, place = network.prototypes.weight[3].clone(), network.places.weight[3].clone()
    x = torch.rand(2, 1, 24, 24, 24)
    before = network.eval().looked(x).similarities
    network.keep(kept)
    assert [origin.uid for origin in network.origins] == ["0", "3", "4", "5", "6", "7", "9"]
    assert torch.equal(network.prototypes.weight[1], prototype) and torch.equal(network.places.weight[1], place)
    assert torch.allclose(network.looked(x).similarities, before[:, kept])
    expected = (before * weights)[:, kept]
    of_kept = torch.tensor(of)[kept]
    sums = torch.stack([expected[:, of_kept == index].sum(1) for index in range(3)], 1)
    assert torch.allclose(network(x), sums, atol=1e-5)


def test_a_frozen_trunk_stays_as_it_is() -> None:
    network = prototypes.build().train()
    trunk = {name: value.clone() for name, value in network.state_dict().items() if name.startswith(("stem", "evid"))}
    optimiser = torch.optim.AdamW(network.parameters(), lr=0.1)
    prototypes.loss(network, taught(6)).backward()
    optimiser.step()
    assert all(torch.equal(network.state_dict()[name], value) for name, value in trunk.items())
    assert torch.equal(trunk["evidence.block.0.weight"], plain().network.evidence.block[0].weight)
    assert network.places.weight.grad is not None and network.norm.training


def test_activation_precision_counts_the_active_voxels_in_the_mask() -> None:
    maps = torch.zeros(3, 2, 2, 2)
    maps[0].flatten()[:] = torch.tensor([1.0, 0.9, 0.6, 0.5, 0.4, 0.2, 0.1, 0.0])
    maps[1].flatten()[:] = torch.tensor([3.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.9])
    masks = torch.zeros(3, 2, 2, 2, dtype=torch.bool)
    masks[0].flatten()[[0, 1, 4]] = True
    masks[1].flatten()[[0, 1]] = True
    masks[2].flatten()[0] = True
    # Of the first 1.0, 0.9, 0.6 and 0.5 are active, of the second 3.0 alone: half-way between 1 and 3 is 2.
    assert activation_precision(maps, masks).tolist() == pytest.approx([2 / 4, 1.0, 0.0])
    # As many as in the mask: three, then two; the third is the same everywhere.
    assert activation_precision(maps, masks, "size").tolist() == pytest.approx([2 / 3, 1 / 2, 0.0])
    # Not those of the first case, for all that follow.
    assert activation_precision(maps[[1, 0]], masks[[1, 0]], "size").tolist() == pytest.approx([1 / 2, 2 / 3])
    with pytest.raises(MedXAIError, match="empty mask"):
        activation_precision(maps, torch.zeros_like(masks))


def test_incremental_deletion_and_addition_of_a_known_answer() -> None:
    """An answer that is right as long as one voxel is there, which the map puts first, in the middle, or last."""
    images = torch.full((4, 1, 4, 4, 4), 0.3)
    labels = torch.tensor([0, 1, 0, 1])
    images[1::2, 0, 0, 0, 0] = 1.0

    def predict(x: Tensor) -> Tensor:
        return (x[:, 0, 0, 0, 0] > 0.9).long()

    maps = torch.arange(64.0).reshape(1, 4, 4, 4).repeat(4, 1, 1, 1)
    first, last = -maps, maps
    good, bad = (incremental(predict, images, one, labels, 0.3, steps=8) for one in (first, last))
    # Shares of the voxels: (k / 8)², the accuracy of the class of the voxel goes from the first step on that has it.
    step = (1 / 8) ** 2
    assert (good.deletion, good.addition) == pytest.approx((step / 2, 1 - step / 2))
    near = (7 / 8) ** 2
    assert (bad.deletion, bad.addition) == pytest.approx((near + (1 - near) / 2, (1 - near) / 2))
    assert good.score == pytest.approx((good.addition + 1 - good.deletion) / 2) and good.score > 0.9 > 0.2 > bad.score
    blind = incremental(lambda x: torch.zeros(len(x)), images, maps, labels, 0.3, steps=2)
    assert np.isnan(blind.deletion)
    # As often right in each class, whatever their sizes.
    assert balanced_accuracy(torch.tensor([0, 0, 0, 0, 1]), torch.tensor([0, 0, 0, 1, 1])) == pytest.approx(0.75)


def test_purity_and_places_of_hand_made_masks() -> None:
    similarities = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.1, 0.9]])
    findings = torch.tensor([[1, 0], [1, 1], [0, 1], [0, 1]]).bool()
    # The three nearest to the first have findings (1, 0), (1, 1), (0, 1), to the second (0, 1), (0, 1), (1, 1).
    assert purity(similarities, findings, 3).tolist() == pytest.approx(np.array([[2 / 3, 2 / 3], [2 / 3, 1]]))
    with pytest.raises(MedXAIError, match="4 cases and it takes 5"):
        purity(similarities, findings, 5)
    masks = torch.zeros(1, 2, 3, 4, 5)
    masks[0, 0, 1, 2, 3] = 7.0
    masks[0, 1, 0, 0, 0], masks[0, 1, 2, 2, 4] = 1.0, 3.0
    found = places(masks, (2.0, 1.0, 0.5))
    assert found.tolist() == [[[2.0, 2.0, 1.5], [3.0, 1.5, 1.5]]]
    assert stays(found, found + torch.tensor([[[3.0, 4.0, 0.0], [3.0, 4.0, 0.1]]]), 5.0) == 0.5


def test_points_in_common_are_what_makes_prototypes_alike() -> None:
    told = mx.tell(small(), cube(), "prototypes", "malignant")
    one, two = told.cases
    assert telling.likeness(told, told) == 1.0
    half = replace(told, cases=(replace(one, similarity=one.similarity / 2), two))
    expected = (one.similarity / 2 + two.similarity) / (one.similarity + two.similarity)
    assert telling.likeness(told, half) == pytest.approx(expected)
    against = replace(told, cases=(replace(one, similarity=-one.similarity), two))
    assert telling.likeness(told, against) == pytest.approx(two.similarity / (one.similarity + two.similarity))
    assert telling.likeness(told, replace(told, cases=(two,))) == telling.likeness(told, against)


def test_the_shipped_prototypes_are_what_the_network_finds_in_their_cases() -> None:
    network = shipped().network.eval()
    with torch.no_grad():
        own = network.looked(network.cases()).similarities.diagonal()
    assert float(own.min()) > 1 - 1e-5
    assert bool((network.class_head.weight > 0).all())
    assert {origin.of for origin in network.origins} == {0, 1, 2}
    assert sum(file.stat().st_size for file in path(BUNDLE).rglob("*") if file.is_file()) <= 1_500_000


@pytest.mark.parametrize("which", [0, -1])
def test_the_shipped_crops_are_training_cases(which: int) -> None:
    """Computed again from what their names say, but for how they were turned and 255 steps of grey."""
    network = shipped().network.eval()
    origin = network.origins[which]
    seed, row = map(int, re.fullmatch(r"computed in lung2, (\d+)-(\d+)", origin.uid).groups())
    known = synthesise(Backgrounds.training(), row + 1, seed)
    crop = network.cases()[which]
    turned = [
        image.flip([axis for axis in (1, 2, 3) if flips[axis - 1]])
        for image in (known.images[row], known.images[row].transpose(1, 2))
        for flips in product((False, True), repeat=3)
    ]
    assert min(float((image - crop).abs().max()) for image in turned) <= 0.5 / 255 + 1e-6
    assert CLASSES[origin.of] == CLASSES[int(known.labels[row])]
    for name, value in origin.meta.items():
        assert value == pytest.approx(float(known.attributes[row, ATTRIBUTES.index(name)]), abs=0.006)
    corner = transform(Backgrounds.training().affine, known.corners[row].numpy())
    assert origin.corner == pytest.approx(tuple(corner))


def test_the_shipped_network_is_as_good_as_its_card_says() -> None:
    """On patches of the other patient that nobody has looked at."""
    network = shipped().network.eval()
    patches = synthesise(Backgrounds.test(), 90, seed=101)
    short = replace(network.origins[0], uid="")
    whole, network.origins = network.origins, (short, *network.origins[1:])  # without what takes long
    try:
        found = prototypes.measure(network, patches)
        with torch.no_grad():
            points = network.looked(patches.images).similarities[:, None] * network.class_head.each
            assert float((network(patches.images) - points.double().sum(2)).abs().max()) <= 1e-5
        assert found["accuracy"] >= 0.9 and found["activation_precision"] >= 0.8
        weight = network.places.weight.data.clone()
        network.places.weight.data.zero_()
        even = prototypes.measure(network, patches)
        network.places.weight.data.copy_(-weight)
        astray = prototypes.measure(network, patches)
        network.places.weight.data.copy_(weight)
    finally:
        network.origins = whole
    # Masks that are the same everywhere, or look where there is nothing.
    assert even["activation_precision"] < 0.1 or np.isnan(even["activation_precision"])
    assert astray["activation_precision"] < 0.2 or np.isnan(astray["activation_precision"])
    told = metadata()
    other = metrics_of(path("Models/lung_nodule"))
    for which in ("", "borderline_"):
        assert told[f"{which}accuracy"] >= other[f"{which}accuracy"] - 0.01
        assert told[f"{which}activation_precision"] >= 0.7
    card = (path(BUNDLE) / "docs" / "README.md").read_text("utf-8")
    assert "Never use it for a patient" in card and f"{told['accuracy']:.3f}" in card
    assert all(origin.uid in card for origin in network.origins)


def test_the_real_nodule_is_explained_by_parts_of_malignant_cases() -> None:
    model, scan = shipped(), chest()
    told = mx.tell(model, scan, "prototypes", region=NODULE)
    assert told.provenance.target_label == "malignant"
    assert {case.label for case in told.cases} == {"malignant"}
    assert told.residual["sum of points"] <= 1e-5
    peak = np.unravel_index(int(told.query_map[0].argmax()), scan.shape)
    assert np.linalg.norm(scan.to_point(peak) - np.array(NODULE)) < 10
    found = telling.judge(told, model, scan)
    assert found.values["likeness"] < 0.8
