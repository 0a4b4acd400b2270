"""MesaNet's ridge memory: the best linear map from keys to values so far, found at each read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional as F

from layerzoo.checked import LOGARITHM, POSITIVE, Signature
from layerzoo.layer import State, StateBytes
from layerzoo.memory import Write
from layerzoo.ops import Op, accumulator_dtype
from layerzoo.spec import SpecError

from ..common.chunks import chunk_size, fold, pad_tokens, tiles
from ..common.decays import FLOOR
from ..common.matrix import MatrixConfig, MatrixMemory, per_token, strength, zero_state
from ..linear.rule import linear_attention
from .systems import Solve, conjugate_gradient, magnitude, symmetric

if TYPE_CHECKING:
    from jaxtyping import Float

OP = Op("mesa")
SOLVED = 2048
"""Tokens (of all rows) in a segment: the gradient holds the solver's steps of one at a time."""


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
    """A_t = D_t A_{t-1} + beta_t k_t^T k_t,  R_t = D_t R_{t-1} + beta_t k_t^T v_t,
    o_t = q_t (A_t + diag(ridge))^-1 R_t.

    Args:
        log_decay: natural logarithm of D_t, <= 0: None, `[H]` or `[B, T, H]`.
        ridge: > 0, the weight of |S|^2 in the regression that S = (A + ridge)^-1 R solves.
        steps: of conjugate gradient, from zero; None is the exact solve (K^3 a token). A query
            whose residual reached rounding error is left alone. The gradient is that of the
            steps, or of the exact solve.
        state: (A_0 `[B, H, K, K]`, R_0 `[B, H, K, V]`), default zero. Conjugate gradient needs
            a symmetric A_0 and takes its symmetric part.
        impl: auto, recurrent or chunked.

    Returns:
        o in q's dtype and (A_T, R_T) in float32 (float64 for float64 input).

    Raises:
        SpecError: an argument of another shape, a positive log_decay, a negative ridge (see
            `Signature`), or steps < 1. ImplError: an impl that cannot run.

    Source: von Oswald et al. 2025, arXiv 2506.05233, eq. 6-9.
    """
    if not is_compiling():
        SIGNATURE.check(locals())
    if steps is not None and steps < 1:
        raise SpecError(f"steps: must be at least 1, or null for the exact solve, got {steps}")
    kk, kv = (zero_state(k, k), zero_state(k, v)) if state is None else state
    o, *state_ = OP(impl, q, k, v, beta, log_decay, ridge, steps=steps, kk=kk, kv=kv)
    return o, tuple(state_)


def solve(q: Float[Tensor, "... n K"], kk: Tensor, ridge: Tensor, steps: int | None) -> Tensor:
    """Rows x of x (A + ridge) = q, one A `[..., K, K]` for all rows; ridge is `[..., 1, K]`."""
    if steps is None:
        return torch.linalg.solve(kk + torch.diag_embed(ridge.squeeze(-2)), q.mT).mT
    kk, size = symmetric(kk), magnitude(q)
    return size * conjugate_gradient(lambda p: p @ kk.mT + ridge * p, q / size, steps)


@OP.register("recurrent")
def _recurrent(q, k, v, beta, log_decay, ridge, *, steps, kk, kv):
    decay = per_token(log_decay, k).exp().unsqueeze(-1)
    outputs = []
    for t in range(q.shape[1]):
        key = (beta[:, t, :, None] * k[:, t]).unsqueeze(-1)
        kk = decay[:, t] * kk + key @ k[:, t].unsqueeze(-2)
        kv = decay[:, t] * kv + key @ v[:, t].unsqueeze(-2)
        x = solve(q[:, t].unsqueeze(-2), kk, ridge.unsqueeze(-2), steps)
        outputs.append((x @ kv).squeeze(-2))
    return torch.stack(outputs, 1) if outputs else torch.zeros_like(v), kk, kv


@OP.register("chunked")
def _chunked(q, k, v, beta, log_decay, ridge, *, steps, kk, kv):
    """The solutions x first, for all tokens of a few chunks at a time (what a chunk's A_t have in
    common is the state before it); o is then linear attention with x as its queries."""
    (B, T, H, _), scaled = q.shape, beta.unsqueeze(-1) * k
    if T <= 1:
        return _recurrent(q, k, v, beta, log_decay, ridge, steps=steps, kk=kk, kv=kv)
    size = chunk_size(T)
    g = None
    if log_decay is not None:
        log_decay = log_decay.clamp(min=FLOOR)
        g = pad_tokens(per_token(log_decay, k), size)
    largest = magnitude(q)
    Q, Ks, Ss, Gs = tiles(size, *(pad_tokens(x, size) for x in (q / largest, k, scaled)), g)
    step = max(1, SOLVED // max(1, B * H * size))
    rows = ridge.repeat(B, 1).unsqueeze(1)  # [R, 1, K]
    state, solved = kk.flatten(0, 1), []
    pieces = [x.split(step) for x in (Q, Ks, Ss)]
    pieces.append([None] * len(pieces[0]) if g is None else Gs.split(step))
    for segment in zip(*pieces, strict=True):
        segment = (None if x is None else fold(x).contiguous() for x in segment)
        x, state = Solve.apply(*segment, rows, state, steps)
        solved.append(x)
    x = torch.cat(solved).unflatten(1, (B, H)).permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :T]
    o, kv = linear_attention(largest * x, scaled, v, log_decay, state=kv, impl="chunked")
    return o, state.unflatten(0, (B, H)), kv


class Mesa(MatrixMemory, name="mesa"):
    """MesaNet: the read-out of the ridge regression from all keys to all values so far.

    A_t = D_t A_{t-1} + beta_t k_t^T k_t,   R_t = D_t R_{t-1} + beta_t k_t^T v_t,
    o_t = q_t (A_t + diag(ridge))^-1 R_t

    State: A `[K, K]` and R `[K, V]` per head; ridge = 0.25 + softplus(lambda) per head and key
    channel, 1 at the start; beta_t = sigmoid(x_t w). Deviations: one shell for all memories; D_t
    has Mamba-2's form.
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

    def gates(self, x: Tensor) -> Write:
        return {"beta": self.beta(x).sigmoid(), **super().gates(x)}

    def positive_ridge(self) -> Tensor:
        return 0.25 + F.softplus(self.ridge.to(accumulator_dtype(self.ridge)))

    def rule(self, q: Tensor, write: Write, state: State) -> tuple[Tensor, State]:
        log_decay = self.log_decay() if self.config.decay == "constant" else None
        return mesa(
            self.scale * q,
            **{"log_decay": log_decay, **write},
            ridge=self.positive_ridge(),
            steps=self.config.steps,
            state=state,
            impl=self.impl,
        )

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
