"""The table of what maps show and depend on: it says what was measured, and its tests can tell good maps from bad."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import MedXAILib as mx
from benchmarks.sanity import page, patches, prose, rows
from benchmarks.sanity.bench import randomised
from benchmarks.sanity.measures import located
from benchmarks.sanity.patches import STAGES, Patches
from MedXAILib import resources
from MedXAILib.networks.lung_nodule import LungNoduleClassifier
from MedXAILib.report.localisation import localise
from MedXAILib.trust.likeness import Looks, likeness
from MedXAILib.trust.randomisation import cascade

AGAIN = "run: python -m benchmarks.sanity"


def test_the_page_says_what_was_measured() -> None:
    assert page.PAGE.read_text(encoding="utf-8") == page.markdown(page.results(), page.width()), AGAIN


def test_every_method_is_in_the_table_with_the_settings_it_has_now() -> None:
    measured = {row["name"]: row["parameters"] for row in page.results()}
    assert measured == {row.name: dict(row.parameters) for row in rows.every()}, AGAIN


@pytest.fixture(scope="module")
def verdicts() -> dict[str, tuple[str, str]]:
    """What the table would say of three explainers of a network whose gradient is known: its weights."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(10**3, 40), nn.Linear(40, 2))
    model = mx.Model(network, channels=1, spatial_dims=3)
    some = Patches(torch.rand(4, 1, 10, 10, 10), torch.rand(4, 1, 10, 10, 10) > 0.9, torch.tensor([0, 1, 0, 1]))
    cascades = [[replace(model, network=n) for n in cascade(network, ("2", "1"), some.images, s)] for s in range(3)]

    def closed_form(model: mx.Model, x: Tensor, labels: Tensor) -> Tensor:
        first, last = model.network[1].weight, model.network[2].weight  # type: ignore[index]
        return (last @ first)[labels].reshape(-1, *x.shape[2:]).detach()

    def blind(model: mx.Model, x: Tensor, labels: Tensor) -> Tensor:
        """Half of it is the scan, wherever the network looks."""
        gradient = closed_form(model, x, labels)
        return x[:, 0] - 0.5 + gradient / gradient.std() / 10

    explainers = {"Gradient": closed_form, rows.EDGES.name: rows.EDGES.maps, "blind": blind}
    found = [{"name": name} | randomised(maps, model, cascades, some) for name, maps in explainers.items()]
    limits = page.thresholds(found)
    return {row["name"]: (page.of_top(row, limits), page.of_weights(row, limits)) for row in found}


def test_an_edge_detector_fails(verdicts: dict[str, tuple[str, str]]) -> None:
    assert verdicts[rows.EDGES.name] == ("**fails**", "**fails**")


def test_the_gradient_passes(verdicts: dict[str, tuple[str, str]]) -> None:
    assert verdicts["Gradient"] == ("passes", "passes")


def test_a_picture_of_the_scan_with_a_little_gradient_fails(verdicts: dict[str, tuple[str, str]]) -> None:
    assert verdicts["blind"] == ("**fails**", "**fails**")


def test_draws_that_disagree_decide_nothing() -> None:
    assert page.verdict([0.2, 0.8, 0.5], 0.55) == "undecided"
    assert page.verdict([0.40, 0.41, 0.42], 0.5) == "passes"
    assert page.verdict([0.60, 0.61, 0.62], 0.5) == "**fails**"


def test_who_does_not_pass_is_told_why() -> None:
    found = [row for row in page.results() if "refused" not in row]
    limits = page.thresholds(found)
    assert all(page.of_weights(row, limits) == "passes" for row in found if row["method"])
    not_passed = {row["name"] for row in found if row["method"] and page.of_top(row, limits) != "passes"}
    assert not_passed <= set(prose.FAILS)
    assert {"Guided backpropagation", "Deconvolution"} <= not_passed
    for reference in rows.REFERENCES:
        row = next(row for row in found if row["name"] == reference.name)
        assert (page.of_top(row, limits), page.of_weights(row, limits)) == ("**fails**", "**fails**")


def test_a_peak_and_its_mass_are_those_of_the_report() -> None:
    maps = torch.randn(3, 6, 5, 4, generator=torch.Generator().manual_seed(3))
    maps[2] = -maps[2].abs()
    masks = torch.zeros(3, 1, 6, 5, 4, dtype=torch.bool)
    masks[0, 0].view(-1)[maps[0].argmax()] = True
    masks[1, 0, :2] = True
    masks[2, 0].view(-1)[maps[2].argmin()] = True
    model = mx.Model(nn.Sequential(nn.Flatten(), nn.Linear(120, 2)), channels=1, spatial_dims=3)
    explanation = mx.explain(model, torch.rand(1, 6, 5, 4), "gradient", target=0)
    for one, mask in zip(maps, masks, strict=True):
        told = localise(replace(explanation, data=one[None]), mx.Volume(mask.float(), np.eye(4)))
        found = located(one[None], mask[None])
        assert found["peak"] == told.hit
        assert found["mass"] == pytest.approx(told.mass, abs=1e-6)
    assert [located(maps[i : i + 1], masks[i : i + 1])["peak"] for i in (0, 2)] == [1.0, 1.0]


def test_likeness_of_maps_that_can_be_worked_out() -> None:
    one = torch.tensor([[1.0, -2.0, 2.0, 4.0] + [0.0] * 36])
    same, turned = likeness(Looks.of(one), Looks.of(3 * one)), likeness(Looks.of(one), Looks.of(-one))
    assert same == pytest.approx({"signed": 1.0, "correlation": 1.0, "rank": 1.0, "overlap": 1.0})
    assert turned == pytest.approx({"signed": -1.0, "correlation": 1.0, "rank": 1.0, "overlap": 1.0})
    even = likeness(Looks.of(one), Looks.of(torch.ones_like(one)))
    assert (even["correlation"], even["rank"]) == (0.0, 0.0)
    empty = likeness(Looks.of(torch.zeros_like(one)), Looks.of(torch.zeros_like(one)))
    assert empty == {"signed": 0.0, "correlation": 0.0, "rank": 0.0, "overlap": 0.0}
    # Ranks 1.5 1.5 3 4 and 1 2 3 4: deviations -1 -1 .5 1.5 and -1.5 -.5 .5 1.5.
    ties = likeness(Looks.of(torch.tensor([[1.0, -1.0, 2.0, 3.0]])), Looks.of(torch.tensor([[1.0, 2.0, 3.0, 4.0]])))
    assert ties["rank"] == pytest.approx(4.5 / (4.5 * 5) ** 0.5)


def test_weights_are_re_drawn_from_the_output_back_and_the_network_keeps_its_own() -> None:
    torch.manual_seed(0)
    network, x = LungNoduleClassifier(width=2).eval(), torch.rand(3, 1, 24, 24, 24)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    steps = list(cascade(network, STAGES, x, seed=1))
    for n, step in enumerate(steps, start=1):
        weights = {name: value for name, value in step.state_dict().items() if name.endswith("weight")}
        convolved = {name for name, value in weights.items() if value.ndim == 5 or "head" in name}
        changed = {name for name in convolved if not torch.equal(weights[name], before[name])}
        assert changed == {name for name in convolved if name.startswith(STAGES[:n])}
        assert not step.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    other = list(cascade(network, STAGES, x, seed=2))
    assert not torch.equal(other[0].class_head.weight, steps[0].class_head.weight)
    # Batch normalisation knows the patches.
    with torch.no_grad():
        stem = steps[-1].stem[:2](x)
    assert torch.allclose(stem.mean((0, 2, 3, 4)), torch.zeros(2), atol=1e-4)


def test_every_layer_is_re_drawn_once_and_with_a_seed_of_its_own() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    first, second = cascade(network, ("1", "0"), torch.rand(2, 4), seed=0)
    assert torch.equal(first[1].weight, second[1].weight)  # type: ignore[index]
    assert not torch.equal(second[0].weight, second[1].weight)  # type: ignore[index]


def test_the_bench_asks_the_shipped_network_about_cases_it_is_right_about() -> None:
    model = patches.demo_model()
    cases = patches.real(model)
    assert model.fingerprint == mx.load_model(resources.path("Models/lung_nodule")).fingerprint
    with model.ready(), torch.no_grad():
        assert torch.equal(model.forward(cases.images).argmax(1), cases.labels)
    assert len(cases) == patches.REAL
    middles = torch.stack([mask[0].nonzero().float().mean(0) for mask in cases.masks])
    assert (middles - 19.5).abs().amax() <= patches.SHIFT + 1
    assert (middles - 19.5).norm(dim=1).mean() > 8


def test_each_stage_of_each_draw_is_compared_with_the_network_itself_and_the_last_with_each_other() -> None:
    drawn = torch.randn(5, 2, 4, 4, 4, generator=torch.Generator().manual_seed(5))
    some = Patches(drawn[0], drawn[0] > 1, torch.zeros(2))
    # Here a "network" is its own map.
    found = randomised(lambda network, x, labels: network, drawn[0], [[drawn[1], drawn[2]], [drawn[3], drawn[4]]], some)  # type: ignore[arg-type, list-item, return-value]
    own, *others = map(Looks.of, drawn)
    assert found["cascade"] == [
        [likeness(own, look) for look in others[:2]],
        [likeness(own, look) for look in others[2:]],
    ]
    peaks = [located(drawn[i], some.masks)["peak"] for i in (2, 4)]
    assert found["untrained"] == {**likeness(others[1], others[3]), "peak": sum(peaks) / 2}
