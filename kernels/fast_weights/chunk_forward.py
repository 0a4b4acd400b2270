"""The forward pass of chunk.py over a call: a loop over mini-batches."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..launch import empty
from .chunk_parts import Chunked, Pair, Rules, each, gates, part_rows, plan, slots, write_part
from .epilogues import outer


def forward(
    q: Tensor, k: Tensor, v: Tensor, lr: Tensor, momentum: Any, retention: Any, W: Pair, U: Pair,
    S: Pair, A: Any, m: Any, n: Pair, past: int, rules: Rules, keep: bool,
) -> tuple[Any, ...]:  # fmt: skip
    """U, A, m are those of a mini-batch that has begun, if past % C. Returns o, W, U, S, A, m
    after the call (None where there is none or nothing is pending) and the M and S of every
    mini-batch, kept for the backward if `keep`."""
    C, T, start = rules.C, q.shape[1], past % rules.C
    call = Chunked(rules, n, start, past < C)
    if not start:
        U, A, m = [None, None], None, None
    count = slots(T, C) if keep else 2
    kept = [empty((count, *w.shape), like=w) for w in W]
    kept_S = [None if s is None else empty((count, *s.shape), like=s) for s in S]
    for to, w in zip((*kept, *kept_S), (*W, *S), strict=True):
        if to is not None:
            to[0].copy_(w)
    place = (lambda slot: slot) if keep else (lambda slot: slot % 2)
    o = empty(v.shape, like=v)
    c: Pair = [None, None]
    step: Pair = [None, None]
    slot, full, A_end, m_end = 0, False, None, None
    for part in plan(T, start, C, len(W[0]) * W[1].shape[1]):
        kf, vf, lf = part_rows(k, part), part_rows(v, part), part_rows(lr, part)
        A_end, m_end, mean = gates(momentum, retention, part, [A, m], C)
        G, R = call.buffers(W, q, part.g + part.full)
        c = call.cast(part.slot, each(kept, place(part.slot)), each(G, 0), each(R, 0))
        for j in range(part.g):
            slot, full = part.slot + j, part.full
            _, h, _, el, _, E = call.tokens(kf[j], vf[j], lf[j], each(G, j))
            step = [outer(kf[j], E), outer(h, el)]
            if slot == 0 and start:
                step = [x + u for x, u in zip(step, U, strict=True)]
            if not full:
                break
            here, there = place(slot), place(slot + 1)
            c = call.write(
                each(kept, here), c, step, each(kept_S, here), each(A_end, j), each(mean, j),
                each(kept, there), each(kept_S, there), each(G, j + 1), each(R, j + 1),
            )  # fmt: skip
            slot += 1
        rows = [x[: part.g].flatten(0, 1) for x in R]
        write_part(call.read(part_rows(q, part).flatten(0, 1), rows), part, o)
    new = [x[place(slot)].clone() for x in kept]
    if rules.place == "end" and call.maps(slot):
        new = [x * s.unsqueeze(-2) for x, s in zip(new, c, strict=True)]
    new_S = [None if x is None else x[place(slot)].clone() for x in kept_S]
    if full:
        return o, new, [None, None], new_S, None, None, kept, kept_S
    pending = [None if x is None else x[0] for x in (A_end, m_end)]
    return o, new, step, new_S, *pending, kept, kept_S
