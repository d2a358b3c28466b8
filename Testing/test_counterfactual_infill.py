"""What if a region were replaced: against doing it by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import make_model, oblique_affine
from gaussian_fields import noise, smooth
from monai.transforms import Compose, Spacing
from torch import Tensor, nn

import MedXAILib as mx
from MedXAILib import registry
from MedXAILib.grid import transform
from MedXAILib.visual.counterfactual_infill import CounterfactualInfill
from MedXAILib.what_if import what_if

SIZE = (12, 16, 14)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.EXPLAINERS, "counterfactual_infill", CounterfactualInfill)


class Bright(nn.Module):
    """The scores of two classes: the second's is how bright the scan is."""

    def forward(self, x: Tensor) -> Tensor:
        bright = x.flatten(1).mean(1) * 20
        return torch.stack([torch.zeros_like(bright), bright], 1)


def explain(model: mx.Model, scan: mx.Volume | Tensor, within: object, **more: object) -> mx.SaliencyMap:
    return mx.explain(model, scan, "counterfactual_infill", **{"target": 1, **more}, within=within)


@pytest.fixture
def scan() -> mx.Volume:
    return mx.Volume(smooth(1, *SIZE), oblique_affine())


@pytest.fixture
def model() -> mx.Model:
    return mx.Model(Bright(), class_names=("benign", "malignant"))


def ball(scan: mx.Volume, radius: float = 5.0) -> Tensor:
    """Which voxels lie around the middle of a scan, (*spatial)."""
    index = np.stack(np.meshgrid(*map(np.arange, scan.shape), indexing="ij"), -1)
    points = transform(scan.affine, index)
    middle = transform(scan.affine, np.array(scan.shape) / 2)
    return torch.from_numpy(np.linalg.norm(points - middle, axis=-1) < radius)


def by_hand(scan: mx.Volume, there: Tensor, value: float) -> float:
    """What is lost of the score when voxels have another value."""
    network = Bright()
    return float(network(scan.data[None])[0, 1] - network(torch.where(there, value, scan.data)[None])[0, 1])


def test_the_region_gets_what_is_lost_without_it(scan: mx.Volume, model: mx.Model) -> None:
    there = ball(scan)
    mask = mx.Volume(there[None].float() * 3, scan.affine)
    made = explain(model, scan, mask, infill="mean")
    lost = by_hand(scan, there, float(scan.data.mean()))
    assert 50 < int(there.sum()) < there.numel() / 4 and abs(lost) > 1e-3
    expected = torch.where(there, lost, 0.0)[None]
    torch.testing.assert_close(made.data, expected, rtol=1e-3, atol=1e-6)
    assert made.interval is None and made.signed
    again = explain(model, scan, mx.Volume(mask.data.flip(1), scan.affine @ flip(scan, 0)), infill="mean")
    torch.testing.assert_close(again.data, made.data)


def flip(scan: mx.Volume, axis: int) -> np.ndarray:
    matrix = np.eye(4)
    matrix[axis, axis], matrix[axis, 3] = -1, scan.shape[axis] - 1
    return matrix


def test_a_box_is_one_in_the_scanner(scan: mx.Volume, model: mx.Model) -> None:
    points = transform(scan.affine, np.stack(np.meshgrid(*map(np.arange, SIZE), indexing="ij"), -1))
    middle = points.mean((0, 1, 2))
    low, high = middle - [4, 6, 5], middle + np.array([5, 3, 6])
    there = torch.from_numpy(((points >= low) & (points <= high)).all(-1))
    assert there.sum() > 20
    expected = torch.where(there, by_hand(scan, there, 0.0), 0.0)[None]
    corners = tuple(low), tuple(high)
    for box in (corners, corners[::-1], np.array(corners), ",".join(map(str, [*low, *high]))):
        made = explain(model, scan, box, infill="zero")
        torch.testing.assert_close(made.data, expected, rtol=1e-3, atol=1e-6)
    # As it is stored, it can be asked again.
    assert json.loads(json.dumps(made.provenance.parameters))["within"] == [list(low), list(high)]
    torch.testing.assert_close(mx.recompute(made, model, scan).data, made.data)


def test_a_mask_is_brought_to_what_the_network_sees(scan: mx.Volume, tmp_path: Path) -> None:
    model = mx.Model(Bright(), preprocessing=Compose([Spacing((1.5, 1.5, 1.5))]))
    there = ball(scan, 6.0)
    path = tmp_path / "mask.nrrd"
    sitk.WriteImage(mx.Volume(there[None].float(), scan.affine).to_sitk(), str(path))
    made = explain(model, scan, path, infill="minimum")
    assert made.provenance.parameters["within"] == str(path)
    # On the scan's own grid it is the mask again, but for its rim.
    found = made.data[0] != 0
    assert float((found & there).sum() / (found | there).sum()) > 0.6
    assert float(made.data[0][ball(scan, 4.0)].std()) < 1e-6
    seen = model.prepare(scan)
    lost = Bright()(seen.x[None])[0, 1] - Bright()(what_if(model, scan, path, infill="minimum").data[None])[0, 1]
    assert float(made.data.max()) == pytest.approx(float(lost), rel=1e-4)


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_it_says_in_words_what_would_be(scan: mx.Volume, task: str) -> None:
    bright = mx.Volume(scan.data - scan.data.mean() + 2 * ball(scan), scan.affine)
    model = mx.Model(Bright(), task=task, class_names=("benign", "malignant"))
    made = explain(model, bright, mx.Volume(ball(scan)[None].float(), scan.affine), infill="inpaint")
    notes = [n for n in made.provenance.notes if "replaced" in n]
    after = Bright()(what_if(model, bright, mx.Volume(ball(scan)[None].float(), scan.affine)).data[None])
    before = Bright()(bright.data[None])
    if task == "classification":
        was, now = (f"{float(y.softmax(1)[0, 1]):.2f}" for y in (before, after))
    else:
        was, now = (f"{float(y[0, 1]):.3g}" for y in (before, after))
    assert notes == [f"malignant: {was} → {now} with this region replaced."]
    torch.testing.assert_close(made.data.max(), (before - after)[0, 1], rtol=1e-4, atol=1e-5)


def test_a_random_infill_is_drawn_several_times(scan: mx.Volume, model: mx.Model) -> None:
    there = ball(scan)
    mask = mx.Volume(there[None].float(), scan.affine)
    made = explain(model, scan, mask, infill="noise", samples=40)
    # What noise has on average is the scan's mean.
    lost = by_hand(scan, there, float(scan.data.mean()))
    value, half = float(made.data[0][there][0]), float(made.interval[0][there][0])
    assert abs(value - lost) < 2 * half < 1
    # Normal noise of 40 draws: the interval that Student's distribution gives.
    spread = float(scan.data.std()) * 20 / scan.data.numel() * int(there.sum()) ** 0.5
    assert half == pytest.approx(2.0227 * spread / 40**0.5, rel=0.4)
    assert (made.interval[0][~there] == 0).all()
    assert any("(the mean of 40 draws)" in note for note in made.provenance.notes)
    assert made.provenance.forwards <= 45
    torch.testing.assert_close(explain(model, scan, mask, infill="noise", samples=40).data, made.data)


def test_the_region_can_be_grown(scan: mx.Volume, model: mx.Model) -> None:
    there = ball(scan)
    mask = mx.Volume(there[None].float(), scan.affine)
    # Two millimetres along axes whose voxels are 2.5, 0.8 and 1.1 mm apart.
    steps = np.stack(np.meshgrid([0], range(-2, 3), range(-1, 2), indexing="ij"), -1).reshape(-1, 1, 3)
    near = (np.argwhere(there.numpy()) + steps).reshape(-1, 3)
    grown = torch.zeros(SIZE, dtype=torch.bool)
    grown[tuple(near[((near >= 0) & (near < SIZE)).all(1)].T)] = True
    made = explain(model, scan, mask, infill="zero", margin=2.0)
    assert 1.5 * int(there.sum()) < int(grown.sum())
    torch.testing.assert_close(
        made.data, torch.where(grown, by_hand(scan, grown, 0.0), 0.0)[None], rtol=1e-3, atol=1e-6
    )
    found = what_if(model, scan, mask, infill="zero", margin=2.0)
    assert torch.equal(found.data[0] != scan.data[0], grown)


def test_several_targets(scan: mx.Volume, model: mx.Model) -> None:
    mask = mx.Volume(ball(scan)[None].float(), scan.affine)
    targets = ["malignant", mx.ClassTarget("malignant", versus="benign"), "benign"]
    made = explain(model, scan, mask, target=targets, infill="zero")
    torch.testing.assert_close(made[0].data, made[1].data)
    assert made[2].data.abs().max() == 0
    assert len([n for n in made[0].provenance.notes if "→" in n]) == 3


def test_of_a_batch_each_is_asked(scan: mx.Volume) -> None:
    model = make_model("resnet18")
    x = noise(2, 1, 24, 24, 16)
    box = ((5, 6, 3), (12, 15, 9))
    both = explain(model, x, box)
    for one, of_batch in zip(x, both.data, strict=True):
        torch.testing.assert_close(of_batch, explain(model, one, box).data, rtol=1e-3, atol=1e-5)


def test_what_is_there_instead_can_be_had(scan: mx.Volume, model: mx.Model) -> None:
    there = ball(scan)
    mask = mx.Volume(there[None].float(), scan.affine)
    made = what_if(model, scan, mask, infill="mean")
    torch.testing.assert_close(made.data, torch.where(there, scan.data.mean(), scan.data))
    assert torch.equal(made.data[0][~there], scan.data[0][~there])
    np.testing.assert_allclose(made.affine, scan.affine)
    with pytest.raises(mx.MedXAIError, match="infill"):
        what_if(model, scan, mask, infill="maen")


def test_no_place_or_none_in_the_scan_is_refused(scan: mx.Volume, model: mx.Model) -> None:
    empty = mx.Volume(torch.zeros(1, *SIZE), scan.affine)
    with pytest.raises(mx.MedXAIError, match="Say what to replace: within="):
        explain(model, scan, "")
    for nowhere in (empty, ((900, 900, 900), (910, 910, 910))):
        with pytest.raises(mx.MedXAIError, match="There is nothing to replace"):
            explain(model, scan, nowhere)
    with pytest.raises(mx.MedXAIError, match="2 axes and the scan 3"):
        explain(model, scan, ((0, 0), (5, 5)))
    for wrong in ("no/mask.nrrd", 5, ((0, 0, 0), (1, 1)), ((0, 0, 0), (1, 1, float("nan"))), "1,2,3"):
        with pytest.raises(mx.MedXAIError, match=r"within = .* is not possible: .*a place is the file of a mask"):
            explain(model, scan, wrong)


def test_a_form_can_be_made_of_it() -> None:
    assert CounterfactualInfill().within == ""
    assert CounterfactualInfill.model_json_schema()["properties"]["within"]["format"] == "region"
    kept = CounterfactualInfill(within=mx.Volume(torch.ones(1, 2, 2, 2), np.eye(4))).model_dump(mode="json")
    assert kept["within"].startswith("volume ")
