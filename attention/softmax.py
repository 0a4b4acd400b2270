"""Causal softmax attention: its op over a growing cache, and its layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.compiler import is_compiling

from layerzoo.checked import Signature
from layerzoo.layer import State, StateBytes
from layerzoo.ops import Op

from .heads import (
    CACHE,
    Attention,
    append,
    attend_causal,
    attend_one,
    empty_cache,
)

if TYPE_CHECKING:
    from jaxtyping import Float

OP = Op("softmax_attention")


SIGNATURE = Signature(CACHE)


@SIGNATURE
def softmax_attention(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T G V"],
    *,
    scale: float | None = None,
    state: State = None,
    impl: str = "auto",
) -> tuple[Float[Tensor, "B T H V"], State]:
    """o_i = sum_{j <= i} softmax_j(scale <q_i, k_j>) v_j, over the cache and the new tokens.

    Args:
        q, k, v: query head h reads key/value head h // (H / G).
        scale: default K^-1/2.
        state: cache {k, v, position}, default empty; it grows with T.
        impl: auto, recurrent, chunked or triton.

    Raises:
        SpecError: arguments of other shapes, or G does not divide H. ImplError: an impl that
            cannot run here.

    Source: Vaswani et al. 2017, arXiv 1706.03762, eq. 1; grouped-query 2305.13245.
    """
    if not is_compiling():
        SIGNATURE.check(locals())
    state = empty_cache(k, v) if state is None else state
    k, v = append(state["k"], k), append(state["v"], v)
    o = OP(impl, q, k, v, scale=q.shape[-1] ** -0.5 if scale is None else scale)
    return o, {"k": k, "v": v, "position": state["position"] + q.shape[1]}


@OP.register("recurrent")
def _recurrent(q, k, v, *, scale):
    past = k.shape[1] - q.shape[1]
    outputs = [
        attend_one(q[:, t], k[:, : past + t + 1], v[:, : past + t + 1], scale)
        for t in range(q.shape[1])
    ]
    return torch.stack(outputs, 1) if outputs else q.new_zeros(*q.shape[:3], v.shape[3])


OP.register("chunked", upcast=False, transformable=True)(attend_causal)


class Softmax(Attention, name="softmax"):
    """Causal softmax attention with grouped-query heads and rotary positions.

    o_i = sum_{j <= i} softmax_j(<q_i, k_j> / sqrt(K)) v_j

    Its state is the cache of all keys and values: it grows with T and forgets nothing.
    """

    source = "Vaswani et al. 2017, arXiv 1706.03762"
    op = OP
    cases = (
        {"heads": 2, "rotary_scaling": {"name": "yarn", "factor": 4.0, "original_length": 32}},
        {"heads": 6, "kv_heads": 2, "key_dim": 4, "qk_norm": "l2", "out_gate": "sigmoid"},
        {"heads": 3, "key_dim": 5, "value_dim": 7, "rotary": None, "qk_norm": "none"},
    )

    def attend(self, tensors: dict[str, Tensor], state: State) -> tuple[Tensor, State]:
        q, k, v = tensors.values()
        return softmax_attention(q, k, v, state=state, impl=self.impl)

    def state_bytes(self, T: int) -> StateBytes:
        return self.cache_bytes(T)

    def rule_flops(self, T: int) -> float:
        return self.pair_flops() * (T + 1) / 2
