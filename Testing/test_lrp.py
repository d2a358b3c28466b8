"""LRP against zennit and captum where those are right, closed forms where no peer is, and what it has to add up to."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any, get_args
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captum.attr import LRP as CaptumLRP
from captum.attr._utils.lrp_rules import EpsilonRule
from monai.networks import nets
from small_explanations import NODULE
from torch import Tensor, nn

import MedXAILib as mx
from MedXAILib import registry, resources
from MedXAILib.explainer import Attribution, Question
from MedXAILib.model import Prepared
from MedXAILib.rules.lrp import Name
from MedXAILib.target import as_target


def _zennit() -> tuple[ModuleType, ModuleType]:
    """zennit, which imports torchvision for the names of two classes only, beside any PyTorch."""
    names = ("torchvision", "torchvision.models", "torchvision.models.resnet")
    stand_ins = {name: ModuleType(name) for name in names}
    for block in ("Bottleneck", "BasicBlock"):
        setattr(stand_ins[names[-1]], block, type(block, (nn.Module,), {}))
    with patch.dict(sys.modules, stand_ins):
        from zennit import composites, rules
    return composites, rules


composites, rules = _zennit()

COMPOSITES = get_args(Name)
EPSILON = 1e-6


def scan(*shape: int, seed: int = 6, dtype: torch.dtype = torch.float64) -> Tensor:
    """Values of both signs."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def seeded(build: Callable[[], nn.Module], dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """A network in evaluation mode whose biases and normalisations are of some size."""
    torch.manual_seed(seed)
    network = build()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2.0)
        if (
            isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm))
            and module.weight is not None
        ):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    return network.eval().to(dtype)


def lrp(network: nn.Module, x: Tensor, target: Any = 1, task: Any = "classification", **parameters: Any) -> Attribution:
    """The map for a batch (N, C, *spatial), in the precision of `x`."""
    rank = x.ndim - 2
    model = mx.Model(network, task=task, channels=x.shape[1], spatial_dims=rank)
    with model.ready():
        seen = [Prepared(sample, np.eye(rank + 1)) for sample in x]
        question = Question(model, x, seen, [as_target(target, model)])
        return registry.make("lrp", {"per_channel": True, **parameters}).attribute(question)[0]


def relevance(*args: Any, **parameters: Any) -> Tensor:
    return lrp(*args, **parameters).values


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    """Equal within `tolerance` of the largest value."""
    largest = float(expected.detach().abs().max())
    assert largest > 0, "there is nothing to compare"
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=tolerance * largest)


# --- zennit -----------------------------------------------------------------------------------------------------------


def by_zennit(network: nn.Module, x: Tensor, of_layer: Callable[[int, nn.Module], Any], target: int = 1) -> Tensor:
    """zennit's relevance, `of_layer(i, module)` being the rule of the i-th weighted layer."""
    weighted = [m for m in network.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))]

    def rule(_context: Any, _name: str, module: nn.Module) -> Any:
        if module in weighted:
            return of_layer(weighted.index(module), module)
        if isinstance(module, (nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool3d)):
            return rules.Norm(stabilizer=1e-30)
        return rules.Pass() if isinstance(module, nn.ReLU) else None

    leaf = x.clone().requires_grad_()
    with composites.Composite(module_map=rule).context(network) as observed:
        score = observed(leaf)
        return torch.autograd.grad(score, leaf, F.one_hot(torch.tensor([target]), score.shape[1]) * score.detach())[0]


def plain() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool3d(2),
        nn.Conv3d(4, 6, 3),
        nn.ReLU(),
        nn.AvgPool3d(2),
        nn.Flatten(),
        nn.Linear(48, 16),
        nn.ReLU(),
        nn.Linear(16, 3),
    )


def unusual() -> nn.Module:
    """Overlapping pooling; strided, grouped, dilated and transposed convolutions."""
    return nn.Sequential(
        nn.Conv3d(2, 4, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool3d(3, stride=2, padding=1),
        nn.Conv3d(4, 8, 3, padding=2, dilation=2, groups=2),
        nn.ReLU(),
        nn.ConvTranspose3d(8, 4, 3, stride=2, padding=1, output_padding=1, groups=2),
        nn.ReLU(),
        nn.Conv3d(4, 4, (1, 3, 2), bias=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool3d(2),
        nn.Flatten(),
        nn.Linear(32, 3),
    )


def reflected() -> nn.Module:
    """Padding that is not of zeros, average pooling over a padding, and a convolution of one dimension less."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"),
        nn.ReLU(),
        nn.AvgPool2d(3, stride=2, padding=1),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 6 * 6, 3),
    )


SEQUENTIAL = {
    "plain": (plain, (1, 2, 12, 12, 12)),
    "unusual": (unusual, (1, 2, 13, 12, 11)),
    "2d": (reflected, (1, 2, 12, 12)),
}

IN_ZENNIT = {
    "epsilon": lambda: rules.Epsilon(EPSILON),
    "gamma": lambda: rules.Gamma(0.25, EPSILON),
    "alpha_beta": lambda: rules.AlphaBeta(1, 0, EPSILON),
    "plus": lambda: rules.ZPlus(EPSILON),
}


@pytest.mark.parametrize("name", SEQUENTIAL)
@pytest.mark.parametrize("epsilon", [1e-6, 0.1])
def test_epsilon_equals_zennit(name: str, epsilon: float) -> None:
    build, shape = SEQUENTIAL[name]
    network, x = seeded(build), scan(*shape)
    expected = by_zennit(network, x, lambda i, m: rules.Epsilon(epsilon))
    close(relevance(network, x, composite="epsilon", epsilon=epsilon), expected)


@pytest.mark.parametrize("name", SEQUENTIAL)
@pytest.mark.parametrize("beta", [0, 0.5, 1])
def test_alpha_beta_equals_zennit(name: str, beta: float) -> None:
    build, shape = SEQUENTIAL[name]
    network, x = seeded(build), scan(*shape)
    expected = by_zennit(network, x, lambda i, m: rules.AlphaBeta(1 + beta, beta, EPSILON))
    close(relevance(network, x, composite="alpha_beta", beta=beta), expected)


@pytest.mark.parametrize("name", SEQUENTIAL)
@pytest.mark.parametrize("gamma", [0.25, 2.0])
def test_gamma_equals_zennit(name: str, gamma: float) -> None:
    build, shape = SEQUENTIAL[name]
    network, x = seeded(build), scan(*shape)

    def rule(_i: int, module: nn.Module) -> Any:
        return rules.Epsilon(EPSILON) if isinstance(module, nn.Linear) else rules.Gamma(gamma, EPSILON)

    close(relevance(network, x, composite="gamma", gamma=gamma), by_zennit(network, x, rule))


@pytest.mark.parametrize("name", SEQUENTIAL)
@pytest.mark.parametrize("first", ["same", "flat", "w_square", "z_box"])
@pytest.mark.parametrize("composite", ["epsilon", "epsilon_plus"])
def test_the_rules_of_the_first_layer_equal_zennit(name: str, first: str, composite: str) -> None:
    build, shape = SEQUENTIAL[name]
    network, x = seeded(build), scan(*shape)
    edges = (2, *range(3, x.ndim))
    low, high = x.amin(edges, keepdim=True), x.amax(edges, keepdim=True)
    inner = rules.Epsilon if composite == "epsilon" else rules.ZPlus
    opening = {
        "same": lambda: inner(EPSILON),
        "flat": lambda: rules.Flat(EPSILON),
        "w_square": lambda: rules.WSquare(EPSILON),
        "z_box": lambda: rules.ZBox(low, high, EPSILON),
    }[first]

    def rule(i: int, module: nn.Module) -> Any:
        if i == 0:
            return opening()
        return rules.Epsilon(EPSILON) if isinstance(module, nn.Linear) else inner(EPSILON)

    close(relevance(network, x, composite=composite, first=first), by_zennit(network, x, rule))


@pytest.mark.parametrize("name", SEQUENTIAL)
@pytest.mark.parametrize("composite", ["epsilon_plus", "epsilon_plus_flat"])
def test_named_composites_equal_those_of_zennit(name: str, composite: str) -> None:
    build, shape = SEQUENTIAL[name]
    network, x = seeded(build), scan(*shape)
    leaf = x.clone().requires_grad_()
    # A stabiliser that is nothing, because zennit has one in average pooling too, where none is needed.
    theirs = composites.COMPOSITES[composite](epsilon=1e-12, stabilizer=1e-12)
    with theirs.context(network) as observed:
        score = observed(leaf)
        expected = torch.autograd.grad(score, leaf, score.detach() * torch.tensor([[0.0, 1.0, 0.0]]))[0]
    close(relevance(network, x, composite=composite, epsilon=1e-12), expected, 1e-5)


@pytest.mark.parametrize("composite", COMPOSITES)
def test_the_relevance_at_an_inner_layer_equals_zennit(composite: str) -> None:
    """It is that of the rest of the network for what it is given there."""
    torch.manual_seed(0)
    head = nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv3d(4, 3, 3, padding=1))
    tail = nn.Sequential(nn.ReLU(), nn.Conv3d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6**3, 3))
    network, x = nn.Sequential(head, tail).eval().double(), scan(1, 2, 6, 6, 6)

    def rule(_i: int, module: nn.Module) -> Any:
        key = {"epsilon_plus_flat": "plus", "epsilon_plus": "plus"}.get(composite, composite)
        dense = isinstance(module, nn.Linear) and composite != "alpha_beta"
        return IN_ZENNIT["epsilon" if dense else key]()

    # The units of this layer have their places, so that the map is at the voxels as it is.
    expected = by_zennit(tail, head(x).detach(), rule).sum(1, keepdim=True)
    close(relevance(network, x, composite=composite, layer="0.2"), expected)


# --- captum -----------------------------------------------------------------------------------------------------------


class Flat2d(nn.Module):
    """In 2-D, without layers that captum does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.dense = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(36, 3)
        self.relu1, self.relu2, self.pool, self.average = nn.ReLU(), nn.ReLU(), nn.MaxPool2d(2), nn.AvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu1(self.first(x)))
        return self.dense(self.average(self.relu2(self.second(x))).flatten(1))


@pytest.mark.parametrize("epsilon", [1e-9, 0.05])
def test_epsilon_equals_captum_in_2d(epsilon: float) -> None:
    network, x = seeded(Flat2d), scan(2, 1, 12, 12)
    for module in (network.first, network.second, network.dense):
        module.rule = EpsilonRule(epsilon)
    expected = CaptumLRP(copy.deepcopy(network)).attribute(x.clone(), target=2)
    close(relevance(network, x, 2, composite="epsilon", epsilon=epsilon), expected.detach(), 1e-6)


# --- closed forms -----------------------------------------------------------------------------------------------------


class Formula(nn.Module):
    """`formula(v, a, b, c)` of the scan's voxels v (N, V), with matrices a, b (V, V) and a vector c (V,)."""

    def __init__(self, formula: Callable[..., Tensor], size: int = 24) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(scan(*s, seed=i)) for i, s in enumerate([(size, size)] * 2 + [(size,)]))
        self.bias = nn.Parameter(scan(size, seed=9))
        self.formula = formula

    def forward(self, x: Tensor) -> Tensor:
        score = self.formula(self, x.flatten(1))
        return torch.stack([-score, score], 1)


def exact(formula: Callable[..., Tensor], **parameters: Any) -> tuple[Tensor, Formula, Attribution]:
    """Voxels v, the network, and its relevance for them (V,) by the epsilon rule with an epsilon of 0."""
    network, x = Formula(formula).eval(), scan(1, 1, 2, 3, 4)
    made = lrp(network, x, composite="epsilon", epsilon=0.0, **parameters)
    return x.flatten(), network, Attribution(made.values.flatten(), made.residual)


def test_a_linear_network() -> None:
    v, n, made = exact(lambda n, v: F.linear(v, n.c[None], n.bias[:1])[:, 0])
    close(made.values, n.c * v, 1e-12)
    assert made.residual["conservation"] < 1e-12


def test_a_skip_around_a_rectified_layer() -> None:
    v, n, made = exact(lambda n, v: (F.linear(v, n.a, n.bias).relu() + v) @ n.c)
    active = n.a @ v + n.bias > 0
    close(made.values, v * (n.a.T @ (n.c * active) + n.c), 1e-12)
    assert made.residual["conservation"] < 1e-12


def test_a_concatenation() -> None:
    def formula(n: Formula, v: Tensor) -> Tensor:
        both = torch.cat([F.linear(v, n.a).relu(), F.linear(v, n.b, n.bias).relu()], 1)
        return both @ torch.cat([n.c, n.c.flip(0)])

    v, n, made = exact(formula)
    ways = n.a.T @ (n.c * (n.a @ v > 0)) + n.b.T @ (n.c.flip(0) * (n.b @ v + n.bias > 0))
    close(made.values, v * ways, 1e-12)
    assert made.residual["conservation"] < 1e-12


def test_a_product_is_shared_in_halves() -> None:
    v, n, made = exact(lambda n, v: (F.linear(v, n.a) * F.linear(v, n.b)) @ n.c)
    a, b = n.a @ v, n.b @ v
    close(made.values, v * (n.a.T @ (n.c * b) + n.b.T @ (n.c * a)) / 2, 1e-12)
    assert made.residual["conservation"] < 1e-12


@pytest.mark.parametrize(
    ("square", "tolerance"),
    [
        (lambda x: x * x, 1e-12),
        (torch.square, 1e-12),
        (lambda x: torch.einsum("ni,ni->ni", x, x), 1e-12),
        # A power may be one of 0 that is not 0, for which a stabiliser is needed.
        (lambda x: x**2, 1e-5),
    ],
)
def test_a_square_is_one_however_it_is_written(square: Callable[[Tensor], Tensor], tolerance: float) -> None:
    v, n, made = exact(lambda n, v: square(F.linear(v, n.a)) @ n.c)
    close(made.values, v * (n.a.T @ (n.c * (n.a @ v))), tolerance)
    assert made.residual["conservation"] < 1e-12


@pytest.mark.parametrize("gated", [lambda s, g: s * g, lambda s, g: g * s])
@pytest.mark.parametrize(
    "gate", [torch.sigmoid, lambda z: z.softmax(-1), lambda z: z.sigmoid()[:, None].repeat(1, 1, 1)[:, 0].clone()]
)
def test_a_gate_lets_everything_through_to_what_it_gates(
    gate: Callable[[Tensor], Tensor], gated: Callable[[Tensor, Tensor], Tensor]
) -> None:
    v, n, made = exact(lambda n, v: gated(F.linear(v, n.a), gate(F.linear(v, n.b, n.bias))) @ n.c)
    opened = gate((n.b @ v + n.bias)[None])[0]
    close(made.values, v * (n.a.T @ (n.c * opened)), 1e-12)
    assert made.residual["conservation"] < 1e-12


def test_what_is_divided_by_gets_nothing() -> None:
    v, n, made = exact(lambda n, v: (F.linear(v, n.a) / (F.linear(v, n.b) ** 2 + 1)) @ n.c)
    close(made.values, v * (n.a.T @ (n.c / ((n.b @ v) ** 2 + 1))), 1e-12)
    assert made.residual["conservation"] < 1e-12


def test_a_constant_that_is_divided_takes_all() -> None:
    _, _, made = exact(lambda n, v: (2 / (F.linear(v, n.b) ** 2 + 1)) @ n.c)
    assert not made.values.any()
    assert made.residual["conservation"] < 1e-12


def test_numbers_and_constants_that_are_added_hold_their_share() -> None:
    v, n, made = exact(lambda n, v: F.linear((3 - v) + n.bias - 1.5 + torch.where(v > 0, v, n.bias), n.a) @ n.c)
    close(made.values, torch.where(v > 0, 0 * v, -v) * (n.a.T @ n.c), 1e-12)
    assert made.residual["conservation"] < 1e-12


def test_a_softmax_is_its_tangent() -> None:
    v, n, made = exact(lambda n, v: F.linear(v, n.a * 0.1, n.bias).softmax(-1) @ n.c)
    y = (n.a * 0.1 @ v + n.bias).softmax(0)
    close(made.values, v * (0.1 * n.a.T @ (y * (n.c - y @ n.c))), 1e-12)
    assert made.residual["conservation"] < 1e-12


# --- one weight used twice, and normalisations that become part of a layer --------------------------------------------


class Recurrent(nn.Module):
    """The same convolution and activation twice: as modules, in place, or as functions."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.opening, self.conv, self.dense = (
            nn.Conv3d(1, 4, 3, padding=1),
            nn.Conv3d(4, 4, 3, padding=1),
            nn.Linear(4, 3),
        )
        self.relu = nn.ReLU(inplace=how == "in place")

    def act(self, x: Tensor) -> Tensor:
        if self.how == "function":
            return F.relu(x)
        return torch.relu_(x) if self.how == "underscore" else self.relu(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.opening(x))
        for _ in range(2):
            x = self.act(self.conv(x))
        return self.dense(x.mean((2, 3, 4)))

    def unrolled(self) -> nn.Module:
        conv, again = self.conv, copy.deepcopy(self.conv)
        body = (self.opening, nn.ReLU(), conv, nn.ReLU(), again, nn.ReLU())
        return nn.Sequential(*body, nn.AdaptiveAvgPool3d(1), nn.Flatten(), self.dense)


@pytest.mark.parametrize("how", ["module", "in place", "function", "underscore"])
@pytest.mark.parametrize("composite", COMPOSITES)
def test_shared_weights_are_as_unrolled_ones(how: str, composite: str) -> None:
    network, x = seeded(lambda: Recurrent(how)), scan(1, 1, 6, 6, 6)
    close(relevance(network, x, composite=composite), relevance(network.unrolled(), x, composite=composite), 1e-12)


def merged(weighted: nn.Module, norm: nn.Module) -> nn.Module:
    """What a layer and the batch normalisation after it are together."""
    found = copy.deepcopy(weighted)
    gain = norm.weight / (norm.running_var + norm.eps).sqrt()
    out = weighted.out_channels // weighted.groups if isinstance(weighted, nn.ConvTranspose3d) else len(gain)
    if isinstance(weighted, nn.ConvTranspose3d):
        # Output channels are the second axis there, and each group of inputs has its own.
        of_input = [
            gain.reshape(weighted.groups, out)[i * weighted.groups // weighted.in_channels]
            for i in range(weighted.in_channels)
        ]
        found.weight.data = weighted.weight * torch.stack(of_input)[..., None, None, None]
    else:
        found.weight.data = weighted.weight * gain.reshape(-1, *[1] * (weighted.weight.ndim - 1))
    bias = 0 if weighted.bias is None else weighted.bias
    found.bias = nn.Parameter(norm.bias + (bias - norm.running_mean) * gain)
    return found


FOLLOWED: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "conv": (lambda: nn.Conv3d(2, 6, 3), lambda: nn.BatchNorm3d(6)),
    "conv without bias": (lambda: nn.Conv3d(2, 6, 3, groups=2, bias=False), lambda: nn.BatchNorm3d(6)),
    "transposed": (lambda: nn.ConvTranspose3d(2, 6, 3, stride=2), lambda: nn.BatchNorm3d(6)),
    "transposed in groups": (lambda: nn.ConvTranspose3d(4, 6, 3, groups=2), lambda: nn.BatchNorm3d(6)),
}


@pytest.mark.parametrize("composite", COMPOSITES)
@pytest.mark.parametrize("kind", FOLLOWED)
def test_a_batch_normalisation_is_part_of_the_layer_before_it(kind: str, composite: str) -> None:
    make, norm = FOLLOWED[kind]

    def build() -> nn.Module:
        pair = make(), norm()
        head = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)
        opening = nn.Conv3d(2, pair[0].in_channels, 1), nn.ReLU()
        return nn.Sequential(*opening, *pair, nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), *head)

    network, x = seeded(build), scan(2, 2, 6, 6, 6)
    parts = list(network)
    alone = nn.Sequential(*parts[:2], merged(*parts[2:4]), *parts[4:7], merged(*parts[7:9]), *parts[9:]).eval()
    torch.testing.assert_close(alone(x), network(x))
    found, expected = lrp(network, x, composite=composite), lrp(alone, x, composite=composite)
    close(found.values, expected.values)
    assert found.residual["conservation"] < 1e-10


def test_a_first_layer_is_the_first_with_its_batch_normalisation() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4**3, 3))

    network, x = seeded(build), scan(1, 1, 6, 6, 6)
    alone = nn.Sequential(merged(network[0], network[1]), *network[2:]).eval()
    for first in ("flat", "w_square", "z_box"):
        close(relevance(network, x, first=first), relevance(alone, x, first=first))


@pytest.mark.parametrize("composite", COMPOSITES)
def test_a_batch_normalisation_with_no_layer_before_it_is_linear(composite: str) -> None:
    """As in DenseNet: it is there as a convolution of single voxels would be, by the epsilon rule."""

    def build() -> nn.Module:
        tail = nn.ReLU(), nn.Conv3d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 2**3, 3)
        return nn.Sequential(nn.Conv3d(1, 4, 3), nn.ReLU(), nn.BatchNorm3d(4), *tail)

    network, x = seeded(build), scan(1, 1, 6, 6, 6)
    norm = network[2]
    gain = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
    shift = (norm.bias - norm.running_mean * gain).detach()

    class Linear(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * gain[:, None, None, None] + shift[:, None, None, None]

    alone = nn.Sequential(*network[:2], Linear(), *network[3:]).eval()
    found, expected = lrp(network, x, composite=composite), lrp(alone, x, composite=composite)
    close(found.values, expected.values)
    assert found.residual["conservation"] < 1e-10


def test_a_layer_that_others_read_too_is_not_merged_for_them() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.dense = nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            z = self.conv(x)
            return self.dense((self.norm(z).relu() + z.relu()).mean((2, 3, 4)))

    class Apart(nn.Module):
        def __init__(self, both: Both) -> None:
            super().__init__()
            self.merged, self.conv, self.dense = merged(both.conv, both.norm), both.conv, both.dense

        def forward(self, x: Tensor) -> Tensor:
            return self.dense((self.merged(x).relu() + self.conv(x).relu()).mean((2, 3, 4)))

    network, x = seeded(Both), scan(1, 1, 6, 6, 6)
    for composite in COMPOSITES:
        close(relevance(network, x, composite=composite), relevance(Apart(network), x, composite=composite))


# --- what it adds up to -----------------------------------------------------------------------------------------------

CUBE, WIDE = (16, 16, 16), (32, 32, 32)

CONSERVING: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...]]] = {
    "resnet18": (
        lambda: nets.ResNet("basic", [2, 2, 2, 2], [4, 8, 8, 16], n_input_channels=1, num_classes=3, conv1_t_size=3),
        "classification",
        WIDE,
    ),
    "resnet50": (
        lambda: nets.ResNet(
            "bottleneck",
            [3, 4, 6, 3],
            [4, 4, 8, 8],
            n_input_channels=1,
            num_classes=3,
            conv1_t_size=3,
            shortcut_type="A",
        ),
        "classification",
        WIDE,
    ),
    "densenet121": (
        lambda: nets.DenseNet(3, 1, 3, init_features=8, growth_rate=4, block_config=(6, 12, 24, 16)),
        "classification",
        WIDE,
    ),
    "unet bn relu": (
        lambda: nets.UNet(3, 1, 3, (4, 8, 16), (2, 2), act="RELU", norm="BATCH"),
        "segmentation",
        CUBE,
    ),
    "unet in prelu": (
        lambda: nets.UNet(
            3, 1, 3, (4, 8, 16), (2, 2), num_res_units=2, act="PRELU", norm=("INSTANCE", {"affine": True})
        ),
        "segmentation",
        CUBE,
    ),
    "attention unet": (lambda: nets.AttentionUnet(3, 1, 3, (4, 8, 16), (2, 2)), "segmentation", CUBE),
    "segresnet": (
        lambda: nets.SegResNet(3, 8, 1, 3, blocks_down=(1, 2, 2), blocks_up=(1, 1), norm=("GROUP", {"num_groups": 4})),
        "segmentation",
        CUBE,
    ),
    "dynunet": (
        lambda: nets.DynUNet(
            3,
            1,
            3,
            (3, 3, 3),
            (1, 2, 2),
            (2, 2),
            filters=(4, 8, 16),
            res_block=True,
            deep_supervision=True,
            deep_supr_num=1,
        ),
        "segmentation",
        CUBE,
    ),
    "swinunetr": (
        lambda: nets.SwinUNETR(
            in_channels=1, out_channels=3, feature_size=12, depths=(2, 1, 1, 1), num_heads=(1, 2, 2, 2)
        ),
        "segmentation",
        (64, 32, 32),
    ),
    "unetr": (
        lambda: nets.UNETR(1, 3, CUBE, feature_size=4, hidden_size=24, mlp_dim=48, num_heads=2, norm_name="instance"),
        "segmentation",
        CUBE,
    ),
    "vit": (
        lambda: nets.ViT(
            1,
            CUBE,
            (8, 8, 8),
            hidden_size=24,
            mlp_dim=48,
            num_layers=3,
            num_heads=2,
            classification=True,
            num_classes=3,
        ),
        "classification",
        CUBE,
    ),
    "2d swinunetr": (
        lambda: nets.SwinUNETR(
            in_channels=1, out_channels=3, feature_size=12, depths=(2, 1, 1, 1), num_heads=(1, 2, 2, 2), spatial_dims=2
        ),
        "segmentation",
        (64, 32),
    ),
    "2d unet": (lambda: nets.UNet(2, 1, 3, (4, 8, 16), (2, 2), num_res_units=2), "segmentation", (32, 32)),
    "2d densenet": (
        lambda: nets.DenseNet(2, 1, 3, init_features=8, growth_rate=4, block_config=(2, 2, 2)),
        "classification",
        (32, 32),
    ),
}


@pytest.mark.parametrize("name", CONSERVING)
def test_relevance_is_conserved_on_networks_of_monai(name: str) -> None:
    build, task, size = CONSERVING[name]
    model = mx.Model(seeded(build, torch.float32), task=task)  # type: ignore[arg-type]
    x = scan(1, *size, dtype=torch.float32)
    target = mx.SegmentationTarget(2, within="everywhere") if task == "segmentation" else 2
    # The largest takes long, and is there in 2-D too.
    for composite in COMPOSITES if name != "swinunetr" else ("epsilon", "epsilon_plus_flat"):
        made = mx.explain(model, x, "lrp", target=target, composite=composite, epsilon=1e-6)
        assert made.residual["conservation"] <= 1e-5, composite
        assert made.data.shape == x.shape
        assert made.data.any()


@cache
def trained(name: str) -> tuple[mx.Model, mx.Volume]:
    """A network that is shipped, and a chest CT with a nodule."""
    volume = mx.load_volume(resources.path("SampleData/chest_ct_nodule.nrrd"))
    return mx.load_model(resources.path(f"Models/{name}")), volume


@pytest.mark.parametrize("name", ["lung_nodule", "lung_nodule_segmentation"])
def test_relevance_is_conserved_on_the_trained_networks(name: str) -> None:
    model, volume = trained(name)
    for composite in COMPOSITES:
        made = mx.explain(model, volume, "lrp", region=NODULE, composite=composite)
        assert made.residual["conservation"] <= 1e-5, composite
        assert made.data.any()


def unbiased(network: nn.Module) -> nn.Module:
    """Without any constant that is added to something."""
    for module in network.modules():
        if isinstance(getattr(module, "bias", None), nn.Parameter):
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.zero_()
    return network


@pytest.mark.parametrize("composite", COMPOSITES)
@pytest.mark.parametrize("name", SEQUENTIAL)
def test_without_constants_the_map_adds_up_to_the_score(name: str, composite: str) -> None:
    """Whatever the engine's accounts say."""
    build, shape = SEQUENTIAL[name]
    network, x = unbiased(seeded(build)), scan(*shape)
    score, best = network(x)[0].detach().max(0)
    for first in ("same", "flat", "w_square", "z_box"):
        found = relevance(network, x, int(best), composite=composite, first=first, epsilon=1e-12)
        torch.testing.assert_close(found.sum(), score, rtol=1e-7, atol=0)


@pytest.mark.parametrize("composite", ["epsilon", "gamma"])
@pytest.mark.parametrize("name", ["resnet18", "densenet121", "unet bn relu", "unet in prelu", "segresnet", "dynunet"])
def test_without_constants_the_map_adds_up_to_the_score_on_networks_of_monai(name: str, composite: str) -> None:
    """With z+ it need not: where nothing speaks for a value that is negative, the rule has no place for its share."""
    build, task, size = CONSERVING[name]
    network, x = unbiased(seeded(build)), scan(1, 1, *size)
    where = mx.SegmentationTarget(1, within="everywhere") if task == "segmentation" else 1
    found = relevance(network, x, where, task, composite=composite, epsilon=1e-12)
    torch.testing.assert_close(found.sum(), network(x)[0, 1].mean().detach(), rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "unet bn relu"])
def test_the_first_rule_of_all_is_gradient_times_input_without_constants(name: str) -> None:
    """Euler's theorem, as a rectified network without biases is homogeneous."""
    build, task, size = CONSERVING[name]
    network, x = unbiased(seeded(build)), scan(1, 1, *size)
    target = mx.SegmentationTarget(1, within="everywhere") if task == "segmentation" else 1
    leaf = x.clone().requires_grad_()
    network(leaf)[:, 1].mean().backward()
    close(relevance(network, x, target, task, composite="epsilon", epsilon=0.0), x * leaf.grad)


@pytest.mark.parametrize("composite", COMPOSITES)
def test_the_relevance_of_every_layer_adds_up(composite: str) -> None:
    network, x = seeded(CONSERVING["resnet18"][0]), scan(1, 1, *WIDE)
    for layer in ("conv1", "bn1", "maxpool", "layer1.0.conv1", "layer1.0.bn1", "layer2.0", "layer3", "layer4.1"):
        assert lrp(network, x, composite=composite, layer=layer).residual["conservation"] < 1e-9, layer


@pytest.mark.parametrize("layer", ["0", "1", "2", "3", "4"])
def test_the_relevance_of_a_layer_is_that_of_the_rest_of_the_network(layer: str) -> None:
    """Not the rule of the first layer, where it is not: the rest is not told where it begins."""
    network, x = seeded(plain), scan(1, 2, 12, 12, 12)
    k = int(layer) + 1
    head, tail = network[:k], network[k:]
    made = lrp(network, x, composite="epsilon_plus_flat", layer=layer)
    rest = lrp(tail, head(x).detach(), composite="epsilon_plus")
    assert made.residual["conservation"] < 1e-10
    assert rest.residual["conservation"] < 1e-10
    if head(x).shape[2:] == x.shape[2:]:
        close(made.values, rest.values.sum(1, keepdim=True))


# --- segmentation, channels, ties, precision --------------------------------------------------------------------------


@pytest.mark.parametrize("measure", ["logit", "volume", "dice"])
@pytest.mark.parametrize("composite", COMPOSITES)
def test_relevance_of_a_segmentation_is_conserved(measure: str, composite: str) -> None:
    network = seeded(lambda: nets.UNet(3, 2, 3, (4, 8), (2,), num_res_units=1), torch.float32)
    model = mx.Model(network, task="segmentation")
    x = scan(2, 12, 10, 8, dtype=torch.float32)
    mask = torch.zeros(1, 12, 10, 8)
    mask[:, 3:8, 2:7, 2:6] = 1
    for within in ("predicted", "everywhere", mx.Volume(mask, np.eye(4)), ((1, 2, 2), (5, 6, 7))):
        target = mx.SegmentationTarget(1, within=within, measure=measure)  # type: ignore[arg-type]
        made = mx.explain(model, x, "lrp", target=target, composite=composite)
        assert made.residual["conservation"] <= 1e-5, within


def test_maps_of_channels_sum_to_the_map() -> None:
    model, x = mx.Model(seeded(plain, torch.float32)), scan(2, 12, 12, 12, dtype=torch.float32)
    for composite in COMPOSITES:
        single = mx.explain(model, x, "lrp", target=0, composite=composite)
        each = mx.explain(model, x, "lrp", target=0, composite=composite, per_channel=True)
        assert single.data.shape == (1, 12, 12, 12)
        close(each.data.sum(0, keepdim=True), single.data, 1e-5)
        assert single.residual == each.residual


def test_a_batch_gives_the_maps_of_its_samples_and_targets_those_of_each() -> None:
    network, x = seeded(plain), scan(3, 2, 12, 12, 12)
    for composite in COMPOSITES:
        for first in ("same", "z_box"):
            both = relevance(network, x, composite=composite, first=first)
            alone = torch.cat([relevance(network, x[i : i + 1], composite=composite, first=first) for i in range(3)])
            close(both, alone, 1e-12)
    model, sample = mx.Model(network.float()), x[0].float()
    together = mx.explain(model, sample, "lrp", target=[0, 1, 2])
    for i, made in enumerate(together):
        alone = mx.explain(model, sample, "lrp", target=i)
        close(made.data, alone.data, 1e-6)
        assert made.residual["conservation"] == pytest.approx(alone.residual["conservation"], abs=1e-6)


def test_equal_maxima_share_what_comes_back() -> None:
    class Pooled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.max_pool3d(x, 2).sum((1, 2, 3, 4))[:, None].repeat(1, 2)

    close(
        relevance(Pooled(), torch.full((1, 1, 4, 4, 4), 3.0), composite="epsilon"), torch.full((1, 1, 4, 4, 4), 3 / 8)
    )


@pytest.mark.parametrize("pool", [nn.MaxPool3d(3, 2, 1), nn.MaxPool3d(3, 1), nn.AdaptiveMaxPool3d(3)])
def test_a_mirrored_scan_has_a_mirrored_map(pool: nn.Module) -> None:
    def build() -> nn.Module:
        conv = nn.Conv3d(1, 3, 3, padding=1)
        with torch.no_grad():
            # Of few digits, so that what is equal stays equal whatever the order of the sum.
            conv.weight.copy_((conv.weight * 64).round() / 8)
            conv.bias.copy_((conv.bias * 64).round() / 8)
            for axis in (2, 3, 4):
                conv.weight.copy_(conv.weight + conv.weight.flip(axis))
        return nn.Sequential(conv, nn.ReLU(), pool, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(3, 2))

    x = torch.full((1, 1, 9, 9, 9), 0.5, dtype=torch.float64)
    x[..., 2:7, 3:6, 4] = 2
    for composite in COMPOSITES:
        found = relevance(seeded(build), x, composite=composite)
        for axis in (2, 3, 4):
            close(found.flip(axis), found, 1e-9)


def test_a_lower_precision_gives_nearly_the_same_map() -> None:
    model, volume = trained("lung_nodule")
    for composite in ("epsilon", "gamma", "epsilon_plus_flat"):
        exact = mx.explain(model, volume, "lrp", region=NODULE, composite=composite)
        made = mx.explain(model, volume, "lrp", region=NODULE, composite=composite, run=mx.Run(precision="bfloat16"))
        assert made.data.dtype == torch.float32
        assert made.residual["conservation"] < 0.02
        assert float(torch.corrcoef(torch.stack([made.data.flatten(), exact.data.flatten()]))[0, 1]) > 0.97


def test_nothing_of_the_network_changes() -> None:
    network, x = seeded(lambda: Recurrent("in place"), torch.float32).train(), scan(1, 6, 6, 6, dtype=torch.float32)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    given = x.clone()
    mx.explain(mx.Model(network), x, "lrp", target=1)
    assert network.training and network.relu.inplace
    assert torch.equal(x, given)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in network.parameters())
