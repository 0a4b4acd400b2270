"""The delta rule, a matrix memory that writes its own error: op, chunk form and layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from layerzoo.layer import State
from layerzoo.ops import Op
from layerzoo.signature import LOGARITHM, Signature

from ..common.matrix import DecayKind, MatrixConfig, MatrixMemory, per_token, strength, zero_state
from ..common.plain import chunk_decays, chunks
from . import chunked

if TYPE_CHECKING:
    from jaxtyping import Float

OP = Op("delta_rule", kernel="delta")
SIGNATURE = Signature(log_decay=LOGARITHM)


@SIGNATURE
def delta_rule(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    beta: Float[Tensor, "B T H"],
    log_decay: Float[Tensor, " H"]
    | Float[Tensor, "B T H"]
    | Float[Tensor, "B T H K"]
    | None = None,
    *,
    scale: float = 1.0,
    state: Float[Tensor, "B H K V"] | None = None,
    impl: str = "auto",
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """Each token writes the error of what the memory knows of its value.

    S' = D_t S_{t-1},   S_t = S' + beta_t k_t^T (v_t - k_t S'),   o_t = scale q_t S_t

    where

    - S_t `[K, V]` is the state of a head, S_0 is `state`, and S_T is returned;
    - q_t, k_t `[K]` and v_t `[V]` are a token's query, key and value, as rows;
    - D_t = exp(log_decay_t) is the decay, a number or the diagonal of a matrix;
    - beta_t is the writing strength.

    Keys are not normalised here. The rule is stable for beta_t |k_t|^2 <= 2.

    Args:
        q: The queries.
        k: The keys.
        v: The values.
        beta: The writing strengths, in (0, 1) or (0, 2).
        log_decay: The natural logarithm of the decay, at most 0. None is no decay, `[H]` a
            constant per head, `[B, T, H]` a number per token, `[B, T, H, K]` a number per key
            channel.
        scale: What is read is multiplied by this number.
        state: The state before the first token; None is zero.
        impl: Run this implementation: auto, recurrent, chunked or triton.

    Returns:
        The read-outs in q's dtype, and the state after the last token in float32 (float64 for
        float64 input).

    Raises:
        SpecError: An argument has another shape, or a log_decay is positive.
        ImplError: The impl cannot run here.

    Source: DeltaNet, Yang et al. 2024, arXiv 2406.06484 (the chunk form follows its WY
    representation); Gated DeltaNet, 2412.06464, eq. 10 (a number per token); Kimi Linear,
    2510.26692 (a number per channel).
    """
    if not is_compiling():
        SIGNATURE.check(locals())
    state = zero_state(k, v) if state is None else state
    return OP(impl, q, k, v, beta, log_decay, scale=scale, state=state)


@OP.register("recurrent")
def recurrent(q, k, v, beta, log_decay, *, scale, state):
    """The specification: the formula of `delta_rule`, token by token."""
    decay = per_token(log_decay, k).exp()
    outputs = []
    for t in range(q.shape[1]):
        state = decay[:, t].unsqueeze(-1) * state
        error = v[:, t].unsqueeze(-2) - k[:, t].unsqueeze(-2) @ state
        state = state + (beta[:, t, :, None] * k[:, t]).unsqueeze(-1) @ error
        outputs.append((scale * q[:, t].unsqueeze(-2) @ state).squeeze(-2))
    return torch.stack(outputs, 1) if outputs else torch.zeros_like(v), state


def chunk_form(q, k, v, beta, log_decay=None, *, scale=1.0, state=None, size=16):
    """`delta_rule` in chunks of `size` tokens, to be read beside DeltaNet's section 3.

    With the state S before a chunk, and d(j, i) the decay from after token j until token i, the
    write of token i of the chunk is k_i^T w_i, where

    w_i = beta_i (v_i - (k_i d(0, i)) S - sum_{j < i} (k_i d(j, i)) k_j^T w_j)

    is a triangular system in w. With its solution

    o_i = scale ((q_i d(0, i)) S + sum_{j <= i} (q_i d(j, i)) k_j^T w_j)
    S_new = d(0, C) S + sum_j (k_j d(j, C))^T w_j
    """
    state = zero_state(k, v) if state is None else state
    log_decay = per_token(log_decay, k).expand(k.shape)
    outputs = []
    for queries, keys, values, decays, strengths in chunks(
        size, q, k, v, log_decay, beta.unsqueeze(-1)
    ):
        since_start, until_end, between = chunk_decays(decays)
        key_products = torch.einsum("bhik,bhijk,bhjk->bhij", keys, between, keys)
        query_products = torch.einsum("bhik,bhijk,bhjk->bhij", queries, between, keys)
        known = (keys * since_start) @ state  # what the memory knew of the values before the chunk
        system = torch.eye(keys.shape[2]).to(keys) + strengths * key_products.tril(-1)
        writes = torch.linalg.solve_triangular(
            system, strengths * (values - known), upper=False, unitriangular=True
        )
        read = (queries * since_start) @ state + query_products @ writes
        outputs.append(scale * read.transpose(1, 2))
        state = since_start[:, :, -1, :, None] * state + (keys * until_end).mT @ writes
    return torch.cat(outputs, 1), state


OP.register("chunked")(chunked.run)


class DeltaWrite(NamedTuple):
    """What each token writes, named as the arguments of `delta_rule`."""

    k: Float[Tensor, "B T H K"]
    v: Float[Tensor, "B T H V"]
    beta: Float[Tensor, "B T H"]
    log_decay: Float[Tensor, "B T H"] | Float[Tensor, "B T H K"] | None


class Delta(MatrixMemory, name="delta"):
    """DeltaNet: each token writes the error of what the memory knows of its value.

    S' = D_t S_{t-1},   S_t = S' + beta_t k_t^T (v_t - k_t S'),   o_t = q_t S_t,
    beta_t = beta_max sigmoid(x_t w)

    where

    - S_t `[K, V]` is the state of a head;
    - q_t, k_t `[K]` have unit length, and v_t has V channels;
    - D_t is the decay, which is 1 unless `decay` says otherwise;
    - beta_t is the writing strength, and w is learned.

    Deviations: the layer has the shell that all memories share, and the short convolution is the
    block's.
    """

    class Config(MatrixConfig):
        qk_norm: Literal["l2"] = "l2"
        """q and k have unit length (l2), because the rule is stable for beta_t |k_t|^2 <= 2."""
        beta_max: Literal[1, 2] = 1
        """This is the largest writing strength, in beta_t = beta_max sigmoid(x_t w). Where beta_t
        exceeds 1, I - beta_t k^T k has a negative eigenvalue: a state can flip its sign, and
        parity can be learned (arXiv 2411.12537)."""
        beta_bias: float | None = None
        """b in beta_t = beta_max sigmoid(x_t w + b) starts at this value. null means no b, so that
        beta_t starts at half of beta_max."""

        reasons: ClassVar[Any] = {
            "qk_norm": "a delta rule needs keys of unit length, or its state grows without bound"
        }

    source = "Yang et al. 2024, arXiv 2406.06484"
    op = OP
    cases = (
        {"heads": 2, "beta_max": 2},
        {"heads": 3, "out_gate": "sigmoid", "beta_bias": 1.0},
        {"heads": 4, "key_heads": 2, "rotary": 100.0},
    )

    def __init__(self, dim: int, config: Any) -> None:
        super().__init__(dim, config)
        self.beta = strength(dim, self.heads, config.beta_bias)

    def write(self, x: Tensor, k: Tensor, v: Tensor) -> DeltaWrite:
        beta = self.config.beta_max * self.beta(x).sigmoid()
        return DeltaWrite(k, v, beta, self.log_decay(x) if self.gated else None)

    def rule(self, q: Tensor, write: DeltaWrite, state: State) -> tuple[Tensor, State]:
        if self.config.decay == "constant":
            write = write._replace(log_decay=self.log_decay())
        return OP(self.impl, q, *write, scale=self.scale, state=state)

    def rule_flops(self, T: int) -> float:
        return self.heads * 6 * self.key_dim * self.value_dim


class GatedDelta(Delta, name="gated_delta"):
    """Gated DeltaNet: the delta rule with a decay per head and token.

    S' = exp(g_t) S_{t-1},   S_t = S' + beta_t k_t^T (v_t - k_t S'),   o_t = q_t S_t,
    g_t = -exp(A) softplus(x_t w + b),   beta_t = beta_max sigmoid(x_t w')

    where

    - S_t `[K, V]` is the state of a head;
    - g_t is the logarithm of the decay, and A, w and b are learned;
    - q_t, k_t, v_t and beta_t are those of `delta`.

    `delta` is the same without a decay, and `kda` has one per key channel.
    """

    class Config(Delta.Config):
        decay: DecayKind = "scalar"

    source = "Yang et al. 2024, arXiv 2412.06464"
    cases = ({"heads": 2}, {"heads": 2, "decay": "constant"})


class KDA(Delta, name="kda"):
    """Kimi Delta Attention: the delta rule with a decay per key channel and token.

    S' = diag(exp(g_t)) S_{t-1},   S_t = S' + beta_t k_t^T (v_t - k_t S'),   o_t = q_t S_t,
    g_t = -exp(A) softplus(z_t + b)

    where

    - S_t `[K, V]` is the state of a head;
    - g_t `[K]` is the logarithm of the decay, z_t a projection of x_t of rank 16, and A and b are
      learned;
    - q_t, k_t, v_t and beta_t are those of `delta`.
    """

    class Config(Delta.Config):
        decay: DecayKind = "vector"

    source = "Kimi Team 2025, arXiv 2510.26692"
    cases = (
        {"heads": 2, "key_dim": 5, "value_dim": 7, "beta_max": 2},
        {"heads": 4, "key_heads": 2, "decay_gate": "bounded", "beta_bias": -1.0},
    )
