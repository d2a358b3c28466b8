"""Patches that share more are nearer: the losses ask for just that, and the network that learnt by them finds it."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
import torch.nn.functional as F
from model_cards import metrics_of
from monai.bundle import verify_net_in_out
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score, ndcg_score
from torch import Tensor, nn

import MedXAILib as mx
from MedXAILib import resources
from MedXAILib.cases.spaces import Plain
from MedXAILib.errors import MedXAIError
from MedXAILib.model import Model
from MedXAILib.networks.lung_nodule import LungNoduleClassifier
from MedXAILib.networks.triplet import TripletEmbedding
from MedXAILib.synthetic.lung_nodules import Backgrounds
from MedXAILib.training import RECIPES, train, triplet
from MedXAILib.training.bundle import Grid
from MedXAILib.training.table import UNKNOWN, Patches, read_table
from MedXAILib.training.trainer import fit
from MedXAILib.training.triplet_loss import batch_all, batch_hard, by_cue, distances, hierarchical, leading, violations

MARGIN = 0.2


def unit(count: int, size: int = 5, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(count, size, generator=torch.Generator().manual_seed(seed)))


def on_circle(*degrees: float) -> Tensor:
    angles = torch.deg2rad(torch.tensor(degrees))
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def chord(degrees: float) -> float:
    """The distance of two points on a circle of radius 1, as school has it."""
    return 2 * math.sin(math.radians(degrees) / 2)


def shared(one: list[float], other: list[float], within: list[float]) -> int | None:
    """How many leading cues two cases share; None where an unknown one decides."""
    for i, (a, b, most) in enumerate(zip(one, other, within, strict=True)):
        if math.isnan(a) or math.isnan(b):
            return None
        if abs(a - b) > most:
            return i
    return len(one)


def cues(count: int, seed: int, unknown: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    classes, sizes = torch.randint(3, (count,), generator=generator), 20 * torch.rand(count, generator=generator)
    sides = torch.randint(2, (count,), generator=generator)
    table = torch.stack([classes.float(), sizes, sides.float()], dim=1)
    if unknown:
        table[torch.rand(table.shape, generator=generator) < 0.15] = math.nan
    return table


WITHIN = [0.0, 4.0, 0.0]


# The losses


@pytest.mark.parametrize("seed", range(5))
def test_batch_hard_is_the_worst_triplet_of_each_anchor(seed: int) -> None:
    """Among all O(n^3) triplets, each valued by PyTorch's own triplet loss."""
    embeddings, table = unit(14, seed=seed), cues(14, seed, unknown=True)
    for column, within, (same, other) in zip(table.T.tolist(), WITHIN, by_cue(table, WITHIN), strict=True):
        worst: dict[int, float] = {}
        for a, p, n in product(range(14), repeat=3):
            if a in (p, n) or not abs(column[a] - column[p]) <= within or not abs(column[a] - column[n]) > within:
                continue
            one = [embeddings[i : i + 1] for i in (a, p, n)]
            value = float(F.triplet_margin_loss(*one, margin=MARGIN, eps=0))
            worst[a] = max(value, worst.get(a, 0.0))
        assert worst
        assert float(batch_hard(embeddings, same, other, MARGIN)) == pytest.approx(np.mean([*worst.values()]), abs=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_batch_all_is_the_mean_of_the_triplets_that_ask_for_something(seed: int) -> None:
    embeddings, table = unit(10, seed=seed), cues(10, seed, unknown=True)
    for column, within, (same, other) in zip(table.T.tolist(), WITHIN, by_cue(table, WITHIN), strict=True):
        values = []
        for a, p, n in product(range(10), repeat=3):
            if a not in (p, n) and abs(column[a] - column[p]) <= within and abs(column[a] - column[n]) > within:
                one = [embeddings[i : i + 1] for i in (a, p, n)]
                values.append(float(F.triplet_margin_loss(*one, margin=MARGIN, eps=0)))
        expected = np.mean([value for value in values if value > 0])
        assert 0 in values and float(batch_all(embeddings, same, other, MARGIN)) == pytest.approx(expected, abs=1e-5)


def test_batch_hard_by_hand() -> None:
    """Two of a kind 20 degrees apart, and another 60 degrees from the nearer."""
    embeddings, labels = on_circle(0, 20, 80), torch.tensor([[0.0], [0.0], [1.0]])
    ((same, other),) = by_cue(labels, [0.0])
    assert float(batch_hard(embeddings, same, other, MARGIN)) == 0
    wide = chord(60) - chord(20) + 0.1
    # The third has none of its kind: it is no anchor.
    asked = [chord(20) - chord(80) + wide, chord(20) - chord(60) + wide]
    expected = sum(max(value, 0) for value in asked) / 2
    assert expected > 0
    assert float(batch_hard(embeddings, same, other, wide)) == pytest.approx(expected, abs=1e-6)


def test_who_has_nobody_to_be_nearer_than_is_no_anchor() -> None:
    embeddings = on_circle(0, 20, 80)
    same = torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 0]]).bool()
    other = torch.tensor([[0, 0, 1], [0, 0, 0], [0, 0, 0]]).bool()
    wide = chord(80)
    assert float(batch_hard(embeddings, same, other, wide)) == pytest.approx(chord(20), abs=1e-6)


def test_a_batch_without_triplets_asks_for_nothing() -> None:
    embeddings = unit(4).requires_grad_()
    same, other = next(by_cue(torch.zeros(4, 1), [0.0]))
    for triplets in (batch_hard, batch_all):
        value = triplets(embeddings, same, other)
        value.backward()
        assert float(value.detach()) == 0 and embeddings.grad is not None and not embeddings.grad.any()


def test_cases_that_are_the_same_have_a_gradient() -> None:
    embeddings = on_circle(0, 0, 0, 10).requires_grad_()
    same, other = next(by_cue(torch.tensor([[0.0], [0.0], [1.0], [1.0]]), [0.0]))
    for triplets in (batch_hard, batch_all):
        embeddings.grad = None
        triplets(embeddings, same, other).backward()
        assert embeddings.grad is not None and embeddings.grad.isfinite().all() and embeddings.grad.any()


@pytest.mark.parametrize("seed", range(5))
def test_the_hierarchical_loss_is_that_of_all_triplets_of_all_levels(seed: int) -> None:
    embeddings, table = unit(14, seed=seed), cues(14, seed, unknown=True)
    rows, apart = table.tolist(), torch.cdist(embeddings, embeddings).tolist()
    levels = []
    for level in (1, 2, 3):
        worst: dict[int, float] = {}
        for a, i, j in product(range(14), repeat=3):
            if a in (i, j):
                continue
            # What an unknown third cue leaves open does not matter as long as two are asked for.
            near, far = (shared(rows[a][:level], rows[k][:level], WITHIN[:level]) for k in (i, j))
            if near == level and far is not None and far < level:
                worst[a] = max(0.0, apart[a][i] - apart[a][j] + MARGIN, worst.get(a, 0.0))
        levels.append(np.mean([*worst.values()]) if worst else 0.0)
    assert float(hierarchical(embeddings, table, WITHIN, batch_hard, MARGIN)) == pytest.approx(
        np.mean(levels), abs=1e-5
    )


def test_the_hierarchical_loss_is_zero_just_when_who_shares_more_is_nearer() -> None:
    """Class, then size: on a circle, by hand."""
    table = torch.tensor([[0.0, 10.0], [0.0, 11.0], [0.0, 20.0], [1.0, 10.0]])
    ordered = on_circle(0, 10, 50, 120)
    assert float(hierarchical(ordered, table, [0.0, 3.0], batch_hard, MARGIN)) == 0
    # The same class of another size is nearer than the same size, and then another class than the same.
    assert float(hierarchical(on_circle(0, 50, 10, 120), table, [0.0, 3.0], batch_hard, MARGIN)) > 0
    assert float(hierarchical(on_circle(0, 10, 120, 50), table, [0.0, 3.0], batch_hard, MARGIN)) > 0
    # The first alone cannot tell: all of its class are nearer than the other.
    same, other = next(by_cue(table, [0.0, 3.0]))
    assert float(batch_hard(on_circle(0, 50, 10, 120), same, other, MARGIN)) == 0
    # The margin, too: 10 and 50 degrees are 0.67 apart in distance, 120 and 50 are 0.89, seen from the first.
    assert float(hierarchical(ordered, table, [0.0, 3.0], batch_hard, chord(120) - chord(50) + 0.01)) > 0


def test_an_unknown_cue_decides_nothing() -> None:
    table = torch.tensor([[0.0, math.nan, 1.0], [0.0, 5.0, 1.0], [1.0, 5.0, 1.0]])
    found = [(same.tolist(), other.tolist()) for same, other in leading(table, WITHIN)]
    assert found[0][0][0] == [False, True, False] and found[0][1][0] == [False, False, True]
    # The class still tells the third from the first; the size tells nothing of the first and the second.
    for same, other in found[1:]:
        assert same[0] == [False, False, False] and other[0] == [False, False, True]


def test_violations_are_counted_over_all_triplets() -> None:
    embeddings, table = unit(12, seed=3), cues(12, 3)
    rows, apart = table.tolist(), torch.cdist(embeddings, embeddings).tolist()
    for level, (same, other) in enumerate(leading(table, WITHIN), 1):
        wrong = []
        for a, i, j in product(range(12), repeat=3):
            if a not in (i, j) and shared(rows[a], rows[i], WITHIN) >= level > shared(rows[a], rows[j], WITHIN):
                wrong.append(apart[a][i] >= apart[a][j])
        assert 0 < np.mean(wrong) < 1
        assert violations(distances(embeddings), same, other) == pytest.approx(np.mean(wrong))
    nobody = torch.zeros(12, 12, dtype=torch.bool)
    assert math.isnan(violations(distances(embeddings), nobody, nobody))


# The network


def network(seed: int = 0) -> TripletEmbedding:
    torch.manual_seed(seed)
    made = TripletEmbedding((5, 3), width=4).eval()
    made.head.bias.data.normal_()
    return made


def test_the_embedding_is_a_layer_on_what_the_classifier_pools() -> None:
    made, image = network(), torch.rand(2, 1, 24, 32, 40)
    classifier = LungNoduleClassifier(width=4).eval()
    classifier.load_state_dict(made.state_dict(), strict=False)
    with torch.no_grad():
        pooled = classifier.features(image)
        expected = pooled @ made.head.weight.T + made.head.bias
        torch.testing.assert_close(made(image), expected / expected.norm(dim=1, keepdim=True))


def test_contributions_sum_to_the_embedding() -> None:
    made, image = network(), torch.rand(2, 1, 24, 32, 40)
    with torch.no_grad():
        parts = made.contributions(image)
        assert parts.shape == (2, 8, 6, 8, 10)
        whole = parts.sum((2, 3, 4))
        torch.testing.assert_close(F.normalize(whole), made(image), atol=1e-5, rtol=0)
        # Not only the direction.
        seen = made.seen(image)
        pooled = torch.cat([seen.mean((2, 3, 4)), seen.amax((2, 3, 4))], dim=1)
        torch.testing.assert_close(whole, made.head(pooled), atol=1e-5, rtol=0)


def test_places_that_are_equally_high_share_the_maximum(monkeypatch: pytest.MonkeyPatch) -> None:
    made, seen = network(), torch.zeros(1, 16, 2, 2, 2)
    seen[..., 0] = 3.0
    monkeypatch.setattr(made, "seen", lambda image: seen)
    with torch.no_grad():
        parts = made.contributions(torch.zeros(1))
        torch.testing.assert_close(F.normalize(parts.sum((2, 3, 4))), made(torch.zeros(1)), atol=1e-5, rtol=0)
    assert (parts[..., 0] == parts[:, :, :1, :1, 0]).all() and not torch.equal(parts[..., 0], parts[..., 1])


def test_a_similarity_is_a_sum_over_places_of_the_scan() -> None:
    """As the case library takes it: in places whose middles are where the network looks."""
    made, image = network(), torch.rand(2, 1, 24, 32, 40)
    places = Plain().places(Model(made, task="embedding"), image)
    with torch.no_grad():
        one, other = made(image)
    sums = places.alike(other[None]).flatten(1).sum(1)
    torch.testing.assert_close(sums.float(), torch.stack([one @ other, other @ other]), atol=1e-5, rtol=0)
    bright = torch.zeros(1, 1, 40, 40, 40)
    bright[..., 28:32, 12:16, 20:24] = 1.0
    with torch.no_grad():
        shown = Plain().places(Model(made, task="embedding"), bright)
    weight = shown.placed(shown.values.abs().sum(1) - shown.values.abs().sum(1).amin())[0, 0]
    axes = torch.stack(torch.meshgrid(*[torch.arange(40.0)] * 3, indexing="ij"))
    middle = (axes * weight).flatten(1).sum(1) / weight.sum()
    torch.testing.assert_close(middle.float(), torch.tensor([29.5, 13.5, 21.5]), atol=2.0, rtol=0)


def test_the_search_goes_from_the_leading_cue_to_the_whole() -> None:
    """The nearest as a whole is the last by the leading cue: it is found only when all are compared."""
    made = TripletEmbedding((2, 2))
    query = torch.cat([on_circle(0), 3 * on_circle(0)], dim=1)
    cases = torch.cat([on_circle(60, 10, 20), 3 * on_circle(0, 90, 80)], dim=1)
    query, cases = F.normalize(query), F.normalize(cases)
    whole = query @ cases.T
    assert int(whole.argmax()) == 0
    torch.testing.assert_close(made.coarse_to_fine(query, cases), whole)
    first = made.coarse_to_fine(query, cases, first=2)
    assert first[0, 0] == -math.inf
    torch.testing.assert_close(first[0, 1:], whole[0, 1:])
    assert int(made.coarse_to_fine(query, cases, first=1).argmax()) == 1
    blocks = made.split(torch.cat([query, cases]))
    torch.testing.assert_close(blocks[0], on_circle(0, 60, 10, 20))
    torch.testing.assert_close(blocks[1], on_circle(0, 0, 90, 80))


# The recipe


class Told(nn.Module):
    """Says the same embeddings whatever it is shown, and searches them as the network does."""

    def __init__(self, embeddings: Tensor) -> None:
        super().__init__()
        self.head, self.embeddings = nn.Linear(1, 1), embeddings

    def forward(self, images: Tensor) -> Tensor:
        return self.embeddings[images[:, 0, 0, 0, 0].long()]

    def coarse_to_fine(self, queries: Tensor, cases: Tensor) -> Tensor:
        return TripletEmbedding((2, queries.shape[1] - 2), width=1).coarse_to_fine(queries, cases, first=12)


def patches(table: Tensor) -> Patches:
    """Nothing but numbered images that have these cues (N, C)."""
    images = torch.arange(len(table)).float()[:, None, None, None, None]
    labels = table[:, 0].nan_to_num(UNKNOWN).long()
    return Patches(images, labels, table[:, 1:], None, ())


def test_what_is_measured_agrees_with_scikit_learn() -> None:
    """60 patches, more than are embedded at once, some with unknown sizes and none known of one class."""
    embeddings, table = unit(60, seed=8), cues(60, 8)
    table[table[:, 0] == 0, 1:] = math.nan
    table[5, 0] = math.nan
    found = triplet.measure(Told(embeddings), patches(table), {"class": 0.0, "size": 4.0, "side": 0.0})  # type: ignore[arg-type]
    rows, similarity = table.tolist(), (embeddings @ embeddings.T).numpy()
    first, precise, mean, gain, graded, fine = [], [], [], [], [], []
    for a in range(60):
        others = [k for k in range(60) if k != a]
        alike = np.array([table[k, 0] == table[a, 0] for k in others])
        score = similarity[a, others]
        if not alike.any():
            continue
        best = np.argsort(-score)
        first.append(alike[best[0]])
        precise.append(alike[best[:10]].mean())
        mean.append(average_precision_score(alike, score))
        gain.append(ndcg_score([alike], [score], k=10))
        # As many as are shared before one that is not, or is unknown.
        grades = [next((i for i in range(3) if not abs(rows[a][i] - rows[k][i]) <= WITHIN[i]), 3) for k in others]
        graded.append(ndcg_score([grades], [score], k=10))
        kept = (F.normalize(embeddings[:, :2]) @ F.normalize(embeddings[a, :2], dim=0)).topk(12).indices.tolist()
        fine.append(ndcg_score([alike], [np.where(np.isin(others, kept), score, -9)], k=10))
    assert len(first) == 59
    expected = {
        "precision_1": first, "precision_10": precise, "map": mean, "ndcg": gain, "graded_ndcg": graded,
        "coarse_ndcg": fine,
    }  # fmt: skip
    for name, values in expected.items():
        assert found[name] == pytest.approx(np.mean(values), abs=1e-6), name
    spread = 1.96 * np.std(gain) / math.sqrt(len(gain))
    assert found["ndcg_low"] == pytest.approx(found["ndcg"] - spread, abs=spread / 4)
    assert found["ndcg_high"] == pytest.approx(found["ndcg"] + spread, abs=spread / 4)
    known = table[:, 1].isfinite().numpy()
    sizes, alone = table[known, 1].numpy(), similarity[known][:, known] - 9 * np.eye(known.sum())
    means = [sizes[np.argsort(-row)[:10]].mean() for row in alone]
    assert found["size_rank"] == pytest.approx(spearmanr(sizes, means).statistic)
    levels = dict(zip(("class", "size", "side"), leading(table, WITHIN), strict=True))
    for name, level in levels.items():
        assert found[f"{name}_violations"] == pytest.approx(violations(torch.cdist(embeddings, embeddings), *level))


def test_the_whole_learns_the_order_and_each_block_its_own_cue() -> None:
    made, table = TripletEmbedding((2, 3, 2), width=2).eval(), cues(12, 4, unknown=True)
    images = torch.rand(12, 1, 24, 24, 24, generator=torch.Generator().manual_seed(4))
    within = dict(zip(("class", "size", "side"), WITHIN, strict=True))
    shown = replace(patches(table), images=images)
    for triplets in (batch_hard, batch_all):
        with torch.no_grad():
            whole, value = made(images), float(triplet.loss(made, shown, within, triplets))
        parts = [F.normalize(part) for part in (whole[:, :2], whole[:, 2:5], whole[:, 5:])]
        own = [float(triplets(part, *level)) for part, level in zip(parts, by_cue(table, WITHIN), strict=True)]
        assert min(own) > 0
        assert value == pytest.approx(float(hierarchical(whole, table, WITHIN, triplets)) + sum(own) / 2, abs=1e-5)


def test_the_layers_below_the_embedding_stay_as_they_are() -> None:
    made, table = triplet.build().train(), cues(8, 4)[:, [0, 1, 2, 2, 2, 1]]
    before = {name: value.clone() for name, value in made.state_dict().items()}
    shown = replace(patches(table), images=torch.rand(8, 1, 24, 24, 24, generator=torch.Generator().manual_seed(4)))
    optimiser = torch.optim.SGD(made.parameters(), 0.1)
    value = triplet.loss_above(made, shown)
    value.backward()
    optimiser.step()
    changed = {name for name, kept in before.items() if not torch.equal(kept, made.state_dict()[name])}
    assert changed == {"head.weight", "head.bias"}
    shipped = torch.load(resources.path("Models/lung_nodule/models/model.pt"), "cpu", weights_only=True)
    assert all(torch.equal(kept, shipped[name]) for name, kept in before.items() if "head" not in name)
    made.load_state_dict(before)
    assert float(value.detach()) == pytest.approx(float(triplet.loss(made, shown, triplets=batch_all).detach()))


def test_what_the_cases_do_not_show_is_not_measured() -> None:
    """One of each class: none finds its like. Of one class: none can be out of order."""
    one_each = triplet.measure(Told(unit(3)), patches(torch.tensor([[0.0], [1.0], [2.0]])), {"class": 0.0})  # type: ignore[arg-type]
    assert one_each == {}
    alike = triplet.measure(Told(unit(13)), patches(torch.zeros(13, 1)), {"class": 0.0})  # type: ignore[arg-type]
    assert alike["precision_10"] == alike["map"] == alike["ndcg"] == 1 and "class_violations" not in alike
    # The mean of ten of a few others says where a case is not.
    sized = torch.stack([torch.zeros(21), torch.arange(21.0)], dim=1)
    for count, there in ((20, False), (21, True)):
        told = Told(unit(count))
        found = triplet.measure(told, patches(sized[:count]), {"class": 0.0, "size": 1.0})  # type: ignore[arg-type]
        assert ("size_rank" in found) == there


def test_the_wall_is_what_is_dense_and_thicker_than_a_vessel() -> None:
    images, masks = torch.full((4, 1, 40, 40, 40), 0.1), torch.zeros(4, 1, 40, 40, 40, dtype=torch.bool)
    images[:3, :, :, 30:] = 0.8  # A wall of 10 voxels.
    images[:, :, 10:13, :, 10:13] = 0.8  # A vessel.
    images[1:3, :, 16:28, 16:28, 16:28] = 0.8  # A nodule,
    masks[1, :, 16:28, 16:28, 16:28] = True  # which is known.
    centres = torch.tensor([[20.0, 24.0, 20.0], [20.0, 22.0, 20.0], [20.0, 22.0, 20.0], [20.0, 20.0, 20.0]])
    assert triplet.wall_mm(images, masks, centres).tolist() == [7.5, 10.0, 0.0, 25.0]
    images[0, :, :, :25] = 0.8
    assert triplet.wall_mm(images[:1], masks[:1], centres[:1]).tolist() == [0.0]


def test_attributes_are_alike_within_half_their_spread_and_findings_when_they_are_the_same() -> None:
    known = torch.tensor([[0.0, 4.0, 1.0], [1.0, 8.0, math.nan], [math.nan, math.nan, 1.0], [1.0, 12.0, 1.0]])
    assert triplet.tolerances_of(known) == [0.0, pytest.approx(2.0), 0.0]


def turned_all_ways(image: Tensor) -> list[Tensor]:
    """An image (1, D, H, W) mirrored and with its first two axes swapped, by NumPy: 16 ways."""
    axes = [axes for count in range(4) for axes in combinations((0, 1, 2), count)]
    both = (image[0].numpy(), image[0].numpy().swapaxes(0, 1))
    return [torch.from_numpy(np.flip(one, flipped).copy())[None] for one in both for flipped in axes]


def test_batches_are_of_a_fixed_set_turned_this_way_and_that(monkeypatch: pytest.MonkeyPatch) -> None:
    def cued(backgrounds: None, count: int, seed: int) -> Patches:
        images = torch.rand(count, 1, 4, 4, 4, generator=torch.Generator().manual_seed(seed))
        return Patches(images, 100 * seed + torch.arange(count), images.amax((2, 3, 4)), None, ())

    for name, value in (("cued", cued), ("_PARTS", 2), ("_PART", 3), ("_NOISE", 0.0)):
        monkeypatch.setattr(triplet, name, value)
    triplet._part.cache_clear()
    fixed = [cued(None, 3, triplet._SEED + which) for which in (0, 1)]
    known = {int(label): image for part in fixed for label, image in zip(part.labels, part.images, strict=True)}
    turns = set()
    for seed in range(40):
        batch, again = (triplet.repeated(None, 5, seed) for _ in range(2))  # type: ignore[arg-type]
        assert torch.equal(batch.images, again.images) and len(set(batch.labels.tolist())) == 5
        for one, label, attributes in zip(batch.images, batch.labels, batch.attributes, strict=True):
            image = known[int(label)]
            assert float(attributes) == float(image.max())
            found = {k for k, other in enumerate(turned_all_ways(image)) if torch.equal(other, one)}
            assert len(found) == 1
            turns |= found
    assert len(turns) == 16
    triplet._part.cache_clear()


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 scans of as many patients: a ball, small or large, dark or bright."""
    folder, generator = tmp_path_factory.mktemp("own"), torch.Generator().manual_seed(0)
    axes = torch.stack(torch.meshgrid(*[torch.arange(24.0) - 11.5] * 3, indexing="ij"))
    lines = ["volume,label,radius_mm,split"]
    for i in range(48):
        radius, *offset = (4.0 + 5 * torch.rand((), generator=generator), *(torch.rand(3, generator=generator) * 4 - 2))
        ball = (axes - torch.tensor(offset)[:, None, None, None]).norm(dim=0) < radius
        voxels = 0.1 + ball * (0.5, 0.7)[i % 2] + 0.1 * torch.randn(ball.shape, generator=generator)
        sitk.WriteImage(sitk.GetImageFromArray(voxels.numpy()), str(folder / f"{i}.nrrd"))
        split = ("train", "train", "validation", "test")[i // 2 % 4]
        lines.append(f"{i}.nrrd,{('dark', 'bright')[i % 2]},{radius:.2f},{split}")
    (folder / "cases.csv").write_text("\n".join(lines), encoding="utf-8")
    return folder / "cases.csv"


def test_a_persons_own_cases_are_learnt_in_seconds(own: Path, tmp_path: Path) -> None:
    """The brightness by its name, and the size among those of the same brightness, of patients it never saw."""
    table = read_table(own, Grid(24, 1.0, (0.0, 1.0)))
    mine = RECIPES["lung-nodule-triplet"].own(RECIPES["lung-nodule-triplet"], table)  # type: ignore[misc]
    mine = replace(mine, epochs=3, steps=20, batch=24)
    data = table.read(mx.Run())
    torch.manual_seed(0)
    before = mine.measure(mine.network().eval(), data["test"])
    after = mine.measure(fit(mine, data["train"], tmp_path / "c.pt", mx.Run(), data["validation"]), data["test"])
    assert before["map"] < 0.8 and before["label_violations"] > 0.25
    assert after["map"] > 0.88 and after["label_violations"] < 0.15 and after["radius_mm_violations"] < 0.05
    assert after["precision_1"] == 1


def test_the_bundle_of_a_person_says_what_is_alike(own: Path, tmp_path: Path) -> None:
    table = read_table(own, Grid(24, 1.0, (0.0, 1.0)))
    metrics = train("lung-nodule-triplet", tmp_path / "mine", mx.Run(), quick=True, data=table)
    model = mx.load_model(tmp_path / "mine")  # Without trust.
    assert model.task == "embedding" and model.patch_size == (24, 24, 24)
    assert model.class_names[0] == "label 0" and model.class_names[-1] == "radius_mm 7"
    patches = table.read(mx.Run())["test"]
    with model.ready(), torch.no_grad():
        embeddings = model.forward(patches.images)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(12))
    nearest = (embeddings @ embeddings.T).fill_diagonal_(-9).argmax(1)
    right = (patches.labels[nearest] == patches.labels).float().mean()
    assert metrics["precision_1"] == pytest.approx(float(right), abs=1e-4)
    card = (tmp_path / "mine" / "docs" / "README.md").read_text("utf-8")
    known = [line.split(",") for line in own.read_text("utf-8").splitlines()]
    half = np.std([float(radius) for *_, radius, split in known if split == "train"], ddof=1) / 2
    assert f"**label**, then **radius_mm** (within {half:.3g})" in card and "chest_ct" not in card
    assert "Output: an embedding of length 1" in card and "logits" not in card


def test_every_row_needs_a_label(own: Path, tmp_path: Path) -> None:
    wrong = own.with_name("wrong.csv")
    wrong.write_text(own.read_text("utf-8").replace("dark", "", 1), encoding="utf-8")
    with pytest.raises(MedXAIError, match=r"Row 2 .*'label': it is empty"):
        train("lung-nodule-triplet", tmp_path / "out", mx.Run(), data=read_table(wrong, Grid(24, 1.0, (0.0, 1.0))))


# The network that ships

BUNDLE = "Models/lung_nodule_triplet"


def test_the_bundle_is_what_monai_expects_and_its_card_says_what_was_measured() -> None:
    folder = resources.path(BUNDLE)
    files = {"meta_file": str(folder / "configs/metadata.json"), "config_file": str(folder / "configs/inference.json")}
    verify_net_in_out("network_def", **files, device="cpu")
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 1_500_000
    measured = metrics_of(folder)
    card = (folder / "docs/README.md").read_text("utf-8")
    for name in ("ndcg", "map", "graded_ndcg", "diameter_mm_rank", "wall_mm_rank", "borderline_graded_ndcg"):
        assert f"{measured[name]:.3f}" in card
    assert "rule, not pathology" in card and "Never use it for a patient" in card


def test_it_finds_what_is_alike_in_the_other_patient_and_the_classifier_less() -> None:
    """150 patches that no number of the card is of."""
    shown = triplet.cued(Backgrounds.test(), 150, 104)
    model = mx.load_model(resources.path(BUNDLE))  # Without trust.
    assert model.task == "embedding" and model.class_names[24] == "diameter_mm 0"
    embeddings = Plain().embed(model, shown.images)
    with torch.no_grad():
        torch.testing.assert_close(F.normalize(embeddings), model.network.eval()(shown.images), atol=1e-5, rtol=0)
    plain = Plain().embed(mx.load_model(resources.path("Models/lung_nodule")), shown.images)
    ours, theirs = (triplet.measure(Told(F.normalize(each)), numbered(shown)) for each in (embeddings, plain))  # type: ignore[arg-type]
    assert ours["ndcg"] > 0.88 and ours["diameter_mm_rank"] > 0.92
    assert ours["graded_ndcg"] > theirs["graded_ndcg"] + 0.02
    for name in ("diameter_mm", "spiculated", "part_solid", "calcified", "wall_mm"):
        assert ours[f"{name}_violations"] < theirs[f"{name}_violations"] - 0.01
    blocks = model.network.split(embeddings)
    own = [triplet.measure(Told(block), numbered(shown)) for block in blocks]  # type: ignore[arg-type]
    assert own[0]["map"] > theirs["map"] + 0.01
    assert own[5]["wall_mm_rank"] > 0.3 > theirs["wall_mm_rank"]


def numbered(shown: Patches) -> Patches:
    return replace(shown, images=torch.arange(len(shown)).float()[:, None, None, None, None])
