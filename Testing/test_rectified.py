"""Deconvolution, guided backpropagation and guided Grad-CAM against captum, and against networks written by hand whose
activations have that way back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captum.attr import Deconvolution, GuidedBackprop, GuidedGradCam
from conftest import NETWORKS, make_model
from monai.visualize import GuidedBackpropGrad, VanillaGrad
from torch import Tensor, nn

import MedXAILib as mx

SIZE = (10, 12, 8)
METHODS = ("deconvnet", "guided_backprop")


def draw(*shape: int, seed: int = 6) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seeded(network: nn.Module) -> nn.Module:
    """The same weights for every network of a kind, and statistics that do something."""
    generator = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        nn.init.normal_(parameter, 0.0, 0.2, generator)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2, generator)
            nn.init.uniform_(module.running_var, 0.5, 2.0, generator)
            nn.init.uniform_(module.weight, 0.5, 2.0, generator)
    return network.eval()


class Network(nn.Module):
    """Convolutions with a skip between two activations, the second of which follows a normalisation."""

    def __init__(self, first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.first, self.second = first, second or first
        self.conv1, self.conv2 = nn.Conv3d(2, 6, 3, padding=1), nn.Conv3d(6, 6, 3, padding=1)
        self.norm, self.head = nn.BatchNorm3d(6), nn.Linear(6, 3)
        seeded(self)

    def features(self, x: Tensor) -> Tensor:
        x = self.first(self.conv1(x))
        return self.second(self.norm(self.conv2(x)) + x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3, 4)))


def explained(network: nn.Module, x: Tensor, method: str, target: Any = 2, **parameters: Any) -> mx.SaliencyMap:
    return mx.explain(mx.Model(network, channels=2), x, method, target, per_channel=True, **parameters)


# What is right: activations whose way back is written down.


class ByHand(torch.autograd.Function):
    """An activation that sends back the positive part of what it gets: as it is, or times its derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: Callable[[Tensor], Tensor], derivative: bool) -> Tensor:
        ctx.activation, ctx.derivative = activation, derivative
        ctx.save_for_backward(x)
        return activation(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (g,), (x,) = gradients, ctx.saved_tensors
        positive = torch.where(g > 0, g, 0)
        slope = torch.func.grad(lambda x: ctx.activation(x).sum())(x) if ctx.derivative else 1
        return positive * slope, None, None


def by_hand(x: Tensor, method: str, activation: Callable[[Tensor], Tensor], target: int = 2) -> Tensor:
    network = Network(lambda x: ByHand.apply(x, activation, method == "guided_backprop"))
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(network(leaf)[:, target].sum(), leaf)[0]


def test_what_is_right_of_relu_is_what_the_papers_say() -> None:
    x, g = torch.tensor([-1.0, -1.0, 2.0, 2.0], requires_grad=True), torch.tensor([-3.0, 3.0, -3.0, 3.0])
    for derivative, expected in ((False, [0.0, 3.0, 0.0, 3.0]), (True, [0.0, 0.0, 0.0, 3.0])):
        (back,) = torch.autograd.grad(ByHand.apply(x, torch.relu, derivative), x, g)
        assert back.tolist() == expected


# An activation that is a module, so that it may be used twice.
_REUSED, _REUSED_IN_PLACE = nn.ReLU(), nn.ReLU(inplace=True)

RELUS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "modules": (nn.ReLU(), nn.ReLU()),
    "modules in place": (nn.ReLU(inplace=True), nn.ReLU(inplace=True)),
    "a module used twice": (_REUSED, _REUSED),
    "a module used twice in place": (_REUSED_IN_PLACE, _REUSED_IN_PLACE),
    "functional": (F.relu, torch.relu),
    "functional in place": (F.relu_, lambda x: F.relu(x, inplace=True)),
    "of the tensor": (lambda x: x.relu(), lambda x: x.relu_()),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", RELUS)
def test_relu_however_it_is_asked_for(name: str, method: str) -> None:
    network, x = Network(*RELUS[name]), draw(2, 2, *SIZE)
    for target in (0, 2):
        made = explained(network, x, method, target)
        expected = by_hand(x, method, torch.relu, target)
        assert float(expected.abs().max()) > 0
        torch.testing.assert_close(made.data, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))
        assert made.provenance.operators == {
            {"deconvnet": "deconvolution"}.get(method, "guided"): {"relu": 2},
            "passed through": made.provenance.operators["passed through"],
        }
        assert made.provenance.notes == []
    summed = mx.explain(mx.Model(network), x, method, target=2).data
    torch.testing.assert_close(summed, made.data.sum(1, keepdim=True))


OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "silu": F.silu,
    "prelu": lambda x: F.prelu(x, torch.tensor([0.25])),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "elu": F.elu,
    "mish": F.mish,
    "softplus": F.softplus,
    "hardswish": F.hardswish,
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", OTHERS)
def test_other_activations_send_back_what_the_note_says(name: str, method: str) -> None:
    x, activation = draw(2, 2, *SIZE), OTHERS[name]
    made = explained(Network(activation), x, method)
    expected = by_hand(x, method, activation)
    assert float(expected.abs().max()) > 0
    torch.testing.assert_close(made.data, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))
    (note,) = made.provenance.notes
    assert "is defined for ReLU" in note and name in note
    assert ("times the derivative" in note) == (method == "guided_backprop")
    assert ("unchanged" in note) == (method == "deconvnet")


@pytest.mark.parametrize("method", METHODS)
def test_a_note_names_the_other_activations_only(method: str) -> None:
    (note,) = explained(Network(F.relu, F.gelu), draw(1, 2, *SIZE), method).provenance.notes
    assert "what reaches gelu," in note


@pytest.mark.parametrize("method", METHODS)
def test_gates_and_softmax_keep_their_gradient(method: str) -> None:
    """They are no rectifiers: what is negative goes on."""
    network, x = (
        nn.Sequential(nn.Conv3d(2, 3, 1), nn.Sigmoid(), nn.AdaptiveAvgPool3d(1), nn.Flatten()),
        draw(1, 2, *SIZE),
    )
    with pytest.raises(mx.MedXAIError, match="no activation such as ReLU"):
        explained(network, x, method)
    with_relu = seeded(nn.Sequential(*network, nn.Softmax(1), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)))
    nn.init.constant_(with_relu[5].bias, 5.0)
    nn.init.constant_(with_relu[7].weight, 1.0)
    gradient = explained(with_relu, x, "gradient").data
    torch.testing.assert_close(explained(with_relu, x, method).data, gradient)
    assert float(gradient.abs().max()) > 0


# captum, where it is right.

CAPTUM = {"deconvnet": Deconvolution, "guided_backprop": GuidedBackprop}


def sequential() -> nn.Module:
    return seeded(
        nn.Sequential(
            *(nn.Conv3d(2, 6, 3, padding=1), nn.BatchNorm3d(6), nn.ReLU(), nn.MaxPool3d(2)),
            *(nn.Conv3d(6, 8, 3, padding=1), nn.InstanceNorm3d(8), nn.ReLU(), nn.MaxPool3d(3, 2, 1), nn.Flatten()),
            *(nn.Linear(8 * 3 * 3 * 2, 10), nn.ReLU(), nn.Linear(10, 3)),
        )
    )


@pytest.mark.filterwarnings("ignore:Setting backward hooks")
@pytest.mark.parametrize("method", METHODS)
def test_equals_captum_where_activations_are_modules(method: str) -> None:
    x = draw(2, 2, *SIZE)
    for network in (sequential(), Network(*RELUS["modules"])):
        expected = CAPTUM[method](network).attribute(x.clone().requires_grad_(), target=2)
        made = explained(network, x, method, 2).data
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.filterwarnings("ignore:Setting backward hooks")
@pytest.mark.parametrize("name", ["a module used twice", "a module used twice in place"])
def test_equals_captum_where_an_activation_is_used_twice(name: str) -> None:
    network, x = Network(*RELUS[name]), draw(2, 2, *SIZE)
    expected = GuidedBackprop(network).attribute(x.clone().requires_grad_(), target=2)
    made = explained(network, x, "guided_backprop", 2).data
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.filterwarnings("ignore:Setting backward hooks")
@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
@pytest.mark.parametrize("method", METHODS)
def test_equals_captum_on_monai_networks(name: str, method: str) -> None:
    model, x = make_model(name), draw(1, 1, *NETWORKS[name][2])
    model.network.eval()
    expected = CAPTUM[method](model.network).attribute(x.clone().requires_grad_(), target=1)
    made = mx.explain(model, x, method, target=1).data
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


# What follows from the rule.


def test_guided_backpropagation_is_the_gradient_where_all_is_positive() -> None:
    network, x = Network(F.relu), draw(1, 2, *SIZE).abs()
    for parameter in network.parameters():
        nn.init.uniform_(parameter, 0.1, 1.0, torch.Generator().manual_seed(4))
    nn.init.zeros_(network.norm.running_mean)
    gradient = explained(network, x, "gradient").data
    for method in METHODS:
        torch.testing.assert_close(explained(network, x, method).data, gradient)


def test_deconvolution_does_not_look_at_the_activations() -> None:
    """Without pooling, it is the same for every scan; guided backpropagation is not."""
    network, x, y = Network(F.relu), draw(1, 2, *SIZE), draw(1, 2, *SIZE, seed=7)
    torch.testing.assert_close(explained(network, x, "deconvnet").data, explained(network, y, "deconvnet").data)
    guided = [explained(network, one, "guided_backprop").data for one in (x, y)]
    assert not torch.allclose(*guided, rtol=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_is_its_samples_and_every_target_of_a_list_its_own(method: str) -> None:
    network, x = Network(F.relu), draw(2, 2, *SIZE)
    both = mx.explain(mx.Model(network), x, method, target=[0, 2], per_channel=True)
    for target, made in zip((0, 2), both, strict=True):
        for sample, together in zip(x, made.data, strict=True):
            torch.testing.assert_close(together, explained(network, sample, method, target).data)
        assert (made.provenance.forwards, made.provenance.backwards) == (2, 4)


@pytest.mark.parametrize("method", METHODS)
def test_smoothing_averages_over_copies(method: str) -> None:
    network, x = Network(F.relu), draw(2, *SIZE)
    plain = explained(network, x, method).data
    torch.testing.assert_close(explained(network, x, method, samples=3, noise=0.0).data, plain)
    assert not torch.allclose(explained(network, x, "guided_backprop", samples=3, noise=0.3).data, plain)


@pytest.mark.parametrize("method", METHODS)
def test_segmentation_with_prelu_is_not_the_gradient(method: str) -> None:
    """MONAI's U-Net has PReLU inside ADN: its own guided backpropagation finds nothing to change and says nothing."""
    model, x = make_model("unet"), draw(1, *NETWORKS["unet"][2])
    network = model.network.eval()
    theirs = GuidedBackpropGrad(network)(x[None].clone(), index=1)
    torch.testing.assert_close(theirs, VanillaGrad(network)(x[None].clone(), index=1))
    target = mx.SegmentationTarget(1, within="everywhere")
    gradient = mx.explain(model, x, "gradient", target).data
    torch.testing.assert_close(theirs[0] / x[0].numel(), gradient, rtol=1e-3, atol=1e-8)
    made = mx.explain(model, x, method, target)
    likeness = F.cosine_similarity(made.data.flatten(), gradient.flatten(), dim=0)
    assert float(likeness) < 0.9
    (note,) = made.provenance.notes
    assert "prelu" in note


@pytest.mark.parametrize("name", ["unet", "vit", "segresnet"])
@pytest.mark.parametrize("method", METHODS)
def test_monai_networks_by_hand(name: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with activations that are taken out of the network and replaced, one by one."""
    model, x = make_model(name), draw(1, *NETWORKS[name][2])
    target: Any = mx.SegmentationTarget(1, within="everywhere") if model.task == "segmentation" else 1
    made = mx.explain(model, x, method, target).data
    for module in model.network.modules():
        for child_name, child in list(module.named_children()):
            if isinstance(child, (nn.PReLU, nn.GELU, nn.ReLU)):
                setattr(module, child_name, _Replaced(_function(child), method == "guided_backprop"))
    leaf = x[None].clone().requires_grad_()
    output = model.network(leaf)
    output = output[0] if isinstance(output, tuple) else output
    expected = torch.autograd.grad(output[:, 1].mean(), leaf)[0][0]
    torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def _function(activation: nn.Module) -> Callable[[Tensor], Tensor]:
    if isinstance(activation, nn.PReLU):
        weight = activation.weight.detach()
        return lambda x: F.prelu(x, weight)
    # Another ReLU may work in place.
    return torch.relu if isinstance(activation, nn.ReLU) else activation


class _Replaced(nn.Module):
    def __init__(self, activation: Callable[[Tensor], Tensor], derivative: bool) -> None:
        super().__init__()
        # Not as a module of the network.
        self.held = (activation, derivative)

    def forward(self, x: Tensor) -> Tensor:
        return ByHand.apply(x, *self.held)


@pytest.mark.parametrize("method", [*METHODS, "guided_gradcam"])
def test_a_network_without_activations_is_refused(method: str) -> None:
    network = seeded(nn.Sequential(nn.Conv3d(2, 4, 3), nn.AdaptiveAvgPool3d(2), nn.Flatten(), nn.Linear(32, 3)))
    with pytest.raises(mx.MedXAIError, match="no activation such as ReLU"):
        mx.explain(mx.Model(network), draw(2, *SIZE), method, target=1)


# Guided Grad-CAM.


@pytest.mark.parametrize("layer", ["conv1", "conv2", "norm"])
def test_guided_grad_cam_is_the_product_of_both(layer: str) -> None:
    network, x = Network(F.relu), draw(2, 2, *SIZE)
    model = mx.Model(network)
    fine = mx.explain(model, x, "guided_backprop", target=2).data
    for positive in (True, False):
        coarse = mx.explain(model, x, "gradcam", target=2, layers=layer, positive=positive).data
        made = mx.explain(model, x, "guided_gradcam", target=2, layers=layer, positive=positive)
        torch.testing.assert_close(made.data, fine * coarse)
        assert float(made.data.abs().max()) > 0
        assert made.signed


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "unet"])
def test_guided_grad_cam_of_monai_networks(name: str) -> None:
    """With maps of a layer that is coarser than the scan, and with the layer left out."""
    model, x = make_model(name), draw(1, *NETWORKS[name][2])
    targets = [mx.SegmentationTarget(c, within="everywhere") if name == "unet" else c for c in (1, 2)]
    fine, coarse, made = (
        mx.explain(model, x, m, target=targets) for m in ("guided_backprop", "gradcam", "guided_gradcam")
    )
    for f, c, both in zip(fine, coarse, made, strict=True):
        torch.testing.assert_close(both.data, f.data * c.data)
        assert set(f.provenance.notes) <= set(both.provenance.notes)


@pytest.mark.filterwarnings("ignore:Setting backward hooks")
def test_guided_grad_cam_equals_captum_where_nothing_is_interpolated() -> None:
    network, x = Network(*RELUS["modules"]), draw(2, 2, *SIZE)
    for layer in ("conv1", "conv2"):
        expected = GuidedGradCam(network, getattr(network, layer)).attribute(x.clone().requires_grad_(), target=2)
        made = mx.explain(mx.Model(network), x, "guided_gradcam", target=2, layers=layer).data
        assert float(expected.detach().abs().max()) > 0
        # captum has a map for each channel.
        expected = expected.detach().sum(1, keepdim=True)
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))
