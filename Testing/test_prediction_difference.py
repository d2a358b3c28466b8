"""Prediction difference analysis against closed forms, loops and occlusion."""

from __future__ import annotations

import itertools
from math import log2

import numpy as np
import pytest
import torch
from conftest import make_model, oblique_affine
from gaussian_fields import conditional, noise, smooth
from torch import Tensor, nn

import MedXAILib as mx
from MedXAILib import registry
from MedXAILib.engines.parts import window_parts
from MedXAILib.explainer import Question
from MedXAILib.infills.conditional_gaussian import ConditionalGaussian
from MedXAILib.supervoxels import slic
from MedXAILib.visual.log_odds import log_odds
from MedXAILib.visual.prediction_difference import PredictionDifference, _Drawn, _mean

SIZE = (5, 6, 4)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.EXPLAINERS, "prediction_difference", PredictionDifference)


class Logistic(nn.Module):
    """The scores of two classes, of which the second leads by a weighted sum of the voxels."""

    def __init__(self, size: tuple[int, ...] = SIZE, gain: float = 0.5) -> None:
        super().__init__()
        self.register_buffer("weight", gain * noise(1, *size, seed=7))

    def lead(self, x: Tensor) -> Tensor:
        return (x * self.weight).flatten(1).sum(1) - (2 * self.weight).sum()

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([torch.zeros(len(x)), self.lead(x)], 1)


def explain(model: mx.Model, x: Tensor | mx.Volume, **more: object) -> mx.SaliencyMap:
    return mx.explain(model, x, "prediction_difference", **{"target": 1, **more})


def places(x: Tensor, side: int) -> list[tuple[int, ...]]:
    """Where windows of `side` voxels begin that do not overlap, on a grid that they fill."""
    return list(itertools.product(*(range(0, n - side + 1, side) for n in x.shape[1:])))


def expected_under_gaussian(network: Logistic, x: Tensor, low: tuple[int, ...], side: int) -> tuple[float, float]:
    """The mean lead, and the mean probability, over what could be in a window: one integral over a line."""
    fitted = ConditionalGaussian(Question(mx.Model(network), x[None], [mx.Model(network).prepare(volume(x))], []))
    inside = np.array(list(itertools.product(*(range(a, a + side) for a in low))))
    around = itertools.product(
        *(range(max(0, a - 2), min(n, a + side + 2)) for a, n in zip(low, x.shape[1:], strict=True))
    )
    known = np.array([v for v in around if list(v) not in inside.tolist()])
    mean, covariance = conditional(fitted, x, inside, known)
    weight = network.weight[0].double().numpy()[tuple(inside.T)]
    rest = float(network.lead(x[None])) - float(weight @ x[0].double().numpy()[tuple(inside.T)])
    lead, spread = rest + weight @ mean, (weight @ covariance @ weight) ** 0.5
    nodes, share = np.polynomial.hermite_e.hermegauss(60)
    return lead, float((share / (1 + np.exp(-lead - spread * nodes))).sum() / share.sum())


def volume(x: Tensor, affine: np.ndarray | None = None) -> mx.Volume:
    return mx.Volume(x, np.eye(4) if affine is None else affine)


@pytest.mark.parametrize("side", [1, 2])
@pytest.mark.parametrize("difference", ["score", "probability", "weight_of_evidence"])
def test_a_logistic_model_of_gaussian_voxels_has_its_closed_form(side: int, difference: str) -> None:
    x = smooth(1, 4, 4, 4, seed=3)
    network, n = Logistic((4, 4, 4)), 10_000
    model = mx.Model(network, class_names=("benign", "malignant"))
    made = explain(model, x, difference=difference, window=(float(side),), samples=150)
    lead = float(network.lead(x[None]))
    p = 1 / (1 + np.exp(-lead))

    def bits(p: float) -> float:
        p = (p * n + 1) / (n + 2)
        return log2(p / (1 - p))

    missed, half = [], []
    for low in places(x, side):
        mean_lead, mean_p = expected_under_gaussian(network, x, low, side)
        expected = {"score": lead - mean_lead, "probability": p - mean_p, "weight_of_evidence": bits(p) - bits(mean_p)}
        missed.append(float(made.data[0][low]) - expected[difference])
        half.append(float(made.interval[0][low]))
    missed, half = np.abs(missed), np.array(half)
    # Intervals of 95 % hold nearly all the truths, and hardly wider ones hold every one.
    assert (missed < half).mean() > 0.85 and (missed < 2.2 * half).all()
    assert missed.mean() < 0.25 * float(made.data.abs().mean())


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    parts = window_parts(torch.zeros(1, 1, 40, 50), (1, 1), (1,), ())
    drawn = _Drawn(parts, 4, 1)
    said = 3 + noise(1, 8000)
    drawn.take(0, said)
    held = (drawn.mean(0) - 3).abs() < drawn.half(0)
    # Five standard errors of a share of 2000.
    assert abs(float(held.double().mean()) - 0.95) < 5 * (0.95 * 0.05 / 2000) ** 0.5
    begun = _Drawn(parts, 4, 1)
    begun.take(0, said[:, :5])
    assert begun.known.tolist() == [True] + [False] * 1999
    short = _Drawn(parts, 4, 1)
    short.take(0, said[:, :7])
    assert short.known.tolist() == [True, True] + [False] * 1998
    torch.testing.assert_close(short.mean(0)[1], said[0, 4:7].double().mean())
    assert float(short.half(0)[1]) == pytest.approx(4.3027 * float(said[0, 4:7].double().std()) / 3**0.5, rel=1e-3)


def test_intervals_are_those_of_means() -> None:
    # Two parts of one size at a voxel, whose half widths are 3 and 4, and one of another size, whose is 6.
    maps = [tuple(torch.full((1, 1, 1, 1), v) for v in of_size) for of_size in ((10.0, 25.0, 2.0), (7.0, 36.0, 1.0))]
    found = _mean(maps)
    assert float(found.values) == (10 / 2 + 7) / 2
    assert float(found.interval) == pytest.approx((2.5**2 + 6**2) ** 0.5 / 2)


def test_the_interval_of_evidence_is_that_of_the_probability_in_bits() -> None:
    x, n = smooth(1, 4, 4, 4), 50
    network = Logistic((4, 4, 4))
    model = mx.Model(network)
    given = {"window": (2.0,), "samples": 6, "training_size": n}
    bits, chance = (explain(model, x, difference=d, **given) for d in ("weight_of_evidence", "probability"))
    p = torch.sigmoid(network.lead(x[None])) - chance.data
    # A small change of the mean probability changes the bits so much.
    corrected = [((p + step) * n + 1) / (n + 2) for step in (-1e-3, 1e-3)]
    slope = (corrected[1].logit() - corrected[0].logit()) / 2e-3 / np.log(2)
    torch.testing.assert_close(bits.interval, slope * chance.interval, rtol=1e-2, atol=1e-5)


def test_what_is_known_anyway_is_no_evidence() -> None:
    x = smooth(1, *SIZE)
    for difference in ("score", "probability", "weight_of_evidence"):
        made = explain(mx.Model(Logistic()), x, difference=difference, infill=volume(x), window=(2.0,))
        assert made.data.abs().max() == 0 and made.interval is None


@pytest.mark.parametrize("infill", ["mean", "blur", "inpaint"])
def test_the_difference_of_scores_is_occlusion(infill: str) -> None:
    model = make_model("resnet18")
    scan = volume(noise(1, 24, 24, 16), oblique_affine())
    given = {"window": (9.0,), "infill": infill}
    made = explain(model, scan, difference="score", **given)
    torch.testing.assert_close(made.data, mx.explain(model, scan, "occlusion", target=1, **given).data)


def test_parts_that_overlap_and_sizes_are_averaged() -> None:
    x, network = smooth(1, *SIZE), Logistic()
    model, mean = mx.Model(network), float(x.mean())
    given = {"infill": "mean", "difference": "probability"}

    def by_hand(side: int, step: int) -> Tensor:
        total, count = torch.zeros_like(x), torch.zeros_like(x)
        # The last one ends where the scan does.
        for low in itertools.product(*({*range(0, n - side, step), n - side} for n in SIZE)):
            here = (slice(None), *(slice(a, a + side) for a in low))
            without = x.clone()
            without[here] = mean
            total[here] += network.lead(x[None]).sigmoid() - network.lead(without[None]).sigmoid()
            count[here] += 1
        return total / count

    one, two = (explain(model, x, window=(side,), stride=1.0, **given).data for side in (2.0, 3.0))
    torch.testing.assert_close(one, by_hand(2, 1))
    torch.testing.assert_close(two, by_hand(3, 1))
    both = explain(model, x, window=(2.0, 3.0), stride=1.0, **given).data
    torch.testing.assert_close(both, (one + two) / 2)
    torch.testing.assert_close(explain(model, x, window=(3.0,), **given).data, by_hand(3, 3))
    # Where windows of one size leave a gap, those of the other speak.
    gaps, none = (explain(model, x, window=side, stride=3.0, **given).data for side in ((1.0, 3.0), (1.0,)))
    assert 0 < int((none == 0).sum()) < x.numel()
    torch.testing.assert_close(gaps[none == 0], by_hand(3, 3)[none == 0])


def test_sizes_have_draws_of_their_own() -> None:
    x = smooth(1, *SIZE)
    made = explain(mx.Model(Logistic()), x, window=(2.0, 2.0), samples=4)
    alone = explain(mx.Model(Logistic()), x, window=(2.0,), samples=4)
    assert not torch.allclose(made.data, alone.data)
    assert float(made.interval.mean()) < 0.9 * float(alone.interval.mean())


def test_supervoxels_are_taken_away_whole() -> None:
    x = smooth(1, 12, 10, 8)
    network = Logistic((12, 10, 8))
    made = explain(mx.Model(network), x, parts="supervoxels", window=(4.0,), infill="mean", difference="score")
    labels = torch.from_numpy(slic(x.numpy(), (1, 1, 1), 4.0, 1.0, np.ones((12, 10, 8), dtype=bool)))
    assert len(labels.unique()) > 8
    for label in labels.unique():
        without = torch.where(labels == label, x.mean(), x)
        expected = float(network.lead(x[None]) - network.lead(without[None]))
        found = made.data[0][labels == label]
        torch.testing.assert_close(found, torch.full_like(found, expected), rtol=1e-4, atol=1e-5)


def test_certainty_is_finite_and_counts_as_training_allows() -> None:
    x = smooth(1, *SIZE)
    x += 1.9 - x.mean()
    network = Logistic()
    # One voxel decides, and for certain.
    network.weight = 1e6 * (x == x.max()).float()
    for n in (100, 10_000):
        made = explain(mx.Model(network), x, training_size=n, infill="mean", window=(3.0,))
        # From a probability of one to one of zero: odds of N + 1, and then of one in N + 1.
        assert float(made.data.max()) == pytest.approx(2 * log2(n + 1), rel=1e-6)


@pytest.mark.parametrize("task", ["classification", "multilabel", "ordinal"])
@pytest.mark.parametrize("outputs", [1, 4])
def test_log_odds_are_those_of_the_probabilities(task: str, outputs: int) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(8, outputs))
    model = mx.Model(network, task=task)
    x = noise(1, 1, 2, 2, 2)
    with torch.no_grad():
        p = model.probabilities(network(x))[0].double()
    if len(p) == 1:
        # The other class is that it is not this one.
        p = torch.cat([1 - p, p])
    which = range(len(p))
    asked = Question(model, x, [model.prepare(volume(x[0]))], [mx.ClassTarget(i) for i in which])
    targets = log_odds(asked)
    question = Question(model, x, asked.seen, targets)
    found = [float(value.detach()) for value in question.values(x)]
    for value, one, target in zip(found, p, question.bound, strict=True):
        assert value == pytest.approx(float(one.logit()), rel=1e-4, abs=1e-6)
        assert target.target.classes == (4 if task == "classification" and outputs == 4 else 2)
    if task == "classification":
        asked = Question(model, x, asked.seen, [mx.ClassTarget(0, versus=1)])
        question = Question(model, x, asked.seen, log_odds(asked))
        assert float(question.values(x)[0].detach()) == pytest.approx(float((p[0] / p[1]).log()), rel=1e-4, abs=1e-6)


def test_what_has_no_probability_is_explained_by_its_score() -> None:
    x = noise(1, 24, 24, 16)
    made = explain(make_model("unet"), x, infill="mean", window=(8.0,))
    occluded = mx.explain(make_model("unet"), x, "occlusion", target=1, infill="mean", window=(8.0,))
    torch.testing.assert_close(made.data, occluded.data)
    assert any("There is no probability of benign" in note for note in made.provenance.notes)
    assert made.provenance.target_label == "benign (logit)"


def test_several_targets_and_both_kinds_at_once() -> None:
    x, model = noise(1, 24, 24, 16), make_model("resnet18")
    inner = mx.RegressionTarget(3, layer="avgpool")
    given = {"samples": 2, "window": (12.0,)}
    both = explain(model, x, target=["malignant", inner], **given)
    for made, target in zip(both, ("malignant", inner), strict=True):
        alone = explain(model, x, target=target, **given)
        torch.testing.assert_close(made.data, alone.data)
        torch.testing.assert_close(made.interval, alone.interval)
        assert made.provenance.target == alone.provenance.target
    assert both[0].provenance.target["kind"] == "ClassTarget"


def test_it_can_end_early() -> None:
    x = smooth(1, 8, 8, 8)
    asked: list[int] = []
    messages: set[str] = set()

    def progress(step: mx.Progress) -> None:
        asked.append(step.done)
        messages.add(step.message)

    run = mx.Run(memory_budget=1, enough=lambda: len(asked) > 9, progress=progress)
    made = explain(mx.Model(Logistic((8, 8, 8))), x, window=(4.0, 2.0), samples=4, run=run)
    assert made.provenance.partial
    whole = explain(mx.Model(Logistic((8, 8, 8))), x, window=(4.0,), samples=4)
    same = (made.data - whole.data).abs() < 1e-5 * whole.data.abs()
    assert any("size 1 of 2" in m for m in messages) and not any("size 2 of 2" in m for m in messages)
    # The first window is finished, the second at half, and nothing else was begun.
    assert int(same.sum()) >= 64 and int((made.data != 0).sum()) in (64, 128, 192)
    assert (made.interval[made.data == 0] == 0).all() and (made.interval[made.data != 0] > 0).all()
