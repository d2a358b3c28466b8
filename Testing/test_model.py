"""Models refuse what they cannot take, in words, and say what they predict."""

from __future__ import annotations

import pytest
import torch
from conftest import make_model
from torch import Tensor, nn

import MedXAILib as mx


def scan(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(6))


class Dictionary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 3, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.conv(x).mean((2, 3, 4))
        return {"diagnosis": y, "quality": y[:, :1]}


def test_wrong_number_of_channels() -> None:
    with pytest.raises(mx.MedXAIError, match=r"takes 1 channel\(s\) and the volume has 2: give one file per channel"):
        mx.explain(make_model("resnet18"), scan(2, 24, 24, 16), "gradient")


@pytest.mark.parametrize("x", [torch.zeros(3, 3), torch.zeros(0, 1, 4, 4, 4), "scan.nrrd"])
def test_what_is_no_volume(x: object) -> None:
    with pytest.raises(mx.MedXAIError, match="A volume is a Volume, an image, or a tensor"):
        mx.explain(make_model("resnet18"), x, "gradient")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), 7.0])
def test_bad_voxels_are_refused_before_any_work(value: float) -> None:
    model = make_model("resnet18")
    model.network.register_forward_hook(lambda *_: pytest.fail("the network was asked"))
    with pytest.raises(mx.MedXAIError, match=r"NaN or infinite|constant"):
        mx.explain(model, torch.full((1, 24, 24, 16), value), "gradient")


def test_an_input_the_network_cannot_take() -> None:
    with pytest.raises(mx.MedXAIError, match=r"ViT cannot take an input of shape \(1, 1, 24, 24, 24\)"):
        mx.explain(make_model("vit"), scan(1, 24, 24, 24), "gradient")


def test_unknown_names_bring_the_nearest() -> None:
    model, x = make_model("resnet18"), scan(1, 24, 24, 16)
    for call, said in (
        (lambda: mx.explain(model, x, "grad-cam"), r"no method 'grad-cam': did you mean gradcam"),
        (lambda: mx.explain(model, x, target="malign"), r"no class 'malign': did you mean malignant"),
        (lambda: mx.explain(model, x, target=7), r"no class 7: .* has 3"),
        (lambda: mx.explain(model, x, "gradcam", layer="x"), r"no parameter of gradcam 'layer': did you mean layers"),
        (lambda: mx.explain(model, x, "smoothgrad", samples=-1), r"smoothgrad: samples = -1 is not possible"),
        (lambda: mx.explain(model, x, "integrated_gradients", baseline="blurr"), r"did you mean blur"),
        (lambda: mx.Model(model.network, task="classify"), r"no task 'classify': did you mean classification"),  # type: ignore[arg-type]
    ):
        with pytest.raises(mx.MedXAIError, match=said):
            call()


class Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean((2, 3, 4)).detach()


@pytest.mark.parametrize("method", ["gradient", "gradcam"])
def test_networks_that_are_not_differentiable(method: str) -> None:
    with pytest.raises(mx.MedXAIError, match=r"Detached is not differentiable.*use a perturbation method"):
        mx.explain(
            mx.Model(Detached()), scan(1, 8, 8, 8), method, **({"layers": ("conv",)} if method == "gradcam" else {})
        )


def test_dictionaries_and_tuples_of_outputs() -> None:
    x = scan(1, 8, 8, 8)
    model = mx.Model(Dictionary(), output="diagnosis")
    assert mx.explain(model, x, "gradient", target=2).data.abs().max() > 0
    with pytest.raises(mx.MedXAIError, match="no output 'None': known are diagnosis, quality"):
        mx.explain(mx.Model(Dictionary()), x, "gradient")


def test_prediction_names_its_classes() -> None:
    model, x = make_model("resnet18"), scan(1, 24, 24, 16)
    volume = mx.Volume(x, torch.eye(4).numpy())
    scores = model.predict(volume).scores
    assert list(scores) == ["none", "benign", "malignant"] and sum(scores.values()) == pytest.approx(1)
    made = mx.explain(model, volume, "gradient")
    assert made.provenance.target_label == max(scores, key=lambda name: scores[name])


def test_segmentation_prediction_is_on_the_volumes_grid(oblique: mx.Volume) -> None:
    from monai.transforms import Orientation

    model = make_model("unet", preprocessing=Orientation("RAS", labels=None))
    data = scan(1, 24, 24, 16)
    labels = model.predict(mx.Volume(data, oblique.affine)).labels
    assert labels is not None and labels.shape == (24, 24, 16)
    plain = make_model("unet").predict(mx.Volume(data, oblique.affine)).labels
    assert set(labels.data.unique().tolist()) <= {0.0, 1.0, 2.0} and plain is not None


def test_single_score_is_two_classes() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(1, 1, 3), nn.AdaptiveAvgPool3d(1), nn.Flatten())
    model = mx.Model(network, class_names=("healthy", "ill"))
    x = scan(1, 8, 8, 8)
    ill, healthy = (mx.explain(model, x, "gradient", target=t).data for t in ("ill", "healthy"))
    torch.testing.assert_close(ill, -healthy)
    scores = model.predict(mx.Volume(x, torch.eye(4).numpy())).scores
    assert scores["ill"] == pytest.approx(network(x[None]).sigmoid().item())


def test_fingerprint_follows_the_weights() -> None:
    model = make_model("resnet18")
    first = model.fingerprint
    assert model.fingerprint == first == make_model("resnet18").fingerprint
    with torch.no_grad():
        model.network.fc.bias += 1
    assert model.fingerprint != first


def test_another_network_or_volume_is_not_recomputed() -> None:
    x = scan(1, 24, 24, 16)
    made = mx.explain(make_model("resnet18"), x, "gradient", target=1)
    with pytest.raises(mx.MedXAIError, match="not the network that was explained"):
        mx.recompute(made, make_model("densenet121"), x)
    with pytest.raises(mx.MedXAIError, match="not the volume that was explained"):
        mx.recompute(made, make_model("resnet18"), x + 1)


def test_what_is_no_model() -> None:
    model, x = make_model("resnet18"), scan(1, 24, 24, 16)
    with pytest.raises(mx.MedXAIError, match=r"Say what the network is for first: Model\(network"):
        mx.explain(model.network, x, "gradient")  # type: ignore[call-overload]
    with pytest.raises(mx.MedXAIError, match=r"a torch.nn.Module, not function"):
        mx.Model(scan)  # type: ignore[arg-type]
    with pytest.raises(mx.MedXAIError, match=r"no device 'cuda:99' on this machine"):
        mx.explain(model, x, "gradient", run=mx.Run(device="cuda:99"))


def test_networks_in_another_precision() -> None:
    model, x = make_model("resnet18"), scan(1, 24, 24, 16)
    single = mx.explain(model, x, "gradient", target=1)
    model.network.double()
    made = mx.explain(model, x, "gradient", target=1)
    assert made.data.dtype == torch.float32
    torch.testing.assert_close(made.data, single.data, rtol=1e-3, atol=1e-5)
    assert model.predict(mx.Volume(x, torch.eye(4).numpy())).output.dtype == torch.float32


class Overflowing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x.sum((1, 2, 3, 4)).exp().exp().exp()[:, None]).repeat(1, 2)


def test_maps_that_are_not_finite_are_refused() -> None:
    with pytest.raises(mx.MedXAIError, match="is not finite: the network overflows"):
        mx.explain(mx.Model(Overflowing()), scan(1, 8, 8, 8).abs(), "gradient", target=0)


def test_layers_may_be_one_string() -> None:
    model, x = make_model("resnet18"), scan(1, 24, 24, 16)
    made = mx.explain(model, x, "hirescam", target=1, layers="layer3, layer4")
    assert made.provenance.parameters["layers"] == ["layer3", "layer4"]
