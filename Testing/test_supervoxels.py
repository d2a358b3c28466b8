"""Supervoxels: what they are made of, and what ablation says of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from captum.attr import FeatureAblation
from conftest import make_model, oblique_affine
from torch import Tensor, nn

import MedXAILib as mx
from MedXAILib.supervoxels import Supervoxels, automatic_size, grid, numbered, slic

SPACING = (2.5, 0.8, 1.1)


def everywhere(shape: Sequence[int]) -> np.ndarray:
    return np.ones(shape, dtype=bool)


def tissues(shape: tuple[int, ...] = (19, 33, 27)) -> np.ndarray:
    """A ball in noise, (1, *shape), on a grid of SPACING."""
    at = np.stack(
        np.meshgrid(*[(np.arange(n) - n / 2) * s for n, s in zip(shape, SPACING, strict=True)], indexing="ij")
    )
    ball = (at**2).sum(0) < 9.0**2
    return (ball + 0.05 * np.random.default_rng(0).normal(size=shape))[None].astype(np.float32)


def pieces(labels: np.ndarray) -> int:
    """In how many pieces (touching by faces) a labelled grid falls."""
    found = 0
    for label in np.unique(labels):
        part = sitk.GetImageFromArray((labels == label).astype(np.uint8))
        found += int(sitk.GetArrayFromImage(sitk.ConnectedComponent(part, False)).max())
    return found


class Linear(nn.Module):
    """A weight for every voxel, and something of its own for each class."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(2, *shape, generator=torch.Generator().manual_seed(4)))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.w.flatten(1).T + 0.3


class Watched(Linear):
    """Keeps all that it was ever asked."""

    def __init__(self, *shape: int) -> None:
        super().__init__(*shape)
        self.asked: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.asked.append(x.clone())
        return super().forward(x)


def test_a_grid_has_even_boxes_of_the_size_in_mm() -> None:
    labels = grid((12, 10, 9), (2.0, 1.0, 1.0), 4.0)
    expected = np.zeros((12, 10, 9), dtype=int)
    # 24 mm in six, 10 mm in two (2.5 rounds to even), 9 mm in two.
    for d in range(12):
        for h in range(10):
            for w in range(9):
                expected[d, h, w] = (d // 2) * 4 + (h // 5) * 2 + (w >= 4)
    assert np.array_equal(labels, expected)
    assert np.array_equal(grid((3, 2), (1.0, 1.0), 0.1), [[0, 1], [2, 3], [4, 5]])
    assert not grid((3, 2), (1.0, 1.0), 100.0).any()


def test_slic_follows_tissue_and_is_connected() -> None:
    x = tissues()
    labels = slic(x, SPACING, 6.0, 1.0, everywhere(x.shape[1:]))
    made = numbered(labels, everywhere(labels.shape))
    assert sorted(np.unique(made.labels.numpy())) == list(range(made.count))
    assert pieces(made.labels.numpy()) == made.count
    means = np.array([x[0][made.labels.numpy() == i].mean() for i in range(made.count)])
    # A grid of as many boxes explains far less of the scan than parts that know its edges.
    boxes = numbered(grid(labels.shape, SPACING, 6.0), everywhere(labels.shape))
    of_boxes = np.array([x[0][boxes.labels.numpy() == i].mean() for i in range(boxes.count)])
    left = ((x[0] - means[made.labels.numpy()]) ** 2).sum() / ((x[0] - of_boxes[boxes.labels.numpy()]) ** 2).sum()
    assert left < 0.35 and made.count == pytest.approx(boxes.count, rel=0.5)
    assert np.array_equal(labels, slic(x, SPACING, 6.0, 1.0, everywhere(x.shape[1:])))


def test_slic_counts_in_mm_and_not_in_voxels() -> None:
    x = np.zeros((1, 24, 48, 36), dtype=np.float32)
    made = numbered(slic(x, SPACING, 10.0, 1.0, everywhere(x.shape[1:])), everywhere(x.shape[1:]))
    box, low = made.boxes()
    assert made.count == 6 * 4 * 4
    # In a scan without edges they are cubes of 10 mm.
    assert max(abs(b - e) for b, e in zip(box, (4, 12, 9), strict=True)) <= 1
    assert np.abs(low[made.labels[5, 13, 11]].numpy() - (4, 12, 9)).max() <= 1


def test_slic_does_not_care_how_bright_a_scan_is() -> None:
    x, inside = tissues(), everywhere((19, 33, 27))
    labels = slic(x, SPACING, 6.0, 1.0, inside)
    assert np.array_equal(slic(x * 1024, SPACING, 6.0, 1.0, inside), labels)
    # Twice the same channel says as much as once.
    assert (slic(np.concatenate([x, x * 1024]), SPACING, 6.0, 1.0, inside) != labels).mean() < 0.02


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (2, 2, 2), (1, 20, 20), (20, 1, 20), (20, 20, 1), (3, 3, 3), (16, 15), (1, 9)]
)
@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("size", [0.5, 4.0, 500.0])
def test_any_shape_is_divided(shape: tuple[int, ...], flat: bool, size: float) -> None:
    x = np.ones((2, *shape), dtype=np.float32) if flat else np.random.default_rng(1).normal(size=(2, *shape))
    for labels in (
        slic(x, (1.5, 1.0, 2.0)[: len(shape)], size, 1.0, everywhere(shape)),
        grid(shape, (1.0,) * len(shape), size),
    ):
        made = numbered(labels, everywhere(shape))
        assert made.labels.shape == shape and int(made.sizes().sum()) == np.prod(shape) and int(made.sizes().min()) > 0
        assert pieces(made.labels.numpy()) == made.count


def test_small_pieces_join_a_neighbour_but_islands_remain() -> None:
    x = np.random.default_rng(0).normal(size=(1, 12, 12, 12))
    inside = np.zeros((12, 12, 12), dtype=bool)
    inside[:6] = True
    inside[11, 11, 11] = True
    made = numbered(slic(x, (1.0, 1.0, 1.0), 4.0, 0.05, inside), inside)
    sizes = made.sizes()
    assert int(sizes.sum()) == inside.sum() and (made.labels.numpy() == made.count).sum() == (~inside).sum()
    assert pieces(np.where(inside, made.labels.numpy(), -1)) == made.count + pieces(np.where(inside, 0, 1)) - 2
    assert sizes[made.labels[11, 11, 11]] == 1 and sorted(sizes.tolist())[1] >= 8


@pytest.mark.parametrize("shape", [(96, 96, 96), (40, 40, 40), (1, 256, 256), (8, 200, 200), (128, 96)])
def test_about_two_hundred_by_default(shape: tuple[int, ...]) -> None:
    spacing = (3.0, 1.0, 1.0)[: len(shape)]
    made = grid(shape, spacing, automatic_size(shape, spacing, 1.0))
    assert 130 <= made.max() + 1 <= 300
    half = grid(shape, spacing, automatic_size(shape, spacing, 0.5))
    assert 1.4 * made.max() < half.max() < 3.5 * made.max()


def test_masks_take_away_what_they_say_whole_or_in_boxes() -> None:
    labels = torch.randint(0, 6, (5, 6, 7), generator=torch.Generator().manual_seed(0))
    made, like = Supervoxels(labels, 5), torch.zeros(1, 1, 5, 6, 7)
    absent = torch.rand(4, 5, generator=torch.Generator().manual_seed(1)) < 0.5
    whole = made.masks(absent, like)
    for m in range(4):
        expected = sum((labels == p) for p in range(5) if absent[m, p]) > 0
        assert torch.equal(whole.share[m, 0] > 0, expected)
    low = torch.tensor([[0, 0, 0], [1, 2, 3], [2, 0, 1], [2, 2, 2]])
    part = made.masks_in((3, 4, 4), low, absent, like)
    for m, (d, h, w) in enumerate(low.tolist()):
        assert torch.equal(part.share[m, 0], whole.share[m, 0, d : d + 3, h : h + 4, w : w + 4])


def test_boxes_hold_each() -> None:
    labels = torch.full((6, 7, 8), 3)
    labels[1:3, 2, 4:8] = 0
    labels[5, 6, 7] = 1
    labels[0:2, 0:3, 0] = 2
    box, low = Supervoxels(labels, 3).boxes()
    assert box == (2, 3, 4) and low.tolist() == [[1, 2, 4], [4, 4, 4], [0, 0, 0]]


def parcels(volume: mx.Volume) -> mx.Volume:
    """Labels 0, 3, 7 and 8 on another grid, in the space of `volume`: by the sagittal and axial position in mm."""
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] = (-150.0, -100.0, 20.0)
    shape = (90, 110, 100)
    x, z = affine[0, 3] + 2 * np.arange(shape[0]), affine[2, 3] + 2 * np.arange(shape[2])
    middle = volume.to_point(np.array(volume.shape) / 2)
    labels = np.where(x[:, None] < middle[0], 3, 7)[:, None, :] * (z[None, :] < middle[2])[:, None, :]
    labels = np.where(labels == 0, np.where(x[:, None, None] < middle[0], 0, 8), labels)
    return mx.Volume(torch.from_numpy(np.broadcast_to(labels, shape).copy())[None].float(), affine)


def expected_labels(volume: mx.Volume, given: mx.Volume) -> np.ndarray:
    """The label under each voxel of `volume`, looked up one by one."""
    found = np.zeros(volume.shape, dtype=int)
    for index in np.ndindex(*volume.shape):
        there = np.floor(given.to_index(volume.to_point(index)) + 0.5).astype(int)
        found[index] = int(given.data[0][tuple(there)])
    return found


def test_a_segmentation_in_the_scanners_space_gives_the_parts(oblique: mx.Volume, tmp_path: Path) -> None:
    given = parcels(oblique)
    labels = expected_labels(oblique, given)
    assert len(np.unique(labels)) == 4
    model = mx.Model(Linear(1, *oblique.shape))
    made = mx.explain(model, oblique, "supervoxel_ablation", target=1, supervoxels=given, infill="zero")
    share = (model.network.w.detach()[1] * oblique.data)[0].numpy()
    expected = sum((share * (labels == label)).sum() * (labels == label) for label in (3, 7, 8))
    np.testing.assert_allclose(made.data[0].numpy(), expected, rtol=1e-3, atol=1e-3)
    assert made.provenance.parameters["supervoxels"] == f"volume {given.fingerprint}"
    file = tmp_path / "parcels.nrrd"
    sitk.WriteImage(given.to_sitk(), str(file))
    again = mx.explain(model, oblique, "supervoxel_ablation", target=1, supervoxels=file, infill="zero")
    torch.testing.assert_close(again.data, made.data)
    assert torch.equal(mx.recompute(again, model, oblique).data, again.data)


@pytest.mark.parametrize("kind", ["slic", "grid"])
def test_outside_a_mask_nothing_is_ever_changed(oblique: mx.Volume, kind: str) -> None:
    mask = parcels(oblique)
    inside = torch.from_numpy(expected_labels(oblique, mask) > 0)
    network = Watched(1, *oblique.shape)
    asking: dict[str, Any] = {"supervoxels": kind, "within": mask, "size_mm": 9.0, "infill": "zero"}
    for method, more in (
        ("supervoxel_ablation", {}),
        ("lime", {"samples": 30}),
        ("kernel_shap", {"samples": 30}),
        ("permutation_shap", {"permutations": 1}),
    ):
        made = mx.explain(mx.Model(network), oblique, method, target=0, **asking, **more)
        asked = torch.cat(network.asked)
        assert torch.equal(asked[:, 0, ~inside], oblique.data[0, ~inside].expand(len(asked), -1))
        assert (asked[:, 0, inside] != oblique.data[0, inside]).any(0).all()
        assert not made.data[0, ~inside].any() and made.data[0, inside].all()
        network.asked.clear()


def test_a_mask_of_elsewhere_is_refused(oblique: mx.Volume) -> None:
    away = oblique_affine()
    away[:3, 3] += 500
    mask = mx.Volume(torch.ones(1, 8, 8, 8), away)
    model = mx.Model(Linear(1, *oblique.shape))
    for given in ({"within": mask}, {"supervoxels": mask}, {"within": mask, "supervoxels": "grid"}):
        with pytest.raises(mx.MedXAIError, match="nothing where the network looks"):
            mx.explain(model, oblique, "supervoxel_ablation", target=0, **given)
    flat = mx.Volume(torch.ones(1, 8, 8), np.eye(3))
    with pytest.raises(mx.MedXAIError, match="not as many axes"):
        mx.explain(model, oblique, "supervoxel_ablation", target=0, within=flat)


def test_an_unknown_kind_is_named(oblique: mx.Volume) -> None:
    with pytest.raises(mx.MedXAIError, match="did you mean slic"):
        mx.explain(mx.Model(Linear(1, *oblique.shape)), oblique, "lime", supervoxels="slick")
    with pytest.raises(mx.MedXAIError, match="within"):
        mx.explain(mx.Model(Linear(1, *oblique.shape)), oblique, "lime", within=3)


@pytest.mark.parametrize("infill", ["zero", "mean", "blur"])
def test_ablation_is_captums_with_the_same_mask(infill: str) -> None:
    model = make_model("resnet18")
    x = torch.randn(1, 24, 24, 16, generator=torch.Generator().manual_seed(1))
    labels = torch.from_numpy(grid((24, 24, 16), (1.0,) * 3, 7.0))
    made = mx.explain(model, x, "supervoxel_ablation", target=1, supervoxels="grid", size_mm=7.0, infill=infill)
    from MedXAILib.explainer import Question
    from MedXAILib.visual.baseline import baseline

    model.network.eval()
    seen = [model.prepare(mx.Volume(x, np.eye(4)))]
    other = baseline(Question(model, x[None], seen, []), infill)
    with torch.no_grad():
        theirs = FeatureAblation(model.network).attribute(x[None], other, target=1, feature_mask=labels[None, None])
    torch.testing.assert_close(made.data, theirs[0], rtol=1e-3, atol=1e-6)


def test_a_loss_for_each_ml(oblique: mx.Volume) -> None:
    model, given = mx.Model(Linear(1, *oblique.shape)), parcels(oblique)
    asking: dict[str, Any] = {"target": 0, "supervoxels": given, "infill": "zero"}
    whole = mx.explain(model, oblique, "supervoxel_ablation", **asking).data[0]
    per_ml = mx.explain(model, oblique, "supervoxel_ablation", per_ml=True, **asking).data[0]
    labels = torch.from_numpy(expected_labels(oblique, given))
    voxel = abs(np.linalg.det(oblique.affine[:3, :3])) / 1000
    for label in (3, 7, 8):
        mine = labels == label
        torch.testing.assert_close(per_ml[mine] * float(mine.sum() * voxel), whole[mine])


def test_it_ends_when_that_is_enough() -> None:
    x, calls = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(1)), []
    model = mx.Model(Linear(1, 8, 8, 8))
    run = mx.Run(memory_budget=1, enough=lambda: len(calls) > 4 or bool(calls.append(1)))
    asking: dict[str, Any] = {"target": 1, "supervoxels": "grid", "size_mm": 2.0, "infill": "zero"}
    made = mx.explain(model, x, "supervoxel_ablation", run=run, **asking)
    whole = mx.explain(model, x, "supervoxel_ablation", **asking)
    known = made.data != 0
    assert made.provenance.partial and 0 < known.sum() < x.numel() / 2
    torch.testing.assert_close(made.data[known], whole.data[known])
