"""DeepLIFT: the map adds up to the change of the score, in every network and at every operator, and where it is known
what is right, it is that."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captum.attr import DeepLift
from conftest import NETWORKS, make_model, with_statistics
from monai.networks import nets
from monai.networks.layers.utils import get_act_layer, get_norm_layer
from torch import Tensor, nn

import MedXAILib as mx
from MedXAILib.engines.rules import record
from MedXAILib.explainer import Question
from MedXAILib.loading import load_model
from MedXAILib.report.localisation import centre
from MedXAILib.resources import path
from MedXAILib.rules.deeplift import DEEPLIFT
from MedXAILib.visual.baseline import blurred
from MedXAILib.visual.deeplift import contributions
from MedXAILib.volume import load_volume

SHAPE = (4, 5, 4, 6)
SIZE = (24, 24, 16)
KINDS = ("zero", "minimum", "mean", "blur")


def draw(*shape: int, seed: int = 6) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Scores(nn.Module):
    """A function of the input, and scores that are weighted sums of what it gives."""

    def __init__(self, function: Callable[[Tensor], Tensor], count: int = 2) -> None:
        super().__init__()
        self.function, self.count = function, count
        # What says that the network computes in double precision.
        self.marker = nn.Parameter(torch.zeros(1))

    def weight(self, features: int) -> Tensor:
        return draw(self.count, features, seed=99).to(self.marker)

    def forward(self, x: Tensor) -> Tensor:
        features = self.function(x).flatten(1)
        return F.linear(features, self.weight(features.shape[1]))


def exact(function: Callable[[Tensor], Tensor], x: Tensor, start: Tensor, target: int = 1) -> tuple[Tensor, Tensor]:
    """In double precision, the map (N, C, *spatial) for the scores of `function`, and their change (N,)."""
    network = Scores(function).double().eval()
    x, start = x.double(), start.double()
    model = mx.Model(network, channels=x.shape[1])
    with model.ready():
        seen = [model.prepare(mx.Volume(one, np.eye(4))) for one in x]
        question = Question(model, x, seen, [mx.ClassTarget(target)])
        found = contributions(question, start, x, *record(question, x, DEEPLIFT))[0]
        with torch.no_grad():
            change = network(x)[:, target] - network(start)[:, target]
    assert found.values.dtype == torch.float64
    return found.values, change


# Where a network is equal to what is known.


def sequential() -> nn.Sequential:
    """Convolutions, batch norm and ReLU, no module used twice."""
    return seeded(
        *(nn.Conv3d(2, 6, 3, padding=1), nn.BatchNorm3d(6), nn.ReLU(), nn.AvgPool3d(2)),
        *(nn.Conv3d(6, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU(), nn.AvgPool3d(2), nn.Flatten()),
        *(nn.Linear(96, 10), nn.ReLU(), nn.Linear(10, 3)),
    )


def pooling() -> nn.Sequential:
    """Max pooling without overlap, and no ReLU, beside which captum misses much of the change."""
    return seeded(nn.Conv3d(2, 6, 3, padding=1), nn.BatchNorm3d(6), nn.MaxPool3d(2), nn.Flatten(), nn.Linear(720, 3))


def seeded(*modules: nn.Module) -> nn.Sequential:
    generator, network = torch.Generator().manual_seed(3), nn.Sequential(*modules)
    for module in network.modules():
        for parameter in module.parameters(recurse=False):
            nn.init.normal_(parameter, 0.0, 0.2, generator)
        if isinstance(module, nn.BatchNorm3d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2, generator)
            nn.init.uniform_(module.running_var, 0.5, 2.0, generator)
            nn.init.uniform_(module.weight, 0.5, 2.0, generator)
    return network.eval()


@pytest.mark.parametrize("build", [sequential, pooling])
@pytest.mark.parametrize("target", [0, 2])
def test_equals_captum_where_captum_is_right(build: Callable[[], nn.Module], target: int) -> None:
    network, x, atlas = build(), draw(2, 2, 10, 12, 8), draw(2, 10, 12, 8, seed=7)
    for start, baseline in ((torch.zeros(2, 10, 12, 8), "zero"), (atlas, mx.Volume(atlas, np.eye(4)))):
        expected = DeepLift(network).attribute(x, start.expand_as(x), target=target).detach()
        change = (network(x) - network(start[None]))[:, target].detach()
        torch.testing.assert_close(expected.flatten(1).sum(1), change, rtol=1e-4, atol=1e-5)
        made = mx.explain(mx.Model(network), x, "deeplift", target=target, baseline=baseline, per_channel=True)
        torch.testing.assert_close(made.data, expected, rtol=1e-3, atol=2e-6 * float(expected.abs().max()))
        summed = mx.explain(mx.Model(network), x, "deeplift", target=target, baseline=baseline)
        torch.testing.assert_close(summed.data, made.data.sum(1, keepdim=True))


def weighted(features: Tensor, target: int = 1) -> Tensor:
    """What each of `features` (N, ...) adds to the score `target`."""
    return Scores(nn.Identity()).double().weight(features[0].numel())[target].reshape(features.shape[1:]) * features


def test_a_linear_network_gets_its_weights_times_the_difference() -> None:
    x, start = draw(2, *SHAPE).double(), draw(2, *SHAPE, seed=7).double()
    # Without an activation, and with one in its linear part only.
    for function in (lambda x: 2 * x + 1, lambda x: F.leaky_relu(2 * x + 1, 1.0)):
        values, _ = exact(function, x, start)
        torch.testing.assert_close(values, weighted(2 * (x - start)))


@pytest.mark.parametrize("function", [F.relu, F.gelu, F.silu, torch.tanh, torch.square, lambda x: x * x.sigmoid()])
def test_a_sum_over_voxels_is_explained_by_its_terms(function: Callable[[Tensor], Tensor]) -> None:
    x, start = draw(2, *SHAPE).double(), draw(2, *SHAPE, seed=7).double()
    values, _ = exact(function, x, start)
    torch.testing.assert_close(values, weighted(function(x) - function(start)))


@pytest.mark.parametrize("product", [operator.mul, torch.mul, lambda a, b: torch.einsum("ncdhw,ncdhw->ncdhw", a, b)])
def test_a_product_is_shared_at_the_midpoint(product: Callable[[Tensor, Tensor], Tensor]) -> None:
    x, start = draw(2, *SHAPE).double(), draw(2, *SHAPE, seed=7).double()
    values, _ = exact(lambda x: product(x[:, :2], x[:, 2:]), x, start)
    d, mean = x - start, (x + start) / 2
    terms = torch.cat([weighted(d[:, :2] * mean[:, 2:]), weighted(mean[:, :2] * d[:, 2:])], 1)
    torch.testing.assert_close(values, terms)


@pytest.mark.parametrize(
    "form",
    [
        lambda v, q: ((v @ q) * v).sum(1, keepdim=True),
        lambda v, q: torch.einsum("ni,ij,nj->n", v, q, v)[:, None],
        lambda v, q: (v[:, None] @ (v @ q.T)[:, :, None])[:, 0],
    ],
)
def test_a_quadratic_form(form: Callable[[Tensor, Tensor], Tensor]) -> None:
    """x'Qx: voxel i receives (x - x')_i ((Q + Q') (x + x') / 2)_i."""
    x, start = draw(2, *SHAPE).double(), draw(2, *SHAPE, seed=7).double()
    q = draw(x[0].numel(), x[0].numel(), seed=8).double()
    values, _ = exact(lambda x: form(x.flatten(1), q), x, start)
    mean = ((x + start) / 2).flatten(1)
    expected = (x - start) * (mean @ (q + q.T)).reshape(x.shape)
    torch.testing.assert_close(values, expected * Scores(nn.Identity()).double().weight(1)[1, 0])


def test_it_is_the_gradient_times_the_difference_where_the_network_is_linear_between() -> None:
    network = sequential().double()
    # Every ReLU is far in its linear part, whatever came before.
    for layer, bias in ((1, 1e2), (5, 1e4), (9, 1e6)):
        nn.init.constant_(network[layer].bias, bias)
    model, x, atlas = mx.Model(network), draw(2, 10, 12, 8), draw(2, 10, 12, 8, seed=7)
    gradient = mx.explain(model, x, "gradient", target=1, per_channel=True).data
    baseline = mx.Volume(atlas, np.eye(4))
    made = mx.explain(model, x, "deeplift", target=1, baseline=baseline, per_channel=True).data
    assert float(gradient.abs().min()) > 0
    torch.testing.assert_close(made, gradient * (x - atlas), rtol=1e-5, atol=1e-8)


def pooled_by_hand(
    x: Tensor, start: Tensor, kernel: int, stride: int, padding: int = 0, dilation: int = 1, ceil: bool = False
) -> Tensor:
    """Each window's change of its maximum goes to the voxel with the larger of both maxima."""
    grid = F.max_pool3d(x, kernel, stride, padding, dilation, ceil).shape[2:]
    weights = Scores(nn.Identity()).double().weight(x.shape[1] * grid.numel())[1].reshape(x.shape[1], *grid)
    found = torch.zeros_like(x)
    for n, c, *cell in itertools.product(range(len(x)), range(x.shape[1]), *map(range, grid)):
        axes = [[i * stride - padding + k * dilation for k in range(kernel)] for i in cell]
        inside = [[p for p in axis if 0 <= p < size] for axis, size in zip(axes, x.shape[2:], strict=True)]
        window = list(itertools.product(*inside))
        at, at_start = (max(window, key=lambda p, t=t: float(t[(n, c, *p)])) for t in (x, start))
        top, top_start = x[(n, c, *at)], start[(n, c, *at_start)]
        found[(n, c, *(at if top > top_start else at_start))] += weights[(c, *cell)] * (top - top_start)
    return found


@pytest.mark.parametrize(
    "how", [(2, 2), (3, 2, 1), (3, 1, 1), (2, 1), (3, 2, 1, 2), (3, 2, 0, 1, True)], ids=lambda how: str(how)
)
def test_max_pooling_equals_a_loop_over_its_windows(how: tuple[int, ...]) -> None:
    x, start = draw(2, 2, 5, 4, 6).double(), draw(2, 2, 5, 4, 6, seed=7).double()
    kernel, stride, padding, dilation, ceil = (*how, 0, 1, False)[: len(how)] + (0, 1, False)[len(how) - 2 :]
    if dilation > 1:
        x, start = x.repeat(1, 1, 1, 2, 1), start.repeat(1, 1, 1, 2, 1).flip(3)
        x, start = x + 0.1 * draw(*x.shape, seed=8), start + 0.1 * draw(*x.shape, seed=9)
    values, change = exact(lambda x: F.max_pool3d(x, *how), x, start)
    torch.testing.assert_close(values, pooled_by_hand(x, start, kernel, stride, padding, dilation, bool(ceil)))
    torch.testing.assert_close(values.flatten(1).sum(1), change)


# Each operator alone adds up exactly.

_MASK = torch.zeros(6).double()
_MASK[2:4] = -torch.inf
_SEEN = draw(6, 6, seed=8) > 0
_SEEN[:, 0] = True


def _halves(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: function(x[:, :2], x[:, 2:])


def _tokens(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    """`function` of queries, keys and values made from the input (N, 4, 5, 4, 6) as (N, 4, 6, 20)."""

    def attending(x: Tensor) -> Tensor:
        t = x.flatten(2, 3).mT
        return function(2 * t, t.tanh() + t, t.flip(-1))

    return attending


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(20, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        t = x.flatten(2, 3).mT.flatten(1, 2)
        return self.attention(t, t, t, need_weights=False)[0]


def _positive(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: function(x * x + 0.3)


def _with_statistics(norm: nn.Module) -> nn.Module:
    norm.running_mean.uniform_(-0.2, 0.2)
    norm.running_var.uniform_(0.5, 2.0)
    return norm


_MONAI = "ELU RELU LEAKYRELU PRELU RELU6 SELU CELU GELU SIGMOID TANH SWISH MEMSWISH MISH GEGLU".split()
_TORCH = (
    "Softplus Hardswish Hardsigmoid Hardtanh Softsign Softshrink Hardshrink Tanhshrink RReLU SiLU GLU ReLU ELU"
).split()

OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    **{f"monai {name}": get_act_layer(name) for name in _MONAI},
    "monai SOFTMAX": get_act_layer(("SOFTMAX", {"dim": 1})),
    "monai LOGSOFTMAX": get_act_layer(("LOGSOFTMAX", {"dim": 1})),
    **{f"nn.{name}": getattr(nn, name)() for name in _TORCH},
    "nn.Threshold": nn.Threshold(0.1, -2.0),
    "nn.GELU tanh": nn.GELU(approximate="tanh"),
    **{name: getattr(torch, name) for name in "square abs sin cos erf expm1 exp exp2 atan asinh tanh".split()},
    **{name: _positive(getattr(torch, name)) for name in "sqrt log log2 log10 log1p rsqrt reciprocal".split()},
    "cube": lambda x: x**3,
    "root": lambda x: (x * x + 0.1) ** 0.5,
    "clamp": lambda x: x.clamp(-0.5, 0.7),
    "in place": lambda x: F.relu_(x + 0),
    "instance norm": get_norm_layer("INSTANCE", 3, 4),
    "instance norm, affine": get_norm_layer(("INSTANCE", {"affine": True}), 3, 4),
    "batch norm": nn.Sequential(_with_statistics(get_norm_layer("BATCH", 3, 4)), nn.ReLU()),
    "instance norm, tracking": nn.Sequential(
        _with_statistics(nn.InstanceNorm3d(4, track_running_stats=True)), nn.ReLU()
    ),
    "group norm": get_norm_layer(("GROUP", {"num_groups": 2}), 3, 4),
    "layer norm": get_norm_layer(("LAYER", {"normalized_shape": SHAPE}), 3, 4),
    "layer norm, last": nn.LayerNorm(6, elementwise_affine=False),
    "rms norm": nn.RMSNorm(6),
    "F.group_norm": lambda x: F.group_norm(x, 2),
    "softmax": lambda x: x.softmax(-1),
    "softmax, large": lambda x: (40 * x).softmax(1),
    "softmax, masked": lambda x: (x + _MASK).softmax(-1),
    "softmax, large and masked": lambda x: (40 * x).masked_fill(_MASK < 0, -torch.inf).softmax(dim=-1),
    "softmin": lambda x: F.softmin(x, dim=1),
    "log_softmax": lambda x: x.log_softmax(1),
    "max pool": nn.MaxPool3d(2),
    "max pool, overlapping": nn.MaxPool3d(3, 2, 1),
    "max pool, dilated": nn.MaxPool3d(3, 2, 1, 2),
    "max pool, ceil": nn.MaxPool3d(3, 2, ceil_mode=True),
    "max pool, indices": lambda x: F.max_pool3d(x, 2, return_indices=True)[0],
    "max pool, torch": lambda x: torch.max_pool3d(x, 3, 2, 1),
    "max pool, stacked": nn.Sequential(nn.MaxPool3d(3, 1, 1), nn.ReLU(), nn.MaxPool3d(3, 2, 1), nn.MaxPool3d(2, 1)),
    "adaptive max pool": nn.AdaptiveMaxPool3d((2, 3, 2)),
    "amax": lambda x: x.amax((-1, -2)),
    "amin": lambda x: x.amin((2, 3, 4), keepdim=True),
    "max": lambda x: x.max(dim=1, keepdim=True).values,
    "max, its first": lambda x: torch.max(x, 2)[0],
    "min": lambda x: torch.min(x, 2).values,
    "maximum": _halves(torch.maximum),
    "maximum, of a constant": lambda x: torch.maximum(torch.tensor(0.2).double(), x),
    "max of two": _halves(torch.max),
    "mul": _halves(torch.mul),
    "mul, itself": lambda x: x * x,
    "mul, broadcast": lambda x: x * x.mean((2, 3, 4), keepdim=True).sigmoid(),
    "mul, in place": lambda x: operator.imul(x + 0, x.flip(1)),
    "matmul": lambda x: x @ x.mT,
    "bmm": lambda x: torch.bmm(x.flatten(1, 3), x.flatten(1, 3).mT),
    "einsum": lambda x: torch.einsum("ncdhi,ncdhj->ncij", x, x.tanh()),
    "einsum, itself": lambda x: torch.einsum("ncdhi,ncdhj->ncij", x, x),
    "addcmul": lambda x: torch.addcmul(x, x, x),
    "attention, matmul": _tokens(lambda q, k, v: (q @ k.mT * 0.3).softmax(-1) @ v),
    "attention, einsum": _tokens(
        lambda q, k, v: torch.einsum("ncij,ncjd->ncid", torch.einsum("ncid,ncjd->ncij", q, k).softmax(-1), v)
    ),
    "attention, fused": _tokens(F.scaled_dot_product_attention),
    "attention, causal": _tokens(lambda *t: F.scaled_dot_product_attention(*t, is_causal=True)),
    "attention, masked": _tokens(lambda *t: F.scaled_dot_product_attention(*t, attn_mask=_SEEN)),
    "attention, module": Attending(),
    "division by a dependent": _halves(lambda a, b: a / b.exp()),
    "division of a constant": lambda x: 2 / (x * x + 0.4),
    "division by its own norm": lambda x: x / (1 + x.square().sum(1, keepdim=True)),
    "normalize": lambda x: F.normalize(x, dim=1),
    "cosine_similarity": _halves(lambda a, b: F.cosine_similarity(a, b, dim=1)),
    "cosine_similarity to a constant": lambda x: F.cosine_similarity(x, draw(*SHAPE, seed=9).double()[None], dim=1),
    "variance": lambda x: x.var(dim=1),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_each_operator_alone_adds_up_exactly(name: str) -> None:
    x, other = draw(2, *SHAPE), draw(2, *SHAPE, seed=7)
    # A quarter is masked, and all of it is a constant, as baselines are.
    starts = [other, torch.where(draw(2, *SHAPE, seed=8) > 0, x, other), torch.full_like(x, -1.0), torch.zeros_like(x)]
    for start in starts:
        values, change = exact(OPERATORS[name], x, start)
        assert bool(values.isfinite().all())
        assert float(change.abs().min()) > 0
        torch.testing.assert_close(values.flatten(1).sum(1), change, rtol=1e-9, atol=1e-11)
        # What did not change has no part in it.
        assert float(values[x == start].abs().sum()) == 0


def test_it_is_finite_where_scan_and_baseline_are_both_zero() -> None:
    """Roots and quotients have no derivative there."""
    x = draw(2, *SHAPE).relu()
    x[:, :, :, 0] = 0
    for name in ("normalize", "cosine_similarity", "max pool, overlapping", "abs"):
        values, change = exact(OPERATORS[name], x, torch.zeros_like(x))
        assert bool(values.isfinite().all())
        torch.testing.assert_close(values.flatten(1).sum(1), change, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("gain", [1.0, 30.0, 300.0])
def test_a_softmax_does_not_explode_whatever_the_logits(gain: float) -> None:
    """Every multiplier of a softmax is a weighted mean of its own derivatives, at most 1 in size."""
    x, start = draw(2, *SHAPE), 0.01 * draw(2, *SHAPE, seed=7)
    values, _ = exact(lambda x: (gain * x).softmax(1), x, start)
    weight = Scores(nn.Identity()).double().weight(x[0].numel())[1].reshape(SHAPE).abs().sum(0)
    assert bool((values.abs() <= gain * (x - start).abs() * weight * 1.001).all())


@pytest.mark.parametrize("name", ["instance norm", "group norm", "layer norm, last", "rms norm", "normalize"])
def test_a_constant_baseline_does_not_explode_under_a_normalisation(name: str) -> None:
    """One over its standard deviation is 300, or 1e12, times what it is for the scan."""
    x = draw(2, *SHAPE)
    for value in (0.0, -1.0):
        values, change = exact(OPERATORS[name], x, torch.full_like(x, value))
        assert float(values.abs().max()) < 10 * float(change.abs().max())


# Networks.

MORE: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...]]] = {
    "resnet50": (
        lambda: nets.ResNet("bottleneck", [1, 1, 1, 1], [4, 8, 8, 16], n_input_channels=1, num_classes=3),
        "classification",
        SIZE,
    ),
    "unet, batch norm": (
        lambda: nets.UNet(3, 1, 3, (4, 8, 16), (2, 2), act="RELU", norm="BATCH"),
        "segmentation",
        SIZE,
    ),
    "unet, instance norm": (lambda: nets.UNet(3, 1, 3, (4, 8, 16), (2, 2), num_res_units=2), "segmentation", SIZE),
    "attention unet": (lambda: nets.AttentionUnet(3, 1, 3, (4, 8, 16), (2, 2)), "segmentation", SIZE),
    "dynunet": (
        lambda: nets.DynUNet(3, 1, 3, [3, 3, 3], [1, 2, 2], [2, 2], filters=[4, 8, 16], res_block=True),
        "segmentation",
        SIZE,
    ),
    "unetr": (
        lambda: nets.UNETR(1, 3, (32, 32, 32), feature_size=4, hidden_size=24, mlp_dim=48, num_heads=2),
        "segmentation",
        (32, 32, 32),
    ),
}


def made(name: str) -> tuple[mx.Model, tuple[int, ...]]:
    if name in NETWORKS:
        return make_model(name), NETWORKS[name][2]
    build, task, size = MORE[name]
    torch.manual_seed(0)
    return mx.Model(with_statistics(build()), task=task), size  # type: ignore[arg-type]


def baseline_by_hand(kind: str, x: Tensor) -> Tensor:
    if kind == "blur":
        return blurred(x, (1.0, 1.0, 1.0))
    return torch.full_like(x, {"zero": 0.0, "minimum": float(x.min()), "mean": float(x.mean())}[kind])


def check_completeness(
    model: mx.Model, x: Tensor, kind: str, target: mx.Target, score: Callable[[Tensor], Tensor]
) -> None:
    """The map of `x` (C, D, H, W) sums to the change of `score` of the output (1, K, ...), and nowhere explodes."""
    found = mx.explain(model, x, "deeplift", target=target, baseline=kind)
    with model.ready(), torch.no_grad():
        scores = [score(model.forward(t[None].to(model.dtype))).double() for t in (x, baseline_by_hand(kind, x))]
    change = float(scores[0] - scores[1])
    # In single precision, what large parts of both signs leave is as exact as they are.
    slack = 1e-6 * float(found.data.abs().sum())
    assert abs(float(found.data.double().sum()) - change) < max(1e-4 * abs(change), slack)
    assert found.residual["completeness"] < max(1e-4, slack / abs(change))
    assert 0 < float(found.data.abs().max()) < 10 * abs(change)


# One is enough where it takes long.
@pytest.mark.parametrize(
    ("name", "kind"), [(n, k) for n in (*NETWORKS, *MORE) for k in KINDS if n != "swinunetr" or k == "minimum"]
)
def test_it_adds_up_in_every_network_for_every_baseline(name: str, kind: str) -> None:
    model, size = made(name)
    x = draw(1, *size, seed=1)
    if model.task == "segmentation":
        check_completeness(model, x, kind, mx.SegmentationTarget(1, within="everywhere"), lambda y: y[0, 1].mean())
    else:
        check_completeness(model, x, kind, mx.ClassTarget(1), lambda y: y[0, 1])


@pytest.mark.parametrize("scan", ["chest_ct_nodule", "chest_ct_mass"])
@pytest.mark.parametrize("which", ["lung_nodule", "lung_nodule_segmentation"])
def test_it_adds_up_in_the_shipped_networks_on_real_scans(which: str, scan: str) -> None:
    model = load_model(path(f"Models/{which}"))
    volume, lesion = (load_volume(path(f"SampleData/{scan}{end}.nrrd")) for end in ("", "_mask"))
    patch = model.prepare(volume, centre(lesion)).x
    bare = mx.Model(model.network, task=model.task, class_names=model.class_names)
    for kind in KINDS:
        if model.task == "segmentation":
            target: mx.Target = mx.SegmentationTarget(1, within="everywhere")
            check_completeness(bare, patch, kind, target, lambda y: y[0, -1].mean())
        else:
            # One score is for the second of two classes.
            check_completeness(bare, patch, kind, mx.ClassTarget("malignant"), lambda y: y[0, -1])


@pytest.mark.parametrize("measure", ["logit", "volume", "dice"])
def test_segmentation_targets_add_up(measure: str) -> None:
    """A volume is a softmax, and Dice a quotient, of what the network says."""
    model, x = make_model("unet"), draw(1, *SIZE, seed=1)
    ball = mx.Volume((draw(1, *SIZE, seed=2) > 0.5).float(), np.eye(4))
    target = mx.SegmentationTarget(1, within=ball, measure=measure)
    found = mx.explain(model, x, "deeplift", target=target)
    with model.ready(), torch.no_grad():
        score, score_start = (model.forward(t[None])[0].double() for t in (x, torch.zeros_like(x)))

    def value(logits: Tensor) -> float:
        soft, mask = logits.softmax(0)[1], ball.data[0].double()
        if measure == "logit":
            return float((logits[1] * mask).sum() / mask.sum())
        inside = float((soft * mask).sum())
        return inside / 1000 if measure == "volume" else 2 * inside / float(soft.sum() + mask.sum())

    change = value(score) - value(score_start)
    assert float(found.data.double().sum()) == pytest.approx(change, rel=1e-4)
    assert found.residual["completeness"] < 1e-4


def test_the_lead_of_a_class_is_the_difference_of_the_maps() -> None:
    model, x = make_model("resnet18"), draw(1, *SIZE)
    lead, *each = mx.explain(model, x, "deeplift", target=[mx.ClassTarget(2, versus=0), 2, 0])
    torch.testing.assert_close(lead.data, each[0].data - each[1].data, rtol=1e-3, atol=1e-6)


# What changes with what is asked, and what does not.


@pytest.mark.parametrize("name", ["resnet18", "unet", "vit", "resnet50"])
def test_swapping_scan_and_baseline_negates_the_map(name: str) -> None:
    model, size = made(name)
    x, atlas = draw(1, *size), draw(1, *size, seed=7)
    target = mx.SegmentationTarget(1, within="everywhere") if model.task == "segmentation" else 1
    there, back = (
        mx.explain(model, one, "deeplift", target=target, baseline=mx.Volume(two, np.eye(4))).data
        for one, two in ((x, atlas), (atlas, x))
    )
    torch.testing.assert_close(there, -back, rtol=1e-3, atol=1e-5 * float(there.abs().max()))


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "unet"])
def test_voxels_that_are_the_baseline_get_nothing(name: str) -> None:
    model, x = make_model(name), draw(1, *SIZE)
    same = draw(1, *SIZE, seed=8) > 0
    atlas = mx.Volume(torch.where(same, x, draw(1, *SIZE, seed=7)), np.eye(4))
    target = mx.SegmentationTarget(1, within="everywhere") if model.task == "segmentation" else 1
    found = mx.explain(model, x, "deeplift", target=target, baseline=atlas)
    assert found.residual["completeness"] < 1e-4
    assert float(found.data[same].abs().max()) == 0 < float(found.data[~same].abs().min())
    nothing = mx.explain(model, x, "deeplift", target=target, baseline=mx.Volume(x, np.eye(4)))
    assert float(nothing.data.abs().max()) == 0


def test_a_batch_is_its_samples_and_every_target_of_a_list_its_own() -> None:
    model, x = make_model("resnet18"), draw(2, 1, *SIZE)
    for kind in KINDS:
        both = mx.explain(model, x, "deeplift", target=[0, 2], baseline=kind)
        for index, found in zip((0, 2), both, strict=True):
            for sample, together in zip(x, found.data, strict=True):
                alone = mx.explain(model, sample, "deeplift", target=index, baseline=kind)
                torch.testing.assert_close(together, alone.data, rtol=1e-3, atol=1e-5 * float(alone.data.abs().max()))
                assert alone.residual["completeness"] < 1e-4


def test_it_costs_two_forwards_and_a_backward() -> None:
    found = mx.explain(make_model("resnet18"), draw(1, *SIZE), "deeplift", target=1)
    assert (found.provenance.forwards, found.provenance.backwards) == (2, 1)
    assert found.provenance.operators["rescale"] == {"relu": 9}


def test_smoothing_keeps_it_complete() -> None:
    found = mx.explain(make_model("resnet18"), draw(1, *SIZE), "deeplift", target=1, samples=3)
    assert found.residual["completeness"] < 1e-4


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.relu() if x.mean() > 0.5 else x.tanh(),
        lambda x: x.relu() if x.mean() > 0.5 else x[:, :2].relu(),
        lambda x: x.relu() if x.mean() > 0.5 else x.relu().tanh(),
        lambda x: x.relu().tanh() if x.mean() > 0.5 else x.relu(),
    ],
    ids=["another operator", "another size", "one more", "one less"],
)
def test_a_network_that_goes_another_way_for_the_baseline_is_refused(function: Callable[[Tensor], Tensor]) -> None:
    x = draw(*SHAPE) + 1
    with pytest.raises(mx.MedXAIError, match="another way for the baseline"):
        mx.explain(mx.Model(Scores(function), channels=4), x, "deeplift", target=1)


@pytest.mark.parametrize(
    "function",
    [lambda x: x.cumprod(1).relu(), lambda x: torch.einsum("ni,nj,nk->nijk", *[x.flatten(1)[:, :6].relu()] * 3)],
)
def test_an_operator_without_a_rule_is_refused(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(mx.MedXAIError, match="no rule for the operator"):
        mx.explain(mx.Model(Scores(function), channels=4), draw(*SHAPE), "deeplift", target=1)
