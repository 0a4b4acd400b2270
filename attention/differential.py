"""Differential attention: its op, the difference of two softmax maps, and its layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from layerzoo.annotations import tensor
from layerzoo.attend import CACHE, append, attend_causal, empty_cache
from layerzoo.layer import State, StateBytes
from layerzoo.nn import RMSNorm
from layerzoo.ops import Op, accumulator_dtype
from layerzoo.signature import Signature
from layerzoo.spec import SpecError

from .common import Attention

if TYPE_CHECKING:
    from jaxtyping import Float

OP = Op("differential_attention")


SIGNATURE = Signature(CACHE | {"k": tensor("B n 2*G K")})


@SIGNATURE
def differential_attention(
    q: Float[Tensor, "B T 2*H K"],
    k: Float[Tensor, "B T 2*G K"],
    v: Float[Tensor, "B T G V"],
    mix: Float[Tensor, ""] | float,
    *,
    scale: float | None = None,
    state: State = None,
    impl: str = "auto",
) -> tuple[Float[Tensor, "B T H V"], State]:
    """The difference of two attention maps reads the values: what both maps have in common goes.

    o_i = sum_{j <= i} (softmax_j(scale <q1_i, k1_j>) - mix softmax_j(scale <q2_i, k2_j>)) v_j

    where

    - q1_i, k1_j `[K]` are a query and a key of the first map, q2_i, k2_j of the second;
    - v_j `[V]` is the value that both maps read;
    - mix is the paper's lambda.

    Args:
        q: The queries: the first half of the heads is q1, the second q2.
        k: The keys, likewise.
        v: The values. Head h of both maps reads key and value head h // (H / G).
        mix: The weight of the second map, a number.
        scale: The logits are multiplied by this number; None is K^-1/2.
        state: The cache {k, v, position}; None is empty. It grows with T.
        impl: Run this implementation: auto, recurrent, chunked or triton.

    Returns:
        The read-outs in q's dtype, and the cache with the new tokens.

    Raises:
        SpecError: An argument has another shape, or G does not divide H.
        ImplError: The impl cannot run here.

    Source: Ye et al. 2024, arXiv 2410.05258, eq. 1.
    """
    if not is_compiling():
        SIGNATURE.check(locals())
    state = empty_cache(k, v) if state is None else state
    k, v = append(state["k"], k), append(state["v"], v)
    o = OP(impl, q, k, v, mix, scale=q.shape[-1] ** -0.5 if scale is None else scale)
    return o, {"k": k, "v": v, "position": state["position"] + q.shape[1]}


@OP.register("recurrent")
def _recurrent(q, k, v, mix, *, scale):
    past, G = k.shape[1] - q.shape[1], v.shape[2]
    outputs = []
    for t in range(q.shape[1]):
        end = past + t + 1
        query = q[:, t].unflatten(1, (2, G, -1))  # [B, 2, G, H / G, K]
        keys = k[:, :end].unflatten(2, (2, G)).permute(0, 2, 3, 4, 1)
        first, second = (scale * query @ keys).softmax(-1).unbind(1)
        outputs.append(((first - mix * second) @ v[:, :end].transpose(1, 2)).flatten(1, 2))
    empty = q.new_zeros(len(q), 0, q.shape[2] // 2, v.shape[3])
    return torch.stack(outputs, 1) if outputs else empty


# Upcast: maps rounded to bfloat16 first would leave their errors behind.
@OP.register("chunked", transformable=True)
def _chunked(q, k, v, mix, *, scale):
    maps = zip(q.chunk(2, 2), k.chunk(2, 2), strict=True)
    first, second = (attend_causal(a, b, v, scale) for a, b in maps)
    return first - mix * second


class DifferentialAttention(Attention, name="differential"):
    """Differential attention: what two attention maps have in common, noise, is taken away.

    o_i = (1 - lambda_init) norm(sum_{j <= i} (a1_ij - lambda a2_ij) v_j),
    a_ij = softmax_j(<q_i, k_j> / sqrt(K)) of each map,
    lambda = exp(<l_q1, l_k1>) - exp(<l_q2, l_k2>) + lambda_init

    where

    - q_i, k_j `[K]` are the query and key of a head in one map, and v_j `[V]` its value in both;
    - lambda is one number for the layer, and l_q1, l_k1, l_q2, l_k2 `[K]` are learned;
    - norm is an RMS norm per head.

    Its state is the cache of all keys and values: it grows with T. A head has two queries and two
    keys of key_dim channels; null means dim / (2 heads).
    """

    class Config(Attention.Config):
        lambda_init: float = 0.8
        """lambda starts at this value. The paper's is 0.8 - 0.6 exp(-0.3 l) for layer l = 0, 1,
        .., so 0.2 in the first."""

        def check(self) -> None:
            super().check()
            if not 0 <= self.lambda_init < 1:
                raise SpecError(
                    f"lambda_init: must be at least 0 and below 1, got {self.lambda_init}"
                )

    source = "Ye et al. 2024, arXiv 2410.05258"
    op = OP
    maps = 2
    cases = (
        {"heads": 2},
        {"heads": 4, "kv_heads": 2, "key_dim": 4, "qk_norm": "l2", "out_gate": "sigmoid"},
        {"heads": 3, "key_dim": 5, "value_dim": 6, "rotary": None, "lambda_init": 0.2},
    )

    def __init__(self, dim: int, config: Config) -> None:
        super().__init__(dim, config)
        self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = (
            nn.Parameter(0.1 * torch.randn(self.key_dim)) for _ in range(4)
        )
        self.norm = RMSNorm(self.value_dim, eps=1e-5)

    def mix(self) -> Tensor:
        """lambda, a number in float32 or wider."""
        wide = accumulator_dtype(self.lambda_q1)
        q1, k1, q2, k2 = (
            t.to(wide) for t in (self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2)
        )
        return (q1 * k1).sum().exp() - (q2 * k2).sum().exp() + self.config.lambda_init

    def attend(self, tensors: dict[str, Tensor], state: State) -> tuple[Tensor, State]:
        q, k, v = tensors.values()
        o, state = differential_attention(q, k, v, self.mix(), state=state, impl=self.impl)
        return self.normalise(o), state

    def normalise(self, o: Tensor) -> Tensor:
        """(1 - lambda_init) norm(o) of the heads' outputs `[B, T, H, V]`."""
        return (1 - self.config.lambda_init) * self.norm(o)

    def state_bytes(self, T: int) -> StateBytes:
        return self.cache_bytes(T)

    def rule_flops(self, T: int) -> float:
        return self.pair_flops() * (T + 1) / 2
