"""What several tests share: MONAI's own networks, kept small, and a volume as scanners make them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from monai.networks import nets
from torch import nn

import MedXAILib as mx

# Small networks lose more to handing work between threads than they gain.
torch.set_num_threads(1)

SIZE = (24, 24, 16)


def _unet() -> nn.Module:
    return nets.UNet(
        spatial_dims=3, in_channels=1, out_channels=3, channels=(4, 8, 16), strides=(2, 2), num_res_units=1
    )


def _vit() -> nn.Module:
    return nets.ViT(
        1,
        SIZE,
        (8, 8, 8),
        hidden_size=24,
        mlp_dim=48,
        num_layers=2,
        num_heads=2,
        classification=True,
        num_classes=3,
        post_activation="",
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...]]] = {
    "resnet18": (
        lambda: nets.ResNet(
            "basic", [1, 1, 1, 1], [4, 8, 8, 16], n_input_channels=1, num_classes=3, conv1_t_size=3, no_max_pool=True
        ),
        "classification",
        SIZE,
    ),
    "densenet121": (
        lambda: nets.DenseNet(3, 1, 3, init_features=8, growth_rate=4, block_config=(2, 2, 2)),
        "classification",
        SIZE,
    ),
    "unet": (_unet, "segmentation", SIZE),
    "segresnet": (
        lambda: nets.SegResNet(
            3, init_filters=16, in_channels=1, out_channels=3, blocks_down=(1, 1, 1), blocks_up=(1, 1)
        ),
        "segmentation",
        SIZE,
    ),
    "vit": (_vit, "classification", SIZE),
    "swinunetr": (
        lambda: nets.SwinUNETR(
            in_channels=1, out_channels=3, feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1)
        ),
        "segmentation",
        (64, 32, 32),
    ),
}


def with_statistics(network: nn.Module) -> nn.Module:
    """`network`, with normalisations that do something: with the statistics of a fresh one they are the identity."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2.0)
    return network


def make_model(name: str, **known: object) -> mx.Model:
    build, task, _ = NETWORKS[name]
    torch.manual_seed(0)
    network = with_statistics(build())
    if name == "swinunetr":
        # Finding a layer means looking at all of them, which takes long here; test_capture does it.
        known.setdefault("layers", ("decoder2",))
    return mx.Model(network, task=task, class_names=("none", "benign", "malignant"), **known)  # type: ignore[arg-type]


@pytest.fixture(params=list(NETWORKS))
def monai_case(request: pytest.FixtureRequest) -> tuple[str, mx.Model, torch.Tensor]:
    """The name of a network, a model of it, and a batch (1, 1, D, H, W) it takes."""
    size = NETWORKS[request.param][2]
    x = torch.randn(1, 1, *size, generator=torch.Generator().manual_seed(1))
    return request.param, make_model(request.param), x


def oblique_affine(spacing: tuple[float, float, float] = (2.5, 0.8, 1.1)) -> np.ndarray:
    """A tilted, anisotropic grid that is neither LPS nor RAS, as array index (d, h, w) to RAS mm."""
    rotation, _ = np.linalg.qr(np.array([[0.9, 0.2, -0.3], [-0.1, 0.95, 0.35], [0.4, -0.2, 0.9]]))
    affine = np.eye(4)
    affine[:3, :3] = rotation[:, [2, 1, 0]] * np.array(spacing) * np.array([1, -1, 1])
    affine[:3, 3] = (-61.0, 33.0, 127.0)
    return affine


@pytest.fixture
def oblique() -> mx.Volume:
    """An oblique, anisotropic volume of odd size."""
    data = torch.randn(1, 19, 33, 27, generator=torch.Generator().manual_seed(2))
    return mx.Volume(data, oblique_affine())


@pytest.fixture
def host(tmp_path):
    """3D Slicer's application, imitated around its real scene; a test file that uses it skips where it cannot be."""
    import slicer_host

    with slicer_host.running(tmp_path) as host:
        yield host
