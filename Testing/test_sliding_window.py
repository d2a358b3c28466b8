"""Whole scans through a window: against MONAI's own inference of the whole scan, and autograd through that."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import oblique_affine
from monai.inferers import sliding_window_inference
from monai.networks import nets
from torch import Tensor, nn

import MedXAILib as mx
from MedXAILib import resources
from MedXAILib.engines.boxes import put
from MedXAILib.engines.by_window import ByWindow
from MedXAILib.engines.whole_scan import WholeScan
from MedXAILib.model import Prepared
from MedXAILib.run import Run
from MedXAILib.target import Bound, read_layers
from MedXAILib.window import Window

SHAPE = (37, 26, 30)
GAUSSIAN = Window((16, 16, 16), overlap=0.5, mode="gaussian", batch=3)


def unet(norm: str = "instance", channels: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nets.UNet(3, 1, channels, channels=(4, 8), strides=(2,), num_res_units=1, norm=norm).eval()


def model(window: Window | None = GAUSSIAN, network: nn.Module | None = None, **known: Any) -> mx.Model:
    names = ("background", "organ", "lesion")
    return mx.Model(network or unet(), task="segmentation", class_names=names, window=window, **known)


def scan(shape: tuple[int, ...] = SHAPE, seed: int = 6) -> Tensor:
    """A scan (1, D, H, W) that is not the same all over."""
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))
    x[:, shape[0] // 2 :] += 1
    return x


def blended(window: Window, network: nn.Module, x: Tensor) -> Tensor:
    """MONAI's own inference of a whole scan (N, 1, D, H, W)."""
    return sliding_window_inference(
        x,
        window.roi_size,
        2,
        network,
        window.overlap,
        window.mode,
        window.sigma_scale,
        window.padding_mode,
        window.cval,
    )


MASK = torch.zeros(1, *SHAPE)
MASK[:, 20:33, 5:12, 18:29] = 1
AFFINE = oblique_affine()
BOX = tuple(np.stack([(AFFINE @ (*corner, 1))[:3] for corner in ((3, 3, 3), (14, 12, 9))]).tolist())
TARGETS = {
    "logit where predicted": mx.SegmentationTarget("lesion"),
    "logit everywhere": mx.SegmentationTarget("organ", within="everywhere"),
    "logit in a mask": mx.SegmentationTarget("organ", within=mx.Volume(MASK, AFFINE)),
    "logit in a box": mx.SegmentationTarget("organ", within=BOX),
    "volume": mx.SegmentationTarget("lesion", measure="volume"),
    "volume in a mask": mx.SegmentationTarget("lesion", mx.Volume(MASK, AFFINE), "volume"),
    "dice": mx.SegmentationTarget("lesion", mx.Volume(MASK, AFFINE), "dice"),
    "one voxel": mx.RegressionTarget(2 * int(np.prod(SHAPE)) + 12345),
}


def question(model: mx.Model, x: Tensor, *targets: mx.Target, run: Run | None = None) -> WholeScan:
    for parameter in model.network.parameters():
        parameter.requires_grad_(False)
    return WholeScan(model, x[None], [Prepared(x, AFFINE)], targets, run or Run())


def changes(shape: tuple[int, ...], box: tuple[int, ...], count: int = 5) -> tuple[Tensor, Tensor]:
    """Patches, and where they stand: in the corners, and anywhere."""
    generator = torch.Generator().manual_seed(3)
    most = torch.tensor(shape) - torch.tensor(box)
    low = torch.stack([torch.randint(0, int(m) + 1, (count,), generator=generator) for m in most], 1)
    low[0], low[1] = 0, most
    return torch.randn(count, 1, *box, generator=generator) * 3, low


def equal_to_naive(window: Window, network: nn.Module, x: Tensor, target: mx.Target, box: tuple[int, ...]) -> ByWindow:
    """Ask by windows and naively; what was asked by windows."""
    asked = question(model(window, network), x, target)
    patches, low = changes(tuple(x.shape[1:]), box)
    with torch.no_grad():
        evaluator = ByWindow(asked, box)
        (found,) = evaluator.values(patches, low)
        whole = x[None].repeat(len(low), 1, 1, 1, 1)
        put(whole, torch.zeros_like(low), patches, low)
        (bound,) = asked.bound
        expected = torch.cat([bound.value(blended(window, network, one[None])) for one in whole])
        at_sample = bound.value(blended(window, network, x[None]))
    torch.testing.assert_close(evaluator.at_sample[0], at_sample, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert float((found - at_sample).abs().max()) > 1e-4
    return evaluator


@pytest.mark.parametrize("target", TARGETS)
def test_what_changes_is_what_a_new_inference_says(target: str) -> None:
    equal_to_naive(GAUSSIAN, unet(), scan(), TARGETS[target], (7, 5, 9))


EVERYWHERE = mx.SegmentationTarget("organ", within="everywhere")
VOLUME = mx.SegmentationTarget("organ", within="everywhere", measure="volume")


@pytest.mark.parametrize("target", [EVERYWHERE, VOLUME], ids=["linear", "not"])
@pytest.mark.parametrize(
    "window",
    [
        Window((16, 16, 16), overlap=0.25, mode="constant"),
        Window((16, 20, 12), overlap=(0.5, 0.25, 0.0), mode="gaussian"),
        Window((16, 32, 16), overlap=0.5, mode="gaussian", sigma_scale=(0.1, 0.2, 0.3)),
        Window((16, 32, 16), overlap=0.5, padding_mode="replicate"),
        Window((16, 32, 16), overlap=0.5, cval=2.0),
        Window((16, -1, 16), overlap=0.5),
    ],
    ids=["constant", "anisotropic", "wider than the scan", "replicated", "padded with 2", "a whole axis"],
)
def test_every_setting_of_the_inferer(window: Window, target: mx.Target) -> None:
    equal_to_naive(window, unet(), scan(), target, (7, 5, 9))


class Half(nn.Module):
    """Labels at half the resolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv3d(1, 3, 2, 2), nn.InstanceNorm3d(3), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.mark.parametrize("network", [unet("batch"), Half(), unet(channels=1)], ids=["batch norm", "coarser", "binary"])
@pytest.mark.parametrize("target", [EVERYWHERE, VOLUME], ids=["linear", "not"])
def test_any_network(network: nn.Module, target: mx.Target) -> None:
    named = mx.SegmentationTarget(1, target.within, target.measure)
    equal_to_naive(Window((16, 32, 16), overlap=0.5, mode="gaussian"), network, scan((40, 28, 32)), named, (7, 5, 9))


def test_changes_of_the_whole_scan() -> None:
    equal_to_naive(GAUSSIAN, unet(), scan(), VOLUME, SHAPE)


@contextmanager
def counted(network: nn.Module) -> Iterator[list[int]]:
    """How many samples the network is given each time."""
    calls: list[int] = []
    handle = network.register_forward_pre_hook(lambda _m, inputs: calls.append(len(inputs[0])))
    yield calls
    handle.remove()


def starts(size: int, roi: int, step: int) -> list[int]:
    """Where windows begin along an axis: a step apart, the last ending where the scan does."""
    return [min(i, size - roi) for i in range(0, size - roi + step, step)]


def test_only_windows_that_are_touched_and_looked_at_are_asked() -> None:
    network, x, run = unet(), scan(), Run()
    # The mask begins at voxel (20, 5, 18), so that the target looks at no window that ends before that.
    mask = torch.zeros(1, *SHAPE)
    mask[:, 20, 5, 18] = 1
    target = mx.SegmentationTarget("organ", mx.Volume(mask, AFFINE), "volume")
    asked = question(model(network=network), x, target, run=run)
    # The second ends where a window begins.
    low = torch.tensor([[0, 0, 0], [12, 6, 15], [33, 22, 26]])
    windows = list(product(*(starts(n, 16, 8) for n in SHAPE)))

    def within(window: tuple[int, ...], point: tuple[int, ...], size: int = 1) -> bool:
        return all(w < p + size and p < w + 16 for w, p in zip(window, point, strict=True))

    looked = [w for w in windows if within(w, (20, 5, 18))]
    expected = sum(within(w, tuple(place), 4) for w in looked for place in low.tolist())
    with torch.no_grad(), counted(network) as calls:
        evaluator = ByWindow(asked, (4, 4, 4))
        assert sum(calls) == run.cost.forwards == len(windows)
        (values,) = evaluator.values(torch.full((3, 1, 4, 4, 4), 5.0), low)
    assert 0 < expected < len(windows) and sum(calls) == run.cost.forwards == len(windows) + expected
    assert values[0] == values[2] == evaluator.at_sample[0] and values[1] != values[0]
    # Windows of several changes share a batch.
    assert len(calls) < len(windows) + expected


def test_what_does_not_fit_is_asked_again() -> None:
    """Without memory for the windows' own outputs, those that are touched are asked twice, and the answer is the
    same."""
    x, patches, low = scan(), *changes(SHAPE, (6, 6, 6))
    found, asked = [], []
    for budget in (None, 10**6, 1000):
        run = Run(memory_budget=budget)
        with torch.no_grad():
            evaluator = ByWindow(question(model(), x, VOLUME, EVERYWHERE, run=run), (6, 6, 6))
            found.append(torch.stack(evaluator.values(patches, low)))
        asked.append(run.cost.forwards)
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])
    # A few windows' outputs fit, then none.
    assert asked[2] > asked[1] > asked[0]


def test_firm_decisions_are_looked_at() -> None:
    """Where the network is so sure that the gradient of a volume vanishes, a change still counts."""
    network = nn.Conv3d(1, 3, 1)
    with torch.no_grad():
        network.weight[:] = torch.tensor([0.0, 0.0, 1000.0]).reshape(3, 1, 1, 1, 1)
        network.bias.zero_()
    x = scan().abs() + 1
    whole = mx.SegmentationTarget("lesion", "everywhere", "volume")
    evaluator = ByWindow(question(model(network=network), x, whole), (4, 4, 4))
    (values,) = evaluator.values(torch.full((1, 1, 4, 4, 4), -1.0), torch.tensor([[5, 5, 5]]))
    lost = 4**3 * float(np.prod(np.linalg.norm(AFFINE[:3, :3], axis=0))) / 1000
    assert float(evaluator.at_sample[0] - values[0]) == pytest.approx(lost, rel=1e-3)


@dataclass(frozen=True)
class Voxels(mx.Target):
    """How many voxels are of class 1."""

    def bind(self, model: mx.Model, output: Tensor, seen: Any) -> Bound:
        return Bound(self, lambda output: (output.argmax(1) == 1).flatten(1).sum(1).float(), "voxels")


def test_targets_without_a_gradient() -> None:
    equal_to_naive(GAUSSIAN, unet(), scan(), Voxels(), (7, 5, 9))
    # Beside one that has.
    found = mx.explain(model(), volume(), "occlusion", target=[EVERYWHERE, Voxels()], window=(40.0, 20.0, 20.0))
    assert all(made.data.abs().max() > 0 for made in found)
    with pytest.raises(mx.MedXAIError, match="'voxels' has no gradient: use a perturbation method"):
        mx.explain(model(), volume(), "gradient", target=Voxels())


def volume(x: Tensor | None = None) -> mx.Volume:
    return mx.Volume(scan() if x is None else x, AFFINE)


@pytest.mark.parametrize("name", ["logit where predicted", "dice"])
def test_occlusion_of_a_whole_scan(name: str) -> None:
    """The same map as that of a network that blends by itself, for fewer calls."""

    class Blending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = unet()

        def forward(self, x: Tensor) -> Tensor:
            return blended(GAUSSIAN, self.network, x)

    settings: dict[str, Any] = {"target": TARGETS[name], "window": (30.0, 10.0, 13.0)}
    made = mx.explain(model(), volume(), "occlusion", **settings)
    expected = mx.explain(model(None, Blending()), volume(), "occlusion", **settings)
    torch.testing.assert_close(made.data, expected.data, rtol=1e-4, atol=1e-6)
    windows = len(list(product(*(starts(n, 16, 8) for n in SHAPE))))
    assert windows < made.provenance.forwards < expected.provenance.forwards * windows / 1.9
    assert made.provenance.model["window"]["overlap"] == 0.5 and made.provenance.region is None
    assert made.provenance.target_label == expected.provenance.target_label


@pytest.mark.parametrize("name", TARGETS)
def test_the_gradient_is_that_of_the_blended_output(name: str) -> None:
    asked, network = TARGETS[name], unet()
    made = mx.explain(model(network=network), volume(), "gradient", target=asked)
    leaf = scan()[None].requires_grad_()
    output = blended(GAUSSIAN, network, leaf)
    seen = [Prepared(scan(), AFFINE)]
    value = asked.bind(model(), output.detach(), seen).value(output)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    torch.testing.assert_close(made.data, gradient[0], rtol=1e-5, atol=float(gradient.abs().max()) * 1e-5)


@pytest.mark.parametrize("window", [Window((16, 32, 16), 0.5, "gaussian"), Window((12, 12, 40), 0.25)])
def test_the_gradient_where_the_scan_is_padded(window: Window) -> None:
    network = unet()
    made = mx.explain(model(window, network), volume(), "gradient", target=EVERYWHERE)
    leaf = scan()[None].requires_grad_()
    (gradient,) = torch.autograd.grad(blended(window, network, leaf)[0, 1].mean(), leaf)
    torch.testing.assert_close(made.data, gradient[0], rtol=1e-5, atol=float(gradient.abs().max()) * 1e-5)


def test_what_a_whole_scan_is_asked_with_gradients() -> None:
    """As methods do that change the whole scan at once; the network is given every window twice."""
    network = Half()
    asked, leaf = question(model(network=network), scan(), VOLUME), scan()[None].requires_grad_()
    with counted(network) as calls:
        (value,) = asked.values(leaf)
        (made,) = asked.gradients(value, [leaf])
    assert sum(calls) == 3 * len(asked.windows)
    other = scan()[None].requires_grad_()
    # A copy, because MONAI multiplies in place what the sigmoid still needs.
    output = blended(GAUSSIAN, lambda part: network(part).clone(), other)
    (expected,) = torch.autograd.grad(asked.bound[0].value(output), other)
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=float(expected.abs().max()) * 1e-5)


def local() -> nn.Module:
    """A network whose layer "1" has a unit for each voxel."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 3, 1)).eval()


def windows_of(x: Tensor, window: Window) -> list[tuple[slice, ...]]:
    return [
        tuple(slice(a, a + 16) for a in place)
        for place in product(*(starts(n, 16, int(16 * (1 - window.overlap))) for n in x.shape[1:]))
    ]


def weight(mode: str) -> Tensor:
    """MONAI's importance of a window of 16 voxels, from its definition."""
    if mode == "constant":
        return torch.ones(16, 16, 16)
    bell = torch.exp(-((torch.arange(16) - 7.5) ** 2) / (2 * (16 * 0.125) ** 2))
    return (bell[:, None, None] * bell[:, None] * bell).clamp_min(1e-3)


@pytest.mark.parametrize("mode", ["gaussian", "constant"])
def test_maps_of_layers_are_blended(mode: str) -> None:
    window, network, x = Window((16, 16, 16), overlap=0.5, mode=mode), local(), scan()
    target = mx.SegmentationTarget("organ", mx.Volume(MASK, AFFINE))
    made = mx.explain(model(window, network), volume(), "gradcam", target=target, layers="1")
    total, expected, bell = torch.zeros(SHAPE), torch.zeros(SHAPE), weight(mode)
    for place in windows_of(x, window):
        total[place] += bell
    for place in windows_of(x, window):
        activation = network[:2](x[None][(slice(None), slice(None), *place)]).detach().requires_grad_()
        output = network[2](activation)[0, 1]
        contribution = (output * bell / total[place] * MASK[0][place]).sum() / MASK.sum()
        (gradient,) = torch.autograd.grad(contribution, activation)
        heat = (gradient.mean((2, 3, 4), keepdim=True) * activation).sum(1).relu()[0]
        expected[place] += heat.detach() * bell / total[place]
    assert expected.abs().max() > 0
    torch.testing.assert_close(made.data[0], expected, rtol=1e-4, atol=float(expected.max()) * 1e-5)


ADDITIVE = {
    "integrated_gradients": {"steps": 9, "max_steps": 9},
    "deeplift": {},
    "lrp": {"composite": "epsilon"},
    "guided_backprop": {},
    "deconvnet": {},
    "gradient": {"form": "times_input"},
}


@pytest.mark.parametrize("method", ADDITIVE)
def test_maps_that_add_up_are_those_of_the_whole(method: str) -> None:
    """A network that looks at single voxels says of a scan what it says of its windows, and so does every rule."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(1, 4, 1), nn.ReLU(), nn.Conv3d(4, 3, 1)).eval()
    made = mx.explain(model(network=network), volume(), method, target=EVERYWHERE, **ADDITIVE[method])
    expected = mx.explain(model(None, network), volume(), method, target=EVERYWHERE, **ADDITIVE[method])
    largest = float(expected.data.abs().max())
    torch.testing.assert_close(made.data, expected.data, rtol=1e-3, atol=largest * 1e-3)
    assert made.residual.keys() == expected.residual.keys() and max(made.residual.values(), default=0) < 0.1


def test_a_baseline_stands_where_the_window_is() -> None:
    """Also of a scan that is padded."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(1, 4, 1), nn.ReLU(), nn.Conv3d(4, 3, 1)).eval()
    settings: dict[str, Any] = {"baseline": volume(scan(seed=8)), "steps": 3, "max_steps": 3, "target": EVERYWHERE}
    window = Window((16, 32, 16), overlap=0.5)
    made = mx.explain(model(window, network), volume(), "integrated_gradients", **settings)
    expected = mx.explain(model(None, network), volume(), "integrated_gradients", **settings)
    torch.testing.assert_close(made.data, expected.data, rtol=1e-3, atol=float(expected.data.abs().max()) * 1e-3)


def test_integrated_gradients_add_up_to_the_change() -> None:
    network = unet("batch")
    made = mx.explain(model(network=network), volume(), "integrated_gradients", target=EVERYWHERE, max_steps=15)
    with torch.no_grad():
        value = [float(blended(GAUSSIAN, network, x[None])[0, 1].mean()) for x in (scan(), scan() * 0)]
    assert float(made.data.sum()) == pytest.approx(value[0] - value[1], rel=0.01)


def test_only_windows_that_the_target_looks_at_are_explained() -> None:
    network = unet()
    mask = torch.zeros(1, *SHAPE)
    mask[:, 36, 25, 29] = 1
    target = mx.SegmentationTarget("organ", mx.Volume(mask, AFFINE))
    made = mx.explain(model(network=network), volume(), "gradient", target=target)
    assert made.provenance.backwards == 1
    assert made.data[:, 21:, 10:, 14:].abs().min() > 0 and made.data[:, :21].abs().max() == 0


def test_several_targets_and_samples() -> None:
    x = torch.stack([scan(), scan(seed=7)])
    asked = [EVERYWHERE, mx.SegmentationTarget("organ", ((2, 2, 2), (12, 9, 8)))]
    found = mx.explain(model(), x, "gradient", target=asked)
    assert [made.data.shape for made in found] == [x.shape] * 2
    for made, target in zip(found, asked, strict=True):
        for one, alone in zip(made.data, x, strict=True):
            torch.testing.assert_close(one, mx.explain(model(), alone, "gradient", target=target).data)


def test_windows_that_a_target_does_not_look_at_say_nothing_of_it() -> None:
    """Not even where another target looks, and a method gives every window a map."""
    known = model(network=local(), layers=("1",))
    both = [mx.SegmentationTarget("organ", ((2, 2, 2), (5, 5, 5))), EVERYWHERE]
    found, *_ = mx.explain(known, scan(), "scorecam", target=both)
    alone = mx.explain(known, scan(), "scorecam", target=both[0])
    torch.testing.assert_close(found.data, alone.data)


def test_progress_cancel_and_partial_maps() -> None:
    said: list[Any] = []
    settings: dict[str, Any] = {"target": EVERYWHERE, "steps": 2, "max_steps": 2}
    mx.explain(model(), volume(), "integrated_gradients", run=mx.Run(progress=said.append), **settings)
    assert {p.message for p in said if "windows" in p.message} == {
        "Looking at 36 windows of the scan",
        "Integrated gradients of 36 windows of the scan",
    }
    assert not any("steps" in p.message for p in said)
    stop = mx.Run(cancel=lambda: len(said) > 0, progress=said.append)
    with pytest.raises(mx.Cancelled):
        mx.explain(model(), volume(), "gradient", target=EVERYWHERE, run=stop)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Show every partial map, however soon."""
    monkeypatch.setattr(Run, "glimpse", lambda self, show: show())


@pytest.mark.usefixtures("at_once")
def test_maps_are_shown_while_windows_come_and_the_last_one_is_all() -> None:
    shown: list[Tensor] = []
    run = mx.Run(partial=lambda p: shown.append(p.data), memory_budget=10**7)
    made = mx.explain(model(), volume(), "gradient", target=EVERYWHERE, run=run)
    assert len(shown) > 2 and (shown[0] != made.data).any()
    torch.testing.assert_close(shown[-1], made.data)


def test_enough_leaves_a_partial_map() -> None:
    run = mx.Run(memory_budget=10**7, enough=lambda: True)
    made = mx.explain(model(), volume(), "gradient", target=EVERYWHERE, run=run)
    assert made.provenance.partial and any("partial" in note for note in made.provenance.notes)


def test_another_precision_is_another_inference() -> None:
    run = mx.Run(precision="bfloat16")
    made = mx.explain(model(), volume(), "occlusion", target=EVERYWHERE, window=(30.0,), run=run)
    (note,) = [note for note in made.provenance.notes if "bfloat16" in note]
    assert "changes what is explained by 0.00%" not in note
    # The scan in both precisions, and what is covered.
    assert made.provenance.forwards > 2 * 36
    exact = mx.explain(model(), volume(), "occlusion", target=EVERYWHERE, window=(30.0,))
    assert not torch.equal(made.data, exact.data)
    assert float((made.data - exact.data).abs().max()) < 0.3 * float(exact.data.abs().max())


def test_layers_see_windows_only() -> None:
    for method in ("gradient", "occlusion"):
        with pytest.raises(mx.MedXAIError, match=r"sees one window of the scan at a time: say where with region"):
            mx.explain(model(), volume(), method, target=mx.RegressionTarget(0, layer="model.0"))
    with pytest.raises(mx.MedXAIError, match="sees one window of the scan at a time"):
        read_layers(model(), scan()[None], [None, "model.0"])


@pytest.mark.parametrize(
    "window",
    [
        GAUSSIAN,
        Window((16, 32, 16), 0.25, "gaussian", sigma_scale=0.3, cval=2.0),
        Window((16, 32, 16), padding_mode="replicate"),
    ],
)
def test_whole_scans_are_predicted_as_monai_does(window: Window) -> None:
    network = unet()
    said = model(window, network, patch_size=(16, 16, 16)).predict(volume())
    with torch.no_grad():
        expected = blended(window, network, scan()[None])
    torch.testing.assert_close(said.output, expected)
    assert said.labels is not None and torch.equal(said.labels.data[0].long(), expected[0].argmax(0))


def test_the_scan_stays_as_it_is() -> None:
    """Though MONAI multiplies in place what the network returns, which may be what it was given."""

    class Same(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    x = scan()
    said = mx.Model(Same(), "segmentation", window=Window((16, 16, 16), 0.5, "gaussian")).predict(volume(x))
    torch.testing.assert_close(said.output[0], scan())
    assert torch.equal(x, scan())


def test_a_region_is_one_patch() -> None:
    known, network = model(patch_size=(16, 16, 16), network=unet()), unet()
    centre = tuple(volume().to_point((15.5, 12.5, 14.5)))
    with torch.no_grad():
        said = known.predict(volume(), centre).output
        torch.testing.assert_close(said, network(scan()[None][:, :, 8:24, 5:21, 7:23]))
    assert mx.explain(known, volume(), "gradient", target=EVERYWHERE, region=centre).provenance.forwards == 1


def test_the_window_is_the_patch_around_a_point_and_slides_over_a_larger_box() -> None:
    network = unet()
    made = mx.explain(model(network=network), volume(), "gradient", EVERYWHERE, tuple(volume().to_point((15, 12, 14))))
    assert (made.data != 0).sum() == 16**3 and made.provenance.forwards == 1
    part = (slice(None), slice(4, 34), slice(3, 19), slice(2, 22))
    # The grid is tilted, and the box is not: so one without a tilt.
    upright = mx.Volume(scan(), np.eye(4))
    boxed = mx.explain(model(network=network), upright, "gradient", EVERYWHERE, ((4, 3, 2), (33, 18, 21)))
    torch.testing.assert_close(boxed.data[part], mx.explain(model(), scan()[part], "gradient", EVERYWHERE).data)
    assert boxed.data.count_nonzero() == boxed.data[part].count_nonzero()


def test_without_a_window_a_region_is_asked_for() -> None:
    with pytest.raises(mx.MedXAIError, match=r"the scan is larger: say where with region"):
        model(None, patch_size=(16, 16, 16)).predict(volume())


def test_windows_that_are_none() -> None:
    with pytest.raises(mx.MedXAIError, match="There is no mode 'gauss': did you mean gaussian"):
        Window((16, 16, 16), mode="gauss")
    with pytest.raises(mx.MedXAIError, match=r"from 0 to less than 1, not 1\.0"):
        Window((16, 16, 16), overlap=1.0)
    with pytest.raises(mx.MedXAIError, match="A window of 2 sizes does not fit a scan of 3 axes"):
        model(Window((16, 16))).predict(volume())
    assert Window([16], overlap=[0.5]) == Window((16,), overlap=(0.5,)) and Window(16).size(SHAPE) == (16, 16, 16)  # type: ignore[arg-type]


SHIPPED = resources.path("Models/lung_nodule_segmentation")


def bundle(folder: Path, inferer: Any) -> Path:
    """The shipped bundle with another inferer."""
    made = shutil.copytree(SHIPPED, folder / "bundle")
    path = made / "configs" / "inference.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.update({"inferer": inferer, "patch": [32, 32, 24]} if inferer else {})
    if not inferer:
        del config["inferer"]
    path.write_text(json.dumps(config), encoding="utf-8")
    return made


def test_a_bundle_brings_its_window(tmp_path: Path) -> None:
    assert mx.load_model(SHIPPED).window == Window((40, 40, 40), overlap=0.5, mode="gaussian", batch=8)
    told = {"_target_": "monai.inferers.SlidingWindowInferer", "roi_size": "@patch", "device": "$torch.device('cuda')"}
    assert mx.load_model(bundle(tmp_path, told)).window == Window((32, 32, 24))


@pytest.mark.parametrize("inferer", [{"_target_": "SimpleInferer"}, None, {"_target_": "SliceInferer", "roi_size": 4}])
def test_bundles_without_a_window(tmp_path: Path, inferer: Any) -> None:
    assert mx.load_model(bundle(tmp_path, inferer)).window is None


def test_a_window_that_is_code_needs_trust(tmp_path: Path) -> None:
    path = bundle(tmp_path, {"_target_": "SlidingWindowInferer", "roi_size": "$[16 * 2] * 3"})
    with pytest.raises(mx.Untrusted, match="would run code of its own"):
        mx.load_model(path)
    trusted = mx.load_model(path, trust=True)
    assert trusted.window is not None and trusted.window.roi_size == (32, 32, 32)


def test_the_shipped_network_on_a_real_scan() -> None:
    """The nodule of a chest CT, cut to its surroundings: found, and what changes it is what inference says."""
    known = mx.load_model(SHIPPED)
    whole = mx.load_volume(resources.path("SampleData/chest_ct_nodule.nrrd"))
    middle = np.round(np.linalg.inv(whole.affine) @ (21.9, 120.5, -611.5, 1))[:3].astype(int)
    low = middle - (6, 60, 60)
    part = whole.data[(slice(None), *(slice(a, a + n) for a, n in zip(low, (13, 121, 121), strict=True)))]
    affine = whole.affine.copy()
    affine[:, 3] = whole.affine @ (*low, 1)
    ct = mx.Volume(part.clone(), affine)
    prepared = known.prepare(ct)
    with known.ready(), torch.no_grad():
        asked = WholeScan(known, prepared.x[None], [prepared], [mx.SegmentationTarget("nodule")], Run())
        evaluator = ByWindow(asked, (8, 8, 8))
        place = torch.tensor([[s // 2 - 4 for s in prepared.x.shape[1:]]])
        (found,) = evaluator.values(torch.zeros(1, 1, 8, 8, 8), place)
        covered = prepared.x[None].clone()
        put(covered, torch.zeros_like(place), torch.zeros(1, 1, 8, 8, 8), place)
        (bound,) = asked.bound
        expected = bound.value(blended(known.window, known.network, covered))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert float(evaluator.at_sample[0]) > 0 and float(found) < 0.9 * float(evaluator.at_sample[0])
    made = mx.explain(known, ct, "gradcam")
    peak = np.unravel_index(int(made.data.argmax()), made.data.shape)[1:]
    assert np.linalg.norm(np.array(ct.to_point(peak)) - (21.9, 120.5, -611.5)) < 15
