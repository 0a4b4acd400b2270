"""The fast form of the delta rule in PyTorch: chunks, with a backward pass of their own."""

from __future__ import annotations

from typing import Any

import torch

from layerzoo.ops import once_differentiable

from ..common.chunks import (
    add_batched_matmul,
    batched_matmul,
    chunk_size,
    chunk_views,
    join_heads,
    pad_tokens,
    segments,
    side_by_side,
    unit_lower_inverse,
    write_chunks,
)
from ..common.decays import FLOOR, StateGradients, decays_of
from ..common.matrix import per_token


def run(q, k, v, beta, log_decay, *, scale, state):
    """See `delta_rule`."""
    if (T := q.shape[1]) == 0:
        return torch.zeros_like(v), state
    if T == 1:
        return step(q, k, v, beta, log_decay, scale=scale, state=state)
    size = chunk_size(T)
    if log_decay is not None:
        log_decay = pad_tokens(per_token(log_decay, k).clamp(min=FLOOR), size)
    q, k, v, beta = (pad_tokens(x, size) for x in (q, k, v, beta.unsqueeze(-1)))
    keep = torch.is_grad_enabled()
    o, state = DeltaChunked.apply(q, k, v, beta, log_decay, state, scale, size, keep)
    return o[:, :T], state


def step(q, k, v, beta, log_decay, *, scale, state):
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


class DeltaChunked(torch.autograd.Function):
    """With e = v - (k since) S, what the state before a chunk does not know of v, and A the scores
    of k with k below the diagonal, its tokens write u = beta (e - A u), that is u = M beta e with
    M = (I + beta A)^-1. Only e, u and S' = D S + (k until)^T u wait for S."""

    @staticmethod
    def forward(ctx: Any, q, k, v, beta, g, state, scale, size, keep) -> Any:
        B, _, H, _ = q.shape
        o, saved = torch.empty_like(v), []
        Q, Ks, Vs, Bs, Gs, Os = chunk_views(size, q, k, v, beta, g, o)
        state = state.flatten(0, 1)
        for s in segments(Q):
            rows, vs, betas = side_by_side(Q[s], Ks[s]), join_heads(Vs[s]), join_heads(Bs[s])
            ks = rows[:, :, 1]
            decays = decays_of(None if g is None else join_heads(Gs[s]), 2, ks)
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
            out = batched_matmul(reads[:, :, 0], states[:-1])
            add_batched_matmul(out, scores[:, :, 0], u)
            write_chunks(out.mul_(scale), Os[s])
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
        Q, Ks, Bs, Gs, Os, dQ, dK, dV, dB, dG = chunk_views(ctx.size, q, k, beta, g, do, *grads)
        B, H, d_state = *Q.shape[1:3], d_state.flatten(0, 1)
        for s in reversed(segments(Q)):
            scores, M, e, u, states = saved[-5:]
            del saved[-5:]
            rows, betas = side_by_side(Q[s], Ks[s]), join_heads(Bs[s])
            ks = rows[:, :, 1]
            decays = decays_of(None if g is None else join_heads(Gs[s]), 2, ks)
            reads = decays.read(rows)
            dy = u.new_empty(*u.shape[:2], 2, *u.shape[2:])  # of what q and k read
            torch.mul(join_heads(Os[s]), ctx.scale, out=dy[:, :, 0])
            du = batched_matmul(scores[:, :, 0].mT, dy[:, :, 0])
            added = batched_matmul(reads[:, :, 0].mT, dy[:, :, 0])
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
            d_rows = decays.read(batched_matmul(dy.flatten(2, 3), states[:-1].mT).view_as(rows))
            dk = decays.fade(batched_matmul(u, d_states.mT))
            grad = batched_matmul(dy.flatten(2, 3), u.mT).view_as(scores)
            dg = decays.backward(
                grad, scores, rows, ks, StateGradients(d_rows, dk, states[:-1], d_states)
            )
            db = torch.linalg.vecdot(x, e - batched_matmul(scores[:, :, 1], u)).unsqueeze(-1)
            dk += d_rows[:, :, 1]
            for d, out in ((d_rows[:, :, 0], dQ), (dk, dK), (-dy[:, :, 1], dV), (db, dB)):
                write_chunks(d, out[s])
            if dg is not None:
                write_chunks(dg, dG[s])
        return *grads, d_state.unflatten(0, (B, H)), None, None, None
