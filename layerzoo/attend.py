"""Plain causal attention, and a cache of keys and values: what attention layers are made of."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from layerzoo.annotations import tensor
from layerzoo.layer import State
from layerzoo.ops import transforming

CACHE = {"k": tensor("B n G K"), "v": tensor("B n G V"), "position": tensor("", integer=True)}
"""The tensors of a cache, for `Signature`."""


def empty_cache(k: Tensor, v: Tensor) -> State:
    """A cache without tokens, of the dtype, device and other sizes of k and v."""
    k, v = k[:, :0].detach(), v[:, :0].detach()
    return {"k": k, "v": v, "position": torch.zeros((), dtype=torch.int64, device="cpu")}


def append(past: Tensor, new: Tensor) -> Tensor:
    """The cache `past` with `new` behind it, in the dtype of `past`, which is not changed."""
    return torch.cat((past, new.to(past.dtype)), 1) if past.shape[1] else new


def attend_one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bias: Tensor | None = None,
    sink_logit: Tensor | None = None,
) -> Tensor:
    """o = softmax(scale q k^T + bias) v for one query.

    Args:
        q: `[B, H, K]`; query head h reads key head h // (H / G).
        k, v: `[B, n, G, K]` and `[B, n, G, V]`.
        bias: `[B, H, n]`.
        sink_logit: `[H]`, one more logit in the softmax, whose value is 0.
    """
    grouped = q.unflatten(1, (k.shape[2], -1))  # [B, G, H / G, K]
    logits = scale * grouped @ k.permute(0, 2, 3, 1)
    if bias is not None:
        logits = logits + bias.view_as(logits)
    if sink_logit is not None:
        sink = sink_logit.view(1, *grouped.shape[1:3], 1).expand(len(q), -1, -1, 1)
        weights = torch.cat((logits, sink), -1).softmax(-1)[..., :-1]
    else:
        weights = logits.softmax(-1)
    return (weights @ v.transpose(1, 2)).flatten(1, 2)


def dot_product_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, **how: Any) -> Tensor:
    """PyTorch's attention. Under torch.func it takes the form that has all derivatives."""
    if scale <= 0:  # kernels multiply hidden logits, -inf, by the scale
        q, scale = q * scale, 1.0
    forms = sdpa_kernel(SDPBackend.MATH) if transforming() else nullcontext()
    with forms:
        return F.scaled_dot_product_attention(q, k, v, scale=scale, **how)


def attend_causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention of the last T of n tokens, through PyTorch's attention and in q's dtype.

    Args:
        q: `[B, T, H, K]`.
        k, v: `[B, n, G, K]` and `[B, n, G, V]`, with n >= T.

    Returns:
        `[B, T, H, V]`.
    """
    new, total, wide = q.shape[1], k.shape[1], v.shape[3]
    if new == 0:
        return q.new_zeros(*q.shape[:3], wide)
    mask = None
    if 1 < new < total:
        mask = torch.ones(new, total, dtype=torch.bool, device=q.device).tril(total - new)
    query, k, v = (t.to(q.dtype).transpose(1, 2) for t in (q, k, v))
    # The kernels that keep no T x n matrix want values as wide as keys.
    parts: tuple[Tensor, ...] = (v,)
    if new > 1 and wide != q.shape[3]:
        parts = F.pad(v, (0, -wide % q.shape[3])).split(q.shape[3], 3)
    outputs = [
        dot_product_attention(
            query,
            k,
            part,
            attn_mask=mask,
            is_causal=new == total,
            scale=scale,
            enable_gqa=query.shape[1] != k.shape[1],
        )
        for part in parts
    ]
    o = torch.cat(outputs, 3) if outputs[1:] else outputs[0]
    return o[..., :wide].transpose(1, 2)
