"""What the delta rule's kernels share: tiles of tokens, and the inverse of a small triangle."""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import LOG2E

FLOOR = tl.constexpr(-40.0)
"""Log decays are clamped here, as in `memories/common/decays.py`."""


@triton.jit
def load_rows(x, row, first, T, d, H: tl.constexpr, D: tl.constexpr, C: tl.constexpr):
    """`[C, len(d)]`: channels d of the tokens from `first` on, zero past T. row: of the first
    token in x `[B T H, D]`, in int64."""
    i = tl.arange(0, C)
    at = x + row * D + (i * (H * D))[:, None] + d[None, :]
    return tl.load(at, mask=(first + i < T)[:, None], other=0.0)


@triton.jit
def store_rows(x, row, first, T, d, tile, H: tl.constexpr, D: tl.constexpr, C: tl.constexpr):
    i = tl.arange(0, C)
    at = x + row * D + (i * (H * D))[:, None] + d[None, :]
    tl.store(at, tile.to(x.dtype.element_ty), mask=(first + i < T)[:, None])


@triton.jit
def load_gate(x, row, first, T, H: tl.constexpr, C: tl.constexpr):
    i = tl.arange(0, C)
    return tl.load(x + row + i * H, mask=first + i < T, other=0.0)


@triton.jit
def store_gate(x, row, first, T, gate, H: tl.constexpr, C: tl.constexpr):
    i = tl.arange(0, C)
    tl.store(x + row + i * H, gate, mask=first + i < T)


@triton.jit
def sums(g):
    """Inclusive cumulative sums of log decays in base 2, as a coarse and a fine part.

    The coarse parts are multiples of 2^-12 below 2^12, so that their sums and differences are
    exact, and a strong decay does not use up the digits of mild ones after it.
    """
    g = tl.maximum(g, FLOOR) * LOG2E
    coarse = tl.floor(g * 4096.0 + 0.5) * (1.0 / 4096.0)
    return tl.cumsum(coarse, 0), tl.cumsum(g - coarse, 0)


@triton.jit
def last(x, C: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, C) == C - 1, x, 0.0), 0)


@triton.jit
def ratios(coarse, fine):
    """`[C, C]`: the decay after token j through token i, where i >= j; else 1."""
    between = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
    return tl.exp2(tl.minimum(between, 0.0))


@triton.jit
def unit_lower_inverse(A, C: tl.constexpr, PRECISION: tl.constexpr, TYPE: tl.constexpr):
    """(I + A)^-1 of a strictly lower `[C, C]` in float32. TYPE: of the products' operands.

    X has the inverses of the diagonal blocks of n. With L the blocks of A that join two of them,
    X - X L X has those of 2 n: all entries are ones of inverses, which do not grow as powers of A
    may. All blocks at once, as products of whole squares: their zeros cost less than a
    substitution's steps, one row after the other.
    """
    i = tl.arange(0, C)
    apart = i[:, None] ^ i[None, :]
    X = tl.where(apart == 0, 1.0, 0.0) - tl.where(apart == 1, A, 0.0)
    for level in tl.static_range(1, 4 if C == 16 else (5 if C == 32 else 6)):
        joins = tl.where((apart >> level) == 1, A, 0.0).to(TYPE)
        known = X.to(TYPE)
        right = tl.dot(joins, known, input_precision=PRECISION)
        X = tl.dot(known, (-right).to(TYPE), X, input_precision=PRECISION)
    return X
