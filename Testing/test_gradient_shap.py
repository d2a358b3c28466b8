"""Gradient SHAP against closed forms and integrated gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import make_model
from torch import Tensor, nn

import MedXAILib as mx
from MedXAILib import run as run_module
from MedXAILib.visual.background import k_medoids

SHAPE = (2, 4, 5, 6)


def draw(*shape: int, seed: int = 6) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scans(count: int, *shape: int) -> list[mx.Volume]:
    return [mx.Volume(draw(*shape, seed=20 + i), np.eye(4)) for i in range(count)]


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(draw(2, *SHAPE, seed=4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ncdhw,kcdhw->nk", x, self.w) + 0.3


class Quadratic(nn.Module):
    """f(x) = x'Qx over the voxels."""

    def __init__(self) -> None:
        super().__init__()
        self.q = draw(24, 24, seed=5)

    def forward(self, x: Tensor) -> Tensor:
        v = x.flatten(1)
        return ((v @ self.q) * v).sum(1, keepdim=True).repeat(1, 2)


@pytest.mark.parametrize("samples", [1, 3, 7])
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_a_linear_network_is_explained_exactly_by_any_draw(samples: int, noise: float) -> None:
    model, x, others = mx.Model(Linear(), channels=2), draw(*SHAPE), scans(3, *SHAPE)
    parameters = {"background": others, "samples": samples, "noise": noise}
    made = mx.explain(model, x, "gradient_shap", target=1, per_channel=True, **parameters)
    mean = torch.stack([o.data for o in others]).mean(0)
    expected = model.network.w.detach()[1] * (x - mean)
    torch.testing.assert_close(made.data, expected)
    assert made.residual["completeness"] < 1e-5 and not made.provenance.notes
    summed = mx.explain(model, x, "gradient_shap", target=1, **parameters)
    torch.testing.assert_close(summed.data, expected.sum(0, keepdim=True))


def test_medoids_count_for_those_they_stand_for() -> None:
    model, x, others = mx.Model(Linear(), channels=2), draw(*SHAPE), scans(7, *SHAPE)
    points = torch.stack([o.data.flatten() for o in others]).double()
    medoids, shares = k_medoids(torch.cdist(points, points), 3)
    assert len(set(shares.tolist())) > 1
    mean = sum(share * others[i].data for i, share in zip(medoids, shares.tolist(), strict=True))
    made = mx.explain(model, x, "gradient_shap", target=0, per_channel=True, background=others, baselines=3, samples=1)
    torch.testing.assert_close(made.data, model.network.w.detach()[0] * (x - mean))
    assert made.residual["completeness"] < 1e-5


def test_a_quadratic_form_is_approached() -> None:
    """x'Qx from b to x: voxel i receives (x - b)_i ((Q + Q')(x + b) / 2)_i, averaged over the b."""
    network, x, others = Quadratic(), draw(1, 2, 3, 4), scans(3, 1, 2, 3, 4)
    both = network.q + network.q.T
    v = x.flatten()
    expected = sum((v - b) * (both @ (v + b) / 2) for b in (o.data.flatten() for o in others)) / 3
    missed = []
    for samples in (12, 120, 1200):
        made = mx.explain(mx.Model(network), x, "gradient_shap", target=0, background=others, samples=samples)
        missed.append(float((made.data.flatten() - expected).norm() / expected.norm()))
    # Of a smooth path the error of one point in each part falls as the number to the power of 3/2.
    assert missed[0] < 0.3 and missed[1] < missed[0] / 8 and missed[2] < missed[1] / 8


@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
def test_one_baseline_and_many_samples_are_integrated_gradients(name: str) -> None:
    model, x, (other,) = make_model(name), draw(1, 24, 24, 16), scans(1, 1, 24, 24, 16)
    exact = mx.explain(model, x, "integrated_gradients", target=1, baseline=other, steps=150, max_steps=150).data
    missed = []
    for samples in (6, 100):
        made = mx.explain(model, x, "gradient_shap", target=1, background=other, samples=samples)
        missed.append(float((made.data - exact).norm() / exact.norm()))
    assert missed[1] < 0.1 and missed[1] < missed[0] / 4
    assert made.residual["completeness"] < 0.1


def test_the_mean_over_baselines_is_that_of_single_ones() -> None:
    model, x, others = make_model("densenet121"), draw(1, 24, 24, 16), scans(3, 1, 24, 24, 16)
    many = [mx.explain(model, x, "gradient_shap", target=1, background=o, samples=100).data for o in others]
    made = mx.explain(model, x, "gradient_shap", target=1, background=others, samples=300).data
    mean = torch.stack(many).mean(0)
    assert float((made - mean).norm() / mean.norm()) < 0.1


@pytest.mark.parametrize(("count", "samples"), [(3, 6), (1, 5), (4, 4), (2, 5)])
def test_points_lie_one_in_each_part_of_the_way(count: int, samples: int) -> None:
    class Watching(Linear):
        def forward(self, x: Tensor) -> Tensor:
            if x.requires_grad:
                at.extend(x.detach()[:, 0, 0, 0, 0].tolist())
            return super().forward(x)

    def depths(seed: int) -> list[float]:
        at.clear()
        zeros = [mx.Volume(torch.zeros(SHAPE), np.eye(4))] * count
        more = {"background": zeros, "samples": samples, "run": mx.Run(seed=seed)}
        mx.explain(mx.Model(Watching(), channels=2), torch.arange(1.0, 241).reshape(SHAPE), "gradient_shap", 0, **more)
        # The last voxel is 240 times the first, and the scan itself is looked at once to see what fits.
        return at[1:]

    at: list[float] = []
    total = -(-samples // count) * count
    for seed in range(3):
        found = depths(seed)
        assert sorted(int(depth * total) for depth in found) == list(range(total))
        # Where in its part a point lies is drawn anew for each.
        assert len({round(depth * total % 1, 4) for depth in found}) == total
    assert found != depths(0)


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_a_batch_is_its_samples_and_a_seed_its_map(noise: float) -> None:
    model, x, others = make_model("resnet18"), draw(2, 1, 24, 24, 16), scans(4, 1, 24, 24, 16)
    more = {"target": 1, "background": others, "baselines": 3, "samples": 6, "noise": noise}
    both = mx.explain(model, x, "gradient_shap", run=mx.Run(seed=3), **more).data
    for sample, together in zip(x, both, strict=True):
        alone, again = (mx.explain(model, sample, "gradient_shap", run=mx.Run(seed=3), **more).data for _ in range(2))
        assert torch.equal(alone, again)
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5 * float(together.abs().max()))
    other = mx.explain(model, x, "gradient_shap", run=mx.Run(seed=4), **more).data
    assert float((other - both).norm()) > 1e-3 * float(both.norm())


def test_noise_smooths_what_is_differentiated() -> None:
    model, x, (other,) = make_model("resnet18"), draw(1, 24, 24, 16), scans(1, 1, 24, 24, 16)
    made = mx.explain(model, x, "gradient_shap", target=1, background=other, samples=2, noise=0.2, run=mx.Run(seed=7))
    spread, gradients = x.max() - x.min(), []
    for i in range(2):
        generator = mx.Run(seed=7).generator(i)
        at = (i + float(torch.rand((), generator=generator))) / 2
        point = other.data + at * (x - other.data) + 0.2 * spread * torch.randn(x.shape, generator=generator)
        gradients.append(mx.explain(model, point, "gradient", target=1).data)
    torch.testing.assert_close(made.data, (x - other.data) * sum(gradients) / 2, rtol=1e-4, atol=1e-6)


def test_every_target_of_a_list_and_every_sample_is_paid_for() -> None:
    model, x, others = make_model("resnet18"), draw(1, 24, 24, 16), scans(2, 1, 24, 24, 16)
    more = {"background": others, "samples": 5}
    maps = mx.explain(model, x, "gradient_shap", target=[0, 2], **more)
    for index, made in zip((0, 2), maps, strict=True):
        torch.testing.assert_close(made.data, mx.explain(model, x, "gradient_shap", target=index, **more).data)
    # Three points for each baseline, for each target; the scan, two baselines and the look at what fits are forwards.
    assert (maps[0].provenance.backwards, maps[0].provenance.forwards) == (12, 6 + 4)


def test_what_is_not_accounted_for_is_said() -> None:
    class Step(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sigmoid(1e6 * (x.mean((1, 2, 3, 4)) - 0.333))[:, None].repeat(1, 2)

    made = mx.explain(mx.Model(Step()), draw(1, 4, 4, 4).abs(), "gradient_shap", target=0, background="zero")
    assert made.residual["completeness"] == pytest.approx(1)
    assert any("not accounted for" in note for note in made.provenance.notes)


def test_the_map_is_shown_as_it_becomes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "_GLIMPSE_SECONDS", 0.0)
    monkeypatch.setattr(run_module, "_GLIMPSE_SHARE", float("inf"))
    model, x, others = mx.Model(Linear(), channels=2), draw(*SHAPE), scans(2, *SHAPE)
    shown: list[Tensor] = []
    run = mx.Run(partial=lambda so_far: shown.append(so_far.data))
    made = mx.explain(model, x, "gradient_shap", target=1, background=others, samples=2, run=run)
    w = model.network.w.detach()[1]
    torch.testing.assert_close(shown[0], (w * (x - others[0].data)).sum(0, keepdim=True))
    torch.testing.assert_close(shown[-1], made.data)


def test_a_map_with_scans_in_memory_is_asked_for_again_with_them() -> None:
    """Its provenance has but their fingerprints, which no file can be read by."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(60, 2))
    model, volume = mx.Model(network, channels=1), mx.Volume(torch.rand(1, 3, 4, 5), np.eye(4))
    given = {"background": (mx.Volume(torch.rand(1, 3, 4, 5), np.eye(4)),)}
    made = mx.explain(model, volume, "gradient_shap", 1, samples=4, **given)
    with pytest.raises(mx.MedXAIError):
        mx.Judged(made, model, volume).again()
    assert torch.equal(mx.Judged(made, model, volume, given=given).again().data, made.data)
