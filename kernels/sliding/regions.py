"""Which keys a block of queries sees, and tiles of rows in memory.

A query and a key are named by their row in k and v: query i of T stands at row n - T + i. Row ri
sees row r <= ri if ri - r < window or r < sinks: a gap between sinks that stand apart and the
window changes no difference that matters.

The keys of queries [q0, q0 + BM) fall into four regions:

    sinks [0, s)  |  left edge [lo, a)  |  inner [a, q0)  |  diagonal [d0, end)

Every query sees every inner key, so that only the others are masked. All four are disjoint, so no
key counts twice. Inner blocks end at q0, and no region needs to begin at a multiple of anything.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def key_regions(q0, n, window, sinks, BM: tl.constexpr, BN: tl.constexpr):
    """(s, lo, a, d0, end, inner blocks, sink blocks, left blocks, masked blocks)"""
    end = tl.minimum(q0 + BM, n)
    s = tl.minimum(sinks, end)
    lo = tl.maximum(q0 - window + 1, s)
    inner = tl.maximum(q0 - tl.maximum(q0 + BM - window, s), 0) // BN
    a = q0 - inner * BN
    d0 = tl.maximum(q0, lo)
    first = (s + BN - 1) // BN
    left = (tl.maximum(a - lo, 0) + BN - 1) // BN
    diagonal = (tl.maximum(end - d0, 0) + BN - 1) // BN
    return s, lo, a, d0, end, inner, first, left, first + left + diagonal


@triton.jit
def masked_block(j, s, lo, a, d0, end, first, left, BN: tl.constexpr):
    """(first row, end of the region) of masked block j: sinks, then left edge, then diagonal."""
    in_left = j < first + left
    r0 = tl.where(in_left, lo + (j - first) * BN, d0 + (j - first - left) * BN)
    stop = tl.where(in_left, a, end)
    return tl.where(j < first, j * BN, r0), tl.where(j < first, s, stop)


@triton.jit
def visible_keys(rows, r0, stop, is_sinks, window, BN: tl.constexpr):
    """[BM, BN]: which keys r0 + c < stop the queries at `rows` see; of sinks, all before them."""
    c = tl.arange(0, BN)  # the same in every block: it need not be kept per column
    above = tl.minimum(rows + 1, stop) - r0
    below = tl.where(is_sinks, -1, rows - window) - r0
    return (c[None, :] < above[:, None]) & (c[None, :] > below[:, None])


@triton.jit
def tile(base, r0, stride, BR: tl.constexpr, BD: tl.constexpr):
    """Addresses of rows r0 .. r0 + BR of BD channels."""
    r = tl.arange(0, BR)
    d = tl.arange(0, BD)
    return base + tl.cast(r0, tl.int64) * stride + (r[:, None] * stride + d[None, :])


@triton.jit
def inside(r0, stop, BR: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """[BR, BD]: rows below stop, channels below D."""
    keep = ((r0 + tl.arange(0, BR)) < stop)[:, None]
    if D < BD:
        keep = keep & (tl.arange(0, BD) < D)[None, :]
    return keep


@triton.jit
def load(base, r0, stop, stride, BR: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Rows r0 .. r0 + BR, zero from `stop` on."""
    p = tile(base, r0, stride, BR, BD)
    return tl.load(p, mask=inside(r0, stop, BR, D, BD), other=0.0)


@triton.jit
def load_all(base, r0, stride, BR: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """Rows r0 .. r0 + BR, all of which exist."""
    p = tile(base, r0, stride, BR, BD)
    if D < BD:
        x = tl.load(p, mask=(tl.arange(0, BD) < D)[None, :], other=0.0)
    else:
        x = tl.load(p)
    return x
