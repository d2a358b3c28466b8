"""Meaningful perturbation against a scan of which it is known what matters, and against its own promises."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import numpy as np
import pytest
import torch
from conftest import make_model, oblique_affine
from torch import Tensor, nn

import MedXAILib as mx
from MedXAILib import registry
from MedXAILib.engines.masks import Masks
from MedXAILib.engines.smooth_masks import SmoothMasks
from MedXAILib.explainer import Question
from MedXAILib.infills import choice
from MedXAILib.infills.infill import Infill
from MedXAILib.resources import path
from MedXAILib.visual.meaningful_perturbation import MeaningfulPerturbation, _Score

METHOD = "meaningful_perturbation"


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.EXPLAINERS, METHOD, MeaningfulPerturbation)


class InCube(nn.Module):
    """How bright the scan is within a cube, after a convolution and a kink."""

    def __init__(self, cube: Tensor) -> None:
        super().__init__()
        self.blur = nn.Conv3d(1, 2, 3, padding=1)
        with torch.no_grad():
            self.blur.weight[0], self.blur.weight[1] = 1 / 27, -1 / 27
            self.blur.bias.zero_()
        self.register_buffer("cube", cube)

    def forward(self, x: Tensor) -> Tensor:
        y = self.blur(x).relu()
        inside = ((y[:, 0] - y[:, 1]) * self.cube).flatten(1).sum(1) / self.cube.sum()
        return torch.stack([inside, -inside], 1)


def planted(
    low: Sequence[int], high: Sequence[int], size: Sequence[int] = (24, 24, 24)
) -> tuple[mx.Model, Tensor, Tensor]:
    cube = torch.zeros(*size)
    cube[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = 1
    x = 0.1 * torch.randn(1, *size, generator=torch.Generator().manual_seed(0)) + cube
    return mx.Model(InCube(cube), task="classification"), x, cube > 0


def overlap(one: Tensor, other: Tensor) -> float:
    return float((one & other).sum() / (one | other).sum())


CUBE = planted((8, 8, 8), (16, 16, 16))


@pytest.mark.parametrize("cube", [((8, 8, 8), (16, 16, 16)), ((0, 0, 0), (8, 8, 8)), ((4, 12, 14), (12, 22, 24))])
@pytest.mark.parametrize("game", ["deletion", "preservation", "both"])
def test_it_finds_the_planted_cube(cube: tuple[tuple[int, ...], ...], game: str) -> None:
    model, x, inside = planted(*cube)
    made = mx.explain(model, x, METHOD, 0, game=game, infill="zero")
    assert overlap(made.data[0] >= 0.5, inside) > 0.8
    assert made.data.min() >= 0 and made.data.max() <= 1 and not made.signed
    assert made.provenance.backwards <= 60 * (1 + (game == "both"))


def test_it_finds_the_planted_cube_on_a_tilted_anisotropic_grid() -> None:
    model, x, inside = planted((3, 9, 6), (9, 27, 18), (16, 40, 30))
    made = mx.explain(model, mx.Volume(x, oblique_affine()), METHOD, 0, infill="zero")
    assert overlap(made.data[0] >= 0.5, inside) > 0.8
    volume = float((made.data >= 0.5).sum()) * np.prod((2.5, 0.8, 1.1)) / 1000
    (note,) = made.provenance.notes
    assert f"{volume:.3g} mL" in note and "with the mask replaced" in note


def test_deletion_and_preservation_agree() -> None:
    model, x, _ = CUBE
    made = [
        mx.explain(model, x, METHOD, 0, game=game, infill="zero").data[0] >= 0.5
        for game in ("deletion", "preservation")
    ]
    assert overlap(*made) > 0.9


@pytest.mark.parametrize("game", ["deletion", "preservation"])
def test_a_mask_that_costs_too_much_is_empty(game: str) -> None:
    model, x, _ = CUBE
    made = mx.explain(model, x, METHOD, 0, game=game, infill="zero", sparsity=1e4)
    assert float(made.data.max()) < 0.05


@pytest.mark.parametrize("area", [0.02, 0.037, 0.1])
def test_a_mask_has_the_area_it_should(area: float) -> None:
    model, x, inside = CUBE
    found = mx.explain(model, x, METHOD, 0, infill="zero", area=(area,)).data[0] >= 0.5
    assert abs(float(found.float().mean()) - area) < 0.3 * area
    # As much of the cube as fits, and no less than all of it.
    assert float((found & inside).sum()) > 0.85 * min(float(found.sum()), float(inside.sum()))


def test_of_several_areas_the_first_that_is_enough() -> None:
    model, x, _ = CUBE
    several = mx.explain(model, x, METHOD, 0, infill="zero", area=(0.3, 0.01, 0.06))
    alone = mx.explain(model, x, METHOD, 0, infill="zero", area=(0.06,))
    assert torch.equal(several.data, alone.data)
    assert several.provenance.backwards == 2 * 40 + 4


def test_an_area_is_a_fraction() -> None:
    with pytest.raises(mx.MedXAIError, match="fractions of the scan"):
        mx.explain(*CUBE[:2], METHOD, 0, area=(5.0,))


def test_the_longer_the_better() -> None:
    """What is minimised, by hand, of the map after ever more steps."""
    model, x, _ = CUBE
    asked = {"infill": "zero", "jitter": 0.0, "noise": 0.0}
    costs = []
    for steps in (1, 3, 6, 12, 24, 40):
        made = mx.explain(model, x, METHOD, 0, steps=steps, smoothness=0.0, **asked)
        with torch.no_grad():
            left = float(model.network((x * (1 - made.data))[None])[0, 0] / model.network(x[None])[0, 0])
        costs.append((max(0.0, left), float(made.data.mean())))
    # What a mask costs for its size is relative to the one it starts from, the same each time.
    total = [left + 10 * size for left, size in costs]
    assert all(b <= a + 1e-6 for a, b in pairwise(total)) and total[-1] < 0.8 * total[0]


def test_voxels_outside_a_hard_mask_are_as_they_were() -> None:
    model, x, _ = CUBE
    asked: list[Tensor] = []
    share = (torch.rand(1, 1, *x.shape[1:], generator=torch.Generator().manual_seed(3)) < 0.3).float()

    class Looked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            asked.append(x)
            return x.flatten(1).mean(1, keepdim=True)

    model = mx.Model(Looked(), task="regression")
    for game in ("deletion", "preservation"):
        question = Question(model, x[None], [model.prepare(mx.Volume(x, np.eye(4)))], [mx.RegressionTarget(0)])
        score = _Score(question, choice.infill(question, "blur"), game)
        (left,) = score.of_hard(share, 0)
        taken = share.bool() if game == "deletion" else ~share.bool()
        assert torch.equal(asked[-1][~taken], x[None][~taken])
        assert torch.equal(
            asked[-1][taken], choice.infill(question, "blur").patches(Masks.everywhere(share), [0])[taken]
        )
        top, bottom = float(asked[0].mean()), float(asked[1].mean())
        assert abs(left - (float(asked[-1].mean()) - bottom) / (top - bottom)) < 1e-3
        asked.clear()


class Around(Infill):
    """The mean of the voxels that a mask leaves alone: an infill that depends on the mask, and on the draw a little."""

    asked: ClassVar[list[tuple[float, int]]] = []
    random = True

    def patches(self, masks: Masks, draws: Sequence[int]) -> Tensor:
        x, kept = self.question.x, masks.share <= 0
        self.asked.append((float((~kept).float().mean()), *draws))
        mean = (x * kept).flatten(1).sum(1) / kept.flatten(1).sum(1).clamp_min(1)
        noise = [torch.randn(x.shape[1:], generator=self.question.run.generator(draw)) for draw in draws]
        filled = mean.reshape(-1, 1, 1, 1, 1) + 0.05 * torch.stack(noise)
        return torch.where(kept, x, filled)


def test_infills_that_depend_on_the_mask_are_asked_as_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(choice.INFILLS, "around", Around)
    monkeypatch.setattr(Around, "asked", [])
    model, x, inside = CUBE
    made = mx.explain(model, x, METHOD, 0, infill="around")
    assert overlap(made.data[0] >= 0.5, inside) > 0.8
    sizes, draws = zip(*Around.asked, strict=True)
    # All of it first, then the parts it could start from, eight times on the way, and the mask itself.
    assert sizes[0] == 1 and len(sizes) == 1 + 6 + 8 + 1 and len(set(draws)) == 9
    assert sizes[-1] == pytest.approx(float((made.data >= 0.5).float().mean()))
    # On the way there is room for it to grow.
    assert all(sizes[-1] < size < 0.5 for size in sizes[7:-1])


@pytest.mark.parametrize("game", ["deletion", "preservation"])
@pytest.mark.parametrize("kind", sorted(choice.INFILLS.keys() - {"healthy"}))
def test_every_infill_will_do(kind: str, game: str) -> None:
    model, x, _ = planted((4, 4, 4), (8, 8, 8), (12, 12, 12))
    made = mx.explain(model, x, METHOD, 0, game=game, infill=kind, steps=8)
    assert bool(made.data.isfinite().all())


def test_of_a_segmentation_and_of_a_transformer() -> None:
    for name in ("unet", "vit"):
        scan = torch.randn(1, 24, 24, 16, generator=torch.Generator().manual_seed(1))
        made = mx.explain(make_model(name), scan, METHOD, 1, steps=10, infill="zero")
        assert 0 < float(made.data.max()) <= 1


def test_targets_are_learned_one_by_one() -> None:
    model, x = make_model("resnet18"), torch.randn(1, 24, 24, 16, generator=torch.Generator().manual_seed(1))
    both = mx.explain(model, x, METHOD, target=[0, 2], steps=3)
    for one, target in zip(both, (0, 2), strict=True):
        torch.testing.assert_close(one.data, mx.explain(model, x, METHOD, target, steps=3).data)


def test_what_speaks_against_the_target_is_said() -> None:
    model, x, _ = CUBE
    made = mx.explain(model, x, METHOD, 1, infill="zero", steps=2)
    assert any("nothing speaks for it" in note for note in made.provenance.notes)


def test_ended_early_it_is_the_best_mask_so_far() -> None:
    model, x, _ = CUBE
    asked: list[int] = []

    def enough() -> bool:
        asked.append(1)
        return len(asked) >= 12

    made = mx.explain(model, x, METHOD, 0, run=mx.Run(enough=enough), infill="zero")
    assert made.provenance.partial
    torch.testing.assert_close(made.data, mx.explain(model, x, METHOD, 0, infill="zero", steps=12).data)


def test_a_network_without_gradients_is_refused() -> None:
    class Rounded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.detach().flatten(1)[:, :2]

    model = mx.Model(Rounded(), task="classification")
    with pytest.raises(mx.MedXAIError, match="not differentiable"):
        mx.explain(model, torch.randn(1, 8, 8, 8), METHOD, 0)


def test_the_surface_is_that_of_the_faces_in_mm() -> None:
    smooth = SmoothMasks((30, 30, 30), (1.0, 1.0, 1.0), (2.0, 3.0, 4.0))
    values = torch.zeros(1, 1, *smooth.nodes)
    assert float(smooth.surface(values)) == 0
    values[0, 0, 2, 2, 2] = 1
    one = float(smooth.surface(values))
    assert one == pytest.approx(2 * (12 + 8 + 6) * 24 ** (1 / 3) / (24 * values.numel()))
    values[0, 0, 2, 2, 3] = 1
    # One beside it along the last axis hides a face of each, 2 x 3 mm.
    assert float(smooth.surface(values)) == pytest.approx(one * (2 * 52 - 2 * 6) / 52)


def test_of_an_image_with_two_channels() -> None:
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x = torch.randn(2, 20, 24, generator=torch.Generator().manual_seed(1))
    made = mx.explain(mx.Model(network, task="classification", spatial_dims=2), x, METHOD, 1, steps=3)
    assert made.data.shape == (1, 20, 24) and "mm²" in made.provenance.notes[-1]


def test_it_finds_the_nodule_of_the_sample_scan() -> None:
    scan, mask = (mx.load_volume(path(f"SampleData/chest_ct_nodule{kind}.nrrd")) for kind in ("", "_mask"))
    model = mx.load_model(path("Models/lung_nodule"))
    nodule = mask.data > 0
    for game in ("deletion", "preservation"):
        made = mx.explain(model, scan, METHOD, "malignant", (21.9, 120.5, -611.5), game=game)
        looked_at = made.data > 0
        assert float(made.data[nodule].mean()) > 8 * float(made.data[looked_at & ~nodule].mean())
        assert float((made.data >= 0.5).sum()) < 0.05 * float(looked_at.sum())
        (note,) = made.provenance.notes
        assert "malignant: score 5.9" in note
