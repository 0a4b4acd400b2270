"""The fast form of linear attention in PyTorch: chunks, with a backward pass of their own."""

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
    write_chunks,
)
from ..common.decays import FLOOR, StateGradients, decays_of
from ..common.matrix import per_token


def run(q, k, v, log_decay, *, scale, state):
    """See `linear_attention`."""
    if (T := q.shape[1]) == 0:
        return torch.zeros_like(v), state
    if T == 1:
        return step(q, k, v, log_decay, scale=scale, state=state)
    size = chunk_size(T)
    if log_decay is not None:
        log_decay = pad_tokens(per_token(log_decay, k).clamp(min=FLOOR), size)
    q, k, v = (pad_tokens(x, size) for x in (q, k, v))
    keep = torch.is_grad_enabled()
    o, state = LinearChunked.apply(q, k, v, log_decay, state, scale, size, keep)
    return o[:, :T], state


def step(q, k, v, log_decay, *, scale, state):
    """One token, in the fewest operations: what decoding waits for."""
    rows = state.shape[:2]
    if log_decay is not None:
        state = state * per_token(log_decay, k)[:, 0].exp().unsqueeze(-1)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # [B H, 1, D]
    state = torch.baddbmm(state.flatten(0, 1), k.mT, v)
    o = torch.bmm(q, state).mul(scale).unflatten(0, rows).transpose(1, 2)
    return o, state.unflatten(0, rows)


class LinearChunked(torch.autograd.Function):
    """S' = D S + (k until)^T v from chunk to chunk, and o = (q since) S + scores v inside one."""

    @staticmethod
    def forward(ctx: Any, q, k, v, g, state, scale, size, keep) -> Any:
        B, _, H, _ = q.shape
        o, saved = torch.empty_like(v), []
        Q, Ks, Vs, Gs, Os = chunk_views(size, q, k, v, g, o)
        state = state.flatten(0, 1)
        for s in segments(Q):
            rows, ks, vs = side_by_side(Q[s]), join_heads(Ks[s]), join_heads(Vs[s])
            decays = decays_of(None if g is None else join_heads(Gs[s]), 1, ks)
            added = batched_matmul(decays.fade(ks).mT, vs)
            states = added.new_empty(len(added) + 1, *added.shape[1:])
            states[0] = state
            for n, (more, whole) in enumerate(zip(added, decays.whole, strict=True)):
                state = torch.addcmul(more, state, whole, out=states[n + 1])
            out = batched_matmul(decays.read(rows)[:, :, 0], states[:-1])
            add_batched_matmul(out, decays.scores(rows, ks)[:, :, 0], vs)
            write_chunks(out.mul_(scale), Os[s])
            if keep:
                saved.append(states)
        ctx.scale, ctx.size = scale, size
        ctx.save_for_backward(q, k, v, g, *saved)
        return o, state.unflatten(0, (B, H)).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        do, d_state = grad_outputs
        q, k, v, g, *saved = ctx.saved_tensors
        grads = [None if x is None else torch.empty_like(x) for x in (q, k, v, g)]
        Q, Ks, Vs, Gs, Os, dQ, dK, dV, dG = chunk_views(ctx.size, q, k, v, g, do, *grads)
        B, H, d_state = *Q.shape[1:3], d_state.flatten(0, 1)
        for s in reversed(segments(Q)):
            states = saved.pop()
            rows, ks, vs, dos = (
                side_by_side(Q[s]),
                join_heads(Ks[s]),
                join_heads(Vs[s]),
                join_heads(Os[s]) * ctx.scale,
            )
            decays = decays_of(None if g is None else join_heads(Gs[s]), 1, ks)
            added = batched_matmul(decays.read(rows)[:, :, 0].mT, dos)
            d_states = torch.empty_like(states)
            d_states[-1] = d_state
            for n in reversed(range(len(added))):
                d_state = torch.addcmul(added[n], d_state, decays.whole[n], out=d_states[n])
            d_states = d_states[1:]  # of the states that the chunks leave
            d_rows = decays.read(batched_matmul(dos, states[:-1].mT).unsqueeze(2))
            dk = decays.fade(batched_matmul(vs, d_states.mT))
            dv, scores = batched_matmul(decays.fade(ks), d_states), decays.scores(rows, ks)
            add_batched_matmul(dv, scores[:, :, 0].mT, dos)
            grad = batched_matmul(dos, vs.mT).unsqueeze(2)
            dg = decays.backward(
                grad, scores, rows, ks, StateGradients(d_rows, dk, states[:-1], d_states)
            )
            for x, out in ((d_rows, dQ), (dk, dK), (dv, dV)):
                write_chunks(x, out[s])
            if dg is not None:
                write_chunks(dg, dG[s])
        return *grads, d_state.unflatten(0, (B, H)), None, None, None
