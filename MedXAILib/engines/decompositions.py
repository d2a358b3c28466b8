"""Operators that are several others in one, as those others, for which there are rules."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


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
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(-1) @ value


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
    """(L, N, E), (S, N, E), (S, N, E), or without N -> (L, N, E)."""
    alone = query.ndim == 2
    if alone:
        query, key, value = query[:, None], key[:, None], value[:, None]
    if in_proj_weight is not None:
        weights: Sequence[Tensor | None] = in_proj_weight.chunk(3)
    else:
        weights = (q_proj_weight, k_proj_weight, v_proj_weight)
    biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
    heads: list[Tensor] = []
    for t, weight, bias in zip((query, key, value), weights, biases, strict=True):
        assert weight is not None
        heads.append(F.linear(t, weight, bias).unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3))
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
    together = _attention(heads[0], heads[1], heads[2], mask).permute(2, 0, 1, 3).flatten(2)
    result = F.linear(together, out_proj_weight, out_proj_bias)
    return (result[:, 0] if alone else result), None


def _deviation(x: Tensor, dim: Any = None, *, correction: float = 1, keepdim: bool = False, **_: Any) -> Tensor:
    return _variance(x, dim, correction=correction, keepdim=keepdim).sqrt()


def _variance(
    x: Tensor,
    dim: Any = None,
    unbiased: bool | None = None,
    keepdim: bool = False,
    *,
    correction: float | None = None,
) -> Tensor:
    dims = tuple(range(x.ndim)) if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)
    count = math.prod(x.shape[d] for d in dims)
    if correction is None:
        correction = 0 if unbiased is False else 1
    centred = x - x.mean(dims, keepdim=True)
    return (centred * centred).sum(dims, keepdim) / (count - correction)


def _length(x: Tensor, dim: Any, keepdim: bool = False) -> Tensor:
    return (x * x).sum(dim, keepdim).sqrt()


def _normalize(input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: None = None) -> Tensor:
    if p != 2:
        raise NotImplementedError
    return input / _length(input, dim, True).clamp_min(eps)


def _cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    return (x1 * x2).sum(dim) / (_length(x1, dim) * _length(x2, dim)).clamp_min(eps)


DECOMPOSED: dict[str, Callable[..., Any]] = {
    "scaled_dot_product_attention": _attention,
    "multi_head_attention_forward": _multi_head_attention,
    "cosine_similarity": _cosine_similarity,
    "normalize": _normalize,
    "var": _variance,
    "log_softmax": lambda x, dim=None, *_, **__: x.softmax(dim).log(),
    "softmin": lambda x, dim=None, *_, **__: (-x).softmax(dim),
    "glu": lambda x, dim=-1: (lambda a, b: a * b.sigmoid())(*x.chunk(2, dim)),
    "addmm": lambda b, x, y, *, beta=1, alpha=1: b * beta + (x @ y) * alpha,
    "baddbmm": lambda b, x, y, *, beta=1, alpha=1: b * beta + (x @ y) * alpha,
    "addcmul": lambda b, x, y, *, value=1: b + x * y * value,
    "lerp": lambda a, b, weight: a + (b - a) * weight,
}
