"""The ridge systems of a segment, one a token, solved together: A_i x_i = q_i, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from layerzoo.ops import once_differentiable

from ..common.chunks import add_batched_matmul, batched_matmul
from ..common.decays import StateGradients, decays_of

if TYPE_CHECKING:
    from jaxtyping import Float


class CGStep(NamedTuple):
    """What a step of conjugate gradient leaves for its derivative."""

    p: Tensor
    Ap: Tensor
    pAp: Tensor  # 1 where frozen, as rr
    rr: Tensor  # before the step
    r: Tensor  # after the step
    live: Tensor
    size: Tensor
    ratio: Tensor  # of rr after and before


def conjugate_gradient(
    apply: Callable[[Tensor], Tensor],
    b: Float[Tensor, "... K"],
    steps: int,
    trace: list[CGStep] | None = None,
) -> Float[Tensor, "... K"]:
    """x with apply(x) = b for a symmetric positive `apply`, by at most `steps` steps from zero.

    A row whose residual is down to rounding error, or whose b is zero, is frozen: the next step
    would divide noise by noise. b is about 1 (see `magnitude`), lest its squares underflow.
    """
    x, r, p = torch.zeros_like(b), b, b
    rr = r.square().sum(-1, keepdim=True)
    enough = torch.finfo(b.dtype).eps ** 2 * rr.detach()
    for _ in range(steps):
        live, Ap = rr > enough, apply(p)
        pAp = torch.where(live, (p * Ap).sum(-1, keepdim=True), 1.0)
        before = torch.where(live, rr, 1.0)
        size = torch.where(live, rr / pAp, 0.0)
        x, r = x + size * p, r - size * Ap
        rr = r.square().sum(-1, keepdim=True)
        ratio = torch.where(live, rr / before, 0.0)
        if trace is not None:
            trace.append(CGStep(p, Ap, pAp, before, r, live, size, ratio))
        p = r + ratio * p
    return x


def conjugate_gradient_back(
    apply: Callable[[Tensor], Tensor], b: Tensor, trace: list[CGStep], dx: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The gradients of b and of every step's Ap from the gradient of x: the steps in reverse."""
    dr, dp, drr = torch.zeros_like(b), torch.zeros_like(b), torch.zeros_like(b[..., :1])
    d_products = []
    for step in reversed(trace):
        d_ratio = torch.where(step.live, (dp * step.p).sum(-1, keepdim=True) / step.rr, 0.0)
        dr = dr + dp + 2 * (drr + d_ratio) * step.r
        d_size = torch.where(
            step.live, (dx * step.p - dr * step.Ap).sum(-1, keepdim=True) / step.pAp, 0.0
        )
        d_pAp = -d_size * step.size
        dAp = d_pAp * step.p - step.size * dr
        dp = step.ratio * dp + step.size * dx + d_pAp * step.Ap + apply(dAp)
        drr = d_size - d_ratio * step.ratio
        d_products.append(dAp)
    return dr + dp + 2 * drr * b, d_products[::-1]


def solve(q: Float[Tensor, "... n K"], kk: Tensor, ridge: Tensor, steps: int | None) -> Tensor:
    """Rows x of x (A + ridge) = q, one A `[..., K, K]` for all rows; ridge is `[..., 1, K]`."""
    if steps is None:
        return torch.linalg.solve(kk + torch.diag_embed(ridge.squeeze(-2)), q.mT).mT
    kk, size = symmetric(kk), magnitude(q)
    return size * conjugate_gradient(lambda p: p @ kk.mT + ridge * p, q / size, steps)


def magnitude(q: Float[Tensor, "... K"]) -> Float[Tensor, "... 1"]:
    """The largest entry of each row, 1 for a zero row. A solution grows with
    its q in proportion: dividing by it before and multiplying after needs no gradient of it."""
    size = q.detach().abs().amax(-1, keepdim=True)
    return torch.where(size > 0, size, 1.0)


def symmetric(A: Tensor) -> Tensor:
    """The part of a state that conjugate gradient reads: it has no other meaning, and else no
    meaningful gradient."""
    return (A + A.mT) / 2


class Systems:
    """A_i = D_(1..i) S + sum_{j <= i} D_(j+1..i) scaled_j^T k_j + diag(ridge) of the tokens of a
    segment's tiles `[n, R, C, K]`, where S is the state before the chunk."""

    def __init__(
        self, k: Tensor, scaled: Tensor, g: Tensor | None, ridge: Tensor, state: Tensor
    ) -> None:
        self.k, self.scaled, self.ridge = k, scaled, ridge
        self.decays = decays_of(g, 1, k)
        added = batched_matmul(self.decays.fade(scaled).mT, k)
        self.states = added.new_empty(len(added) + 1, *state.shape)
        self.states[0] = state
        for n, (more, whole) in enumerate(zip(added, self.decays.whole, strict=True)):
            torch.addcmul(more, self.states[n], whole, out=self.states[n + 1])
        self.symmetric = symmetric(self.states[:-1])

    def apply(self, p: Float[Tensor, "n R C K"]) -> Tensor:
        """A_i p_i, with the symmetric part of S."""
        rows = p.unsqueeze(2)
        out = batched_matmul(self.decays.read(rows)[:, :, 0], self.symmetric)
        add_batched_matmul(out, self.decays.scores(rows, self.k)[:, :, 0], self.scaled)
        return out.addcmul_(self.ridge, p)

    def matrices(self) -> Float[Tensor, "n R C K K"]:
        n, R, C, K = self.k.shape
        pairs = (self.scaled.unsqueeze(-1) * self.k.unsqueeze(-2)).flatten(-2)
        A = batched_matmul(self.decays.ratio.expand(n, R, 1, C, C)[:, :, 0], pairs).unflatten(
            -1, (K, K)
        )
        since = self.decays.since
        read = self.states[:-1].unsqueeze(2)
        return (
            A + (read if since is None else since.unsqueeze(-1) * read) + self.ridge.diag_embed()
        )

    def backward(self, d_products: Tensor, p: Tensor, d_state: Tensor, exact: bool) -> list[Any]:
        """The gradients of k, scaled, g, ridge and the first state, from those of products A p,
        both `[n, R, products, C, K]`, and of the last state."""
        decays, k, scaled, before = self.decays, self.k, self.scaled, self.states[:-1]
        flat = d_products.flatten(2, 3)
        d_before = batched_matmul(decays.read(d_products).flatten(2, 3).mT, p.flatten(2, 3))
        if not exact:
            d_before, before = symmetric(d_before), self.symmetric
        d_states = torch.empty_like(self.states)
        d_states[-1] = d_state
        for n in reversed(range(len(k))):
            torch.addcmul(d_before[n], d_states[n + 1], decays.whole[n], out=d_states[n])
        d_rows = decays.read(batched_matmul(flat, before).view_as(p))
        d_k = decays.fade(batched_matmul(scaled, d_states[1:]))
        d_scaled = decays.fade(batched_matmul(k, d_states[1:].mT))
        scores = decays.scores(p, k)
        add_batched_matmul(d_scaled, scores.flatten(2, 3).mT, flat)
        grad = batched_matmul(flat, scaled.mT).view_as(scores)
        into = StateGradients(d_rows, d_k, self.states[:-1], d_states[1:])
        dg = decays.backward(grad, scores, p, k, into)
        d_ridge = (d_products * p).sum((0, 2, 3)).unsqueeze(1)
        return [d_k, d_scaled, dg, d_ridge, d_states[0]]


class SolveSystems(torch.autograd.Function):
    """x of the tokens of a segment's tiles, and the state after them. The backward runs the steps
    again: what is kept is the input only."""

    @staticmethod
    def forward(ctx: Any, q, k, scaled, g, ridge, state, steps: int | None) -> Any:
        systems = Systems(k, scaled, g, ridge, state)
        if steps is None:
            x = torch.linalg.solve(systems.matrices(), q.unsqueeze(-1)).squeeze(-1)
        else:
            x = conjugate_gradient(systems.apply, q, steps)
        ctx.steps = steps
        ctx.save_for_backward(q, k, scaled, g, ridge, state)
        return x, systems.states[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        dx, d_state = grad_outputs
        q, *inputs = ctx.saved_tensors
        systems = Systems(*inputs)
        if ctx.steps is None:
            A = systems.matrices()
            x = torch.linalg.solve(A, q.unsqueeze(-1)).squeeze(-1)
            dq = torch.linalg.solve(A.mT, dx.unsqueeze(-1)).squeeze(-1)
            d_products, p = -dq.unsqueeze(2), x.unsqueeze(2)
        else:
            trace: list[CGStep] = []
            conjugate_gradient(systems.apply, q, ctx.steps, trace)
            dq, products = conjugate_gradient_back(systems.apply, q, trace, dx)
            d_products, p = torch.stack(products, 2), torch.stack([s.p for s in trace], 2)
        return dq, *systems.backward(d_products, p, d_state, ctx.steps is None), None
