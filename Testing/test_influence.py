"""Influences against learning again, closed forms, scikit-learn and captum."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from captum.influence import TracInCPFast
from conftest import oblique_affine
from safetensors.torch import save_file
from scipy.stats import pearsonr
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset
from typer.testing import CliRunner

import MedXAILib as mx
from MedXAILib import cli
from MedXAILib.cases import teaching
from MedXAILib.cases.record import SCAN, Record
from MedXAILib.cases.spaces import SPACES, fingerprint, said
from MedXAILib.engines.last_layer import LastLayer, Scaling
from MedXAILib.engines.per_sample_gradients import per_sample_gradients
from MedXAILib.engines.projection import projected
from MedXAILib.engines.training_gradients import TrainingGradients, trak
from MedXAILib.run import Run
from MedXAILib.trust import data_attribution, telling

pytest.importorskip("lancedb")
from MedXAILib.cases.library import Embedder, Library

CLASSES = ("none", "benign", "malignant")


def conv3d() -> nn.Module:
    """With all that per-sample gradients stumble over: normalisation, work in place, pooling."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.ReLU(inplace=True),
        nn.Conv3d(1, 4, 3, stride=2),
        nn.BatchNorm3d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool3d(2),
        nn.Flatten(),
        nn.Linear(4 * 2 * 2, 3),
    )
    network[2].running_mean.uniform_(-0.2, 0.2)
    network[2].running_var.uniform_(0.5, 2)
    return network


def cross_entropy(output: Tensor, label: Tensor) -> Tensor:
    return functional.cross_entropy(output, label[None])


class Undecided(nn.Module):
    """Looks at the numbers of its input before it computes, so that several samples at once are not possible."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x.flatten(1)) if float(x.sum()) > 0 else self.other(x.flatten(1))


@pytest.mark.parametrize("kind", [conv3d, Undecided])
def test_gradients_of_a_batch_are_those_of_its_samples(kind):
    network, run = kind(), Run()
    shape = (1, 7, 10, 10) if kind is conv3d else (1, 1, 2, 2)
    x, labels = torch.randn(5, *shape, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 1, 0, 1])
    model, before = mx.Model(network, class_names=CLASSES), x.clone()
    with model.ready():
        found = per_sample_gradients(model, x, labels, cross_entropy, run)
    assert torch.equal(x, before)
    assert bool(run.notes) == (kind is Undecided)
    network.eval()
    for i in range(5):
        network.zero_grad()
        cross_entropy(network(x[i : i + 1].clone()), labels[i]).backward()
        alone = torch.cat(
            [torch.zeros_like(p).ravel() if p.grad is None else p.grad.ravel() for p in network.parameters()]
        )
        assert alone.abs().max() > 0.01
        assert found[i].sub(alone).abs().max() < 1e-6


def test_short_vectors_have_the_same_inner_products():
    vectors = 1 + torch.randn(2, 3000, generator=torch.Generator().manual_seed(0))
    true = float(vectors[0] @ vectors[1])
    found = [projected(vectors, 64, seed) for seed in range(200)]
    products = np.array([float(a @ b) for a, b in found])
    lengths = float(vectors[0].norm() * vectors[1].norm())
    # Independent draws, so their mean errs by what theory has for one, over the root of their number.
    spread = lengths / 64**0.5
    assert abs(products.mean() - true) < 4 * spread / 200**0.5
    assert products.std() == pytest.approx(spread, rel=0.2)
    assert torch.equal(found[3], projected(vectors, 64, 3)) and not torch.equal(found[3], found[4])
    assert torch.equal(projected(vectors, 0), vectors) and torch.equal(projected(vectors, 3000), vectors)


def clusters(cases: int, seed: int, apart: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, 5) of three classes that overlap, and labels (N,)."""
    random = np.random.default_rng(seed)
    labels = np.arange(cases) % 3
    return apart * np.random.default_rng(99).normal(size=(3, 5))[labels] + random.normal(size=(cases, 5)), labels


def test_regression_without_a_case_is_exact():
    random = np.random.default_rng(0)
    x, asked = random.normal(size=(40, 5)), random.normal(size=(7, 5))
    y = x @ random.normal(size=(5, 2)) + random.normal(size=(40, 2))

    def ridge(keep: np.ndarray) -> np.ndarray:
        one = np.c_[x[keep], np.ones(keep.sum())]
        return np.c_[asked, np.ones(7)] @ np.linalg.solve(one.T @ one + 0.7 * np.eye(6), one.T @ y[keep])

    head = LastLayer.fit(x, y, 0.7, "identity")
    everything = np.ones(40, dtype=bool)
    assert np.allclose(head.scores(asked), ridge(everything), atol=1e-10)
    for output in np.eye(2):
        influences = np.array([head.kept @ head.asked(q, output) for q in asked])
        for i in (0, 7, 39):
            change = (ridge(everything) - ridge(everything & (np.arange(40) != i))) @ output
            assert np.allclose(influences[:, i], change, atol=1e-10)
    # The hat matrix has it in closed form: by how much less wrong a case is about itself than it would be without it.
    one = np.c_[x, np.ones(40)]
    hat = one @ np.linalg.solve(one.T @ one + 0.7 * np.eye(6), one.T)
    left = (y - hat @ y) / (1 - np.diag(hat))[:, None]
    own = (left - (y - hat @ y)) * (y - hat @ y)
    assert np.allclose(head.self_influence, own.sum(1), atol=1e-10)


def test_classes_are_fitted_to_the_optimum():
    x, labels = clusters(90, 1)
    head = LastLayer.fit(x, np.eye(3)[labels], 2.0)
    one = np.c_[x, np.ones(90)]
    known = LogisticRegression(C=0.5, fit_intercept=False, tol=1e-10, max_iter=1000).fit(one, labels)
    assert np.allclose(head.weights, known.coef_, atol=1e-6)


def test_optimum_is_reached_from_anywhere():
    """From weights that are off, whole steps of Newton's method would go round in circles for ever."""
    random = np.random.default_rng(0)
    x, labels = 3 * random.normal(size=(22, 2)), random.integers(0, 3, 22)
    head = LastLayer.fit(x, np.eye(3)[labels], 0.5, start=random.normal(size=(3, 3)))
    assert np.abs(head.wrong.T @ head.features + 0.5 * head.weights).max() < 1e-8


def test_counts_are_how_often_a_case_is_there():
    x, labels = clusters(30, 6)
    counts = np.arange(30) % 3
    counted = LastLayer.fit(x, np.eye(3)[labels], 2.0, counts=counts.astype(float))
    there = np.repeat(np.arange(30), counts)
    assert np.allclose(counted.weights, LastLayer.fit(x[there], np.eye(3)[labels[there]], 2.0).weights, atol=1e-8)


def test_of_many_features_only_components_count():
    """Features that three numbers decide, up to a shift and sizes of their own: three components are all there is."""
    random = np.random.default_rng(0)
    few, labels = random.normal(size=(60, 3)), np.arange(60) % 3
    features = few @ random.normal(size=(3, 8)) * 10.0 ** np.arange(8) + 5
    features = np.c_[features, np.full(60, 7.0)]
    scaled = Scaling.of(features, 9)(features)
    assert np.allclose(scaled[:, :8].std(0), 1) and np.allclose(scaled[:, 8], 0) and np.allclose(scaled.mean(0), 0)
    components = Scaling.of(features, 3)(features)
    assert components.shape == (60, 3)
    wholly, in_short = (LastLayer.fit(x, np.eye(3)[labels], 1.0) for x in (scaled, components))
    assert np.allclose(wholly.scores(scaled), in_short.scores(components), atol=1e-7)


def test_influences_are_what_learning_without_a_case_changes():
    (x, labels), (asked, _) = clusters(90, 2), clusters(6, 3)
    head = LastLayer.fit(x, np.eye(3)[labels], 5.0)

    def learn(keep: np.ndarray) -> np.ndarray:
        known = LogisticRegression(C=0.2, fit_intercept=False, tol=1e-10, max_iter=1000)
        known.fit(np.c_[x[keep], np.ones(keep.sum())], labels[keep])
        return known.decision_function(np.c_[asked, np.ones(6)])[:, 2]

    directions = np.array([head.asked(q, np.eye(3)[2]) for q in asked])
    influences = head.kept @ directions.T
    which, everything = range(0, 90, 5), np.ones(90, dtype=bool)
    found = data_attribution.left_out(influences, which, learn)
    assert found["pearson_lowest"] > 0.998 and found["spearman_lowest"] > 0.98
    # In size, too, which to first order, as is usual, they are not.
    changes = np.array([learn(everything) - learn(everything & (np.arange(90) != i)) for i in which])
    gradients = (head.wrong[:, :, None] * head.features[:, None]).reshape(90, -1)
    missed = [
        np.abs(one[which] - changes).mean() / np.abs(changes).mean() for one in (influences, gradients @ directions.T)
    ]
    assert missed[0] < 0.05 < 2 * missed[0] < missed[1]


def test_tracin_is_that_of_captum():
    generator = torch.Generator().manual_seed(0)
    # Captum's leaves the bias out.
    network = nn.Sequential(nn.Flatten(), nn.Linear(8, 3, bias=False))
    x, asked = torch.randn(12, 1, 2, 2, 2, generator=generator), torch.randn(4, 1, 2, 2, 2, generator=generator)
    labels, theirs = torch.arange(12) % 3, torch.tensor([0, 1, 2, 0])
    captum = TracInCPFast(
        network,
        network[1],
        TensorDataset(x, labels),
        ["here"],
        lambda *_: 1.0,
        nn.CrossEntropyLoss(reduction="sum"),
        12,
    )
    expected = captum.influence((asked, theirs)).detach().numpy()
    model = mx.Model(network, class_names=CLASSES, channels=1)
    gradients = TrainingGradients(model, 0)
    with model.ready():
        kept = gradients.kept(x, [CLASSES[k] for k in labels], Run())
        for q, label, row in zip(asked, theirs, expected, strict=True):

            def better(output: Tensor, label: Tensor = label) -> Tensor:
                return -cross_entropy(output, label)[None]

            found = kept[:, :-1] @ gradients.asked(q[None], better, Run())
            assert np.allclose(found, row, atol=1e-5)


def test_trak_is_its_formula():
    """Of a network that is a logistic regression all of it is known: the gradient of the log-odds is the features."""
    random = np.random.default_rng(0)
    features, q = random.normal(size=(30, 8)).astype(np.float32), random.normal(size=8).astype(np.float32)
    labels = np.arange(30) % 2
    network = nn.Sequential(nn.Flatten(), nn.Linear(8, 1))
    model = mx.Model(network, class_names=("ill",), channels=1)
    gradients = TrainingGradients(model, 0)
    with model.ready():
        x = torch.from_numpy(features).reshape(30, 1, 2, 2, 2)
        kept = gradients.kept(x, ["ill" if k else "not ill" for k in labels], Run())
        asked = gradients.asked(torch.from_numpy(q).reshape(1, 1, 2, 2, 2), lambda output: output[:, 0], Run())
    found = kept @ trak(kept, asked, 0.0)
    one = np.c_[features, np.ones(30)]
    odds = one @ np.append(network[1].weight.detach().numpy(), network[1].bias.detach().numpy())
    sign = np.where(labels, 1, -1)
    right = 1 / (1 + np.exp(-sign * odds))
    phi = sign[:, None] * one
    expected = (phi @ np.linalg.inv(phi.T @ phi) @ np.append(q, 1)) * (1 - right)
    assert np.allclose(found, expected, atol=1e-5)


def test_what_is_no_answer_teaches_nothing():
    model = mx.Model(nn.Sequential(nn.Flatten(), nn.Linear(8, 3)), class_names=CLASSES, channels=1)
    with model.ready():
        kept = TrainingGradients(model, 0).kept(torch.ones(3, 1, 2, 2, 2), ["", "benign", "cyst"], Run())
    assert not kept[0].any() and kept[1].any() and not kept[2].any()
    x, labels = torch.randn(19, 1, 2, 2, 2), [CLASSES[i % 3] for i in range(19)]
    together = SPACES["gradient"].embed(model, x, labels)
    for i in range(19):
        assert torch.allclose(
            together[i], SPACES["gradient"].embed(model, x[i : i + 1], labels[i : i + 1])[0], atol=1e-6
        )
    of_values = mx.Model(nn.Sequential(nn.Flatten(), nn.Linear(8, 1)), task="regression", channels=1)
    with of_values.ready():
        kept = TrainingGradients(of_values, 0).kept(torch.ones(4, 1, 2, 2, 2), ["", "nan", "inf", "2.5"], Run())
    assert not kept[:3].any() and kept[3].all()
    with pytest.raises(mx.MedXAIError, match="give labels"):
        SPACES["gradient"].embed(model, x)
    with pytest.raises(mx.MedXAIError, match="classification and regression"):
        TrainingGradients(mx.Model(nn.Conv3d(1, 2, 3), task="segmentation"))


def test_mislabelled_cases_are_found():
    x, labels = clusters(120, 4, apart=2.0)
    wrong = np.zeros(120, dtype=bool)
    wrong[np.random.default_rng(0).permutation(120)[:12]] = True
    given = np.where(wrong, (labels + 1) % 3, labels)
    scores = LastLayer.fit(x, np.eye(3)[given], 12.0).self_influence
    assert data_attribution.found_by(scores, wrong) == pytest.approx(roc_auc_score(wrong, scores))
    assert roc_auc_score(wrong, scores) > 0.9
    with pytest.raises(mx.MedXAIError, match="not all"):
        data_attribution.found_by(scores, np.ones(120, dtype=bool))


def test_datamodelling_score_of_a_linear_world_is_one():
    """What is said is the sum of what each case adds: then the influences are all there is."""
    random = np.random.default_rng(0)
    added = random.normal(size=(20, 3))
    parts = data_attribution.halves(20, 50)
    assert parts.shape == (50, 20) and (parts.sum(1) == 10).all() and len(np.unique(parts, axis=0)) == 50
    scores = data_attribution.datamodelling_scores(added, parts, np.exp(parts @ added))
    assert np.allclose(scores, 1)
    assert np.allclose(data_attribution.datamodelling_scores(-added, parts, parts @ added), -1)
    chance = data_attribution.datamodelling_scores(random.permutation(added), parts, parts @ added)
    assert (np.abs(chance) < 0.8).all()


def test_removal_takes_the_most_helpful_first():
    added = np.array([3.0, -1.0, 2.0, 0.5])

    def learn(keep: np.ndarray) -> np.ndarray:
        return np.array([0.0, float(added[keep].sum())])

    curve = data_attribution.removal_curve(added, (0, 0.25, 0.5, 0.75), learn, query=1)
    assert curve == pytest.approx([4.5, 1.5, -0.5, -1.0])


def test_shapley_values_of_neighbours_are_their_definition():
    random = np.random.default_rng(0)
    alike, same, k = random.normal(size=(7, 2)), random.random((7, 2)) < 0.5, 3
    found = data_attribution.neighbour_shapley(alike, same, k)

    def worth(members: tuple[int, ...], q: int) -> float:
        nearest = sorted(members, key=lambda i: -alike[i, q])[:k]
        return sum(bool(same[i, q]) for i in nearest) / k

    for q in range(2):
        for i in range(7):
            rest = [j for j in range(7) if j != i]
            expected = sum(
                (worth((*s, i), q) - worth(s, q)) / (7 * comb(6, size))
                for size in range(7)
                for s in combinations(rest, size)
            )
            assert found[i, q] == pytest.approx(expected)
    votes = data_attribution.neighbour_votes(np.array([[0.9], [0.4]]), np.array([[True], [False]]))
    assert votes.tolist() == [[0.9], [-0.4]]


class Small(nn.Module):
    """Looks at blocks of 2 x 2 x 2 voxels and takes the mean of what it finds there."""

    def __init__(self, outputs: int = 3, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.found = nn.Conv3d(1, 4, 2, stride=2)
        self.head = nn.Linear(4, outputs)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.head(self.found(x).relu().mean((2, 3, 4)))
        return answer


def small_model(outputs: int = 3, **known: Any) -> mx.Model:
    return mx.Model(Small(outputs), **{"class_names": CLASSES, "layers": ("found",), "channels": 1, **known})


def scans(count: int, seed: int) -> list[mx.Volume]:
    """Scans of three classes, on an oblique, anisotropic grid."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(3, 1, 4, 6, 6, generator=torch.Generator().manual_seed(7))
    noise = 0.6 * torch.randn(count, 1, 4, 6, 6, generator=generator)
    return [mx.Volume(noise[i] + patterns[i % 3], oblique_affine()) for i in range(count)]


def library_of(folder: Path, model: mx.Model, labels: Sequence[str]) -> Library:
    """A library of as many scans, in files, as there are labels; two of each patient."""
    vectors, records = {}, []
    for i, (volume, label) in enumerate(zip(scans(len(labels), 0), labels, strict=True)):
        spaces = ("plain", "gradient") if model.task in ("classification", "regression") else ("plain",)
        vectors = {name: SPACES[name].embed(model, volume.data[None], [label])[0].numpy() for name in spaces}
        with torch.no_grad():
            (says,) = said(model, model.forward(volume.data[None]))
        meta = {"size": float(i), "site": "left" if i % 2 else "right", SCAN: volume.fingerprint}
        known = {"label": label, "said": says, "meta": meta, "volume": f"{i:02d}.nrrd"}
        records.append(Record(f"case {i:02d}", f"patient {i // 2}", vectors=vectors, **known))
    metrics = {name: SPACES[name].metric for name in vectors}
    sizes = {name: (len(vector), metrics[name]) for name, vector in vectors.items()}
    library = Library.create(folder / "library", Embedder(fingerprint(model), "", "Small", sizes))
    for i, volume in enumerate(scans(len(labels), 0)):
        sitk.WriteImage(volume.to_sitk(), str(folder / "library" / f"{i:02d}.nrrd"))
    library.add(records)
    return library


LABELS = [CLASSES[i % 3] for i in range(36)]


def test_cases_without_a_label_do_not_count(tmp_path: Path, model: mx.Model) -> None:
    unknown = (3, 17)
    library = library_of(tmp_path, model, ["" if i in unknown else label for i, label in enumerate(LABELS)])
    fewer = [i for i in range(36) if i not in unknown]
    alone = teaching.Refit.of(known_features(model, scans(36, 0))[fewer], np.eye(3)[[i % 3 for i in fewer]])
    expected = alone.influences(known_features(model, scans(1, 5))[0], np.eye(3)[2])
    found = by_uid(ask(model, library, count=36))
    assert set(found) == {f"case {i:02d}" for i in fewer}
    for i, influence in zip(fewer, expected, strict=True):
        assert found[f"case {i:02d}"] == pytest.approx(influence, rel=1e-4, abs=1e-6)
    assert len(by_uid(ask(model, library, count=36, by="trak"))) == 34


@pytest.fixture
def model() -> mx.Model:
    return small_model()


@pytest.fixture
def library(tmp_path: Path, model: mx.Model) -> Library:
    return library_of(tmp_path, model, LABELS)


def ask(model: mx.Model, library: Library, target: Any = "malignant", **parameters: Any) -> mx.SimilarCases:
    (volume,) = parameters.pop("volume", scans(1, 5))
    found = mx.tell(model, volume, "influence", target, library=library.path, **parameters)
    assert isinstance(found, mx.SimilarCases)
    return found


def by_uid(found: mx.SimilarCases) -> dict[str, float]:
    return {case.uid: case.similarity for case in found.cases}


def known_features(model: mx.Model, volumes: Sequence[mx.Volume]) -> np.ndarray:
    with torch.no_grad():
        found = model.network.found(torch.stack([v.data for v in volumes])).flatten(2)
    return torch.cat([found.mean(2), found.amax(2)], 1).double().numpy()


def test_cases_are_those_without_which_the_score_changes(model: mx.Model, library: Library) -> None:
    cases, query = known_features(model, scans(36, 0)), known_features(model, scans(1, 5))
    middle, spread = cases.mean(0), cases.std(0)
    x, q, y = (cases - middle) / spread, (query - middle) / spread, np.arange(36) % 3

    def score(keep: np.ndarray) -> float:
        head = LogisticRegression(C=1 / (36 * 0.2), fit_intercept=False, tol=1e-10, max_iter=1000)
        head.fit(np.c_[x[keep], np.ones(keep.sum())], y[keep])
        return float(head.decision_function(np.c_[q, [1.0]])[0, 2])

    everything = np.ones(36, dtype=bool)
    changes = {f"case {i:02d}": score(everything) - score(everything & (np.arange(36) != i)) for i in range(36)}
    found = ask(model, library, damping=0.2, count=36)
    influences = by_uid(found)
    assert set(influences) == set(changes)
    pairs = np.array([[influences[uid], changes[uid]] for uid in changes])
    assert pearsonr(*pairs.T).statistic > 0.99
    assert np.abs(pairs[:, 0] - pairs[:, 1]).max() < 0.1 * np.abs(pairs[:, 1]).max()
    assert found.scored == "influence on the logit of malignant"
    signs = [(case.role, case.similarity > 0) for case in found.cases]
    assert set(signs) == {("helpful", True), ("harmful", False)}
    sizes = [[abs(c.similarity) for c in found.cases if c.role == role] for role in ("helpful", "harmful")]
    assert all(of == sorted(of, reverse=True) for of in sizes)
    first = found.cases[0]
    assert first.label == LABELS[int(first.uid[-2:])] and first.numbers["size"] == float(first.uid[-2:])
    assert first.volume is not None and first.volume.shape == (4, 6, 6)
    # What the cases of each class add, which the text sums up.
    total = sum(influences[f"case {i:02d}"] for i in range(2, 36, 3))
    assert f"12 malignant {total:+.2g}" in found.text
    assert "36 cases" in found.text and "learnt anew" in found.provenance.notes[0]


def test_the_lead_over_another_class_is_the_difference(model: mx.Model, library: Library) -> None:
    one, other, lead = (
        by_uid(ask(model, library, target, count=36))
        for target in ("malignant", "benign", mx.ClassTarget("malignant", versus="benign"))
    )
    for uid, influence in lead.items():
        assert influence == pytest.approx(one[uid] - other[uid], abs=1e-8)


@pytest.mark.parametrize("by", ["tracin", "trak"])
def test_gradients_at_checkpoints(model: mx.Model, library: Library, tmp_path: Path, by: str, monkeypatch: Any) -> None:
    monkeypatch.setenv("MEDXAI_HOME", str(tmp_path / "home"))
    networks = [Small(seed=3), Small(seed=4)]
    (tmp_path / "weights").mkdir()
    save_file(networks[0].state_dict(), tmp_path / "weights" / "1.safetensors")
    torch.save({"network": networks[1].state_dict()}, tmp_path / "weights" / "2.pt")
    asked = {"by": by, "checkpoints": str(tmp_path / "weights"), "length": 0, "count": 36, "damping": 0.01}
    found = by_uid(ask(model, library, **asked))
    expected = np.zeros(36)
    for network in networks:

        def flat(value: Tensor, network: nn.Module = network) -> np.ndarray:
            network.zero_grad()
            value.backward()
            return np.concatenate([p.grad.numpy().ravel() for p in network.parameters()]).astype(float)

        q = flat(network(scans(1, 5)[0].data[None])[0, 2])
        phi, left = [], []
        for volume, label in zip(scans(36, 0), LABELS, strict=True):
            p = network(volume.data[None]).softmax(1)[0, CLASSES.index(label)]
            left.append(1 - float(p.detach()))
            phi.append(flat((p / (1 - p)).log()))
        kernel = np.eye(len(q))
        if by == "trak":
            gram = np.array(phi).T @ np.array(phi)
            kernel = np.linalg.inv(gram + 0.01 * np.trace(gram) / len(gram) * np.eye(len(gram)))
        expected += np.array(phi) @ kernel @ q * np.array(left) / 2
    assert len(found) > 30
    if by == "tracin":
        expected /= np.abs(expected).sum()
    for uid, influence in found.items():
        assert influence == pytest.approx(expected[int(uid[-2:])], rel=1e-3, abs=1e-5 * np.abs(expected).max())
    # What was computed is there the next time, though no scan is.
    whole = {**asked, "length": 4}
    (Path(library.path) / "00.nrrd").rename(tmp_path / "away.nrrd")
    without = ask(model, library, **whole)
    assert "1 of 36 cases count for nothing" in " ".join(without.provenance.notes)
    (tmp_path / "away.nrrd").rename(Path(library.path) / "00.nrrd")
    assert "count for nothing" not in " ".join(ask(model, library, **whole).provenance.notes)
    assert by_uid(ask(model, library, **whole)) != by_uid(without)
    for i in range(36):
        (Path(library.path) / f"{i:02d}.nrrd").unlink()
    assert by_uid(ask(model, library, **asked)) == found
    with pytest.raises(mx.MedXAIError, match="None of the 36 cases"):
        ask(model, library, **{**asked, "length": 8})


def test_stored_gradients_are_searched(model: mx.Model, library: Library) -> None:
    everything = ask(model, library, by="trak", count=36)
    vectors = library.matrix("gradient")[1].astype(float)
    gradients = TrainingGradients(model)
    with model.ready():
        asked = gradients.asked(scans(1, 5)[0].data[None], lambda output: output[:, 2], Run())
    moves = vectors[:, :-1] / vectors[:, -1:]
    kernel = moves.T @ moves
    kernel += 10 * np.trace(kernel) / len(kernel) * np.eye(len(kernel))
    expected = vectors[:, :-1] @ np.linalg.solve(kernel, asked)
    for uid, influence in by_uid(everything).items():
        assert influence == pytest.approx(expected[int(uid[-2:])], rel=1e-3)
    some = ask(model, library, by="trak", count=2, where=("label=malignant|benign", "size=..20"), patient="patient 0")
    allowed = [i for i in range(36) if i % 3 and i <= 20 and i // 2 != 0]
    best = sorted(allowed, key=lambda i: -expected[i])
    assert [int(c.uid[-2:]) for c in some.cases if c.role == "helpful"] == best[:2]
    assert [int(c.uid[-2:]) for c in some.cases if c.role == "harmful"] == best[::-1][:2]


def test_filters_and_the_scan_itself(model: mx.Model, library: Library) -> None:
    asked = {"count": 36, "where": ("site=left",), "patient": "patient 3"}
    some, everything = by_uid(ask(model, library, **asked)), by_uid(ask(model, library, count=36))
    left = {f"case {i:02d}" for i in range(36) if i % 2 and i // 2 != 3}
    assert some == {uid: influence for uid, influence in everything.items() if uid in left}
    found = ask(model, library, volume=[scans(36, 0)[8]], count=36)
    assert "case 08" not in by_uid(found) and len(by_uid(found)) == 35
    assert any("in the library itself" in note for note in found.provenance.notes)


def test_computed_again_it_is_the_same(model: mx.Model, library: Library) -> None:
    found = ask(model, library)
    again = mx.recompute(found, model, scans(1, 5)[0])
    assert by_uid(again) == by_uid(found)
    version = library.version
    library.remove(["case 00"])
    assert by_uid(mx.recompute(found, model, scans(1, 5)[0])) == by_uid(found)
    assert found.provenance.parameters["version"] == version
    assert by_uid(ask(model, library)) != by_uid(found)


def test_a_value_is_explained_too(tmp_path: Path) -> None:
    model = small_model(1, task="regression", class_names=("size",))
    values = np.random.default_rng(0).normal(size=24).round(3)
    library = library_of(tmp_path, model, [str(v) for v in values])
    cases, query = known_features(model, scans(24, 0)), known_features(model, scans(1, 5))
    middle, spread = cases.mean(0), cases.std(0)
    x = np.c_[(cases - middle) / spread, np.ones(24)]
    q = np.append((query[0] - middle) / spread, 1.0)
    found = by_uid(ask(model, library, None, count=24))
    for uid, influence in found.items():
        keep = np.arange(24) != int(uid[-2:])
        whole, without = (
            q @ np.linalg.solve(x[k].T @ x[k] + 2.4 * np.eye(x.shape[1]), x[k].T @ values[k])
            for k in (np.ones(24, dtype=bool), keep)
        )
        assert influence == pytest.approx(whole - without, abs=1e-5)
    assert len(found) == 24


def test_a_binary_network_has_one_score(tmp_path: Path) -> None:
    model = small_model(1, class_names=("ill",))
    library = library_of(tmp_path, model, [("not ill", "ill")[i % 2] for i in range(24)])
    ill, well = (by_uid(ask(model, library, target, count=24)) for target in ("ill", "not ill"))
    assert len(ill) == 24
    assert all(well[uid] == pytest.approx(-influence, abs=1e-9) for uid, influence in ill.items())
    cases, query = known_features(model, scans(24, 0)), known_features(model, scans(1, 5))
    x, q = (np.c_[(one - cases.mean(0)) / cases.std(0), np.ones(len(one))] for one in (cases, query))
    # Two columns of weights share what the one of scikit-learn holds.
    odds = [
        LogisticRegression(C=2 / (24 * teaching.DAMPING), fit_intercept=False, tol=1e-10, max_iter=1000)
        .fit(x[keep], np.arange(24)[keep] % 2)
        .decision_function(q)[0]
        for keep in (np.arange(24) != 24, np.arange(24) != 3)
    ]
    assert ill["case 03"] == pytest.approx(odds[0] - odds[1], rel=0.2)


@pytest.mark.parametrize(
    ("labels", "asked", "error"),
    [
        ([""] * 6, {}, "fill the column 'label'"),
        (["cyst"] * 6, {}, r"could have learnt \(none, benign, malignant\)"),
        (LABELS, {"target": mx.ClassTarget("malignant", layer="head")}, "Use similar_cases"),
        (LABELS, {"checkpoints": "nowhere.pt", "by": "trak"}, "no weights at 'nowhere.pt'"),
    ],
)
def test_refused(tmp_path: Path, model: mx.Model, labels: list[str], asked: dict[str, Any], error: str) -> None:
    library = library_of(tmp_path, model, labels)
    with pytest.raises(mx.MedXAIError, match=error):
        ask(model, library, **asked)


def test_another_network_is_refused_and_pickles_are_not_opened(
    model: mx.Model, library: Library, tmp_path: Path
) -> None:
    with pytest.raises(mx.MedXAIError, match="another network"):
        ask(model.with_network(Small(seed=9)), library)
    torch.save({"network": Small()}, tmp_path / "pickled.pt")
    with pytest.raises(mx.MedXAIError, match="more than weights"):
        ask(model, library, by="tracin", checkpoints=str(tmp_path / "pickled.pt"))


def test_a_network_that_has_forgotten_is_asked_about_a_few(model: mx.Model, library: Library) -> None:
    found = ask(model, library)
    finding = telling.judge(found, model, scans(1, 5)[0])
    assert 0 <= finding.values["likeness"] <= 1
    among = ask(model, library, among=("case 01", "case 02", "case 03"), count=9)
    assert set(by_uid(among)) == {"case 01", "case 02", "case 03"}


def test_suspects_of_a_library(tmp_path: Path, model: mx.Model) -> None:
    labels = list(LABELS)
    wrong = {4: "none", 17: "benign", 30: "malignant"}
    for i, label in wrong.items():
        labels[i] = label
    labels[0] = ""
    library = library_of(tmp_path, model, labels)
    found = teaching.suspects(library)
    assert len(found) == 35
    scores = {int(record.uid[-2:]): score for record, score in found}
    assert list(scores.values()) == sorted(scores.values(), reverse=True)
    there = np.array([i in wrong for i in scores])
    assert roc_auc_score(there, list(scores.values())) > 0.9
    typed = CliRunner().invoke(cli.app, ["cases", "suspects", library.path, "-k", "2"])
    shown = [f"case {i:02d}" for i in range(36) if f"case {i:02d}" in typed.output]
    assert typed.exit_code == 0 and shown == sorted(record.uid for record, _ in found[:2])
    with pytest.raises(mx.MedXAIError, match="two labels"):
        teaching.suspects(library_of(tmp_path / "one", model, ["none"] * 3))


def test_groups_are_means_over_label_and_attribute() -> None:
    left, right = {"site": "left", SCAN: "x"}, {"site": "right"}
    meta = [{"size": 1.0, **left}, {"size": 2.0}, {"size": 3.0, **right}, {"size": 9.0, **left}]
    records = [Record(str(i), "p", "ab"[i % 2], meta=one) for i, one in enumerate(meta)]
    found = teaching.influence_by_group(records, np.array([[1.0, 3.0], [5.0, 5.0], [-2.0, 0.0], [4.0, 8.0]]))
    told = {(g.label, g.what): (g.count, g.mean, g.sum) for g in found}
    assert told == {
        ("a", ""): (2, 0.5, 1.0),
        ("b", ""): (2, 5.5, 11.0),
        ("a", "size <= 2.5"): (1, 2.0, 2.0),
        ("b", "size <= 2.5"): (1, 5.0, 5.0),
        ("a", "size > 2.5"): (1, -1.0, -1.0),
        ("b", "size > 2.5"): (1, 6.0, 6.0),
        ("a", "site = left"): (1, 2.0, 2.0),
        ("a", "site = right"): (1, -1.0, -1.0),
        ("b", "site = left"): (1, 6.0, 6.0),
    }
    assert {g.what for g in teaching.influence_by_group(records, np.zeros(4), ("size",))} == {
        "",
        "size <= 2.5",
        "size > 2.5",
    }
