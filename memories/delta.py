"""The delta rule: a matrix memory that writes its own error, its op and the gated layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from layerzoo.layer import State
from layerzoo.ops import Op
from layerzoo.shell import Write

from .matrix import (
    FLOOR,
    MatrixConfig,
    MatrixMemory,
    chunk_decays,
    chunk_size,
    decayed_scores,
    from_chunks,
    per_token,
    prepare,
    to_chunks,
)

if TYPE_CHECKING:
    from jaxtyping import Float

OP = Op("delta_rule")


def delta_rule(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    beta: Float[Tensor, "B T H"],
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    state: Float[Tensor, "B H K V"] | None = None,
    impl: str = "auto",
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """S' = D_t S_{t-1},  S_t = S' + beta_t k_t^T (v_t - k_t S'),  o_t = scale q_t S_t.

    Keys are not normalised here; the rule is stable for beta_t |k_t|^2 <= 2.

    Args:
        beta: writing strength, in (0, 1) or (0, 2).
        log_decay: natural logarithm of D_t, <= 0: None, `[H]`, `[B, T, H]` or `[B, T, H, K]`.
        state: S_0, default zero.
        impl: auto, recurrent, chunked or triton.

    Returns:
        o in q's dtype and S_T in float32 (float64 for float64 input).

    Raises:
        SpecError: log_decay of another shape. ImplError: an impl that cannot run here.

    Source: DeltaNet, Yang et al. 2024, arXiv 2406.06484 (the chunk form follows its WY
    representation); Gated DeltaNet 2412.06464, eq. 10 (scalar); Kimi Linear 2510.26692 (vector).
    """
    state = prepare(k, v, log_decay, state)
    return OP(impl, q, k, v, beta, log_decay, scale=scale, state=state)


@OP.register("recurrent")
def _recurrent(q, k, v, beta, log_decay, *, scale, state):
    decay = per_token(log_decay, k).exp()
    outputs = []
    for t in range(q.shape[1]):
        state = decay[:, t].unsqueeze(-1) * state
        error = v[:, t].unsqueeze(-2) - k[:, t].unsqueeze(-2) @ state
        state = state + (beta[:, t, :, None] * k[:, t]).unsqueeze(-1) @ error
        outputs.append((scale * q[:, t].unsqueeze(-2) @ state).squeeze(-2))
    return torch.stack(outputs, 1) if outputs else torch.zeros_like(v), state


@OP.register("chunked")
def _chunked(q, k, v, beta, log_decay, *, scale, state):
    """With g the inclusive cumulative log decay in a chunk and u_t the error that is written,
    (I + A) u = beta (v - (k e^g) S_0),  A_tj = beta_t sum_c k_tc k_jc e^(g_tc - g_jc) for j < t,
    so u = U - W S_0, and only S' = e^(g_C) S_0 + (k e^(g_C - g))^T u runs from chunk to chunk."""
    T, V, log_decay = q.shape[1], v.shape[-1], per_token(log_decay, k).clamp(min=FLOOR)
    size = chunk_size(log_decay)
    q, k, v, beta, log_decay = (
        to_chunks(x, size) for x in (scale * q, k, v, beta.unsqueeze(-1), log_decay)
    )
    decay = chunk_decays(log_decay)
    A = decayed_scores(beta * k, k, decay.ratio).tril(-1)
    rhs = torch.cat((beta * v, beta * k * decay.since_start), -1)
    solved = torch.linalg.solve_triangular(
        A + torch.eye(size, dtype=A.dtype, device=A.device), rhs, upper=False, unitriangular=True
    )
    U, W = solved[..., :V], solved[..., V:]
    fading = (k * decay.until_end).mT
    P, R = fading @ W, fading @ U
    states = []
    for n in range(R.shape[2]):
        states.append(state)
        state = decay.whole[:, :, n] * state + R[:, :, n] - P[:, :, n] @ state
    start = torch.stack(states, 2)
    u = U - W @ start
    o = (q * decay.since_start) @ start + decayed_scores(q, k, decay.ratio) @ u
    return from_chunks(o, T), state


class GatedDelta(MatrixMemory, name="gated_delta"):
    """Gated DeltaNet: the delta rule with an optional decay.

    S' = D_t S_{t-1},   S_t = S' + beta_t k_t^T (v_t - k_t S'),   o_t = q_t S_t

    S: [K, V] per head; beta_t = sigmoid(x w) in (0, 1). With `decay: none` it is DeltaNet, with
    `vector` the rule of Kimi Delta Attention. Deviations: one shell for all memories; the short
    convolution is the block's.
    """

    class Config(MatrixConfig):
        decay: Literal["none", "constant", "scalar", "vector"] = "scalar"

    source = "Yang et al. 2024, arXiv 2412.06464"
    op = OP
    cases = (
        {"heads": 2},
        {"heads": 3, "decay": "none", "out_gate": "sigmoid"},
        {"heads": 2, "decay": "constant"},
        {"heads": 2, "decay": "vector", "key_dim": 5, "value_dim": 7},
    )

    def __init__(self, dim: int, config: MatrixConfig) -> None:
        super().__init__(dim, config)
        self.beta = nn.Linear(dim, self.heads, bias=False)

    def gates(self, x: Tensor) -> Write:
        return {"beta": self.beta(x).sigmoid(), **super().gates(x)}

    def rule(self, q: Tensor, write: Write, state: State) -> tuple[Tensor, State]:
        return delta_rule(q, **write, **self.constants(), state=state)

    def rule_flops(self, T: int) -> float:
        return self.heads * 6 * self.key_dim * self.value_dim
