"""Kernel and permutation SHAP against brute force, the axioms, closed forms, captum, and their spread over seeds."""

from __future__ import annotations

import math
from itertools import combinations, permutations
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import ShapleyValues
from conftest import make_model
from test_lime import Game, curved, of_parts, parts, scan
from torch import Tensor

import MedXAILib as mx
from MedXAILib import run as run_module
from MedXAILib.engines.shapley import coalitions, kernel, student
from MedXAILib.infills import choice
from MedXAILib.infills.infill import Infill

METHODS = ["kernel_shap", "permutation_shap"]


def explain(
    method: str, count: int, rule: Any, run: mx.Run | None = None, **parameters: Any
) -> tuple[mx.SaliencyMap, Tensor]:
    """The map, and its value for each part."""
    asking = {"supervoxels": parts(count), "infill": "zero", **parameters}
    made = mx.explain(mx.Model(Game(count, rule)), scan(), method, target=0, run=run, **asking)
    return made, of_parts(count, made.data)


def every(count: int) -> Tensor:
    """All coalitions (2^count, count); the number of each in binary."""
    return ((torch.arange(2**count)[:, None] >> torch.arange(count)) & 1).float()


def brute(count: int, rule: Any) -> Tensor:
    """Shapley's formula: what a player brings to each coalition of the others, in the mean over all orders."""
    values, sizes = rule(every(count)).double(), every(count).sum(1).long()
    weight = torch.tensor([1 / (count * math.comb(count - 1, s)) for s in range(count)]).double()
    found = []
    for player in range(count):
        without = (every(count)[:, player] == 0).nonzero()[:, 0]
        brought = values[without + 2**player] - values[without]
        found.append((weight[sizes[without]] * brought).sum())
    return torch.stack(found)


def quadratic(count: int, seed: int = 2) -> tuple[Any, Tensor]:
    """A game in which players meet in pairs only: each has its own worth, and half of what its pairs have."""
    draw = torch.Generator().manual_seed(seed)
    own, pair = torch.randn(count, generator=draw), torch.randn(count, count, generator=draw).triu(1)
    return lambda present: present @ own + ((present @ pair) * present).sum(1), own + (pair + pair.T).sum(1) / 2


def test_the_formula_is_the_mean_over_orders() -> None:
    rule, total = curved(4), torch.zeros(4).double()
    for order in permutations(range(4)):
        present, before = torch.zeros(1, 4), rule(torch.zeros(1, 4))[0]
        for player in order:
            present[0, player] = 1
            total[player] += rule(present)[0] - before
            before = rule(present)[0]
    torch.testing.assert_close(brute(4, rule), total / 24, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [1, 2, 3, 7, 10, 12])
def test_of_few_parts_it_is_brute_force(method: str, count: int) -> None:
    rule = curved(count)
    made, found = explain(method, count, rule)
    torch.testing.assert_close(found, brute(count, rule).float(), rtol=1e-4, atol=1e-5)
    assert made.interval is None and made.residual["efficiency"] < 1e-9
    assert made.provenance.forwards <= 2**count + 2


@pytest.mark.parametrize("method", METHODS)
def test_the_axioms(method: str) -> None:
    """Parts 0 and 1 are alike, part 2 does nothing, and what all have adds up."""
    draw = torch.Generator().manual_seed(6)
    a, b = torch.randn(9, 8, generator=draw), torch.randn(8, generator=draw)
    a[1], a[2] = a[0], 0
    for run in (mx.Run(), mx.Run(seed=2)):
        _, found = explain(method, 9, lambda present: torch.tanh(present @ a) @ b, run)
        assert found[0] == pytest.approx(float(found[1]), abs=1e-5) and found[2] == pytest.approx(0, abs=1e-5)
        assert float(found.sum()) == pytest.approx(float(torch.tanh(a.sum(0)) @ b), abs=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [5, 12])
def test_games_with_known_values(method: str, count: int) -> None:
    # Of an or, an and and a majority, all players have as much as each other.
    for rule, change in (
        (lambda present: present.amax(1), 1.0),
        (lambda present: present.amin(1), 1.0),
        (lambda present: (present.sum(1) > count / 2).float(), 1.0),
        (lambda present: present.sum(1) % 2, float(count % 2)),
    ):
        torch.testing.assert_close(explain(method, count, rule)[1], torch.full((count,), change / count))
    # An or of two, beside one who is worth three alone.
    _, found = explain(method, count, lambda present: present[:, :2].amax(1) + 3 * present[:, 2])
    torch.testing.assert_close(found, torch.tensor([0.5, 0.5, 3.0] + [0.0] * (count - 3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_it_is_captums_exact_value(method: str) -> None:
    model, size = make_model("resnet18"), (1, 24, 24, 16)
    x = torch.randn(*size, generator=torch.Generator().manual_seed(1))
    made = mx.explain(model, x, method, target=1, supervoxels="grid", size_mm=12.0, infill="zero")
    mask = torch.zeros(size, dtype=torch.long)
    for axis in (1, 2):
        mask = mask * 2 + (torch.arange(24) >= 12).reshape([-1 if a == axis else 1 for a in range(4)])
    model.network.eval()
    with torch.no_grad():
        theirs = ShapleyValues(model.network).attribute(x[None], target=1, feature_mask=mask[None])
    torch.testing.assert_close(made.data, theirs[0], rtol=1e-3, atol=1e-5)
    assert len(made.data.unique()) == 4


@pytest.mark.parametrize("count", [13, 40])
def test_what_only_pairs_do_is_exact_in_a_single_permutation(count: int) -> None:
    rule, expected = quadratic(count)
    made, found = explain("permutation_shap", count, rule, permutations=1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    # Of many, one more is to see whether the network can be asked about them alone.
    assert made.interval is None and made.provenance.forwards == 2 * (count - 1) + 2 + (count > 16)


@pytest.mark.parametrize("count", [13, 40])
def test_what_only_pairs_do_is_exact_in_a_few_coalitions(count: int) -> None:
    rule, expected = quadratic(count)
    made, found = explain("kernel_shap", count, rule, samples=4 * count)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert made.interval is not None and made.interval.max() < 1e-3 and made.residual["efficiency"] < 1e-9


@pytest.mark.parametrize("method", METHODS)
def test_intervals_hold_the_exact_values(method: str) -> None:
    count, rule = 14, curved(14)
    truth, held, errors, widths = brute(count, rule).float(), [], [], []
    more = {"samples": 300} if method == "kernel_shap" else {"permutations": 8}
    for seed in range(40):
        made, found = explain(method, count, rule, mx.Run(seed=seed), **more)
        half = of_parts(count, made.interval)
        held.append((found - truth).abs() <= half)
        errors.append(found - truth)
        widths.append(half)
        assert made.residual["efficiency"] < 1e-9
    assert 0.92 < torch.stack(held).float().mean() < 0.985
    # No bias that the spread does not explain.
    mean, spread = torch.stack(errors).mean(0), torch.stack(errors).std(0) / 40**0.5
    assert (mean.abs() < 4 * spread).all() and float(torch.stack(errors).std()) < float(truth.std())


def test_more_permutations_and_samples_come_nearer() -> None:
    count, rule = 14, curved(14)
    truth = brute(count, rule).float()

    def error(method: str, **more: Any) -> float:
        misses = [explain(method, count, rule, mx.Run(seed=s), **more)[1] - truth for s in range(10)]
        return float(torch.stack(misses).square().mean().sqrt())

    assert error("permutation_shap", permutations=32) < 0.5 * error("permutation_shap", permutations=4)
    assert error("kernel_shap", samples=2000) < 0.5 * error("kernel_shap", samples=150)


@pytest.mark.parametrize(("players", "samples"), [(5, 4), (13, 60), (13, 400), (16, 70000), (40, 200), (300, 20)])
def test_which_coalitions_are_asked(players: int, samples: int) -> None:
    asked = coalitions(players, samples, torch.Generator().manual_seed(0))
    present, sizes = asked.present, asked.present.sum(1)
    assert sizes[:2].tolist() == [0, players] and ((sizes[2:] > 0) & (sizes[2:] < players)).all()
    assert torch.equal(present[2::2], ~present[3::2])
    assert len(present[: asked.complete].unique(dim=0)) == asked.complete
    if players <= 12 or samples >= 2**players:
        assert asked.exhaustive and len(present) == 2**players
    else:
        assert samples - 2 < len(present) <= samples and not asked.exhaustive
    # Each size that is complete weighs what Shapley's kernel says.
    for size in set(sizes[2 : asked.complete].tolist()):
        assert float(asked.weights[sizes == size].sum()) == pytest.approx(kernel(players, size))
        assert int((sizes == size).sum()) == math.comb(players, size)


@pytest.mark.parametrize("players", [30, 31])
def test_drawn_sizes_weigh_what_the_kernel_says_in_the_mean(players: int) -> None:
    asked = [coalitions(players, 40, torch.Generator().manual_seed(s)) for s in range(600)]
    assert all(a.complete == 2 for a in asked)
    drawn, weights = torch.cat([a.present[2:] for a in asked]), torch.cat([a.weights[2:] for a in asked])
    sizes = drawn.sum(1)
    torch.testing.assert_close(
        sizes.bincount(minlength=players)[1:] / len(drawn),
        torch.full((players - 1,), 1 / (players - 1)),
        rtol=0.2,
        atol=0,
    )
    weight = torch.zeros(players).double().index_add_(0, sizes, weights)[1:] / len(asked)
    expected = torch.tensor([kernel(players, s) for s in range(1, players)]).double()
    torch.testing.assert_close(weight, expected, rtol=0.2, atol=0)
    # And none of the players is preferred.
    torch.testing.assert_close(drawn.float().mean(0), torch.full((players,), 0.5), rtol=0, atol=0.015)


def test_all_of_a_size_are_all_of_them() -> None:
    asked = coalitions(6, 0, torch.Generator())
    for size in range(1, 6):
        rows = asked.present[asked.present.sum(1) == size]
        expected = {frozenset(c) for c in combinations(range(6), size)}
        assert {frozenset(row.nonzero()[:, 0].tolist()) for row in rows} == expected


@pytest.mark.parametrize(("freedom", "known"), [(1, 12.706), (4, 2.776), (11, 2.201), (19, 2.093), (120, 1.980)])
def test_students_t_is_that_of_the_tables(freedom: int, known: float) -> None:
    assert student(freedom) == pytest.approx(known, abs=0.003)


def test_it_ends_when_the_intervals_are_narrow() -> None:
    count, rule = 14, curved(14)
    run = mx.Run(memory_budget=1)
    made, _ = explain("permutation_shap", count, rule, run, permutations=500, tolerance=0.3)
    change = float((rule(torch.ones(1, count)) - rule(torch.zeros(1, count)))[0])
    assert float(made.interval.max()) <= 0.3 * abs(change) and not made.provenance.partial
    pairs = (made.provenance.forwards - 2) / (2 * (count - 1))
    assert pairs == int(pairs) and 2 < pairs < 500
    before, _ = explain("permutation_shap", count, rule, run, permutations=int(pairs) - 1)
    assert float(before.interval.max()) > 0.3 * abs(change)


@pytest.mark.parametrize("method", METHODS)
def test_it_does_not_depend_on_how_much_is_asked_at_once(method: str) -> None:
    one, found = explain(method, 15, curved(15), mx.Run(memory_budget=1))
    many, same = explain(method, 15, curved(15))
    torch.testing.assert_close(found, same)
    torch.testing.assert_close(one.interval, many.interval)
    assert not torch.equal(found, explain(method, 15, curved(15), mx.Run(seed=2))[1])


@pytest.mark.parametrize("method", METHODS)
def test_each_target_has_its_own_shares(method: str) -> None:
    asking: dict[str, Any] = {"supervoxels": parts(15), "infill": "zero"}
    one, other = mx.explain(mx.Model(Game(15, curved(15))), scan(), method, target=[0, 1], **asking)
    torch.testing.assert_close(other.data, -2 * one.data)
    torch.testing.assert_close(other.interval, 2 * one.interval)


class Drawn(Infill):
    """Noise far from what can be seen."""

    random = True

    def patches(self, masks: Any, draws: Any) -> Tensor:
        x = self.question.x
        return torch.stack([
            torch.randn(x.shape[1:], generator=self.question.run.generator(d))[
                (slice(None), *(slice(a, a + b) for a, b in zip(low, masks.box, strict=True)))
            ]
            for d, low in zip(draws, masks.low.tolist(), strict=True)
        ])  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [5, 15])
def test_a_random_infill_is_drawn_anew(method: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(choice.INFILLS, "drawn", Drawn)
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(120, 2))
    more = {"samples": 4000} if method == "kernel_shap" else {"permutations": 100}
    asking: dict[str, Any] = {"target": 1, "supervoxels": parts(count), "infill": "drawn", **more}
    made = mx.explain(mx.Model(network), scan(), method, run=mx.Run(seed=2), **asking)
    same = mx.explain(mx.Model(network), scan(), method, run=mx.Run(seed=2, memory_budget=1), **asking)
    torch.testing.assert_close(made.data, same.data, rtol=1e-4, atol=1e-4)
    # The noise is zero in the mean.
    share = (network[1].weight[1].detach() * scan().flatten()).reshape(scan().shape)
    expected = torch.stack([share[parts(count).data == i + 1].sum() for i in range(count)])
    missed = (of_parts(count, made.data) - expected).abs() / of_parts(count, made.interval)
    assert missed.max() < 2 and 0.1 < missed.mean() < 0.8
    assert float(made.interval.max()) < 0.5 * float(expected.abs().max())


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is shown, however soon."""
    monkeypatch.setattr(run_module, "_GLIMPSE_SECONDS", 0.0)
    monkeypatch.setattr(run_module, "_GLIMPSE_SHARE", float("inf"))


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("steps", [5, 13, 31, 40])
def test_a_walk_that_ends_early_gives_what_it_has(steps: int) -> None:
    count, rule, shown = 14, curved(14), []
    run = mx.Run(memory_budget=1, partial=shown.append, enough=lambda: len(game.asked) >= steps + 2)
    game = Game(count, rule)
    asking: dict[str, Any] = {"supervoxels": parts(count), "infill": "zero", "permutations": 4}
    made = mx.explain(mx.Model(game), scan(), "permutation_shap", target=0, run=run, **asking)
    found = of_parts(count, made.data)
    assert made.provenance.partial and len(made.provenance.notes) == 1 and len(game.asked) == steps + 2
    assert torch.equal(shown[-1].data, made.data)
    if steps < 13:
        # The first parts of a walk, and the last, have been put back.
        assert int((found != 0).sum()) == 2 * steps
    else:
        _, expected = explain("permutation_shap", count, rule, mx.Run(memory_budget=1), permutations=steps // 13)
        torch.testing.assert_close(found, expected)
        assert made.residual["efficiency"] < 1e-9


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("count", [8, 14])
@pytest.mark.parametrize("asked", [1, 2, 9, 40, 150])
def test_a_regression_that_ends_early_adds_up(count: int, asked: int) -> None:
    shown: list[Any] = []
    run = mx.Run(memory_budget=1, partial=shown.append, enough=lambda: len(shown) >= asked)
    made, found = explain("kernel_shap", count, curved(count), run, samples=300)
    assert made.provenance.partial and torch.equal(shown[-1].data, made.data)
    change = curved(count)(torch.tensor([[0.0] * count, [1.0] * count])).diff()[0]
    assert float(found.sum()) == pytest.approx(float(change) if asked > 1 else 0, abs=1e-5)


def test_both_say_the_same_of_a_network_of_monai() -> None:
    model, x = make_model("resnet18"), torch.randn(1, 24, 24, 16, generator=torch.Generator().manual_seed(1))
    asking: dict[str, Any] = {"target": 1, "supervoxels": "grid", "size_mm": 8.0}
    regressed = mx.explain(model, x, "kernel_shap", samples=500, **asking)
    walked = mx.explain(model, x, "permutation_shap", permutations=12, **asking)
    assert len(walked.data.unique()) == 18
    assert ((regressed.data - walked.data).abs() <= 2 * (regressed.interval + walked.interval)).all()
    assert float(np.corrcoef(regressed.data.flatten(), walked.data.flatten())[0, 1]) > 0.85
