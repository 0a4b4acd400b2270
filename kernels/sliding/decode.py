"""Few queries against a cache: all its keys are read once, and reading them is all the time it
takes. One program serves the T queries of the R query heads of a key head; where there are too
few such programs the keys are split among several, whose results `combine` adds:

    o = sum_p w_p o_p,   w_p = 2^(lse_p - lse),   lse = log2 sum_p 2^lse_p
"""

from __future__ import annotations

import triton
import triton.language as tl

from .forward import LOWEST, update
from .regions import load


@triton.jit(do_not_specialize=["T", "n", "window", "sinks", "splits"])
def decode(
    q, k, v, o, lse,
    qb, qt, qh, kb, kt, kh, vb, vt, vh,
    T, n, window, sinks, splits, scale, H, R, B,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """Row t R + i of a tile of BM is query t of the i-th query head. o [splits, B, T, H, V],
    lse [splits, B, H, T]. Grid: (H / R, splits, B).

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
    l = tl.zeros([BM], tl.float32)
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
        acc, m, l = update(s, z, acc, m, l, scale, precision)
    seen = l > 0
    l = tl.where(seen, l, 1.0)
    line = (split * B + b) * T
    d = tl.arange(0, BV)
    p = o + ((line + t) * H + h)[:, None] * V + d[None, :]
    keep = is_query[:, None] & (d < V)[None, :]
    tl.store(p, (acc / l[:, None]).to(o.dtype.element_ty), mask=keep)
    p = lse + (split * B + b) * H * T + h * T + t
    tl.store(p, tl.where(seen, m + tl.log2(l), LOWEST), mask=is_query)


@triton.jit(do_not_specialize=["T", "splits"])
def combine(
    part, part_lse, o, lse, T, splits, H, B,
    V: tl.constexpr, BV: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """One query of a head: part [splits, B, T, H, V] -> o [B, T, H, V]. Grid: (H, T, B)."""
    h, t, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    s = tl.arange(0, S)
    d = tl.arange(0, BV)
    at = (b * H + h) * T + t
    each = tl.load(part_lse + s * (B * H * T) + at, mask=s < splits, other=LOWEST)
    m = tl.max(each, 0)
    w = tl.where(s < splits, tl.exp2(each - m), 0.0)
    l = tl.sum(w, 0)
    line = (b * T + t) * H + h
    p = part + (s[:, None] * (B * T * H) + line) * V + d[None, :]
    x = tl.load(p, mask=(s < splits)[:, None] & (d < V)[None, :], other=0.0)
    y = tl.sum(x * w[:, None], 0) / l
    tl.store(o + line * V + d, y.to(o.dtype.element_ty), mask=d < V)
    tl.store(lse + at, m + tl.log2(l))
