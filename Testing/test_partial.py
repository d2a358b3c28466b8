"""Maps that are not finished yet: what is shown of them is what the method would say with what it has so far."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_model
from torch import Tensor

import MedXAILib as mx
from MedXAILib import run as run_module
from MedXAILib.engines.capture import capture
from MedXAILib.explainer import Question
from MedXAILib.run import Partial

VOLUME = mx.Volume(torch.randn(1, 24, 24, 16, generator=torch.Generator().manual_seed(1)), np.diag([2.0, 1, 1, 1]))


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is shown, however soon."""
    monkeypatch.setattr(run_module, "_GLIMPSE_SECONDS", 0.0)
    monkeypatch.setattr(run_module, "_GLIMPSE_SHARE", float("inf"))


def watched(method: str, volume: Any = VOLUME, **parameters: Any) -> tuple[mx.SaliencyMap, list[Tensor]]:
    shown: list[Tensor] = []
    run = mx.Run(memory_budget=1, partial=lambda so_far: shown.append(so_far.data))
    return mx.explain(make_model("resnet18"), volume, method, target="malignant", run=run, **parameters), shown


def plain(method: str, volume: Any = VOLUME, **parameters: Any) -> mx.SaliencyMap:
    run = mx.Run(memory_budget=1)
    return mx.explain(make_model("resnet18"), volume, method, target="malignant", run=run, **parameters)


# Each with its parameter that says how far it goes, and how far it is each time something is shown.
GROWING = {
    "SmoothGrad": ("smoothgrad", {}, "samples", [2, 3]),
    "VarGrad": ("vargrad", {}, "samples", [2, 3]),
    "SquareGrad": ("smoothgrad", {"statistic": "squared"}, "samples", [2, 3]),
    "of channels": ("smoothgrad", {"per_channel": True}, "samples", [2, 3]),
    "times the scan": ("gradient", {"form": "times_input"}, "samples", [2, 3]),
    "integrated gradients": ("integrated_gradients", {"steps": 2, "tolerance": 0}, "max_steps", [2, 6]),
    "integrated gradients of copies": (
        "integrated_gradients",
        {"steps": 2, "max_steps": 6, "tolerance": 0},
        "samples",
        [2, 3],
    ),
}


@pytest.mark.parametrize("what", GROWING)
def test_what_is_shown_is_the_map_so_far(what: str) -> None:
    method, parameters, name, steps = GROWING[what]
    largest = 18 if name == "max_steps" else 3
    found, shown = watched(method, **parameters, **{name: largest})
    assert torch.equal(found.data, plain(method, **parameters, **{name: largest}).data)
    for so_far in steps:
        expected = plain(method, **parameters, **{name: so_far}).data
        assert sum(torch.equal(one, expected) for one in shown) == 1
    assert len(shown) == len(steps) + (name == "samples")


def test_score_cam_shows_what_the_clusters_asked_so_far_say() -> None:
    found, shown = watched("scorecam", layers=("layer4",), clusters=4)
    assert (
        len(shown) == 4
        and torch.equal(shown[-1], found.data)
        and torch.equal(found.data, plain("scorecam", layers=("layer4",), clusters=4).data)
    )
    # Of the first channel alone, its share is all of it, whatever its score.
    _, shown = watched("scorecam", layers=("layer4",), clusters=0)
    network = make_model("resnet18")
    with network.ready(), torch.no_grad():
        question = Question(network, VOLUME.data[None], [network.prepare(VOLUME)], [mx.ClassTarget(1)])
        layer = capture(question, ("layer4",))[1]["layer4"]
    torch.testing.assert_close(shown[0], layer.place(layer.raw[:, :1].detach().relu())[0])
    _, of_two = watched("scorecam", layers=("layer3", "layer4"), clusters=4)
    assert not of_two


def test_it_is_on_the_grid_of_the_volume(oblique: mx.Volume) -> None:
    found, shown = watched("smoothgrad", oblique, samples=2)
    assert shown[-1].shape == oblique.data.shape and torch.equal(shown[-1], found.data)


def test_of_a_patch_only_the_patch_is_handed_over(oblique: mx.Volume) -> None:
    shown: list[Partial] = []
    network = make_model("resnet18", patch_size=(8, 12, 10))
    run = mx.Run(memory_budget=1, partial=shown.append)
    centre = tuple(oblique.to_point((9, 16, 13)))
    found = mx.explain(network, oblique, "smoothgrad", target=1, region=centre, run=run, samples=2)
    assert shown[-1].part.shape == (1, 8, 12, 10) and torch.equal(shown[-1].data, found.data) and found.data.any()


def test_what_was_shown_does_not_change_any_more() -> None:
    shown: list[tuple[Tensor, Tensor]] = []
    run = mx.Run(memory_budget=1, partial=lambda so_far: shown.append((so_far.part, so_far.part.clone())))
    mx.explain(make_model("resnet18"), VOLUME, "smoothgrad", target=1, run=run, samples=4, per_channel=True)
    assert len(shown) == 4 and all(torch.equal(now, then) for now, then in shown)


def test_of_a_batch_or_an_ensemble_nothing_is_shown() -> None:
    shown: list[Partial] = []
    run = mx.Run(partial=shown.append)
    batch = torch.stack([VOLUME.data, VOLUME.data.flip(1)])
    mx.explain(make_model("resnet18"), batch, "smoothgrad", run=run, samples=2)
    mx.explain(mx.Ensemble([make_model("resnet18")] * 2), VOLUME, "smoothgrad", run=run, samples=2)
    assert not shown


def test_memory_that_looking_on_lacks_costs_nothing_else() -> None:
    def starved(_so_far: Partial) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    found = mx.explain(
        make_model("resnet18"),
        VOLUME,
        "smoothgrad",
        target="malignant",
        samples=3,
        run=mx.Run(memory_budget=1, partial=starved),
    )
    assert torch.equal(found.data, plain("smoothgrad", samples=3).data) and not found.provenance.notes


def test_looking_on_takes_a_small_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    now, spent = 100.0, []
    monkeypatch.setattr(run_module.time, "monotonic", lambda: now)
    run = mx.Run()

    def show() -> None:
        nonlocal now
        cost = 0.5 if not spent else 0.001
        spent.append((now, cost))
        now += cost

    for _ in range(3000):
        now += 0.01
        run.glimpse(show)
    times = [when for when, _ in spent]
    # The first after a second; then what half a second is a twentieth of; then each second.
    assert times[:3] == pytest.approx([101, 111.5, 112.5], abs=0.02) and len(times) == pytest.approx(20, abs=1)


def test_ending_early_gives_what_was_shown_last() -> None:
    found, shown = watched("occlusion", window=(6,))
    covered = [int(so_far.count_nonzero()) for so_far in shown]
    assert len(shown) > 3 and covered == sorted(set(covered)) and torch.equal(shown[-1], found.data)
    asked: list[int] = []
    run = mx.Run(memory_budget=1, partial=lambda so_far: None, enough=lambda: bool(asked.append(1)) or len(asked) > 1)
    early = mx.explain(make_model("resnet18"), VOLUME, "occlusion", target="malignant", run=run, window=(6,))
    assert early.provenance.partial and not found.provenance.partial
    assert torch.equal(early.data, shown[1])
