"""Operators are seen while the forward runs: every way of writing one, what cannot be seen, and what is counted."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from monai.networks import nets
from torch import Tensor, nn

import MedXAILib as mx
from MedXAILib import registry
from MedXAILib.engines.decompositions import DECOMPOSED
from MedXAILib.engines.rules import Composite, Interception
from MedXAILib.engines.seeing import intercepting
from MedXAILib.errors import MedXAIError
from MedXAILib.explainer import Attribution, Question
from MedXAILib.model import Prepared
from MedXAILib.rules import lrp
from MedXAILib.rules.rectified import Deconvolved, Guided, rectified

COMPOSITES: dict[str, Composite] = {
    **{name: lrp.composite(name, 1e-6, 0.25, 0.5) for name in ("epsilon", "gamma", "alpha_beta", "epsilon_plus_flat")},
    "z_box": lrp.composite("epsilon", 1e-6, 0.25, 0.5, "z_box"),
    "guided": rectified(Guided()),
    "deconvolved": rectified(Deconvolved()),
}


def scan(*shape: int, seed: int = 6) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(build: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    """A network in evaluation mode whose normalisations do something."""
    torch.manual_seed(0)
    network = build()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2.0)
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim == 1:
            nn.init.uniform_(weight, 0.5, 1.5)
    return network.eval().to(dtype)


class Does(nn.Module):
    """A convolution, `work` on its activations, and a mean for each of them."""

    def __init__(self, work: Callable[[Tensor], Any], channels: int = 4) -> None:
        super().__init__()
        self.conv, self.work = nn.Conv3d(1, channels, 3, padding=1), work

    def forward(self, x: Tensor) -> Tensor:
        return self.work(self.conv(x)).flatten(2).mean(2)


SHAPE = (1, 6, 6, 6)


def maps(network: nn.Module, method: str = "lrp", x: Tensor | None = None, **parameters: Any) -> mx.SaliencyMap:
    x = scan(*SHAPE).float() if x is None else x
    model = mx.Model(network.float(), channels=len(x), spatial_dims=x.ndim - 1)
    return mx.explain(model, x, method, target=1, **parameters)


def outputs(network: nn.Module, x: Tensor, composite: Composite) -> Any:
    """What the network gives for x (N, C, *spatial) while `composite` is on."""
    model = mx.Model(network, channels=x.shape[1], spatial_dims=x.ndim - 2)
    mode = Interception(composite)
    with model.ready(), intercepting(model, mode):
        return network(mode.start(x))


# --- in place ---------------------------------------------------------------------------------------------------------


def _added(z: Tensor) -> Tensor:
    z += 0.5
    z *= 2
    z -= z.relu() / 3
    return z.relu()


def _underscored(z: Tensor) -> Tensor:
    z.add_(0.5).mul_(2).sub_(z.relu().div_(3))
    return z.relu_()


def _assigned(z: Tensor) -> Tensor:
    out = torch.zeros_like(z)
    out[:, :2] = z[:, :2].relu()
    out[:, 2:] = z[:, 2:]
    out[..., 0] = 1.0
    return out


def _assembled(z: Tensor) -> Tensor:
    out = torch.cat([z[:, :2].relu(), z[:, 2:]], 1)
    return torch.cat([torch.ones_like(out[..., :1]), out[..., 1:]], -1)


def _filled(z: Tensor) -> Tensor:
    out = torch.empty_like(z)
    out.copy_(z.relu())
    out.masked_fill_(torch.arange(6) == 2, 0.0)
    return out.clamp_(max=0.3)


INPLACE: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "nn.ReLU": (nn.ReLU(inplace=True), torch.relu),
    "F.relu": (lambda z: F.relu(z, inplace=True), torch.relu),
    "F.relu_": (F.relu_, torch.relu),
    "torch.relu_": (torch.relu_, torch.relu),
    "Tensor.relu_": (lambda z: z.relu_(), torch.relu),
    "relu_ whose result is ignored": (lambda z: (z.relu_(), z)[1], torch.relu),
    "nn.LeakyReLU": (nn.LeakyReLU(0.2, inplace=True), nn.LeakyReLU(0.2)),
    "nn.ELU": (nn.ELU(inplace=True), nn.ELU()),
    "nn.SiLU": (nn.SiLU(inplace=True), nn.SiLU()),
    "nn.Hardswish": (nn.Hardswish(inplace=True), nn.Hardswish()),
    "nn.ReLU6": (nn.ReLU6(inplace=True), nn.ReLU6()),
    "nn.Threshold": (nn.Threshold(0.1, 0.0, inplace=True), nn.Threshold(0.1, 0.0)),
    "+= *= -=": (_added, lambda z: (lambda y: (y - y.relu() / 3).relu())((z + 0.5) * 2)),
    "add_ mul_ sub_ div_": (_underscored, lambda z: (lambda y: (y - y.relu() / 3).relu())((z + 0.5) * 2)),
    "setitem": (_assigned, _assembled),
    "copy_ masked_fill_ clamp_": (
        _filled,
        lambda z: z.relu().masked_fill(torch.arange(6) == 2, 0.0).clamp(max=0.3),
    ),
    "add_ with alpha": (lambda z: z.relu().add_(z, alpha=0.5), lambda z: z.relu() + 0.5 * z),
    "a skip in place": (lambda z: z.relu().add_(z).relu_(), lambda z: (z.relu() + z).relu()),
}


@pytest.mark.parametrize("composite", COMPOSITES)
@pytest.mark.parametrize("how", INPLACE)
def test_work_in_place_is_as_work_on_copies(how: str, composite: str) -> None:
    inplace, copying = (seeded(lambda work=work: Does(work)) for work in INPLACE[how])
    x = scan(1, *SHAPE)
    rules = COMPOSITES[composite]
    found, gradients = [], []
    for network in (inplace, copying):
        leaf: list[Tensor] = []
        model = mx.Model(network, channels=1)
        mode = Interception(rules)
        with model.ready(), intercepting(model, mode):
            leaf.append(mode.start(x))
            found.append(network(leaf[0]))
        gradients.append(torch.autograd.grad(found[-1][:, 1].sum() + found[-1][:, 3].sum(), leaf[0])[0])
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0].detach(), inplace(x).detach())
    torch.testing.assert_close(gradients[0], gradients[1])
    assert gradients[0].any()


@pytest.mark.parametrize("method", ["lrp", "guided_backprop", "deeplift"])
@pytest.mark.parametrize(
    "work",
    [
        lambda z: (z[:, :2].relu_(), z)[1],
        lambda z: (z.flatten(2).relu_(), z * 2)[1].relu(),
        lambda z: (lambda half: (z.relu_(), half.repeat(1, 2, 1, 1, 1))[1])(z[:, :2]),
        lambda z: (z.chunk(2, 1)[0].add_(1.0), z.relu())[1],
    ],
)
def test_a_view_of_what_was_changed_in_place_is_refused(work: Callable[[Tensor], Tensor], method: str) -> None:
    with pytest.raises(MedXAIError, match="in place and then uses another view"):
        maps(seeded(lambda: Does(work)), method)


def test_a_view_that_is_made_afterwards_is_followed() -> None:
    def work(z: Tensor) -> Tensor:
        z.relu_()
        return torch.cat([z[:, :2], z[:, 2:] * 2], 1)

    def copying(z: Tensor) -> Tensor:
        z = z.relu()
        return torch.cat([z[:, :2], z[:, 2:] * 2], 1)

    found, expected = (maps(seeded(lambda f=f: Does(f)), composite="epsilon") for f in (work, copying))
    assert torch.equal(found.data, expected.data)


# --- what cannot be seen, and what there is no rule for ---------------------------------------------------------------


METHODS = ["lrp", "deeplift", "guided_backprop", "deconvnet"]


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 4, 3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.inner = torch.jit.script(nn.Sequential(nn.ReLU(), nn.Conv3d(4, 3, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.conv(x)).mean((2, 3, 4))


class OptimizedModule(nn.Module):
    """As torch.compile calls what it gives; `compiled` does not run."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self._orig_mod = inner

    def forward(self, x: Tensor) -> Tensor:
        return self._orig_mod(x)


@pytest.mark.parametrize("method", METHODS)
def test_a_part_in_torchscript_is_refused_by_its_name(method: str) -> None:
    with pytest.raises(MedXAIError, match=r"Layer 'inner' is TorchScript.*gradient or integrated_gradients"):
        maps(Scripted().eval(), method)


@torch.jit.script
def scripted(z: Tensor) -> Tensor:
    return z * 3


@pytest.mark.parametrize("method", ["deeplift", "guided_backprop", "deconvnet"])
def test_a_function_in_torchscript_is_refused(method: str) -> None:
    with pytest.raises(MedXAIError, match=r"cannot be looked into .*MulBackward.*use gradient or integrated_gradients"):
        maps(seeded(lambda: Does(lambda z: z.relu() + scripted(z))), method)


@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_part_is_refused_by_its_name(method: str) -> None:
    inside = nn.Sequential(OptimizedModule(nn.Conv3d(1, 3, 3)), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten())
    with pytest.raises(MedXAIError, match=r"Layer '0' is compiled"):
        maps(inside.eval(), method)
    real = torch.compile(nn.Sequential(nn.Conv3d(1, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten()))
    with pytest.raises(MedXAIError, match=r"OptimizedModule is compiled"):
        maps(real.eval(), method)


UNKNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "erfinv": lambda z: torch.erfinv(z.tanh() * 0.9),
    "digamma": lambda z: torch.digamma(z.abs() + 1),
    "cumprod": lambda z: z.cumprod(2),
    "lgamma": lambda z: (z.abs() + 1).lgamma(),
    "hypot": lambda z: torch.hypot(z, z + 1),
}


@pytest.mark.parametrize("method", ["lrp", "deeplift"])
@pytest.mark.parametrize("name", UNKNOWN)
def test_an_operator_without_a_rule_is_refused_by_its_name(name: str, method: str) -> None:
    with pytest.raises(MedXAIError, match=f"no rule for the operator '{name}'"):
        maps(seeded(lambda: Does(lambda z: UNKNOWN[name](z.relu()))), method)


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_operator_without_a_rule_sends_its_gradient_in_guided_backpropagation(name: str) -> None:
    x = scan(*SHAPE).float()
    network = seeded(lambda: Does(lambda z: UNKNOWN[name](z) + z.relu()), torch.float32)
    made = maps(network, "guided_backprop", x)
    assert made.provenance.operators["passed through"][name] == 1
    # By hand: the activation sends back what is positive of 1/n, which is all of it, where its input is.
    leaf = x[None].clone().requires_grad_()
    network(leaf)[:, 1].sum().backward()
    torch.testing.assert_close(made.data, leaf.grad[0], rtol=1e-4, atol=1e-7)


def test_a_network_without_anything_that_has_a_rule_is_refused() -> None:
    for method in ("guided_backprop", "deconvnet"):
        with pytest.raises(MedXAIError, match="use gradient"):
            maps(seeded(lambda: Does(lambda z: z * 2)), method)


def test_a_network_that_is_not_differentiable_is_refused() -> None:
    with pytest.raises(MedXAIError, match=r"no operator that this method is for|not differentiable"):
        maps(seeded(lambda: Does(lambda z: z.relu().detach())))


# --- coverage ---------------------------------------------------------------------------------------------------------


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.again, self.dense = nn.Conv3d(1, 4, 3), nn.Conv3d(4, 4, 3, padding=1), nn.Linear(4, 3)
        self.norm, self.inner = nn.BatchNorm3d(4), nn.InstanceNorm3d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu()
        y = x
        for _ in range(3):
            y = F.gelu(self.again(y))
        x = F.max_pool3d(self.inner(x + y), 2)
        x = x * x.sigmoid()
        return self.dense(x.flatten(2).mean(2)) / 2


def test_operators_are_counted_and_kept_with_the_map(tmp_path: Path) -> None:
    made = maps(seeded(Counted), composite="epsilon_plus_flat")
    expected = {
        "flat": {"conv": 1, "batch_norm": 1},
        "z+": {"conv": 3},
        "passing": {"relu": 1, "gelu": 3, "sigmoid": 1},
        "statistics held": {"instance_norm": 1},
        "winner takes all": {"max_pool": 1},
        "shared": {"mul": 1},
        "epsilon": {"linear": 1},
    }
    operators = made.provenance.operators
    passed = operators["passed through"]
    assert {rule: met for rule, met in operators.items() if rule != "passed through"} == expected
    assert {k: passed[k] for k in ("flatten", "mean")} == {"flatten": 1, "mean": 1}
    assert sum(passed[name] for name in passed if "add" in name) == 1
    assert mx.load_explanation(made.save(tmp_path / "map")).provenance.operators == operators
    again = mx.recompute(made, mx.Model(seeded(Counted).float(), channels=1), scan(*SHAPE).float())
    assert again.provenance.operators == operators
    # Noise makes more forwards of the same network.
    noisy = maps(seeded(Counted), composite="epsilon_plus_flat", samples=3).provenance.operators
    assert {rule: met for rule, met in noisy.items() if rule != "passed through"} == expected


def test_methods_without_rules_count_nothing() -> None:
    assert maps(seeded(Counted), "gradient").provenance.operators == {}


# --- decompositions ---------------------------------------------------------------------------------------------------


def agree(native: Callable[..., Tensor], found: Callable[..., Tensor], *given: Tensor) -> None:
    """The same values, and the same gradients of a random sum of them."""
    results = []
    for work in (native, found):
        leaves = [t.clone().requires_grad_() for t in given]
        y = work(*leaves)
        gradients = torch.autograd.grad((y * scan(1, *y.shape, seed=3)).sum(), leaves, allow_unused=True)
        results.append((y.detach(), *gradients))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-10)


HIDDEN = torch.tensor([[0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1], [1, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0] * 6]) > 0

ATTENTION: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "bool mask": {"attn_mask": ~HIDDEN},
    "float mask": {"attn_mask": scan(5, 6, seed=8)},
    "mask of heads": {"attn_mask": scan(2, 4, 5, 6, seed=8)},
    "infinite mask": {"attn_mask": torch.zeros(5, 6, dtype=torch.float64).masked_fill(HIDDEN, -torch.inf)},
    "scale": {"scale": 0.3},
    "queries in groups": {"enable_gqa": True},
}


@pytest.mark.parametrize("how", ATTENTION)
def test_attention_is_its_decomposition(how: str) -> None:
    options = ATTENTION[how]
    heads = 2 if options.get("enable_gqa") else 4
    given = scan(2, 4, 5, 8), scan(2, heads, 6, 8, seed=1), scan(2, heads, 6, 3, seed=2)
    agree(
        lambda *t: F.scaled_dot_product_attention(*t, **options),
        lambda *t: DECOMPOSED["scaled_dot_product_attention"](*t, **options),
        *given,
    )


def attending(network: nn.Module, x: Tensor, **options: Any) -> None:
    """A module of attention gives the same in parts as whole, and where no part has a rule, the same comes back."""
    network = network.double().eval()
    model = mx.Model(network)
    leaf = x.clone().requires_grad_()
    with torch.enable_grad():
        first = network(leaf, **options)
    first = first[0] if isinstance(first, tuple) else first
    (expected,) = torch.autograd.grad((first * scan(*first.shape, seed=3)).sum(), leaf)
    mode = Interception(Composite((), strict=False))
    with model.ready(), intercepting(model, mode):
        start = mode.start(x)
        found = network(start, **options)
        found = found[0] if isinstance(found, tuple) else found
    torch.testing.assert_close(found, first, rtol=1e-9, atol=1e-10)
    (gradient,) = torch.autograd.grad((found * scan(*found.shape, seed=3)).sum(), start)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-10)
    assert "softmax" in mode.book.met["passed through"]


class SelfAttention(nn.Module):
    """Attention of a sequence to itself, or to a part or another of it."""

    def __init__(self, keys: Callable[[Tensor], Tensor] = lambda x: x, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.keys = nn.MultiheadAttention(8, 2, **options), keys
        for name, p in self.attention.named_parameters():
            if "bias" in name:
                nn.init.uniform_(p, -0.5, 0.5)

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        keys = self.keys(x)
        return self.attention(x, keys, keys, **options)


PADDED = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 1, 1, 1]]) > 0
ONWARD = torch.ones(5, 5).triu(1) > 0

HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "without weights": {"need_weights": False},
    "padding": {"key_padding_mask": PADDED},
    "padding of numbers": {"key_padding_mask": torch.zeros(2, 5, dtype=torch.float64).masked_fill(PADDED, -5.0)},
    "mask": {"attn_mask": ONWARD},
    "mask of numbers": {"attn_mask": scan(5, 5, seed=8)},
    "mask of heads": {"attn_mask": scan(4, 5, 5, seed=8)},
    "bool mask of heads": {"attn_mask": (scan(4, 5, 5, seed=8) > 0.8) & ~torch.eye(5, dtype=torch.bool)},
    "causal": {"attn_mask": ONWARD, "is_causal": True},
    "causal without weights": {"attn_mask": ONWARD, "is_causal": True, "need_weights": False},
    "both": {"attn_mask": ONWARD, "key_padding_mask": PADDED},
    "both, of numbers": {
        "attn_mask": scan(5, 5, seed=8),
        "key_padding_mask": torch.zeros(2, 5, dtype=torch.float64).masked_fill(PADDED, -5.0),
    },
    "weights of each head": {"average_attn_weights": False},
}


@pytest.mark.parametrize("how", HEADS)
@pytest.mark.parametrize("batch_first", [True, False])
def test_multi_head_attention_is_its_decomposition(how: str, batch_first: bool) -> None:
    x = scan(2, 5, 8) if batch_first else scan(5, 2, 8)
    attending(SelfAttention(batch_first=batch_first), x, **HEADS[how])


@pytest.mark.parametrize("mask", [ONWARD, ONWARD.expand(4, 5, 5), scan(5, 5, seed=8)])
@pytest.mark.parametrize("padding", [None, PADDED])
def test_attention_as_a_function_is_its_decomposition(mask: Tensor, padding: Tensor | None) -> None:
    """Which takes masks as they are; the module makes numbers of them first."""
    weights, last = scan(24, 8), scan(8, 8, seed=4)
    bias = scan(24, seed=5), None, None, False, 0.0, last, None, False, padding, True, mask

    def through(attention: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
        return lambda x: attention(x, x, x, 8, 2, weights, *bias)[0]

    agree(through(F.multi_head_attention_forward), through(DECOMPOSED["multi_head_attention_forward"]), scan(5, 2, 8))


@pytest.mark.parametrize("how", ["without bias", "other keys", "of one sequence", "of one sequence with a mask"])
def test_other_multi_head_attention_is_its_decomposition(how: str) -> None:
    if how == "without bias":
        attending(SelfAttention(bias=False, batch_first=True), scan(2, 5, 8))
    elif how == "other keys":
        attending(SelfAttention(lambda x: x[:, :3, :6], kdim=6, vdim=6, batch_first=True), scan(2, 5, 8))
    elif how == "of one sequence":
        attending(SelfAttention(), scan(5, 8))
    else:
        attending(SelfAttention(), scan(5, 8), key_padding_mask=PADDED[0], attn_mask=ONWARD)


@pytest.mark.parametrize(
    "options", [{"add_bias_kv": True}, {"add_zero_attn": True}, {"add_bias_kv": True, "add_zero_attn": True}]
)
def test_multi_head_attention_with_more_keys_than_it_is_given(options: dict[str, Any]) -> None:
    for how in ("plain", "mask", "both"):
        attending(SelfAttention(batch_first=True, **options), scan(2, 5, 8), **HEADS[how])


@pytest.mark.parametrize("how", ["plain", "padding", "both", "weights of each head"])
def test_the_weights_of_attention_can_be_used(how: str) -> None:
    class Reading(SelfAttention):
        def forward(self, x: Tensor, **options: Any) -> Tensor:
            result, weights = super().forward(x, **options)
            return result * (weights if weights.ndim == 3 else weights.mean(1)).amax(-1, keepdim=True)

    attending(Reading(batch_first=True), scan(2, 5, 8), **HEADS[how])


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_transformer_layer_is_its_parts(norm_first: bool, activation: str) -> None:
    """In evaluation mode PyTorch has a kernel for all of it, which would hide what is inside."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.1, activation, batch_first=True, norm_first=norm_first)
    attending(layer, scan(2, 5, 8))
    attending(layer, scan(2, 5, 8), src_key_padding_mask=PADDED)
    attending(layer, scan(2, 5, 8), src_mask=ONWARD)
    attending(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), scan(2, 5, 8))


def composed(native: Callable[..., Tensor], *given: Tensor) -> None:
    """An operator under rules gives the same and, none of its parts having one, sends back the same."""

    def intercepted(*leaves: Tensor) -> Tensor:
        mode = Interception(Composite((), strict=False))
        with mode:
            # What a network computed before, known to depend on the input.
            return native(*(leaf * 1 for leaf in leaves))

    agree(native, intercepted, *given)


A, B, C = scan(3, 4, 5), scan(3, 4, 5, seed=1), scan(3, 4, 5, seed=2)

PARTS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "normalize": (F.normalize, (A,)),
    "normalize along": (lambda a: F.normalize(a, dim=-1), (A,)),
    "normalize by a sum": (lambda a: F.normalize(a, 1.0), (A,)),
    "normalize by a cube": (lambda a: F.normalize(a, p=3, dim=2), (A,)),
    "normalize of little": (lambda a: F.normalize(a * 0.01, 2.0, 2, 0.5), (A,)),
    "cosine_similarity": (F.cosine_similarity, (A, B)),
    "cosine_similarity along": (lambda a, b: torch.cosine_similarity(a, b, dim=-1, eps=1e-3), (A, B)),
    "glu": (F.glu, (scan(3, 4, 6),)),
    "glu along": (lambda a: F.glu(a, 1), (A,)),
    "nn.GLU": (lambda a: nn.GLU(dim=1)(a), (A,)),
    "addmm": (torch.addmm, (A[0], scan(4, 3), scan(3, 5))),
    "addmm scaled": (lambda a, b, c: torch.addmm(a, b, c, beta=0.5, alpha=2), (A[0], scan(4, 3), scan(3, 5))),
    "Tensor.addmm": (lambda a, b, c: a.addmm(b, c), (A[0], scan(4, 3), scan(3, 5))),
    "baddbmm": (torch.baddbmm, (A, scan(3, 4, 2), scan(3, 2, 5))),
    "baddbmm scaled": (lambda a, b, c: torch.baddbmm(a, b, c, beta=3, alpha=-1), (A, scan(3, 4, 2), scan(3, 2, 5))),
    "addcmul": (torch.addcmul, (A, B, C)),
    "addcmul scaled": (lambda a, b, c: torch.addcmul(a, b, c, value=0.3), (A, B, C)),
    "lerp": (lambda a, b: torch.lerp(a, b, 0.3), (A, B)),
    "lerp by tensor": (torch.lerp, (A, B, C)),
    "log_softmax": (lambda a: F.log_softmax(a, 1), (A,)),
    "log_softmax of": (lambda a: F.log_softmax(a, dim=-1), (A,)),
    "torch.log_softmax": (lambda a: torch.log_softmax(a, 1), (A,)),
    "Tensor.log_softmax": (lambda a: a.log_softmax(dim=2), (A,)),
    "nn.LogSoftmax": (lambda a: nn.LogSoftmax(1)(a), (A,)),
    "softmin": (lambda a: F.softmin(a, dim=1), (A,)),
    "nn.Softmin": (lambda a: nn.Softmin(1)(a), (A,)),
    "in place": (lambda a, b, c: (a * 1).addcmul_(b, c, value=2).lerp_(b, 0.5), (A, B, C)),
    "var": (torch.var, (A,)),
    "var biased": (lambda a: torch.var(a, False), (A,)),
    "var unbiased word": (lambda a: a.var(unbiased=False), (A,)),
    "var along": (lambda a: a.var(1), (A,)),
    "var along several": (lambda a: torch.var(a, (0, 2)), (A,)),
    "var along, biased": (lambda a: torch.var(a, 1, False), (A,)),
    "var along, kept": (lambda a: torch.var(a, -1, True, True), (A,)),
    "var along, words": (lambda a: a.var(dim=(1, 2), unbiased=False, keepdim=True), (A,)),
    "var corrected": (lambda a: torch.var(a, dim=1, correction=0), (A,)),
    "var corrected, kept": (lambda a: torch.var(a, dim=(1, 2), correction=2, keepdim=True), (A,)),
    "var of all, corrected": (lambda a: a.var(correction=0), (A,)),
    "var of all, kept": (lambda a: torch.var(a, dim=None, keepdim=True), (A,)),
    "norm": (torch.norm, (A,)),
    "norm along": (lambda a: a.norm(dim=1), (A,)),
    "norm of one, kept": (lambda a: a.norm(1, 2, True), (A,)),
    "norm of three": (lambda a: torch.norm(a, p=3, dim=(0, 1), keepdim=True), (A,)),
    "linalg": (lambda a: torch.linalg.vector_norm(a, dim=1), (A,)),
    "linalg of three": (lambda a: torch.linalg.vector_norm(a, ord=3, dim=(1, 2), keepdim=True), (A,)),
    "logsumexp": (lambda a: a.logsumexp((1, 2)), (A,)),
    "std": (torch.std, (A,)),
    "std biased": (lambda a: torch.std(a, False), (A,)),
    "std along": (lambda a: a.std((1, 2), keepdim=True), (A,)),
    "std along, biased": (lambda a: a.std(1, False, True), (A,)),
    "std corrected": (lambda a: torch.std(a, dim=1, correction=0), (A,)),
}


def test_the_cosine_of_little_is_as_small() -> None:
    """PyTorch's own gradient is none there, as it leaves out the limit."""
    found = DECOMPOSED["cosine_similarity"](A * 1e-3, B, eps=0.1)
    torch.testing.assert_close(found, F.cosine_similarity(A * 1e-3, B, eps=0.1))


@pytest.mark.parametrize("name", PARTS)
def test_an_operator_is_its_decomposition(name: str) -> None:
    native, given = PARTS[name]
    composed(native, *given)


# --- the forward stays what it is -------------------------------------------------------------------------------------


ACTIVATIONS: dict[str, Callable[[Tensor], Any]] = {
    **{
        type(module).__name__: module
        for module in (
            nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.2), nn.PReLU(4), nn.RReLU().eval(), nn.ELU(), nn.SELU(), nn.CELU(),
            nn.GELU(), nn.SiLU(), nn.Mish(), nn.Tanh(), nn.Hardtanh(), nn.Hardswish(), nn.Softsign(), nn.Softshrink(),
            nn.Hardshrink(), nn.Tanhshrink(), nn.Threshold(0.1, 0.2), nn.Sigmoid(), nn.Hardsigmoid(), nn.Softplus(),
            nn.GLU(1), nn.Softmax(1), nn.Softmin(1), nn.LogSoftmax(1),
        )
    },
    "gelu tanh": nn.GELU(approximate="tanh"),
    **{
        name: getattr(torch, name)
        for name in (
            "sqrt square abs exp exp2 expm1 log log2 log10 log1p rsqrt reciprocal sin cos tan atan asinh erf erfc"
        ).split()
    },
    "pow": lambda z: z**3 + z.pow(0.5) + torch.float_power(z, 2).to(z),
    "clamp": lambda z: z.clamp(0.2, 0.5) + z.clip(max=0.3) + torch.clamp_min(z, 0.3),
    "softmax": lambda z: F.softmax(z, 1) + torch.softmax(z, -1) + z.softmax(2),
    "max": lambda z: z.amax((2, 3), keepdim=True) + z.max(4, keepdim=True)[0] + z.amin(1, keepdim=True) + z.min(),
    "min": lambda z: torch.min(z, 1).values[:, None] + torch.max(z),
    "division": lambda z: z / (z + 1) + 2 / (z + 1) + z / 3 + torch.div(z, 2) + z.true_divide(2) + z.div(z.mean()),
    "product": lambda z: z * z.flip(1) * 3 + 2 * z + torch.mul(z, z.sigmoid()) + z.multiply(2),
    "matmul": lambda z: z @ z.mT + torch.matmul(z.mT, z) + torch.einsum("nchwd,nchwe->nchde", z, z),
    "sum": lambda z: (
        z + 1 - z.mean() + (2 - z) + torch.add(z, z, alpha=0.5) + torch.sub(z, 1, alpha=2) + sum([z, z]) + (-z)
    ),
    "where": lambda z: torch.where(z > 0.5, z, z.sin()) + z.masked_fill(z > 0.7, 0.1),
    "moves": lambda z: (
        z.permute(0, 2, 3, 4, 1).reshape(1, -1, 4).transpose(1, 2).reshape(z.shape).roll(1, 2)
        + torch.stack(z.unbind(1), 1) + torch.cat(z.chunk(2, 1)[::-1], 1) + torch.cat(torch.split(z, [1, 3], 1), 1)
        + z[:, [3, 2, 1, 0]] + z.index_select(2, torch.arange(5, -1, -1)) + z.flip((2, 3)) + z.expand(1, 4, 6, 6, 6)
        + F.pad(z, (1,) * 6, mode="reflect")[..., 1:-1, 1:-1, 1:-1] + F.pad(z, (1, 0))[..., 1:]
        + z.squeeze(0).unsqueeze(0)
        + z.gather(1, torch.zeros(1, 4, 6, 6, 6, dtype=torch.long)) + z.movedim(1, -1).swapaxes(1, 4).movedim(1, 1)
        + z.repeat_interleave(2, 2)[:, :, ::2] + z.narrow(2, 0, 6) + z.view_as(z).contiguous().type_as(z).to(z.dtype)
    ),
    "sizes": lambda z: z.view(z.shape[0], z.size(1), *z.shape[2:]) * z.numel() / z.ndim,
    "comparison": lambda z: z * (z > 0.4) + (z >= 0.2).to(z) * z + z.argmax(1, keepdim=True).to(z) * 0.1 * z,
    "interpolate": lambda z: (
        F.interpolate(z, scale_factor=2, mode="trilinear")[..., ::2, ::2, ::2]
        + F.interpolate(z, size=(6, 6, 6))
        + nn.Upsample(scale_factor=2, mode="trilinear", align_corners=True)(z)[:, :, ::2, ::2, ::2]
    ),
    "shuffle": lambda z: F.pixel_unshuffle(F.pixel_shuffle(z[:, :, 0], 2), 2)[:, :, None],
    "cumsum": lambda z: z.cumsum(2) + z.sort(2)[0] + z.topk(6, 2)[0] + z.diff(dim=2, prepend=z[:, :, :1]),
    "statistics": lambda z: (z - z.mean(1, keepdim=True)) / (z.var(1, keepdim=True) + 1e-3).sqrt(),
    "fold": lambda z: F.fold(F.unfold(z[:, :, 0], 3, padding=1), (6, 6), 3, padding=1)[:, :, None],
}  # fmt: skip

NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch": lambda: nn.BatchNorm3d(4),
    "batch, not affine": lambda: nn.BatchNorm3d(4, affine=False),
    "batch of its own": lambda: nn.BatchNorm3d(4, track_running_stats=False),
    "instance": lambda: nn.InstanceNorm3d(4),
    "instance, affine": lambda: nn.InstanceNorm3d(4, affine=True),
    "instance, fixed": lambda: nn.InstanceNorm3d(4, affine=True, track_running_stats=True),
    "group": lambda: nn.GroupNorm(2, 4),
    "group of all": lambda: nn.GroupNorm(1, 4, eps=0.1),
    "group, not affine": lambda: nn.GroupNorm(4, 4, affine=False),
    "layer": lambda: nn.LayerNorm(6),
    "layer of several": lambda: nn.LayerNorm((6, 6, 6), eps=0.1),
    "layer, not affine": lambda: nn.LayerNorm((6, 6), elementwise_affine=False),
    "layer without bias": lambda: nn.LayerNorm(6, bias=False),
    "rms": lambda: nn.RMSNorm(6),
    "rms of several": lambda: nn.RMSNorm((6, 6), eps=0.1, elementwise_affine=False),
    "sync batch": lambda: nn.SyncBatchNorm(4),
}

POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "max": nn.MaxPool3d(2),
    "max, overlapping": nn.MaxPool3d(3, 2, 1),
    "max, uneven": nn.MaxPool3d((1, 2, 3), stride=(2, 1, 2), padding=(0, 1, 1)),
    "max, dilated": nn.MaxPool3d(2, stride=1, dilation=2),
    "max, ceil": nn.MaxPool3d(4, stride=3, ceil_mode=True),
    "max, ceil and padded": nn.MaxPool3d(3, stride=2, padding=1, ceil_mode=True),
    "max, ceil and dilated": nn.MaxPool3d(2, stride=2, dilation=3, ceil_mode=True),
    "max with indices": lambda z: F.max_pool3d(z, 3, 2, 1, return_indices=True)[0],
    "max module with indices": lambda z: nn.MaxPool3d(2, return_indices=True)(z)[0],
    "max by words": lambda z: F.max_pool3d(input=z, kernel_size=2, stride=None, padding=0),
    "torch.max_pool3d": lambda z: torch.max_pool3d(z, [2, 2, 2], [2, 2, 2]),
    "max and back": lambda z: F.max_unpool3d(*F.max_pool3d(z, 2, return_indices=True), 2),
    "max 2d": lambda z: F.max_pool2d(z.flatten(0, 1), 2)[None],
    "max 1d": lambda z: F.max_pool1d(z.flatten(3)[0], 3)[None],
    "adaptive max": nn.AdaptiveMaxPool3d(2),
    "adaptive max, uneven": nn.AdaptiveMaxPool3d((4, 5, 1)),
    "adaptive max, partly": nn.AdaptiveMaxPool3d((None, 3, 2)),
    "adaptive max with indices": lambda z: F.adaptive_max_pool3d(z, 3, return_indices=True)[0],
    "adaptive max 2d": lambda z: F.adaptive_max_pool2d(z.flatten(0, 1), 2)[None],
    "average": nn.AvgPool3d(2),
    "average, ceil": nn.AvgPool3d(4, 3, 1, ceil_mode=True, count_include_pad=False),
    "average, divided": lambda z: F.avg_pool3d(z, 2, divisor_override=3),
    "adaptive average": nn.AdaptiveAvgPool3d((4, 5, 1)),
    "lp": nn.LPPool3d(2, 2),
}


def unchanged(network: nn.Module, x: Tensor, names: tuple[str, ...] = tuple(COMPOSITES)) -> None:
    """What the network says is the same with rules as without, and something comes back."""
    network = network.double().eval()
    with torch.no_grad():
        expected = network(x)
    for name in names:
        found = outputs(network, x, COMPOSITES[name])
        torch.testing.assert_close(
            found.detach(), expected, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
        )


def asked(network: nn.Module, x: Tensor, method: str, **parameters: Any) -> Attribution:
    """The map of output 1 for x (N, C, *spatial), in its precision."""
    model = mx.Model(network, channels=x.shape[1], spatial_dims=x.ndim - 2)
    with model.ready():
        question = Question(model, x, [Prepared(x[0], np.eye(x.ndim - 1))], [mx.RegressionTarget(1)])
        return registry.make(method, parameters).attribute(question)[0]


def compared(network: nn.Module, x: Tensor) -> None:
    """The map of DeepLIFT adds up, so that both its forwards saw the network as it is."""
    made = asked(network.double().eval(), x, "deeplift", baseline="mean")
    assert made.residual["completeness"] < 1e-6


class Positive(nn.Module):
    """`work` on values between 0.1 and 0.9."""

    def __init__(self, work: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.work = nn.Conv3d(1, 4, 3, padding=1), work

    def forward(self, x: Tensor) -> Tensor:
        return self.work(self.conv(x).sigmoid() * 0.8 + 0.1).flatten(2).mean(2)


def _zeroed(z: Tensor) -> Tensor:
    out = z.clone()
    out[z < 0] = 0
    return out


WRITTEN: dict[str, Callable[[Tensor], Tensor]] = {
    "by words": lambda z: torch.relu(input=z) + torch.add(input=z, other=z) + torch.mul(input=z, other=2),
    "weights by words": lambda z: F.conv3d(input=z, weight=torch.ones(3, 4, 1, 1, 1).to(z), stride=(2,)).relu(),
    "padding by name": lambda z: F.conv3d(z, torch.ones(3, 4, 3, 3, 3).to(z), None, 1, "same").relu(),
    "one scan": lambda z: F.conv3d(z[0], torch.ones(3, 4, 3, 3, 3).to(z))[None].relu(),
    "transposed, dilated": lambda z: F.conv_transpose3d(
        z, torch.ones(4, 3, 3, 3, 3).to(z), stride=2, output_padding=1, dilation=2
    ).relu(),
    "by a mask": _zeroed,
    "by an index": lambda z: torch.zeros_like(z).index_add_(1, torch.tensor([0, 1, 1, 3]), z.relu()),
    "in one dimension": lambda z: F.conv1d(z.relu().flatten(2), torch.ones(4, 2, 3).to(z), groups=2),
}


@pytest.mark.parametrize("how", WRITTEN)
def test_the_output_stays_the_same_however_it_is_written(how: str) -> None:
    unchanged(seeded(lambda: Does(WRITTEN[how])), scan(1, *SHAPE))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_output_stays_the_same_with_every_operator(name: str) -> None:
    work = ACTIVATIONS[name]
    torch.manual_seed(0)
    unchanged(Positive(work), scan(1, *SHAPE))


@pytest.mark.parametrize(
    "name", ["GELU", "SiLU", "Sigmoid", "PReLU", "Softmax", "division", "product", "matmul", "statistics", "max"]
)
def test_deeplift_is_complete_with_every_operator(name: str) -> None:
    torch.manual_seed(0)
    compared(Positive(ACTIVATIONS[name]), scan(1, *SHAPE))


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("after", ["conv", "relu"])
def test_the_output_stays_the_same_with_every_normalisation(name: str, after: str) -> None:
    def build() -> nn.Module:
        norm = NORMS[name]()
        return Does(nn.Sequential(norm) if after == "conv" else nn.Sequential(nn.ReLU(), norm, nn.ReLU()))

    network = seeded(build)
    unchanged(network, scan(2, *SHAPE))
    # Else the mean of each channel is a constant.
    if after == "relu" and name != "batch of its own":
        compared(network, scan(1, *SHAPE))


@pytest.mark.parametrize("name", POOLS)
def test_the_output_stays_the_same_with_every_pooling(name: str) -> None:
    network = seeded(lambda: Does(lambda z: POOLS[name](z.relu())))
    x = scan(1, *SHAPE)
    if name == "lp":
        with pytest.raises(MedXAIError, match="no rule"):
            outputs(network, x, COMPOSITES["epsilon"])
        return
    unchanged(network, x)
    if name != "max 1d":
        compared(network, x)
    # Pooling keeps all that reaches it: of a rectified network without constants, the score.
    nn.init.zeros_(network.conv.bias)
    with torch.no_grad():
        score = network(x)[0, 1]
    torch.testing.assert_close(asked(network, x, "lrp", composite="epsilon", epsilon=0.0).values.sum(), score)


# --- networks that compute parts of themselves again ------------------------------------------------------------------


class Checkpointing(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.body = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv3d(4, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.body(x).mean((2, 3, 4))
        return torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=self.reentrant).mean((2, 3, 4))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_network_that_checkpoints_itself(reentrant: bool, method: str) -> None:
    found, expected = (maps(seeded(lambda r=r: Checkpointing(r)), method) for r in (reentrant, None))
    assert torch.equal(found.data, expected.data)
    assert found.provenance.operators == expected.provenance.operators


def test_swin_unetr_with_its_own_checkpoints() -> None:
    def build(use: bool) -> mx.Model:
        torch.manual_seed(0)
        network = nets.SwinUNETR(
            in_channels=1, out_channels=2, feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1),
            spatial_dims=2, use_checkpoint=use,
        )  # fmt: skip
        return mx.Model(network, task="segmentation")

    x = scan(1, 64, 64).float()
    target = mx.SegmentationTarget(1, within="everywhere")
    for method in ("lrp", "guided_backprop"):
        found, expected = (mx.explain(build(use), x, method, target=target) for use in (True, False))
        torch.testing.assert_close(found.data, expected.data)


def test_checkpoint_is_what_it_was_afterwards() -> None:
    before = torch.utils.checkpoint.checkpoint
    maps(seeded(lambda: Checkpointing(False)))
    with pytest.raises(MedXAIError):
        maps(seeded(lambda: Does(lambda z: torch.erfinv(z))))
    assert torch.utils.checkpoint.checkpoint is before


def test_rules_end_where_they_began() -> None:
    """A forward afterwards is one without rules, whatever happened inside."""
    network, x = seeded(Counted), scan(1, *SHAPE)
    for work in (lambda: maps(seeded(Counted)), lambda: maps(seeded(lambda: Does(torch.erfinv)))):
        try:
            work()
        except MedXAIError as error:
            assert "erfinv" in str(error)
        leaf = x.clone().requires_grad_()
        network(leaf)[:, 1].sum().backward()
        with torch.enable_grad():
            again = x.clone().requires_grad_()
            y = network(again)
        assert "Send" not in type(y.grad_fn).__name__ and not hasattr(y, "_medxai")
        assert leaf.grad is not None


# --- out of sight, and other ways of writing ------------------------------------------------------------------------


class Own(torch.autograd.Function):
    """An operator of a network's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 3

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * 3


@pytest.mark.parametrize("method", ["lrp", "deeplift", "guided_backprop", "deconvnet"])
@pytest.mark.parametrize("beside", [False, True])
def test_an_operator_of_the_networks_own_is_refused(method: str, beside: bool) -> None:
    work = (lambda z: z.relu() + Own.apply(z)) if beside else (lambda z: Own.apply(z).relu())
    with pytest.raises(MedXAIError, match=r"cannot be looked into .*Own.*gradient or integrated_gradients"):
        maps(seeded(lambda: Does(work)), method)


def test_its_gradient_is_that_of_pytorch() -> None:
    network, x = seeded(lambda: Does(lambda z: z.relu() + Own.apply(z))), scan(*SHAPE).float()
    found = maps(network, "gradient", x).data
    leaf = x[None].requires_grad_()
    torch.testing.assert_close(found, torch.autograd.grad(network(leaf)[0, 1], leaf)[0][0])


def test_a_scripted_function_beside_a_skip_is_refused() -> None:
    with pytest.raises(MedXAIError, match="cannot be looked into"):
        maps(seeded(lambda: Does(lambda z: z.relu() + scripted(z))), "lrp")


@pytest.mark.parametrize("method", ["lrp", "deeplift", "deconvnet"])
def test_dropout_in_place_in_evaluation_mode(method: str) -> None:
    network = seeded(lambda: Does(lambda z: F.dropout(z, 0.5, False, True).relu()))
    expected = maps(seeded(lambda: Does(torch.relu)), method).data
    torch.testing.assert_close(maps(network, method).data, expected)


def test_squeezing_in_place() -> None:
    network = seeded(lambda: Does(lambda z: z.unsqueeze_(0).squeeze_(0).relu()))
    torch.testing.assert_close(maps(network).data, maps(seeded(lambda: Does(torch.relu))).data)


def test_pooling_without_a_batch() -> None:
    compared(seeded(lambda: Does(lambda z: F.max_pool3d(z[0].relu(), 2)[None])), scan(1, *SHAPE))


class Largest(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_max_pool3d(x, 1).flatten(1).repeat(1, 2)


def test_two_maxima_of_a_whole_image_share() -> None:
    x = torch.zeros(1, 4, 4, 4)
    x[0, 0, 0, 0] = x[0, 3, 3, 3] = 2
    assert maps(Largest(), x=x, composite="epsilon").data[x > 0].tolist() == [1, 1]


class Loose(nn.Module):
    """A network with a parameter that it does not say it has."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.scale = nn.Conv3d(1, 3, 3, bias=False), [nn.Parameter(torch.full((3, 1, 1, 1), 2.0))]

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv(x).relu() * self.scale[0]).mean((2, 3, 4))


def test_a_parameter_that_is_not_registered_is_a_constant() -> None:
    assert maps(seeded(Loose, torch.float32), composite="epsilon").residual["conservation"] < 1e-5


@pytest.mark.parametrize("work", [F.logsigmoid, lambda z: 2.0**z, lambda z: (200 * z).log_softmax(1)])
def test_more_operators_conserve(work: Callable[[Tensor], Tensor]) -> None:
    assert maps(seeded(lambda: Does(work)), composite="epsilon").residual["conservation"] < 1e-5
    compared(seeded(lambda: Does(work)), scan(1, *SHAPE))


@pytest.mark.parametrize("method", ["lrp", "guided_backprop", "deeplift"])
def test_a_segmentation_in_low_precision(method: str) -> None:
    torch.manual_seed(0)
    model = mx.Model(nets.UNet(3, 1, 3, (4, 8, 16), (2, 2)), task="segmentation")
    target = mx.SegmentationTarget(1, within="everywhere", measure="volume")
    x = scan(1, 16, 16, 16).float()
    low, exact = (
        mx.explain(model, x, method, target=target, run=mx.Run(precision=precision)).data
        for precision in ("bfloat16", None)
    )
    assert float(F.cosine_similarity(low.flatten(), exact.flatten(), 0)) > 0.5


def _copied(z: Tensor) -> Tensor:
    out = torch.zeros_like(z)
    out[:, :2].copy_(z[:, :2].relu())
    return out


def _narrowed(z: Tensor) -> Tensor:
    out = torch.zeros_like(z)
    out.narrow(1, 0, 2).add_(z[:, :2].relu())
    return out


def _chunked(z: Tensor) -> Tensor:
    out = torch.zeros_like(z)
    first, second = out.chunk(2, 1)
    first.copy_(z[:, :2])
    second.copy_(z[:, 2:].relu())
    return out


@pytest.mark.parametrize("work", [_copied, _narrowed, _chunked])
def test_a_view_of_a_buffer_that_is_written_to_is_refused(work: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(MedXAIError, match="changes a tensor in place and then uses another view"):
        outputs(seeded(lambda: Does(work)), scan(1, *SHAPE), COMPOSITES["epsilon"])


@pytest.mark.parametrize("p", [float("inf"), 0])
def test_norms_without_a_rule_are_refused(p: float) -> None:
    with pytest.raises(MedXAIError, match="norm of order"), Interception(Composite((), strict=False)):
        torch.linalg.vector_norm(scan(3, 4, 5).requires_grad_() * 1, ord=p, dim=1)
