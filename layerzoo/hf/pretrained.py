"""The attention of a pretrained transformer, cut to a window: a layer around somebody's module."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from layerzoo.attend import append, empty_cache
from layerzoo.layer import Layer, Reach, State, StateBytes
from layerzoo.shell import QKV
from layerzoo.spec import Config
from layerzoo.support import internals

sliding: Any = importlib.import_module("layerzoo.attention.sliding.rule")


class Angles:
    """cos and sin of a model's rotary positions, which its layers ask for one after the other."""

    def __init__(self, rotary: nn.Module) -> None:
        self.rotary = rotary
        self.asked: Any = None
        self.answer: Any = None

    def __call__(self, x: Tensor, start: int) -> tuple[Tensor, Tensor]:
        asked = (start, x.shape[1], x.dtype, x.device, torch.is_inference_mode_enabled())
        if asked != self.asked:
            place = torch.arange(start, start + x.shape[1], device=x.device)[None]
            self.asked, self.answer = asked, self.rotary(x, position_ids=place)
        return self.answer


class Pretrained(Layer):
    """A decoder's attention as transformers has it, over a window and the first tokens:

    o_i = sum_j softmax_j(scale <q_i, k_j>) v_j over j <= i with i - j < window or j < sinks,

    q and k with the rotary positions of the whole sequence, as they were learned. While nothing
    is hidden it runs the very function that the model was loaded with, so that it computes what
    the source does, to the bit; beyond it is `sliding_attention`. It has no name in the registry:
    it is built around a module, `LlamaAttention` or one like it, not from a spec.

    The attributes `window` (None hides nothing) and `sinks` may be set between sequences.

    Args:
        attention: the module: q_proj, k_proj, v_proj, o_proj, and perhaps q_norm and k_norm.
        angles: the model's rotary positions.
    """

    class Config(Config):
        window: int | None = None
        """A query sees this many tokens, itself included; null is all of them."""
        sinks: int = 0
        """So many of the first tokens are always visible."""

        def check(self) -> None:
            sliding.check_window(1 if self.window is None else self.window, self.sinks)

    name = "pretrained"
    kind = "attention"
    op = sliding.OP

    def __init__(self, attention: Any, angles: Angles, config: Pretrained.Config) -> None:
        super().__init__(attention.q_proj.in_features, config)
        self.attention = attention
        self.angles = angles
        self.window, self.sinks = config.window, config.sinks
        self.head_dim: int = attention.head_dim
        self.heads = attention.q_proj.out_features // self.head_dim
        self.kv_heads = attention.k_proj.out_features // self.head_dim

    @property
    def q(self) -> nn.Linear:
        return self.attention.q_proj

    @property
    def k(self) -> nn.Linear:
        return self.attention.k_proj

    @property
    def v(self) -> nn.Linear:
        return self.attention.v_proj

    @property
    def out(self) -> nn.Linear:
        return self.attention.o_proj

    def qkv(self, x: Tensor) -> QKV:
        """The projections of x, before norms and positions."""
        return self.q(x), self.k(x), self.v(x)

    def forward(
        self, x: Tensor, state: State = None, qkv: QKV | None = None
    ) -> tuple[Tensor, State]:
        B, T, _ = x.shape
        state = self.init_state(B) if state is None else state
        if T == 0:
            return torch.zeros_like(x), state
        # [B, H, T, K], as the module works
        q, k, v = (t.view(B, T, -1, self.head_dim) for t in qkv or self.qkv(x))
        if hasattr(self.attention, "q_norm"):
            q, k = self.attention.q_norm(q), self.attention.k_norm(k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        rotate = vars(sys.modules[type(self.attention).__module__])["apply_rotary_pos_emb"]
        q, k = rotate(q, k, *self.angles(x, int(state["position"])))
        o, state = self.attend(q, k.transpose(1, 2), v.transpose(1, 2), state)
        return self.out(o.reshape(B, T, -1)), state

    def attend(self, q: Tensor, k: Tensor, v: Tensor, state: State) -> tuple[Tensor, State]:
        """q `[B, H, T, K]`, k, v `[B, T, G, K]` -> o `[B, T, H, K]`."""
        T, scale = q.shape[2], self.attention.scaling
        end = int(state["position"]) + T
        if self.window is not None and end > self.window + self.sinks:
            how = {"window": self.window, "sinks": self.sinks, "scale": scale}
            return sliding.sliding_attention(
                q.transpose(1, 2), k, v, **how, state=state, impl=self.impl
            )
        k, v = append(state["k"], k), append(state["v"], v)
        attend, mask = interface(self.attention, q, end)
        keys, values = (t.to(q.dtype).transpose(1, 2) for t in (k, v))
        o, _ = attend(self.attention, q, keys, values, mask, dropout=0.0, scaling=scale)
        if self.window is not None:
            k, v = sliding.trim(k, v, end, self.window, self.sinks)
        return o, {"k": k, "v": v, "position": state["position"] + T}

    def init_state(self, batch_size: int) -> State:
        k = self.k.weight.new_empty(batch_size, 0, self.kv_heads, self.head_dim)
        return empty_cache(k, k)

    def state_bytes(self, T: int) -> StateBytes:
        kept = T
        if self.window is not None:
            kept = sliding.cached_sinks(T, self.window, self.sinks) + min(self.window - 1, T)
        return StateBytes(4 * 2 * kept * self.kv_heads * self.head_dim, buffers=8)

    def rule_flops(self, T: int) -> float:
        window = T if self.window is None else self.window
        seen = sliding.sum_of_seen(T, window) + sliding.sum_of_seen(T - window, self.sinks)
        return self.heads * 4 * self.head_dim * seen / max(1, T)

    def reach(self) -> Reach | None:
        return None if self.window is None else Reach(self.window - 1, self.sinks)


def interface(attention: Any, q: Tensor, end: int) -> tuple[Callable[..., Any], Tensor | None]:
    """The function by which transformers would attend, and the mask that it would give to it: none
    where the function knows what is causal by itself."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    T, how = q.shape[2], internals.attention_function(attention.config)
    eager = vars(sys.modules[type(attention).__module__])["eager_attention_forward"]
    function = ALL_ATTENTION_FUNCTIONS.get_interface(how, eager)
    if T == 1 or (how != "eager" and end == T):
        return function, None
    seen = torch.ones(T, end, dtype=torch.bool, device=q.device).tril(end - T)[None, None]
    if how == "eager":
        low = torch.finfo(q.dtype).min
        return function, torch.zeros_like(seen, dtype=q.dtype).masked_fill_(~seen, low)
    return function, seen
