"""Patches that share more are nearer: the losses ask for just that, and the network that learnt by them finds it."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from MedXAILib.cases.spaces import Plain
from MedXAILib.model import Model
from MedXAILib.networks.lung_nodule import LungNoduleClassifier
from MedXAILib.networks.triplet import TripletEmbedding
from MedXAILib.training.triplet_loss import batch_hard, by_cue, distances, hierarchical, leading, violations

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


def test_a_batch_without_triplets_asks_for_nothing() -> None:
    embeddings = unit(4).requires_grad_()
    same, other = next(by_cue(torch.zeros(4, 1), [0.0]))
    value = batch_hard(embeddings, same, other)
    value.backward()
    assert float(value.detach()) == 0 and embeddings.grad is not None and not embeddings.grad.any()


def test_cases_that_are_the_same_have_a_gradient() -> None:
    embeddings = on_circle(0, 0, 0, 10).requires_grad_()
    same, other = next(by_cue(torch.tensor([[0.0], [0.0], [1.0], [1.0]]), [0.0]))
    batch_hard(embeddings, same, other).backward()
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
    assert float(hierarchical(embeddings, table, WITHIN, MARGIN)) == pytest.approx(np.mean(levels), abs=1e-5)


def test_the_hierarchical_loss_is_zero_just_when_who_shares_more_is_nearer() -> None:
    """Class, then size: on a circle, by hand."""
    table = torch.tensor([[0.0, 10.0], [0.0, 11.0], [0.0, 20.0], [1.0, 10.0]])
    ordered = on_circle(0, 10, 50, 120)
    assert float(hierarchical(ordered, table, [0.0, 3.0], MARGIN)) == 0
    # The same class of another size is nearer than the same size, and then another class than the same.
    assert float(hierarchical(on_circle(0, 50, 10, 120), table, [0.0, 3.0], MARGIN)) > 0
    assert float(hierarchical(on_circle(0, 10, 120, 50), table, [0.0, 3.0], MARGIN)) > 0
    # The first alone cannot tell: all of its class are nearer than the other.
    same, other = next(by_cue(table, [0.0, 3.0]))
    assert float(batch_hard(on_circle(0, 50, 10, 120), same, other, MARGIN)) == 0
    # The margin, too: 10 and 50 degrees are 0.67 apart in distance, 120 and 50 are 0.89, seen from the first.
    assert float(hierarchical(ordered, table, [0.0, 3.0], chord(120) - chord(50) + 0.01)) > 0


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
    made.standard.running_mean.normal_()
    made.standard.running_var.uniform_(0.5, 2.0)
    return made


def test_the_embedding_is_a_layer_on_what_the_classifier_pools() -> None:
    made, image = network(), torch.rand(2, 1, 24, 32, 40)
    classifier = LungNoduleClassifier(width=4).eval()
    classifier.load_state_dict(made.state_dict(), strict=False)
    with torch.no_grad():
        pooled = classifier.features(image)
        standard = (pooled - made.standard.running_mean) / (made.standard.running_var + 1e-5).sqrt()
        expected = standard @ made.head.weight.T + made.head.bias
        torch.testing.assert_close(made(image), expected / expected.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("image", [torch.rand(2, 1, 24, 32, 40), torch.zeros(1, 1, 24, 24, 24)], ids=["any", "ties"])
def test_contributions_sum_to_the_embedding(image: Tensor) -> None:
    made = network()
    with torch.no_grad():
        parts = made.contributions(image)
        assert parts.shape == (len(image), 8, *(size // 4 for size in image.shape[2:]))
        whole = parts.sum((2, 3, 4))
        torch.testing.assert_close(F.normalize(whole), made(image), atol=1e-5, rtol=0)
        # Not only the direction.
        seen = made.seen(image)
        pooled = torch.cat([seen.mean((2, 3, 4)), seen.amax((2, 3, 4))], dim=1)
        torch.testing.assert_close(whole, made.head(made.standard(pooled)), atol=1e-5, rtol=0)


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
