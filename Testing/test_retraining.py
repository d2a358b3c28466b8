"""Other trainings of a network: how far its maps are theirs, too."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import MedXAILib as mx
from MedXAILib.synthetic.lung_nodules import Backgrounds, synthesise
from MedXAILib.training.lung_nodule_permuted import permuted
from MedXAILib.trust import retraining
from MedXAILib.trust.judged import Judged

SHAPE = (3, 4, 5)


class Linear(nn.Module):
    """Two classes, of which the second weighs every voxel by `weight`."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        score = (x[:, 0] * self.weight).flatten(1).sum(1)
        return torch.stack([torch.zeros_like(score), score], 1)


def judged(weight: Tensor, **others: Any) -> Judged:
    model = mx.Model(Linear(weight), class_names=("none", "some"), channels=1, **others)
    affine = np.array([[0.0, 0.1, 2.0, 5.0], [0.3, 1.0, 0.0, -7.0], [4.0, 0.0, -0.2, 1.0], [0.0, 0.0, 0.0, 1.0]])
    volume = mx.Volume(torch.rand(1, *SHAPE), affine)
    return Judged(mx.explain(model, volume, "gradient", "some"), model, volume)


def weights(count: int) -> list[Tensor]:
    return [torch.randn(SHAPE, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def correlation(one: Tensor, other: Tensor) -> float:
    return float(np.corrcoef(one.flatten().numpy(), other.flatten().numpy())[0, 1])


def test_repeatability_of_linear_networks_is_the_correlation_of_their_weights() -> None:
    """The gradient of a linear network is its weights."""
    own, noise, _ = weights(3)
    near, far = own + 0.3 * noise, 4 * noise - own
    found = retraining.repeatability(judged(own, retrained=[lambda: Linear(near), lambda: Linear(far)]))
    expected = [correlation(own, near), correlation(own, far)]
    assert found.values["likeness"] == pytest.approx(np.mean(expected), abs=1e-6)
    assert found.values["highest"] == pytest.approx(max(expected), abs=1e-6)
    assert 0.4 < found.values["likeness"] < 0.7 and found.light == "fair" and "2 other trainings" in found.sentence


@pytest.mark.parametrize(("sign", "repeated", "taught"), [(1.0, "good", "poor"), (-1.0, "poor", "poor")])
def test_sign_counts_between_trainings_and_not_for_permuted_labels(sign: float, repeated: str, taught: str) -> None:
    (own,) = weights(1)
    of = judged(own, retrained=[lambda: Linear(sign * own)], permuted=lambda: Linear(sign * own))
    assert retraining.repeatability(of).light == repeated
    assert retraining.permuted(of).light == taught


def test_a_network_taught_something_else_has_another_map() -> None:
    own, other = weights(2)
    found = retraining.permuted(judged(own, permuted=lambda: Linear(other)))
    assert found.light == "good"
    assert found.values["likeness"] == pytest.approx(abs(correlation(own, other)), abs=1e-6)


def test_who_knows_of_no_other_training_is_told_so() -> None:
    (own,) = weights(1)
    for check in (retraining.repeatability, retraining.permuted):
        with pytest.raises(mx.MedXAIError, match=r"Linear is known: name its bundle"):
            check(judged(own))
        assert check(judged(torch.ones(SHAPE))).light is None


def test_permuted_labels_are_of_the_same_patches_and_of_nobody() -> None:
    """The pictures are those that were synthesised; their labels and attributes moved together, and are always the
    same, so that they can be learnt by heart, and by heart only."""
    backgrounds = Backgrounds.training()
    found, again = (permuted(backgrounds, 60, seed) for seed in (20, 1_000_000))
    assert all(
        torch.equal(getattr(found, f.name).nan_to_num(-9), getattr(again, f.name).nan_to_num(-9)) for f in fields(found)
    )
    true = synthesise(backgrounds, 30, 7)
    assert torch.equal(found.images[:30], true.images)
    assert torch.equal(found.labels[:30].bincount(), true.labels.bincount())
    assert 0.15 < float((found.labels[:30] == true.labels).float().mean()) < 0.6
    assert torch.equal(found.labels > 0, found.attributes[:, 0].isfinite())
