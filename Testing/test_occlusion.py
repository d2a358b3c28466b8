"""Occlusion, against what can be worked out; and its strongest windows alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import Occlusion
from conftest import NETWORKS, make_model
from torch import Tensor, nn

import MedXAILib as mx
from MedXAILib.engines import screening
from MedXAILib.engines.incremental import Incremental
from MedXAILib.engines.looking import Cut, Looked, Step
from MedXAILib.engines.screening import cut_of
from MedXAILib.engines.windows import windows
from MedXAILib.explainer import Question

SIZE = (12, 10, 8)


def linear(size: tuple[int, ...] = SIZE) -> tuple[mx.Model, Tensor]:
    """A network whose score is a weighted sum of the scan, and the weights (1, *size)."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(size), 2))
    return mx.Model(network, channels=1, spatial_dims=3), network[1].weight[1].detach().reshape(1, *size)


def local(width: int = 6) -> mx.Model:
    """A network that is local up to its head, and not linear."""
    torch.manual_seed(0)
    layers = [nn.Conv3d(1, width, 3, padding=1), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(width, width, 3), nn.ReLU()]
    return mx.Model(nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(width, 3)), channels=1)


def scan(size: tuple[int, ...], seed: int = 1) -> Tensor:
    return torch.randn(1, *size, generator=torch.Generator().manual_seed(seed))


def test_of_a_linear_network_a_window_loses_what_it_holds() -> None:
    model, weight = linear()
    x = scan(SIZE)
    affine = np.diag([2.0, 1.0, 3.0, 1.0])
    found = mx.explain(model, mx.Volume(x, affine), "occlusion", target=1, window=(6.0, 2.0, 6.0), infill="zero")
    # In voxels: 3, 2 and 2, for the axes of the array are those of the affine.
    parts = (weight * x).reshape(4, 3, 5, 2, 4, 2).sum((1, 3, 5))
    expected = parts.repeat_interleave(3, 0).repeat_interleave(2, 1).repeat_interleave(2, 2)
    torch.testing.assert_close(found.data[0], expected, rtol=1e-4, atol=1e-5)


def test_windows_that_overlap_are_averaged() -> None:
    model, weight = linear()
    x, total, often = scan(SIZE), torch.zeros(SIZE), torch.zeros(SIZE)
    for d in (0, 3, 6, 8):
        for h in (0, 3, 6):
            for w in (0, 3, 4):
                there = slice(d, d + 4), slice(h, h + 4), slice(w, w + 4)
                total[there] += (weight * x)[0][there].sum()
                often[there] += 1
    found = mx.explain(model, x, "occlusion", target=1, window=(4.0,), stride=(3.0,), infill="zero")
    torch.testing.assert_close(found.data[0], total / often, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
def test_it_is_captums(name: str) -> None:
    model, x = make_model(name), scan(NETWORKS[name][2])
    found = mx.explain(model, x, "occlusion", target=1, window=(6.0,), infill="zero")
    model.network.eval()
    theirs = Occlusion(model.network)
    with torch.no_grad():
        box = (1, 6, 6, 6)
        expected = theirs.attribute(x[None], box, strides=box, baselines=0, target=1, perturbations_per_eval=8)
    # Of captum's, the last windows along an axis are smaller; of ours they overlap with those before.
    inside = (slice(None), slice(0, 24), slice(0, 24), slice(0, 10))
    largest = float(expected.abs().amax())
    torch.testing.assert_close(found.data[inside], expected[0][inside], rtol=1e-4, atol=1e-4 * largest)


def standing_out(size: tuple[int, ...]) -> Tensor:
    """Noise with something in it."""
    x = scan(size)
    x[:, 10:16, 20:26, 8:14] += 4
    return x


def strongest(x: Tensor, losses: Tensor, low: Tensor, box: tuple[int, ...], count: int) -> Tensor:
    """Which voxels belong to the `count` windows that lose most."""
    where = torch.zeros(x.shape[1:], dtype=torch.bool)
    for start in low[losses.abs().topk(count).indices].tolist():
        where[tuple(slice(a, a + b) for a, b in zip(start, box, strict=True))] = True
    return where


def test_the_strongest_windows_are_found_with_a_part_of_the_questions() -> None:
    model, x = local(), standing_out((40, 36, 32))
    asking: dict[str, Any] = {"target": 1, "window": (4.0,), "infill": "zero"}
    every = mx.explain(model, x, "occlusion", **asking)
    few = mx.explain(model, x, "occlusion", top=10, **asking)
    box, low = windows(x.shape[1:], (1.0,) * 3, (4.0,), ())
    losses = torch.stack([every.data[0][tuple(at)] for at in low.tolist()])
    where = strongest(x, losses, low, box, 10)
    torch.testing.assert_close(few.data[0][where], every.data[0][where], rtol=1e-3, atol=1e-6)
    assert few.provenance.forwards < 0.4 * every.provenance.forwards
    assert any(f"of {len(low)} windows were asked about" in note for note in few.provenance.notes)
    # What was not asked about has an estimate that is right to first order.
    together = torch.corrcoef(torch.stack([few.data.flatten(), every.data.flatten()]))
    assert together[0, 1] > 0.8


def test_estimates_are_exact_where_what_follows_the_cut_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rectified convolution first, which is followed, and a linear one after the cut."""
    torch.manual_seed(0)
    layers = [nn.Conv3d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv3d(2, 64, 3), nn.AdaptiveAvgPool3d(1), nn.Flatten()]
    model, x = mx.Model(nn.Sequential(*layers), channels=1), scan((24, 24, 24))
    every = mx.explain(model, x, "occlusion", target=1, window=(4.0,))
    # Nothing is asked but the sample of the others.
    monkeypatch.setattr(screening, "_settled", lambda *_: True)
    few = mx.explain(model, x, "occlusion", target=1, window=(4.0,), top=1)
    assert few.provenance.forwards < every.provenance.forwards / 4
    torch.testing.assert_close(few.data, every.data, rtol=1e-3, atol=1e-4 * float(every.data.abs().max()))


def test_the_cut_is_where_little_has_been_computed() -> None:
    """0 -> 1 -> 2 -> 3, and 1 beside 3 -> 4."""
    given, work = [(0,), (1,), (2,), (1, 3)], [1.0, 2.0, 5.0, 92.0]
    steps = [
        Step("step", None, numbers, (n + 1,), (), w) for n, (numbers, w) in enumerate(zip(given, work, strict=True))
    ]
    looked = Looked((1, 4), steps)
    assert cut_of(looked, work) == Cut(3, frozenset({1, 3}))
    assert cut_of(looked, [1.0, 20.0, 5.0, 70.0]) == Cut(1, frozenset({1}))
    assert cut_of(looked, [20.0, 20.0, 5.0, 50.0]) == Cut(0, frozenset({0}))


def test_a_network_that_looks_at_all_at_once_is_asked_about_all() -> None:
    model, x = linear((16, 16, 16))[0], scan((16, 16, 16))
    every = mx.explain(model, x, "occlusion", target=1, window=(4.0,))
    assert torch.equal(mx.explain(model, x, "occlusion", target=1, window=(4.0,), top=3).data, every.data)


def test_of_two_targets_the_strongest_of_each_are_found() -> None:
    model, x = local(), standing_out((40, 36, 32))
    asking: dict[str, Any] = {"target": [0, 1], "window": (4.0,), "infill": "zero"}
    every, few = (mx.explain(model, x, "occlusion", **asking, **more) for more in ({}, {"top": 5}))
    box, low = windows(x.shape[1:], (1.0,) * 3, (4.0,), ())
    for one, other in zip(every, few, strict=True):
        losses = torch.stack([one.data[0][tuple(at)] for at in low.tolist()])
        where = strongest(x, losses, low, box, 5)
        torch.testing.assert_close(other.data[0][where], one.data[0][where], rtol=1e-3, atol=1e-6)


def test_ending_early_keeps_estimates(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = local(), scan((40, 36, 32))
    monkeypatch.setattr(mx.Run, "fitting", lambda *_: 2)
    run = mx.Run(enough=lambda: True)
    found = mx.explain(model, x, "occlusion", target=1, window=(4.0,), top=10, run=run)
    assert found.provenance.partial and (found.data != 0).all()


def test_small_networks_are_asked_about_several_windows_together() -> None:
    model, x = local(), scan((24, 24, 24))
    with torch.no_grad():
        question = Question(model, x[None], [model.prepare(mx.Volume(x, np.eye(4)))], [mx.ClassTarget(1)])
        asked = Incremental(question)
        assert asked.pays(torch.zeros(1, 1, 4, 4, 4), torch.tensor([[3, 3, 3]])) and asked.together > 4
