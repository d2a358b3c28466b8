"""Whether an answer depends on what a map marks, against closed forms, captum and orders that bound it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from captum.metrics import infidelity
from torch import Tensor, nn

import MedXAILib as mx
from MedXAILib.engines.masks import Masks
from MedXAILib.explainer import Question
from MedXAILib.infills.choice import infill
from MedXAILib.supervoxels import grid
from MedXAILib.trust import additivity as amounts
from MedXAILib.trust import channels, faithfulness
from MedXAILib.trust.additivity import Additivity, additivity
from MedXAILib.trust.faithfulness import NoisyImputation, curves

SHAPE = (10, 8, 6)
AFFINE = np.array([[0.0, 0.2, 1.9, 5], [0.1, 1.1, -0.2, -30], [2.5, 0.1, 0.3, 12], [0, 0, 0, 1]])


class Linear(nn.Module):
    """A score that is a sum over voxels, and another of nothing."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights)

    def forward(self, x: Tensor) -> Tensor:
        score = (x * self.weights).flatten(1).sum(1)
        return torch.stack([score, torch.zeros_like(score)], 1)


def linear() -> tuple[mx.Model, mx.Volume]:
    weights = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(1))
    x = torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(2)) + 0.5
    return mx.Model(Linear(weights), class_names=("score", "nothing")), mx.Volume(x, AFFINE)


def asked(model: mx.Model, volume: mx.Volume) -> Question:
    seen = model.prepare(volume)
    return Question(model, seen.x[None], [seen], [mx.ClassTarget(0)])


def contributions(model: mx.Model, volume: mx.Volume) -> Tensor:
    return (model.network.weights.detach() * volume.data)[0]


def test_curves_of_a_linear_network_are_sums_over_the_voxels_left():
    model, volume = linear()
    holds = contributions(model, volume)
    question = asked(model, volume)
    with model.ready(), torch.no_grad():
        found = curves(question, holds, infill(question, "zero"), steps=6)
    ordered = holds.flatten().double().sort(descending=True).values
    counts = (torch.linspace(0, 1, 7, dtype=torch.float64) ** 2 * len(ordered)).round().long()
    inserted = torch.stack([ordered[:n].sum() for n in counts]) / ordered.sum()
    assert torch.allclose(found.insertion, inserted, atol=1e-4)
    assert torch.allclose(found.deletion, 1 - inserted, atol=1e-4)
    deletion, insertion = found.areas
    assert deletion == pytest.approx(float(torch.trapezoid(1 - inserted, found.shares)), abs=1e-4)
    assert found.score == pytest.approx(insertion - deletion)


def test_perfect_and_reversed_orders_bound_every_other():
    model, volume = linear()
    holds = contributions(model, volume)
    question = asked(model, volume)
    generator = torch.Generator().manual_seed(3)
    orders = [torch.rand(SHAPE, generator=generator) for _ in range(10)]
    with model.ready(), torch.no_grad():
        zero = infill(question, "zero")
        best, worst = (curves(question, order, zero) for order in (holds, -holds))
        others = [curves(question, order, zero) for order in orders]
    for found in others:
        assert (found.insertion <= best.insertion + 1e-4).all() and (found.insertion >= worst.insertion - 1e-4).all()
        assert worst.score < found.score < best.score


def test_ties_are_broken_at_random_and_alike_every_time():
    model, volume = linear()
    question = asked(model, volume)
    with model.ready(), torch.no_grad():
        zero = infill(question, "zero")
        even, again, along = (
            curves(question, order, zero)
            for order in (torch.zeros(SHAPE), torch.zeros(SHAPE), -torch.arange(480.0).reshape(SHAPE))
        )
    assert torch.equal(even.deletion, again.deletion)
    assert not torch.allclose(even.deletion, along.deletion)


def test_an_answer_that_stays_whatever_is_replaced_has_no_curves():
    model, volume = linear()
    question = asked(model, volume)
    question.targets = [mx.ClassTarget(1)]
    with model.ready(), torch.no_grad():
        assert curves(question, torch.rand(SHAPE), infill(question, "zero")) is None


def test_road_fills_in_what_is_smooth_exactly_but_for_noise():
    ramp = torch.arange(10.0).reshape(10, 1, 1).expand(SHAPE)[None].contiguous()
    question = asked(mx.Model(Linear(torch.ones(1, *SHAPE))), mx.Volume(ramp, AFFINE))
    taken = torch.zeros(1, 1, *SHAPE)
    taken[..., 3:6, 2:5, 2:4] = 1
    filled = NoisyImputation(question).patches(Masks.everywhere(taken), [0])
    off = (filled - question.x)[taken.bool()]
    # The ramp is harmonic, so only the noise is left: a hundredth of the spread of 9.
    assert 0.03 < float(off.std()) < 0.2 and abs(float(off.mean())) < 0.1
    again = NoisyImputation(question).patches(Masks.everywhere(taken.repeat(2, 1, 1, 1, 1)), [0, 1])
    assert torch.equal(again[:1], filled) and not torch.equal(again[1:], filled)


def test_contributions_of_a_linear_network_foresee_every_loss():
    model, volume = linear()
    question = asked(model, volume)
    with model.ready(), torch.no_grad():
        zero = infill(question, "zero")
        right = additivity(question, contributions(model, volume), zero)
        scaled = additivity(question, -3 * contributions(model, volume), zero)
        chance = additivity(question, torch.rand(SHAPE, generator=torch.Generator().manual_seed(4)), zero, 400)
    assert right.sensitivity_n == pytest.approx(1, abs=1e-6) and right.infidelity == pytest.approx(0, abs=1e-8)
    # The sign counts for the correlation, and no scale for either.
    assert scaled.sensitivity_n == pytest.approx(-1, abs=1e-6) and scaled.infidelity == pytest.approx(0, abs=1e-8)
    assert abs(chance.sensitivity_n) < 0.4


def test_sensitivity_n_is_within_sets_of_one_size():
    foreseen, lost = torch.tensor([1.0, 2.0, 10.0, 20.0]), torch.tensor([1.0, 2.0, 40.0, 30.0])
    found = Additivity(foreseen, lost, torch.tensor([0.1, 0.1, 0.5, 0.5]))
    assert found.sensitivity_n == pytest.approx(0)


class Curved(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(super().forward(x) / 20) * 5


def test_infidelity_is_that_of_captum():
    _, volume = linear()
    model = mx.Model(Curved(torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(1))))
    question = asked(model, volume)
    map = torch.rand(SHAPE, generator=torch.Generator().manual_seed(5))
    with model.ready(), torch.no_grad():
        found = additivity(question, map, infill(question, "zero"), 8)
        spacing = question.seen[0].spacing
        side = min(n * step for n, step in zip(SHAPE, spacing, strict=True)) / amounts._PLACES
        places = torch.from_numpy(grid(SHAPE, spacing, side))
        # The same sets of places, found again from what the map says they hold.
        generator, sets = question.run.generator(1), []
        for share in found.shares:
            chosen = torch.zeros(int(places.max()) + 1)
            chosen[torch.randperm(len(chosen), generator=generator)[: max(1, round(float(share) * len(chosen)))]] = 1
            sets.append(chosen[places])
        taken = torch.stack(sets)[:, None]
        theirs = infidelity(
            lambda x: model.network(x)[:, 0],
            lambda x: (taken, x * (1 - taken)),
            question.x,
            map[None, None],
            n_perturb_samples=8,
            max_examples_per_batch=8,
            normalize=True,
        )
    assert found.infidelity * float(found.lost.square().mean()) == pytest.approx(float(theirs), rel=1e-4)


def test_a_map_that_marks_what_counts_gets_a_good_light_and_its_reverse_a_poor_one():
    model, volume = linear()
    model.network.weights.data.clamp_(min=0).pow_(6)
    explanation = mx.explain(model, volume, "gradient", 0, form="times_input")
    good = faithfulness.judge(mx.Judged(explanation, model, volume), ("zero", "road"))
    explanation.data.neg_()
    poor = faithfulness.judge(mx.Judged(explanation, model, volume), ("zero", "road"))
    assert (good.light, poor.light) == ("good", "poor")
    assert good.values["zero: deletion"] != pytest.approx(good.values["road: deletion"], abs=1e-3)


def test_another_network_or_scan_is_refused():
    model, volume = linear()
    explanation = mx.explain(model, volume, "gradient", 0)
    with pytest.raises(mx.MedXAIError, match="not the volume"):
        mx.Judged(explanation, model, mx.Volume(volume.data + 1, AFFINE))
    with pytest.raises(mx.MedXAIError, match="not the network"):
        mx.Judged(explanation, mx.Model(Linear(torch.ones(1, *SHAPE))), volume)


class And(nn.Module):
    """The product of two channels' means, and nothing of a third."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.flatten(2).mean(2)
        return torch.stack([mean[:, 0] * mean[:, 1], -mean[:, 0]], 1)


def test_channels_share_what_they_only_do_together():
    x = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(6))
    model, volume = mx.Model(And(), channels=3), mx.Volume(x, AFFINE)
    question = asked(model, volume)
    zero = torch.zeros_like(question.x)
    with model.ready(), torch.no_grad():
        both = channels.shapley(question, zero)
        question.targets, question.bound = [mx.ClassTarget(1)], []
        one = channels.shapley(question, zero)
    first, second, _ = x.flatten(1).mean(1).tolist()
    assert both.tolist() == pytest.approx([first * second / 2, first * second / 2, 0], abs=1e-6)
    assert one.tolist() == pytest.approx([-first, 0, 0], abs=1e-6)


def test_the_channel_that_counts_is_named_and_a_single_one_is_not():
    x = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(6)) + torch.arange(10.0).reshape(10, 1, 1)

    class Last(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x[:, 2, 0].flatten(1).sum(1), x[:, 0].flatten(1).sum(1) * 0], 1)

    model, volume = mx.Model(Last(), channels=3), mx.Volume(x, AFFINE)
    explanation = mx.explain(model, volume, "gradient", 0, per_channel=True)
    found = channels.judge(mx.Judged(explanation, model, volume))
    assert "comes from channel 2; so does most of the map" in found.sentence
    assert found.values["map in channel 2"] == pytest.approx(1) and found.values["channel 0"] == 0
    model, volume = linear()
    assert channels.judge(mx.Judged(mx.explain(model, volume, "gradient", 0), model, volume)) is None
