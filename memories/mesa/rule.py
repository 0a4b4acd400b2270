"""MesaNet's ridge memory: the best linear map from keys to values so far, found at each read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional as F

from layerzoo.layer import State, StateBytes
from layerzoo.ops import Op, accumulator_dtype
from layerzoo.signature import LOGARITHM, POSITIVE, Signature
from layerzoo.spec import SpecError

from ..common.matrix import MatrixConfig, MatrixMemory, per_token, strength, zero_state
from ..common.plain import chunk_decays, chunks
from . import chunked
from .systems import solve

if TYPE_CHECKING:
    from jaxtyping import Float

OP = Op("mesa")
SIGNATURE = Signature(log_decay=LOGARITHM, ridge=POSITIVE)


@SIGNATURE
def mesa(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    beta: Float[Tensor, "B T H"],
    log_decay: Float[Tensor, " H"] | Float[Tensor, "B T H"] | None,
    ridge: Float[Tensor, "H K"],
    *,
    steps: int | None = 30,
    state: tuple[Float[Tensor, "B H K K"], Float[Tensor, "B H K V"]] | None = None,
    impl: str = "auto",
) -> tuple[Float[Tensor, "B T H V"], tuple[Tensor, Tensor]]:
    """Each query reads the ridge regression from all keys to all values so far.

    A_t = D_t A_{t-1} + beta_t k_t^T k_t,   R_t = D_t R_{t-1} + beta_t k_t^T v_t,
    o_t = q_t (A_t + diag(ridge))^-1 R_t

    where

    - A_t `[K, K]` and R_t `[K, V]` are the state of a head;
    - q_t, k_t `[K]` and v_t `[V]` are a token's query, key and value, as rows;
    - D_t = exp(log_decay_t) is the decay, and beta_t the weight of a token;
    - ridge `[K]` is the weight of |S|^2 in the regression that S = (A + diag(ridge))^-1 R solves.

    Args:
        q: The queries.
        k: The keys.
        v: The values.
        beta: The weights of the tokens.
        log_decay: The natural logarithm of the decay, at most 0. None is no decay, `[H]` a
            constant per head, `[B, T, H]` a number per token.
        ridge: The ridge of each head and key channel, above 0.
        steps: Conjugate gradient takes this many steps from zero. A query whose residual is down
            to rounding error is left alone. None is the exact solve, which costs K^3 a token. The
            gradient is that of the steps, or of the exact solve.
        state: (A_0, R_0); None is zero. Conjugate gradient takes the symmetric part of A_0.
        impl: Run this implementation: auto, recurrent or chunked.

    Returns:
        The read-outs in q's dtype, and (A_T, R_T) in float32 (float64 for float64 input).

    Raises:
        SpecError: An argument has another shape, a log_decay is positive, a ridge is negative, or
            steps is below 1.
        ImplError: The impl cannot run here.

    Source: von Oswald et al. 2025, arXiv 2506.05233, eq. 6-9.
    """
    if not is_compiling():
        SIGNATURE.check(locals())
    if steps is not None and steps < 1:
        raise SpecError(f"steps: must be at least 1, or null for the exact solve, got {steps}")
    kk, kv = (zero_state(k, k), zero_state(k, v)) if state is None else state
    o, *state_ = OP(impl, q, k, v, beta, log_decay, ridge, steps=steps, kk=kk, kv=kv)
    return o, tuple(state_)


@OP.register("recurrent")
def recurrent(q, k, v, beta, log_decay, ridge, *, steps, kk, kv):
    """The specification: the formula of `mesa`, token by token."""
    decay = per_token(log_decay, k).exp().unsqueeze(-1)
    outputs = []
    for t in range(q.shape[1]):
        key = (beta[:, t, :, None] * k[:, t]).unsqueeze(-1)
        kk = decay[:, t] * kk + key @ k[:, t].unsqueeze(-2)
        kv = decay[:, t] * kv + key @ v[:, t].unsqueeze(-2)
        x = solve(q[:, t].unsqueeze(-2), kk, ridge.unsqueeze(-2), steps)
        outputs.append((x @ kv).squeeze(-2))
    return torch.stack(outputs, 1) if outputs else torch.zeros_like(v), kk, kv


def chunk_form(q, k, v, beta, log_decay, ridge, *, steps=30, state=None, size=16):
    """`mesa` in chunks of `size` tokens, to be read beside MesaNet's section 3.

    With the state (A, R) before a chunk, and d(j, i) the decay from after token j until token i,

    A_i = d(0, i) A + sum_{j <= i} d(j, i) beta_j k_j^T k_j,   R_i likewise with v_j,
    o_i = x_i R_i = d(0, i) x_i R + sum_{j <= i} d(j, i) beta_j (x_i k_j^T) v_j

    where x_i solves x_i (A_i + diag(ridge)) = q_i: with x as its queries, the read is linear
    attention.
    """
    A, R = (zero_state(k, k), zero_state(k, v)) if state is None else state
    log_decay = per_token(log_decay, k)
    outputs = []
    for queries, keys, values, decays, weights in chunks(
        size, q, k, v, log_decay, beta.unsqueeze(-1)
    ):
        since_start, until_end, between = chunk_decays(decays)  # of one channel
        between = between.squeeze(-1)
        weighted = weights * keys
        grams = torch.einsum("bhij,bhjk,bhjl->bhikl", between, weighted, keys)
        grams = grams + since_start.unsqueeze(-1) * A.unsqueeze(2)
        x = solve(queries.unsqueeze(-2), grams, ridge[:, None, None], steps).squeeze(-2)
        products = between * (x @ weighted.mT)
        outputs.append((since_start * (x @ R) + products @ values).transpose(1, 2))
        whole = since_start[:, :, -1:]
        A = whole * A + (until_end * weighted).mT @ keys
        R = whole * R + (until_end * weighted).mT @ values
    return torch.cat(outputs, 1), (A, R)


@OP.register("chunked")
def _chunked(q, k, v, beta, log_decay, ridge, *, steps, kk, kv):
    run = recurrent if q.shape[1] <= 1 else chunked.run
    return run(q, k, v, beta, log_decay, ridge, steps=steps, kk=kk, kv=kv)


class MesaWrite(NamedTuple):
    """What each token writes, named as the arguments of `mesa`."""

    k: Float[Tensor, "B T H K"]
    v: Float[Tensor, "B T H V"]
    beta: Float[Tensor, "B T H"]
    log_decay: Float[Tensor, "B T H"] | None


class Mesa(MatrixMemory, name="mesa"):
    """MesaNet: the read-out of the ridge regression from all keys to all values so far.

    A_t = D_t A_{t-1} + beta_t k_t^T k_t,   R_t = D_t R_{t-1} + beta_t k_t^T v_t,
    o_t = q_t (A_t + diag(ridge))^-1 R_t,   beta_t = sigmoid(x_t w),
    ridge = 0.25 + softplus(lambda)

    where

    - A_t `[K, K]` and R_t `[K, V]` are the state of a head;
    - D_t is the decay, in the form of Mamba-2;
    - ridge `[K]` is 1 at the start, and w and lambda are learned.

    Deviations: the layer has the shell that all memories share, and the decay has Mamba-2's form.
    """

    class Config(MatrixConfig):
        decay: Literal["none", "constant", "scalar"] = "scalar"
        """This is the factor D_t, as in other matrix memories. It is not vector, with which A
        would not stay symmetric."""
        steps: int | None = 30
        """Each read takes this many steps of conjugate gradient; null solves exactly. The paper
        takes at most 30."""
        beta_bias: float | None = None
        """b in beta_t = sigmoid(x_t w + b) starts at this value. null means no b, so that beta_t
        starts at 1/2."""

        reasons: ClassVar[Any] = {
            "decay": "with a decay per key channel A would not stay symmetric"
        }

        def check(self) -> None:
            super().check()
            if self.steps is not None and self.steps < 1:
                raise SpecError(f"steps: must be at least 1, or null, got {self.steps}")

    source = "von Oswald et al. 2025, arXiv 2506.05233"
    op = OP
    cases = (
        {"heads": 2, "steps": 3},
        {"heads": 3, "decay": "constant", "steps": None, "value_dim": 5},
        {"heads": 4, "decay": "none", "out_gate": "silu", "steps": 6},
    )
    reductions = MatrixMemory.reductions[:1]

    def __init__(self, dim: int, config: Any) -> None:
        super().__init__(dim, config)
        self.beta = strength(dim, self.heads, config.beta_bias)
        start = torch.tensor(0.75).expm1().log()  # softplus^-1
        self.ridge = nn.Parameter(start.expand(self.heads, self.key_dim).clone())

    def write(self, x: Tensor, k: Tensor, v: Tensor) -> MesaWrite:
        beta = self.beta(x).sigmoid()
        return MesaWrite(k, v, beta, self.log_decay(x) if self.gated else None)

    def positive_ridge(self) -> Tensor:
        return 0.25 + F.softplus(self.ridge.to(accumulator_dtype(self.ridge)))

    def rule(self, q: Tensor, write: MesaWrite, state: State) -> tuple[Tensor, State]:
        if self.config.decay == "constant":
            write = write._replace(log_decay=self.log_decay())
        kk, kv = state
        o, *state = OP(
            self.impl,
            self.scale * q,
            *write,
            self.positive_ridge(),
            steps=self.config.steps,
            kk=kk,
            kv=kv,
        )
        return o, tuple(state)

    def read(self, q: Tensor, state: State) -> Tensor:
        kk, kv = state
        rows = (self.scale * q.to(kk.dtype)).transpose(1, 2)  # [B, H, T, K]
        with torch.autocast(q.device.type, enabled=False):
            x = solve(rows, kk, self.positive_ridge().unsqueeze(-2), self.config.steps)
            return (x @ kv).transpose(1, 2).to(q.dtype)

    def rule_state(self, batch_size: int) -> State:
        K, V = self.matrix()
        return tuple(self.accumulator(batch_size, self.heads, K, n) for n in (K, V))

    def rule_bytes(self, T: int) -> StateBytes:
        K, V = self.matrix()
        return StateBytes(4 * self.heads * K * (K + V))

    def rule_flops(self, T: int) -> float:
        K, V = self.matrix()
        solver = 2 * K**3 / 3 if self.config.steps is None else 2 * K * K * self.config.steps
        return self.heads * (2 * K * K + 4 * K * V + solver)
