"""Background sets: what is taken for one, what of them is compared with a scan, and which of many stand for all."""

from __future__ import annotations

import itertools
import json
import weakref
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import oblique_affine
from monai.transforms import Compose, ScaleIntensityRange, Spacing
from torch import Tensor, nn

import MedXAILib as mx
from MedXAILib.explainer import Question
from MedXAILib.grid import transform
from MedXAILib.visual import background
from MedXAILib.visual.background import baselines, k_medoids
from MedXAILib.visual.gradient_shap import GradientSHAP

SIZE = (6, 7, 8)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def volume(data: Tensor, at: tuple[float, ...] = (0, 0, 0)) -> mx.Volume:
    affine = np.eye(4)
    affine[:3, 3] = at
    return mx.Volume(data, affine)


class Sum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).sum(1, keepdim=True).repeat(1, 2)


def question(*scans: mx.Volume, model: mx.Model | None = None, regions: list[object] | None = None) -> Question:
    model = model or mx.Model(Sum())
    seen = [model.prepare(s, r) for s, r in zip(scans, regions or [None] * len(scans), strict=True)]
    return Question(model, torch.stack([p.x for p in seen]), seen, [])


def starts(asked: Question, scans: list[object], most: int = 100) -> tuple[Tensor, Tensor]:
    """Weights (K, N) and baselines (K, N, C, *spatial)."""
    weights, found = zip(*baselines(asked, GradientSHAP(background=scans).background, most), strict=True)
    return torch.stack(weights), torch.stack(found)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    paths = [tmp_path / f"healthy-{i}.nrrd" for i in range(3)]
    for i, path in enumerate(paths):
        sitk.WriteImage(volume(noise(1, *SIZE, seed=i)).to_sitk(), str(path))
    return [str(path) for path in paths]


def test_a_background_is_what_a_person_types(files: list[str], tmp_path: Path) -> None:
    scan = volume(noise(1, *SIZE))
    taken = lambda given: GradientSHAP(background=given).background  # noqa: E731
    assert taken(files) == taken(tuple(map(Path, files))) == tuple(files)
    assert taken(", ".join(files)) == tuple(files) and taken(files[0]) == (files[0],)
    assert taken(str(tmp_path / "healthy-*.nrrd")) == taken([f"{tmp_path}/*.nrrd"]) == tuple(files)
    assert taken(["zero", files[1], scan]) == ("zero", files[1], scan) and taken(scan) == (scan,)
    assert taken([files[:2], files[1:]]) == (tuple(files[:2]), tuple(files[1:]))
    assert taken("") == taken([]) == taken(("",)) == GradientSHAP().background == ("zero", "minimum", "mean", "blur")
    comma = tmp_path / "one, two.nrrd"
    comma.touch()
    assert taken(str(comma)) == (str(comma),)


@pytest.mark.parametrize("given", ["blurr", "no/such.nrrd", ["no/such.nrrd"], ["no/*.nrrd"], [["zero"]], 5, [5], [[]]])
def test_what_is_no_background_is_refused(given: object) -> None:
    with pytest.raises(mx.MedXAIError, match=r"gradient_shap: background = .* is not possible: .*(file|baseline)"):
        mx.explain(mx.Model(Sum()), noise(1, *SIZE), "gradient_shap", background=given)


def test_the_nearest_name_is_said() -> None:
    with pytest.raises(mx.MedXAIError, match="did you mean blur"):
        mx.explain(mx.Model(Sum()), noise(1, *SIZE), "gradient_shap", background="blurr")


def test_provenance_names_the_scans(files: list[str]) -> None:
    scan = volume(noise(1, *SIZE))
    made = GradientSHAP(background=[files[0], files[1:], scan, "blur"]).model_dump(mode="json")["background"]
    assert made == [files[0], files[1:], f"volume {scan.fingerprint}", "blur"] == json.loads(json.dumps(made))


def test_provenance_recomputes_from_files(files: list[str]) -> None:
    model, x = mx.Model(Sum()), noise(1, *SIZE, seed=9)
    first = mx.explain(model, x, "gradient_shap", target=0, background=",".join(files), baselines=2)
    torch.testing.assert_close(mx.recompute(first, model, x).data, first.data)
    assert first.provenance.parameters["background"] == files


def test_what_is_made_from_the_scan() -> None:
    asked = question(volume(noise(1, *SIZE) + 3))
    weights, found = starts(asked, [])
    assert torch.equal(weights, torch.full((4, 1), 0.25)) and found.shape == (4, 1, 1, *SIZE)
    zero, minimum, mean, blur = found
    assert not zero.any() and (minimum == asked.x.min()).all()
    torch.testing.assert_close(mean, asked.x.mean().expand_as(mean))
    assert 0 < blur.std() < asked.x.std()


def test_a_scan_that_covers_the_place_is_read_there(oblique: mx.Volume) -> None:
    """A smooth field in the patient, sampled by two scanners."""

    def field(shape: tuple[int, ...], affine: np.ndarray) -> Tensor:
        index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
        return torch.from_numpy(transform(affine, index)).sum(-1)[None]

    wide = oblique_affine((1.0, 1.0, 1.0))
    wide[:3, 3] -= wide[:3, :3] @ (8, 8, 8)
    scan = mx.Volume(field(oblique.shape, oblique.affine), oblique.affine)
    other = mx.Volume(field((80, 60, 60), wide), wide)
    _, (start,) = starts(question(scan), [other])
    torch.testing.assert_close(start[0], scan.data, rtol=1e-4, atol=1e-3)


def test_another_scan_of_the_same_extent_is_taken_whole() -> None:
    scan, other = volume(noise(1, *SIZE)), volume(noise(1, *SIZE, seed=1))
    assert torch.equal(starts(question(scan), [other])[1][0, 0], other.data)


def test_voxels_are_covered_when_their_middles_are() -> None:
    wide, other = np.diag([2.0, 2, 2, 1]), volume(noise(1, 11, 13, 15, seed=1))
    _, (start,) = starts(question(mx.Volume(noise(1, *SIZE), wide)), [other])
    torch.testing.assert_close(start[0], other.data[:, ::2, ::2, ::2])


def test_of_a_scan_elsewhere_the_middle_is_taken() -> None:
    other = volume(noise(1, 10, 9, 8, seed=1), at=(500, 0, 0))
    _, (start,) = starts(question(volume(noise(1, *SIZE))), [other])
    assert torch.equal(start[0], other.data[:, 2:8, 1:8])
    # Half a voxel short of covering it is not covering it.
    other = volume(noise(1, 10, 9, 8, seed=1), at=(0.6, 0, 0))
    assert torch.equal(starts(question(volume(noise(1, *SIZE))), [other])[1][0, 0], other.data[:, 2:8, 1:8])


def test_each_sample_of_a_patch_network_has_the_place_it_looks_at() -> None:
    model = mx.Model(Sum(), patch_size=(4, 4, 4))
    scan, other = volume(noise(1, 16, 16, 16)), volume(noise(1, 16, 16, 16, seed=1))
    elsewhere = volume(other.data, at=(0, -90, 0))
    centres = [(6.5, 5.5, 4.5), (9.5, 5.5, 8.5)]
    asked = question(scan, scan, model=model, regions=centres)
    _, (there, middle) = starts(asked, [other, elsewhere])
    for sample, prepared in zip(there, (model.prepare(other, c) for c in centres), strict=True):
        assert torch.equal(sample, prepared.x)
    assert torch.equal(middle, other.data[:, 6:10, 6:10, 6:10].expand_as(middle))


def test_it_is_preprocessed_as_the_scan_is() -> None:
    steps = Compose([Spacing(pixdim=(2, 2, 2)), ScaleIntensityRange(0, 10, 0, 1)])
    model = mx.Model(Sum(), preprocessing=steps)
    other = volume(noise(1, 12, 12, 12, seed=1), at=(300, 0, 0))
    _, (start,) = starts(question(volume(noise(1, 12, 12, 12)), model=model), [other])
    torch.testing.assert_close(start[0], model.preprocess(other).x)


def test_files_for_channels_and_plain_images(files: list[str]) -> None:
    scan = mx.volume.stack([volume(noise(1, *SIZE, seed=5)), volume(noise(1, *SIZE, seed=6))])
    _, (start,) = starts(question(scan), [files[:2]])
    assert torch.equal(start[0], torch.cat([mx.load_volume(f).data for f in files[:2]]))
    image, others = mx.Volume(noise(1, 9, 9), np.eye(3)), [mx.Volume(noise(1, 9, 9, seed=i), np.eye(3)) for i in (1, 2)]
    flat = question(image, model=mx.Model(nn.Flatten(), spatial_dims=2))
    assert torch.equal(starts(flat, others)[1][:, 0], torch.stack([o.data for o in others]))
    assert len(starts(flat, others, most=1)[1]) == 1


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (volume(noise(1, 5, 9, 9), at=(500, 0, 0)), r"healthy.nii does not cover .* \(5 x 9 x 9 .* register it"),
        (volume(noise(2, *SIZE)), r"healthy.nii is 3-D with 2 channel\(s\), and the network sees 3-D with 1: leave it"),
        (mx.Volume(noise(1, 9, 9), np.eye(3)), "healthy.nii is 2-D with 1 .* sees 3-D"),
        (volume(torch.full((1, *SIZE), torch.nan)), "healthy.nii has NaN .* leave it out"),
    ],
)
def test_a_scan_that_cannot_be_compared_is_named(other: mx.Volume, said: str) -> None:
    named = mx.Volume(other.data, other.affine, "healthy.nii")
    with pytest.raises(mx.MedXAIError, match=said):
        starts(question(volume(noise(1, *SIZE))), [named])


def cost(distances: Tensor, medoids: tuple[int, ...] | list[int]) -> float:
    return float(distances[:, list(medoids)].amin(1).sum())


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_medoids_are_the_best_there_are(seed: int, count: int) -> None:
    """Against every choice. Swaps can end in a choice that is not the best, but only just."""
    points = noise(9, 3, seed=seed).double()
    distances = torch.cdist(points, points)
    best = min(cost(distances, choice) for choice in itertools.combinations(range(9), count))
    medoids, shares = k_medoids(distances, count)
    assert medoids == sorted(set(medoids)) and len(medoids) == count and float(shares.sum()) == pytest.approx(1)
    assert cost(distances, medoids) <= best * (1 + 1e-9 if count in (1, 8) else 1.05)
    for p, point in itertools.product(range(count), range(9)):
        assert cost(distances, [*medoids[:p], *medoids[p + 1 :], point]) >= cost(distances, medoids) * (1 - 1e-6)


def test_swaps_mend_a_greedy_choice() -> None:
    """The first choice of two clusters is the point between them, which neither wants."""
    points = torch.tensor([-11.0, -10, -9, 0, 9, 10, 11], dtype=torch.float64)[:, None]
    distances = torch.cdist(points, points)
    assert int(distances.sum(0).argmin()) == 3
    medoids, shares = k_medoids(distances, 2)
    assert 3 not in medoids and cost(distances, medoids) == 14
    assert sorted(shares.tolist()) == pytest.approx([3 / 7, 4 / 7])


def test_the_same_scan_twice() -> None:
    medoids, shares = k_medoids(torch.zeros(3, 3, dtype=torch.float64), 2)
    assert len(set(medoids)) == 2 and sorted(shares.tolist()) == pytest.approx([1 / 3, 2 / 3])


def test_typical_scans_stand_for_the_others() -> None:
    """Three kinds of scans, and three of each kind to find."""
    kinds = [volume(k * 10 + 0.1 * noise(1, *SIZE, seed=i)) for i, k in enumerate([0, 1, 0, 2, 1, 0, 0, 0])]
    weights, found = starts(question(volume(noise(1, *SIZE))), kinds, most=3)
    share = {round(float(start.mean()) / 10): float(weight) for weight, start in zip(weights[:, 0], found, strict=True)}
    assert share == pytest.approx({0: 5 / 8, 1: 2 / 8, 2: 1 / 8})
    assert all(any(torch.equal(start[0], kind.data) for kind in kinds) for start in found)


def test_each_sample_has_its_own_typical_scans() -> None:
    """Scans that are alike at one place of the patient and differ at another."""
    model = mx.Model(Sum(), patch_size=(4, 4, 4))
    scan = volume(noise(1, 4, 4, 12))
    others = []
    for left, right in ((0, 0), (0, 50), (0, 50), (9, 0)):
        data = 0.1 * noise(1, 4, 4, 12, seed=left + right)
        data[..., :4] += left
        data[..., 8:] += right
        others.append(mx.Volume(data, scan.affine))
    regions = [scan.to_point((1.5, 1.5, d)) for d in (1.5, 9.5)]
    both = question(scan, scan, model=model, regions=regions)
    weights, found = starts(both, others, most=2)
    assert sorted(weights[:, 0].tolist()) == [0.25, 0.75] and weights[:, 1].tolist() == [0.5, 0.5]
    for s, region in enumerate(regions):
        alone = question(scan, model=model, regions=[region])
        for a, b in zip(starts(alone, others, most=2), (weights, found), strict=True):
            assert torch.equal(a[:, 0], b[:, s])


@pytest.mark.parametrize("most", [2, 3])
def test_one_scan_is_held_at_a_time(files: list[str], most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[weakref.ref[mx.Volume]] = []
    held: list[int] = []

    def load(path: str) -> mx.Volume:
        held.append(sum(r() is not None for r in read))
        found = mx.load_volume(path)
        read.append(weakref.ref(found))
        return found

    monkeypatch.setattr(background, "load_volume", load)
    asked = question(volume(noise(1, *SIZE)), volume(noise(1, *SIZE, seed=1)))
    kept = []
    for _, start in baselines(asked, files, most):
        kept.append(weakref.ref(start))
        del start
        assert sum(k() is not None for k in kept) <= 1
    # A choice takes a look at all of them; without one, each is read once.
    assert max(held) == 0 and len(read) == (3 if most == 3 else 5)
