"""Changes of the scan that nobody sees: maps that survive them are told from those that do not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from captum.attr import Saliency
from captum.metrics import sensitivity_max
from conftest import oblique_affine
from torch import Tensor, nn
from torch.nn import functional

import MedXAILib as mx
from MedXAILib.trust import stability
from MedXAILib.trust.judged import Judged

GRID = np.diag([2.0, 1.0, 1.0, 1.0])


def volume(seed: int = 0, shape: tuple[int, ...] = (1, 6, 9, 9)) -> mx.Volume:
    return mx.Volume(torch.rand(shape, generator=torch.Generator().manual_seed(seed)), GRID)


class Ask(nn.Module):
    """From a scan to two scores, by a function of it."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        score = self.function(x).flatten(1).sum(1)
        return torch.stack([score, -score], 1)


def judged(network: nn.Module, scan: mx.Volume, **known: object) -> Judged:
    model = mx.Model(network, channels=scan.data.shape[0], spatial_dims=3)
    return Judged(mx.explain(model, scan, "gradient", 0, **known), model, scan)  # type: ignore[arg-type]


def found(function, scan: mx.Volume):
    return stability.judge(judged(Ask(function), scan))


@pytest.fixture
def asked(monkeypatch) -> list[mx.Volume]:
    """The scans that were explained anew."""
    told, again = [], Judged.again

    def watched(self: Judged, **given: mx.Volume) -> mx.SaliencyMap:
        told.append(given["volume"])
        return again(self, **given)

    monkeypatch.setattr(Judged, "again", watched)
    return told


def test_the_gradient_of_a_linear_network_is_perfectly_stable() -> None:
    weights = torch.randn(1, 6, 9, 9, generator=torch.Generator().manual_seed(1))
    scan = volume()
    told = found(lambda x: x * weights, scan)
    for name in ("noise", "noise_overlap", "shift", "shift_overlap"):
        assert told.values[name] == pytest.approx(1)
    assert told.light == "good" and "The map stays (1.00 alike or more)" in told.sentence
    assert told.values["answer"] == pytest.approx(float((scan.data * weights).sum()), rel=1e-5)
    moved = torch.cat([scan.data[..., :1], scan.data[..., :-1]], -1)
    assert told.values["answer_shift"] == pytest.approx(
        abs(float(((moved - scan.data) * weights).sum()) / told.values["answer"]), rel=1e-4
    )
    # Weights that are not symmetric do not mirror.
    mirrored = np.corrcoef(weights.flatten(), weights.flip(-1).flatten())[0, 1]
    assert told.values["flip"] == pytest.approx(mirrored, abs=1e-5)


def test_a_map_that_moves_with_the_scan_is_moved_back() -> None:
    # The gradient of the sum of squares is the scan.
    scan = volume()
    told = found(lambda x: x**2 / 2, scan)
    assert told.values["shift"] == pytest.approx(1) and told.values["flip"] == pytest.approx(1)
    # The scan, and the scan with noise of 1 % of its spread, correlate by 1 / sqrt(1 + 0.01 ** 2).
    assert 1 - told.values["noise"] == pytest.approx(0.5 * 0.01**2, rel=0.2)


def test_the_noise_is_that_of_the_map_s_own_place_and_of_each_channel(asked) -> None:
    scan = volume(shape=(2, 6, 20, 20))
    scan.data[1] *= 50
    scan.data[:, :, :10] *= 1000
    about = judged(Ask(lambda x: x[:, :, :, 10:] ** 2), scan)
    stability.judge(about)
    added = (asked[0].data - scan.data)[:, :, 10:]
    for of_channel, values in zip(added, scan.data[:, :, 10:], strict=True):
        assert float(of_channel.std()) == pytest.approx(0.01 * float(values.std()), rel=0.05)
    asked.clear()
    stability.max_sensitivity(about, radius=0.1, draws=2)
    for near in asked:
        for of_channel, values in zip((near.data - scan.data)[:, :, 10:], scan.data[:, :, 10:], strict=True):
            reach = 0.1 * float(values.std())
            # Even in the ball: as far as its surface, and with the standard deviation of what is even.
            assert 0.99 * reach < float(of_channel.abs().max()) < 1.001 * reach
            assert float(of_channel.std()) == pytest.approx(reach / 3**0.5, rel=0.05)


@pytest.mark.parametrize("known", [{}, {"per_channel": True}, {"form": "times_input"}])
def test_max_sensitivity_is_that_of_captum_for_the_same_scans(asked, known) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(2, 4, 3), nn.Tanh(), nn.Conv3d(4, 3, 3, 2), nn.Tanh(), nn.Flatten())
    network.append(nn.Linear(network(torch.zeros(1, 2, 7, 11, 9)).shape[1], 2))
    scan = mx.Volume(volume(3, (2, 7, 11, 9)).data, oblique_affine())
    ours = stability.max_sensitivity(judged(network, scan, **known), radius=0.5, draws=6)

    def theirs(inputs: Tensor | tuple[Tensor]) -> tuple[Tensor]:
        x = inputs[0] if isinstance(inputs, tuple) else inputs
        gradient = Saliency(network).attribute(x.requires_grad_(), 0, abs=False)
        gradient = gradient * x.detach() if known.get("form") else gradient
        # As a tuple, without which captum takes the channels of the map for maps.
        return (gradient if known.get("per_channel") else gradient.sum(1, keepdim=True),)

    near = torch.stack([each.data for each in asked])
    expected = sensitivity_max(theirs, scan.data[None], lambda _: near, n_perturb_samples=6)
    assert len(asked) == 6 and ours == pytest.approx(float(expected), rel=1e-5)


def test_max_sensitivity_of_a_linear_and_of_a_quadratic_network() -> None:
    scan = volume()
    weights = volume(1).data - 0.5
    assert stability.max_sensitivity(judged(Ask(lambda x: x * weights), scan)) == 0
    # Also where the map is even, of which no correlation can be told.
    assert stability.max_sensitivity(judged(Ask(lambda x: x), scan)) == 0
    # The gradient of the sum of squares is the scan, and what is even in a ball is a third of its square on average.
    about = judged(Ask(lambda x: x**2 / 2), scan)
    bound = float(scan.data.std(correction=0) / scan.data.square().mean().sqrt())
    assert stability.max_sensitivity(about, 0.2) == pytest.approx(0.2 * bound / 3**0.5, rel=0.1)
    assert stability.max_sensitivity(about, 0.4) == pytest.approx(2 * stability.max_sensitivity(about, 0.2), rel=1e-4)
    # What is in the card is of one scan with noise of that standard deviation.
    assert stability.judge(about).values["sensitivity"] == pytest.approx(0.01 * bound, rel=0.1)


def test_more_draws_find_more_and_the_seed_decides_which() -> None:
    def largest(draws: int, seed: int = 1) -> float:
        about = judged(Ask(lambda x: torch.exp(3 * x)), volume(), run=mx.Run(seed=seed))
        return stability.max_sensitivity(about, draws=draws)

    found = [largest(draws) for draws in (1, 2, 4, 8)]
    assert found == sorted(found) and found[0] < found[-1]
    assert largest(4) == found[2] != largest(4, seed=2)


def test_max_sensitivity_can_be_cancelled_and_needs_a_map() -> None:
    with pytest.raises(mx.MedXAIError, match="zero everywhere"):
        stability.max_sensitivity(judged(Ask(lambda x: 0 * x), volume()))
    steps = []
    about = judged(Ask(lambda x: x**2), volume())
    run = mx.Run(progress=steps.append, cancel=lambda: len(steps) == 3)
    with pytest.raises(mx.Cancelled):
        stability.max_sensitivity(replace(about, run=run))
    assert [(s.done, s.total) for s in steps] == [(0, 10), (1, 10), (2, 10)]


def test_a_map_that_faint_noise_overturns_is_found_out_and_the_scan_is_left_alone() -> None:
    scan = volume()
    before = scan.data.clone()
    told = found(lambda x: torch.cos(3000 * x) / 3000, scan)
    assert told.light == "poor" and told.values["noise"] < 0.4
    assert "becomes another one" in told.sentence and "faint noise (1%)" in told.sentence
    assert torch.equal(scan.data, before)
    assert told == found(lambda x: torch.cos(3000 * x) / 3000, scan)


def test_a_map_on_a_coarse_lattice_does_not_survive_a_shift() -> None:
    # Only every other voxel is read, so what moves by one falls between.
    told = found(lambda x: (x[..., ::2] - 0.5) ** 2, volume(shape=(1, 6, 9, 41)))
    assert told.values["noise"] > 0.99 and told.values["shift"] < 0.3
    assert told.light == "poor" and "when the scan moves by one voxel" in told.sentence


def test_it_says_so_when_it_is_the_network_that_is_unstable() -> None:
    steady = found(lambda x: x.sum() * torch.ones_like(x) + x**2, volume())
    assert "network" not in steady.sentence
    scan = volume()
    middle = float(scan.data.mean())
    told = found(lambda x: (x - middle) ** 3, scan)
    assert max(told.values["answer_noise"], told.values["answer_shift"]) > stability.MOVED
    assert "it is the network that is unstable" in told.sentence


def test_the_scan_is_mirrored_at_the_middle_of_what_the_network_sees() -> None:
    scan = volume(shape=(1, 6, 9, 21))
    pull = functional.pad(torch.ones(1, 1, 4, 4, 4), (1, 1, 1, 1, 1, 1))
    model = mx.Model(Ask(lambda x: x**2 * pull), channels=1, spatial_dims=3, patch_size=(6, 6, 6))
    made = mx.explain(model, scan, "gradient", 0, region=tuple(scan.to_point((2.5, 3.5, 6.5))))
    told = stability.judge(Judged(made, model, scan))
    assert told.values["flip"] == pytest.approx(1)
    assert told.values["shift"] > 0.9


def test_a_map_without_anything_in_it_says_nothing() -> None:
    told = found(lambda x: x, volume())
    assert told.light is None and told.values == {}
