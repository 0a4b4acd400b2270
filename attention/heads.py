"""What attention layers share: grouped-query projections, rotary positions, norm and gate, and
the plain form of attention over a cache."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from layerzoo.forms import tensor
from layerzoo.layer import Inner, Layer, State, StateBytes
from layerzoo.nn import RMSNorm
from layerzoo.ops import transforming
from layerzoo.shell import QKV
from layerzoo.spec import SpecError, divide

from .rotary import RotaryConfig


class HeadsConfig(RotaryConfig):
    """Fields that every attention layer has.

    heads: query heads H. kv_heads: key/value heads, a divisor of heads; null means heads.
    head_dim: K of q, k and v; null means dim / heads.
    rotary, rotary_scaling: see RotaryConfig.
    qk_norm: RMS norm of q and k per head. out_gate: sigmoid gate of the output (2505.06708).
    """

    heads: int = 4
    kv_heads: int | None = None
    head_dim: int | None = None
    qk_norm: bool = False
    out_gate: bool = False

    def check(self) -> None:
        for name in ("heads", "kv_heads", "head_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SpecError(f"{name}: must be at least 1, got {value}")
        RotaryConfig.check(self)
        if self.kv_heads:
            divide(self.heads, self.kv_heads, "kv_heads")


class Attention(Layer):
    """Projections, rotary positions and output around an attention op over a cache.

    Keys are cached after rotation, by absolute position. The state is a dict of k, v
    `[B, n, kv_heads, K]` and the position, a 0-d CPU integer: the number of tokens seen.
    """

    Config: ClassVar[Any] = HeadsConfig
    kind = "attention"
    maps = 1
    """Queries and keys of a head; its values are as wide as all of them."""

    def __init__(self, dim: int, config: HeadsConfig) -> None:
        super().__init__(dim, config)
        self.heads = config.heads
        self.kv_heads = config.kv_heads or config.heads
        self.head_dim = config.head_dim or divide(
            dim, self.maps * self.heads, "heads (or give head_dim)"
        )
        config.check_channels(self.head_dim, "head_dim")
        inner, cached = (self.maps * n * self.head_dim for n in (self.heads, self.kv_heads))
        self.q = nn.Linear(dim, inner, bias=False)
        self.k = nn.Linear(dim, cached, bias=False)
        self.v = nn.Linear(dim, cached, bias=False)
        self.out = nn.Linear(inner, dim, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, eps=1e-6)
            self.k_norm = RMSNorm(self.head_dim, eps=1e-6)
        if config.out_gate:
            self.gate = nn.Linear(dim, inner, bias=False)

    def attend(self, tensors: dict[str, Tensor], state: State) -> tuple[Tensor, State]:
        """The layer's op, on what `project` returns."""
        raise NotImplementedError

    def qkv(self, x: Tensor) -> QKV:
        """The projections of x."""
        return self.q(x), self.k(x), self.v(x)

    def project(self, x: Tensor, state: State, qkv: QKV | None = None) -> dict[str, Tensor]:
        """x `[B, T, D]`, after the tokens of `state` -> q `[B, T, H, K]` and k, v
        `[B, T, kv_heads, K]`, by name. qkv: of another layer."""
        q, k, v = qkv or self.qkv(x)
        q, k = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k))
        v = v.unflatten(-1, (self.kv_heads, -1))
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.config.rotary:  # else the position is not read, nor a graph broken
            start = int(state["position"])
            q, k = (self.config.rotate(t, start) for t in (q, k))
        return {"q": q, "k": k, "v": v}

    def inner(self, x: Tensor, state: State = None) -> Inner:
        return attention_alone(self, x, state)

    def forward(
        self, x: Tensor, state: State = None, qkv: QKV | None = None
    ) -> tuple[Tensor, State]:
        state = self.init_state(x.shape[0]) if state is None else state
        o, state = self.attend(self.project(x, state, qkv), state)
        o = o.flatten(-2)
        if self.config.out_gate:
            o = o * self.gate(x).sigmoid()
        return self.out(o), state

    def init_state(self, batch_size: int) -> State:
        weight: Any = self.k.weight
        k = weight.new_empty(batch_size, 0, self.maps * self.kv_heads, self.head_dim)
        return empty_cache(k, k.view(batch_size, 0, self.kv_heads, self.maps * self.head_dim))

    def cache_bytes(self, tokens: int) -> StateBytes:
        channels = self.maps * self.kv_heads * self.head_dim
        return StateBytes(4 * 2 * tokens * channels, buffers=8)


def attention_alone(layer: Any, x: Tensor, state: State) -> Inner:
    """What a layer runs between `project` and its output: `attend`."""

    def fn(tensors: dict[str, Tensor], state: State) -> tuple[Tensor, State]:
        state = layer.init_state(len(tensors["q"])) if state is None else state
        return layer.attend(tensors, state)

    state = layer.init_state(len(x)) if state is None else state
    return Inner(fn, layer.project(x, state))


CACHE = {"k": tensor("B n G K"), "v": tensor("B n G V"), "position": tensor("", integer=True)}
"""The form of a cache."""


def empty_cache(k: Tensor, v: Tensor) -> State:
    """A cache without tokens, like k and v in all but length."""
    k, v = k[:, :0].detach(), v[:, :0].detach()
    return {"k": k, "v": v, "position": torch.zeros((), dtype=torch.int64, device="cpu")}


def append(past: Tensor, new: Tensor) -> Tensor:
    """A longer cache in the dtype of what it holds; `past` stays as it is."""
    return torch.cat((past, new.to(past.dtype)), 1) if past.shape[1] else new


def attend_one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bias: Tensor | None = None,
    sink_logit: Tensor | None = None,
) -> Tensor:
    """o = softmax(scale q k^T + bias) v for one query `[B, H, K]` over k, v `[B, n, G, K | V]`,
    where query head h reads key head h // (H / G), and bias is `[B, H, n]`. sink_logit `[H]` is
    one logit more, without a value."""
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
    """PyTorch's attention; inside torch.func that of its forms which has all derivatives."""
    if scale <= 0:  # its kernels multiply what is hidden, -inf, too
        q, scale = q * scale, 1.0
    forms = sdpa_kernel(SDPBackend.MATH) if transforming() else nullcontext()
    with forms:
        return F.scaled_dot_product_attention(q, k, v, scale=scale, **how)


def attend_causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of the last T of n tokens to all before them: q `[B, T, H, K]`, k, v
    `[B, n, G, K | V]` -> `[B, T, H, V]`, in q's dtype and through PyTorch's attention."""
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
