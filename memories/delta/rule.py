"""The delta rule: a matrix memory that writes its own error, its op and the gated layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.compiler import is_compiling

from layerzoo.checked import LOGARITHM, Signature
from layerzoo.layer import State
from layerzoo.memory import Write
from layerzoo.ops import Op, once_differentiable

from ..common.chunks import (
    add_product,
    chunk_size,
    fold,
    pad_tokens,
    product,
    segments,
    stack,
    tiles,
    unfold,
    unit_lower_inverse,
)
from ..common.decays import FLOOR, Pulled, decays_of
from ..common.matrix import MatrixConfig, MatrixMemory, per_token, strength, zero_state

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
        SpecError: an argument of another shape, or a positive log_decay (see `Signature`).
        ImplError: an impl that cannot run here.

    Source: DeltaNet, Yang et al. 2024, arXiv 2406.06484 (the chunk form follows its WY
    representation); Gated DeltaNet 2412.06464, eq. 10 (scalar); Kimi Linear 2510.26692 (vector).
    """
    if not is_compiling():
        SIGNATURE.check(locals())
    state = zero_state(k, v) if state is None else state
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
    if (T := q.shape[1]) <= 1:
        return (_step if T else _recurrent)(q, k, v, beta, log_decay, scale=scale, state=state)
    size = chunk_size(T)
    if log_decay is not None:
        log_decay = pad_tokens(per_token(log_decay, k).clamp(min=FLOOR), size)
    q, k, v, beta = (pad_tokens(x, size) for x in (q, k, v, beta.unsqueeze(-1)))
    o, state = Chunked.apply(q, k, v, beta, log_decay, state, scale, size, torch.is_grad_enabled())
    return o[:, :T], state


def _step(q, k, v, beta, log_decay, *, scale, state):
    """One token, in the fewest operations: what decoding waits for."""
    rows = state.shape[:2]
    if log_decay is not None:
        state = state * per_token(log_decay, k)[:, 0].exp().unsqueeze(-1)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # [B H, 1, D]
    state = state.flatten(0, 1)
    error = torch.baddbmm(v, k, state, alpha=-1).mul_(beta.flatten()[:, None, None])
    state = torch.baddbmm(state, k.mT, error)
    return torch.bmm(q, state).mul(scale).unflatten(0, rows).transpose(1, 2), state.unflatten(
        0, rows
    )


class Chunked(torch.autograd.Function):
    """With e = v - (k since) S, what the state before a chunk does not know of v, and A the scores
    of k with k below the diagonal, its tokens write u = beta (e - A u), that is u = M beta e with
    M = (I + beta A)^-1. Only e, u and S' = D S + (k until)^T u wait for S."""

    @staticmethod
    def forward(ctx: Any, q, k, v, beta, g, state, scale, size, keep) -> Any:
        B, _, H, _ = q.shape
        o, saved = torch.empty_like(v), []
        Q, Ks, Vs, Bs, Gs, Os = tiles(size, q, k, v, beta, g, o)
        state = state.flatten(0, 1)
        for s in segments(Q):
            rows, vs, betas = stack(Q[s], Ks[s]), fold(Vs[s]), fold(Bs[s])
            ks = rows[:, :, 1]
            decays = decays_of(None if g is None else fold(Gs[s]), 2, ks)
            scores, reads = decays.scores(rows, ks), decays.read(rows)
            M = unit_lower_inverse(betas * scores[:, :, 1])
            e, u = torch.empty_like(vs), torch.empty_like(vs)
            states = vs.new_empty(len(vs) + 1, *state.shape)
            states[0] = state
            path = (reads[:, :, 1], vs, M * betas.mT, decays.fade(ks).mT, decays.whole)
            for n, (read, value, solve, fade, whole) in enumerate(zip(*path, strict=True)):
                torch.baddbmm(value, read, state, alpha=-1, out=e[n])
                torch.bmm(solve, e[n], out=u[n])
                state = torch.baddbmm(state * whole, fade, u[n], out=states[n + 1])
            out = product(reads[:, :, 0], states[:-1])
            add_product(out, scores[:, :, 0], u)
            unfold(out.mul_(scale), Os[s])
            if keep:
                saved += (scores, M, e, u, states)
        ctx.scale, ctx.size = scale, size
        ctx.save_for_backward(q, k, v, beta, g, *saved)
        return o, state.unflatten(0, (B, H)).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        do, d_state = grad_outputs
        q, k, v, beta, g, *saved = ctx.saved_tensors
        grads = [None if x is None else torch.empty_like(x) for x in (q, k, v, beta, g)]
        Q, Ks, Bs, Gs, Os, dQ, dK, dV, dB, dG = tiles(ctx.size, q, k, beta, g, do, *grads)
        B, H, d_state = *Q.shape[1:3], d_state.flatten(0, 1)
        for s in reversed(segments(Q)):
            scores, M, e, u, states = saved[-5:]
            del saved[-5:]
            rows, betas = stack(Q[s], Ks[s]), fold(Bs[s])
            ks = rows[:, :, 1]
            decays = decays_of(None if g is None else fold(Gs[s]), 2, ks)
            reads = decays.read(rows)
            dy = u.new_empty(*u.shape[:2], 2, *u.shape[2:])  # of what q and k read
            torch.mul(fold(Os[s]), ctx.scale, out=dy[:, :, 0])
            du = product(scores[:, :, 0].mT, dy[:, :, 0])
            added = product(reads[:, :, 0].mT, dy[:, :, 0])
            x = torch.empty_like(u)  # of beta e
            d_states = torch.empty_like(states)
            d_states[-1] = d_state
            path = (du, decays.fade(ks), M.mT, -betas, reads[:, :, 1].mT, added, decays.whole)
            path = list(enumerate(zip(*path, strict=True)))
            for n, (d, fade, solve, minus, read, more, whole) in reversed(path):
                torch.bmm(solve, d.baddbmm_(fade, d_state), out=x[n])
                torch.mul(x[n], minus, out=dy[n, :, 1])
                more.addcmul_(d_state, whole)
                d_state = torch.baddbmm(more, read, dy[n, :, 1], out=d_states[n])
            d_states = d_states[1:]  # of the states that the chunks leave
            d_rows = decays.read(product(dy.flatten(2, 3), states[:-1].mT).view_as(rows))
            dk = decays.fade(product(u, d_states.mT))
            grad = product(dy.flatten(2, 3), u.mT).view_as(scores)
            dg = decays.pull(grad, scores, rows, ks, Pulled(d_rows, dk, states[:-1], d_states))
            db = torch.linalg.vecdot(x, e - product(scores[:, :, 1], u)).unsqueeze(-1)
            dk += d_rows[:, :, 1]
            for d, out in ((d_rows[:, :, 0], dQ), (dk, dK), (-dy[:, :, 1], dV), (db, dB)):
                unfold(d, out[s])
            if dg is not None:
                unfold(dg, dG[s])
        return *grads, d_state.unflatten(0, (B, H)), None, None, None


class Delta(MatrixMemory, name="delta"):
    """DeltaNet: each token writes the error of what the memory knows of its value.

    S' = D_t S_{t-1},   S_t = S' + beta_t k_t^T (v_t - k_t S'),   o_t = q_t S_t

    S: [K, V] per head, D_t = 1 unless `decay` says otherwise, beta_t = beta_max sigmoid(x_t w).
    Deviations: one shell for all memories; the short convolution is the block's.
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

    def gates(self, x: Tensor) -> Write:
        return {"beta": self.config.beta_max * self.beta(x).sigmoid(), **super().gates(x)}

    def rule(self, q: Tensor, write: Write, state: State) -> tuple[Tensor, State]:
        return delta_rule(q, **write, **self.constants(), state=state)

    def rule_flops(self, T: int) -> float:
        return self.heads * 6 * self.key_dim * self.value_dim


class GatedDelta(Delta, name="gated_delta"):
    """Gated DeltaNet: the delta rule with a decay per head and token.

    S' = exp(g_t) S_{t-1},   S_t = S' + beta_t k_t^T (v_t - k_t S'),   o_t = q_t S_t,
    g_t = -exp(A) softplus(x_t w + b),   beta_t = beta_max sigmoid(x_t w')

    S: [K, V] per head. `delta` is the same without a decay, `kda` with one per key channel.
    """

    class Config(Delta.Config):
        decay: Literal["none", "constant", "scalar", "vector"] = "scalar"

    source = "Yang et al. 2024, arXiv 2412.06464"
    cases = ({"heads": 2}, {"heads": 2, "decay": "constant"})


class KDA(Delta, name="kda"):
    """Kimi Delta Attention: the delta rule with a decay per key channel and token.

    S' = diag(exp(g_t)) S_{t-1},   S_t = S' + beta_t k_t^T (v_t - k_t S'),   o_t = q_t S_t

    S: [K, V] per head; g_t = -exp(A) softplus(z_t + b) with z_t a projection of x_t of rank 16.
    """

    class Config(Delta.Config):
        decay: Literal["none", "constant", "scalar", "vector"] = "vector"

    source = "Kimi Team 2025, arXiv 2510.26692"
    cases = (
        {"heads": 2, "key_dim": 5, "value_dim": 7, "beta_max": 2},
        {"heads": 4, "key_heads": 2, "decay_gate": "bounded", "beta_bias": -1.0},
    )
