"""Chunks in which no channel decays by much: one product of whole tiles.

Between the halves of the chunk lies a middle. With S_t the sum of the log decays of base 2 from
there to token t, negative after the middle and positive before it, R = 2^S and 1 / R,

    scores = tril (x R) (k / R)^T,   reads = x R 2^mid,   fades = k / R 2^(z - mid),

where mid and z are the sums of the left half and of the chunk. If both halves decay by less than
2^-reach, nothing overflows, and floating point loses nothing by the factors. Else what is
computed here is nothing, and `strong` has to do it again: flags say for which chunks.

Backward, with D the gradient of the scores, likewise masked,

    a = D (k / R),  b = D^T (x R),  dx = R a + ..,  dk = b / R + ..,
    dG = (x R) a - (k / R) b + reads d_reads,

and dg is the sum of dG from a token on, of fades d_fades before it, and of what d_whole adds.
Pairs of tokens on one side cancel in it: both products are of the same rounded factors, and dG is
summed in two parts of 8 bits each.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .pieces import FLOOR, LOG2, pieces


@triton.jit
def rounded(x, dt: tl.constexpr) -> Any:
    """x to the digits of dt, in float32. By integers for bfloat16: a GPU converts single numbers
    at a fraction of that rate, and pairs of them only if that is all that they are for."""
    if dt == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x8000) & -65536).to(tl.float32, bitcast=True)
    else:
        x = x.to(dt).to(tl.float32)
    return x


@triton.jit
def centred(i, m, log, REACH: tl.constexpr) -> Any:
    """(S [C, K], mid [K], z - mid [K]) of log decays [C, K]; m: of `matrices`. S is
    clamped: what is not mild must be no more than wrong."""
    C: tl.constexpr = log.shape[0]
    high, low = pieces(log)
    G = tl.dot(m, high, tl.dot(m, low))
    mid = tl.sum(tl.where(i < C // 2, log, 0.0), 0)
    rest = tl.sum(tl.where(i < C // 2, 0.0, log), 0)
    S = tl.minimum(tl.maximum(G - mid[None, :], -REACH), REACH)
    return S, mid, rest


@triton.jit(do_not_specialize=["T"])
def mild_forward(
    q, k, g, scores_q, scores_k, reads_q, reads_k, fades, whole, flags, through, T,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
    REACH: tl.constexpr,
):  # fmt: skip
    """One chunk of one head, a loop over blocks of BK channels. flags [chunks]. through: of
    `matrices`."""
    dt = q.dtype.element_ty
    N = (T + C - 1) // C
    n, bh = tl.program_id(0) % N, tl.program_id(0) // N
    first = ((bh // H).to(tl.int64) * T + n * C) * H + bh % H  # row of [B T H, ..]
    i, t, c = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :], tl.arange(0, BK)
    alive = n * C + i < T
    row = ((bh // H).to(tl.int64) * N + n) * H + bh % H
    q, k, g, fades = q + first * K, k + first * K, g + first * K, fades + first * K
    reads_q, reads_k, whole = reads_q + first * K, reads_k + first * K, whole + row * K
    m = tl.load(through + i * C + t)
    own_q = tl.zeros([C, C], tl.float32)
    own_k = tl.zeros([C, C], tl.float32)
    least = tl.zeros([BK], tl.float32)
    for c0 in range(0, K, BK):
        at = i * (H * K) + c0 + c[None, :]
        log = tl.maximum(tl.load(g + at, alive, other=0.0), FLOOR) * LOG2
        x = tl.load(q + at, alive, other=0.0)
        y = tl.load(k + at, alive, other=0.0)
        S, mid, rest = centred(i, m, log, REACH)
        least = tl.minimum(least, tl.minimum(mid, rest))
        tl.store(whole + c0 + c, tl.exp2(mid + rest))
        mid, rest = tl.exp2(mid)[None, :], tl.exp2(rest)[None, :]
        R = tl.exp2(S)
        x, y = x.to(tl.float32), y.to(tl.float32)
        key = y * tl.exp2(-S)
        tl.store(fades + at, (key * rest).to(dt), alive)
        key = tl.trans(key.to(dt))
        reader = x * R
        tl.store(reads_q + at, (reader * mid).to(dt), alive)
        own_q = tl.dot(reader.to(dt), key, own_q)
        if PARTS == 2:
            reader = y * R
            tl.store(reads_k + at, (reader * mid).to(dt), alive)
            own_k = tl.dot(reader.to(dt), key, own_k)
    tl.store(flags + tl.program_id(0), (tl.min(least, 0) < -REACH).to(tl.int32))
    at = i * (H * C) + t
    tl.store(scores_q + first * C + at, tl.where(t <= i, own_q, 0.0).to(dt), alive)
    if PARTS == 2:
        tl.store(scores_k + first * C + at, tl.where(t < i, own_k, 0.0).to(dt), alive)


@triton.jit(do_not_specialize=["T"])
def mild_backward(
    q, k, g, d_scores_q, d_scores_k, d_reads_q, d_reads_k, d_fades, d_whole, d_q, d_k, d_g,
    flags, through, after, before, T,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, SPAN: tl.constexpr, BK: tl.constexpr,
    PARTS: tl.constexpr, REACH: tl.constexpr,
):  # fmt: skip
    """SPAN channels of one chunk of one head, a loop over blocks of BK. flags [chunks, spans].
    through, after, before: of `matrices`."""
    dt = q.dtype.element_ty
    N = (T + C - 1) // C
    span, chunk = tl.program_id(0) % (K // SPAN), tl.program_id(0) // (K // SPAN)
    n, bh = chunk % N, chunk // N
    first = ((bh // H).to(tl.int64) * T + n * C) * H + bh % H
    i, t = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    alive = n * C + i < T
    skip = first * K + span * SPAN
    q, k, g, d_fades = q + skip, k + skip, g + skip, d_fades + skip
    d_reads_q, d_reads_k = d_reads_q + skip, d_reads_k + skip
    d_q, d_k, d_g = d_q + skip, d_k + skip, d_g + skip
    d_whole += (((bh // H).to(tl.int64) * N + n) * H + bh % H) * K + span * SPAN
    d_scores_q, d_scores_k = d_scores_q + first * C, d_scores_k + first * C
    # The transposes are read as such: on sm_90 one that is made in registers is no safe operand.
    rows, columns, alive_t = i * (H * C) + t, t * (H * C) + i, n * C + t < T
    D = tl.load(d_scores_q + rows, alive & (t <= i), other=0.0)
    DT = tl.load(d_scores_q + columns, alive_t & (i <= t), other=0.0)
    E, ET = D, DT
    if PARTS == 2:
        E = tl.load(d_scores_k + rows, alive & (t < i), other=0.0)
        ET = tl.load(d_scores_k + columns, alive_t & (i < t), other=0.0)
    through = tl.load(through + i * C + t)
    after = tl.load(after + i * C + t)
    before = tl.load(before + i * C + t)
    least = tl.zeros([BK], tl.float32)
    for block in range(SPAN // BK):
        c = block * BK + tl.arange(0, BK)
        at = i * (H * K) + c[None, :]
        log = tl.maximum(tl.load(g + at, alive, other=0.0), FLOOR) * LOG2
        x = tl.load(q + at, alive, other=0.0)
        y = tl.load(k + at, alive, other=0.0)
        S, mid, rest = centred(i, through, log, REACH)
        least = tl.minimum(least, tl.minimum(mid, rest))
        more = tl.load(d_whole + c) * tl.exp2(mid + rest)
        mid, rest = tl.exp2(mid)[None, :], tl.exp2(rest)[None, :]
        R, Q = tl.exp2(S), tl.exp2(-S)
        x, y = x.to(tl.float32), y.to(tl.float32)
        reader, key = rounded(x * R, dt), rounded(y * Q, dt)
        a = tl.dot(D, key.to(dt))
        given = tl.load(d_reads_q + at, alive, other=0.0).to(tl.float32) * (R * mid)
        tl.store(d_q + at, (a * R + given).to(dt), alive)
        dG = reader * a + x * given
        b = tl.dot(DT, reader.to(dt))
        if PARTS == 2:
            a = tl.dot(E, key.to(dt))
            reader = rounded(y * R, dt)
            given = tl.load(d_reads_k + at, alive, other=0.0).to(tl.float32) * (R * mid)
            dG += reader * a + y * given
            dy = a * R + given
            b = tl.dot(ET, reader.to(dt), b)
        dG -= key * b
        faded = tl.load(d_fades + at, alive, other=0.0).to(tl.float32) * (Q * rest)
        b = b * Q + faded
        if PARTS == 2:
            b += dy
        tl.store(d_k + at, b.to(dt), alive)
        high = rounded(dG, dt)
        dg = tl.dot(after, high.to(dt), tl.dot(after, (dG - high).to(dt)))
        dg = tl.dot(before, (y * faded).to(dt), dg) + more[None, :]
        tl.store(d_g + at, dg, alive)
    tl.store(flags + tl.program_id(0), (tl.min(least, 0) < -REACH).to(tl.int32))
