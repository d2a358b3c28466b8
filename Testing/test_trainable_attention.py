"""Attention gates are read as they are, put where their units look, and those we ship lie on the nodule."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_model, oblique_affine, with_statistics
from model_cards import metrics_of
from monai.inferers import sliding_window_inference
from monai.networks import nets
from monai.networks.blocks import ChannelSELayer
from torch import Tensor, nn

import MedXAILib as mx
from MedXAILib import resources
from MedXAILib.networks.attention_classifier import AttentionClassifier
from MedXAILib.networks.attention_gate import AttentionGate
from MedXAILib.synthetic.lung_nodules import Backgrounds, Nodules, synthesise
from MedXAILib.training import attention_classifier, attention_segmentation
from MedXAILib.training.table import Patches
from MedXAILib.window import Window

SHAPE = (28, 36, 44)
EVERYWHERE = mx.SegmentationTarget(1, "everywhere")


def scan(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def classifier() -> AttentionClassifier:
    """Untrained, with gates that tell units apart."""
    torch.manual_seed(0)
    network = with_statistics(AttentionClassifier())
    for gate in (network.fine, network.coarse):
        nn.init.normal_(gate.psi.weight, std=5.0)
    return network.eval()


def unet() -> nn.Module:
    torch.manual_seed(0)
    network = with_statistics(nets.AttentionUnet(3, 1, 2, (4, 8, 12), (2, 2)))
    for name, parameter in network.named_parameters():
        if "psi.0" in name:
            nn.init.normal_(parameter, std=3.0)
    return network.eval()


def attention(network: nn.Module, x: Tensor, task: str = "classification", **parameters: Any) -> Tensor:
    target = EVERYWHERE if task == "segmentation" else 1
    return mx.explain(mx.Model(network, task=task), x, "attention", target=target, **parameters).data


# --- The gate --------------------------------------------------------------------------------------------------------


def test_coefficients_are_those_of_the_formula() -> None:
    torch.manual_seed(0)
    gate, features, signal = AttentionGate(3, 5, 4), scan(2, 3, 6, 4, 8), scan(2, 5, 3, 2, 4, seed=2)
    kept = {name: value.detach().double().numpy() for name, value in gate.state_dict().items()}
    # A coarser unit's neighbours count a quarter and three quarters, except at the border, where there is but one.
    finer = signal.double().numpy()
    for axis in (2, 3, 4):
        at = np.clip((np.arange(2 * finer.shape[axis]) + 0.5) / 2 - 0.5, 0, finer.shape[axis] - 1)
        low, part = np.floor(at).astype(int), at - np.floor(at)
        high = np.minimum(low + 1, finer.shape[axis] - 1)
        part = part.reshape([-1 if a == axis else 1 for a in range(5)])
        finer = finer.take(low, axis) * (1 - part) + finer.take(high, axis) * part
    mixed = lambda name, x: np.einsum("oc,ncdhw->nodhw", kept[f"{name}.weight"][..., 0, 0, 0], x)  # noqa: E731
    hidden = mixed("of_features", features.double().numpy()) + mixed("of_signal", finer)
    hidden = np.maximum(hidden + kept["of_features.bias"].reshape(-1, 1, 1, 1), 0)
    scores = np.exp(mixed("psi", hidden))
    expected = scores / scores.sum((2, 3, 4), keepdims=True)
    np.testing.assert_allclose(gate.coefficients(features, signal).detach().numpy(), expected, rtol=1e-5)


def test_constant_features_are_attended_to_alike() -> None:
    torch.manual_seed(0)
    gate = AttentionGate(3, 5, 4)
    features, signal = (scan(2, channels, 1, 1, 1) for channels in (3, 5))
    found = gate.coefficients(features.expand(2, 3, 6, 4, 8), signal.expand(2, 5, 3, 2, 4))
    torch.testing.assert_close(found, torch.full((2, 1, 6, 4, 8), 1 / (6 * 4 * 8)))


@pytest.mark.parametrize("which", range(3))
def test_what_the_gates_let_through_adds_up_to_the_score(which: int) -> None:
    network, kept = classifier(), []
    for gate in (network.fine, network.coarse):
        gate.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    logit = network(scan(1, 1, *SHAPE))[0, which]
    gradients = torch.autograd.grad(logit, kept)
    # Linear, and alike wherever it was: only the attention tells places apart.
    assert all(torch.equal(g, g[..., :1, :1, :1].expand_as(g)) for g in gradients)
    relevance = sum(float((g * a).sum().detach()) for g, a in zip(gradients, kept, strict=True))
    assert relevance + float(network.class_head.bias[which].detach()) == pytest.approx(float(logit.detach()), abs=1e-5)


# --- Where it lies ---------------------------------------------------------------------------------------------------


class OneUnit(AttentionGate):
    """A gate that attends to one unit alone."""

    unit: tuple[int, ...] = ()

    def coefficients(self, features: Tensor, signal: Tensor) -> Tensor:
        at = torch.zeros(1, 1, *features.shape[2:])
        at[(0, 0, *self.unit)] = 100
        scores = super().coefficients(features, signal) + at
        return scores.flatten(2).softmax(2).view_as(scores)


UNITS = {"fine": ((5, 9, 12), 2, 0.5), "coarse": ((2, 5, 7), 4, 1.5)}


def centre_of_mass(made: Tensor, affine: np.ndarray) -> np.ndarray:
    """Of a map (1, D, H, W), in RAS mm."""
    index = torch.stack(torch.meshgrid(*(torch.arange(n) for n in made.shape[1:]), indexing="ij"), -1).double()
    index = (index * made[0, ..., None].double()).sum((0, 1, 2)) / made.double().sum()
    return affine[:3, :3] @ index.numpy() + affine[:3, 3]


@pytest.mark.parametrize("which", UNITS)
def test_a_unit_attended_to_is_where_it_looks(which: str) -> None:
    unit, stride, first = UNITS[which]
    network = classifier()
    gate = getattr(network, which)
    gate.__class__, gate.unit = OneUnit, unit
    volume = mx.Volume(scan(1, *SHAPE), oblique_affine())
    made = mx.explain(mx.Model(network), volume, "attention", gates=(list(UNITS).index(which),))
    expected = volume.affine[:3, :3] @ (stride * np.array(unit) + first) + volume.affine[:3, 3]
    assert made.data.shape == (1, *SHAPE) and np.array_equal(made.affine, volume.affine)
    np.testing.assert_allclose(centre_of_mass(made.data, volume.affine), expected, atol=1e-3)


def test_it_is_where_it_looks_through_the_preprocessing_of_a_bundle() -> None:
    """The network sees the scan turned to RAS and at 1.25 mm, which is (R, A, S); the map is on the scan's own grid."""
    plain = mx.load_model(resources.path("Models/lung_nodule"))
    network, unit = classifier(), (3, 4, 3)
    network.coarse.__class__, network.coarse.unit = OneUnit, unit
    affine = oblique_affine((1.1, 0.9, 1.3))
    volume = mx.Volume(700 * scan(1, 40, 40, 30) - 1000, affine)
    model = mx.Model(network, preprocessing=plain.preprocessing)
    grid = model.prepare(volume).affine
    made = mx.explain(model, volume, "attention", gates=(1,))
    expected = grid[:3, :3] @ (4 * np.array(unit) + 1.5) + grid[:3, 3]
    assert np.linalg.norm(affine[:3, :3] - grid[:3, :3]) > 1
    np.testing.assert_allclose(centre_of_mass(made.data, affine), expected, atol=0.3)


# --- Reading ---------------------------------------------------------------------------------------------------------


def psi(network: nn.Module, x: Tensor) -> list[Tensor]:
    """What the gates of MONAI's U-Net themselves say, the inner one first."""
    read, handles = [], []
    for module in network.modules():
        if type(module).__name__ == "AttentionBlock":
            handles.append(module.psi.register_forward_hook(lambda _module, _inputs, output: read.append(output)))
    with torch.no_grad():
        network(x)
    for handle in handles:
        handle.remove()
    return read


def test_gates_of_monais_unet_are_read_as_they_are() -> None:
    network, x = unet(), scan(1, 1, *SHAPE)
    inner, outer = psi(network, x)
    assert inner.shape[2:] == (14, 18, 22) and outer.shape[2:] == SHAPE and float(outer.std()) > 0.01
    torch.testing.assert_close(attention(network, x[0], "segmentation", gates=(1,)), outer[0])
    made = attention(network, x[0], "segmentation", gates=(0,))[:, ::2, ::2, ::2]
    torch.testing.assert_close(made, inner[0])


def test_gates_of_our_classifier_are_read_as_they_are() -> None:
    network, x, own = classifier(), scan(1, 1, *SHAPE), []
    for gate in (network.fine, network.coarse):
        gate.register_forward_hook(lambda gate, inputs, _output: own.append(gate.coefficients(*inputs).detach()))
    network(x)
    for i, coefficients in enumerate(own[:2]):
        # Without aligned corners a unit is put in the middle of its cell, where it looks.
        expected = F.interpolate(coefficients, size=SHAPE, mode="trilinear")
        assert float(coefficients.max() / coefficients.min()) > 1.1
        torch.testing.assert_close(attention(network, x[0], gates=(i,)), expected[0], rtol=1e-4, atol=1e-8)


def test_a_whole_scan_is_read_by_the_windows_of_the_inferer() -> None:
    network, roi = unet(), (16, 16, 16)
    model = mx.Model(network, task="segmentation", window=Window(roi, 0.5, "gaussian"))
    x = scan(1, 20, 33, 27)
    made = mx.explain(model, x, "attention", target=EVERYWHERE, gates=(1,)).data
    expected = sliding_window_inference(x[None], roi, 2, lambda w: psi(network, w)[1], overlap=0.5, mode="gaussian")
    torch.testing.assert_close(made, expected[0], rtol=1e-4, atol=1e-5)


class Gated(nn.Module):
    """Features of stride 2, gated in one of many ways of writing it, then pooled."""

    def __init__(self, gate: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.features = nn.Conv3d(1, 4, 2, 2)
        self.score = nn.Conv3d(4, 1, 1)
        self.head = nn.Linear(4, 3)
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        return self.head(self.gate(features, 5 * self.score(features)).mean((2, 3, 4)))


def _in_place(features: Tensor, score: Tensor) -> Tensor:
    features.mul_(score.sigmoid_())
    return features


def _assigned(features: Tensor, score: Tensor) -> Tensor:
    features *= torch.sigmoid(score)
    return features


WRITTEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product": lambda f, s: f * s.sigmoid(),
    "the other way round": lambda f, s: s.sigmoid() * f,
    "by another name": lambda f, s: torch.multiply(f, F.sigmoid(s)),
    "in place": _in_place,
    "assigned": _assigned,
    "scaled": lambda f, s: f * (2 * s.sigmoid() / 2),
    "expanded": lambda f, s: s.sigmoid().expand_as(f) * f,
    "repeated": lambda f, s: f * torch.sigmoid(s).repeat(1, 4, 1, 1, 1),
    "from a coarser grid": lambda f, s: f * F.interpolate(s[..., ::2, ::2, ::2].sigmoid(), size=f.shape[2:]),
}


@pytest.mark.parametrize("how", WRITTEN)
def test_a_gate_is_a_gate_however_it_is_written(how: str) -> None:
    network, x = Gated(WRITTEN[how]), scan(1, 1, 8, 12, 16)
    score = 5 * network.score(network.features(x)).detach()
    if how == "from a coarser grid":
        score = score[..., ::2, ::2, ::2].repeat_interleave(2, 2).repeat_interleave(2, 3).repeat_interleave(2, 4)
    expected = F.interpolate(score.sigmoid(), scale_factor=2, mode="trilinear")[0]
    torch.testing.assert_close(attention(network, x[0]), expected)


NO_GATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "nothing": lambda f, _: f,
    "a number for each channel": lambda f, _: f * f.mean((2, 3, 4), keepdim=True).sigmoid(),
    "each channel by itself": lambda f, _: f * f.sigmoid(),
    "the only channel by itself": lambda f, s: (s * s.sigmoid()).expand_as(f),
    "no gate": lambda f, s: f * s.relu(),
    "after pooling": lambda f, s: (f.mean((2, 3, 4)) * s.mean((2, 3, 4)).sigmoid())[:, :, None, None, None],
    "a number for each scan": lambda f, s: f * s.amax((2, 3, 4), keepdim=True).sigmoid(),
}


@pytest.mark.parametrize("how", NO_GATES)
def test_networks_without_attention_are_refused(how: str) -> None:
    with pytest.raises(mx.MedXAIError, match="Gated has no attention: use gradcam"):
        attention(Gated(NO_GATES[how]), scan(1, 8, 12, 16))


def test_networks_of_monai_without_attention_are_refused() -> None:
    squeezing = nn.Sequential(nn.Conv3d(1, 4, 3), ChannelSELayer(3, 4), nn.AdaptiveAvgPool3d(1), nn.Flatten())
    for model in (make_model("resnet18"), mx.Model(squeezing)):
        with pytest.raises(mx.MedXAIError, match="has no attention"):
            mx.explain(model, scan(1, 24, 24, 16), "attention", target=1)


def test_of_a_transformer_it_is_the_rollout() -> None:
    model, x = make_model("vit"), scan(1, 24, 24, 16)
    rollout = mx.explain(model, x, "attention_rollout", target=1).data
    assert rollout.abs().max() > 0
    torch.testing.assert_close(mx.explain(model, x, "attention", target=1).data, rollout)


# --- Several gates, several classes, several scans -------------------------------------------------------------------


@pytest.mark.parametrize("fuse", ["mean", "max", "product"])
def test_gates_become_one_after_scaling(fuse: str) -> None:
    network, x = classifier(), scan(1, *SHAPE)
    first, second = (attention(network, x, gates=(i,)) for i in (0, 1))
    first, second = first / first.max(), second / second.max()
    expected = {"mean": (first + second) / 2, "max": torch.maximum(first, second), "product": first * second}
    assert float((first - second).abs().max()) > 0.1
    for gates in ((), (1, 0)):
        torch.testing.assert_close(attention(network, x, gates=gates, fuse=fuse), expected[fuse])


def test_a_gate_that_is_not_there() -> None:
    for gate in (2, -1):
        with pytest.raises(mx.MedXAIError, match=f"no attention gate '{gate}'"):
            attention(classifier(), scan(1, *SHAPE), gates=(gate,))


def test_it_is_unsigned_and_the_same_for_every_class_and_says_so() -> None:
    model, x = mx.Model(classifier()), scan(1, *SHAPE)
    made = mx.explain(model, x, "attention", target=[0, 1, 2])
    assert all(torch.equal(m.data, made[0].data) and not m.signed and m.data.min() >= 0 for m in made)
    assert "the same for every class" in mx.methods()["attention"].taxonomy.limits
    assert any("14 x 18 x 22, 7 x 9 x 11 units" in note for note in made[0].provenance.notes)


def test_a_batch_is_its_scans_and_the_network_is_as_before() -> None:
    network, x = classifier().train(), scan(2, 1, *SHAPE)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    both, kept = attention(network, x), x.clone()
    assert network.training and torch.equal(x, kept) and not x.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    for sample, one in zip(both, x, strict=True):
        torch.testing.assert_close(sample, attention(network, one), rtol=1e-4, atol=1e-7)


# --- What we ship ----------------------------------------------------------------------------------------------------


def test_training_begins_with_what_the_plain_network_sees() -> None:
    x, seen = scan(1, 1, 40, 40, 40), []
    networks = [attention_classifier.build(), mx.load_model(resources.path("Models/lung_nodule")).network]
    for network in networks:
        network.evidence.register_forward_hook(lambda _module, _inputs, output: seen.append(output.detach()))
        network.eval()(x)
    assert float(seen[0].max()) > 0.1
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(networks[0].attribute_head.scale, networks[1].attribute_head.scale)


def test_each_gate_learns_by_itself() -> None:
    """The formula in double precision, on what comes out of the gates."""
    network, kept, unknown = classifier(), [], float("nan")
    nn.init.ones_(network.evidence.block[1].bias)
    for gate in (network.fine, network.coarse):
        gate.register_forward_hook(lambda _module, _inputs, output: kept.append(output.detach().double().numpy()))
    for head in (network.class_head, network.attribute_head):
        nn.init.normal_(head.weight)
    labels, true = np.array([0, 1, 2]), np.linspace(-1, 1, 21).reshape(3, 7)
    true[0] = unknown
    patches = Patches(scan(3, 1, 24, 24, 32), torch.tensor(labels), torch.tensor(true).float(), None, [""] * 3)
    found = attention_classifier.loss(network, patches)
    weights = {name: value.detach().double().numpy() for name, value in network.state_dict().items()}
    attended = [features.sum((2, 3, 4)) for features in kept]
    losses = []
    for used in ((1, 1), (1, 0), (0, 1)):
        features = np.concatenate([part * use for part, use in zip(attended, used, strict=True)], axis=1)
        logits = features @ weights["class_head.weight"].T + weights["class_head.bias"]
        likelihood = np.exp(logits)[np.arange(3), labels] / np.exp(logits).sum(1)
        # An untrained head has an offset of 0 and a scale of 1.
        told = features @ weights["attribute_head.weight"].T + weights["attribute_head.bias"]
        losses.append(-np.log(likelihood).mean() + np.square(told - true)[1:].mean())
    assert found.item() == pytest.approx(np.mean(losses), rel=1e-5)


@cache
def unseen() -> Nodules:
    """24 patches of the patient that nobody trained on, of a seed that nobody looked at."""
    return synthesise(Backgrounds.test(), 24, seed=104)


@cache
def shipped(name: str) -> mx.Model:
    model = mx.load_model(resources.path(f"Models/{name}"))
    model.network.eval()
    return model


def metrics(name: str) -> dict[str, float]:
    return metrics_of(resources.path(f"Models/{name}"))


def hits(name: str, **parameters: Any) -> tuple[float, float]:
    """Of the nodules among `unseen`: in how many the map is largest in the nodule, and how many times as large it is
    there on average as elsewhere."""
    model, patches = mx.Model(shipped(name).network, task=shipped(name).task), unseen()
    lesions = [(image, mask) for image, mask in zip(patches.images, patches.masks, strict=True) if bool(mask.any())]
    inside, ratio = [], []
    for image, mask in lesions:
        made = mx.explain(model, image, "attention", target=TARGETS[name], **parameters).data
        inside.append(bool(mask.flatten()[made.argmax()]))
        ratio.append(float(made[mask].mean() / made[~mask].mean()))
    assert len(lesions) == 16
    return float(np.mean(inside)), float(np.mean(ratio))


TARGETS = {"lung_nodule_attention": 2, "lung_nodule_attention_segmentation": EVERYWHERE}


def test_attention_costs_no_accuracy() -> None:
    gated, plain = metrics("lung_nodule_attention"), metrics("lung_nodule")
    for key in ("accuracy", "borderline_accuracy"):
        assert gated[key] >= plain[key] - 0.01
    card = resources.path("Models/lung_nodule_attention/docs/README.md").read_text("utf-8")
    assert f"| accuracy, three classes | {gated['accuracy']:.3f} | {gated['borderline_accuracy']:.3f} |" in card
    page = (Path(__file__).parents[1] / "docs/demo-networks.md").read_text("utf-8")
    assert f"| **{gated['accuracy']:.3f}** | **{gated['borderline_accuracy']:.3f}** |" in page
    with torch.no_grad():
        guessed = shipped("lung_nodule_attention").network(unseen().images).argmax(1)
    assert float((guessed == unseen().labels).float().mean()) >= 0.85


def test_both_gates_of_the_shipped_classifier_attend_to_the_nodule() -> None:
    measured = metrics("lung_nodule_attention")
    for gate in UNITS:
        assert measured[f"{gate}_pointing"] >= 0.9 and measured[f"borderline_{gate}_pointing"] >= 0.9
        assert measured[f"{gate}_mass"] >= 0.7
    for gates in ((), (0,), (1,)):
        pointing, ratio = hits("lung_nodule_attention", gates=gates)
        assert pointing >= 0.9 and ratio > 20


def test_both_gates_of_the_shipped_segmentation_attend_to_the_nodule() -> None:
    name = "lung_nodule_attention_segmentation"
    measured, plain = metrics(name), metrics("lung_nodule_segmentation")
    assert measured["dice"] >= plain["dice"] and measured["borderline_dice"] >= plain["borderline_dice"]
    found = attention_segmentation.measure(shipped(name).network, unseen())
    assert found["dice"] >= 0.8
    for gate in UNITS:
        for numbers in (measured, found):
            assert numbers[f"{gate}_inside"] >= numbers[f"{gate}_outside"] + 0.12
    pointing, ratio = hits(name)
    assert pointing >= 0.9 and ratio > 1.4


@pytest.mark.parametrize("name", TARGETS)
def test_by_default_the_real_nodule_is_attended_to_in_the_scan_as_it_is(name: str) -> None:
    whole, mask = (mx.load_volume(resources.path(f"SampleData/chest_ct_nodule{end}.nrrd")) for end in ("", "_mask"))
    lesion = mask.data[0].nonzero().numpy()
    centre = tuple(whole.to_point(lesion.mean(0)))
    made = mx.explain(shipped(name), whole, "attention", TARGETS[name], region=centre).data[0]
    peak = np.array(np.unravel_index(int(made.argmax()), made.shape))
    # A unit of the network is 5 mm or less, as is a slice of the scan.
    assert np.linalg.norm((lesion - peak) * whole.spacing, axis=1).min() <= 5
