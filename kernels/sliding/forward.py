"""Forward: softmax attention of a block of queries, key block by key block.

With logits s = c <q, k>, c = scale log2 e, each block of keys updates (Milakov and Gimelshein
2018, arXiv 1805.02867; Dao et al. 2022, 2205.14135)

    m' = max(m, max_j s_j),  p_j = 2^(s_j - m'),  l' = l 2^(m - m') + sum_j p_j,
    acc' = acc 2^(m - m') + sum_j p_j v_j

and at the end o = acc / l; `mass` is l. The backward needs m and l: their sum m + log2 l, rounded,
would put an error into all p of a query. Statistics and sums are float32; the operands of products
have the dtype of the input.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .regions import inside, key_regions, load, load_all, masked_block, tile, visible_keys

LOWEST = tl.constexpr(-1e30)
"""The maximum of nothing: finite, so that no difference is NaN."""


@triton.jit
def update(s, v, acc, m, mass, scale, precision: tl.constexpr):
    """acc', m', l' of s: products of queries and keys, -inf where masked."""
    m_new = tl.maximum(m, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - m_new[:, None])
    decay = tl.exp2(m - m_new)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=precision)
    return acc, m_new, mass * decay + tl.sum(p, 1)


@triton.jit(do_not_specialize=["T", "n", "window", "sinks"])
def forward(
    q, k, v, o, stats,
    qb, qt, qh, kb, kt, kh, vb, vt, vh,
    T, n, window, sinks, scale, H, R, B,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """One program: BM queries of a head. q [B, T, H, K], k, v [B, n, H / R, K | V] by strides of
    batch, token and head; o [B, T, H, V], stats = (m, l) [2, B, H, T] contiguous.

    Heads are the fastest axis of the grid: programs that run together read whole rows of memory,
    and the R query heads of a key head share its tiles in the cache."""
    h, block, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    t0 = block * BM
    q0 = n - T + t0
    rows = q0 + tl.arange(0, BM)
    k += b * kb + (h // R) * kh
    v += b * vb + (h // R) * vh
    x = load(q + b * qb + h * qh, t0, T, qt, BM, K, BK)
    m = tl.full([BM], LOWEST, tl.float32)
    mass = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BV], tl.float32)
    s_end, lo, a, d0, end, inner, first, left, masked = key_regions(q0, n, window, sinks, BM, BN)
    for j in range(masked):
        r0, stop = masked_block(j, s_end, lo, a, d0, end, first, left, BN)
        y = load(k, r0, stop, kt, BN, K, BK)
        s = tl.dot(x, tl.trans(y), input_precision=precision)
        s = tl.where(visible_keys(rows, r0, stop, j < first, window, BN), s, float("-inf"))
        z = load(v, r0, stop, vt, BN, V, BV)
        acc, m, mass = update(s, z, acc, m, mass, scale, precision)
    for j in range(inner):
        r0 = a + j * BN
        y = load_all(k, r0, kt, BN, K, BK)
        s = tl.dot(x, tl.trans(y), input_precision=precision)
        z = load_all(v, r0, vt, BN, V, BV)
        acc, m, mass = update(s, z, acc, m, mass, scale, precision)
    mass = tl.where(rows < n, mass, 1.0)
    p = tile(o + (b * T * H + h) * V, t0, H * V, BM, BV)
    tl.store(p, (acc / mass[:, None]).to(o.dtype.element_ty), mask=inside(t0, T, BM, V, BV))
    t = t0 + tl.arange(0, BM)
    line = (b * H + h) * T
    tl.store(stats + line + t, m, mask=t < T)
    tl.store(stats + B * H * T + line + t, mass, mask=t < T)
