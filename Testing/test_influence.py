"""Influences against learning again, closed forms, scikit-learn and captum."""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np
import pytest
import torch
from captum.influence import TracInCPFast
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import MedXAILib as mx
from MedXAILib.engines.last_layer import LastLayer
from MedXAILib.engines.per_sample_gradients import per_sample_gradients
from MedXAILib.engines.projection import projected
from MedXAILib.engines.training_gradients import TrainingGradients, trak
from MedXAILib.run import Run
from MedXAILib.trust import data_attribution

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
    vectors = torch.randn(2, 3000, generator=torch.Generator().manual_seed(0))
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
