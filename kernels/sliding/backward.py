"""Backward. With p = 2^(c <q, k> - m) / l, delta = <o, do> and ds = p (<do, v> - delta):

    dq_i = scale sum_j ds_ij k_j,   dk_j = scale sum_i ds_ij q_i,   dv_j = sum_i p_ij do_i

`backward_q` is a program per block of queries, which divides by l at the end, and writes what the
others read of a query: lines = (m + log2 l, or m for float32, where they divide by l; delta).
`backward_kv` is one per
block of keys behind the sinks: it walks the queries that see them, of all R query heads, in the
transposed orientation, so that no product takes a transposed result. Sinks are seen by all later
queries: `backward_sinks` splits these into parts, whose float32 sums the caller adds.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .regions import inside, key_regions, load, load_all, masked_block, tile, visible_keys


@triton.jit
def add_q(p, dy, y, z, dq, delta, precision: tl.constexpr):
    """dq + ds k, of p [BM, BN]"""
    dp = tl.dot(dy, tl.trans(z), input_precision=precision)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(y.dtype), y, dq, input_precision=precision)


@triton.jit(do_not_specialize=["T", "n", "window", "sinks"])
def backward_q(
    q, k, v, o, do, stats, lines, dq,
    qb, qt, qh, kb, kt, kh, vb, vt, vh, gb, gt, gh,
    T, n, window, sinks, c, scale, H, R, B,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """One program: dq [B, T, H, K] and lines [2, B, H, T] of BM queries of a head."""
    h, block, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    t0 = block * BM
    q0 = n - T + t0
    rows = q0 + tl.arange(0, BM)
    t = t0 + tl.arange(0, BM)
    k += b * kb + (h // R) * kh
    v += b * vb + (h // R) * vh
    x = load(q + b * qb + h * qh, t0, T, qt, BM, K, BK)
    dy = load(do + b * gb + h * gh, t0, T, gt, BM, V, BV)
    out = load(o + (b * T * H + h) * V, t0, T, H * V, BM, V, BV)
    small = tl.sum(out.to(tl.float32) * dy.to(tl.float32), 1)
    line = (b * H + h) * T + t
    m = tl.load(stats + line, mask=t < T, other=0.0)
    mass = tl.load(stats + B * H * T + line, mask=t < T, other=1.0)
    tl.store(lines + line, m if precision == "ieee" else m + tl.log2(mass), mask=t < T)
    tl.store(lines + B * H * T + line, small, mask=t < T)
    acc = tl.zeros([BM, BK], tl.float32)
    s_end, lo, a, d0, end, inner, first, left, masked = key_regions(q0, n, window, sinks, BM, BN)
    for j in range(masked):
        r0, stop = masked_block(j, s_end, lo, a, d0, end, first, left, BN)
        y = load(k, r0, stop, kt, BN, K, BK)
        z = load(v, r0, stop, vt, BN, V, BV)
        s = tl.dot(x, tl.trans(y), input_precision=precision) * c - m[:, None]
        s = tl.where(visible_keys(rows, r0, stop, j < first, window, BN), s, float("-inf"))
        acc = add_q(tl.exp2(s), dy, y, z, acc, small, precision)
    for j in range(inner):
        r0 = a + j * BN
        y = load_all(k, r0, kt, BN, K, BK)
        z = load_all(v, r0, vt, BN, V, BV)
        s = tl.dot(x, tl.trans(y), input_precision=precision) * c - m[:, None]
        acc = add_q(tl.exp2(s), dy, y, z, acc, small, precision)
    p = tile(dq + (b * T * H + h) * K, t0, H * K, BM, BK)
    tl.store(
        p, (acc * (scale / mass)[:, None]).to(dq.dtype.element_ty), mask=inside(t0, T, BM, K, BK)
    )


@triton.jit
def read(stats, lines, at, keep, size, precision: tl.constexpr):
    """Of some queries: what to subtract from logits, delta, and what to multiply p with."""
    shift = tl.load(lines + at, mask=keep, other=0.0)
    delta = tl.load(lines + size + at, mask=keep, other=0.0)
    if precision == "ieee":
        over = 1.0 / tl.load(stats + size + at, mask=keep, other=1.0)
    else:
        over = delta
    return shift, delta, over


@triton.jit
def add_kv(p, x, dy, z, dk, dv, delta, over, precision: tl.constexpr):
    """dk + ds^T q and dv + p^T do, of p^T [BN, BM]"""
    if precision == "ieee":
        p = p * over[None, :]
    dv = tl.dot(p.to(dy.dtype), dy, dv, input_precision=precision)
    dp = tl.dot(z, tl.trans(dy), input_precision=precision)
    ds = p * (dp - delta[None, :])
    dk = tl.dot(ds.to(x.dtype), x, dk, input_precision=precision)
    return dk, dv


@triton.jit(do_not_specialize=["T", "n", "window", "sinks"])
def backward_kv(
    q, k, v, do, stats, lines, dk, dv,
    qb, qt, qh, kb, kt, kh, vb, vt, vh, gb, gt, gh,
    T, n, window, sinks, c, scale, H, R, B,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """One program: dk, dv [B, n, H / R, K | V] of BN keys from row sinks + BN block on.

    The queries that see a key at r0 .. r0 + BN: those on the diagonal, masked, those that see
    all BN, unmasked, and those that the window's left edge cuts, masked."""
    g, block, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    G = H // R
    r0 = sinks + block * BN
    before = n - T
    y = load(k + b * kb + g * kh, r0, n, kt, BN, K, BK)
    z = load(v + b * vb + g * vh, r0, n, vt, BN, V, BV)
    dy_k = tl.zeros([BN, BK], tl.float32)
    dy_v = tl.zeros([BN, BV], tl.float32)
    d0 = tl.maximum(r0, before)
    a = tl.maximum(r0 + BN, before)
    inner = tl.maximum(tl.minimum(r0 + window, n) - a, 0) // BM
    left = a + inner * BM
    d_end = tl.minimum(a, n)
    end = tl.minimum(r0 + BN + window - 1, n)
    diagonal = (tl.maximum(d_end - d0, 0) + BM - 1) // BM
    masked = diagonal + (tl.maximum(end - left, 0) + BM - 1) // BM
    for i in range(R):
        h = g * R + i
        qi = q + b * qb + h * qh
        gi = do + b * gb + h * gh
        line = (b * H + h) * T - before
        for j in range(masked):
            i0 = tl.where(j < diagonal, d0 + j * BM, left + (j - diagonal) * BM)
            stop = tl.where(j < diagonal, d_end, end)
            x = load(qi, i0 - before, stop - before, qt, BM, K, BK)
            dy = load(gi, i0 - before, stop - before, gt, BM, V, BV)
            at = i0 + tl.arange(0, BM)
            total, small, over = read(stats, lines, line + at, at < stop, B * H * T, precision)
            s = tl.dot(y, tl.trans(x), input_precision=precision) * c - total[None, :]
            key = (r0 - i0 + tl.arange(0, BN))[:, None]
            query = tl.arange(0, BM)[None, :]  # from `stop` on all operands of products are 0
            keep = (key <= query) & (key + window > query)
            p = tl.exp2(tl.where(keep, s, float("-inf")))
            dy_k, dy_v = add_kv(p, x, dy, z, dy_k, dy_v, small, over, precision)
        for j in range(inner):
            i0 = a + j * BM
            x = load_all(qi, i0 - before, qt, BM, K, BK)
            dy = load_all(gi, i0 - before, gt, BM, V, BV)
            at = i0 + tl.arange(0, BM)
            total, small, over = read(stats, lines, line + at, at < n, B * H * T, precision)
            s = tl.dot(y, tl.trans(x), input_precision=precision) * c - total[None, :]
            dy_k, dy_v = add_kv(tl.exp2(s), x, dy, z, dy_k, dy_v, small, over, precision)
    p = tile(dk + (b * n * G + g) * K, r0, G * K, BN, BK)
    tl.store(p, (dy_k * scale).to(dk.dtype.element_ty), mask=inside(r0, n, BN, K, BK))
    p = tile(dv + (b * n * G + g) * V, r0, G * V, BN, BV)
    tl.store(p, dy_v.to(dv.dtype.element_ty), mask=inside(r0, n, BN, V, BV))


@triton.jit(do_not_specialize=["T", "n", "sinks", "part"])
def backward_sinks(
    q, k, v, do, stats, lines, dk, dv,
    qb, qt, qh, kb, kt, kh, vb, vt, vh, gb, gt, gh,
    T, n, sinks, part, c, scale, H, R, B,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """One program: what `part` queries add to dk, dv [parts, B, sinks, H / R, K | V] of BN
    sinks. Grid: (heads x blocks of sinks, parts, B)."""
    G = H // R
    g, block = tl.program_id(0) % G, tl.program_id(0) // G
    piece, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    r0 = block * BN
    before = n - T
    rows = r0 + tl.arange(0, BN)
    y = load(k + b * kb + g * kh, r0, sinks, kt, BN, K, BK)
    z = load(v + b * vb + g * vh, r0, sinks, vt, BN, V, BV)
    dy_k = tl.zeros([BN, BK], tl.float32)
    dy_v = tl.zeros([BN, BV], tl.float32)
    t_end = tl.minimum((piece + 1) * part, T)
    t_first = tl.maximum(piece * part, r0 - before)
    blocks = (tl.maximum(t_end - t_first, 0) + BM - 1) // BM
    for i in range(R):
        h = g * R + i
        for j in range(blocks):
            t0 = t_first + j * BM
            x = load(q + b * qb + h * qh, t0, t_end, qt, BM, K, BK)
            dy = load(do + b * gb + h * gh, t0, t_end, gt, BM, V, BV)
            t = t0 + tl.arange(0, BM)
            line = (b * H + h) * T + t
            total, small, over = read(stats, lines, line, t < t_end, B * H * T, precision)
            s = tl.dot(y, tl.trans(x), input_precision=precision) * c - total[None, :]
            keep = rows[:, None] <= (before + t)[None, :]
            p = tl.exp2(tl.where(keep, s, float("-inf")))
            dy_k, dy_v = add_kv(p, x, dy, z, dy_k, dy_v, small, over, precision)
    line = ((piece * B + b) * sinks * G + g).to(tl.int64)
    p = tile(dk + line * K, r0, G * K, BN, BK)
    tl.store(p, dy_k * scale, mask=inside(r0, sinks, BN, K, BK))
    p = tile(dv + line * V, r0, G * V, BN, BV)
    tl.store(p, dy_v, mask=inside(r0, sinks, BN, V, BV))
