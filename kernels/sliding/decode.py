"""Few queries against a cache: all its keys are read once, and reading them is all the time it
takes. One program serves the T queries of the R query heads of a key head; where there are too
few such programs the keys are split among several, whose results `combine` adds:

    m = max_p m_p,   l = sum_p w_p,   o = sum_p w_p o_p / l,   w_p = l_p 2^(m_p - m)
"""

from __future__ import annotations

import triton
import triton.language as tl

from .forward import LOWEST, update
from .regions import load


@triton.jit(do_not_specialize=["T", "n", "window", "sinks", "splits"])
def decode(
    q, k, v, o, stats,
    qb, qt, qh, kb, kt, kh, vb, vt, vh,
    T, n, window, sinks, splits, scale, H, R, B,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Row t R + i of a tile of BM is query t of the i-th query head. o [splits, B, T, H, V],
    stats = (m, l) [2, splits, B, H, T]. Grid: (H / R, splits, B).

    Keys go from row `lo` to n, behind the sinks if these stand apart from them."""
    g, split, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = tl.arange(0, BM)
    t, h = row // R, g * R + row % R
    rows = n - T + t
    is_query = t < T
    d = tl.arange(0, BK)
    p = q + b * qb + t[:, None] * qt + h[:, None] * qh + d[None, :]
    x = tl.load(p, mask=is_query[:, None] & (d < K)[None, :], other=0.0)
    lo = tl.maximum(n - T - window + 1, 0)
    apart = tl.where(sinks < lo, sinks, 0)
    lo = tl.where(sinks < lo, lo, 0)
    first = (apart + BN - 1) // BN
    blocks = first + (n - lo + BN - 1) // BN
    share = (blocks + splits - 1) // splits
    begin = split * share
    m = tl.full([BM], LOWEST, tl.float32)
    mass = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BV], tl.float32)
    for j in range(begin, tl.minimum(begin + share, blocks)):
        r0 = tl.where(j < first, j * BN, lo + (j - first) * BN)
        stop = tl.where(j < first, apart, n)
        y = load(k + b * kb + g * kh, r0, stop, kt, BN, K, BK)
        z = load(v + b * vb + g * vh, r0, stop, vt, BN, V, BV)
        c = r0 + tl.arange(0, BN)
        recent = (c[None, :] > (rows - window)[:, None]) | (c < sinks)[None, :]
        keep = recent & (c[None, :] < tl.minimum(rows + 1, stop)[:, None])
        s = tl.dot(x, tl.trans(y), input_precision=precision)
        s = tl.where(keep, s, float("-inf"))
        acc, m, mass = update(s, z, acc, m, mass, scale, precision)
    size = tl.cast(splits, tl.int64) * B * H * T
    p = stats + (split * B + b) * H * T + h * T + t
    tl.store(p, m, mask=is_query)
    tl.store(p + size, mass, mask=is_query)
    mass = tl.where(mass > 0, mass, 1.0)  # a split may see nothing
    line = (split * B + b) * T
    d = tl.arange(0, BV)
    p = o + ((line + t) * H + h)[:, None] * V + d[None, :]
    keep = is_query[:, None] & (d < V)[None, :]
    tl.store(p, (acc / mass[:, None]).to(o.dtype.element_ty), mask=keep)


@triton.jit(do_not_specialize=["T", "splits"])
def combine(
    part, part_stats, o, stats, T, splits, H, B,
    V: tl.constexpr, BV: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """One query of a head: part [splits, B, T, H, V] -> o [B, T, H, V]. Grid: (H, T, B)."""
    h, t, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    s = tl.arange(0, S)
    d = tl.arange(0, BV)
    at = (b * H + h) * T + t
    p = part_stats + s * (B * H * T) + at
    each = tl.load(p, mask=s < splits, other=LOWEST)
    weight = tl.load(p + tl.cast(splits, tl.int64) * B * H * T, mask=s < splits, other=0.0)
    m = tl.max(each, 0)
    w = weight * tl.exp2(each - m)
    mass = tl.sum(w, 0)
    line = (b * T + t) * H + h
    p = part + (s[:, None] * (B * T * H) + line) * V + d[None, :]
    x = tl.load(p, mask=(s < splits)[:, None] & (d < V)[None, :], other=0.0)
    y = tl.sum(x * w[:, None], 0) / mass
    tl.store(o + line * V + d, y.to(o.dtype.element_ty), mask=d < V)
    tl.store(stats + at, m)
    tl.store(stats + B * H * T + at, mass)
