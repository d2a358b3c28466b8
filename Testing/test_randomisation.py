"""The network forgets what it learnt: maps that do not notice are found out, and the network itself is left alone."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from monai.networks import nets
from torch import Tensor, nn

import MedXAILib as mx
from MedXAILib import registry, resources
from MedXAILib.explainer import Attribution, Explainer, Question, backpropagation
from MedXAILib.trust import discrimination, randomisation
from MedXAILib.trust.judged import Judged
from MedXAILib.trust.likeness import STRONGEST, correlation, extent, overlap
from MedXAILib.trust.randomisation import cascade, independent, layers

sys.path.insert(0, str(Path(__file__).parent))
from small_explanations import NODULE, chest


class Edges(Explainer):
    """How steep the scan is, whatever the network."""

    id: ClassVar[str] = "edges"
    title: ClassVar[str] = "Edges"
    paper: ClassVar[str] = ""
    taxonomy: ClassVar = backpropagation("", "")

    def attribute(self, question: Question) -> list[Attribution]:
        x = question.x
        question.bind()
        steep = torch.stack(torch.gradient(x, dim=tuple(range(2, x.ndim)))).norm(dim=0)
        return [Attribution(steep) for _ in question.targets]


class Even(Edges):
    id: ClassVar[str] = "even"

    def attribute(self, question: Question) -> list[Attribution]:
        return [Attribution(torch.full_like(a.values, 0.1)) for a in super().attribute(question)]


class OfTheTrained(Edges):
    """Edges, but nothing at all of a network that is not the one of which `trained` is the first weight."""

    id: ClassVar[str] = "of_the_trained"
    trained: ClassVar[Tensor]

    def attribute(self, question: Question) -> list[Attribution]:
        same = torch.equal(question.model.network.class_head.weight, self.trained)
        return [Attribution(a.values * same) for a in super().attribute(question)]


@pytest.fixture(scope="module")
def demo() -> tuple[mx.Model, mx.Volume]:
    return mx.load_model(resources.path("Models/lung_nodule")), chest()


def judged(demo: tuple[mx.Model, mx.Volume], method: str, **parameters: object) -> Judged:
    model, scan = demo
    return Judged(mx.explain(model, scan, method, "malignant", NODULE, **parameters), model, scan)  # type: ignore[arg-type]


def test_an_edge_detector_that_poses_as_an_explainer_is_found_out(
    demo: tuple[mx.Model, mx.Volume], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.EXPLAINERS, "edges", Edges)
    found = randomisation.judge(judged(demo, "edges"))
    assert found.light == "poor" and found.values["likeness"] == pytest.approx(1)
    assert "barely changed (1.00 alike)" in found.sentence
    told_apart = discrimination.judge(judged(demo, "edges"))
    assert told_apart is not None and told_apart.light == "poor"
    assert "The map for 'benign' looks the same (1.00 alike)" in told_apart.sentence


def test_the_gradient_passes_and_guided_backpropagation_does_not(demo: tuple[mx.Model, mx.Volume]) -> None:
    before = {name: value.clone() for name, value in demo[0].network.state_dict().items()}
    flags = [parameter.requires_grad for parameter in demo[0].network.parameters()]
    gradient, guided = (randomisation.judge(judged(demo, m)) for m in ("gradient", "guided_backprop"))
    assert gradient.light == "good" and gradient.values["likeness"] < 0.3
    assert guided.light == "poor" and guided.values["likeness"] > 0.85
    assert (guided.values["layers"], guided.values["scrambled"]) == (6, 2)
    assert gradient.values["lowest"] < gradient.values["likeness"] < gradient.values["highest"]
    assert all(torch.equal(value, before[name]) for name, value in demo[0].network.state_dict().items())
    assert flags == [parameter.requires_grad for parameter in demo[0].network.parameters()]
    assert not any(module._forward_pre_hooks for module in demo[0].network.modules())


def test_what_it_costs_is_three_explanations_and_a_look_at_the_layers(demo: tuple[mx.Model, mx.Volume]) -> None:
    asked = judged(demo, "gradient")
    randomisation.judge(asked)
    assert (asked.run.cost.forwards, asked.run.cost.backwards) == (5, 3)


def test_a_map_that_becomes_empty_has_changed_and_an_even_one_says_nothing(
    demo: tuple[mx.Model, mx.Volume], monkeypatch: pytest.MonkeyPatch
) -> None:
    OfTheTrained.trained = demo[0].network.class_head.weight.detach().clone()
    for kind in (OfTheTrained, Even):
        monkeypatch.setitem(registry.EXPLAINERS, kind.id, kind)
    found = randomisation.judge(judged(demo, "of_the_trained"))
    assert found.light == "good" and found.values["likeness"] == 0
    even = Judged(_even(demo), *demo)
    for check in (randomisation.judge, discrimination.judge):
        told = check(even)
        assert told is not None and told.light is None and told.values == {}


def _even(demo: tuple[mx.Model, mx.Volume]) -> mx.SaliencyMap:
    made = mx.explain(*demo, "even", "malignant", NODULE)
    # The patch ends between the voxels of the scan.
    return replace(made, data=(made.data != 0).float() * 0.1)


def test_layers_come_from_the_output_back_with_their_normalisations(demo: tuple[mx.Model, mx.Volume]) -> None:
    with judged(demo, "gradient").asked() as (question, _):
        found = layers(question)
        assert not any(parameter.requires_grad for parameter in question.model.network.parameters())
    assert found == [
        ("class_head",),
        ("evidence.block.1", "evidence.block.0"),
        ("shape.1.1", "shape.1.0"),
        ("shape.0.1", "shape.0.0"),
        ("texture.0.1", "texture.0.0"),
        ("stem.1", "stem.0"),
    ]


def test_layers_that_the_target_does_not_see_are_left_out() -> None:
    model = mx.Model(nn.Sequential(nn.Conv3d(1, 2, 3), nn.Conv3d(2, 2, 3), nn.Flatten(), nn.Linear(16, 2)))
    volume = mx.Volume(torch.rand(1, 6, 6, 6), torch.eye(4).numpy())
    for layer, expected in ((None, [("3",), ("1",), ("0",)]), ("1", [("1",), ("0",)])):
        target = mx.target.RegressionTarget(0, layer=layer) if layer else mx.ClassTarget(0)
        with Judged(mx.explain(model, volume, "gradient", target), model, volume).asked() as (question, _):
            assert layers(question) == expected


def test_of_few_layers_two_are_scrambled() -> None:
    torch.manual_seed(0)
    model = mx.Model(nn.Sequential(nn.Flatten(), nn.Linear(125, 9), nn.Linear(9, 2)), channels=1, spatial_dims=3)
    volume = mx.Volume(torch.rand(1, 5, 5, 5), torch.eye(4).numpy())
    found = randomisation.judge(Judged(mx.explain(model, volume, "gradient", 0), model, volume))
    assert (found.values["layers"], found.values["scrambled"]) == (2, 2)
    # Gradients that have no weight in common: 125 voxels correlate by some 0.07.
    assert found.values["highest"] < 0.3


def test_what_a_network_uses_twice_comes_where_it_is_used_last() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv3d(1, 1, 1), nn.Conv3d(1, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(self.second(self.first(x))).flatten(1)[:, :2]

    x = torch.rand(1, 1, 3, 3, 3)
    model = mx.Model(Twice())
    assert layers(Question(model, x, [mx.model.Prepared(x[0], torch.eye(4).numpy())], [mx.ClassTarget(0)])) == [
        ("first",),
        ("second",),
    ]


def test_every_stage_has_a_seed_of_its_own_and_alone_it_is_the_only_one() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    x = torch.rand(2, 4)
    untouched = [layer.weight.clone() for layer in network]
    first, second = independent(network, ["1", "0"], x, seed=3)
    assert torch.equal(first[0].weight, untouched[0]) and not torch.equal(first[1].weight, untouched[1])  # type: ignore[index]
    assert torch.equal(second[1].weight, untouched[1]) and not torch.equal(second[0].weight, untouched[0])  # type: ignore[index]
    assert not torch.equal(first[1].weight, second[0].weight)  # type: ignore[index]
    (together,) = cascade(network, [["1", "0"]], x, seed=3)
    assert not torch.equal(together[0].weight, together[1].weight)  # type: ignore[index]
    state = torch.random.get_rng_state()
    list(cascade(network, ["1"], x, seed=3))
    assert torch.equal(state, torch.random.get_rng_state())


def test_parameters_that_nobody_resets_are_drawn_with_their_own_mean_and_spread() -> None:
    torch.manual_seed(0)
    network = nets.ViT(1, (16, 16, 16), (4, 4, 4), hidden_size=24, mlp_dim=24, num_layers=1, num_heads=2)
    embeddings = network.patch_embedding.position_embeddings
    nn.init.normal_(embeddings, 3.0, 0.5)
    (drawn,) = cascade(network, [""], torch.rand(1, 1, 16, 16, 16), seed=0)
    new = drawn.patch_embedding.position_embeddings.detach()  # type: ignore[union-attr]
    assert abs(correlation(new, embeddings.detach())) < 0.2
    assert float(new.mean()) == pytest.approx(3, abs=0.1) and float(new.std()) == pytest.approx(0.5, abs=0.1)


def test_one_value_per_channel_has_no_statistics() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    (drawn,) = cascade(network, [["0", "1"]], torch.rand(1, 4), seed=0)
    assert torch.equal(drawn[1].running_var, torch.ones(4)) and not drawn[1].training  # type: ignore[index]


@pytest.mark.parametrize("kind", ["scripted", "without"])
def test_a_network_that_cannot_forget_says_why(kind: str) -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(2, 27))

        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) @ self.weight.T

    plain = nn.Sequential(nn.Flatten(), nn.Linear(27, 2)).eval()
    network = torch.jit.trace(plain, torch.rand(1, 1, 3, 3, 3)) if kind == "scripted" else Bare()
    model = mx.Model(network, channels=1, spatial_dims=3)
    volume = mx.Volume(torch.rand(1, 3, 3, 3), torch.eye(4).numpy())
    with pytest.raises(mx.MedXAIError, match={"scripted": "TorchScript", "without": "reset_parameters"}[kind]):
        randomisation.judge(Judged(mx.explain(model, volume, "gradient", 0), model, volume))
    with pytest.raises(mx.MedXAIError):
        next(cascade(network, [""], torch.rand(1, 1, 3, 3, 3), seed=0))


def test_a_scrambled_segmentation_is_asked_about_what_the_trained_one_found() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 2, 3, padding=1))
    model = mx.Model(network, task="segmentation", class_names=("none", "lesion"))
    volume = mx.Volume(torch.rand(1, 8, 8, 8), torch.eye(4).numpy())
    scores = model.predict(volume).output
    with torch.no_grad():
        # Few voxels, so that a scrambled network will hardly find the same or any.
        network[2].bias[1] -= (scores[:, 1] - scores[:, 0]).flatten().sort().values[-9]
    asked = Judged(mx.explain(model, volume, "gradient", "lesion"), model, volume)
    targets = []
    again = Judged.again

    def watched(self: Judged, **given: object) -> mx.SaliencyMap:
        targets.append(given["target"])
        return again(self, **given)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Judged, "again", watched)
        randomisation.judge(asked)
    labels = model.predict(volume).labels
    assert labels is not None and 0 < int(labels.data.sum()) < 12
    assert len(targets) == randomisation.DRAWS
    assert all(torch.equal(target.within.data, labels.data) for target in targets)


def test_a_scrambled_network_is_read_at_the_layer_that_was_explained(demo: tuple[mx.Model, mx.Volume]) -> None:
    read = []
    again = Judged.again

    def watched(self: Judged, model: mx.Model, **given: object) -> mx.SaliencyMap:
        read.append(model.layers)
        return again(self, model, **given)  # type: ignore[arg-type]

    model = replace(demo[0], layers=())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Judged, "again", watched)
        randomisation.judge(judged((model, demo[1]), "hirescam"))
    assert read == [tuple(model._suggested.values())] * randomisation.DRAWS


def two_outputs(first: Tensor, second: Tensor) -> mx.Model:
    """A classifier whose gradients are `first` and `second` (D, H, W)."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(first.numel(), 2))
    with torch.no_grad():
        network[1].weight.copy_(torch.stack([first.flatten(), second.flatten()]))
    return mx.Model(network, class_names=("benign", "malignant"), channels=1, spatial_dims=3)


def told_apart(model: mx.Model, target: object = "malignant", **known: object) -> mx.trust.finding.Finding | None:
    volume = mx.Volume(torch.rand(1, 5, 5, 5, generator=torch.Generator().manual_seed(0)), torch.eye(4).numpy())
    model = replace(model, **known)  # type: ignore[arg-type]
    return discrimination.judge(Judged(mx.explain(model, volume, "gradient", target), model, volume))  # type: ignore[call-overload]


def test_maps_of_two_classes_of_a_linear_network_are_as_alike_as_its_weights() -> None:
    one, other = torch.randn(2, 5, 5, 5, generator=torch.Generator().manual_seed(1))
    for second, expected in ((other, "good"), (one + 0.1 * other, "poor"), (one + other, "fair"), (-one, "good")):
        found = told_apart(two_outputs(one, second))
        assert found is not None and found.light == expected
        assert found.values["likeness"] == pytest.approx(
            torch.corrcoef(torch.stack([one.flatten(), second.flatten()]))[0, 1].item(), abs=1e-5
        )
    single = mx.Model(nn.Sequential(nn.Flatten(), nn.Linear(125, 1)), channels=1, spatial_dims=3)
    found = told_apart(single, 1)
    assert found is not None and found.values["likeness"] == pytest.approx(-1)


def test_the_other_class_is_the_most_likely_one() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(125, 4))
    with torch.no_grad():
        network[1].bias.copy_(torch.tensor([0.0, 20.0, 40.0, 30.0]))
    model = mx.Model(network, channels=1, spatial_dims=3)
    found = [told_apart(model, which) for which in (2, 3, 0)]
    assert [f.values["other"] for f in found if f is not None] == [3, 2, 2]


def test_only_the_score_of_a_class_is_told_apart_from_others() -> None:
    model = two_outputs(*torch.randn(2, 5, 5, 5))
    assert told_apart(model, task="regression", target=0) is None
    assert told_apart(model, mx.ClassTarget(1, versus=0)) is None


def test_where_a_map_is_and_what_two_have_in_common() -> None:
    data = torch.zeros(2, 4, 5, 6)
    assert extent(data) is None and extent(data + 1) is None
    data[1, 1, 2, 3], data[0, 2, 2, 5] = 1, -1
    assert extent(data) == (slice(None), slice(1, 3), slice(2, 3), slice(3, 6))
    values = torch.arange(100.0)
    assert overlap(values, values) == 1 and overlap(values, values.flip(0)) == 0
    assert overlap(values, values.roll(2)) == pytest.approx(0.6) and STRONGEST == 0.05
    assert correlation(values, -3 * values) == pytest.approx(-1)
    assert correlation(values, torch.full((100,), 0.1)) == 0
