"""Operators that are several others in one, as those others, for which there are rules."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from MedXAILib.errors import MedXAIError


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    if is_causal:
        shape = query.shape[-2], key.shape[-2]
        attn_mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()
    return _shares(query, key, attn_mask, scale) @ value


def _shares(query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None = None) -> Tensor:
    """How much each query attends to each key; a `mask` of bool says where it may, one of numbers is added."""
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1)


def _multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(L, N, E), (S, N, E), (S, N, E), or without N -> (L, N, E), and what attends to what, (N, L, S)."""
    alone = query.ndim == 2
    if alone:
        query, key, value = query[:, None], key[:, None], value[:, None]
        key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
    if in_proj_weight is not None:
        weights: Sequence[Tensor | None] = in_proj_weight.chunk(3)
    else:
        weights = (q_proj_weight, k_proj_weight, v_proj_weight)
    biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
    parts: list[Tensor] = []
    for t, weight, bias in zip((query, key, value), weights, biases, strict=True):
        assert weight is not None
        parts.append(F.linear(t, weight, bias))
    # Keys and values that are the same whatever the input.
    if bias_k is not None and bias_v is not None:
        parts[1:] = [torch.cat([t, b.expand_as(t[:1])]) for t, b in zip(parts[1:], (bias_k, bias_v), strict=True)]
    if add_zero_attn:
        parts[1:] = [torch.cat([t, torch.zeros_like(t[:1])]) for t in parts[1:]]
    more = len(parts[1]) - len(key)
    attn_mask, key_padding_mask = (m if m is None else F.pad(m, (0, more)) for m in (attn_mask, key_padding_mask))
    heads = [t.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3) for t in parts]
    mask = attn_mask
    if mask is not None and mask.ndim == 3:
        mask = mask.unflatten(0, (-1, num_heads))
    if key_padding_mask is not None:
        padding = key_padding_mask[:, None, None]
        if padding.dtype == torch.bool:
            padding = torch.zeros_like(padding, dtype=query.dtype).masked_fill(padding, -math.inf)
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(mask, -math.inf)
        mask = padding if mask is None else mask + padding
    elif mask is not None and mask.dtype == torch.bool:
        # This function says where not to look, attention where to.
        mask = ~mask
    shares = _shares(heads[0], heads[1], mask)
    together = (shares @ heads[2]).permute(2, 0, 1, 3).flatten(2)
    result = F.linear(together, out_proj_weight, out_proj_bias)
    if average_attn_weights:
        shares = shares.mean(1)
    if alone:
        result, shares = result[:, 0], shares[0]
    return result, shares if need_weights else None


def _variance(
    input: Tensor,
    dim: Any = None,
    unbiased: bool | None = None,
    keepdim: bool = False,
    *,
    correction: float | None = None,
) -> Tensor:
    if isinstance(dim, bool):
        # Of var(x, unbiased).
        dim, unbiased = None, dim
    dims = (dim,) if isinstance(dim, int) else tuple(dim or range(input.ndim))
    count = math.prod(input.shape[d] for d in dims)
    if correction is None:
        correction = 0 if unbiased is False else 1
    centred = input - input.mean(dims, keepdim=True)
    return (centred * centred).sum(dims, keepdim) / (count - correction)


def _deviation(*args: Any, **kwargs: Any) -> Tensor:
    return _variance(*args, **kwargs).sqrt()


def _length(x: Tensor, dim: Any, keepdim: bool = False, p: float = 2.0) -> Tensor:
    if p == 2:
        return (x * x).sum(dim, keepdim).sqrt()
    return x.abs().sum(dim, keepdim) if p == 1 else (x.abs() ** p).sum(dim, keepdim) ** (1 / p)


def _norm(input: Tensor, p: Any = 2, dim: Any = None, keepdim: bool = False, **named: Any) -> Tensor:
    p = named.get("ord", 2 if p in (None, "fro") else p)
    if not isinstance(p, (int, float)) or not 0 < p < math.inf:
        raise MedXAIError(f"There is no rule for a norm of order {p}: use gradient or integrated_gradients.")
    return _length(input, tuple(range(input.ndim)) if dim is None else dim, keepdim, p)


def _normalize(input: Tensor, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, out: None = None) -> Tensor:
    return input / _length(input, dim, True, p).clamp_min(eps)


def _cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    return (x1 * x2).sum(dim) / (_length(x1, dim).clamp_min(eps) * _length(x2, dim).clamp_min(eps))


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return input * beta + (mat1 @ mat2) * alpha


def _baddbmm(input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return input * beta + (batch1 @ batch2) * alpha


def _addcmul(input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Tensor:
    return input + tensor1 * tensor2 * value


def _lerp(input: Tensor, end: Tensor, weight: Tensor | float) -> Tensor:
    return input + (end - input) * weight


def _glu(input: Tensor, dim: int = -1) -> Tensor:
    kept, gate = input.chunk(2, dim)
    return kept * gate.sigmoid()


DECOMPOSED: dict[str, Callable[..., Any]] = {
    "scaled_dot_product_attention": _attention,
    "multi_head_attention_forward": _multi_head_attention,
    "cosine_similarity": _cosine_similarity,
    "normalize": _normalize,
    "var": _variance,
    "std": _deviation,
    "log_softmax": lambda input, dim=None, *_, **__: input - input.logsumexp(dim, keepdim=True),
    "norm": _norm,
    "vector_norm": _norm,
    "linalg_vector_norm": _norm,
    "softmin": lambda input, dim=None, *_, **__: (-input).softmax(dim),
    "glu": _glu,
    "addmm": _addmm,
    "baddbmm": _baddbmm,
    "addcmul": _addcmul,
    "lerp": _lerp,
}
