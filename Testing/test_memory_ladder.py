"""What is given up when memory runs out, in which order, and that the result says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_model, oblique_affine
from torch import Tensor, nn

import MedXAILib as mx
from MedXAILib.memory_ladder import within_memory

AFFINE = np.array([[0.0, 0, -1, 40], [0, 1.5, 0, -20], [2.0, 0, 0, 100], [0, 0, 0, 1]])
VOLUME = mx.Volume(torch.randn(1, 32, 24, 40, generator=torch.Generator().manual_seed(1)), AFFINE)


class Hungry(nn.Module):
    """A network on a device that is too small for what `too_much` says."""

    def __init__(self, network: nn.Module, too_much: Callable[[Tensor, Tensor], bool]) -> None:
        super().__init__()
        self.network, self.too_much = network, too_much

    def forward(self, x: Tensor) -> Tensor:
        first = next(m for m in self.network.modules() if isinstance(m, nn.Conv3d))
        if self.too_much(x, first(x)):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return self.network(x)


def recorded(x: Tensor) -> bool:
    """Whether a forward keeps what a backward needs."""
    return torch.is_grad_enabled() and x.requires_grad


def model(too_much: Callable[[Tensor, Tensor], bool], name: str = "resnet18", **known: Any) -> mx.Model:
    inside = make_model(name)
    return mx.Model(Hungry(inside.network, too_much), inside.task, inside.class_names, **known)


def climbed(model: mx.Model, region: Any = None, run: mx.Run | None = None, **allowed: bool) -> mx.SaliencyMap:
    run = run or mx.Run()
    return within_memory(
        lambda region, run: mx.explain(model, VOLUME, "gradient", target=["malignant"], region=region, run=run),
        model,
        VOLUME,
        region,
        run,
        **allowed,
    )[0]


def test_nothing_is_given_up_without_need() -> None:
    enough = model(lambda x, y: False)
    found = climbed(enough, allow_smaller_region=True, allow_cpu=True)
    expected = mx.explain(enough, VOLUME, "gradient", target="malignant")
    assert torch.equal(found.data, expected.data) and not found.provenance.notes
    assert "precision" not in found.provenance.model


def test_a_lower_precision_comes_first_and_can_be_recomputed() -> None:
    half = model(lambda x, y: recorded(x) and y.dtype == torch.float32)
    steps: list[str] = []
    found = climbed(half, run=mx.Run(progress=lambda p: steps.append(p.message)), allow_smaller_region=True)
    exact = mx.explain(make_model("resnet18"), VOLUME, "gradient", target="malignant")
    assert "Out of memory; going on in bfloat16" in steps
    first, second = found.provenance.notes
    assert first.startswith("The network computed in bfloat16: bfloat16 changes what is explained by 0.")
    assert second == "Out of memory on cpu."
    assert found.provenance.region is None and found.provenance.model["precision"] == "bfloat16"
    # Nearly the same map, and its arithmetic outside of the network is that of any other.
    alike = torch.nn.functional.cosine_similarity(found.data.flatten(), exact.data.flatten(), 0)
    assert found.data.dtype == torch.float32 and 0.98 < alike < 1
    again = mx.recompute(found, half, VOLUME)
    assert torch.equal(again.data, found.data) and again.provenance.model == found.provenance.model


METHODS = [
    "smoothgrad",
    "integrated_gradients",
    "gradcam",
    "gradcam_plus_plus",
    "hirescam",
    "layercam",
    "scorecam",
]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_works_in_a_lower_precision(method: str, precision: Any) -> None:
    known = {"layers": ("layer4",)} if mx.methods()[method].layered else {}
    network = make_model("resnet18")
    exact = mx.explain(network, VOLUME, method, target="malignant", **known).data
    found = mx.explain(network, VOLUME, method, target="malignant", run=mx.Run(precision=precision), **known).data
    assert torch.nn.functional.cosine_similarity(found.flatten(), exact.flatten(), 0) > 0.95
    scale = float(found.norm() / exact.norm())
    assert scale == pytest.approx(1, abs=0.1)


def test_tiny_gradients_survive_float16() -> None:
    class Faint(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv3d(1, 2, 1), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).mean((2, 3, 4)))

    torch.manual_seed(0)
    faint = mx.Model(Faint())
    big = torch.randn(1, 64, 64, 64, generator=torch.Generator().manual_seed(1))
    exact = mx.explain(faint, big, "gradient", target=0).data
    found = mx.explain(faint, big, "gradient", target=0, run=mx.Run(precision="float16")).data
    # Without scaling they would be a few of the smallest numbers there are.
    assert exact.abs().max() < 1e-5
    torch.testing.assert_close(found, exact, rtol=2e-2, atol=0)


class Rounding(nn.Module):
    """Says another thing in a lower precision."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv3d(1, 2, 1), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(y.mean((2, 3, 4)).float()) * (1 if y.dtype == torch.float32 else 1.1)


def test_a_lower_precision_in_which_the_network_says_something_else_is_not_used() -> None:
    torch.manual_seed(0)
    with pytest.raises(mx.MedXAIError, match=r"^bfloat16 changes what is explained by .* more than 2%: leave the"):
        mx.explain(mx.Model(Rounding()), VOLUME, "gradient", target=1, run=mx.Run(precision="bfloat16"))
    small = mx.Model(Hungry(Rounding(), lambda x, y: recorded(x) and y.dtype == torch.float32 and x.numel() > 20_000))
    small.class_names = ("none", "benign", "malignant")
    found = climbed(small, allow_smaller_region=True)
    assert "precision" not in found.provenance.model
    assert found.provenance.notes[1].startswith("Not computed in bfloat16: bfloat16 changes what is explained by")


def test_where_the_exact_answer_does_not_fit_there_is_nothing_to_compare_with() -> None:
    never = model(lambda x, y: y.dtype == torch.float32)
    with pytest.raises(mx.OutOfMemory):
        climbed(never)


BOX = ((40.0, -20.0, 90.0), (0.0, 14.0, 160.0))


def test_a_smaller_region_needs_consent_and_is_said() -> None:
    little = model(lambda x, y: recorded(x) and x.numel() > 32 * 24 * 40 // 6)
    with pytest.raises(mx.OutOfMemory, match="allow a smaller region, use a method that needs less"):
        climbed(little)
    found = climbed(little, allow_smaller_region=True)
    # The middle half along each axis: R from 0.5 to 40.5, A from -20.75 to 15.25, S from 99 to 163.
    expected = np.array([[10.5, -11.75, 115.0], [30.5, 6.25, 147.0]])
    np.testing.assert_allclose(found.provenance.region, expected)
    assert found.provenance.notes[-1] == (
        "Only (10.5, -11.8, 115.0) to (30.5, 6.2, 147.0) (RAS mm) was explained, and the rest was not looked at."
    )
    outside = torch.ones(VOLUME.data.shape, dtype=torch.bool)
    outside[:, 8:24, 6:18, 10:30] = False
    assert not found.data[outside].any() and (found.data[~outside] != 0).float().mean() > 0.9
    assert torch.equal(mx.recompute(found, little, VOLUME).data, found.data)
    part = climbed(little, BOX, allow_smaller_region=True).provenance.region
    np.testing.assert_allclose(part, [[10, -11.5, 107.5], [30, 5.5, 142.5]])


def test_half_of_half_is_the_least() -> None:
    quarter = model(lambda x, y: recorded(x) and x.numel() > 32 * 24 * 40 // 64)
    found = climbed(quarter, allow_smaller_region=True)
    assert np.ptp(found.provenance.region, axis=0) == pytest.approx([10, 9, 16])
    assert len([n for n in found.provenance.notes if n == "Out of memory with a smaller region."]) == 1
    with pytest.raises(mx.OutOfMemory):
        climbed(model(lambda x, y: recorded(x)), allow_smaller_region=True)


def test_of_a_tilted_scan_a_smaller_region_is_smaller_too() -> None:
    sizes: list[tuple[int, ...]] = []

    def too_much(x: Tensor, _y: Tensor) -> bool:
        sizes.append(tuple(x.shape[2:]))
        return recorded(x)

    tilted = mx.Volume(VOLUME.data, oblique_affine())
    watching = model(too_much)
    with pytest.raises(mx.OutOfMemory):
        within_memory(
            lambda region, run: [mx.explain(watching, tilted, "gradient", target=1, region=region, run=run)],
            watching,
            tilted,
            None,
            mx.Run(),
            allow_smaller_region=True,
        )
    whole, half, quarter = dict.fromkeys(sizes)
    assert whole == (32, 24, 40)
    assert all(h <= w / 2 + 1 for h, w in zip(half, whole, strict=True)) and any(
        h >= w / 2 - 1 for h, w in zip(half, whole, strict=True)
    )
    assert all(q <= w / 4 + 1 for q, w in zip(quarter, whole, strict=True))


def test_a_network_of_patches_has_no_smaller_region() -> None:
    sizes: list[tuple[int, ...]] = []
    patches = model(lambda x, y: sizes.append(tuple(x.shape[2:])) or recorded(x), patch_size=VOLUME.shape)
    with pytest.raises(mx.OutOfMemory, match="too little memory for this: use a method that needs less"):
        climbed(patches, allow_smaller_region=True)
    assert set(sizes) == {VOLUME.shape}


def test_other_errors_are_not_about_memory() -> None:
    fine, broken = model(lambda x, y: False), model(lambda x, y: bool(1 / 0))
    for asked, said in ((fine, "did you mean malignant"), (broken, "division by zero")):
        with pytest.raises(Exception, match=said):
            within_memory(
                lambda region, run, m=asked: [mx.explain(m, VOLUME, "gradient", target="malignan", run=run)],
                asked,
                VOLUME,
                None,
                mx.Run(),
                allow_smaller_region=True,
                allow_cpu=True,
            )


@pytest.mark.parametrize("rung", [1, 2, 3])
def test_it_can_be_cancelled_on_every_rung(rung: int) -> None:
    said: list[str] = []
    stop = mx.Run(progress=lambda p: said.append(p.message), cancel=lambda: sum("going on" in s for s in said) == rung)
    with pytest.raises(mx.Cancelled):
        climbed(model(lambda x, y: recorded(x)), run=stop, allow_smaller_region=True)
