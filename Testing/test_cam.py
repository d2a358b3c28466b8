"""The CAM family against its formulas, exact identities and captum."""

from __future__ import annotations

import pytest
import torch
from captum.attr import LayerGradCam
from conftest import make_model
from monai.networks import nets
from torch import Tensor, nn

import MedXAILib as mx
from MedXAILib.visual.gradcam import GradCAM
from MedXAILib.visual.gradcam_plus_plus import GradCAMPlusPlus
from MedXAILib.visual.hirescam import HiResCAM
from MedXAILib.visual.layercam import LayerCAM


class Pooled(nn.Module):
    """A trunk at the input's own grid, global average pooling and one linear layer: where CAM is exact."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.trunk = nn.Sequential(nn.Conv3d(1, 6, 3, padding=1), nn.ReLU())
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.trunk(x).mean((2, 3, 4)))


class MultiScale(nn.Module):
    """Features of two layers, averaged and side by side (Liao 2019)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.fine = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU())
        self.coarse = nn.Sequential(nn.Conv3d(4, 5, 3, padding=1), nn.ReLU())
        self.fc = nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(x)
        return self.fc(torch.cat([fine.mean((2, 3, 4)), self.coarse(fine).mean((2, 3, 4))], 1))


def scan(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(6))


def test_formulas_on_given_activations_and_gradients() -> None:
    a, g = scan(2, 3, 4, 5, 6).abs(), scan(2, 3, 4, 5, 6).roll(1, 1)
    alpha = g**2 / (2 * g**2 + a.sum((2, 3, 4), keepdim=True) * g**3)
    expected = {
        GradCAM: (g.mean((2, 3, 4), keepdim=True) * a).sum(1, keepdim=True),
        GradCAMPlusPlus: ((alpha * g.relu()).sum((2, 3, 4), keepdim=True) * a).sum(1, keepdim=True),
        HiResCAM: (g * a).sum(1, keepdim=True),
        LayerCAM: (g.relu() * a).sum(1, keepdim=True),
    }
    for kind, map_ in expected.items():
        torch.testing.assert_close(kind().weighted(a, g), map_, rtol=1e-4, atol=1e-5)
        tiny = kind().weighted(a * 1e-3, g * 1e-9)
        assert torch.isfinite(tiny).all()
    # Small gradients, as deep networks have them, do not change Grad-CAM++'s weights but for their scale.
    small = GradCAMPlusPlus().weighted(a, g * 1e-8)
    weights = ((0.5 * g.relu()).sum((2, 3, 4), keepdim=True) * a).sum(1, keepdim=True)
    torch.testing.assert_close(small / small.abs().max(), weights / weights.abs().max(), rtol=1e-4, atol=1e-5)


def test_mean_of_cam_and_bias_are_the_score() -> None:
    network, x = Pooled(), scan(2, 1, 9, 8, 7)
    model = mx.Model(network)
    made = mx.explain(model, x, "cam", target=2, layers=("trunk",))
    score = network(x)[:, 2] - network.fc.bias[2]
    torch.testing.assert_close(made.data.mean((1, 2, 3, 4)), score.detach(), rtol=1e-4, atol=1e-6)
    lead = mx.explain(model, x, "cam", target=mx.ClassTarget(2, versus=0), layers=("trunk",))
    gap = network(x)[:, 2] - network(x)[:, 0] - network.fc.bias[2] + network.fc.bias[0]
    torch.testing.assert_close(lead.data.mean((1, 2, 3, 4)), gap.detach(), rtol=1e-4, atol=1e-6)


def test_cam_is_gradcam_and_hirescam_up_to_the_number_of_units() -> None:
    model, x = mx.Model(Pooled()), scan(1, 9, 8, 7)
    cam = mx.explain(model, x, "cam", target=1, layers=("trunk",)).data
    for method in ("gradcam", "hirescam"):
        made = mx.explain(model, x, method, target=1, layers=("trunk",), positive=False)
        torch.testing.assert_close(made.data * cam.numel(), cam, rtol=1e-4, atol=1e-6)


def test_hirescam_sums_to_the_score_less_its_bias() -> None:
    model, x = make_model("resnet18"), scan(1, 24, 24, 16)
    captured: dict[str, Tensor] = {}
    model.network.layer4.register_forward_hook(lambda _m, _i, y: captured.update(y=y))
    score = model.network.eval()(x[None])[0, 1] - model.network.fc.bias[1]
    from MedXAILib.engines.capture import capture
    from MedXAILib.explainer import Question

    question = Question(model, x[None], [model.prepare(mx.Volume(x, torch.eye(4).numpy()))], [mx.ClassTarget(1)])
    with model.ready():
        values, taken = capture(question, ["layer4"])
        (gradient,) = question.gradients(values[0], [taken["layer4"].raw])
    total = HiResCAM().weighted(taken["layer4"].raw.detach(), gradient).sum()
    torch.testing.assert_close(total, score.detach(), rtol=1e-4, atol=1e-5)


def test_multi_scale_cam_adds_up_over_its_layers() -> None:
    network, x = MultiScale(), scan(1, 9, 8, 7)
    model = mx.Model(network)
    from MedXAILib.engines.capture import suggest_layer  # noqa: F401  (the layers are named here)

    one = mx.explain(model, x, "cam", target=1, layers=("fine", "coarse"))
    assert one.data.shape == x.shape
    with pytest.raises(mx.MedXAIError, match="linear in the averages of coarse"):
        mx.explain(model, x, "cam", target=1, layers=("coarse",))


def test_cam_refuses_other_networks_with_the_alternative() -> None:
    with pytest.raises(mx.MedXAIError, match="use hirescam or gradcam"):
        mx.explain(make_model("vit"), scan(1, 24, 24, 16), "cam", target=1)


@pytest.mark.parametrize(("name", "layer"), [("resnet18", "layer3"), ("densenet121", "features.denseblock2")])
def test_gradcam_equals_captum(name: str, layer: str) -> None:
    model, x = make_model(name), scan(2, 1, 24, 24, 16)
    kept: dict[str, Tensor] = {}
    from MedXAILib.engines.receptive_field import Following, geometry_of

    with Following(3) as following, torch.no_grad():
        handle = model.layer(layer).register_forward_hook(lambda _m, _i, y: kept.update(y=y))
        model.network.eval()(following.start(x.clone()))
        handle.remove()
    expected = LayerGradCam(model.network, model.layer(layer)).attribute(x, target=1, relu_attributions=True)
    geometry = geometry_of(kept["y"])
    assert geometry is not None
    made = mx.explain(model, x, "gradcam", target=1, layers=(layer,))
    torch.testing.assert_close(made.data, geometry.place(expected.detach(), (24, 24, 16)), rtol=1e-4, atol=1e-7)


def test_all_classes_and_layers_come_from_one_forward() -> None:
    model, x = make_model("resnet18"), scan(1, 24, 24, 16)
    together = mx.explain(model, x, "gradcam", target=[0, 1, 2], layers=("layer3", "layer4"))
    assert [m.provenance.forwards for m in together] == [1, 1, 1] and together[0].provenance.backwards == 3
    for target, made in enumerate(together):
        alone = mx.explain(model, x, "gradcam", target=target, layers=("layer3", "layer4"))
        torch.testing.assert_close(made.data, alone.data)
        assert made.provenance.target["which"] == target


@pytest.mark.parametrize("fuse", ["mean", "max", "product"])
def test_layers_are_fused_after_scaling(fuse: str) -> None:
    model, x = make_model("resnet18"), scan(1, 24, 24, 16)
    single = [mx.explain(model, x, "layercam", target=1, layers=(name,)).data for name in ("layer2", "layer3")]
    scaled = torch.stack([m / m.max() for m in single])
    expected = {"mean": scaled.mean(0), "max": scaled.amax(0), "product": scaled.prod(0)}[fuse]
    made = mx.explain(model, x, "layercam", target=1, layers=("layer2", "layer3"), fuse=fuse)
    torch.testing.assert_close(made.data, expected, rtol=1e-4, atol=1e-6)


def test_in_place_activations_leave_the_layer_as_it_was() -> None:
    """MONAI's DenseNet works in place on the output of `features`; others fail there."""
    model, x = make_model("densenet121"), scan(1, 48, 40, 40)
    made = mx.explain(model, x, "hirescam", target=1, layers=("features",), positive=False)
    assert made.data.abs().max() > 0


def test_layers_without_a_spatial_layout_are_refused() -> None:
    model, x = make_model("resnet18"), scan(1, 24, 24, 16)
    with pytest.raises(mx.MedXAIError, match="'fc' has no spatial layout"):
        mx.explain(model, x, "gradcam", layers=("fc",))
    with pytest.raises(mx.MedXAIError, match=r"no layer 'layr4'.*layer4"):
        mx.explain(model, x, "gradcam", layers=("layr4",))


def test_suggested_layers() -> None:
    """The last layer that knows where: before the last attention with a class token, in the decoder for labels."""
    for name, layer in (("resnet18", "layer4"), ("vit", "blocks.1.norm1"), ("unet", "model.1")):
        model = make_model(name)
        mx.explain(model, scan(1, 24, 24, 16), "hirescam", target=1)
        assert list(model._suggested.values()) == [layer]


def test_tokens_of_uneven_patches_find_their_grid() -> None:
    torch.manual_seed(0)
    network = nets.ViT(1, (24, 24, 16), (8, 6, 4), 24, 48, 2, 2, classification=True, num_classes=2, post_activation="")
    made = mx.explain(mx.Model(network), scan(1, 24, 24, 16), "hirescam", target=1, layers=("blocks.1.norm1",))
    assert made.data.shape == (1, 24, 24, 16) and made.data.max() > 0


def test_gradcam_before_a_normalisation_says_that_it_is_noise() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv3d(1, 4, 3), nn.InstanceNorm3d(4), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    made = mx.explain(mx.Model(network), scan(1, 9, 8, 7), "gradcam", target=1, layers=("0",))
    assert any("rounding noise: use hirescam" in note for note in made.provenance.notes)
    # Left to itself it takes a layer where the mean gradient means something.
    assert not mx.explain(mx.Model(network), scan(1, 9, 8, 7), "gradcam", target=1).provenance.notes


class TwoChannels(nn.Module):
    """Two features: one sees the left half, which decides; one the right half, which does not."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.clone(), x.clone()
        left[..., 4:] = 0
        right[..., :4] = 0
        y = self.seen(torch.cat([left, right], 1))
        score = 5 * y[:, 0].mean((1, 2, 3))
        return torch.stack([torch.zeros_like(score), score], 1)


def test_scorecam_by_hand() -> None:
    x = torch.rand(1, 6, 6, 8, generator=torch.Generator().manual_seed(0)) + 0.5
    network = TwoChannels()
    made = mx.explain(mx.Model(network), x, "scorecam", target=1, layers=("seen",), clusters=0)
    halves = [x.clone(), x.clone()]
    halves[0][..., 4:] = 0
    halves[1][..., :4] = 0
    unit = [(h - h.min()) / (h.max() - h.min()) for h in halves]
    scores = torch.stack([network((x * u)[None])[0, 1] for u in unit])
    expected = (scores.softmax(0)[:, None, None, None, None] * torch.stack(halves)).sum(0)
    torch.testing.assert_close(made.data, expected, rtol=1e-4, atol=1e-6)


def test_scorecam_clusters_cost_their_number_and_stay_near_the_full_map() -> None:
    model, x = make_model("resnet18"), scan(1, 24, 24, 16)
    full = mx.explain(model, x, "scorecam", target=1, layers=("layer3",), clusters=0)
    few = mx.explain(model, x, "scorecam", target=1, layers=("layer3",), clusters=4)
    assert full.provenance.forwards == 2 + 8 and few.provenance.forwards == 2 + 4
    both = torch.stack([full.data.flatten(), few.data.flatten()])
    assert float(torch.corrcoef(both)[0, 1]) > 0.8


def test_window_attention_gives_its_channels_last() -> None:
    model = make_model("swinunetr")
    x = scan(1, 64, 32, 32)
    made = mx.explain(model, x, "layercam", target=1, layers=("swinViT.layers2.0.blocks.0", "swinViT.layers2.0"))
    assert made.data.shape == x.shape and made.data.max() > 0


def test_layer_is_found_in_swin_unetr() -> None:
    model = make_model("swinunetr")
    model.layers = ()
    mx.explain(model, scan(1, 64, 32, 32), "hirescam", target=1)
    assert list(model._suggested.values()) == ["decoder2"]
