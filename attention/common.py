"""The base of the attention layers."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerzoo.attend import empty_cache
from layerzoo.layer import Inner, State, StateBytes
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
