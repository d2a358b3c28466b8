"""LIME against closed forms, explicit least squares, and the spread of what it says over seeds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_model
from torch import Tensor, nn

import MedXAILib as mx
from MedXAILib import run as run_module
from MedXAILib.engines.linear_fit import explained, linear_fit
from MedXAILib.visual.lime import LIME

SHAPE = (4, 6, 5)


def parts(count: int) -> mx.Volume:
    """`count` parts of a small grid, as a segmentation."""
    labels = torch.arange(int(np.prod(SHAPE))).remainder(count).reshape(1, *SHAPE) + 1
    return mx.Volume(labels.float(), np.eye(4))


def scan() -> Tensor:
    return torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(3)) + 3


class Game(nn.Module):
    """Says of a scan what `rule` says of the parts (N, count) that it has."""

    def __init__(self, count: int, rule: Any) -> None:
        super().__init__()
        self.rule, self.labels = rule, parts(count).data.flatten().long() - 1
        self.asked: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        first = torch.stack([(self.labels == i).nonzero()[0, 0] for i in range(int(self.labels.max()) + 1)])
        present = (x.flatten(1)[:, first] != 0).to(x)
        self.asked.append(present)
        value = self.rule(present)
        return torch.stack([value, -2 * value], 1)


def curved(count: int, seed: int = 5) -> Any:
    """A rule with interactions of every order."""
    draw = torch.Generator().manual_seed(seed)
    a, b = torch.randn(count, 8, generator=draw), torch.randn(8, generator=draw)
    return lambda present: torch.tanh(present @ a) @ b


def explain(count: int, rule: Any, run: mx.Run | None = None, **parameters: Any) -> tuple[mx.SaliencyMap, Tensor]:
    """The map, and its value for each part."""
    asking = {"supervoxels": parts(count), "infill": "zero", **parameters}
    made = mx.explain(mx.Model(Game(count, rule)), scan(), "lime", target=0, run=run, **asking)
    return made, of_parts(count, made.data)


def of_parts(count: int, values: Tensor) -> Tensor:
    labels = parts(count).data
    found = torch.stack([values[labels == i + 1].unique() for i in range(count)])
    assert found.shape == (count, 1)
    return found[:, 0]


def weighted(rows: np.ndarray, y: np.ndarray, width: float, ridge: float) -> tuple[np.ndarray, float]:
    """The coefficients of weighted ridge regression, and its R²."""
    cosine = rows.sum(1) / np.sqrt(np.maximum(rows.sum(1), 1e-300) * rows.shape[1])
    w = np.sqrt(np.exp(-((1 - cosine) ** 2) / width**2))
    middle, y0 = (w @ rows) / w.sum(), (w @ y) / w.sum()
    centred, yc = rows - middle, y - y0
    found = np.linalg.solve(centred.T * w @ centred + ridge * np.eye(rows.shape[1]), centred.T * w @ yc)
    return found, 1 - (w @ (yc - centred @ found) ** 2) / (w @ yc**2)


@pytest.mark.parametrize("count", [3, 17])
@pytest.mark.parametrize("width", [0.25, 1e6])
def test_a_rule_linear_in_the_parts_is_found_exactly(count: int, width: float) -> None:
    a = torch.linspace(-2, 3, count)
    made, found = explain(count, lambda present: present @ a + 0.7, samples=60, kernel_width=width)
    torch.testing.assert_close(found, a, rtol=1e-4, atol=1e-4)
    assert made.residual["unexplained"] < 1e-6 and made.residual["unforeseen"] < 1e-6 and not made.provenance.notes
    assert made.interval is None if count == 3 else made.interval.max() < 1e-3


def test_a_linear_network_is_found_exactly() -> None:
    w = torch.randn(120, generator=torch.Generator().manual_seed(1))

    class Linear(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x.flatten(1) @ w, -x.flatten(1) @ w], 1)

    made = mx.explain(mx.Model(Linear()), scan(), "lime", target=0, infill="mean", size_mm=2.0, supervoxels="grid")
    lost = (w * (scan() - scan().mean()).flatten()).reshape(SHAPE)
    for label in range(4):
        cell = (slice(0, 2) if label % 2 else slice(2, 4), slice(2 * (label // 2), 2 * (label // 2) + 2), slice(0, 2))
        torch.testing.assert_close(made.data[0][cell].unique(), lost[cell].sum()[None], rtol=1e-3, atol=1e-3)
    assert made.residual["unexplained"] < 1e-6


def test_all_samples_and_a_flat_kernel_are_least_squares() -> None:
    rule = curved(6)
    rows = np.array([[(code >> i) & 1 for i in range(6)] for code in range(64)], dtype=float)
    y = rule(torch.tensor(rows, dtype=torch.float32)).double().numpy()
    expected = np.linalg.lstsq(np.c_[rows, np.ones(64)], y, rcond=None)[0][:-1]
    made, found = explain(6, rule, samples=64, kernel_width=1e6)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert made.interval is None and made.provenance.forwards <= 66


@pytest.mark.parametrize("width", [0.25, 1.0])
@pytest.mark.parametrize("ridge", [0.0, 1.0, 30.0])
def test_it_is_weighted_ridge_regression(width: float, ridge: float) -> None:
    count, game = 14, Game(14, curved(14))
    asking: dict[str, Any] = {"samples": 90, "kernel_width": width, "ridge": ridge, "supervoxels": parts(count)}
    made = mx.explain(mx.Model(game), scan(), "lime", target=0, infill="zero", **asking)
    rows = torch.cat(game.asked)[-90:]
    assert rows[0].all() and 0.4 < rows.mean() < 0.6 and len(rows.unique(dim=0)) > 85
    expected, r2 = weighted(rows.double().numpy(), game.rule(rows).double().numpy(), width, ridge)
    np.testing.assert_allclose(of_parts(count, made.data).numpy(), expected, rtol=1e-4, atol=1e-5)
    assert made.residual["unexplained"] == pytest.approx(1 - r2, rel=1e-4)


def test_its_intervals_hold_what_endless_samples_would_say() -> None:
    count, rule = 9, curved(9)
    rows = np.array([[(code >> i) & 1 for i in range(count)] for code in range(512)], dtype=float)
    y = rule(torch.tensor(rows, dtype=torch.float32)).double().numpy()
    truth = torch.from_numpy(weighted(rows, y, 0.25, 0.0)[0])
    held, widths, errors = [], [], []
    for seed in range(60):
        made, found = explain(count, rule, mx.Run(seed=seed), samples=150)
        half = of_parts(count, made.interval)
        held.append((found - truth).abs() <= half)
        widths.append(half)
        errors.append(found - truth)
    assert 0.91 < torch.stack(held).float().mean() < 0.985
    # As wide as it varies.
    assert float(torch.stack(widths).mean() / (1.96 * torch.stack(errors).std())) == pytest.approx(1, abs=0.2)


def test_influence_is_what_leaving_out_a_group_changes() -> None:
    draw = torch.Generator().manual_seed(0)
    rows, y = torch.randn(12, 4, generator=draw).double(), torch.randn(12, 2, generator=draw).double()
    weights, ridge = torch.rand(12, generator=draw).double(), torch.tensor([0.3, 0.0, 0.1, 0.0])
    for group in (1, 2, 3):
        fit = linear_fit(rows, y, weights, ridge, group)
        for g in range(12 // group):
            rest = torch.ones(12, dtype=torch.bool)
            rest[g * group : (g + 1) * group] = False
            without = linear_fit(rows[rest], y[rest], weights[rest], ridge)
            torch.testing.assert_close(fit.coefficients - without.coefficients, fit.influence[g], rtol=1e-6, atol=1e-8)
            torch.testing.assert_close((y - rows @ without.coefficients)[~rest], fit.left_out[~rest])


def test_explained_is_the_square_of_the_correlation() -> None:
    draw = torch.Generator().manual_seed(0)
    rows, y = torch.randn(50, 3, generator=draw).double(), torch.randn(50, 1, generator=draw).double()
    rows = torch.cat([rows, torch.ones(50, 1).double()], 1)
    fit = linear_fit(rows, y, torch.ones(50).double(), torch.zeros(4))
    said = torch.corrcoef(torch.cat([y, y - fit.missed], 1).T)[0, 1] ** 2
    torch.testing.assert_close(explained(y, fit.missed, torch.ones(50).double())[0], said)


def test_a_poor_fit_is_said() -> None:
    parity = curved(10, seed=8)
    made, _ = explain(10, lambda present: (present.sum(1) % 2) + 0 * parity(present), samples=200)
    assert made.residual["unforeseen"] > 0.9 and "take more samples" in made.provenance.notes[0]
    made, _ = explain(10, lambda present: present.sum(1) ** 2, samples=200)
    assert made.residual["unforeseen"] < 0.1 and not made.provenance.notes


def test_each_target_has_its_own_fit() -> None:
    asking: dict[str, Any] = {"supervoxels": parts(15), "infill": "zero", "samples": 80}
    one, other = mx.explain(mx.Model(Game(15, curved(15))), scan(), "lime", target=[0, 1], **asking)
    torch.testing.assert_close(other.data, -2 * one.data)
    torch.testing.assert_close(other.interval, 2 * one.interval)


def test_it_does_not_depend_on_how_much_is_asked_at_once() -> None:
    _, found = explain(15, curved(15), mx.Run(memory_budget=1), samples=80)
    _, same = explain(15, curved(15), samples=80)
    torch.testing.assert_close(found, same)
    assert not torch.equal(found, explain(15, curved(15), mx.Run(seed=1), samples=80)[1])


def test_it_ends_when_that_is_enough_and_shows_the_fit_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "_GLIMPSE_SECONDS", 0.0)
    monkeypatch.setattr(run_module, "_GLIMPSE_SHARE", float("inf"))
    shown: list[Tensor] = []
    run = mx.Run(memory_budget=1, enough=lambda: len(shown) == 70, partial=lambda so_far: shown.append(so_far.data))
    made, found = explain(14, curved(14), run, samples=90)
    assert made.provenance.partial and torch.equal(shown[-1], made.data) and len(shown) == 70
    torch.testing.assert_close(found, _first(14, 70))
    torch.testing.assert_close(of_parts(14, shown[39]), _first(14, 40), rtol=1e-4, atol=1e-5)


def _first(count: int, samples: int) -> Tensor:
    """What the fit to the first samples says."""
    rule, rows = curved(count), LIME(samples=90)._present(count, mx.Run().generator(), random=False)[:samples]
    expected, _ = weighted(rows.double().numpy(), rule(rows.float()).double().numpy(), 0.25, 0.0)
    return torch.from_numpy(expected).float()


def test_a_segmentation_network_of_monai_is_explained() -> None:
    made = mx.explain(make_model("unet"), torch.randn(1, 24, 24, 16), "lime", target=1, size_mm=7.0, samples=60)
    assert made.data.any() and made.interval is not None and made.interval.shape == made.data.shape
