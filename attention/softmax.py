"""Causal softmax attention: its op over a growing cache, and its layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.compiler import is_compiling

from layerzoo.attend import CACHE, append, attend_causal, attend_one, empty_cache
from layerzoo.layer import Reduction, State, StateBytes
from layerzoo.ops import Op
from layerzoo.signature import Signature

from .common import Attention
from .sink_logit import attend_causal_with_sink, remove_sink, sink_parameter, with_sink

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
    sink_logit: Float[Tensor, " H"] | None = None,
    state: State = None,
    impl: str = "auto",
) -> tuple[Float[Tensor, "B T H V"], State]:
    """Each query reads the values of all tokens so far, weighted by how well their keys match.

    o_i = sum_{j <= i} p_ij v_j,   p_ij = e^(scale <q_i, k_j>) / sum_{l <= i} e^(scale <q_i, k_l>)

    and with a sink logit

    p_ij = e^(scale <q_i, k_j>) / (e^sink + sum_{l <= i} e^(scale <q_i, k_l>)),

    where

    - q_i, k_j `[K]` and v_j `[V]` are a query, a key and a value of one head;
    - j and l run over the cached tokens and the new ones;
    - sink is the sink logit of the head.

    Args:
        q: The queries. Query head h reads key and value head h // (H / G).
        k: The keys.
        v: The values.
        scale: The logits are multiplied by this number; None is K^-1/2.
        sink_logit: This logit of each query head belongs to no token. None is no such logit, which
            is the same as -inf.
        state: The cache {k, v, position}; None is empty. It grows with T.
        impl: Run this implementation: auto, recurrent, chunked or triton.

    Returns:
        The read-outs in q's dtype, and the cache with the new tokens.

    Raises:
        SpecError: An argument has another shape, or G does not divide H.
        ImplError: The impl cannot run here.

    Source: Vaswani et al. 2017, arXiv 1706.03762, eq. 1; grouped queries, 2305.13245; sink logit,
    OpenAI 2025, arXiv 2508.10925, section 2.2.
    """
    if not is_compiling():
        SIGNATURE.check(locals())
    state = empty_cache(k, v) if state is None else state
    k, v = append(state["k"], k), append(state["v"], v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    o = OP(impl, q, k, v, scale=scale, sink_logit=sink_logit)
    return o, {"k": k, "v": v, "position": state["position"] + q.shape[1]}


@OP.register("recurrent")
def _recurrent(q, k, v, *, scale, sink_logit=None):
    past = k.shape[1] - q.shape[1]
    outputs = []
    for t in range(q.shape[1]):
        end = past + t + 1
        keys, values = k[:, :end], v[:, :end]
        outputs.append(attend_one(q[:, t], keys, values, scale, sink_logit=sink_logit))
    return torch.stack(outputs, 1) if outputs else q.new_zeros(*q.shape[:3], v.shape[3])


@OP.register("chunked", upcast=False, transformable=True)
def _chunked(q, k, v, *, scale, sink_logit=None):
    if sink_logit is None:
        return attend_causal(q, k, v, scale)
    if q.shape[1] == 1:  # else all of the cache would be copied, to have the sink in front
        return OP.impls["recurrent"](q, k, v, scale=scale, sink_logit=sink_logit)
    o = attend_causal_with_sink(*with_sink(q, k, v, sink_logit, scale))
    return o[..., : v.shape[3]]


class SoftmaxAttention(Attention, name="softmax"):
    """Causal softmax attention with grouped-query heads and rotary positions.

    o_i = sum_{j <= i} softmax_j(<q_i, k_j> / sqrt(K)) v_j

    where

    - q_i, k_j `[K]` and v_j `[V]` are the query, key and value of a head, after norm and rotation;
    - the softmax runs over the tokens j <= i.

    Its state is the cache of all keys and values: it grows with T and forgets nothing.
    """

    class Config(Attention.Config):
        sink_logit: float | None = None
        """A learned logit per head, which belongs to no token, starts at this value. The divisor
        of the softmax becomes e^sink + sum_j e^<q_i, k_j> (GPT-OSS, 2508.10925). null means no
        logit."""

    source = "Vaswani et al. 2017, arXiv 1706.03762"
    op = OP
    cases = (
        {"heads": 2, "rotary_scaling": {"name": "yarn", "factor": 4.0, "original_length": 32}},
        {"heads": 6, "kv_heads": 2, "key_dim": 4, "qk_norm": "l2", "out_gate": "sigmoid"},
        {"heads": 3, "key_dim": 5, "value_dim": 7, "rotary": None, "qk_norm": "none"},
        {"heads": 4, "kv_heads": 2, "sink_logit": 0.5},
    )
    reductions = (
        Reduction({"heads": 2, "sink_logit": 0.0}, {"name": "softmax", "heads": 2}, remove_sink),
    )

    def __init__(self, dim: int, config: Config) -> None:
        super().__init__(dim, config)
        self.sink_logit = sink_parameter(config.sink_logit, self.heads)

    def attend(self, tensors: dict[str, Tensor], state: State) -> tuple[Tensor, State]:
        q, k, v = tensors.values()
        return softmax_attention(q, k, v, sink_logit=self.sink_logit, state=state, impl=self.impl)

    def state_bytes(self, T: int) -> StateBytes:
        return self.cache_bytes(T)

    def rule_flops(self, T: int) -> float:
        return self.pair_flops() * (T + 1) / 2
