"""Attention rollout against explicit matrices, and attention relevance against the published rules, done by hand."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from conftest import make_model
from monai.networks import nets
from torch import Tensor, nn

import MedXAILib as mx

SIZE, PATCH = (16, 16, 8), (8, 8, 4)
GRID = tuple(s // p for s, p in zip(SIZE, PATCH, strict=True))
EPSILON = 1e-6


def scan(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vit(layers: int = 3, **options: object) -> nn.Module:
    torch.manual_seed(0)
    network = nets.ViT(
        1, SIZE, PATCH, 24, 48, layers, 4, classification=True, num_classes=3, post_activation="", **options
    )
    # Fresh, all tokens are attended to alike.
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.8)
    return network


def rollout(network: nn.Module, x: Tensor, target: object = 0, task: str = "classification") -> Tensor:
    return mx.explain(mx.Model(network, task=task), x, "attention_rollout", target=target).data[0]


def voxels(of_patches: Tensor, patch: Sequence[int]) -> Tensor:
    """Shares of a grid of patches (D, H, W), spread evenly over the voxels of each."""
    for axis, length in enumerate(patch):
        of_patches = of_patches.repeat_interleave(length, axis) / length
    return of_patches


def rolled_out(attention: Sequence[Tensor]) -> Tensor:
    """The product over layers, the first layer's last, of half the mean over heads (H, T, T) and half the identity."""
    whole = torch.eye(attention[0].shape[-1])
    for a in attention:
        # The branch of the MLP keeps every token where it is, so that its skip changes nothing.
        mlp = (torch.eye(len(whole)) + torch.eye(len(whole))) / 2
        whole = mlp @ ((a.mean(0) + torch.eye(len(whole))) / 2) @ whole
    return whole


# --- Rollout ---------------------------------------------------------------------------------------------------------


def test_rollout_of_a_vit_is_the_product_of_its_attention_matrices() -> None:
    network, x = vit(save_attn=True), scan(1, *SIZE)
    made = rollout(network, x)
    network.eval()(x[None])
    row = rolled_out([block.attn.att_mat[0] for block in network.blocks])[0]
    assert row[1:].max() > 2 * row[1:].min()
    torch.testing.assert_close(made, voxels(row[1:].reshape(GRID), PATCH), rtol=1e-5, atol=0)
    # What the class token keeps of itself is in no voxel, and nothing else is missing.
    assert 0.1 < row[0] < 0.9
    assert float(made.sum() + row[0]) == pytest.approx(1, abs=1e-6)


def test_rollout_of_a_batch_of_images_with_channels() -> None:
    torch.manual_seed(0)
    network = nets.ViT(2, (16, 12), (8, 4), 12, 24, 2, 2, classification=True, spatial_dims=2, save_attn=True).eval()
    for block in network.blocks:
        nn.init.normal_(block.attn.qkv.weight)
    x = scan(2, 2, 16, 12)
    made = mx.explain(mx.Model(network, spatial_dims=2), x, "attention_rollout").data
    network(x)
    assert made.shape == (2, 1, 16, 12)
    for i in range(2):
        row = rolled_out([block.attn.att_mat[i] for block in network.blocks])[0, 1:]
        torch.testing.assert_close(made[i, 0], voxels(row.reshape(2, 3), (8, 4)), rtol=1e-5, atol=0)
    assert (made[0] - made[1]).abs().max() > 1e-3


def test_rollout_is_the_same_for_every_class() -> None:
    network, x = vit(), scan(1, *SIZE)
    first = rollout(network, x, 0)
    for target in (1, 2, mx.ClassTarget(2, versus=0)):
        torch.testing.assert_close(rollout(network, x, target), first, rtol=1e-5, atol=0)
    assert "same for every class" in mx.methods()["attention_rollout"].taxonomy.limits


@pytest.mark.parametrize("method", ["attention_rollout", "attention_relevance"])
def test_fused_attention_is_attention(method: str) -> None:
    network, x = vit(), scan(1, *SIZE)
    plain = mx.explain(mx.Model(network), x, method, target=1)
    for block in network.blocks:
        block.attn.use_flash_attention = True
    fused = mx.explain(mx.Model(network), x, method, target=1)
    assert "softmax" in str(fused.provenance.operators)
    torch.testing.assert_close(fused.data, plain.data, rtol=1e-5, atol=1e-5 * float(plain.data.abs().max()))


class Tokens(nn.Module):
    """A network of `core` over the tokens (N, T, 8) of patches of 2x2x2, `end` being after the classes."""

    def __init__(self, core: Callable[[Tensor], Tensor], end: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Conv3d(1, 8, 2, 2)
        self.core = core
        self.head = nn.Linear(8, 3)
        self.end = end

    def forward(self, x: Tensor) -> Tensor:
        scores = self.head(self.core(self.tokens(x)).mean(1))
        return scores if self.end is None else self.end(scores)

    def tokens(self, x: Tensor) -> Tensor:
        return 3 * self.embedding(x).flatten(2).transpose(1, 2)


def attended(tokens: Tensor) -> Tensor:
    return (tokens @ tokens.transpose(1, 2) / math.sqrt(8)).softmax(-1) @ tokens


@pytest.mark.parametrize("first", [True, False], ids=["normalised first", "normalised last"])
def test_rollout_of_pytorchs_transformer(first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=first)
    network = Tokens(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)).eval()
    x = scan(1, 4, 4, 4)
    made = rollout(network, x)
    seen = []
    with torch.no_grad():
        tokens = network.tokens(x[None])
        for block in network.core.layers:
            asked = block.norm1(tokens) if first else tokens
            seen.append(block.self_attn(asked, asked, asked, average_attn_weights=False)[1][0])
            tokens = block(tokens)
    expected = rolled_out(seen).mean(0).reshape(2, 2, 2)
    assert expected.max() > 1.2 * expected.min()
    torch.testing.assert_close(made, voxels(expected, (2, 2, 2)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("batched", [True, False])
def test_rollout_of_multi_head_attention_straight_after_a_linear_layer(weights: bool, batched: bool) -> None:
    # Nothing is recorded between the two, so that PyTorch might take its way for inference.
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embedding, self.head = nn.Linear(8, 8), nn.Linear(8, 3)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=batched)

        def forward(self, x: Tensor) -> Tensor:
            t = self.embedding(3 * x.reshape(1, 4, 8) if batched else 3 * x.reshape(4, 1, 8))
            return self.head(self.attention(t, t, t, need_weights=weights)[0].mean(1 if batched else 0))

    network, x = Network().eval(), scan(1, 4, 2, 4)
    made = rollout(network, x)
    t = network.embedding(3 * x.reshape(1, 4, 8))
    t = t if batched else t.transpose(0, 1)
    share = network.attention(t, t, t)[1][0].detach().mean(0)
    torch.testing.assert_close(made, voxels(share.reshape(4, 1, 1), (1, 2, 4)), rtol=1e-5, atol=0)


def test_rollout_of_scaled_dot_product_attention() -> None:
    x = scan(1, 4, 4, 4)
    fused = rollout(Tokens(lambda t: F.scaled_dot_product_attention(t, t, t)), x)
    torch.testing.assert_close(fused, rollout(Tokens(attended), x), rtol=1e-5, atol=0)
    tokens = Tokens(attended).tokens(x[None])[0].detach()
    share = (tokens @ tokens.T / math.sqrt(8)).softmax(-1).mean(0).reshape(2, 2, 2)
    torch.testing.assert_close(fused, voxels(share, (2, 2, 2)), rtol=1e-5, atol=0)


def _gated_by_values(u: Tensor) -> Tensor:
    a, b = u.chunk(2, -1)
    return torch.cat([a * F.gelu(b), b], -1)


LAYERS: dict[str, Callable[[Tensor], Tensor]] = {
    "a mean added to all": lambda u: u + u.mean(1, keepdim=True),
    "one for many": lambda u: u.mean(1, keepdim=True) + torch.ones(1, 8, 1),
    "one times many": lambda u: u.mean(1, keepdim=True) * nn.Parameter(torch.rand(1, 8, 1), requires_grad=False),
    "difference": lambda u: u - 0.5 * u.roll(1, 1),
    "difference, by another name": lambda u: torch.subtract(u, u.roll(1, 1)),
    "negative": lambda u: u + (-u.roll(1, 1)),
    "less than one": lambda u: u + (1 - u.roll(1, 1)),
    "numbers": lambda u: 3 * u + 1,
    "gated by what is no gate": _gated_by_values,
    "mean of a sum": lambda u: u.sum(1, keepdim=True) / 8,
}


@pytest.mark.parametrize("name", LAYERS)
def test_no_share_is_lost(name: str) -> None:
    made = rollout(Tokens(lambda t: LAYERS[name](attended(t))), scan(1, 4, 4, 4))
    assert made.min() >= 0
    assert float(made.sum()) == pytest.approx(1, abs=1e-6)


def test_a_gate_lets_through_as_much_as_it_is_open() -> None:
    x, gates = scan(1, 4, 4, 4), []

    def gated(t: Tensor) -> Tensor:
        u = attended(t)
        gates.append(u.roll(1, 1).sigmoid())
        return u * gates[-1]

    made = rollout(Tokens(gated), x)
    assert float(made.sum()) == pytest.approx(float(gates[0].detach().mean()), abs=1e-6)


POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matrix product": lambda w, t: w.transpose(1, 2) @ t,
    "einsum": lambda w, t: torch.einsum("btc,bto->boc", t, w),
    "product": lambda w, t: (w * t).sum(1, keepdim=True),
    "product, the other way round": lambda w, t: (t * w).sum(1, keepdim=True),
}


@pytest.mark.parametrize("name", POOLINGS)
def test_what_makes_attention_gets_nothing(name: str) -> None:
    """Attention that comes from no queries and keys, as over the instances of a bag."""
    weights = []

    def pooled(t: Tensor) -> Tensor:
        weights.append(t[..., :1].roll(1, 1).softmax(1))
        return POOLINGS[name](weights[0], t)

    made = rollout(Tokens(pooled), scan(1, 4, 4, 4))
    expected = weights[0].detach().reshape(2, 2, 2)
    torch.testing.assert_close(made, voxels(expected, (2, 2, 2)), rtol=1e-5, atol=0)


def test_rollout_begins_at_scores_or_what_was_made_of_them() -> None:
    x = scan(1, 4, 4, 4)
    plain = rollout(Tokens(attended), x)
    for end in (lambda y: y.softmax(1), torch.sigmoid, lambda y: y[:, :1]):
        torch.testing.assert_close(rollout(Tokens(attended, end), x, 1), plain, rtol=1e-5, atol=0)
    # The two classes of a single score say the same with another sign.
    single = Tokens(attended, lambda y: y[:, :1])
    torch.testing.assert_close(rollout(single, x, mx.ClassTarget(1, versus=0)), plain, rtol=1e-5, atol=0)


# --- Windows ---------------------------------------------------------------------------------------------------------


class Swin(nn.Module):
    """What the first stage of a Swin transformer gives, two blocks and a merging of 2x2x2 tokens, as classes."""

    def __init__(self, window: int, uniform: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nets.swin_unetr.SwinTransformer(
            1, 6, (window,) * 3, (2, 2, 2), (2, 1, 1, 1), (1, 1, 1, 1), mlp_ratio=2
        )
        self.head = nn.Conv3d(12, 3, 1)
        for name, parameter in self.body.named_parameters():
            if uniform and ("relative_position" in name or "qkv" in name):
                # Without queries, keys and places all that a window sees is attended to alike.
                parameter.data[: len(parameter) * 2 // 3 if "qkv" in name else None] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[1])


def _alike(groups: Sequence[int], kept: int) -> Tensor:
    """Along an axis, who attends to whom, as (kept, kept) of the length of `groups`."""
    g = torch.tensor(groups)
    same = (g[:, None] == g[None]).float()
    return (same / same.sum(1, keepdim=True))[:kept, :kept]


def _block(share: Tensor, along: Sequence[Tensor]) -> Tensor:
    """Shares of tokens (D, H, W), before a block that attends as `along` each axis."""
    return (share + torch.einsum("abc,ad,be,cf->def", share, *along)) / 2


def _within(place: Sequence[int]) -> mx.SegmentationTarget:
    """One voxel of an output a quarter as fine as the input, whose grid is that of the scan."""
    middle = [4 * p + 1.5 for p in place]
    return mx.SegmentationTarget(1, within=[[m - 1 for m in middle], [m + 1 for m in middle]])


# Of eight tokens: windows, and windows shifted by half of one, whose ends do not see each other; with windows of three
# there is a ninth token, which is a constant.
WINDOWS = {
    4: ([0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 2, 2]),
    3: ([0, 0, 0, 1, 1, 1, 2, 2, 2], [0, 1, 1, 1, 2, 2, 2, 3, 3]),
}


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("place", [(0, 0, 0), (1, 2, 3), (3, 3, 1)])
def test_rollout_through_windows_and_shifted_windows(window: int, place: tuple[int, ...]) -> None:
    made = rollout(Swin(window), scan(1, 16, 16, 16), _within(place), "segmentation")
    merged = torch.zeros(4, 4, 4)
    merged[place] = 1
    straight, shifted = (_alike(groups, 8) for groups in WINDOWS[window])
    tokens = _block(_block(voxels(merged, (2, 2, 2)), [shifted] * 3), [straight] * 3)
    torch.testing.assert_close(made, voxels(tokens, (2, 2, 2)), rtol=1e-5, atol=1e-9)
    # The constants that fill up a window take a share; without them none is lost.
    lost = 1 - float(made.sum())
    assert (0.01 < lost < 0.7) if window == 3 and 3 in place else abs(lost) < 1e-5


def test_another_target_by_a_window_is_another_map_by_a_window() -> None:
    network, x = Swin(4), scan(1, 32, 16, 16)
    here, there = (rollout(network, x, _within((d, 1, 2)), "segmentation") for d in (2, 4))
    torch.testing.assert_close(there[8:], here[:-8], rtol=1e-5, atol=1e-9)
    assert not here[-8:].any() and not there[:8].any()


@functools.cache
def swin_unetr(window: int) -> mx.Model:
    torch.manual_seed(0)
    network = nets.SwinUNETR(
        1, 3, feature_size=12, depths=(2, 1, 1, 1), num_heads=(1, 1, 1, 1), window_size=window, use_checkpoint=True
    )
    return mx.Model(network, task="segmentation", layers=("decoder2",))


@functools.cache
def unetr() -> mx.Model:
    torch.manual_seed(0)
    return mx.Model(nets.UNETR(1, 3, (32, 32, 16), 4, 24, 48, 2), task="segmentation", layers=("decoder2",))


REGION = mx.SegmentationTarget(1, within=[(3, 5, 2), (20, 20, 10)])


def test_shares_of_a_segmentation_add_up_to_one() -> None:
    # Whether convolutions see over the edge or not: shares are counted over what is there.
    explain = lambda model, *size: mx.explain(model, scan(1, *size), "attention_rollout", target=REGION).data  # noqa: E731
    made = explain(unetr(), 32, 32, 16)
    assert float(made.sum()) == pytest.approx(1, abs=1e-5) and made.min() >= 0
    assert float(explain(swin_unetr(4), 64, 32, 32).sum()) == pytest.approx(1, abs=1e-5)
    # Windows of seven do not fit, and constants fill them up.
    assert 0.9 < float(explain(swin_unetr(7), 64, 32, 32).sum()) < 0.995


# --- Relevance -------------------------------------------------------------------------------------------------------


class OneLayer(nn.Module):
    """One layer of a transformer with two heads, over 8 patches of 2x2x2; `how` is who computes the attention.

    When `held`, its gradient times its input is the relevance of which attention gets nothing.
    """

    def __init__(self, how: str = "plain", held: bool = False) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.how, self.held = how, held
        self.embedding = nn.Linear(8, 6)
        self.norms = nn.ModuleList(nn.LayerNorm(6) for _ in range(2))
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.mlp = nn.ModuleList([nn.Linear(6, 10), nn.Linear(10, 6)])
        self.head = nn.Linear(6, 3)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.7)
        self.double().requires_grad_(False).eval()

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embedding(x.reshape(-1, 8, 8))
        tokens = tokens + self.attend(self.norm(0, tokens))
        hidden = self.mlp[0](self.norm(1, tokens))
        hidden = hidden * (F.gelu(hidden) / hidden).detach() if self.held else F.gelu(hidden)
        return self.head((tokens + self.mlp[1](hidden)).mean(1))

    def norm(self, i: int, x: Tensor) -> Tensor:
        if not self.held:
            return self.norms[i](x)
        scale = (x.var(-1, correction=0, keepdim=True) + self.norms[i].eps).rsqrt().detach()
        return (x - x.mean(-1, keepdim=True)) * scale * self.norms[i].weight + self.norms[i].bias

    def attend(self, x: Tensor) -> Tensor:
        if self.how == "module":
            return self.attention(x, x, x, need_weights=False)[0]
        q, k, v = (t.unflatten(-1, (2, 3)).transpose(1, 2) for t in self.qkv(x))
        if self.how == "fused":
            seen = F.scaled_dot_product_attention(q, k, v)
        else:
            weights = (q @ k.transpose(-1, -2) / math.sqrt(3)).softmax(-1)
            seen = (weights.detach() if self.held else weights) @ v
        return self.attention.out_proj(seen.transpose(1, 2).flatten(2))

    def qkv(self, x: Tensor) -> tuple[Tensor, ...]:
        return F.linear(x, self.attention.in_proj_weight, self.attention.in_proj_bias).chunk(3, -1)


class ByHand:
    """The published rules on relevance itself, with every contribution written out. `taken` is what constants got."""

    def __init__(self) -> None:
        self.taken = 0.0

    def linear(self, r: Tensor, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float = EPSILON) -> Tensor:
        """Relevance (T, O) to inputs (T, I)."""
        z = x @ weight.T + bias
        each = r / (z + epsilon * z.sign())
        shares = each[:, :, None] * weight * x[:, None]
        self.taken += float((each * (bias + epsilon * z.sign())).sum())
        return shares.sum(1)

    def added(self, r: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return r * a / (a + b), r * b / (a + b)

    def normalised(self, r: Tensor, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """One over the deviation, and the weight, let all through; to take the mean off is linear."""
        out = torch.empty_like(x)
        n = x.shape[-1]
        for t in range(len(x)):
            scale = norm.weight / (x[t].var(correction=0) + norm.eps).sqrt()
            matrix = scale[:, None] * (torch.eye(n).double() - 1 / n)
            out[t] = self.linear(r[t][None], x[t][None], matrix, norm.bias, 0)[0]
        return out

    def product(self, r: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Relevance (I, J) of a @ b, half to a (I, K), half to b (K, J)."""
        to_a, to_b = torch.zeros_like(a), torch.zeros_like(b)
        z = a @ b
        for i in range(a.shape[0]):
            for j in range(b.shape[1]):
                for k in range(a.shape[1]):
                    share = a[i, k] * b[k, j] / (2 * z[i, j]) * r[i, j]
                    to_a[i, k] += share
                    to_b[k, j] += share
        return to_a, to_b

    def softmax(self, r: Tensor, x: Tensor) -> Tensor:
        s = x.softmax(-1)
        back = x * (r - s * r.sum(-1, keepdim=True))
        self.taken += float(r.sum() - back.sum())
        return back

    def explain(self, net: OneLayer, volume: Tensor, target: int) -> Tensor:
        """Relevance of the 8 patches (8, 8)."""
        x = volume.double().reshape(8, 8)
        tokens = net.embedding(x)
        normed = net.norms[0](tokens)
        q, k, v = net.qkv(normed)
        heads = [slice(0, 3), slice(3, 6)]
        scores = [q[:, h] @ k[:, h].T / math.sqrt(3) for h in heads]
        seen = torch.cat([s.softmax(-1) @ v[:, h] for s, h in zip(scores, heads, strict=True)], -1)
        branch = net.attention.out_proj(seen)
        middle = tokens + branch
        before = net.norms[1](middle)
        inner = net.mlp[0](before)
        after = F.gelu(inner)
        last = middle + net.mlp[1](after)

        r = torch.zeros(1, 3).double()
        r[0, target] = net.head(last.mean(0))[target]
        r = self.linear(r, last.mean(0)[None], net.head.weight, net.head.bias)
        r = r * last / last.sum(0)
        r_middle, r = self.added(r, middle, last - middle)
        r = self.linear(r, after, net.mlp[1].weight, net.mlp[1].bias)
        # An activation lets all through.
        r = self.linear(r, before, net.mlp[0].weight, net.mlp[0].bias)
        r_middle = r_middle + self.normalised(r, middle, net.norms[1])
        r_tokens, r = self.added(r_middle, tokens, branch)
        r = self.linear(r, seen, net.attention.out_proj.weight, net.attention.out_proj.bias)
        r_qkv = torch.zeros(8, 18).double()
        for s, h in zip(scores, heads, strict=True):
            r_weights, r_qkv[:, 12:][:, h] = self.product(r[:, h], s.softmax(-1), v[:, h])
            # Divided by a number, scores keep their relevance.
            r_q, r_k = self.product(self.softmax(r_weights, s), q[:, h], k[:, h].T)
            r_qkv[:, :6][:, h], r_qkv[:, 6:12][:, h] = r_q, r_k.T
        r = self.linear(r_qkv, normed, net.attention.in_proj_weight, net.attention.in_proj_bias)
        r_tokens = r_tokens + self.normalised(r, tokens, net.norms[0])
        return self.linear(r_tokens, x, net.embedding.weight, net.embedding.bias)


def _close(made: Tensor, expected: Tensor) -> None:
    expected = expected.detach().float().reshape(made.shape)
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("how", ["plain", "module", "fused"])
def test_relevance_of_one_layer_by_hand(how: str) -> None:
    net, x = OneLayer(how), scan(1, 4, 4, 4)
    for target in range(3):
        made = mx.explain(mx.Model(net), x, "attention_relevance", target=target, epsilon=EPSILON)
        hand = ByHand()
        expected = hand.explain(net, x, target)
        _close(made.data, expected)
        # Whatever is in no voxel is where it should be.
        assert float(expected.sum()) + hand.taken == pytest.approx(float(net(x[None].double())[0, target]), rel=1e-9)
        assert made.residual["conservation"] < 1e-9


def test_lrp_holds_attention_constant() -> None:
    net, x = OneLayer(), scan(1, 4, 4, 4)
    for target in range(3):
        lrp = mx.explain(mx.Model(net), x, "lrp", target=target, composite="epsilon", epsilon=0)
        leaf = x[None].double().requires_grad_()
        (gradient,) = torch.autograd.grad(OneLayer(held=True)(leaf)[0, target], leaf)
        _close(lrp.data, leaf * gradient)
        whole = mx.explain(mx.Model(net), x, "attention_relevance", target=target, epsilon=0).data
        assert (whole - lrp.data).norm() > 0.05 * lrp.data.norm()


def test_relevance_is_conserved() -> None:
    for model, x, target in (
        (make_model("vit"), scan(1, 24, 24, 16), 1),
        (mx.Model(vit()), scan(1, *SIZE), 2),
        (unetr(), scan(1, 32, 32, 16), REGION),
        (swin_unetr(7), scan(1, 64, 32, 32), REGION),
    ):
        made = mx.explain(model, x, "attention_relevance", target=target)
        assert made.residual["conservation"] <= 1e-5
        assert made.data.abs().max() > 0


def test_relevance_without_softmax_constants_adds_up_in_the_map() -> None:
    """One head, no biases, no norm: the map is the score, less what the tangents of the softmax leave."""
    network = Tokens(attended)
    network.embedding.bias = network.head.bias = None
    network.double()
    x = scan(1, 4, 4, 4)
    tokens = network.tokens(x[None].double())[0].detach()
    scores = tokens @ tokens.T / math.sqrt(8)
    s = scores.softmax(-1)
    # What comes to a weight: half of what it lets through to the score.
    let = s * (tokens @ network.head.weight[1].detach()) / len(s) / 2
    left = let.sum() - (scores * (let - s * let.sum(-1, keepdim=True))).sum()
    made = mx.explain(mx.Model(network), x, "attention_relevance", target=1, epsilon=0)
    score = float(network(x[None].double())[0, 1].detach())
    assert abs(float(left)) > 0.05 * abs(score)
    assert float(made.data.sum()) == pytest.approx(score - float(left), rel=1e-5)


# --- Both ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["attention_rollout", "attention_relevance"])
def test_a_network_without_attention_is_told_so(method: str) -> None:
    with pytest.raises(mx.MedXAIError, match="has no attention: use "):
        mx.explain(make_model("resnet18"), scan(1, 24, 24, 16), method)
    if method == "attention_rollout":
        # A softmax of classes is none.
        with pytest.raises(mx.MedXAIError, match="has no attention: use "):
            mx.explain(mx.Model(Tokens(lambda t: t, lambda y: y.softmax(1))), scan(1, 4, 4, 4), method)


def test_rollout_begins_at_no_volume() -> None:
    for measure in ("volume", "dice"):
        target = mx.SegmentationTarget(1, within=REGION.within, measure=measure)
        with pytest.raises(mx.MedXAIError, match="measure='logit'"):
            mx.explain(unetr(), scan(1, 32, 32, 16), "attention_rollout", target=target)


@pytest.mark.parametrize("decisive", [0, 5])
@pytest.mark.parametrize("method", ["attention_rollout", "attention_relevance"])
def test_the_patch_that_decides_is_found(decisive: int, method: str) -> None:
    """A transformer whose class token looks for one place, and says how bright it is there; noise on all weights."""
    network = nets.ViT(1, SIZE, PATCH, 24, 24, 1, 1, classification=True, num_classes=2, post_activation="")
    generator = torch.Generator().manual_seed(4)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.01
    token, bright, found, place, wanted = 0, 1, 2, 3, 3 + decisive
    network.eval().requires_grad_(False)
    parts = dict(network.named_parameters())
    parts["blocks.0.norm1.weight"].data += 1
    parts["norm.weight"].data += 1
    parts["patch_embedding.patch_embeddings.weight"].data[bright] = 1 / math.prod(PATCH)
    parts["patch_embedding.position_embeddings"].data[0, :, place : place + 8] += 2 * torch.eye(8)
    parts["cls_token"].data[..., token] += 1
    query, key, value = parts["blocks.0.attn.qkv.weight"].data.chunk(3)
    query[wanted, token] += 0.6
    key[place : place + 8, place : place + 8] += 2 * torch.eye(8)
    value[bright, bright] += 1
    parts["blocks.0.attn.out_proj.weight"].data[found, bright] += 2
    parts["classification_head.weight"].data[1, found] += 2

    x = scan(1, *SIZE) * 0.3
    score = lambda x: float(network(x[None])[0][0].diff())  # noqa: E731
    effect = []
    for patch in range(8):
        only = voxels((torch.arange(8) == patch).reshape(GRID).float(), PATCH) * math.prod(PATCH)
        effect.append(abs(score(x + 2 * only) - score(x)))
    assert effect[decisive] > 10 * sorted(effect)[-2]
    made = mx.explain(mx.Model(network), x + 1, method, target=mx.ClassTarget(1, versus=0)).data[0].clamp(min=0)
    share = made.unfold(0, 8, 8).unfold(1, 8, 8).unfold(2, 4, 4).sum((3, 4, 5)).flatten() / made.sum()
    assert share[decisive] > 0.8
