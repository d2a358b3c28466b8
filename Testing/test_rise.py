"""RISE against closed forms, the formula written out, and itself with other seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_model, oblique_affine
from torch import Tensor, nn
from torch.nn import functional

import MedXAILib as mx
from MedXAILib import registry
from MedXAILib.engines.masks import Masks
from MedXAILib.engines.smooth_masks import SmoothMasks
from MedXAILib.explainer import Question
from MedXAILib.infills import choice
from MedXAILib.infills.infill import Infill
from MedXAILib.resources import path
from MedXAILib.visual.rise import RISE

SIZE = (9, 12, 8)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.EXPLAINERS, "rise", RISE)


class Linear(nn.Module):
    """The sum of the voxels, each times its weight; or of its square."""

    def __init__(self, power: int = 1) -> None:
        super().__init__()
        self.power = power
        self.weight = nn.Parameter(torch.randn(1, *SIZE, generator=torch.Generator().manual_seed(4)))

    def forward(self, x: Tensor) -> Tensor:
        y = (x * self.weight).flatten(1).sum(1, keepdim=True)
        return torch.cat([y**self.power, -y], 1)


def volume() -> mx.Volume:
    return mx.Volume(torch.randn(1, *SIZE, generator=torch.Generator().manual_seed(5)) + 0.5, oblique_affine())


def question(network: nn.Module, scan: mx.Volume, **run: Any) -> Question:
    seen = mx.Model(network, task="regression").prepare(scan)
    model = mx.Model(network.eval().requires_grad_(False), task="regression")
    return Question(model, seen.x[None], [seen], [mx.RegressionTarget(0)], mx.Run(**run))


def spline(t: np.ndarray) -> np.ndarray:
    """The cubic B-spline: how alike a mask is at two voxels so many cells apart, when its grid may lie anywhere."""
    t = np.abs(t)
    return np.where(t < 1, 2 / 3 - t**2 + t**3 / 2, np.clip(2 - t, 0, None) ** 3 / 6)


def smoothed(of_voxels: np.ndarray, cell: Sequence[float]) -> np.ndarray:
    for axis, (n, c) in enumerate(zip(of_voxels.shape, cell, strict=True)):
        index = np.arange(n)
        kernel = spline((index[:, None] - index) / c)
        of_voxels = np.moveaxis(np.moveaxis(of_voxels, axis, -1) @ kernel, -1, axis)
    return of_voxels


@pytest.mark.parametrize("keep", [0.5, 0.25])
def test_of_a_linear_network_it_is_the_smoothed_weights(keep: float) -> None:
    network, scan = Linear(), volume()
    model = mx.Model(network, task="regression")
    found = mx.explain(
        model, scan, "rise", mx.RegressionTarget(0), infill="zero", cell=(4.0,), keep=keep, samples=6000, tolerance=0
    )
    cell = [4.0 / step for step in scan.spacing]
    expected = smoothed((network.weight * scan.data)[0].detach().double().numpy(), [max(1.0, c) for c in cell])
    missed = (found.data[0].double().numpy() - expected) / found.interval[0].numpy()
    assert np.abs(missed).max() < 2.5 and np.abs(missed).mean() > 0.2
    assert float(found.interval.max()) < 0.25 * np.abs(expected).max()


@pytest.mark.parametrize("power", [1, 2])
def test_intervals_hold_what_they_promise(power: int) -> None:
    network, scan = Linear(power), volume()
    model = mx.Model(network, task="regression")
    asked = {"infill": "zero", "cell": (5.0,), "tolerance": 0, "samples": 300}
    found = [
        mx.explain(model, scan, "rise", mx.RegressionTarget(0), run=mx.Run(seed=seed), **asked) for seed in range(60)
    ]
    maps, halves = (torch.stack([getattr(f, name) for f in found]) for name in ("data", "interval"))
    truth = maps.mean(0)
    if power == 1:
        cell = [max(1.0, 5.0 / step) for step in scan.spacing]
        truth = torch.from_numpy(smoothed((network.weight * scan.data)[0].detach().double().numpy(), cell))
    covered = ((maps - truth).abs() <= halves).float().mean()
    assert 0.92 <= float(covered) <= 0.975


def test_it_is_its_formula_with_the_masks_it_used() -> None:
    scan, network = volume(), Linear(2)
    asked = question(network, scan, seed=3)
    method = RISE(infill="mean", cell=(5.0, 3.0, 4.0), keep=0.3, samples=150, tolerance=0)
    (found,) = method.of_sample(asked)
    smooth = SmoothMasks.of(asked, method.cell, 7)
    kept = 1 - method._stream(asked, smooth, 0, 150).make(0, 150).share.double().numpy()[:, 0]
    assert kept.min() == 0 and kept.max() > 0.999 and abs(kept.mean() - 0.3) < 0.02
    x = scan.data[0].double().numpy()
    scores = [float(((k * x + (1 - k) * x.mean()) * network.weight[0].double().numpy()).sum() ** 2) for k in kept]
    terms = (np.array(scores) - np.mean(scores)).reshape(-1, 1, 1, 1) * (kept - 0.3) / (0.3 * 0.7)
    np.testing.assert_allclose(
        found.values[0, 0], terms.sum(0) / 149, rtol=1e-3, atol=1e-3 * np.abs(terms.mean(0)).max()
    )
    expected = 1.96 * terms.std(0) / np.sqrt(150)
    np.testing.assert_allclose(found.interval[0, 0], expected, rtol=5e-3)


def test_smooth_masks_are_pytorchs_interpolation() -> None:
    generator = torch.Generator().manual_seed(0)
    cases = (((9, 12, 8), (2.0, 1.0, 1.5), (5.0, 3.0, 1.5)), ((15, 11), (0.5, 1.0), (2.4, 2.0)))
    for size, spacing, cell in cases:
        smooth = SmoothMasks(size, spacing, cell)
        values = torch.rand(3, 1, *smooth.nodes, generator=generator, dtype=torch.float64)
        for shift in (torch.zeros(3, len(size)), torch.rand(3, len(size), generator=generator) - 0.5):
            # Where each voxel is between the first node (-1) and the last (1).
            axes = [
                ((torch.arange(n) - (n - 1) / 2) * mm / c + s[:, None]) / ((nodes - 1) / 2)
                for n, mm, c, nodes, s in zip(size, spacing, cell, smooth.nodes, shift.T, strict=True)
            ]
            assert all(float(axis.abs().max()) <= 1 for axis in axes)
            points = torch.stack(
                [torch.stack(torch.meshgrid(*one, indexing="ij")[::-1], -1) for one in zip(*axes, strict=True)]
            )
            expected = functional.grid_sample(values, points.double(), align_corners=True)
            torch.testing.assert_close(smooth(values, shift), expected, rtol=0, atol=1e-6)


def test_cells_have_a_size_in_mm() -> None:
    def smooth(size: tuple[int, ...], spacing: tuple[float, ...], *cell: float) -> SmoothMasks:
        scan = mx.Volume(torch.rand(1, *size), np.diag([*spacing, 1.0]))
        return SmoothMasks.of(question(nn.Flatten(), scan), cell, 6)

    assert smooth((20, 40, 30), (3.0, 1.0, 2.0), 6.0).cell == (6.0, 6.0, 6.0)
    # No smaller than a voxel.
    assert smooth((20, 40, 30), (3.0, 1.0, 2.0), 6.0, 5.0, 1.0).cell == (6.0, 5.0, 2.0)
    assert smooth((20, 40, 30), (3.0, 1.0, 2.0), 6.0, 5.0, 1.0).nodes == (12, 10, 31)
    assert smooth((60, 60, 60), (1.0, 1.0, 1.0)).cell == pytest.approx((10.0, 10.0, 10.0))
    with pytest.raises(mx.MedXAIError, match="2 sizes for 3 axes"):
        smooth((20, 40, 30), (3.0, 1.0, 2.0), 6.0, 5.0)


def test_chunks_change_nothing() -> None:
    model, scan = make_model("resnet18"), mx.Volume(torch.randn(1, 24, 24, 16), np.eye(4))
    plain = mx.explain(model, scan, "rise", 1, samples=30)
    small = mx.explain(model, scan, "rise", 1, samples=30, run=mx.Run(memory_budget=1))
    torch.testing.assert_close(small.data, plain.data, rtol=1e-3, atol=1e-4 * float(plain.data.abs().max()))
    torch.testing.assert_close(small.interval, plain.interval, rtol=1e-3, atol=0)


def test_several_targets_are_each_alone() -> None:
    model, scan = make_model("resnet18"), mx.Volume(torch.randn(1, 24, 24, 16), np.eye(4))
    both = mx.explain(model, scan, "rise", target=[0, 2], samples=30)
    for one, target in zip(both, (0, 2), strict=True):
        torch.testing.assert_close(one.data, mx.explain(model, scan, "rise", target, samples=30).data)


def test_it_stops_when_it_is_sure_and_says_when_it_is_not() -> None:
    model, scan = mx.Model(Linear(), task="regression"), volume()
    forwards = []
    for tolerance in (0.4, 0.2, 0.1):
        made = mx.explain(model, scan, "rise", mx.RegressionTarget(0), cell=(8.0,), tolerance=tolerance)
        forwards.append(made.provenance.forwards)
        sure = made.interval.flatten().quantile(0.95) / (made.data.max() - made.data.min())
        assert float(sure) < tolerance and not made.provenance.notes and not made.provenance.partial
    assert forwards[0] < forwards[1] < forwards[2] < 8000
    made = mx.explain(model, scan, "rise", mx.RegressionTarget(0), cell=(8.0,), samples=120)
    assert any("only to within" in note for note in made.provenance.notes)
    whole = mx.explain(model, scan, "rise", mx.RegressionTarget(0), cell=(8.0,), samples=150, tolerance=0)
    assert not whole.provenance.notes and 150 <= whole.provenance.forwards < 160


def test_ended_early_it_is_the_map_of_the_masks_so_far() -> None:
    model, scan = mx.Model(Linear(), task="regression"), volume()
    asked: list[int] = []

    def enough() -> bool:
        asked.append(1)
        return len(asked) >= 7

    run = mx.Run(enough=enough, memory_budget=1)
    part = mx.explain(model, scan, "rise", mx.RegressionTarget(0), run=run, samples=40)
    assert part.provenance.partial and len(part.provenance.notes) == 1
    plain = mx.explain(model, scan, "rise", mx.RegressionTarget(0), run=mx.Run(memory_budget=1), samples=7)
    torch.testing.assert_close(part.data, plain.data)
    # Of a batch, each has at least something.
    batch = mx.explain(
        model, torch.stack([scan.data] * 2), "rise", mx.RegressionTarget(0), run=mx.Run(enough=lambda: True)
    )
    assert batch.provenance.partial and bool(batch.interval.isfinite().all())


def test_centred_and_independent_is_the_least_noise() -> None:
    """The same forwards by the published formula, by pairs of complements, and as it is done here."""
    model = make_model("resnet18")
    x = torch.randn(1, 1, 24, 24, 16, generator=torch.Generator().manual_seed(1))
    smooth = SmoothMasks((24, 24, 16), (1.0, 1.0, 1.0), (4.0, 4.0, 4.0))
    generator = torch.Generator().manual_seed(2)

    def masks(bits: Tensor, shifts: Tensor) -> Tensor:
        return smooth(bits.float(), shifts)

    bits = torch.rand(150, 1, *smooth.nodes, generator=generator) < 0.5
    shifts = torch.rand(150, 3, generator=generator) - 0.5
    kept, rest = masks(bits, shifts), masks(~bits, shifts)
    with model.ready(), torch.no_grad():
        f, g = (model.forward(torch.lerp(x.mean(), x, m))[:, 1].reshape(-1, 1, 1, 1, 1) for m in (kept, rest))
    centred = (f - f.mean()) * (kept - 0.5) / 0.25
    published = f * kept / 0.5 / 0.5
    paired = (f - g) * (kept - rest)

    def noise(terms: Tensor, forwards: int) -> float:
        return float(terms.var(0).mean()) * forwards

    assert noise(centred, 1) < 0.75 * noise(paired, 2) and noise(centred, 1) < 0.2 * noise(published, 1)


def test_infills_are_drawn_once_for_each_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    class Drawn(Infill):
        random = True

        def patches(self, masks: Masks, draws: Sequence[int]) -> Tensor:
            drawn.extend(draws)
            return torch.zeros_like(masks.share)

    monkeypatch.setitem(choice.INFILLS, "drawn", Drawn)
    mx.explain(
        mx.Model(Linear(), task="regression"), volume(), "rise", mx.RegressionTarget(0), infill="drawn", samples=220
    )
    assert drawn == list(range(220))


def test_of_an_image_with_two_channels() -> None:
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x = torch.randn(2, 20, 24, generator=torch.Generator().manual_seed(1))
    model = mx.Model(network, task="classification", spatial_dims=2)
    made = mx.explain(model, x, "rise", 1, samples=20)
    assert made.data.shape == made.interval.shape == (1, 20, 24) and bool((made.interval > 0).all())


def test_it_finds_the_nodule_of_the_sample_scan() -> None:
    scan, mask = (mx.load_volume(path(f"SampleData/chest_ct_nodule{kind}.nrrd")) for kind in ("", "_mask"))
    model = mx.load_model(path("Models/lung_nodule"))
    made = mx.explain(model, scan, "rise", "malignant", (21.9, 120.5, -611.5), tolerance=0.2)
    nodule, looked_at = mask.data > 0, made.interval > 0
    assert bool(nodule.flatten()[made.data.argmax()])
    # There the whole interval is above zero, and elsewhere the map is about zero.
    assert bool((made.data - made.interval)[nodule].median() > 0)
    assert float(made.data[nodule].mean()) > 8 * float(made.data[looked_at & ~nodule].mean())
    # A tenth of the masks that are usual.
    assert made.provenance.forwards < 800
