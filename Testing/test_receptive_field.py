"""A class activation map lands where the units look, checked with gradients and impulses."""

from __future__ import annotations

import pytest
import torch
from conftest import make_model
from monai.networks import nets
from torch import Tensor, nn
from torch.nn import functional

import MedXAILib as mx
from MedXAILib.engines.receptive_field import Following, Geometry, geometry_of

ANALYTIC: dict[str, nn.Module] = {
    "odd_stride2": nn.Sequential(nn.Conv3d(1, 1, 3, stride=2, padding=1), nn.Conv3d(1, 1, 3, stride=2, padding=1)),
    "even_no_padding": nn.Sequential(nn.Conv3d(1, 1, 2, stride=2), nn.Conv3d(1, 1, 4, stride=2, padding=1)),
    "dilated": nn.Sequential(nn.Conv3d(1, 1, 3, dilation=2, padding=2), nn.Conv3d(1, 1, 3, dilation=3)),
    "anisotropic": nn.Conv3d(1, 1, (1, 3, 5), stride=(1, 2, 3), padding=(0, 1, 0)),
    "max_pool": nn.Sequential(nn.Conv3d(1, 1, 3), nn.AvgPool3d(3, 2, 1), nn.AvgPool3d(2)),
    "transposed": nn.Sequential(nn.Conv3d(1, 1, 3, stride=2, padding=1), nn.ConvTranspose3d(1, 1, 2, stride=2)),
    "transposed_3": nn.Sequential(
        nn.Conv3d(1, 1, 2, stride=2), nn.ConvTranspose3d(1, 1, 3, stride=2, padding=1, output_padding=1)
    ),
    "padded": nn.Sequential(nn.ZeroPad3d((1, 2, 0, 3, 2, 0)), nn.Conv3d(1, 1, 3, padding="same"), nn.Conv3d(1, 1, 2)),
    "reflected": nn.Conv3d(1, 1, 3, padding=1, padding_mode="replicate"),
    "upsampled": nn.Sequential(nn.Conv3d(1, 1, 2, stride=4), nn.Upsample(scale_factor=2, mode="nearest")),
}


def positive(network: nn.Module) -> nn.Module:
    """All weights positive, so that every voxel a unit can see has a gradient."""
    for parameter in network.parameters():
        nn.init.uniform_(parameter, 0.5, 1.0)
    return network


@pytest.mark.parametrize("name", ANALYTIC)
def test_field_is_where_the_gradient_is(name: str) -> None:
    network = positive(ANALYTIC[name])
    x = torch.rand(1, 1, 31, 30, 29, requires_grad=True)
    with Following(3) as following:
        y = network(following.start(x.view_as(x)))
        geometry = geometry_of(y)
    assert geometry is not None
    unit = tuple(s // 2 for s in y.shape[2:])
    (gradient,) = torch.autograd.grad(y[(0, 0, *unit)], x)
    seen = gradient[0, 0].nonzero()
    for axis in range(3):
        low, high = (end[axis] + geometry.jump[axis] * unit[axis] for end in (geometry.low, geometry.high))
        measured = float(seen[:, axis].min()), float(seen[:, axis].max())
        # Nearest upsampling repeats units: there the centre is right to within half a repeated unit.
        slack = 2.5 if name == "upsampled" else 1.0 if "transposed" in name else 1e-6
        assert abs((low + high) / 2 - sum(measured) / 2) <= slack / 2
        assert low <= measured[0] + slack and high >= measured[1] - slack


class Impulse(nn.Module):
    """Tells how much of an impulse its layer sees: a class activation map of it must peak at the impulse."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = positive(trunk)

    def forward(self, x: Tensor) -> Tensor:
        y = self.trunk(x)
        return torch.stack([y.mean((1, 2, 3, 4)), y.amax((1, 2, 3, 4))], 1)


TRUNKS = {
    "odd": lambda: nn.Sequential(nn.Conv3d(1, 1, 3, stride=2, padding=1), nn.Conv3d(1, 1, 3, stride=2, padding=1)),
    "odd_size_no_pad": lambda: nn.Sequential(nn.Conv3d(1, 1, 5, stride=3), nn.Conv3d(1, 1, 3, stride=2)),
    "even": lambda: nn.Sequential(nn.Conv3d(1, 1, 2, stride=2), nn.Conv3d(1, 1, 2, stride=2)),
    "dilated": lambda: nn.Sequential(nn.Conv3d(1, 1, 3, stride=2, padding=2, dilation=2)),
    "pooled": lambda: nn.Sequential(nn.Conv3d(1, 1, 3, padding=1), nn.MaxPool3d(3, 2, 1), nn.AvgPool3d(2, 2)),
}


@pytest.mark.parametrize("size", [(33, 35, 31), (32, 40, 36)])
@pytest.mark.parametrize("trunk", TRUNKS)
def test_map_peaks_at_the_centre_of_the_field(trunk: str, size: tuple[int, ...]) -> None:
    network = Impulse(TRUNKS[trunk]())
    x = torch.rand(1, *size)
    with Following(3) as following, torch.no_grad():
        y = network.trunk(following.start(x[None].clone()))
        geometry = geometry_of(y)
    assert geometry is not None
    unit = tuple(s // 2 for s in y.shape[2:])
    # The unit of largest response, planted: the layer itself answers an impulse on its grid.
    planted = torch.zeros_like(y)
    planted[(0, 0, *unit)] = 1.0
    network.trunk.register_forward_hook(lambda _m, _i, out: out * 0 + planted)
    network.planted = nn.Identity()  # type: ignore[assignment]
    network.forward = lambda x: network.planted(network.trunk(x)).mean((1, 2, 3, 4))[:, None].repeat(1, 2)  # type: ignore
    made = mx.explain(mx.Model(network), x, "gradcam", target=1, layers=("planted",))
    peak = torch.tensor(torch.unravel_index(made.data[0].argmax(), size)).tolist()
    centre = [c + j * u for c, j, u in zip(geometry.centre, geometry.jump, unit, strict=True)]
    assert all(abs(p - c) <= 0.5 + 1e-6 for p, c in zip(peak, centre, strict=True))


def test_resnet18_units_look_where_measured() -> None:
    """Centres measured by the gradient of MONAI's ResNet18: layer4 has a stride of 16 voxels and starts at 0."""
    network = nets.resnet18(spatial_dims=3, n_input_channels=1, num_classes=2, widen_factor=0.125).eval()
    x = torch.rand(1, 1, 320, 16, 16, requires_grad=True)
    with Following(3) as following:
        handle = network.layer4.register_forward_hook(lambda _m, _i, y: setattr(network, "_seen", y))
        network(following.start(x.view_as(x)))
        handle.remove()
        geometry = geometry_of(network._seen)
    assert geometry is not None and geometry.jump == (16.0,) * 3
    assert geometry.centre == pytest.approx((0.0,) * 3)
    centres = []
    for unit in (9, 10, 11):
        (gradient,) = torch.autograd.grad(network._seen[0, :, unit].abs().sum(), x, retain_graph=True)
        weight = gradient.abs().sum((0, 1, 3, 4))
        centres.append(float((weight * torch.arange(320)).sum() / weight.sum()))
    assert centres == pytest.approx([144, 160, 176], abs=2)


def test_networks_of_monai_are_followed() -> None:
    for name, layer, jump in (
        ("densenet121", "features.transition2.pool", 16.0),
        ("unet", "model.1", 2.0),
        ("segresnet", "up_samples.1.0", 2.0),
    ):
        model = make_model(name)
        kept: dict[str, Tensor] = {}
        model.layer(layer).register_forward_hook(lambda _m, _i, y, kept=kept: kept.update(y=y))
        with Following(3) as following, torch.no_grad():
            model.network.eval()(following.start(torch.randn(1, 1, 32, 32, 32)))
        geometry = geometry_of(kept["y"])
        assert geometry is not None and geometry.jump == (jump,) * 3, name


def test_placing_is_linear_and_exact_at_the_centres() -> None:
    geometry = Geometry((4.0, 2.0, 1.0), (1.5, 0.0, -1.0), (2.5, 1.0, 1.0))
    maps = torch.rand(2, 3, 5, 6, 7)
    placed = geometry.place(maps, (20, 12, 7))
    assert placed.shape == (2, 3, 20, 12, 7)
    torch.testing.assert_close(placed[:, :, 2::4, :, :][:, :, 1, 0], maps[:, :, 1, 0])
    ramp = torch.arange(5.0)[None, None, :, None, None].expand(1, 1, 5, 6, 7)
    line = geometry.place(ramp, (20, 12, 7))[0, 0, :, 0, 0]
    torch.testing.assert_close(line[2:19], (torch.arange(2.0, 19.0) - 2) / 4)


def test_half_pixel_stretching_is_what_it_replaces() -> None:
    """For units that tile the input, as a transformer's patches, it is the familiar interpolation."""
    maps = torch.rand(1, 1, 4, 5, 6)
    placed = Geometry.spanning((4, 5, 6), (16, 20, 24)).place(maps, (16, 20, 24))
    expected = functional.interpolate(maps, scale_factor=4, mode="trilinear", align_corners=False)
    torch.testing.assert_close(placed, expected)
