"""Measures of retrieval, against what was reckoned by hand, scikit-learn, and what theory says of chance."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, ndcg_score
from torch import Tensor, nn

import MedXAILib as mx
from MedXAILib.cases.space import Space
from MedXAILib.cases.spaces import SPACES
from MedXAILib.trust import retrieval

FOUND = np.array([1, 0, 1, 0, 0, 1.0])
"""The order of the worked example: three relevant of six, at ranks 1, 3 and 6."""


def of(*relevance: float, k: int = 4) -> dict[str, float]:
    return {name: float(v[0]) for name, v in retrieval.measured([np.array(relevance, float)], k).items()}


def test_the_worked_example() -> None:
    """By hand: two of the first four; of three relevant two are found; (1/1 + 2/3 + 3/6) / 3; the first
    at rank 1; (1 + 1/2) / (1 + 1/log2(3) + 1/2)."""
    found = of(*FOUND)
    assert found == pytest.approx(
        {
            "P@4": 2 / 4,
            "recall@4": 2 / 3,
            "R-precision": 2 / 3,
            "mAP": (1 + 2 / 3 + 3 / 6) / 3,
            "MRR": 1.0,
            "nDCG@4": 1.5 / (1.5 + 1 / np.log2(3)),
        }
    )


def test_the_first_relevant_of_a_poor_search_is_late() -> None:
    found = of(0, 0, 0, 1)
    assert found["MRR"] == found["mAP"] == 1 / 4 and found["R-precision"] == 0
    assert found["nDCG@4"] == pytest.approx(1 / np.log2(5))


def test_fewer_cases_than_asked_for_are_not_good_for_that() -> None:
    assert of(1, 1, k=4)["P@4"] == 0.5 and of(1, 1, k=4)["nDCG@4"] == 1


def test_nothing_relevant_says_nothing() -> None:
    assert all(np.isnan(value) for value in of(0, 0, 0).values())


def test_graded_relevance_counts_by_degree_and_binary_from_the_least() -> None:
    found = retrieval.measured([np.array([1.0, 3, 0, 2])], 2, least=2)
    assert found["P@2"][0] == 0.5 and found["MRR"][0] == 0.5
    assert found["nDCG@2"][0] == pytest.approx((1 + 3 / np.log2(3)) / (3 + 2 / np.log2(3)))


@pytest.mark.parametrize("k", [1, 5, 10, 40])
def test_as_scikit_learn(k: int) -> None:
    random = np.random.default_rng(3)
    similarity, relevance = random.normal(size=(20, 40)), random.integers(0, 4, (20, 40)).astype(float)
    found = retrieval.measured(retrieval.ranking(similarity, relevance), k)
    rows = list(zip(relevance, similarity, strict=True))
    np.testing.assert_allclose(found[f"nDCG@{k}"], [ndcg_score([r], [s], k=k) for r, s in rows], rtol=1e-12)
    np.testing.assert_allclose(found["mAP"], [average_precision_score(r >= 1, s) for r, s in rows], rtol=1e-12)


def test_the_same_patient_is_not_found() -> None:
    """Without it the two relevant of the others are second and third of three."""
    similarity = np.array([[0.9, 0.8, 0.7, 0.1, 0.6]])
    relevance = np.array([[1, 0, 1, 2, 1]])
    excluded = np.array([[True, False, False, False, True]])
    (row,) = retrieval.ranking(similarity, relevance, excluded)
    assert row.tolist() == [0, 1, 2]
    found = retrieval.measured([row], 2)
    assert found["recall@2"][0] == 0.5 and found["MRR"][0] == 0.5


def test_equal_similarities_keep_the_order_of_the_cases() -> None:
    (row,) = retrieval.ranking(np.zeros((1, 30)), np.arange(30.0)[None])
    assert row.tolist() == list(range(30))


@pytest.mark.parametrize(
    ("similarity", "relevance"),
    [
        (np.zeros((2, 3)), np.zeros((2, 4))),
        (np.full((1, 2), np.nan), np.ones((1, 2))),
        (np.ones((1, 2)), -np.ones((1, 2))),
    ],
)
def test_what_cannot_be_is_refused(similarity: np.ndarray, relevance: np.ndarray) -> None:
    with pytest.raises(mx.MedXAIError):
        retrieval.ranking(similarity, relevance)


def test_interval_is_that_of_the_mean() -> None:
    """Of many independent values it is the mean and 1.96 standard errors; NaN has no part in it."""
    values = np.random.default_rng(0).normal(5, 2, 4000)
    mean, low, high = retrieval.interval(np.append(values, np.nan))
    error = values.std() / np.sqrt(len(values))
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.15 * error)


def test_interval_over_patients_is_as_wide_as_if_each_had_been_asked_once() -> None:
    once = np.random.default_rng(1).normal(size=50)
    _, low, high = retrieval.interval(once)
    _, low_of_many, high_of_many = retrieval.interval(np.repeat(once, 9), np.repeat([f"{i:02d}" for i in range(50)], 9))
    assert (low_of_many, high_of_many) == pytest.approx((low, high))


def test_strata_are_means_of_their_own() -> None:
    values = {"P@1": np.array([1.0, 0, 1, np.nan])}
    assert retrieval.stratified(values, ["a", "b", "a", "b"]) == {"a": {"P@1": 1.0}, "b": {"P@1": 0.0}}


def test_share_that_both_have() -> None:
    first, second = np.array([[1, 2, 3], [1, 2, 3], [1, 2, 3]]), np.array([[3, 2, 1], [1, 4, 5], [7, 8, 9]])
    assert retrieval.same(first, second).tolist() == [1, 1 / 5, 0]


class Voxels(Space):
    name: ClassVar[str] = "voxels"
    title: ClassVar[str] = "Voxels"

    def embed(self, model: mx.Model, x: Tensor, labels: object = None) -> Tensor:
        return x.flatten(1)


def test_what_moves_with_the_scan_is_found_out_and_what_does_not_stays() -> None:
    """The mean along an axis stays when the scan moves round along it; its voxels are others then, of which the nearest
    are drawn anew: ten of 200 by chance, that is 1 / 39 of both sets."""
    model = mx.Model(nn.AdaptiveAvgPool3d((4, 5, 1)), task="embedding", channels=1)
    random = torch.Generator().manual_seed(7)
    x = torch.randn(40, 1, 4, 5, 30, generator=random)
    voxels, means = (torch.randn(200, size, generator=random).numpy() for size in (600, 20))
    found = retrieval.consistency(Voxels(), model, x, voxels)
    assert found["noise"].mean() > 0.9 and found["shift"].mean() == pytest.approx(1 / 39, abs=0.02)
    assert retrieval.consistency(SPACES["plain"], model, x, means)["shift"].min() == 1


def test_similarity_is_of_the_metric() -> None:
    one, other = np.array([[3.0, 4.0]]), np.array([[8.0, 6.0], [0.0, 0.0]])
    assert Voxels().similarity(one, other).tolist() == [[0.96, 0.0]]

    class Dot(Voxels):
        metric = "dot"

    assert Dot().similarity(one, other).tolist() == [[48.0, 0.0]]
