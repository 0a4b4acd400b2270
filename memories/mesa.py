"""MesaNet's ridge memory: the best linear map from keys to values so far, found at each read."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from layerzoo.layer import State, StateBytes
from layerzoo.ops import Op, accumulator_dtype
from layerzoo.shell import Write
from layerzoo.spec import SpecError

from .chunks import chunk_size, fold, pad_tokens, product, tiles
from .decays import FLOOR, decays_of
from .linear import linear_attention
from .matrix import MatrixConfig, MatrixMemory, per_token

if TYPE_CHECKING:
    from jaxtyping import Float

OP = Op("mesa")
SOLVED = 4096
"""Tokens (of all rows) in a segment. Its solver's steps run again for the gradient, so that memory
holds the steps of one segment only."""


def mesa(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    beta: Float[Tensor, "B T H"],
    log_decay: Tensor | None,
    ridge: Float[Tensor, "H K"],
    *,
    steps: int | None = 30,
    state: tuple[Tensor, Tensor] | None = None,
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
        SpecError: log_decay of another shape, or steps < 1. ImplError: an impl that cannot run.

    Source: von Oswald et al. 2025, arXiv 2506.05233, eq. 6-9.
    """
    B, T, H, K = k.shape
    if log_decay is not None and tuple(log_decay.shape) not in ((H,), (B, T, H)):
        raise SpecError(
            f"log_decay: shape {tuple(log_decay.shape)} is neither [H] nor [B, T, H] "
            f"for k of shape {tuple(k.shape)}"
        )
    if steps is not None and steps < 1:
        raise SpecError(f"steps: must be at least 1, or null for the exact solve, got {steps}")
    kk, kv = (k.new_zeros(B, H, K, n) for n in (K, v.shape[-1])) if state is None else state
    o, *state_ = OP(impl, q, k, v, beta, log_decay, ridge, steps=steps, kk=kk, kv=kv)
    return o, tuple(state_)


def conjugate_gradient(
    apply: Callable[[Tensor], Tensor], b: Float[Tensor, "... K"], steps: int
) -> Float[Tensor, "... K"]:
    """x with apply(x) = b for a symmetric positive `apply`, by at most `steps` steps from zero.

    A row whose residual is down to rounding error, or whose b is zero, is frozen: the next step
    would divide noise by noise.
    """
    x, r, p = torch.zeros_like(b), b, b
    rr = r.square().sum(-1, keepdim=True)
    enough = torch.finfo(b.dtype).eps ** 2 * rr.detach()
    for _ in range(steps):
        live = rr > enough
        Ap = apply(p)
        size = torch.where(live, rr / torch.where(live, (p * Ap).sum(-1, keepdim=True), 1.0), 0.0)
        x, r = x + size * p, r - size * Ap
        after = r.square().sum(-1, keepdim=True)
        p = r + torch.where(live, after / torch.where(live, rr, 1.0), 0.0) * p
        rr = after
    return x


def symmetric(A: Tensor) -> Tensor:
    """Conjugate gradient has no other meaning, and else no meaningful gradient of A."""
    return (A + A.mT) / 2


def solve(q: Float[Tensor, "... n K"], kk: Tensor, ridge: Tensor, steps: int | None) -> Tensor:
    """Rows x of x (A + ridge) = q, one A `[..., K, K]` for all rows; ridge is `[..., 1, K]`."""
    if steps is None:
        return torch.linalg.solve(kk + torch.diag_embed(ridge.squeeze(-2)), q.mT).mT
    kk = symmetric(kk)
    return conjugate_gradient(lambda p: p @ kk.mT + ridge * p, q, steps)


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
    Q, Ks, Ss, Gs = tiles(size, *(pad_tokens(x, size) for x in (q, k, scaled)), g)
    step = max(1, SOLVED // (B * H * size))
    rows = ridge.repeat(B, 1).unsqueeze(1)  # [R, 1, K]
    state, solved = kk.flatten(0, 1), []
    Gs = [None] * len(Q.split(step)) if g is None else Gs.split(step)
    for segment in zip(Q.split(step), Ks.split(step), Ss.split(step), Gs, strict=True):
        x, state = checkpoint(_solve_segment, *segment, rows, state, steps, use_reentrant=False)
        solved.append(x)
    x = torch.cat(solved).unflatten(1, (B, H)).permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :T]
    o, kv = linear_attention(x, scaled, v, log_decay, state=kv, impl="chunked")
    return o, state.unflatten(0, (B, H)), kv


def _solve_segment(q, k, scaled, g, ridge, state, steps):
    """x of each token `[n, R, C, K]` of a segment's tiles, and the state after them."""
    q, k, scaled = fold(q), fold(k), fold(scaled)
    decays = decays_of(None if g is None else fold(g), 1, k)
    states = []
    for more, whole in zip(product(decays.fade(scaled).mT, k), decays.whole, strict=False):
        states.append(state)
        state = state * whole + more
    before = torch.stack(states)

    def apply(p: Tensor) -> Tensor:
        own = product(decays.scores(p.unsqueeze(2), k)[:, :, 0], scaled)
        read = decays.read(p.unsqueeze(2))[:, :, 0]
        return product(read, before.mT) + own + ridge * p

    if steps is not None:
        before = symmetric(before)
        return conjugate_gradient(apply, q, steps), state
    pairs = (scaled.unsqueeze(-1) * k.unsqueeze(-2)).flatten(-2)  # [n, R, C, K K]
    A = product(decays.ratio.expand(len(k), k.shape[1], 1, -1, -1)[:, :, 0], pairs)
    A = A.unflatten(-1, before.shape[-2:])
    since = 1.0 if decays.since is None else decays.since.unsqueeze(-1)
    A = A + since * before.unsqueeze(2) + torch.diag_embed(ridge)
    return torch.linalg.solve(A, q.unsqueeze(-1)).squeeze(-1), state


class Mesa(MatrixMemory, name="mesa"):
    """MesaNet: the read-out of the ridge regression from all keys to all values so far.

    A_t = D_t A_{t-1} + beta_t k_t^T k_t,   R_t = D_t R_{t-1} + beta_t k_t^T v_t,
    o_t = q_t (A_t + diag(ridge))^-1 R_t

    State: A `[K, K]` and R `[K, V]` per head; ridge = 0.25 + softplus(lambda) per head and key
    channel, 1 at the start; beta_t = sigmoid(x_t w). Deviations: one shell for all memories; D_t
    has Mamba-2's form.
    """

    class Config(MatrixConfig):
        """steps: of conjugate gradient at each read (the paper's bound is 30); null is the exact
        solve. decay has no `vector` here: with one, A would not stay symmetric."""

        decay: Literal["none", "constant", "scalar"] = "scalar"
        steps: int | None = 30

        def check(self) -> None:
            MatrixConfig.check(self)
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
        self.beta = nn.Linear(dim, self.heads, bias=False)
        start = torch.tensor(0.75).expm1().log()  # softplus^-1
        self.ridge = nn.Parameter(start.expand(self.heads, self.key_dim).clone())

    def gates(self, x: Tensor) -> Write:
        return {"beta": self.beta(x).sigmoid(), **super().gates(x)}

    def positive_ridge(self) -> Tensor:
        return 0.25 + F.softplus(self.ridge.to(accumulator_dtype(self.ridge)))

    def rule(self, q: Tensor, write: Write, state: State) -> tuple[Tensor, State]:
        log_decay = self.log_decay if self.config.decay == "constant" else None
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

    def init_state(self, batch_size: int) -> State:
        K, V = self.matrix()
        return tuple(self.accumulator(batch_size, self.heads, K, n) for n in (K, V))

    def state_bytes(self, T: int) -> StateBytes:
        K, V = self.matrix()
        return StateBytes(4 * self.heads * K * (K + V))

    def rule_flops(self, T: int) -> float:
        K, V = self.matrix()
        solver = 2 * K**3 / 3 if self.config.steps is None else 2 * K * K * self.config.steps
        return self.heads * (2 * K * K + 4 * K * V + solver)
