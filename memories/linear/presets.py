"""Named points of linear attention, as their papers have them: a name, defaults, a few terms."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from layerzoo.layer import State

from ..common.matrix import DecayKind
from .rule import LinearAttention

if TYPE_CHECKING:
    from jaxtyping import Float


class Retention(LinearAttention, name="retention"):
    """RetNet's retention: linear attention with a constant decay per head.

    S_t = gamma_h S_{t-1} + k_t^T v_t,   o_t = q_t S_t,   gamma_h = 1 - 2^-(5+h)

    where

    - S_t `[K, V]` is the state of head h;
    - q_t, k_t `[K]` and v_t `[V]` are projections of x_t.

    Deviations: q and k have no rotary positions; the paper's group norm and swish gate are the
    shell's `out_norm: rms` and `out_gate: silu`.
    """

    class Config(LinearAttention.Config):
        decay: DecayKind = "constant"

    source = "Sun et al. 2023, arXiv 2307.08621"
    cases = ({"heads": 2},)


class GatedLinear(LinearAttention, name="gated_linear"):
    """Linear attention with a decay per head and token, the common core of Mamba-2 and of simple
    gated linear attention.

    S_t = exp(g_t) S_{t-1} + k_t^T v_t,   o_t = q_t S_t,   g_t = -exp(A) softplus(x_t w + b)

    where

    - S_t `[K, V]` is the state of a head;
    - g_t is the logarithm of the decay, and A, w and b are learned;
    - q_t, k_t `[K]` and v_t `[V]` are projections of x_t.

    `mamba2` adds what Mamba-2 has besides.
    """

    class Config(LinearAttention.Config):
        decay: DecayKind = "scalar"

    source = "Dao and Gu 2024, arXiv 2405.21060"
    cases = ({"heads": 2},)


class GLA(LinearAttention, name="gla"):
    """Gated linear attention: a decay per key channel and token.

    S_t = diag(exp(g_t)) S_{t-1} + k_t^T v_t,   o_t = q_t S_t,   g_t = log sigmoid(z_t) / 16

    where

    - S_t `[K, V]` is the state of a head;
    - g_t `[K]` is the logarithm of the decay, and z_t a projection of x_t of rank 16;
    - q_t, k_t `[K]` and v_t `[V]` are projections of x_t.

    g_t is computed as -exp(A) softplus(-z_t), which is the same at exp(A) = 1/16, where it starts.
    Deviation: A is learned.
    """

    class Config(LinearAttention.Config):
        decay: DecayKind = "vector"
        decay_rate: tuple[float, ...] = (1 / 16, 1 / 16)
        decay_step: tuple[float, ...] = (math.log(2), math.log(2))

    source = "Yang et al. 2023, arXiv 2312.06635"
    cases = ({"heads": 2, "key_dim": 5}, {"heads": 2, "decay_gate": "bounded"})


class Mamba2Write(NamedTuple):
    """What each token writes, and what it adds to its own read-out."""

    k: Float[Tensor, "B T H F"]
    v: Float[Tensor, "B T H V"]
    log_decay: Float[Tensor, "B T H"]
    skip: Float[Tensor, "B T H V"]


class Mamba2(LinearAttention, name="mamba2"):
    """Mamba-2's state space layer (SSD), in the names of attention: C is q, B is k, x is v.

    S_t = exp(-exp(A) dt_t) S_{t-1} + dt_t k_t^T v_t,   o_t = q_t S_t + skip v_t,
    dt_t = softplus(x_t w + b)

    where

    - S_t `[K, V]` is the state of a head;
    - dt_t is the step of a token, per head: it sets the decay and the size of the write;
    - A, w, b and skip (the paper's D) are learned, per head;
    - q_t, k_t `[K]` and v_t `[V]` are projections of x_t.

    At the start exp(A) is uniform in [1, 16], softplus(b) log-uniform in [0.001, 0.1], and `skip`
    is 1. Deviations: q and k are per head, unless key_heads is 1, which shares them as the paper
    does. The convolution is the block's, norm and gate are the shell's.
    """

    class Config(LinearAttention.Config):
        decay: Literal["scalar"] = "scalar"
        """The decay has a gate per head and token (scalar), because the size of a write is made of
        the same dt."""
        decay_gate: Literal["softplus"] = "softplus"
        """dt is a softplus."""
        decay_rate: tuple[float, ...] = (1.0, 16.0)

        reasons: ClassVar[Any] = {
            "decay": "the size of a write and the decay are made of the same dt",
            "decay_gate": "dt, which the decay is made of, is a softplus",
        }

    source = "Dao and Gu 2024, arXiv 2405.21060"
    cases = ({"heads": 2}, {"heads": 3, "qk_norm": "none", "out_gate": "silu", "key_heads": 1})
    reductions = ()

    def __init__(self, dim: int, config: Any) -> None:
        super().__init__(dim, config)
        self.skip = nn.Parameter(torch.ones(self.heads, 1))

    def write(self, x: Tensor, k: Tensor, v: Tensor) -> Mamba2Write:
        step = self.log_decay.step(x)  # [B, T, H, 1]
        log_decay = -self.log_decay.A_log.to(step.dtype).exp() * step
        k, v = self.featured(k, v)
        return Mamba2Write(
            k, (v * step).to(v.dtype), log_decay[..., 0], self.skip * v[..., : self.value_dim]
        )

    def rule(self, q: Tensor, write: Mamba2Write, state: State) -> tuple[Tensor, State]:
        o, state = super().rule(q, write[:3], state)
        return o + write.skip.to(o.dtype), state
