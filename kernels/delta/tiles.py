"""What the delta rule's kernels share: tiles of tokens, and the inverse of a small triangle."""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import LOG2E

FLOOR = tl.constexpr(-40.0)
"""Log decays are clamped here, as in `memories/decays.py`."""


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
def quarter(x, row: tl.constexpr, column: tl.constexpr, C: tl.constexpr):
    """One of the four quarters `[C / 2, C / 2]` of a square."""
    h: tl.constexpr = C // 2
    left, right = tl.split(tl.permute(tl.reshape(x, (C, 2, h)), (0, 2, 1)))
    half = right if column else left
    up, down = tl.split(tl.permute(tl.reshape(half, (2, h, h)), (1, 2, 0)))
    return down if row else up


@triton.jit
def lower(up, left, down, C: tl.constexpr):
    """`[[up, 0], [left, down]]`, C x C, of its quarters."""
    h: tl.constexpr = C // 2
    first = tl.permute(tl.join(up, left), (2, 0, 1))
    second = tl.permute(tl.join(tl.zeros_like(up), down), (2, 0, 1))
    both = tl.join(tl.reshape(first, (C, h)), tl.reshape(second, (C, h)))
    return tl.reshape(tl.permute(both, (0, 2, 1)), (C, C))


@triton.jit
def corner(A, up, down, C: tl.constexpr, PRECISION: tl.constexpr):
    """The inverse of `[[., 0], [A's, .]]` from those of its two halves."""
    left = tl.dot(down, quarter(A, 1, 0, C), input_precision=PRECISION)
    left = tl.dot(left, up, input_precision=PRECISION)
    return lower(up, -left, down, C)


@triton.jit
def unit_lower_inverse(A, C: tl.constexpr, PRECISION: tl.constexpr):
    """(I + A)^-1 of a strictly lower `[C, C]`, C = 16, 32 or 64, all in float32.

    The blocks of 16 on the diagonal by forward substitution, all at once; then pairs of inverses
    are joined: the lower left block is -D^-1 L A^-1.
    """
    N: tl.constexpr = C // 16
    own = tl.arange(0, C)[:, None, None] // 16 == tl.arange(0, N)[None, :, None]
    blocks = tl.sum(tl.where(own, tl.reshape(A, (C, N, 16)), 0.0), 1)
    blocks = tl.reshape(blocks, (N, 16, 16))
    i = tl.arange(0, 16)[None, :, None]
    j = tl.arange(0, 16)[None, None, :]
    X = tl.where(i == j, 1.0, 0.0) + tl.zeros_like(blocks)
    for n in range(1, 16):
        row = tl.sum(tl.where(i == n, blocks, 0.0), 1)
        known = tl.sum(row[:, :, None] * X, 1)
        X = tl.where(i == n, X - known[:, None, :], X)
    if N == 1:
        out = tl.reshape(X, (16, 16))
    elif N == 2:
        up, down = tl.split(tl.permute(X, (1, 2, 0)))
        out = corner(A, up, down, 32, PRECISION)
    else:
        evens, odds = tl.split(tl.permute(tl.reshape(X, (2, 2, 16, 16)), (2, 3, 0, 1)))
        X0, X2 = tl.split(evens)
        X1, X3 = tl.split(odds)
        up = corner(quarter(A, 0, 0, 64), X0, X1, 32, PRECISION)
        down = corner(quarter(A, 1, 1, 64), X2, X3, 32, PRECISION)
        out = corner(A, up, down, 64, PRECISION)
    return out
