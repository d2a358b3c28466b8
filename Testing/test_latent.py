"""Walks among the codes of generative networks: the mathematics against closed forms, the method on real scans."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import oblique_affine
from model_cards import metrics_of
from scipy.ndimage import map_coordinates
from scipy.spatial.distance import mahalanobis
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import mutual_info_score, roc_auc_score
from torch import Tensor, nn
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

import MedXAILib as mx
from MedXAILib import resources
from MedXAILib.engines.concept_vectors import Scan
from MedXAILib.engines.counterfactual import otherwise
from MedXAILib.engines.nodule_size import diameter
from MedXAILib.errors import MedXAIError
from MedXAILib.explanation import load_explanation
from MedXAILib.grid import resample, shifted, transform
from MedXAILib.networks import ladder_vae as ladder
from MedXAILib.networks.ladder_vae import LadderVAE
from MedXAILib.networks.vae import VAE, Autoencoder
from MedXAILib.report.localisation import centre
from MedXAILib.request import recompute, tell
from MedXAILib.run import Run
from MedXAILib.synthetic.lung_nodules import ATTRIBUTES, CLASSES, SPACING_MM, Backgrounds, Nodules, synthesise
from MedXAILib.training import ladder_vae, vae
from MedXAILib.traversal import Traversal
from MedXAILib.trust import telling

SEED = 907
"""Neither the training nor the cards have seen these patches."""


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_divergence_is_that_of_normal_distributions() -> None:
    mean, log_variance = random(7, 5), random(7, 5, seed=1)
    one = Normal(mean, (log_variance / 2).exp())
    expected = kl_divergence(one, Normal(torch.zeros(5), torch.ones(5)))
    assert torch.allclose(vae.divergence(mean, log_variance), expected, atol=1e-5)
    to, log_to = random(7, 5, seed=2), random(7, 5, seed=3)
    expected = kl_divergence(one, Normal(to, (log_to / 2).exp()))
    assert torch.allclose(ladder_vae.divergence((mean, log_variance), (to, log_to)), expected, atol=1e-5)


def linear(count: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Codes of an encoder that is linear in standard normal images, so that all of it is known: codes, their means and
    logarithms of variances, the covariance of all codes, the variances of those of an image."""
    mixing = torch.tensor([[1.0, 0.6], [0.0, 0.8], [0.5, -0.5]])
    variance = torch.tensor([0.5, 0.3, 0.4])
    mean = random(count, 2) @ mixing.T
    codes = mean + variance.sqrt() * random(count, 3, seed=1)
    return codes, mean, variance.log().expand(count, 3), mixing @ mixing.T + variance.diag(), variance


def test_the_parts_of_the_divergence_are_those_of_a_gaussian() -> None:
    codes, mean, log_variance, covariance, variance = linear(3000)
    told, correlated, alone = vae.decomposed(codes, mean, log_variance, 3000)
    spread = covariance.diagonal()
    # Closed forms: entropies of normal distributions, and the divergence of each margin from the standard one.
    assert float(told) == pytest.approx(float(covariance.logdet() - variance.log().sum()) / 2, abs=0.06)
    assert float(correlated) == pytest.approx(float(spread.log().sum() - covariance.logdet()) / 2, abs=0.06)
    assert float(alone) == pytest.approx(float((spread - 1 - spread.log()).sum()) / 2, abs=0.06)


def test_the_parts_of_the_divergence_sum_to_it() -> None:
    codes, mean, log_variance, _, _ = linear(64)
    own = Independent(Normal(mean, (log_variance / 2).exp()), 1).log_prob(codes)
    prior = MultivariateNormal(torch.zeros(3), torch.eye(3)).log_prob(codes)
    for count in (64, 5000):
        total = sum(vae.decomposed(codes, mean, log_variance, count))
        assert float(total) == pytest.approx(float((own - prior).mean()), abs=1e-4)


def test_codes_that_tell_nothing_of_one_another_have_no_total_correlation() -> None:
    mean = random(2000, 3)
    codes = mean + 0.5 * random(2000, 3, seed=1)
    log_variance = torch.full_like(mean, 0.25).log()
    apart = vae.decomposed(codes, mean, log_variance, 2000)[1]
    twice = vae.decomposed(codes[:, [0, 0, 1]], mean[:, [0, 0, 1]], log_variance, 2000)[1]
    assert abs(float(apart)) < 0.06
    # Two codes that share what they know of an image tell of it: half the logarithm of 1 - correlation².
    assert float(twice) > 0.3


def test_the_likelihood_is_that_of_normal_errors_with_the_best_spread() -> None:
    network = VAE()
    image, drawn = random(3, 1, 32, 32, 32).sigmoid(), random(3, 1, 32, 32, 32, seed=1).sigmoid()
    inside = network.window.expand_as(image) == 1
    errors = (image - drawn)[inside]
    whole = network.window == 1
    network.window.copy_(whole.float())
    spread = errors.square().mean().sqrt()
    of_each = Normal(0.0, spread).log_prob(errors).mean() * vae._VOICES
    constant = -0.5 * vae._VOICES * (np.log(2 * np.pi) + 1)
    assert float(vae.likelihood(network, image, drawn)) == pytest.approx(float(of_each) - constant, rel=1e-4)


def test_codes_are_in_order_when_the_images_are() -> None:
    values = torch.tensor([[1.0, 5.0], [2.0, 3.0], [3.0, torch.nan]])
    right = torch.tensor([[-50.0, 50.0], [0.0, -50.0], [50.0, 7.0]])
    assert float(vae.unordered(right, values)) == pytest.approx(0, abs=1e-6)
    # All nine pairs of the first attribute, of which six are of two images; two of the four of the second.
    assert float(vae.unordered(-right, values)) == pytest.approx(2 * 6 / 9 + 2 * 2 / 4)
    assert float(vae.unordered(torch.zeros(3, 2), values)) == pytest.approx(6 / 9 + 2 / 4)


def test_the_information_gap_is_the_one_computed_by_hand() -> None:
    value = random(2000)
    other = torch.where(torch.arange(2000) % 2 == 0, value, random(2000, seed=1))
    codes = torch.stack([value, other, random(2000, seed=2)], dim=1)

    def fifths(values: Tensor) -> np.ndarray:
        return (values.argsort().argsort() * 5 // 2000).numpy()

    expected = 1 - mutual_info_score(fifths(value), fifths(other)) / np.log(5)
    assert vae.information_gap(codes, value[:, None]) == pytest.approx(expected, abs=1e-3)
    assert vae.information_gap(codes[:, [0, 0, 2]], value[:, None]) == pytest.approx(0, abs=1e-6)


def test_the_size_of_a_ball_is_its_diameter_and_vessels_are_cut_off() -> None:
    d, h, w = np.indices((32, 32, 32)) - 15.5
    for wanted in (8.0, 15.0, 22.0):
        ball = np.where(np.sqrt((d * 1.5) ** 2 + h**2 + w**2) < wanted / 2, 0.7, 0.1)
        # The chest wall, and a vessel from there.
        ball[:, :, :2], ball[15, 15] = 0.9, 0.9
        assert diameter(ball, (1.5, 1.0, 1.0)) == pytest.approx(wanted, abs=0.7)
    assert diameter(np.full((32, 32, 32), 0.1), (1.0, 1.0, 1.0)) == 0
    away = np.where(np.sqrt((d - 12) ** 2 + h**2 + w**2) < 3, 0.7, 0.1)
    assert diameter(away, (1.0, 1.0, 1.0)) == 0


def test_the_nearest_other_decision_is_the_foot_of_the_perpendicular() -> None:
    normal = torch.tensor([3.0, 4.0, 0.0])
    start = torch.tensor([[0.0, 0.0, 1.0], [-0.5, 0.3, 0.0], [0.0, 1.0, 0.0]])

    def lead(codes: Tensor) -> Tensor:
        return 4 * (codes @ normal - 5)

    found = otherwise(start, lead, lambda codes: codes.norm(dim=1), 9.0, 3.0, rounds=200)
    assert bool((lead(found) > 0).all())
    foot = start + ((5 - start @ normal) / 25)[:, None] * normal
    assert float((found - foot).norm(dim=1).max()) < 0.15


def test_no_further_than_the_reach_and_not_where_nothing_is_alike() -> None:
    start = torch.zeros(1, 2)
    far = otherwise(start, lambda codes: codes[:, 0] - 9, lambda codes: codes.norm(dim=1), 99.0, 2.0)
    assert float(far[0, 0]) == pytest.approx(2.0, abs=1e-6) and abs(float(far[0, 1])) < 0.01
    # The shortest way, to (1, 1), leads to where nothing is like it; there is another, to (1.9, 0.1).
    found = otherwise(start, lambda codes: codes.sum(1) - 1, lambda codes: 10 * codes[:, 1].abs(), 1.0, 3.0, 150)
    assert float(found.sum()) > 2
    assert 10 * abs(float(found[0, 1])) <= 1
    assert float(found.norm()) < 2.6


def test_nothing_learns_from_a_search() -> None:
    network = nn.Linear(2, 1)
    otherwise(torch.zeros(1, 2), lambda codes: network(codes)[:, 0] - 1, lambda codes: codes.norm(dim=1), 9.0, 3.0)
    assert all(parameter.grad is None for parameter in network.parameters())


@cache
def scan() -> mx.Volume:
    """The sample scan, 90 mm around its nodule."""
    whole = mx.load_volume(resources.path("SampleData/chest_ct_nodule.nrrd"))
    index = whole.to_index(nodule())
    low = np.maximum((index - 45 / np.array(whole.spacing)).round().astype(int), 0)
    high = (index + 45 / np.array(whole.spacing)).round().astype(int)
    part = whole.data[(slice(None), *(slice(a, b) for a, b in zip(low, high, strict=True)))]
    return mx.Volume(part, shifted(whole.affine, low))


@cache
def nodule() -> tuple[float, ...]:
    return centre(mx.load_volume(resources.path("SampleData/chest_ct_nodule_mask.nrrd")))


@cache
def classifier() -> mx.Model:
    return mx.load_model(resources.path("Models/lung_nodule"))


def walked(model: mx.Model | None = None, volume: mx.Volume | None = None, **parameters: object) -> Traversal:
    told = tell(model or classifier(), volume or scan(), "latent", region=nodule(), **parameters)
    assert isinstance(told, Traversal)
    return told


@cache
def along(name: str) -> Traversal:
    return walked(along=name)


@cache
def to_benign() -> Traversal:
    return walked(towards="benign")


def test_the_decision_on_the_real_nodule_flips() -> None:
    told = to_benign()
    assert told.along == "towards benign"
    assert told.flipped is not None
    assert told.here == 0
    seen = classifier().prepare(scan(), nodule())
    for number, step in enumerate(told.steps):
        # What is said of the images shown is what the classifier says of them when it is asked anew.
        shown = ((told.images[number] + 1000) / 1400).clamp(0, 1)
        with classifier().ready(), torch.no_grad():
            logits = classifier().network(shown[None, None])
        assert step.scores == pytest.approx(dict(zip(CLASSES, logits.softmax(1)[0].tolist(), strict=True)), abs=2e-3)
        assert step.value == pytest.approx(float(logits[0, 2]), abs=2e-2)
        assert (number >= told.flipped) == (int(logits.argmax()) == CLASSES.index("benign"))
    assert np.allclose(told.affine, seen.affine)
    assert "benign" in told.text


def test_step_0_is_the_scan_itself() -> None:
    for told in (to_benign(), along("diameter")):
        own = resample(scan().data, scan().affine, told.images.shape[1:], told.affine)[0]
        assert torch.equal(told.images[told.here], own)
        assert told.steps[told.here].position == 0
        assert float((told.images[-1] - own).abs().max()) > 50


def test_a_nodule_grows_along_its_diameter() -> None:
    told = along("diameter")
    assert [step.position for step in told.steps] == pytest.approx(np.linspace(-4, 4, 9))
    # Measured by density alone on what is shown.
    seen = ((told.images[:, 4:36, 4:36, 4:36] + 1000) / 1400).numpy()
    sizes = [diameter(one, (1.25,) * 3) for one in seen]
    assert float(spearmanr(range(9), sizes)[0]) >= 0.95
    assert [step.numbers["diameter (mm)"] for step in told.steps] == pytest.approx(sizes, abs=0.5)
    assert sizes[-1] > sizes[0] + 3
    lowest, highest = told.images[0].mean(), told.images[-1].mean()
    assert told.flipped is not None and told.steps[told.flipped].position < 0
    assert float(lowest) < float(told.images[told.here].mean()) < float(highest)


@cache
def nodules() -> mx.Examples:
    """Nodules in the lung of another patient; of each it is known whether it is large, and how a coin fell."""
    drawn = synthesise(Backgrounds.training(), 90, seed=12)
    kept = drawn.labels > 0
    # The patches are along R, A and S.
    affine = np.diag([*[SPACING_MM] * 3, 1.0])
    middle = tuple(transform(affine, np.full(3, 19.5)))
    scans = [Scan(mx.Volume(1400 * image - 1000, affine), middle) for image in drawn.images[kept]]
    sizes = drawn.attributes[kept][:, ATTRIBUTES.index("diameter_mm")].numpy()
    large = np.where(sizes > 16, 1, np.where(sizes < 11, 0, np.nan))
    return mx.Examples(scans, {"large": large, "coin": np.random.default_rng(3).permutation(len(scans)) % 2})


def test_examples_say_what_the_generator_was_not_told() -> None:
    """The direction of their sizes makes nodules larger, as what is shown measures."""
    told = walked(along="large", examples=nodules(), steps=4)
    assert told.along == "along large" and "are told by their codes: large" in " ".join(told.provenance.notes)
    # Of an even number one less is behind the scan.
    assert [step.position for step in told.steps] == pytest.approx([-2, 0, 2, 4])
    seen = ((told.images[:, 4:36, 4:36, 4:36] + 1000) / 1400).numpy()
    sizes = [diameter(one, (1.25,) * 3) for one in seen]
    assert sizes == sorted(sizes) and sizes[-1] > sizes[0] + 2
    own = along("diameter")
    a, b = ((walk.images[-1] - walk.images[walk.here]).flatten() for walk in (told, own))
    assert float(torch.cosine_similarity(a, b, dim=0)) > 0.5
    with pytest.raises(MedXAIError, match="coin"):
        walked(along="coin", examples=nodules())
    with pytest.raises(MedXAIError, match="did you mean large"):
        walked(along="lareg", examples=nodules())


@pytest.mark.parametrize("steps", [2, 3, 8])
def test_there_are_as_many_images_as_were_asked_for(steps: int) -> None:
    told = walked(along="diameter", steps=steps)
    assert len(told.steps) == len(told.images) == steps
    positions = [step.position for step in told.steps]
    assert 0 in positions and positions[-1] == 4 and np.ptp(np.diff(positions)) == pytest.approx(0)


def test_a_network_that_has_forgotten_says_otherwise_on_the_way() -> None:
    """Of the same nodule smaller and larger, and on the way to what it takes for another class."""
    for told in (walked(along="diameter", steps=2), walked(towards="benign", rounds=3, steps=2)):
        found = telling.judge(told, classifier(), scan())
        assert found.light == "good" and found.values["highest"] < 0.8


def test_what_is_changed_is_within_20_mm_of_the_middle() -> None:
    told = along("diameter")
    index = np.stack(np.indices(told.images.shape[1:]), -1)
    away = np.linalg.norm(transform(told.affine, index) - transform(told.affine, np.full(3, 19.5)), axis=-1)
    changed = (told.images - told.images[told.here]).abs().amax(0).numpy()
    assert changed[away > 20].max() == 0
    assert changed[away < 10].max() > 100


class Dense(nn.Module):
    """How dense a scan in Hounsfield units is on the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.01))

    def forward(self, x: Tensor) -> Tensor:
        score = self.weight * (x.mean((1, 2, 3, 4)) + 700)
        return torch.stack([-score, score], dim=1)


def oblique() -> mx.Volume:
    """The nodule on a tilted, anisotropic grid of odd size, in its middle."""
    affine = oblique_affine((2.5, 0.9, 1.1))
    shape = (21, 57, 49)
    affine[:3, 3] += np.array(nodule()) - transform(affine, (np.array(shape) - 1) / 2)
    index = np.stack(np.indices(shape), -1)
    where = transform(np.linalg.inv(scan().affine) @ affine, index)
    values = map_coordinates(scan().data[0].numpy(), np.moveaxis(where, -1, 0), order=1, mode="nearest")
    return mx.Volume(torch.from_numpy(values)[None], affine)


def test_on_an_oblique_anisotropic_scan_the_same_changes_in_the_same_place() -> None:
    volume = oblique()
    model = mx.Model(Dense(), class_names=("airy", "dense"))
    told = tell(model, volume, "latent", along="diameter", steps=3)
    assert isinstance(told, Traversal)
    assert told.images.shape == (3, 21, 57, 49) and np.allclose(told.affine, volume.affine)
    assert torch.equal(told.images[1], volume.data[0])
    drawer = mx.load_model(resources.path("Models/generators/lung_nodule_vae"))
    assert drawer.fingerprint in " ".join(told.provenance.notes)
    values = [step.value for step in told.steps]
    assert values == sorted(values) or values == sorted(values, reverse=True)
    # What the network is shown is what is shown.
    with torch.no_grad():
        said = model.network(told.images[:, None])[:, model.class_names.index(told.provenance.target_label)]
    assert values == pytest.approx(said.tolist(), abs=1e-3)
    straight = walked(along="diameter", steps=3)
    index = np.stack(np.indices(volume.shape), -1)
    where = np.moveaxis(transform(np.linalg.inv(straight.affine) @ volume.affine, index), -1, 0)
    for side in (0, 2):
        expected = map_coordinates((straight.images[side] - straight.images[1]).numpy(), where, order=1)
        found = (told.images[side] - told.images[1]).numpy()
        assert np.corrcoef(expected.ravel(), found.ravel())[0, 1] > 0.8


def test_noise_is_strange_and_the_scan_is_not() -> None:
    assert not to_benign().steps[0].strange
    noise = 1000 * random(*scan().data.shape) - 300
    told = walked(volume=mx.Volume(noise, scan().affine), along="diameter", steps=3)
    assert all(step.strange for step in told.steps)
    assert "do not rely on any of it" in told.text


def test_far_out_is_strange() -> None:
    told = walked(along="diameter", steps=3, reach=10)
    assert told.steps[2].strange and not told.steps[1].strange
    assert told.steps[2].numbers["distance"] > 2 * told.steps[1].numbers["distance"]


def test_recomputed_it_is_the_same() -> None:
    told = to_benign()
    again = recompute(told, classifier(), scan())
    assert torch.equal(again.images, told.images)
    assert again.steps == told.steps and again.text == told.text


def test_saved_and_read_it_is_the_same(tmp_path: Path) -> None:
    told = along("diameter")
    read = load_explanation(told.save(tmp_path / "walk"))
    assert isinstance(read, Traversal)
    assert read.steps == told.steps and read.along == told.along and read.flipped == told.flipped
    assert torch.equal(read.images, told.images)


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"along": "diametre"}, "did you mean diameter"),
        ({"along": "16"}, "no direction '16'"),
        ({"towards": "begnin"}, "did you mean benign"),
        ({"towards": "malignant"}, "says 'malignant' already"),
        ({"generator": "lung_nodule_vea"}, "did you mean lung_nodule_vae"),
        ({"generator": str(resources.path("Models/lung_nodule"))}, "draws no scans from codes"),
        ({"steps": 1}, "steps"),
        ({"reach": 0}, "reach"),
    ],
)
def test_what_is_not_possible_is_said(parameters: dict[str, object], says: str) -> None:
    with pytest.raises(MedXAIError, match=says):
        walked(**parameters)


def test_a_network_that_sees_something_else_is_refused() -> None:
    model = mx.Model(nn.Sequential(nn.Conv3d(1, 2, 3), nn.AdaptiveAvgPool3d(1), nn.Flatten()), preprocessing=upside)
    with pytest.raises(MedXAIError, match="does not see this scan as"):
        tell(model, scan(), "latent", along="diameter")
    two = mx.Volume(scan().data.repeat(2, 1, 1, 1), scan().affine)
    with pytest.raises(MedXAIError, match="one channel"):
        tell(mx.Model(nn.Sequential(nn.Conv3d(2, 2, 3), nn.AdaptiveAvgPool3d(1), nn.Flatten())), two, "latent")
    first = mx.Model(Dense(), class_names=("airy", "dense"), preprocessing=lambda image: image[:1])
    with pytest.raises(MedXAIError, match=r"one channel.* with 2 channel"):
        tell(first, two, "latent", along="diameter")


def upside(image: Tensor) -> Tensor:
    """No linear function of Hounsfield units."""
    return (image / 300).cos()


def test_a_regression_has_directions_and_no_decision() -> None:
    model = mx.Model(nn.Sequential(Dense(), nn.Linear(2, 1)), task="regression", class_names=("density",))
    with pytest.raises(MedXAIError, match="no other class"):
        tell(model, oblique(), "latent")
    told = tell(model, oblique(), "latent", along="diameter", steps=3)
    assert isinstance(told, Traversal) and told.flipped is None


def test_neither_the_networks_nor_the_scan_are_changed() -> None:
    model, volume = classifier(), scan()
    before = model.fingerprint, volume.data.clone()
    walked(towards="benign", rounds=2, steps=2)
    assert model.fingerprint == before[0] and torch.equal(volume.data, before[1])
    assert all(parameter.grad is None for parameter in model.network.parameters())


def test_a_walk_can_be_cancelled() -> None:
    with pytest.raises(mx.Cancelled):
        tell(classifier(), scan(), "latent", region=nodule(), run=Run(cancel=lambda: True))


def small() -> LadderVAE:
    torch.manual_seed(0)
    network = LadderVAE(ATTRIBUTES, CLASSES).eval()
    # Levels that say something.
    for parameter in [*network.seen.parameters(), *network.likely.parameters()]:
        parameter.data *= 5
    return network


def test_the_codes_of_a_ladder_draw_what_its_levels_do() -> None:
    network, image = small(), random(3, 1, 32, 32, 32).sigmoid()
    with torch.no_grad():
        levels = network.climb(image)
        assert torch.allclose(network(image), network.decoder(levels[-1][2]), atol=1e-5)
        assert torch.allclose(network.place(network.encode(image)), levels[0][2], atol=1e-6)
        # Codes of 0 are what is likeliest all the way down.
        value = torch.zeros(1, network.levels[0])
        for level in (1, 2):
            value = network.prior(level, value)[0]
        assert torch.allclose(network.decode(torch.zeros(1, sum(network.levels))), network.decoder(value), atol=1e-6)


def test_two_opinions_make_the_normalised_product_of_their_densities() -> None:
    one, other = (torch.tensor([0.3]), torch.tensor([-0.4])), (torch.tensor([-1.0]), torch.tensor([0.9]))
    mean, log_variance = ladder._both(one, other)
    x = torch.linspace(-12, 12, 20001)
    density = sum(Normal(m, (v / 2).exp()).log_prob(x) for m, v in (one, other)).exp()
    weight = density / density.sum()
    assert float(mean) == pytest.approx(float((weight * x).sum()), abs=1e-4)
    assert float(log_variance.exp()) == pytest.approx(float((weight * (x - mean) ** 2).sum()), abs=1e-4)


def test_the_distance_is_that_of_mahalanobis_and_the_attributes_those_of_a_ridge_regression() -> None:
    codes = (random(200, 4) @ random(4, 4, seed=1) + 2).double()
    labels = torch.arange(200) % 3
    attributes = torch.cat([codes[:, :3] @ random(3, 7, seed=2).double()], 1) + 5
    attributes[labels == 0] = torch.nan

    class Known(Autoencoder):
        def encode(self, image: Tensor) -> Tensor:
            return codes[image[:, 0, 0, 0, 0].long()]

        def decode(self, drawn: Tensor) -> Tensor:
            return torch.zeros(len(drawn), 1, 32, 32, 32)

    images = torch.arange(200.0).reshape(-1, 1, 1, 1, 1).expand(200, 1, 40, 40, 40)
    nothing = torch.zeros(200, 3)
    network = Known(4, (), ATTRIBUTES, CLASSES, cases=50).double()
    vae.settle(network, Nodules(images, images > 0, labels, attributes, nothing, nothing))
    spread = np.cov(codes.numpy().T, ddof=0) + 0.1 * np.eye(4)
    expected = [mahalanobis(c, codes.mean(0), np.linalg.inv(spread)) for c in codes.numpy()]
    assert network.distance(codes).tolist() == pytest.approx(expected, rel=1e-6)
    assert float(network.limits[0]) == pytest.approx(np.quantile(expected, 0.99), rel=1e-6)
    there = labels > 0
    fit = Ridge(0.1 * int(there.sum())).fit(codes[there], attributes[there])
    assert np.allclose(network.read(codes), fit.predict(codes), atol=1e-6)
    assert torch.equal(network.places, codes[:50, :2]) and torch.equal(network.kinds, labels[:50])


def test_what_is_taken_away_takes_its_detail_along() -> None:
    class Drawn(Autoencoder):
        def encode(self, image: Tensor) -> Tensor:
            return image.new_zeros(1, 1)

        def decode(self, codes: Tensor) -> Tensor:
            return codes[:, :, None, None, None].expand(-1, 1, 32, 32, 32)

    network, image = Drawn(1, (), (), ()), torch.full((1, 1, 32, 32, 32), 0.5)
    image[..., 15] = 0.8

    def middle(start: float, end: float) -> list[float]:
        changed = network.changed(image, torch.tensor([[start]]), torch.tensor([[end]]))
        assert torch.equal(changed[..., 0, 0, :], image[..., 0, 0, :])  # beyond the window
        return changed[0, 0, 16, 16, 15:17].tolist()

    assert middle(0.4, 0.4) == pytest.approx([0.8, 0.5])
    # Half of the density goes, of the bright detail, too; of what is not dense half is filled.
    assert middle(0.4, 0.2) == pytest.approx([0.4, 0.25])
    assert middle(0.4, 0.7) == pytest.approx([0.9, 0.75])


GENERATORS = ("lung_nodule_vae", "lung_nodule_tc_vae", "lung_nodule_ladder_vae")


def metrics(name: str) -> dict[str, float]:
    folder = resources.path(f"Models/generators/{name}")
    found: dict[str, float] = metrics_of(folder)
    return found


@cache
def shipped(name: str) -> Autoencoder:
    network = mx.load_model(resources.path(f"Models/generators/{name}")).network.eval()
    assert isinstance(network, Autoencoder)
    return network


@cache
def patches() -> Nodules:
    return vae.near(Backgrounds.test(), 60, SEED)


@pytest.mark.parametrize("name", GENERATORS)
def test_the_card_says_what_was_measured(name: str) -> None:
    folder, measured = resources.path(f"Models/generators/{name}"), metrics(name)
    card = (folder / "docs" / "README.md").read_text("utf-8")
    assert "Never use it for a" in card
    for key in [key for key in measured if key.endswith(("_order", "_within", "_agreed", "_auc", "accuracy"))]:
        assert f"| {measured[key]:.3f} |" in card, key
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 1_500_000


@pytest.mark.parametrize("name", GENERATORS[:2])
def test_nodules_of_another_patient_follow_the_code_of_their_diameter(name: str) -> None:
    assert metrics(name)["size_order"] >= 0.95 and metrics(name)["borderline_size_order"] >= 0.95
    images = patches().images[patches().labels > 0][:12]
    with torch.no_grad():
        found = vae.sizes(shipped(name), images, shipped(name).encode(vae.middle(images)))
    assert found["size_order"] >= 0.95


def test_the_map_parts_malignant_from_benign_in_another_patient() -> None:
    assert metrics("lung_nodule_ladder_vae")["map_auc"] >= 0.9
    network, lesion = shipped("lung_nodule_ladder_vae"), patches().labels > 0
    with torch.no_grad():
        at = network.place(network.encode(vae.middle(patches().images[lesion])))
    known = network.kinds > 0
    fit = LogisticRegression().fit(network.places[known], network.kinds[known] == 2)
    assert roc_auc_score(patches().labels[lesion] == 2, fit.decision_function(at)) >= 0.9


def test_decisions_on_nodules_of_another_patient_flip() -> None:
    measured = metrics("lung_nodule_vae")
    for to in ("malignant", "benign"):
        assert measured[f"to_{to}"] >= 0.9 and measured[f"borderline_to_{to}"] >= 0.9


def test_the_ladder_shows_the_way_on_the_map_of_all_cases() -> None:
    told = walked(generator="lung_nodule_ladder_vae", along="x", steps=5)
    assert len(told.cohort) == 510 and {place.label for place in told.cohort} == set(CLASSES)
    assert told.path is not None and told.path.shape == (5, 2)
    # Along the first axis of the map, and no other.
    assert np.diff(told.path[:, 0]) == pytest.approx([2.0] * 4, abs=1e-5)
    assert np.ptp(told.path[:, 1]) == pytest.approx(0, abs=1e-6)
    network = shipped("lung_nodule_ladder_vae")
    seen = ((told.images[told.here][4:36, 4:36, 4:36] + 1000) / 1400).clamp(0, 1)
    with torch.no_grad():
        assert told.path[told.here] == pytest.approx(
            network.place(network.encode(seen[None, None]))[0].tolist(), abs=0.05
        )
