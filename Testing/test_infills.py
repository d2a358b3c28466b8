"""Infills against loops, dense linear algebra, and what they are defined to be."""

from __future__ import annotations

import gc
import itertools
import weakref
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import oblique_affine
from gaussian_fields import conditional, covariance_of, noise, smooth
from torch import Tensor, nn

import MedXAILib as mx
from MedXAILib.engines.masks import Masks
from MedXAILib.engines.perturbation import changed
from MedXAILib.explainer import Question
from MedXAILib.infills import conditional_gaussian
from MedXAILib.infills.choice import INFILLS, infill
from MedXAILib.infills.conditional_gaussian import ConditionalGaussian
from MedXAILib.infills.inpainting import Inpainting
from MedXAILib.infills.local_mean import LocalMean
from MedXAILib.infills.noise import Noise
from MedXAILib.run import Run

OWN = ("local_mean", "noise", "gaussian", "inpaint")


class Sum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).sum(1, keepdim=True).repeat(1, 2)


def question(x: Tensor, affine: np.ndarray | None = None, seed: int = 0) -> Question:
    affine = np.eye(x.ndim) if affine is None else affine
    model = mx.Model(Sum(), spatial_dims=x.ndim - 1)
    return Question(model, x[None], [model.prepare(mx.Volume(x, affine))], [], Run(seed=seed))


def blob(size: tuple[int, ...], seed: int = 3) -> Tensor:
    """Two masks (2, 1, *size) of several parts, which touch the border."""
    coarse = noise(2, 1, *[-(-n // 3) for n in size], seed=seed)
    return (nn.functional.interpolate(coarse, size) > 0.4).float()


def test_the_local_mean_is_that_of_the_voxels_around() -> None:
    affine = oblique_affine((2.5, 0.8, 1.1))
    x = noise(2, 9, 20, 16)
    asked = question(x, affine)
    reach = [round(5 / step) for step in (2.5, 0.8, 1.1)]
    masks = Masks.everywhere(blob((9, 20, 16)))
    boxes = Masks.boxes(torch.tensor([[3, 8, 6], [0, 17, 13], [6, 0, 0]]), (3, 3, 3), x)
    for some in (masks, boxes):
        found = LocalMean(asked).patches(some, range(len(some)))
        for m, low in enumerate(some.low.tolist()):
            taken = {tuple(np.add(i, low)) for i in torch.nonzero(some.share[m, 0]).tolist()}
            near = set()
            for voxel in taken:
                ranges = [
                    range(max(0, v - r), min(n, v + r + 1)) for v, r, n in zip(voxel, reach, x.shape[1:], strict=True)
                ]
                near |= set(itertools.product(*ranges))
            expected = torch.stack([x[(slice(None), *v)] for v in near - taken]).mean(0)
            torch.testing.assert_close(found[m], expected[:, None, None, None].expand_as(found[m]))


def test_noise_has_the_values_of_the_scan_and_its_channels_together() -> None:
    x = noise(1, 8, 9, 7)
    asked = question(torch.cat([x, 2 * x + 1]))
    masks = Masks.boxes(torch.tensor([[0, 0, 0], [2, 3, 1]]), (6, 6, 6), x)
    found = Noise(asked).patches(masks, [4, 5])
    assert torch.isin(found[:, 0], x).all() and torch.equal(found[:, 1], 2 * found[:, 0] + 1)
    assert not torch.equal(found[0], found[1])
    # 432 draws: the mean of all is within four standard errors.
    assert abs(float(found[:, 0].mean() - x.mean())) < 4 * float(x.std()) / 432**0.5
    other = Noise(question(torch.cat([x, 2 * x + 1]), seed=1)).patches(masks, [4, 5])
    assert not torch.equal(found, other)


def assert_drawn_from(found: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> None:
    """Draws (M, N) have this mean and covariance, to five standard errors."""
    spread = np.sqrt(np.diag(covariance))
    assert (np.abs(found.mean(0) - mean) < 5 * spread / len(found) ** 0.5).all()
    # The error of an estimated covariance of normal numbers.
    error = np.sqrt((np.outer(spread, spread) ** 2 + covariance**2) / len(found))
    assert (np.abs(np.cov(found.T) - covariance) < 5 * error).all()


@pytest.mark.parametrize("low", [(4, 3, 5), (0, 7, 9)])
def test_draws_follow_the_conditional_distribution(low: tuple[int, ...]) -> None:
    x, box, count = smooth(1, 12, 9, 11), (2, 2, 2), 4000
    fitted = ConditionalGaussian(question(x, oblique_affine()))
    masks = Masks.boxes(torch.tensor([low] * count), box, x)
    found = fitted.patches(masks, range(count)).flatten(1).double().numpy()
    unknown = np.array(list(itertools.product(*(range(a, a + 2) for a in low))))
    around = itertools.product(*(range(max(0, a - 2), min(n, a + 4)) for a, n in zip(low, x.shape[1:], strict=True)))
    known = np.array([v for v in around if list(v) not in unknown.tolist()])
    mean, covariance = conditional(fitted, x, unknown, known)
    assert_drawn_from(found, mean, covariance)
    # The surroundings do say something.
    assert np.diag(covariance).mean() < 0.7 * float(x.var())


def test_draws_in_a_mask_of_any_form_follow_the_conditional_distribution() -> None:
    x, count = smooth(1, 9, 8), 4000
    share = blob((9, 8))[:1]
    fitted = ConditionalGaussian(question(x))
    found = fitted.patches(Masks.everywhere(share.repeat(count, 1, 1, 1)), range(count))
    unknown, known = (np.argwhere(which.numpy()) for which in (share[0, 0] > 0, share[0, 0] == 0))
    mean, covariance = conditional(fitted, x, unknown, known)
    assert_drawn_from(found[:, 0].double().numpy()[:, unknown[:, 0], unknown[:, 1]], mean, covariance)


@pytest.mark.parametrize("reach", [40, 4])
def test_the_covariance_is_that_of_the_scan(reach: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditional_gaussian, "_REACH", reach)
    x = smooth(1, 7, 6, 5)
    centred = (x[0].double() - x.double().mean()).numpy()
    weight = np.ones(centred.shape)
    for axis, n in enumerate(centred.shape):
        weight = weight * np.sin(np.pi * (np.arange(n) + 0.5) / n).reshape([-1 if a == axis else 1 for a in range(3)])
    faded = centred * weight
    reaches = [min(n, reach) for n in centred.shape]
    table = ConditionalGaussian(question(x)).covariance[0].numpy()
    assert table.shape == tuple(2 * r - 1 for r in reaches)

    def parzen(u: float) -> float:
        return 1 - 6 * u**2 + 6 * u**3 if u <= 0.5 else 2 * (1 - u) ** 3

    for lag in [(0, 0, 0), (1, 0, 0), (-2, 1, 3), (3, -3, 2)]:
        pairs = 0.0
        for i in itertools.product(*map(range, centred.shape)):
            j = tuple(np.add(i, lag))
            if all(0 <= a < n for a, n in zip(j, centred.shape, strict=True)):
                pairs += faded[i] * faded[j]
        # As much at no distance as the scan varies.
        expected = pairs / (faded**2).sum() * (centred**2).mean()
        if reach == 4:
            expected *= np.prod([parzen(abs(k) / 4) for k in lag])
        expected *= 1 + 1e-6 * (lag == (0, 0, 0))
        place = tuple(r - 1 + k for r, k in zip(reaches, lag, strict=True))
        assert table[place] == pytest.approx(expected, rel=1e-8, abs=1e-12)


def test_free_draws_have_the_covariance_wherever_they_are() -> None:
    x, count = smooth(1, 10, 9), 6000
    fitted = ConditionalGaussian(question(x))
    found = fitted.patches(Masks.everywhere(torch.ones(count, 1, 10, 9)), range(count)).double().numpy()
    places = np.array([(0, 0), (9, 8), (0, 8), (1, 1), (4, 4), (5, 4), (4, 6)])
    expected = covariance_of(fitted, places, places)[0]
    assert_drawn_from(found[:, 0][:, places[:, 0], places[:, 1]], np.full(7, float(x.mean())), expected)


def test_channels_are_as_correlated_as_in_the_scan() -> None:
    first, second = smooth(1, 12, 12, 12), smooth(1, 12, 12, 12, seed=1)
    x = torch.cat([first, 0.8 * first - 0.4 * second + 5])
    fitted, count = ConditionalGaussian(question(x)), 1500
    found = fitted.patches(Masks.everywhere(torch.ones(count, 1, 12, 12, 12)), range(count))
    one = found[:, :, 3, 4, 5].double().numpy()
    assert_drawn_from(one, x.double().flatten(1).mean(1).numpy(), np.cov(x.double().flatten(1).numpy()))


def test_a_fit_goes_with_its_last_use() -> None:
    x = smooth(1, 12, 12, 12)
    fitted = ConditionalGaussian(question(x))
    fitted.patches(Masks.boxes(torch.tensor([[4, 4, 4]]), (3, 3, 3), x), [0])
    gone = weakref.ref(fitted)
    gc.disable()
    try:
        del fitted
        assert gone() is None
    finally:
        gc.enable()


def test_large_masks_are_conditioned_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditional_gaussian, "_MOST", 800)
    x = smooth(1, 30, 28, 20)
    fitted = ConditionalGaussian(question(x, np.diag([1.0, 1.0, 2.0, 1.0])))
    assert fitted._factor((8, 8, 6)) == (2, 2, 1)
    # The covariance of the means of two blocks is the mean of the covariances of their voxels.
    block = np.array(list(itertools.product(range(2), range(2), range(1))))
    table = fitted._coarse((2, 2, 1))[0].numpy()
    middle = np.array(table.shape) // 2
    for lag in [(0, 0, 0), (1, 0, 0), (-1, 2, 3)]:
        expected = covariance_of(fitted, block, block + np.multiply(lag, (2, 2, 1)))[0].mean()
        assert table[tuple(middle + lag)] == pytest.approx(expected, rel=1e-9)
    # A draw in a place that a smooth field surrounds is nearer to what was there than one that knows nothing of it.
    low = torch.tensor(list(itertools.product((4, 14), (5, 15), (3, 10)))).repeat(20, 1)
    found = fitted.patches(Masks.boxes(low, (8, 8, 6), x), range(len(low)))
    there = torch.stack([x[:, a : a + 8, b : b + 8, c : c + 6] for a, b, c in low.tolist()])
    at_rim = (found - there)[:, :, 0].square().mean()
    assert float(at_rim) < 1.3 * float(x.var()) < 1.7 * float(x.var()) < float(2 * x.var())
    # What it draws is as rough as the scan.
    steps = [float(t.diff(dim=-1).square().mean()) for t in (found, there)]
    assert steps[0] == pytest.approx(steps[1], rel=0.35)


def laplace(x: np.ndarray, taken: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """The harmonic values of the voxels taken, by elimination."""
    number = {tuple(v): i for i, v in enumerate(np.argwhere(taken))}
    left, right = np.zeros((len(number), len(number))), np.zeros(len(number))
    for v, i in number.items():
        for axis, way in itertools.product(range(x.ndim), (-1, 1)):
            w = list(v)
            w[axis] += way
            if not 0 <= w[axis] < x.shape[axis]:
                continue
            weight = 1 / spacing[axis] ** 2
            left[i, i] += weight
            if tuple(w) in number:
                left[i, number[tuple(w)]] -= weight
            else:
                right[i] += weight * x[tuple(w)]
    result = x.copy()
    result[taken] = np.linalg.solve(left, right)
    return result


def test_inpainting_solves_laplaces_equation_in_millimetres() -> None:
    x, spacing = noise(2, 9, 12, 10), (2.5, 0.8, 1.1)
    share = blob((9, 12, 10))
    asked = question(x, oblique_affine(spacing))
    found = changed(asked.x, Masks.everywhere(share), Inpainting(asked), range(2))
    for m, c in itertools.product(range(2), range(2)):
        expected = laplace(x[c].double().numpy(), share[m, 0].numpy() > 0, spacing)
        torch.testing.assert_close(found[m, c].double(), torch.from_numpy(expected), rtol=0, atol=1e-4)
    low = torch.tensor([[0, 3, 6], [3, 4, 2]])
    boxes = changed(asked.x, Masks.boxes(low, (4, 5, 4), x), Inpainting(asked), range(2))
    for m, (a, b, c) in enumerate(low.tolist()):
        taken = np.zeros((9, 12, 10), dtype=bool)
        taken[a : a + 4, b : b + 5, c : c + 4] = True
        expected = laplace(x[1].double().numpy(), taken, spacing)[a : a + 4, b : b + 5, c : c + 4]
        torch.testing.assert_close(boxes[m, 1].double(), torch.from_numpy(expected), rtol=0, atol=1e-4)


def test_inpainting_continues_a_ramp() -> None:
    affine = oblique_affine()
    index = np.stack(np.meshgrid(*map(np.arange, (14, 16, 18)), indexing="ij"), -1)
    ramp = index @ affine[:3, :3].T @ np.array([0.3, -0.5, 0.2]) - 40
    x = torch.from_numpy(ramp).float()[None]
    asked = question(x, affine)
    share = torch.zeros(1, 1, 14, 16, 18)
    share[..., 2:12, 3:9, 4:15] = 1
    share[..., 5:7, 9:14, 4:8] = 1
    found = changed(asked.x, Masks.everywhere(share), Inpainting(asked), [0])
    torch.testing.assert_close(found, asked.x, rtol=0, atol=1e-4 * float(x.max() - x.min()))


@pytest.mark.parametrize("kind", OWN)
def test_the_same_however_the_work_is_split(kind: str) -> None:
    x = smooth(2, 12, 11, 10)
    asked = question(x, oblique_affine())
    masks = Masks.everywhere(blob((12, 11, 10)))
    boxes = Masks.boxes(torch.tensor([[0, 0, 6], [3, 4, 2], [8, 7, 6]]), (4, 4, 4), x)
    for some in (masks, boxes):
        together = infill(asked, kind).patches(some, range(5, 5 + len(some)))
        made = infill(asked, kind)
        for m in reversed(range(len(some))):
            alone = made.patches(Masks(some.low[m : m + 1], some.share[m : m + 1]), [5 + m])
            torch.testing.assert_close(together[m : m + 1], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", OWN)
def test_what_no_mask_takes_stays_as_it_is(kind: str) -> None:
    x = 1000 * smooth(2, 12, 11, 10)
    asked, share = question(x), blob((12, 11, 10))
    found = changed(asked.x, Masks.everywhere(share), infill(asked, kind), range(2))
    left = (share == 0).expand_as(found)
    assert torch.equal(found[left], asked.x.expand_as(found)[left])
    assert not torch.equal(found, asked.x.expand_as(found))


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("size", [(7, 6, 5), (9, 8)])
def test_a_mask_of_everything(kind: str, size: tuple[int, ...]) -> None:
    asked = question(smooth(2, *size))
    found = infill(asked, kind).patches(Masks.everywhere(torch.ones(3, 1, *size)), range(3))
    mean = asked.x.flatten(2).mean(2).reshape(1, 2, *[1] * len(size))
    assert torch.isfinite(found).all() and found.shape == (3, 2, *size)
    if infill(asked, kind).random:
        assert not torch.equal(found[0], found[1])
    else:
        torch.testing.assert_close(found, mean.expand_as(found))


@pytest.mark.parametrize("kind", OWN)
def test_a_constant_stays_one(kind: str) -> None:
    x = torch.cat([noise(1, 8, 9, 7), torch.full((1, 8, 9, 7), 3.0)])
    low = torch.tensor([[1, 2, 3], [5, 6, 0]])
    found = infill(question(x), kind).patches(Masks.boxes(low, (3, 3, 3), x), range(2))
    torch.testing.assert_close(found[:, 1], torch.full((2, 3, 3, 3), 3.0), rtol=0, atol=1e-5)


def test_a_cohort_says_what_could_be_there(tmp_path: Path) -> None:
    x = noise(1, 9, 8, 7)
    for i in range(2):
        scan = mx.Volume(10 + 5 * smooth(1, 9, 8, 7, seed=i + 5), np.eye(4))
        sitk.WriteImage(scan.to_sitk(), str(tmp_path / f"healthy-{i}.nrrd"))
    cohort = torch.cat([mx.load_volume(tmp_path / f"healthy-{i}.nrrd").data[None] for i in range(2)])
    made = infill(question(x), f"gaussian:{tmp_path}/*.nrrd")
    assert isinstance(made, ConditionalGaussian)
    assert float(made.mean) == pytest.approx(float(cohort.mean()), rel=1e-5)
    expected = sum(ConditionalGaussian(question(one), cohort).covariance for one in cohort) / 2
    torch.testing.assert_close(made.covariance, expected)
    assert float(made.covariance.max()) == pytest.approx(float(cohort.var(correction=0)), rel=1e-4)


@pytest.mark.parametrize("given", ["inpant", "gaussian:no/*.nrrd", "gaussian:", 5])
def test_what_is_no_infill_is_refused(given: object) -> None:
    with pytest.raises(mx.MedXAIError, match=r"occlusion: infill = .* is not possible: .*(infill|file)"):
        mx.explain(mx.Model(Sum()), noise(1, 6, 6, 6), "occlusion", infill=given)


# Of lung only, and tested there.
@pytest.mark.parametrize("kind", [kind for kind in INFILLS if kind != "healthy"])
def test_any_infill_goes_with_occlusion(kind: str) -> None:
    made = mx.explain(mx.Model(Sum()), smooth(1, 8, 8, 8), "occlusion", infill=kind, window=(3.0,), target=0)
    assert torch.isfinite(made.data).all() and made.data.abs().max() > 0
