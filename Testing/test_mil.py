"""Multiple instance learning: pooling by its closed forms, a map of where instances look, and what was learnt."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from itertools import combinations

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import make_model, oblique_affine, with_statistics
from model_cards import metrics_of
from monai.bundle import verify_net_in_out
from sklearn.metrics import cohen_kappa_score, roc_auc_score
from torch import Tensor, nn
from torch.nn import functional

import MedXAILib as mx
from MedXAILib import resources
from MedXAILib.grid import transform
from MedXAILib.networks.mil import GatedAttention, MultipleInstanceClassifier, NoisyOr, in_lung
from MedXAILib.synthetic import whole_lungs
from MedXAILib.synthetic.lung_nodules import Backgrounds, scale
from MedXAILib.training import mil

POOLINGS = ("noisy_or", "attention")


def drawn(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lung(*shape: int) -> Tensor:
    """Something that passes for lung everywhere, (N, 1, D, H, W)."""
    return (0.12 + 0.05 * drawn(*shape)).clamp(0.03, 0.3)


def network(pooling: str = "noisy_or", grades: int = 2) -> MultipleInstanceClassifier:
    """An untrained network whose scores differ from place to place."""
    torch.manual_seed(0)
    made = with_statistics(MultipleInstanceClassifier(grades, pooling))  # type: ignore[arg-type]
    with torch.no_grad():
        made.scores.weight.mul_(40)
        made.scores.bias.zero_()
    return made.eval()  # type: ignore[return-value]


@cache
def training() -> Backgrounds:
    return Backgrounds.training()


@cache
def other() -> Backgrounds:
    return Backgrounds.test()


@torch.no_grad()
def test_noisy_or_is_one_less_the_product() -> None:
    scores, here, pooling = 2 * drawn(3, 2, 4, 3, 5), drawn(3, 1, 4, 3, 5, seed=4) > 0, NoisyOr()
    logits = pooling.pooled(pooling(scores, scores, here).sum((2, 3, 4)))
    p = 1 / (1 + np.exp(float(pooling.rare) - scores.double().numpy()))
    none = np.where(here.numpy(), 1 - p, 1).prod((2, 3, 4))
    np.testing.assert_allclose(logits, np.log((1 - none) / none), rtol=1e-4)
    # Hardly anything, and hardly any doubt.
    extremes = pooling.pooled(torch.tensor([[1e-9, 60.0]]))
    np.testing.assert_allclose(extremes, [[np.log(1e-9), 60.0]], rtol=1e-5)


def test_attention_is_that_of_ilse() -> None:
    torch.manual_seed(0)
    pooling, features, here = GatedAttention(6), drawn(2, 6, 3, 4, 2), drawn(2, 1, 3, 4, 2, seed=4) > 0
    scores = drawn(2, 3, 3, 4, 2, seed=5)
    weights = pooling.attention(features, here).detach()
    assert torch.allclose(weights.sum((1, 2, 3, 4)), torch.ones(2))
    assert not weights[~here].any() and (weights[here] > 0).all()
    parts = pooling(scores, features, here).detach().sum((2, 3, 4))
    v, u, w = (
        layer.weight.detach().flatten(1).double().numpy() for layer in (pooling.content, pooling.gate, pooling.weight)
    )
    for n in range(2):
        h = features[n].flatten(1)[:, here[n].flatten()].double().numpy()
        content = np.tanh(v @ h + pooling.content.bias.detach().numpy()[:, None])
        gate = 1 / (1 + np.exp(-(u @ h + pooling.gate.bias.detach().numpy()[:, None])))
        told = np.exp(w @ (content * gate))[0]
        expected = scores[n].flatten(1)[:, here[n].flatten()].numpy() @ (told / told.sum())
        np.testing.assert_allclose(parts[n], expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(pooling.pooled(parts), parts)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_order_of_the_instances_does_not_matter(pooling: str) -> None:
    made = network(pooling)
    features, here = drawn(2, 64, 3, 4, 5).abs(), drawn(2, 1, 3, 4, 5, seed=4) > 0
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))

    def shuffled(x: Tensor) -> Tensor:
        return x.flatten(2)[..., order].reshape(x.shape)

    with torch.no_grad():
        parts = made.instances(made.scores(features), features, here)
        again = made.instances(made.scores(shuffled(features)), shuffled(features), shuffled(here))
    torch.testing.assert_close(again, shuffled(parts))
    torch.testing.assert_close(made.pooled(again.sum((2, 3, 4))), made.pooled(parts.sum((2, 3, 4))))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_no_grade_is_likelier_than_the_one_below(pooling: str) -> None:
    made = network(pooling, grades=4)
    with torch.no_grad():
        logits = made(lung(5, 1, 32, 28, 24) + drawn(5, 1, 1, 1, 1) * 0.1)
    assert (logits.diff(dim=1) < 0).all() and logits.std(0).min() > 0
    assert network(pooling, grades=1)(lung(2, 1, 24, 24, 24)).shape == (2, 1)


def test_all_at_once_is_patch_by_patch() -> None:
    made, image = network(), lung(1, 1, 72, 60, 64)
    image[:, :, 30:50, :20] = 1.0  # with a wall, beside which there is less lung
    kept: list[Tensor] = []
    made.instances.register_forward_hook(lambda _m, _i, y: kept.append(y))
    with torch.no_grad():
        made(image)
        dense = kept.pop()[0]
        assert dense.shape == (2, 18, 15, 16)
        for i, j, k in ((4, 4, 4), (9, 5, 7), (13, 10, 11), (8, 6, 11)):
            # The patch from voxel 4 i - 16 to 4 i + 20 has instance i as its own number 4.
            low = [4 * n - 16 for n in (i, j, k)]
            patch = image[(..., *(slice(a, a + 36) for a in low))]
            made(patch)
            torch.testing.assert_close(kept.pop()[0, :, 4, 4, 4], dense[:, i, j, k], rtol=1e-4, atol=1e-6)


def test_only_lung_is_an_instance() -> None:
    image = torch.zeros(1, 1, 96, 40, 40)  # air
    image[:, :, 32:64] = 0.6  # tissue
    image[:, :, 64:] = lung(1, 1, 32, 40, 40)
    found = in_lung(image)[0, 0].float().mean((1, 2))
    assert not found[:13].any() and found[17:].all()
    # Where there is no lung at all, nothing is left out.
    assert in_lung(torch.ones(1, 1, 24, 24, 24)).all()
    made = network()
    other = image.clone()
    other[:, :, 5:25] = 0.5 + 0.1 * drawn(1, 1, 20, 40, 40).clamp(-1, 1)
    assert torch.equal(in_lung(other), in_lung(image))
    with torch.no_grad():
        torch.testing.assert_close(made(other), made(image))


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("grade", [0, 1])
def test_the_map_adds_up_to_the_score(pooling: str, grade: int) -> None:
    made, image = network(pooling), lung(1, 32, 28, 40)
    image[:, 10:20, 8:14, 5:9] = 0.9
    model = mx.Model(made, task="ordinal", class_names=mil.GRADES)
    answer = mx.explain(model, image, "mil", target=mil.GRADES[grade])
    with torch.no_grad():
        logit = made(image[None])[0, grade].double()
    # A voxel's share of a unit is linear between the units: all voxels together hold each 4 x 4 x 4 times.
    total = answer.data.double().sum() / 64
    if pooling == "noisy_or":
        assert (answer.data >= 0).all()
        torch.testing.assert_close(-torch.expm1(-total), logit.sigmoid(), rtol=1e-4, atol=1e-6)
    else:
        torch.testing.assert_close(total, logit, rtol=1e-4, atol=1e-5)
    assert answer.residual["pooling"] < 1e-5
    assert answer.data.shape == image.shape


def test_the_lead_of_a_grade_is_the_difference_of_their_maps() -> None:
    model, image = mx.Model(network("attention"), task="ordinal"), lung(1, 32, 28, 40)
    high, low, lead = mx.explain(model, image, "mil", target=[0, 1, mx.ClassTarget(0, versus=1)])
    torch.testing.assert_close(lead.data, high.data - low.data)
    assert lead.residual["pooling"] < 1e-5


class Brightest(nn.Module):
    """A person's own bag: the mean density of cubes of 5 voxels, 3 apart, is what each contributes."""

    def __init__(self, honest: bool = True) -> None:
        super().__init__()
        self.instances = nn.Conv3d(1, 1, 5, stride=3, padding=1, bias=False)
        nn.init.constant_(self.instances.weight, 1 / 125)
        self.honest = honest

    def forward(self, image: Tensor) -> Tensor:
        total = self.pooled(self.instances(image).sum((2, 3, 4)))
        return total if self.honest else total + image.mean((2, 3, 4))

    def pooled(self, total: Tensor) -> Tensor:
        return 2 * total + 1


def ball(volume: mx.Volume, middle: np.ndarray, radius: float) -> Tensor:
    """Which voxels lie within `radius` mm of `middle`."""
    index = np.stack(np.meshgrid(*map(np.arange, volume.shape), indexing="ij"), -1)
    return torch.from_numpy(np.linalg.norm(transform(volume.affine, index) - middle, axis=-1) < radius)


@pytest.mark.parametrize("place", [(5, 9, 8), (13, 24, 19)])
def test_the_map_of_an_oblique_scan_peaks_in_the_ball(place: tuple[int, ...]) -> None:
    volume = mx.Volume(torch.zeros(1, 19, 33, 27), oblique_affine())
    middle = transform(volume.affine, np.array(place, dtype=float))
    volume.data[0, ball(volume, middle, 4.0)] = 1.0
    answer = mx.explain(mx.Model(Brightest()), volume, "mil", target=1)
    peak = np.unravel_index(int(answer.data[0].argmax()), volume.shape)
    assert np.linalg.norm(transform(answer.affine, np.array(peak, dtype=float)) - middle) < 4.0
    # Its own second score is the negative of the first; the parts count as often as the network counts them.
    against = mx.explain(mx.Model(Brightest()), volume, "mil", target=0)
    torch.testing.assert_close(against.data, -answer.data)


def test_a_map_that_is_not_what_the_network_pools_says_so() -> None:
    image = lung(1, 20, 20, 20)
    assert mx.explain(mx.Model(Brightest()), image, "mil", target=1).residual["pooling"] < 1e-6
    missed = mx.explain(mx.Model(Brightest(honest=False)), image, "mil", target=1).residual["pooling"]
    total = Brightest(honest=False)(image[None]).item()
    assert missed == pytest.approx(float(image.mean()) / total, rel=1e-3)


def test_instances_look_where_the_map_puts_them() -> None:
    made = network()
    image = lung(1, 1, 64, 48, 56).requires_grad_()
    kept: list[Tensor] = []
    made.evidence.register_forward_hook(lambda _m, _i, y: kept.append(y))
    made(image)
    (gradient,) = torch.autograd.grad(kept[0][0, :, 7, 6, 5].sum(), image)
    where = gradient[0, 0].nonzero()
    assert where.amin(0).tolist() == [4 * n - 15 for n in (7, 6, 5)]
    assert where.amax(0).tolist() == [4 * n + 18 for n in (7, 6, 5)]
    # So the middle is 4 i + 1.5, where the map of a single instance has its peak.
    single = mil.maps(_Only(made, (7, 6, 5)), image[0].detach())[1][0]  # type: ignore[arg-type]
    top = (single >= single.max() * 0.99).nonzero().double().mean(0)
    assert top.tolist() == [29.5, 25.5, 21.5]


class _Only(nn.Module):
    """All instances of a network but one say nothing."""

    def __init__(self, whole: MultipleInstanceClassifier, which: tuple[int, ...]) -> None:
        super().__init__()
        self.whole, self.scores = whole, whole.scores
        self.instances = nn.Identity()
        self.which = which

    def forward(self, image: Tensor) -> Tensor:
        parts = torch.zeros(1, 2, *(s // 4 for s in image.shape[2:]))
        parts[(0, slice(None), *self.which)] = 1.0
        total: Tensor = self.instances(parts)
        return total.sum((2, 3, 4))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_batch_is_its_scans_and_the_network_is_left_alone(pooling: str) -> None:
    model = mx.Model(network(pooling).train(), task="ordinal")
    x = lung(3, 1, 32, 28, 24)
    before, kept = copy.deepcopy(model.network.state_dict()), x.clone()
    together = mx.explain(model, x, "mil", target=1)
    for one, sample in zip(x, together.data, strict=True):
        torch.testing.assert_close(mx.explain(model, one, "mil", target=1).data, sample, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(value, before[key]) for key, value in model.network.state_dict().items())
    assert model.network.training and torch.equal(x, kept)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.network.parameters())


def test_other_networks_and_layers_are_refused() -> None:
    with pytest.raises(mx.MedXAIError, match="ResNet pools no instances: use a network with `instances`"):
        mx.explain(make_model("resnet18"), drawn(1, 24, 24, 16), "mil", target=1)
    with pytest.raises(mx.MedXAIError, match="leave the layer out"):
        target = mx.RegressionTarget(0, layer="instances")
        mx.explain(mx.Model(Brightest()), lung(1, 20, 20, 20), "mil", target=target)
    with pytest.raises(mx.MedXAIError, match="did you mean noisy_or"):
        MultipleInstanceClassifier(2, "noisyor")  # type: ignore[arg-type]


def test_scans_have_the_grade_of_their_worst_nodule() -> None:
    scans = whole_lungs.crops(training(), 6, seed=5, size=64)
    assert scans.images.shape == scans.masks.shape == (6, 1, 64, 64, 64)
    assert scans.grades.tolist() == [0, 1, 2] * 2
    assert torch.equal(scans.masks.flatten(1).amax(1).long(), scans.grades)
    assert scans.masks[5].unique().tolist() == [0, 1, 2]  # with a benign one beside the malignant
    assert scans.images.min() >= 0 and scans.images.max() <= 1
    # A nodule is denser than the same lung without it, which comes before it.
    for k in (1, 2):
        inside = scans.masks[k::3] > 0
        assert (scans.images[k::3][inside].mean() - scans.images[::3][inside].mean()) > 0.2
        outside = ~functional.max_pool3d(inside.float(), 9, stride=1, padding=4).bool()
        assert (scans.images[k::3][outside] - scans.images[::3][outside]).abs().median() < 0.06
    again = whole_lungs.crops(training(), 3, seed=5, size=64)
    assert torch.equal(scans.images[:3], again.images)
    assert not torch.equal(again.images, whole_lungs.crops(training(), 3, seed=6, size=64).images)


def test_nodules_are_anywhere_in_the_lung() -> None:
    scans = whole_lungs.whole(other(), 5, seed=5)
    assert scans.images.shape == (5, 1, *other().hu.shape)
    lung = torch.zeros(other().hu.shape, dtype=torch.bool)
    lung[tuple(other().inside.T)] = True
    sides = set()
    for image, mask, grade in zip(scans.images[:, 0], scans.masks[:, 0], scans.grades, strict=True):
        # As the scan was before it was mirrored: what is most like it.
        flips = [axes for n in range(4) for axes in combinations(range(3), n)]
        unlike = [(image.flip(axes) - scale(other().hu))[::3, ::3, ::3].abs().mean() for axes in flips]
        mask = mask.flip(flips[int(torch.stack(unlike).argmin())])
        # Ends of spikes may be voxels of their own.
        grown = functional.max_pool3d(mask[None, None].float(), 5, stride=1, padding=2)[0, 0] > 0
        found = sitk.GetArrayFromImage(sitk.ConnectedComponent(sitk.GetImageFromArray(grown.byte().numpy())))
        assert (found.max() > 0) == (grade > 0) and found.max() <= whole_lungs.MOST
        for n in range(1, found.max() + 1):
            middle = np.argwhere(found == n).mean(0).round().astype(int)
            near = tuple(slice(max(c - 4, 0), c + 5) for c in middle)
            assert bool(lung[near].any())
            sides.add(middle[0] > len(lung) // 2)
        assert not (other().lesion & (mask > 0)).any()
    assert sides == {False, True}


def test_the_patients_own_lesion_is_healed_and_nothing_else() -> None:
    scan = other()
    assert scan.lesion is not None
    healed = whole_lungs.healed(scan)
    changed = healed != scan.hu
    assert scan.hu[scan.lesion].mean() > -300 and healed[scan.lesion].mean() < -600
    assert changed[scan.lesion].float().mean() > 0.99
    rim = functional.max_pool3d(scan.lesion[None, None].float(), 5, stride=1, padding=2)[0, 0] > 0
    assert not (changed & ~rim).any()
    with pytest.raises(mx.MedXAIError, match="too large to be healed"):
        whole_lungs.healed(training())
    with pytest.raises(mx.MedXAIError, match="smaller than 160 voxels along an axis"):
        whole_lungs.crops(training(), 1, seed=1, size=160)


def test_crops_leave_the_patients_own_lesion_out() -> None:
    scan = training()
    assert scan.lesion is not None
    marked = replace(scan, hu=torch.where(scan.lesion, 9000.0, -2000.0))
    # Of lung alone that is about the lesion, so that most places would be too near.
    near = (scan.inside - scan.lesion.nonzero().float().mean(0)).norm(dim=1) < 75
    marked = replace(marked, inside=scan.inside[near])
    assert whole_lungs.crops(marked, 9, seed=3, size=64).images[::3].max() < 0.1


def test_measures_are_those_of_scikit_learn() -> None:
    scores, grades = drawn(200).round(decimals=1), torch.arange(200) % 3
    expected = roc_auc_score(grades > 0, scores)
    assert mil.auc(scores[grades > 0], scores[grades == 0]) == pytest.approx(expected)
    told = (grades + drawn(200, seed=9).round().long()).clamp(0, 2)
    assert mil.kappa(told, grades) == pytest.approx(cohen_kappa_score(told, grades, weights="quadratic"))


def test_the_loss_is_the_cross_entropy_of_at_least_each_grade_and_sees_no_mask() -> None:
    scans, made = whole_lungs.crops(training(), 3, seed=5, size=64), mil.build().eval()
    with torch.no_grad():
        features, _ = made.bag(scans.images)
        best = made.scores(features.flatten(2).max(2).values[..., None, None, None]).flatten(1)
        found = mil.loss(made, replace(scans, masks=None))  # type: ignore[arg-type]
        expected = 0.0
        for p in (made(scans.images).sigmoid().double().numpy(), best.sigmoid().double().numpy()):
            expected -= np.log(np.where([[0, 0], [1, 0], [1, 1]], p, 1 - p)).mean()
    assert float(found) == pytest.approx(expected, rel=1e-4)


def test_pointing_is_where_the_map_peaks() -> None:
    """By a network that takes the brightest cell for a nodule, and none for a malignant one."""
    images, masks = torch.zeros(4, 1, 32, 24, 40), torch.zeros(4, 1, 32, 24, 40, dtype=torch.uint8)
    for n, (i, where) in enumerate([(1, 8), (2, 8), (2, 24), (1, 8)]):
        images[n, :, 8:12, 12:16, 8:12] = 1
        masks[n, :, 8:12, 12:16, where : where + 4] = i
    masks[3, :, 20:24] = 2  # A malignant one beside the benign one that is taken for it.
    made = _Density()
    found = mil.measure(made, whole_lungs.Scans(images, torch.tensor([1, 2, 2, 2]), masks))  # type: ignore[arg-type]
    assert found["pointing"] == pytest.approx(3 / 4) and found["malignant_pointing"] == pytest.approx(1 / 3)
    assert found["accuracy"] == pytest.approx(3 / 4)


class _Density(nn.Module):
    """What a cell contributes to each of two grades is how dense it is."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Conv3d(1, 2, 1)
        self.instances = nn.AvgPool3d(4)

    def forward(self, image: Tensor) -> Tensor:
        total: Tensor = self.instances(image.expand(-1, 2, -1, -1, -1))
        return total.sum((2, 3, 4))


@cache
def shipped(name: str) -> mx.Model:
    return mx.load_model(resources.path(f"Models/{name}"))


BUNDLES = ("lung_mil", "lung_mil_attention")


@pytest.mark.parametrize("name", BUNDLES)
def test_the_bundles_are_graders_of_whole_scans(name: str) -> None:
    folder, model = resources.path(f"Models/{name}"), shipped(name)
    assert (model.task, model.class_names, model.patch_size) == ("ordinal", mil.GRADES, None)
    assert sum(file.stat().st_size for file in folder.rglob("*")) < 1e6
    verify_net_in_out(
        config_file=str(folder / "configs" / "inference.json"),
        meta_file=str(folder / "configs" / "metadata.json"),
        net_id="network_def",
        device="cpu",
    )
    meta = metrics_of(folder)
    # What was demanded of them, on the whole lungs of the other patient.
    for draw in ("", "borderline_"):
        assert meta[f"{draw}auc"] >= 0.9 and meta[f"{draw}pointing"] >= 0.8
    card = (folder / "docs" / "README.md").read_text("utf-8")
    assert f"{meta['auc']:.3f}" in card and f"{meta['pointing']:.3f}" in card
    assert '"Malignant" is a rule, not pathology' in card


@pytest.mark.parametrize("name", BUNDLES)
def test_nodules_of_whole_lungs_are_found(name: str) -> None:
    # Not the seed of the model cards: these scans nobody has looked at.
    found = mil.measure(shipped(name).network.eval(), whole_lungs.whole(other(), 9, seed=103))  # type: ignore[arg-type]
    assert found["auc"] >= 0.8 and found["pointing"] >= 0.6
    assert found["malignant_auc"] >= 0.6


@pytest.mark.parametrize("name", BUNDLES)
def test_the_real_nodule_is_found_in_the_whole_scan(name: str) -> None:
    model, folder = shipped(name), resources.path("SampleData")
    image, mask = (mx.load_volume(folder / f"chest_ct_nodule{part}.nrrd") for part in ("", "_mask"))
    answer = mx.explain(model, image, "mil", target="nodule")
    assert answer.data.shape == image.data.shape and answer.residual["pooling"] < 1e-4
    assert answer.provenance.peak_memory < 2e9
    peak = np.unravel_index(int(answer.data[0].argmax()), image.shape)
    assert mask.data[0][tuple(int(i) for i in peak)] > 0
    assert model.predict(image).scores["nodule"] > 0.95
    # The nodule speaks for itself: without it, less.
    if name == "lung_mil_attention":
        with torch.no_grad():
            healed = model.network.eval()(scale(whole_lungs.healed(other()))[None, None])
        assert float(healed[0, 0].sigmoid()) < 0.5
