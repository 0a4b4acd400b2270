"""Chunks in which channels may decay by any amount, down to nothing.

e^(G_i) e^(-G_j) overflows. Instead, blocks of
two halves of h tokens are compared through the token between them: for i in the right half and j
in the left one, G_i - G_j is the sum from the middle to i plus the sum after j to the middle, both
at most 0. A token is in one half of one block of every size 2h, so it has one exponent E_h a
channel, and F_h = e^(E_h) serves as its row and as its key:

    scores = sum over h = 1, 2, .. C/2 of (x F_h) (k F_h)^T, where block and halves are i's and j's

which are log2 C products of whole tiles under a mask: the pairs of h are those with i > j and
h <= (i xor j) < 2h. The exponents are products, too, E_h = M_h g, of a matrix of ones at the
tokens between a token and its middle; local sums of one sign, which a strong decay elsewhere in
the chunk costs no digits. And so is the gradient of g, the sum of M_h^T dE_h, dE_h = F_h dF_h.

As soon as all E_h are above -REACH, blocks of 2h are done at once as `mild` does chunks: rows of
left halves and keys of right ones are divided by F_h instead. REACH is 0 for float32: never.

For 16-bit inputs M_h g is a product of float16, rounding g by 2^-12 of itself, which changes
F_h by at most 2^-12 / e, a twentieth of what rounding it to bfloat16 does.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .pieces import FLOOR, LOG2, ones, pieces

# Masks [C, C] of one halving compare a column with limits of its row: what does not depend on
# both and h is a vector, or the compiler would keep matrices of invariants in registers.


@triton.jit
def _between(i, t, h):
    """Where token t's decay lies between token i and the middle of its block of 2h: M_h[i, t]."""
    half = i & -h
    right = (i & h) != 0
    return (t >= tl.where(right, half, i + 1)) & (t < tl.where(right, i + 1, half + h))


@triton.jit
def _around(i, t, h):
    """M_h[t, i]."""
    half = i & -h
    right = (i & h) != 0
    return (t >= tl.where(right, i, half)) & (t < tl.where(right, half + h, i))


@triton.jit
def _pairs(i, h, E, REACH: tl.constexpr) -> Any:
    """The signs of E in rows and in keys; the columns [start, end) that row i is compared with;
    and the next h. If all of E is mild, these are the earlier tokens in i's block of 2h, and
    nothing is left to do; else the left half, for i in the right one."""
    half = i & -h
    right = (i & h) != 0
    start = half ^ h
    end = start + tl.where(right, h, 0)
    to_row = 1.0
    to_key = 1.0
    h = h // 2
    if REACH > 0:
        near = tl.min(tl.min(E, 1), 0) >= -REACH
        to_row = tl.where(near, tl.where(right, 1.0, -1.0), 1.0)
        to_key = tl.where(near, tl.where(right, -1.0, 1.0), 1.0)
        start = tl.where(near, tl.minimum(half, start), start)
        end = tl.where(near, i, end)
        h = tl.where(near, 0, h)
    return to_row, to_key, start, end, h


@triton.jit
def _decays(i, t, g, high, low) -> Any:
    """(e^G, e^(Z - G), e^Z) from g [C, K] in units of log 2."""
    z = tl.sum(g, 0)
    if high.dtype == tl.float32:
        since = tl.dot(ones(t <= i, g), g, input_precision="ieee")
        until = tl.dot(ones(t > i, g), g, input_precision="ieee")
    else:
        m = ones(t <= i, high)
        since = tl.dot(m, high, tl.dot(m, low))
        until = tl.minimum(z[None, :] - since, 0.0)  # wrong by 2^-12 at most
    return tl.exp2(since), tl.exp2(until), tl.exp2(z)


@triton.jit
def one_forward(
    item, q, k, g, scores_q, scores_k, reads_q, reads_k, fades, whole, T,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
    REACH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of one head: scores [C, C] in registers over a loop over blocks of channels."""
    dt = q.dtype.element_ty
    N = (T + C - 1) // C
    n, bh = item % N, item // N
    first = ((bh // H).to(tl.int64) * T + n * C) * H + bh % H  # row of [B T H, ..]
    i, t, c = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :], tl.arange(0, BK)
    alive = n * C + i < T
    row = ((bh // H).to(tl.int64) * N + n) * H + bh % H
    q, k, g, fades = q + first * K, k + first * K, g + first * K, fades + first * K
    reads_q, reads_k, whole = reads_q + first * K, reads_k + first * K, whole + row * K
    own = tl.zeros([C], tl.float32)
    own_q = tl.zeros([C, C], tl.float32)
    own_k = tl.zeros([C, C], tl.float32)
    for c0 in range(0, K, BK):
        at = i * (H * K) + c0 + c[None, :]
        x = tl.load(q + at, alive, other=0.0)
        y = tl.load(k + at, alive, other=0.0)
        log = tl.maximum(tl.load(g + at, alive, other=0.0), FLOOR) * LOG2
        if dt == tl.float32:
            high, low = log, log
        else:
            high, low = pieces(log)
        x, y = x.to(tl.float32), y.to(tl.float32)
        own += tl.sum(x * y, 1)
        since, until, over = _decays(i, t, log, high, low)
        tl.store(reads_q + at, (x * since).to(dt), alive)
        if PARTS == 2:
            tl.store(reads_k + at, (y * since).to(dt), alive)
        tl.store(fades + at, (y * until).to(dt), alive)
        tl.store(whole + c0 + c, over)
        h = C // 2
        while h >= 1:
            m = ones(_between(i, t, h), high)
            E = tl.dot(m, high, input_precision=PRECISION)
            to_row, to_key, start, end, h = _pairs(i, h, E, REACH)
            seen = (t >= start) & (t < end)
            key = tl.exp2(E * to_key)
            reader = tl.exp2(E * to_row) if REACH > 0 else key
            keys = tl.trans((y * key).to(dt))
            found = tl.dot((x * reader).to(dt), keys, input_precision=PRECISION)
            own_q += tl.where(seen, found, 0.0)
            if PARTS == 2:
                found = tl.dot((y * reader).to(dt), keys, input_precision=PRECISION)
                own_k += tl.where(seen, found, 0.0)
    own_q += tl.where(i == t, own[:, None], 0.0)
    at = i * (H * C) + t
    tl.store(scores_q + first * C + at, own_q.to(dt), alive)
    if PARTS == 2:
        tl.store(scores_k + first * C + at, own_k.to(dt), alive)


@triton.jit
def one_backward(
    item, q, k, g, d_scores_q, d_scores_k, d_reads_q, d_reads_k, d_fades, d_whole, d_q, d_k, d_g,
    T, H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    PARTS: tl.constexpr, REACH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of channels of one chunk of one head.

    With D and D' the gradients of the scores of q and k at the pairs of h,

        a = D (k F),  b = D^T (q F) + (D' + D'^T) (k F),  dq += F a,  dk += F b,
        dE = F (q a + k b),  dg += M^T dE
    """
    dt = q.dtype.element_ty
    N = (T + C - 1) // C
    block, chunk = item % (K // BK), item // (K // BK)
    n, bh = chunk % N, chunk // N
    first = ((bh // H).to(tl.int64) * T + n * C) * H + bh % H
    i, t = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    c = block * BK + tl.arange(0, BK)
    alive = n * C + i < T
    at = i * (H * K) + c[None, :]
    q, k, g, d_fades = q + first * K, k + first * K, g + first * K, d_fades + first * K
    d_reads_q, d_reads_k = d_reads_q + first * K, d_reads_k + first * K
    d_q, d_k, d_g = d_q + first * K, d_k + first * K, d_g + first * K
    d_scores_q, d_scores_k = d_scores_q + first * C, d_scores_k + first * C
    x = tl.load(q + at, alive, other=0.0).to(tl.float32)
    y = tl.load(k + at, alive, other=0.0).to(tl.float32)
    log = tl.maximum(tl.load(g + at, alive, other=0.0), FLOOR) * LOG2
    if dt == tl.float32:
        high, low = log, log
    else:
        high, low = pieces(log)
    rows = i * (H * C) + t
    D = tl.load(d_scores_q + rows, alive, other=0.0)
    own = tl.sum(tl.where(i == t, D, 0.0).to(tl.float32), 1)[:, None]

    since, until, over = _decays(i, t, log, high, low)
    d = tl.load(d_reads_q + at, alive, other=0.0).to(tl.float32) * since
    dx = d + own * y
    d_since = d * x
    dy = own * x
    if PARTS == 2:
        d = tl.load(d_reads_k + at, alive, other=0.0).to(tl.float32) * since
        dy += d
        d_since += d * y
    d = tl.load(d_fades + at, alive, other=0.0).to(tl.float32) * until
    dy += d
    row = ((bh // H).to(tl.int64) * N + n) * H + bh % H
    dg = tl.zeros([C, BK], tl.float32) + (tl.load(d_whole + row * K + c) * over)[None, :]
    dg = tl.dot((t >= i).to(dt), d_since.to(dt), dg, input_precision=PRECISION)
    dg = tl.dot((t < i).to(dt), (d * y).to(dt), dg, input_precision=PRECISION)
    h = C // 2
    while h >= 1:
        m = ones(_between(i, t, h), high)
        E = tl.dot(m, high, input_precision=PRECISION)
        around = _around(i, t, h).to(dt)
        to_row, to_key, start, end, h = _pairs(i, h, E, REACH)
        seen = (t >= start) & (t < end)
        to_y = tl.exp2(E * to_key)
        to_x = tl.exp2(E * to_row) if REACH > 0 else to_y
        reader, key = (x * to_x).to(dt), (y * to_y).to(dt)
        # Loaded for each h, from the cache: in registers all the time, they would not fit.
        D = tl.load(d_scores_q + rows, alive, other=0.0)
        D = tl.where(seen, D, 0.0)
        a = tl.dot(D, key, input_precision=PRECISION)
        b = tl.dot(tl.trans(D), reader, input_precision=PRECISION)
        dx += a * to_x
        dE = to_row * (reader.to(tl.float32) * a)
        if PARTS == 2:
            D = tl.load(d_scores_k + rows, alive, other=0.0)
            D = tl.where(seen, D, 0.0)
            reader = (y * to_x).to(dt)
            a = tl.dot(D, key, input_precision=PRECISION)
            b = tl.dot(tl.trans(D), reader, b, input_precision=PRECISION)
            dy += a * to_x
            dE += to_row * (reader.to(tl.float32) * a)
        dy += b * to_y
        dE += to_key * (key.to(tl.float32) * b)
        top = dE.to(dt)
        dg = tl.dot(around, top, dg, input_precision=PRECISION)
        if REACH > 0:  # rows and keys cancel: in twice the digits
            dg = tl.dot(around, (dE - top.to(tl.float32)).to(dt), dg)
    tl.store(d_q + at, dx.to(dt), alive)
    tl.store(d_k + at, dy.to(dt), alive)
    given = tl.load(g + at, alive, other=0.0)  # again: not to keep it through the loop
    tl.store(d_g + at, tl.where(given >= FLOOR, dg, 0.0), alive)


@triton.jit(do_not_specialize=["T", "items"])
def strong_forward(
    q, k, g, scores_q, scores_k, reads_q, reads_k, fades, whole, flags, items, T,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
    REACH: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """GROUP chunks, those that are flagged. flags [items], or None: all."""
    if flags is None:
        one_forward(
            tl.program_id(0), q, k, g, scores_q, scores_k, reads_q, reads_k, fades, whole, T,
            H, K, C, BK, PARTS, REACH, PRECISION,
        )  # fmt: skip
    else:
        group = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
        some = tl.max(tl.load(flags + group, group < items, other=0), 0)
        if some > 0:
            for j in range(GROUP):
                item = tl.program_id(0) * GROUP + j
                flag = tl.load(flags + item, item < items, other=0)
                if flag > 0:
                    one_forward(
                        item, q, k, g, scores_q, scores_k, reads_q, reads_k, fades, whole, T,
                        H, K, C, BK, PARTS, REACH, PRECISION,
                    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "items"])
def strong_backward(
    q, k, g, d_scores_q, d_scores_k, d_reads_q, d_reads_k, d_fades, d_whole, d_q, d_k, d_g,
    flags, items, T,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
    REACH: tl.constexpr, GROUP: tl.constexpr, PER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """GROUP blocks of BK channels. flags [items / PER]: PER blocks have one."""
    if flags is None:
        one_backward(
            tl.program_id(0), q, k, g, d_scores_q, d_scores_k, d_reads_q, d_reads_k, d_fades,
            d_whole, d_q, d_k, d_g, T, H, K, C, BK, PARTS, REACH, PRECISION,
        )  # fmt: skip
    else:
        group = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
        some = tl.max(tl.load(flags + group // PER, group < items, other=0), 0)
        if some > 0:
            for j in range(GROUP):
                item = tl.program_id(0) * GROUP + j
                flag = tl.load(flags + item // PER, item < items, other=0)
                if flag > 0:
                    one_backward(
                        item, q, k, g, d_scores_q, d_scores_k, d_reads_q, d_reads_k, d_fades,
                        d_whole, d_q, d_k, d_g, T, H, K, C, BK, PARTS, REACH, PRECISION,
                    )  # fmt: skip
