"""Targets against what they are defined to be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import make_model, oblique_affine
from torch import Tensor, nn
from torch.nn import functional

import MedXAILib as mx
from MedXAILib.explainer import Question
from MedXAILib.target import from_spec


def scan(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(6))


def gradient_of(network: nn.Module, x: Tensor, value: object) -> Tensor:
    leaf = x[None].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(network.eval()(leaf)), leaf)  # type: ignore[operator]
    return gradient[0]


def test_lead_of_one_class_over_another() -> None:
    model, x = make_model("resnet18"), scan(1, 24, 24, 16)
    made = mx.explain(model, x, "gradient", target=mx.ClassTarget("malignant", versus="benign"))
    expected = gradient_of(model.network, x, lambda y: y[0, 2] - y[0, 1])
    torch.testing.assert_close(made.data, expected)
    assert made.provenance.target_label == "malignant rather than benign"


def test_regression_and_layers() -> None:
    model, x = make_model("resnet18"), scan(1, 24, 24, 16)
    regression = mx.Model(model.network, task="regression", class_names=("age", "weight", "height"))
    made = mx.explain(regression, x, "gradient", target="weight")
    torch.testing.assert_close(made.data, gradient_of(model.network, x, lambda y: y[0, 1]))
    inner = mx.explain(model, x, "gradient", target=mx.RegressionTarget(3, layer="avgpool"))
    kept: dict[str, Tensor] = {}
    model.network.avgpool.register_forward_hook(lambda _m, _i, y: kept.update(y=y))
    pooled = gradient_of(model.network, x, lambda _: kept["y"].flatten()[3])
    torch.testing.assert_close(inner.data, pooled)


def test_embedding_similarity() -> None:
    model, x, other = make_model("resnet18"), scan(1, 24, 24, 16), scan(1, 24, 24, 16).flip(1)
    embedding = mx.Model(model.network, task="embedding")
    reference = model.network.eval()(other[None]).detach().flatten()
    expected = gradient_of(model.network, x, lambda y: functional.cosine_similarity(y, reference[None])[0])
    for given in (reference, mx.Volume(other, np.eye(4))):
        made = mx.explain(embedding, x, "gradient", target=mx.EmbeddingTarget(given))
        torch.testing.assert_close(made.data, expected, rtol=1e-4, atol=1e-8)
    again = mx.recompute(made, embedding, x)
    torch.testing.assert_close(again.data, made.data)
    with pytest.raises(mx.MedXAIError, match="explained against another case"):
        mx.explain(embedding, x, "gradient")


MASK = torch.zeros(1, 24, 24, 16)
MASK[:, 5:15, 8:20, 3:9] = 1


@pytest.mark.parametrize("measure", ["logit", "volume", "dice"])
def test_segmentation_within_a_mask(measure: str) -> None:
    model, x, affine = make_model("unet"), scan(1, 24, 24, 16), oblique_affine((2.0, 1.0, 0.5))
    target = mx.SegmentationTarget("benign", within=mx.Volume(MASK, affine), measure=measure)
    made = mx.explain(model, mx.Volume(x, affine), "gradient", target=target)

    def value(y: Tensor) -> Tensor:
        soft = y.softmax(1)[0, 1]
        if measure == "logit":
            return (y[0, 1] * MASK[0]).sum() / MASK.sum()
        if measure == "volume":
            return (soft * MASK[0]).sum() * 2.0 * 1.0 * 0.5 / 1000
        return 2 * (soft * MASK[0]).sum() / (soft.sum() + MASK.sum())

    torch.testing.assert_close(made.data, gradient_of(model.network, x, value), rtol=1e-3, atol=1e-9)
    with pytest.raises(mx.MedXAIError, match="within a mask, which is not stored"):
        mx.recompute(made, model, mx.Volume(x, affine))


def test_segmentation_where_predicted_everywhere_and_in_a_box() -> None:
    model, x = make_model("unet"), scan(1, 24, 24, 16)
    volume = mx.Volume(x, oblique_affine((2.0, 1.0, 0.5)))
    y = model.network.eval()(x[None]).detach()
    label = int(y.argmax(1).flatten().mode().values)
    where = (y.argmax(1) == label).float()
    expected = gradient_of(model.network, x, lambda y: (y[0, label] * where[0]).sum() / where.sum())
    torch.testing.assert_close(mx.explain(model, volume, "gradient", target=label).data, expected, rtol=1e-3, atol=1e-9)
    everywhere = mx.explain(model, volume, "gradient", target=mx.SegmentationTarget(label, within="everywhere"))
    torch.testing.assert_close(
        everywhere.data, gradient_of(model.network, x, lambda y: y[0, label].mean()), rtol=1e-3, atol=1e-9
    )
    low, high = volume.to_point((2, 3, 4)), volume.to_point((12, 13, 11))
    boxed = mx.explain(model, volume, "gradient", target=mx.SegmentationTarget(label, within=(low, high)))
    assert boxed.data.abs().max() > 0 and not torch.allclose(boxed.data, everywhere.data)


def test_absent_class_is_said() -> None:
    model = make_model("unet")
    with pytest.raises(mx.MedXAIError, match=r"no voxel of 'benign' to explain"):
        empty = mx.Volume(torch.zeros(1, 24, 24, 16), np.eye(4))
        mx.explain(model, scan(1, 24, 24, 16), "gradient", target=mx.SegmentationTarget("benign", within=empty))


def test_classifiers_and_segmenters_say_which_target_they_need() -> None:
    x = scan(1, 24, 24, 16)
    with pytest.raises(mx.MedXAIError, match="use SegmentationTarget"):
        mx.explain(make_model("unet"), x, "gradient", target=mx.ClassTarget(1))
    with pytest.raises(mx.MedXAIError, match="use ClassTarget"):
        mx.explain(make_model("resnet18"), x, "gradient", target=mx.SegmentationTarget(1))
    with pytest.raises(mx.MedXAIError, match="no measure 'size'"):
        mx.SegmentationTarget(1, measure="size")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "target",
    [
        mx.ClassTarget(1, versus=0),
        mx.ClassTarget((0, 2)),
        mx.RegressionTarget(2, layer="avgpool"),
        mx.SegmentationTarget(2, within="everywhere", measure="volume"),
    ],
)
def test_specifications_round_trip(target: mx.Target) -> None:
    assert from_spec(target.spec()) == target


class Sides(nn.Module):
    """Class 0 for a positive mean, class 1 for a negative one."""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((1, 2, 3, 4))
        return torch.stack([mean, -mean], 1)


def test_what_is_predicted_is_a_matter_of_the_sample_and_not_of_a_changed_one() -> None:
    """Also for an explainer that asks about a changed sample first."""
    model, x = mx.Model(Sides()), scan(1, 1, 5, 6, 7) + 1
    question = Question(model, x, [model.prepare(mx.Volume(x[0], np.eye(4)))], [mx.ClassTarget()])
    (value,) = question.values(-x)
    assert value.item() == -x.mean().item()
    assert question.bound[0].target.spec()["which"] == 0


def test_predicted_classes_of_a_batch_that_was_split_are_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    x = scan(3, 1, 5, 6, 7).abs() * torch.tensor([1.0, 1.0, -1.0]).reshape(3, 1, 1, 1, 1)
    model, forward = mx.Model(Sides()), mx.Model.forward

    def small(self: mx.Model, x: Tensor) -> Tensor:
        if len(x) > 2:
            raise RuntimeError("out of memory")
        return forward(self, x)

    whole = mx.explain(model, x, "gradient")
    monkeypatch.setattr(mx.Model, "forward", small)
    made = mx.explain(model, torch.cat([x[:2], x]), "gradient")
    assert list(made.provenance.target["which"]) == [0, 0, 0, 0, 1]
    torch.testing.assert_close(mx.recompute(made, model, torch.cat([x[:2], x])).data[2:], whole.data)


@pytest.mark.parametrize("task", ["classification", "multilabel"])
def test_the_one_score_of_one_name_speaks_for_that_name(task: str) -> None:
    """Not for its opposite, which is what a first class of two would be."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(60, 1))
    model = mx.Model(network, task=task, class_names=("ill",), channels=1)  # type: ignore[arg-type]
    volume = mx.Volume(torch.rand(1, 3, 4, 5), np.eye(4))
    p = float(network(volume.data[None]).sigmoid().detach())
    scores = model.predict(volume).scores
    assert scores["ill"] == pytest.approx(p)
    if task == "classification":
        assert scores["not ill"] == pytest.approx(1 - p)
    weights = network[1].weight.detach().reshape(1, 3, 4, 5)
    made = mx.explain(model, volume, "gradient", "ill")
    torch.testing.assert_close(made.data, weights)
    assert made.provenance.target_label == "ill"
    again = mx.recompute(made, model, volume)
    assert torch.equal(again.data, made.data) and again.provenance.target_label == "ill"
    torch.testing.assert_close(mx.explain(model, volume, "gradient", "not ill").data, -weights)


def test_a_segmentation_of_one_label_is_of_that_label() -> None:
    network = nn.Conv3d(1, 1, 1)
    network.weight.data.fill_(1)
    network.bias.data.fill_(-0.5)
    model = mx.Model(network, task="segmentation", class_names=("lesion",))
    data = torch.zeros(1, 4, 5, 6)
    data[0, 1, 2, 3:5] = 1
    volume = mx.Volume(data, np.diag([2.0, 2.0, 2.0, 1.0]))
    assert model.predict(volume).scores == {
        "not lesion": pytest.approx(118 * 0.008),
        "lesion": pytest.approx(2 * 0.008),
    }
    made = mx.explain(model, volume, "gradient", "lesion")
    assert made.provenance.target_label.startswith("lesion")
    torch.testing.assert_close(made.data, (data > 0) / 2)
