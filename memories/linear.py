"""Linear attention: the additive memory S_t = D_t S_{t-1} + k_t^T v_t, its op and its layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

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

OP = Op("linear_attention")


def linear_attention(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    state: Float[Tensor, "B H K V"] | None = None,
    impl: str = "auto",
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """S_t = D_t S_{t-1} + k_t^T v_t,  o_t = scale q_t S_t (read after write).

    Args:
        log_decay: natural logarithm of D_t, <= 0: None is D_t = 1; `[H]` constant (RetNet);
            `[B, T, H]` scalar (Mamba-2, simple GLA); `[B, T, H, K]` vector, D_t = diag (GLA).
        state: S_0, default zero.
        impl: auto, recurrent, chunked or triton.

    Returns:
        o in q's dtype and S_T in float32 (float64 for float64 input).

    Raises:
        SpecError: log_decay of another shape. ImplError: an impl that cannot run here.

    Source: Katharopoulos et al. 2020, arXiv 2006.16236, eq. 18-20, without its normaliser;
    decays: 2307.08621 (constant), 2405.21060 (scalar), 2312.06635 (vector).
    """
    state = prepare(k, v, log_decay, state)
    return OP(impl, q, k, v, log_decay, scale=scale, state=state)


@OP.register("recurrent")
def _recurrent(q, k, v, log_decay, *, scale, state):
    decay = per_token(log_decay, k).exp()
    outputs = []
    for t in range(q.shape[1]):
        write = k[:, t].unsqueeze(-1) @ v[:, t].unsqueeze(-2)
        state = decay[:, t].unsqueeze(-1) * state + write
        outputs.append((scale * q[:, t].unsqueeze(-2) @ state).squeeze(-2))
    return torch.stack(outputs, 1) if outputs else torch.zeros_like(v), state


@OP.register("chunked")
def _chunked(q, k, v, log_decay, *, scale, state):
    T, log_decay = q.shape[1], per_token(log_decay, k).clamp(min=FLOOR)
    q, k, v, log_decay = (to_chunks(x, chunk_size(log_decay)) for x in (q, k, v, log_decay))
    decay = chunk_decays(log_decay)
    added = (k * decay.until_end).mT @ v
    states = []
    for n in range(added.shape[2]):
        states.append(state)
        state = decay.whole[:, :, n] * state + added[:, :, n]
    q = scale * q
    before = (q * decay.since_start) @ torch.stack(states, 2)
    o = before + decayed_scores(q, k, decay.ratio) @ v
    return from_chunks(o, T), state


class Linear(MatrixMemory, name="linear"):
    """Linear attention with an optional decay.

    S_t = D_t S_{t-1} + k_t^T v_t,   o_t = q_t S_t

    S: [K, V] per head. With `decay: constant` it is RetNet's rule, with `scalar` that of Mamba-2
    and simple GLA, with `vector` that of GLA. Deviations: one shell for all memories (unit q and
    k, RMS norm of the read-out); no feature map and no normaliser; the vector decay has Mamba-2's
    parameters per channel where GLA has a log-sigmoid divided by 16.
    """

    class Config(MatrixConfig):
        pass

    source = "Katharopoulos et al. 2020, arXiv 2006.16236"
    op = OP
    cases = (
        {"heads": 2},
        {"heads": 3, "decay": "constant", "qk_norm": "none", "out_norm": "none"},
        {"heads": 2, "decay": "scalar", "out_gate": "silu"},
        {"heads": 2, "decay": "vector", "key_dim": 5, "value_dim": 7, "qk_norm": "rms"},
    )

    def rule(self, q: Tensor, write: Write, state: State) -> tuple[Tensor, State]:
        return linear_attention(q, **write, **self.constants(), state=state)

    def rule_flops(self, T: int) -> float:
        return self.heads * 4 * self.key_dim * self.value_dim
