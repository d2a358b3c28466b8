"""Only what a change can change is computed again, and nothing else differs from asking the whole network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import NETWORKS, make_model, with_statistics
from monai.networks import nets
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import MedXAILib as mx
from MedXAILib.engines.changes import Change
from MedXAILib.engines.incremental import Chain, Incremental, incremental
from MedXAILib.engines.masks import Masks, Stream
from MedXAILib.engines.perturbation import Plain
from MedXAILib.explainer import Question
from MedXAILib.infills.fixed import Fixed

SIZE = (40, 34, 27)
BOX = (6, 5, 4)


def question_of(network: nn.Module, x: Tensor, **known: Any) -> Question:
    model = mx.Model(with_statistics(network).eval().requires_grad_(False), channels=x.shape[1], **known)
    seen = [model.prepare(mx.Volume(one, np.eye(x.ndim - 1))) for one in x]
    target: mx.Target = mx.SegmentationTarget(1, "everywhere") if model.task == "segmentation" else mx.ClassTarget(1)
    return Question(model, x, seen, [target])


def places(size: tuple[int, ...], box: tuple[int, ...], count: int = 9) -> Tensor:
    """Corners, and places anywhere."""
    most = torch.tensor(size) - torch.tensor(box)
    drawn = (torch.rand(count - 2, len(size), generator=torch.Generator().manual_seed(1)) * (most + 1)).long()
    return torch.cat([torch.zeros_like(most)[None], most[None], drawn])


def compare(network: nn.Module, size: tuple[int, ...] = SIZE, box: tuple[int, ...] = BOX, **known: Any) -> Incremental:
    """What changes say, checked against whole samples: of boxes in one batch, and one by one."""
    torch.manual_seed(0)
    x = torch.randn(1, 2, *size)
    question = question_of(network, x, **known)
    low = places(size, box)
    patches = torch.randn(len(low), 2, *box)
    with torch.no_grad():
        asked = Incremental(question)
        (found,) = asked.values(patches, low)
        (expected,) = Plain(question).values(patches, low)
        alone = torch.cat([asked.values(p[None], at[None])[0] for p, at in zip(patches, low, strict=True)])
    scale = float((expected - asked.at_sample[0]).abs().amax())
    assert scale > 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * scale + 1e-6 * float(expected.abs().amax()))
    torch.testing.assert_close(alone, found, rtol=1e-5, atol=1e-5 * scale + 1e-6 * float(expected.abs().amax()))
    return asked


def multiplications(work: Callable[[], object]) -> int:
    """Of convolutions and matrices; also of those that are asked for by a name that PyTorch does not count."""

    def convolved(x: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return int(2 * np.prod(out_shape) * np.prod(weight[1:]))

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.mkldnn_convolution: convolved}) as counter:
        work()
    return counter.get_total_flops() // 2


class Head(nn.Module):
    """`features`, averaged over space, as scores."""

    def __init__(self, *features: nn.Module) -> None:
        super().__init__()
        self.features = nn.Sequential(*features)

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x).mean((2, 3, 4)) if x.ndim == 5 else self.features(x).mean((2, 3))


class Applied(nn.Module):
    """Whatever a function makes of its input."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


LAYERS: dict[str, Callable[[], list[nn.Module]]] = {
    "convolution": lambda: [nn.Conv3d(2, 3, 3, padding=1)],
    "stride": lambda: [nn.Conv3d(2, 3, (4, 3, 2), stride=(2, 1, 3), padding=(1, 2, 0))],
    "dilation": lambda: [nn.Conv3d(2, 3, 3, padding=2, dilation=(2, 1, 3), stride=2)],
    "groups": lambda: [nn.Conv3d(2, 4, 3, groups=2)],
    "same": lambda: [nn.Conv3d(2, 3, (2, 3, 4), padding="same")],
    "padding that is not zero": lambda: [nn.Conv3d(2, 3, 3, padding=1, padding_mode="replicate")],
    "gaps between strides": lambda: [nn.Conv3d(2, 3, 1, stride=5)],
    "max pooling": lambda: [nn.MaxPool3d(3, 2, 1)],
    "dilated max pooling": lambda: [nn.MaxPool3d((2, 3, 2), (1, 2, 2), 0, dilation=2)],
    "max pooling, ceil": lambda: [nn.MaxPool3d(3, 2, 1, ceil_mode=True)],
    "average pooling": lambda: [nn.AvgPool3d(3, 2, 1)],
    "average pooling without padding": lambda: [nn.AvgPool3d(3, 2, 1, count_include_pad=False)],
    "transposed": lambda: [nn.ConvTranspose3d(2, 3, 3, 2, 1, output_padding=1)],
    "transposed, odd": lambda: [nn.ConvTranspose3d(2, 4, (4, 3, 2), (3, 1, 2), (0, 2, 0), groups=2)],
    "transposed, gaps": lambda: [nn.ConvTranspose3d(2, 3, 1, 2)],
    "batch norm": lambda: [nn.BatchNorm3d(2), nn.PReLU(2)],
    "instance norm": lambda: [nn.Conv3d(2, 3, 3), nn.InstanceNorm3d(3), nn.ReLU()],
    "in place": lambda: [nn.Conv3d(2, 3, 3), nn.ReLU(inplace=True), nn.Dropout(), nn.Conv3d(3, 3, 2)],
    "constants": lambda: [Applied(lambda x: 2 * x / 3 - torch.ones(1, 2, 1, 1, 1) + torch.arange(27.0))],
    "places": lambda: [Applied(lambda x: x * torch.linspace(0, 1, 40).reshape(1, 1, -1, 1, 1).expand(1, 1, *SIZE))],
    "channels": lambda: [Applied(lambda x: torch.cat([x[:, :1] * x[:, 1:], torch.zeros_like(x), x], 1))],
    "a gate": lambda: [Applied(lambda x: x * x.mean((2, 3, 4), keepdim=True).sigmoid())],
    "flipped": lambda: [Applied(lambda x: x.flip(2)), nn.Conv3d(2, 3, 3, stride=2)],
    "resized": lambda: [Applied(lambda x: F.interpolate(x, scale_factor=2, mode="trilinear")), nn.Conv3d(2, 2, 2)],
    "data": lambda: [Applied(lambda x: x.data.relu().detach() + x)],
    "written": lambda: [Applied(lambda x: x.clone().mul_(3).add_(x)), nn.Conv3d(2, 3, 3)],
}


@pytest.mark.parametrize("name", LAYERS)
def test_each_operator_passes_on_what_changes(name: str) -> None:
    torch.manual_seed(0)
    network = Head(nn.Conv3d(2, 2, 3, padding=1), *LAYERS[name](), nn.LazyConv3d(3, 3, padding=1))
    network(torch.randn(1, 2, *SIZE))
    compare(network)


def test_two_dimensions() -> None:
    compare(Head(nn.Conv2d(2, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)), (61, 50), (7, 4))


WHOLE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "resnet18": (lambda: nets.resnet18(n_input_channels=2, num_classes=2, conv1_t_stride=2), "classification"),
    "densenet121": (lambda: nets.DenseNet(3, 2, 2, block_config=(3, 3), init_features=8), "classification"),
    "seresnet": (lambda: nets.SEResNet50(spatial_dims=3, in_channels=2, num_classes=2), "classification"),
    "unet": (
        lambda: nets.UNet(3, 2, 2, channels=(4, 8), strides=(2,), num_res_units=1, norm="batch"),
        "segmentation",
    ),
    "attention unet": (lambda: nets.AttentionUnet(3, 2, 2, channels=(4, 8, 8), strides=(2, 2)), "segmentation"),
    "segresnet": (lambda: nets.SegResNet(3, 8, 2, 2, blocks_down=(1, 1), blocks_up=(1,)), "segmentation"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_networks_of_monai(name: str) -> None:
    build, task = WHOLE[name]
    compare(build(), (40, 36, 32), (9, 6, 7), task=task)


def test_a_box_that_does_not_matter() -> None:
    torch.manual_seed(0)
    question = question_of(Head(nn.Conv3d(2, 3, 1, stride=3)), torch.randn(1, 2, *SIZE))
    with torch.no_grad():
        asked = Incremental(question)
        low, patch = torch.tensor([[1, 1, 1]]), torch.full((1, 2, 2, 2, 2), 9.0)
        torch.testing.assert_close(asked.values(patch, low)[0], asked.at_sample[0])


def test_work_is_what_changes_take() -> None:
    """Three convolutions of one channel, kernel 3, padding 1, of a box of b³ voxels: (b + 2)³, (b + 4)³, (b + 6)³."""
    torch.manual_seed(0)
    convolutions = [nn.Conv3d(1, 1, 3, padding=1, bias=False) for _ in range(3)]
    question = question_of(Head(*convolutions), torch.randn(1, 1, 30, 30, 30))
    with torch.no_grad():
        asked = Incremental(question)
        patch, low = torch.zeros(2, 1, 4, 4, 4), torch.full((2, 3), 13)
        work = multiplications(lambda: asked.values(patch, low))
    assert work == 2 * 27 * (6**3 + 8**3 + 10**3)
    assert asked.looked.work == pytest.approx(27 * 3 * 30**3 + 1, rel=1e-3)


def test_near_a_border_there_is_less_to_do() -> None:
    torch.manual_seed(0)
    question = question_of(Head(nn.Conv3d(1, 1, 5, padding=2, bias=False)), torch.randn(1, 1, 30, 30, 30))
    with torch.no_grad():
        asked = Incremental(question)
        patch, low = torch.zeros(2, 1, 4, 4, 4), torch.tensor([[0, 0, 0], [13, 13, 13]])
        work = multiplications(lambda: asked.values(patch, low))
    assert work == 125 * (6**3 + 8**3)


def test_little_is_kept() -> None:
    """Of a residual block only what a convolution or a sum needs around a change."""
    torch.manual_seed(0)
    question = question_of(nets.resnet18(n_input_channels=1, num_classes=2, conv1_t_stride=2), torch.randn(1, 1, *SIZE))
    with torch.no_grad():
        looked = Incremental(question).looked
    made = [step for step in looked.steps if step.local is not None]
    assert {"batch_norm", "relu", "max_pool", "conv", "add"} <= {step.name for step in made}
    assert len(looked.kept) < 0.75 * len(made)
    x = question.x
    assert looked.nbytes < 4.2 * 4 * 64 * x[0, 0].numel() / 8


def stream_of(x: Tensor, count: int = 20) -> Stream:
    low = places(tuple(x.shape[2:]), BOX, count)
    return Stream(count, BOX, lambda start, stop: Masks.boxes(low[start:stop], BOX, x))


def test_a_global_operator_at_the_beginning_is_not_worth_it() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 2, *SIZE)

    with torch.no_grad():
        network = nn.Sequential(nn.InstanceNorm3d(2), nn.Conv3d(2, 4, 3), nn.ReLU())
        question, other = question_of(Head(*network), x), question_of(Head(*network[1:]), x)
        assert isinstance(incremental(question, stream_of(x), Fixed(question, torch.zeros_like(x))), Plain)
        found = incremental(other, stream_of(x), Fixed(other, torch.zeros_like(x)))
    assert isinstance(found, Incremental) and found.size > 1


def test_what_cannot_be_seen_is_asked_as_a_whole() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 2, *SIZE)
    scripted = torch.jit.trace(Head(nn.Conv3d(2, 3, 3)).eval(), x)
    found = mx.explain(mx.Model(scripted, channels=2), x[0], "occlusion", target=1, window=(8.0,))
    assert found.data.abs().max() > 0


def test_a_network_that_takes_another_way_is_noticed() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 2, *SIZE)

    class Fickle(nn.Module):
        asked = 0

        def forward(self, x: Tensor) -> Tensor:
            self.asked += 1
            return (x.relu() if self.asked % 3 == 0 else x).mean((2, 3, 4))

    question = question_of(Fickle(), x)
    assert isinstance(incremental(question, stream_of(x), Fixed(question, torch.ones_like(x))), Plain)


def test_changes_that_take_another_way_are_asked_as_a_whole() -> None:
    """A network that does something else where there is something bright."""
    torch.manual_seed(0)

    class Choosing(Head):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.max() < 20 else x.clamp(max=1))

    x, low = torch.randn(1, 2, *SIZE), places(SIZE, BOX, 3)
    question = question_of(Choosing(nn.Conv3d(2, 3, 3)), x)
    patches = torch.randn(3, 2, *BOX)
    patches[1] += 30
    with torch.no_grad():
        asked = Incremental(question)
        for some in (slice(0, 1), slice(0, 3)):
            (found,) = asked.values(patches[some], low[some])
            torch.testing.assert_close(found, Plain(question).values(patches[some], low[some])[0])


def test_a_wrong_answer_is_noticed_said_and_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that forgets the halo: found out on the first use, and the map is right all the same."""
    torch.manual_seed(0)
    x = torch.randn(1, 2, *SIZE)
    network = Head(nn.Conv3d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv3d(3, 2, 3))
    model = mx.Model(network, channels=2)
    right = mx.explain(model, x[0], "occlusion", target=1, window=(8.0,))
    forgets = Change.within

    def wrong(self: Change, base: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return forgets(self, base * 0, *args, **kwargs)

    monkeypatch.setattr(Change, "within", wrong)
    found = mx.explain(model, x[0], "occlusion", target=1, window=(8.0,))
    torch.testing.assert_close(found.data, right.data, rtol=1e-4, atol=1e-6)
    assert any("of changes alone" in note for note in found.provenance.notes)
    assert not any("of changes alone" in note for note in right.provenance.notes)


def test_occlusion_asks_for_a_fraction_of_the_multiplications() -> None:
    model = make_model("resnet18")
    x = torch.randn(1, *NETWORKS["resnet18"][2])

    def work(window: float) -> int:
        return multiplications(lambda: mx.explain(model, x, "occlusion", target=1, window=(window,)))

    one = multiplications(lambda: model.network(x[None]))
    # 48 windows, the sample twice, and two that are checked; and eight, for which it is not worth it.
    assert work(6.0) < 0.6 * 48 * one
    assert work(12.0) == (1 + 8) * one


def _three() -> nn.Module:
    return Head(nn.Conv3d(2, 3, 3), nn.ReLU(), nn.Conv3d(3, 2, 3))


@pytest.mark.parametrize("build, together", [(_three, 1), (_three, 2), (WHOLE["resnet18"][0], 3)])
def test_changes_that_stay(build: Callable[[], nn.Module], together: int) -> None:
    """Samples that change step by step say what whole samples say, after each step."""
    torch.manual_seed(0)
    now = torch.randn(3, 2, *SIZE)
    question = question_of(build(), now[:1].clone())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        question.values(question.x)
        given = now.clone()
        chain = Chain(question, given, together)
        for step in range(6):
            box = tuple((torch.randint(3, 9, (3,), generator=generator)).tolist())
            low = places(SIZE, box, 12)[2 * step : 2 * step + 3] if step < 4 else places(SIZE, box, 9)[step : step + 3]
            patches = torch.randn(3, 2, *box, generator=generator)
            (found,) = chain.step(patches, low)
            for one, patch, start in zip(now, patches, low.tolist(), strict=True):
                one[(slice(None), *(slice(a, a + b) for a, b in zip(start, box, strict=True)))] = patch
            (expected,) = question.values(now)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(given, now)
