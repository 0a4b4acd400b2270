"""The delta rule's forward kernels: what chunks need beforehand, and the scan over them.

Of a chunk of C tokens, S the state before it, ratio_ij the decay after token j through i:

    scores_ij = q_i . k_j ratio_ij (i >= j),   A_ij = k_i . k_j ratio_ij (i > j),
    solve = (I + A diag(beta))^-1,   r = solve (v - (k since) S),   u = beta r,
    o = scale ((q since) S + scores u),   S' = whole S + (k until)^T u.

r is what a token finds wrong, u what it writes. Without a division by beta, which may be 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    last,
    load_gate,
    load_rows,
    ratios,
    store_gate,
    store_rows,
    sums,
    unit_lower_inverse,
)


@triton.jit(do_not_specialize=["T", "N", "B"])
def prepare(
    q, k, beta, g, A, scores, solve, gates, whole, T, N, B,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
    DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program does one chunk of one head. scores, solve: `[B, T, H, C]`. gates: since and until,
    `[2, B, T, H]`. whole: `[B, N, H]`. DECAY: 0 none, 1 a token, 2 a channel: then A is given,
    and only `solve` is made."""
    n, bh = tl.program_id(0) % N, tl.program_id(0) // N
    b, h = (bh // H).to(tl.int64), bh % H
    first = n * C
    row = (b * T + first) * H + h
    i = tl.arange(0, C)
    d = tl.arange(0, K)
    seen = i[:, None] >= i[None, :]
    strength = load_gate(beta, row, first, T, H, C)
    if DECAY == 1:
        log = load_gate(g, row, first, T, H, C)
    if DECAY == 2:
        a = load_rows(A, row, first, T, i, H, C, C).to(tl.float32)
    else:
        ks = load_rows(k, row, first, T, d, H, K, C)
        qs = load_rows(q, row, first, T, d, H, K, C)
        s = tl.dot(qs, tl.trans(ks), input_precision=PRECISION)
        if DECAY == 1:
            coarse, fine = sums(log)
            ratio = ratios(coarse, fine)
            s *= ratio
            ends, rest = last(coarse, C), last(fine, C)
            since = tl.exp2(coarse + fine)
            until = tl.exp2(tl.minimum((ends - coarse) + (rest - fine), 0.0))
            store_gate(gates, row, first, T, since, H, C)
            store_gate(gates + (b * 0 + B) * T * H, row, first, T, until, H, C)
            tl.store(whole + (b * N + n) * H + h, tl.exp2(ends + rest))
        store_rows(scores, row, first, T, i, tl.where(seen, s, 0.0), H, C, C)
        a = tl.dot(ks, tl.trans(ks), input_precision=PRECISION)
        if DECAY == 1:
            a *= ratio
    a = tl.where(i[:, None] > i[None, :], a * strength[None, :], 0.0)
    inverse = unit_lower_inverse(a, C, PRECISION, q.dtype.element_ty)
    store_rows(solve, row, first, T, i, inverse, H, C, C)


@triton.jit(do_not_specialize=["T", "N", "B"])
def scan(
    q, k, fade, v, beta, scores, solve, gates, whole, state, o, end, r, states, scale, T, N, B,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BV: tl.constexpr, DECAY: tl.constexpr, OUT: tl.constexpr, SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A program takes BV columns of one head's state through all chunks.

    Their transpose, `[BV, K]`, is in float32 registers, and all is computed transposed: so what
    one product gives is the left operand of the next, which can stay in registers, and the right
    ones come from memory.

    With DECAY = 2, q, k and fade are decayed already, and whole is `[B, N, H, K]`. With SAVE,
    r `[B, T, H, V]` and the transposed states before the chunks `[B, N, H, V, K]` are written;
    without OUT, `outputs` makes o of them."""
    blocks: tl.constexpr = V // BV
    bh = tl.program_id(0) // blocks
    b, h = (bh // H).to(tl.int64), bh % H
    d = tl.arange(0, K)
    c = (tl.program_id(0) % blocks) * BV + tl.arange(0, BV)
    i = tl.arange(0, C)
    place = (b * H + h) * K * V + d[:, None] * V + c[None, :]
    low = q.dtype.element_ty
    untils = gates + (b * 0 + B) * T * H
    S = tl.trans(tl.load(state + place))
    for n in range(0, N):
        first = n * C
        row = (b * T + first) * H + h
        chunk = (b * N + n) * H + h
        if DECAY == 1:  # long before it is wanted
            kept = tl.load(whole + chunk)
        ks = load_rows(k, row, first, T, d, H, K, C)
        vs = load_rows(v, row, first, T, c, H, V, C)
        M = load_rows(solve, row, first, T, i, H, C, C)
        strength = load_gate(beta, row, first, T, H, C)
        known = S.to(low)
        if SAVE:
            tl.store(states + chunk * K * V + c[:, None] * K + d[None, :], known)
        e = tl.dot(known, tl.trans(ks), input_precision=PRECISION)
        if DECAY == 1:
            since = load_gate(gates, row, first, T, H, C)
            e *= since[None, :]
        e = tl.dot((tl.trans(vs) - e).to(low), tl.trans(M), input_precision=PRECISION)
        if SAVE:
            store_rows(r, row, first, T, c, tl.trans(e.to(low)), H, V, C)
        u = e * strength[None, :]
        written = u.to(low)
        if OUT:
            qs = load_rows(q, row, first, T, d, H, K, C)
            s = load_rows(scores, row, first, T, i, H, C, C)
            out = tl.dot(known, tl.trans(qs), input_precision=PRECISION)
            if DECAY == 1:
                out *= since[None, :]
            out = tl.dot(written, tl.trans(s), out, input_precision=PRECISION)
            store_rows(o, row, first, T, c, tl.trans((out * scale).to(low)), H, V, C)
        if DECAY == 0:
            S = tl.dot(written, ks, S, input_precision=PRECISION)
        elif DECAY == 1:
            left = (u * load_gate(untils, row, first, T, H, C)[None, :]).to(low)
            S = tl.dot(left, ks, S * kept, input_precision=PRECISION)
        else:
            S *= tl.load(whole + chunk * K + d)[None, :]
            fs = load_rows(fade, row, first, T, d, H, K, C)
            S = tl.dot(written, fs, S, input_precision=PRECISION)
    tl.store(end + place, tl.trans(S))


@triton.jit(do_not_specialize=["T", "N", "B"])
def outputs(
    q, beta, scores, gates, r, states, o, scale, T, N, B,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BV: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o of what the scan has left behind. A program does BV columns of one chunk of one head."""
    blocks: tl.constexpr = V // BV
    n, bh = (tl.program_id(0) // blocks) % N, tl.program_id(0) // (blocks * N)
    b, h = (bh // H).to(tl.int64), bh % H
    first = n * C
    row = (b * T + first) * H + h
    d = tl.arange(0, K)
    c = (tl.program_id(0) % blocks) * BV + tl.arange(0, BV)
    i = tl.arange(0, C)
    S = tl.load(states + ((b * N + n) * H + h) * K * V + c[:, None] * K + d[None, :])
    qs = load_rows(q, row, first, T, d, H, K, C)
    out = tl.dot(qs, tl.trans(S), input_precision=PRECISION)
    if DECAY == 1:
        out *= load_gate(gates, row, first, T, H, C)[:, None]
    u = load_rows(r, row, first, T, c, H, V, C).to(tl.float32)
    u = (u * load_gate(beta, row, first, T, H, C)[:, None]).to(q.dtype.element_ty)
    s = load_rows(scores, row, first, T, i, H, C, C)
    out = tl.dot(s, u, out, input_precision=PRECISION)
    store_rows(o, row, first, T, c, out * scale, H, V, C)
