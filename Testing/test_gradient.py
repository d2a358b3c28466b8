"""Gradients against closed forms, finite differences and captum."""

from __future__ import annotations

import pytest
import torch
from captum.attr import IntegratedGradients as CaptumIntegratedGradients
from captum.attr import Saliency
from conftest import make_model
from torch import Tensor, nn

import MedXAILib as mx

SHAPE = (2, 5, 6, 7)


class Linear(nn.Module):
    """f(x) = w . x + b, with two outputs."""

    def __init__(self, shape: tuple[int, ...] = SHAPE) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.w = nn.Parameter(torch.randn(2, *shape, generator=generator))
        self.b = nn.Parameter(torch.tensor([0.3, -0.2]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ncdhw,kcdhw->nk", x, self.w) + self.b


class Quadratic(nn.Module):
    """f(x) = x1 x2 + x' Q x over the voxels."""

    def __init__(self) -> None:
        super().__init__()
        self.q = torch.randn(24, 24, generator=torch.Generator().manual_seed(5))

    def forward(self, x: Tensor) -> Tensor:
        v = x.flatten(1)
        return ((v @ self.q) * v).sum(1, keepdim=True).repeat(1, 2)


def linear() -> mx.Model:
    return mx.Model(Linear(), channels=2)


def scan(*shape: int, seed: int = 6) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_gradient_of_a_linear_network_is_its_weights() -> None:
    model, x = linear(), scan(*SHAPE)
    w = model.network.w.detach()[1]
    explain = lambda **k: mx.explain(model, x, "gradient", target=1, **k).data  # noqa: E731
    torch.testing.assert_close(explain(per_channel=True), w)
    torch.testing.assert_close(explain(), w.sum(0, keepdim=True))
    torch.testing.assert_close(explain(form="absolute"), w.abs().amax(0, keepdim=True))
    torch.testing.assert_close(explain(form="times_input"), (w * x).sum(0, keepdim=True))


def test_gradient_equals_finite_differences() -> None:
    model = make_model("resnet18")
    model.network.double()
    x = scan(1, 24, 24, 16)
    made = mx.explain(mx.Model(_InDouble(model.network)), x, "gradient", target=2)
    for index in torch.randint(0, x.numel(), (8,), generator=torch.Generator().manual_seed(0)):
        step = torch.zeros_like(x).double().flatten()
        step[index] = 1e-5
        step = step.reshape(x.shape)
        with torch.no_grad():
            network = model.network.eval()
            change = network((x + step)[None])[0, 2] - network((x - step)[None])[0, 2]
        assert float(made.data.flatten()[index]) == pytest.approx(float(change) / 2e-5, rel=1e-4, abs=1e-9)


class _InDouble(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.double())


@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
def test_gradient_equals_captum(name: str) -> None:
    model, x = make_model(name), scan(2, 1, 24, 24, 16)
    expected = Saliency(model.network.eval()).attribute(x.clone().requires_grad_(), target=1, abs=False)
    torch.testing.assert_close(mx.explain(model, x, "gradient", target=1).data, expected)


def test_smoothgrad_without_noise_is_the_gradient() -> None:
    model, x = make_model("resnet18"), scan(1, 24, 24, 16)
    plain = mx.explain(model, x, "gradient", target=1).data
    torch.testing.assert_close(mx.explain(model, x, "smoothgrad", target=1, noise=0.0, samples=4).data, plain)


@pytest.mark.parametrize("samples", [1, 5])
def test_statistics_of_a_linear_network(samples: int) -> None:
    model, x = linear(), scan(*SHAPE)
    w = model.network.w.detach()[1].sum(0, keepdim=True)
    torch.testing.assert_close(mx.explain(model, x, "gradient", target=1, samples=samples).data, w)
    if samples > 1:
        variance = mx.explain(model, x, "vargrad", target=1, samples=samples).data
        torch.testing.assert_close(variance, torch.zeros_like(w), atol=1e-8, rtol=0)
        squared = mx.explain(model, x, "gradient", target=1, samples=samples, statistic="squared", per_channel=True)
        torch.testing.assert_close(squared.data, model.network.w.detach()[1] ** 2)


def test_smoothgrad_and_vargrad_are_the_mean_and_variance_over_their_copies() -> None:
    model, x, n = make_model("resnet18"), scan(1, 24, 24, 16), 6
    spread = x.max() - x.min()
    gradients = []
    for i in range(n):
        noise = torch.randn(x.shape, generator=mx.Run(seed=7).generator(i))
        gradients.append(mx.explain(model, x + 0.2 * spread * noise, "gradient", target=1).data)
    stacked = torch.stack(gradients)
    made = {
        m: mx.explain(model, x, m, target=1, samples=n, noise=0.2, run=mx.Run(seed=7)).data
        for m in ("smoothgrad", "vargrad")
    }
    torch.testing.assert_close(made["smoothgrad"], stacked.mean(0), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(made["vargrad"], stacked.var(0, correction=0), rtol=1e-3, atol=1e-10)


def test_seeds_differ() -> None:
    model, x = make_model("resnet18"), scan(1, 24, 24, 16)
    maps = [mx.explain(model, x, "smoothgrad", target=1, samples=2, run=mx.Run(seed=s)).data for s in (0, 1)]
    assert not torch.allclose(*maps)


def test_integrated_gradients_of_a_quadratic_form() -> None:
    """x'Qx along the straight path from 0: voxel i receives x_i (Qx + Q'x)_i / 2, exactly by the midpoint rule."""
    network, x = Quadratic(), scan(1, 2, 3, 4)
    made = mx.explain(mx.Model(network), x, "integrated_gradients", target=0, steps=1, max_steps=1)
    v = x.flatten()
    expected = (v * (network.q @ v + network.q.T @ v) / 2).reshape(x.shape)
    torch.testing.assert_close(made.data, expected, rtol=1e-4, atol=1e-5)
    assert made.residual["completeness"] < 1e-5


def test_integrated_gradients_of_a_linear_network() -> None:
    model, x = linear(), scan(*SHAPE)
    atlas = mx.Volume(scan(*SHAPE, seed=9), torch.eye(4).numpy())
    made = mx.explain(model, x, "integrated_gradients", target=0, baseline=atlas, per_channel=True)
    torch.testing.assert_close(made.data, model.network.w.detach()[0] * (x - atlas.data))


@pytest.mark.parametrize("steps", [3, 9])
def test_integrated_gradients_equal_captum(steps: int) -> None:
    model, x = make_model("densenet121"), scan(2, 1, 24, 24, 16)
    expected = CaptumIntegratedGradients(model.network.eval()).attribute(
        x, target=1, n_steps=steps, method="riemann_middle", internal_batch_size=2
    )
    made = mx.explain(model, x, "integrated_gradients", target=1, steps=3, max_steps=steps, tolerance=0.0)
    torch.testing.assert_close(made.data, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()) + 1e-7)


@pytest.mark.parametrize(("tolerance", "steps"), [(0.2, 15), (0.05, 45)])
def test_integrated_gradients_stop_when_the_map_stops_changing(tolerance: float, steps: int) -> None:
    model, x = make_model("resnet18"), scan(1, 24, 24, 16)
    reference = mx.explain(model, x, "integrated_gradients", target=1, steps=405, max_steps=405).data
    made = mx.explain(model, x, "integrated_gradients", target=1, tolerance=tolerance)
    assert made.provenance.backwards == steps
    assert float((made.data - reference).norm() / reference.norm()) < tolerance


@pytest.mark.parametrize("baseline", ["zero", "minimum", "mean", "blur"])
def test_completeness_for_every_baseline(baseline: str) -> None:
    model, x = make_model("resnet18"), scan(1, 24, 24, 16)
    made = mx.explain(model, x, "integrated_gradients", target=1, baseline=baseline, tolerance=0.001)
    assert made.residual["completeness"] < 0.05


def test_unaccounted_change_is_said() -> None:
    """A step function changes all at once, which no gradient sees."""

    class Step(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x.mean((1, 2, 3, 4)) + 10 * torch.sigmoid(1e5 * (x.mean((1, 2, 3, 4)) - 0.333)))[:, None].repeat(
                1, 2
            )

    made = mx.explain(mx.Model(Step()), scan(1, 4, 4, 4).abs(), "integrated_gradients", target=0, max_steps=15)
    assert any("not accounted for" in note for note in made.provenance.notes)


def test_inputs_with_baseline_files(tmp_path: object, oblique: mx.Volume) -> None:
    """An atlas on another grid is brought to the scan."""
    shifted = oblique.affine.copy()
    shifted[:3, 3] += shifted[:3, 0] * 2
    atlas = mx.Volume(oblique.data[:, 2:], shifted)
    model = mx.Model(nn.Sequential(nn.Flatten(), nn.Linear(oblique.data.numel(), 2)))
    made = mx.explain(model, oblique, "integrated_gradients", target=0, baseline=atlas)
    # Where atlas and scan agree there is nothing to attribute.
    assert float(made.data[:, 2:].abs().max()) < 1e-5 < float(made.data[:, :2].abs().max())
