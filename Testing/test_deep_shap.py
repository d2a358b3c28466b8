"""Deep SHAP against closed forms, DeepLIFT and captum, and in no more memory than DeepLIFT."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from captum.attr import DeepLiftShap
from conftest import NETWORKS, make_model
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import MedXAILib as mx

SHAPE = (2, 4, 5, 6)


def draw(*shape: int, seed: int = 6) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scans(count: int, *shape: int) -> list[mx.Volume]:
    return [mx.Volume(draw(*shape, seed=20 + i), np.eye(4)) for i in range(count)]


class Additive(nn.Module):
    """A weighted sum over the voxels of a function of each."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function, self.sum = function, nn.Linear(int(np.prod(SHAPE)), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.sum(self.function(x).flatten(1))


@pytest.mark.parametrize("function", [nn.LeakyReLU(1.0), nn.ReLU(), nn.Tanh(), nn.GELU()], ids=str)
def test_a_sum_over_voxels_is_explained_by_its_terms(function: nn.Module) -> None:
    """The Shapley value of a voxel is then what its term has more than on average over the background: of a linear
    network, its weight times its difference from the mean of the background."""
    torch.manual_seed(0)
    network, x, others = Additive(function), draw(*SHAPE), scans(4, *SHAPE)
    made = mx.explain(mx.Model(network, channels=2), x, "deep_shap", target=1, background=others, per_channel=True)
    with torch.no_grad():
        mean = torch.stack([function(o.data) for o in others]).mean(0)
        expected = network.sum.weight[1].reshape(SHAPE) * (function(x) - mean)
    torch.testing.assert_close(made.data, expected, rtol=1e-4, atol=1e-5)
    assert made.residual["completeness"] < 1e-5


def change(model: mx.Model, x: Tensor, others: list[mx.Volume], weights: list[float], target: int) -> float:
    with torch.no_grad():
        network = model.network.eval()
        start = sum(w * float(network(o.data[None])[0, target]) for w, o in zip(weights, others, strict=True))
        return float(network(x[None])[0, target]) - start


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "vit"])
def test_it_adds_up_to_the_change_from_the_mean_of_the_background(name: str) -> None:
    model, size = make_model(name), NETWORKS[name][2]
    if name == "vit":
        model = mx.Model(_First(model.network), class_names=model.class_names)
    x, others = draw(1, *size), scans(3, 1, *size)
    made = mx.explain(model, x, "deep_shap", target=1, background=others)
    expected = change(model, x, others, [1 / 3] * 3, 1)
    assert float(made.data.double().sum()) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert made.residual["completeness"] < 1e-4


class _First(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)[0]


def test_medoids_count_for_those_they_stand_for() -> None:
    """Two kinds of scans, three of one and one of the other, of which two stand for all."""
    model = make_model("resnet18")
    x, kinds = draw(1, 24, 24, 16), scans(2, 1, 24, 24, 16)
    four = [kinds[0], kinds[1], kinds[1], kinds[1]]
    two = mx.explain(model, x, "deep_shap", target=1, background=four, baselines=2)
    torch.testing.assert_close(
        two.data, mx.explain(model, x, "deep_shap", target=1, background=four).data, rtol=1e-4, atol=1e-6
    )
    assert float(two.data.double().sum()) == pytest.approx(change(model, x, kinds, [0.25, 0.75], 1), rel=1e-4)


@pytest.mark.parametrize("name", ["resnet18", "unet"])
def test_it_is_the_mean_of_deeplift(name: str) -> None:
    model, size = make_model(name), NETWORKS[name][2]
    x, others = draw(1, *size), scans(3, 1, *size)
    alone = [mx.explain(model, x, "deeplift", target=1, baseline=o).data for o in others]
    made = mx.explain(model, x, "deep_shap", target=1, background=others)
    torch.testing.assert_close(made.data, torch.stack(alone).mean(0), rtol=1e-4, atol=1e-6)
    own = [mx.explain(model, x, "deeplift", target=1, baseline=b).data for b in ("zero", "minimum", "mean", "blur")]
    torch.testing.assert_close(
        mx.explain(model, x, "deep_shap", target=1).data, torch.stack(own).mean(0), rtol=1e-4, atol=1e-6
    )


def _plain() -> nn.Module:
    """Convolutions, batch norm and ReLU, no module used twice: where captum is right."""
    torch.manual_seed(3)
    network = nn.Sequential(
        *(nn.Conv3d(2, 6, 3, padding=1), nn.BatchNorm3d(6), nn.ReLU(), nn.AvgPool3d(2)),
        *(nn.Conv3d(6, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU(), nn.AdaptiveAvgPool3d(2), nn.Flatten()),
        *(nn.Linear(64, 10), nn.ReLU(), nn.Linear(10, 3)),
    )
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 2.0)
    return network.eval()


def test_it_equals_captum_where_captum_is_right() -> None:
    network, x, others = _plain(), draw(2, 2, 10, 12, 8), scans(5, 2, 10, 12, 8)
    expected = DeepLiftShap(network).attribute(x, torch.stack([o.data for o in others]), target=2).detach()
    made = mx.explain(mx.Model(network), x, "deep_shap", target=2, background=others, per_channel=True)
    torch.testing.assert_close(made.data, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def test_a_batch_is_its_samples_and_every_target_of_a_list_its_own() -> None:
    model, x, others = make_model("resnet18"), draw(2, 1, 24, 24, 16), scans(4, 1, 24, 24, 16)
    more = {"background": others, "baselines": 2}
    both = mx.explain(model, x, "deep_shap", target=[0, 2], **more)
    for index, made in zip((0, 2), both, strict=True):
        for sample, together in zip(x, made.data, strict=True):
            alone = mx.explain(model, sample, "deep_shap", target=index, **more).data
            torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-5 * float(alone.abs().max()))


def peak(work: Callable[[], object]) -> int:
    """The most bytes that tensors made inside held at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    changes = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = np.cumsum([e.nbytes() for e in sorted(changes, key=lambda e: e.start_ns())])
    return int(held.max())


def _thin() -> mx.Model:
    """A network that keeps so little that ten baselines would be most of it."""
    return mx.Model(
        nn.Sequential(nn.Conv3d(1, 1, 3), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(1, 2))
    )


@pytest.mark.parametrize("method", ["deep_shap", "gradient_shap"])
@pytest.mark.parametrize("make", [_thin, lambda: make_model("resnet18")], ids=["thin", "resnet18"])
def test_ten_baselines_take_hardly_more_memory_than_one(method: str, make: Callable[[], mx.Model]) -> None:
    model, x, others = make(), draw(1, 32, 32, 32), scans(10, 1, 32, 32, 32)

    def explain(count: int) -> mx.SaliencyMap:
        samples = {"samples": count} if method == "gradient_shap" else {}
        return mx.explain(model, x, method, target=1, background=others[:count], **samples)

    one, ten = (peak(lambda count=count: explain(count)) for count in (1, 10))
    assert ten < 1.2 * one


def test_progress_counts_scans_and_baselines() -> None:
    steps: list[mx.Progress] = []
    model, x, others = make_model("resnet18"), draw(1, 24, 24, 16), scans(3, 1, 24, 24, 16)
    run = mx.Run(progress=steps.append)
    mx.explain(model, x, "deep_shap", target=1, background=others, baselines=2, run=run)
    said = [(s.done, s.total, s.message) for s in steps]
    choosing = [(i, 3, "Choosing background scans") for i in range(3)]
    assert [s for s in said if s in choosing] == choosing
    comparing = [(i, 2, "Deep SHAP: baselines") for i in range(2)]
    assert [s for s in said if s in comparing] == comparing
