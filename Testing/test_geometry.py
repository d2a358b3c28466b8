"""A map comes back on the volume's own grid: oblique, anisotropic, reoriented, resampled, cut out, padded."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import oblique_affine
from monai.transforms import Compose, CropForeground, Flip, Orientation, ScaleIntensity, Spacing
from torch import Tensor, nn

import MedXAILib as mx
from MedXAILib.grid import resample


class Total(nn.Module):
    """Each output is the sum of the input (times 1 and -1): the gradient is 1 in every voxel that is looked at."""

    def forward(self, x: Tensor) -> Tensor:
        total = x.flatten(1).sum(1, keepdim=True)
        return torch.cat([-total, total], 1)


class Square(nn.Module):
    """Sum of squares: its gradient, twice the input, is a picture of what the network saw."""

    def forward(self, x: Tensor) -> Tensor:
        return (x**2).flatten(1).sum(1, keepdim=True).repeat(1, 2)


def smooth_scan(affine: np.ndarray, shape: tuple[int, ...], centre: np.ndarray, width: float = 12.0) -> mx.Volume:
    """A Gaussian blob at `centre` in RAS mm, over a floor of 1."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    points = index @ affine[:3, :3].T + affine[:3, 3]
    blob = 1 + 50 * np.exp(-0.5 * ((points - centre) ** 2).sum(-1) / width**2)
    return mx.Volume(torch.from_numpy(blob).float()[None], affine)


def peak(volume_map: mx.SaliencyMap) -> np.ndarray:
    at = np.unravel_index(int(volume_map.data[0].argmax()), volume_map.data.shape[1:])
    return volume_map.affine[:3, :3] @ np.array(at) + volume_map.affine[:3, 3]


PREPROCESSING = {
    "none": None,
    "reoriented": Compose([Orientation("RAS", labels=None)]),
    "other_way": Compose([Orientation("PIL", labels=None), Flip(spatial_axis=(0, 2))]),
    "resampled": Compose([Orientation("RAS", labels=None), Spacing((1.5, 1.5, 1.5))]),
    "cropped": Compose(
        [Orientation("LPS", labels=None), CropForeground(select_fn=lambda x: x > 1.5, allow_smaller=True)]
    ),
    "scaled": Compose([ScaleIntensity()]),
}


@pytest.mark.parametrize("name", PREPROCESSING)
def test_map_is_where_the_finding_is(name: str) -> None:
    affine = oblique_affine((3.0, 1.1, 0.9))
    centre = affine[:3, :3] @ np.array([10, 22, 30]) + affine[:3, 3]
    volume = smooth_scan(affine, (21, 47, 52), centre)
    model = mx.Model(Square(), preprocessing=PREPROCESSING[name])
    made = mx.explain(model, volume, "gradient", target=0)
    assert made.data.shape == volume.data.shape
    np.testing.assert_array_equal(made.affine, volume.affine)
    assert np.linalg.norm(peak(made) - centre) < 1.5
    image = made.to_sitk()
    x, y, z = image.TransformIndexToPhysicalPoint((30, 22, 10))
    np.testing.assert_allclose((-x, -y, z), centre, atol=1e-6)
    assert image.GetPixel(30, 22, 10) == pytest.approx(float(made.data.max()), rel=0.05)


def test_reorienting_alone_changes_no_value(oblique: mx.Volume) -> None:
    plain = mx.explain(mx.Model(Square()), oblique, "gradient", target=0)
    turned = mx.explain(mx.Model(Square(), preprocessing=PREPROCESSING["other_way"]), oblique, "gradient", target=0)
    torch.testing.assert_close(turned.data, plain.data, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("preprocessing", ["none", "resampled"])
def test_region_is_cut_out_and_put_back(preprocessing: str) -> None:
    affine = oblique_affine((3.0, 1.1, 0.9))
    centre = affine[:3, :3] @ np.array([10, 22, 30]) + affine[:3, 3]
    volume = smooth_scan(affine, (21, 47, 52), centre)
    size = (7, 15, 17) if preprocessing == "none" else (12, 13, 14)
    model = mx.Model(Total(), preprocessing=PREPROCESSING[preprocessing], patch_size=size)
    made = mx.explain(model, volume, "gradient", target=1, region=tuple(centre))
    inside = made.data[0] > 0
    points = np.argwhere(inside.numpy()) @ affine[:3, :3].T + affine[:3, 3]
    spacing = np.array(volume.spacing if preprocessing == "none" else (1.5,) * 3)
    np.testing.assert_allclose(points.mean(0), centre, atol=1.0)
    volume_mm3 = float(inside.sum()) * np.prod(volume.spacing)
    assert volume_mm3 == pytest.approx(np.prod(np.array(size) * spacing), rel=0.15)
    assert made.provenance.region == pytest.approx(list(centre))


def test_a_box_is_the_voxels_in_it(oblique: mx.Volume) -> None:
    low, high = oblique.to_point((4, 10, 8)), oblique.to_point((9, 20, 15))
    box = (tuple(np.minimum(low, high)), tuple(np.maximum(low, high)))
    made = mx.explain(mx.Model(Total()), oblique, "gradient", target=1, region=box)
    lit = made.data[0] != 0
    assert lit[4:10, 10:21, 8:16].all() and float(lit.float().mean()) < 0.2


def test_region_past_the_border_is_filled_with_background(oblique: mx.Volume) -> None:
    corner = tuple(oblique.to_point((1, 1, 1)))
    seen: list[Tensor] = []

    class Spy(Total):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.detach())
            return super().forward(x)

    made = mx.explain(mx.Model(Spy(), patch_size=(8, 8, 8)), oblique, "gradient", target=1, region=corner)
    assert seen[0].shape == (1, 1, 8, 8, 8)
    assert float(seen[0][0, 0, 0, 0, 0]) == float(oblique.data.min())
    assert int((made.data != 0).sum()) == 6**3


@pytest.mark.parametrize(
    ("region", "said"),
    [
        ((9000.0, 0.0, 0.0), "lies outside the scan, which covers R"),
        (((9000, 0, 0), (9010, 10, 10)), "lies outside the scan"),
        ((1.0, 2.0), "A region is a centre"),
        ((1.0, (2.0, 3.0)), "A region is a centre"),
        ((float("nan"), 0.0, 0.0), "A region is a centre"),
        ("chest", "A region is a centre"),
    ],
)
def test_regions_that_are_none(oblique: mx.Volume, region: object, said: str) -> None:
    with pytest.raises(mx.MedXAIError, match=said):
        mx.explain(mx.Model(Total(), patch_size=(8, 8, 8)), oblique, "gradient", region=region)


def test_patch_network_asks_where_to_look(oblique: mx.Volume) -> None:
    with pytest.raises(mx.MedXAIError, match=r"looks at 20 x 6 x 9 mm and the scan is larger: say where with region"):
        mx.explain(mx.Model(Total(), patch_size=(8, 8, 8)), oblique, "gradient")
    with pytest.raises(mx.MedXAIError, match="A centre needs a network with a patch size"):
        mx.explain(mx.Model(Total()), oblique, "gradient", region=tuple(oblique.to_point((5, 5, 5))))


def test_resampling_equals_simpleitk() -> None:
    """An independent resampler, between two oblique grids."""
    rng = np.random.default_rng(0)
    source = mx.Volume(torch.from_numpy(rng.normal(size=(1, 14, 18, 16))).float(), oblique_affine((3.0, 2.0, 2.5)))
    onto = oblique_affine((1.7, 2.2, 1.3)) @ np.array(
        [[0.98, 0.1, 0, 2.0], [-0.1, 0.98, 0, 3.0], [0, 0, 1, 4.0], [0, 0, 0, 1.0]]
    )
    onto[:3, :3], scale = np.linalg.qr(onto[:3, :3])
    onto[:3, :3] *= np.abs(np.diag(scale))
    target = mx.Volume(torch.zeros(1, 20, 15, 22), onto)
    ours = resample(source.data, source.affine, target.shape, target.affine)[0].numpy()
    theirs = sitk.GetArrayFromImage(
        sitk.Resample(source.to_sitk(), target.to_sitk(), sitk.Transform(), sitk.sitkLinear, 0.0, sitk.sitkFloat32)
    )
    both = (ours != 0) & (theirs != 0)
    assert both.mean() > 0.03
    np.testing.assert_allclose(ours[both], theirs[both], atol=1e-4)


def test_two_dimensional_networks() -> None:
    image = sitk.GetImageFromArray(np.random.default_rng(0).normal(size=(24, 30)).astype(np.float32))
    image.SetSpacing((0.5, 0.7))
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    for method in (m for m in mx.methods("SaliencyMap") if not m.startswith(("attention", "mil"))):
        asking = {"within": ((-10.0, -10.0), (-5.0, -5.0))} if method == "counterfactual_infill" else {}
        made = mx.explain(mx.Model(network), image, method, target=1, **asking)
        assert made.data.shape == (1, 24, 30)
        assert made.to_sitk().GetSpacing() == image.GetSpacing()
