"""The base of the attention layers, their cache, and plain causal attention."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from layerzoo.forms import tensor
from layerzoo.layer import Inner, State, StateBytes
from layerzoo.ops import transforming
from layerzoo.shell import QKV, Headed, Shell, next_position


class Attention(Headed):
    """A layer with heads whose op reads a cache of keys and values.

    `forward` runs three steps: tensors = project(x, state);  o, state = attend(tensors, state);
    y = merge(o, x).

    Keys are cached after rotation, by absolute position. The state holds k `[B, n, kv_heads, K]`,
    v `[B, n, kv_heads, V]`, and the position, which is the number of tokens seen, a 0-d integer on
    the CPU.

    With qk_norm l2 the logits are sqrt(K) tau_h <q, k>. The temperature tau_h of a head is learned
    and starts at 1, which makes logits as large as with rms.
    """

    class Config(Shell):
        kv_heads: int | None = None
        """Keys and values have this many heads, a divisor of heads; null means heads. heads /
        kv_heads queries read each of them."""
        qk_norm: Literal["l2", "rms", "none"] = "rms"
        out_norm: Literal["rms", "none"] = "none"
        rotary: float | None = 10000.0

        grouped = "kv_heads"

    kind = "attention"

    def __init__(self, dim: int, config: Any) -> None:
        super().__init__(dim, config, config.heads, config.groups, config.groups)
        self.kv_heads = config.groups
        if config.qk_norm == "l2":
            self.temperature = nn.Parameter(torch.ones(self.maps * self.heads, 1))

    def attend(self, tensors: dict[str, Tensor], state: State) -> tuple[Tensor, State]:
        """Run the layer's op on what `project` returns."""
        raise NotImplementedError

    def project(self, x: Tensor, state: State, qkv: QKV | None = None) -> dict[str, Tensor]:
        """Project x `[B, T, D]`, which follows the tokens of `state`, to q `[B, T, H, K]`, k
        `[B, T, kv_heads, K]` and v `[B, T, kv_heads, V]`, by name.

        Args:
            qkv: projections that another layer has made; they replace this layer's own.
        """
        # int() of a position breaks a compiled graph, so it is read only where rotary needs it.
        q, k, v = self.split(x, next_position(state) if self.config.rotary else 0, qkv)
        if self.config.qk_norm == "l2":  # the op scales by K^-1/2
            q = q * (self.key_dim * self.temperature).to(q.dtype)
        return {"q": q, "k": k, "v": v}

    def inner(self, x: Tensor, state: State = None) -> Inner:
        return attention_alone(self, x, state)

    def forward(
        self, x: Tensor, state: State = None, qkv: QKV | None = None
    ) -> tuple[Tensor, State]:
        state = self.init_state(x.shape[0]) if state is None else state
        o, state = self.attend(self.project(x, state, qkv), state)
        return self.merge(o, x), state

    def init_state(self, batch_size: int) -> State:
        weight: Any = self.k.weight
        k = weight.new_empty(batch_size, 0, self.maps * self.kv_heads, self.key_dim)
        return empty_cache(k, weight.new_empty(batch_size, 0, self.kv_heads, self.value_dim))

    def cache_bytes(self, tokens: int) -> StateBytes:
        channels = self.kv_heads * (self.maps * self.key_dim + self.value_dim)
        return StateBytes(4 * tokens * channels, buffers=8)

    def pair_flops(self) -> float:
        """FLOPs of the matrix products for one query and one key, over all heads."""
        return self.heads * 2.0 * (self.maps * self.key_dim + self.value_dim)


def attention_alone(layer: Any, x: Tensor, state: State) -> Inner:
    """`Layer.inner` of an attention layer: `attend`, and the tensors that x gives it."""

    def fn(tensors: dict[str, Tensor], state: State) -> tuple[Tensor, State]:
        state = layer.init_state(len(tensors["q"])) if state is None else state
        return layer.attend(tensors, state)

    state = layer.init_state(len(x)) if state is None else state
    return Inner(fn, layer.project(x, state))


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
