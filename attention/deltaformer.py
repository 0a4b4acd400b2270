"""DeltaFormer: its op, softmax attention over values that a delta rule corrects, and its layer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from layerzoo.annotations import tensor
from layerzoo.attend import append, attend_one
from layerzoo.layer import Reduction, State, StateBytes
from layerzoo.ops import Op, accumulator_dtype
from layerzoo.shell import QKV
from layerzoo.signature import FRACTION, Signature

from .common import Attention

if TYPE_CHECKING:
    from jaxtyping import Float

OP = Op("delta_attention")
SIZE = 64
"""Tokens whose corrected values are the solution of one triangular system."""

CACHE = {"k": tensor("B n G K"), "u": tensor("B n H V"), "position": tensor("", integer=True)}
SIGNATURE = Signature(CACHE, beta=FRACTION)


@SIGNATURE
def delta_attention(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T G V"],
    beta: Float[Tensor, "B T H"],
    *,
    scale: float | None = None,
    state: State = None,
    impl: str = "auto",
) -> tuple[Float[Tensor, "B T H V"], State]:
    """Softmax attention over values from which what the earlier tokens hold has been taken.

    u_t = v_t - beta_t sum_{j < t} softmax_{j < t}(scale <q_t, k_j>) u_j,   u_0 = v_0,
    o_t = sum_{j <= t} softmax_{j <= t}(scale <q_t, k_j>) u_j

    where

    - q_t, k_t `[K]` and v_t `[V]` are the query, key and value of a head;
    - u_t `[V]` is the corrected value of a query head, which is cached in place of v_t;
    - beta_t is the strength of the correction;
    - j runs over the cached tokens and the new ones, each softmax over the tokens below its sum.

    Args:
        q: The queries. Query head h reads key and value head h // (H / G).
        k: The keys.
        v: The values.
        beta: The strength of the correction of every token and query head, in [0, 1].
        scale: The products of q and k are multiplied by this number; None is K^-1/2.
        state: The cache {k, u, position}; None is empty. It grows with T. u has a head for each
            query head, because u_t depends on q_t.
        impl: Run this implementation: auto, recurrent, chunked or triton.

    Returns:
        The read-outs in q's dtype, and the cache with the new tokens.

    Raises:
        SpecError: An argument has another shape, G does not divide H, or a beta is not a fraction.
        ImplError: The impl cannot run here.

    Source: Zhong et al. 2025, arXiv 2505.19488.
    """
    if not is_compiling():
        SIGNATURE.check(locals())
    state = empty(k, v, q.shape[2]) if state is None else state
    keys = append(state["k"], k)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    o, u = OP(impl, q, keys, v, beta, state["u"], scale=scale)
    u = append(state["u"], u)
    return o, {"k": keys, "u": u, "position": state["position"] + q.shape[1]}


def empty(k: Tensor, v: Tensor, heads: int) -> State:
    """A cache without tokens, of the sizes of k `[B, n, G, K]` and v `[B, n, G, V]`.

    u is kept in the accumulator's dtype, because later tokens are made of it."""
    u = torch.empty(len(v), 0, heads, v.shape[3], dtype=accumulator_dtype(v), device=v.device)
    position = torch.zeros((), dtype=torch.int64, device="cpu")
    return {"k": k[:, :0].detach(), "u": u, "position": position}


@OP.register("recurrent")
def _recurrent(q, k, v, beta, u, *, scale):
    v = v.repeat_interleave(q.shape[2] // v.shape[2], 2)
    past = k.shape[1] - q.shape[1]
    outputs = []
    for t in range(q.shape[1]):
        i = past + t
        keys = k[:, : i + 1].repeat_interleave(q.shape[2] // k.shape[2], 2)
        new = v[:, t]
        if i:
            new = new - beta[:, t, :, None] * attend_one(q[:, t], keys[:, :i], u, scale)
        u = torch.cat((u, new[:, None]), 1)
        outputs.append(attend_one(q[:, t], keys, u, scale))
    o = torch.stack(outputs, 1) if outputs else torch.zeros_like(v)
    return o, u[:, past:]


@OP.register("chunked", transformable=True)
def _chunked(q, k, v, beta, u, *, scale):
    # Heads first: [B, H, n, ...].
    groups, past = q.shape[2] // k.shape[2], k.shape[1] - q.shape[1]
    k, v = (x.transpose(1, 2).repeat_interleave(groups, 1) for x in (k, v))
    q, u, beta = q.transpose(1, 2), u.transpose(1, 2), beta.transpose(1, 2)[..., None]
    outputs = []
    for n in range(0, q.shape[2], SIZE):
        rows = slice(n, n + SIZE)
        queries, start = q[:, :, rows], past + n
        end = start + queries.shape[2]
        logits = scale * queries @ k[:, :, :end].mT
        seen = torch.ones(end - start, end, dtype=torch.bool, device=q.device).tril(start)
        before = seen.tril(start - 1)
        hidden = ~before
        hidden[:, 0] = False  # the first of all tokens has none before it; it is left out below
        weights = logits.masked_fill(hidden, -torch.inf).softmax(-1) * before
        # u = v - beta (weights on the past) u_past - beta (weights in the chunk) u
        weights = beta[:, :, rows] * weights
        known = v[:, :, rows] - weights[..., :start] @ u
        system = weights[..., start:]
        new = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True)
        u = torch.cat((u, new), 2)
        outputs.append(logits.masked_fill(~seen, -torch.inf).softmax(-1) @ u)
    o = torch.cat(outputs, 2) if outputs else torch.zeros_like(v)
    return o.transpose(1, 2), u[:, :, past:].transpose(1, 2)


def never_correct(layer: Any) -> None:
    """The gate's neutral value: beta = sigmoid(-inf), which is zero."""
    nn.init.zeros_(layer.beta.weight)
    nn.init.constant_(layer.beta.bias, -math.inf)


class DeltaFormer(Attention, name="deltaformer"):
    """DeltaFormer: softmax attention over a cache of values that a delta rule corrects.

    u_t = v_t - beta_t sum_{j < t} softmax_{j < t}(<q_t, k_j> / sqrt(K)) u_j,   u_0 = v_0,
    o_t = sum_{j <= t} softmax_{j <= t}(<q_t, k_j> / sqrt(K)) u_j,   beta_t = sigmoid(x_t w)

    where

    - q_t, k_t `[K]` and v_t `[V]` are the query, key and value of a head, after norm and rotation;
    - u_t `[V]` is the value less what the cache holds for the query;
    - beta_t is the strength of the correction per head, and w is learned;
    - each softmax runs over the tokens below its sum.

    Its state is the cache of all keys and corrected values: it grows with T. With grouped heads
    each query head has corrected values of its own, because u_t depends on q_t.
    """

    class Config(Attention.Config):
        beta_bias: float | None = None
        """b in beta_t = sigmoid(x_t w + b) starts at this value. null means no b, so that beta_t
        starts at a half."""

    source = "Zhong et al. 2025, arXiv 2505.19488"
    op = OP
    cases = (
        {"heads": 2},
        {"heads": 4, "kv_heads": 2, "beta_bias": 1.0, "out_gate": "silu", "qk_norm": "l2"},
        {"heads": 3, "key_dim": 5, "value_dim": 7, "rotary": None, "qk_norm": "none"},
    )
    reductions = (
        Reduction({"heads": 2, "beta_bias": 0.0}, {"name": "softmax", "heads": 2}, never_correct),
    )

    def __init__(self, dim: int, config: Config) -> None:
        super().__init__(dim, config)
        self.beta = nn.Linear(dim, self.heads, bias=config.beta_bias is not None)
        if config.beta_bias is not None:
            nn.init.constant_(self.beta.bias, config.beta_bias)

    def project(self, x: Tensor, state: State, qkv: QKV | None = None) -> dict[str, Tensor]:
        return {**super().project(x, state, qkv), "beta": self.beta(x).sigmoid()}

    def attend(self, tensors: dict[str, Tensor], state: State) -> tuple[Tensor, State]:
        q, k, v, beta = tensors.values()
        return delta_attention(q, k, v, beta, state=state, impl=self.impl)

    def init_state(self, batch_size: int) -> State:
        cache = super().init_state(batch_size)
        return empty(cache["k"], cache["v"], self.heads)

    def state_bytes(self, T: int) -> StateBytes:
        channels = self.kv_heads * self.key_dim + self.heads * self.value_dim
        return StateBytes(4 * T * channels, buffers=8)

    def rule_flops(self, T: int) -> float:
        return self.pair_flops() * T  # t pairs before token t, and t + 1 up to it
