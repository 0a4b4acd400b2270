"""A decay per token and key channel inside the chunks of linear attention and the delta rule.

With G_t the sum of the log decays of a chunk through token t, and Z_i its last value, `forward`
prepares for each chunk of C tokens all that is not the state's:

    scores[i, j] = sum_c x_i,c k_j,c e^(G_i,c - G_j,c)      x is q, j <= i; or x is k, j < i
    reads[i] = x_i e^(G_i),    fades[j] = k_j e^(Z - G_j),    whole = e^Z

and `backward` gives the gradients of q, k and g. e^(G_i) e^(-G_j) overflows. Instead, blocks of
two halves of h tokens are compared through the token between them: for i in the right half and j
in the left one, G_i - G_j is the sum from the middle to i plus the sum after j to the middle, both
at most 0. A token is in one half of one block of every size 2h, so it has one exponent E_h a
channel, and F_h = e^(E_h) serves as its row and as its key:

    scores = sum over h = 1, 2, .. C/2 of (x F_h) (k F_h)^T, where block and halves are i's and j's

which are log2 C products of whole tiles under a mask: the pairs of h are those with i > j and
h <= (i xor j) < 2h. The exponents are products, too, E_h = M_h g, of a matrix of ones at the
tokens between a token and its middle; local sums of one sign, which a strong decay elsewhere in
the chunk costs no digits. And so is the gradient of g, the sum of M_h^T dE_h, dE_h = F_h dF_h.

For 16-bit inputs M_h g is a product of float16, rounding g by 2^-12 of itself, which changes
F_h by at most 2^-12 / e, a twentieth of what rounding it to bfloat16 does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .tiles import LOG2E

FLOOR = tl.constexpr(-40.0)
UNIT = tl.constexpr(1024.0)
"""Log decays times this are well inside float16: 40 log2 e UNIT < 65504."""


class Prepared(NamedTuple):
    """scores: of each part `[B, T, H, C]`, zero where unseen. reads: of each part
    `[B, T, H, K]`. fades `[B, T, H, K]`. All in the dtype of q. whole: `[B, N, H, K]` float32."""

    scores: tuple[Tensor, ...]
    reads: tuple[Tensor, ...]
    fades: Tensor
    whole: Tensor


def forward(rows: tuple[Tensor, ...], k: Tensor, g: Tensor, C: int) -> Prepared:
    """Prepare all chunks of C tokens. rows: (q,), or (q, k) with the very k.

    q, k `[B, T, H, K]` of one dtype; g `[B, T, H, K]` float32, natural logarithms <= 0, clamped
    here at FLOOR, -inf included. K: a power of two of at least 16, as is C.
    """
    q, k, g = (x.contiguous() for x in (rows[0], k, g))
    B, T, H, K = q.shape
    N, parts = (T + C - 1) // C, len(rows)
    scores = [launch.empty((B, T, H, C), like=q) for _ in rows]
    reads = [launch.empty((B, T, H, K), like=q) for _ in rows]
    fades = launch.empty((B, T, H, K), like=q)
    whole = launch.empty((B, N, H, K), like=q, dtype=torch.float32)
    s = settings(parts, C, K, q.dtype, launch.target(q.device))
    launch.launch(
        _forward, (B * H * N,), q, k, g, scores[0], scores[-1], reads[0], reads[-1], fades, whole,
        T, H=H, K=K, C=C, BK=s.block, PARTS=parts, num_warps=s.warps, num_stages=s.stages,
    )  # fmt: skip
    return Prepared(tuple(scores), tuple(reads), fades, whole)


def backward(
    rows: tuple[Tensor, ...],
    k: Tensor,
    g: Tensor,
    C: int,
    d_scores: tuple[Tensor, ...],
    d_reads: tuple[Tensor, ...],
    d_fades: Tensor,
    d_whole: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_q, d_k, d_g): d_k of the keys and, where rows are (q, k), of k as a row, added. d_g in
    float32, zero where g is below FLOOR. Gradients of scores count where tokens are seen."""
    q, k, g = (x.contiguous() for x in (rows[0], k, g))
    B, T, H, K = q.shape
    N, parts = (T + C - 1) // C, len(rows)
    d_s, d_r = ([x.contiguous() for x in xs] for xs in (d_scores, d_reads))
    d_q, d_k, d_g = (launch.empty((B, T, H, K), like=x) for x in (q, k, g))
    s = settings_backward(parts, C, K, q.dtype, launch.target(q.device))
    launch.launch(
        _backward, (B * H * N * (K // s.block),), q, k, g, d_s[0], d_s[-1], d_r[0], d_r[-1],
        d_fades.contiguous(), d_whole.contiguous(), d_q, d_k, d_g,
        T, H=H, K=K, C=C, BK=s.block, PARTS=parts, num_warps=s.warps, num_stages=s.stages,
    )  # fmt: skip
    return d_q, d_k, d_g


class Settings(NamedTuple):
    """block: channels at a time."""

    block: int
    warps: int
    stages: int


def settings(parts: int, C: int, K: int, dtype: torch.dtype, target: launch.Target) -> Settings:
    """Of the forward pass, a loop over blocks of channels. Eight warps would each hold as much
    as four, for the compiler splits only the tokens of products that feed others."""
    small = dtype == torch.float32 or not (target.backend == "hip" or int(target.arch) >= 90)
    return Settings(min(K, 32 if small else 64), 4, 1)


def settings_backward(
    parts: int, C: int, K: int, dtype: torch.dtype, target: launch.Target
) -> Settings:
    """Of the backward pass, a program for each block of channels."""
    small = target.backend == "cuda" and int(target.arch) < 90 and dtype != torch.float32
    return Settings(min(K, 16 if small else 32), 4, 1)


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
def _across(i, t, h, right: tl.constexpr, left: tl.constexpr):
    """Where t is in the other half of i's block; for i in right halves, in left ones, or both."""
    other = (i & -h) ^ h
    some = tl.where((i & h) != 0, right * h, left * h)
    return (t >= other) & (t < other + some)


@triton.jit
def _pieces(g):
    """g as a high and a low part of float16, times UNIT."""
    g = g * UNIT
    high = g.to(tl.float16)
    return high, (g - high.to(tl.float32)).to(tl.float16)


@triton.jit
def _ones(where, like):
    """What sums `like` by a product: 1 / UNIT for pieces."""
    if like.dtype == tl.float32:
        return where.to(tl.float32)
    return tl.where(where, 1 / UNIT, 0.0).to(tl.float16)


@triton.jit
def _decays(i, t, g, high, low):
    """(e^G, e^(Z - G), e^Z) from g [C, K] in units of log 2."""
    z = tl.sum(g, 0)
    if high.dtype == tl.float32:
        since = tl.dot(_ones(t <= i, g), g, input_precision="ieee")
        until = tl.dot(_ones(t > i, g), g, input_precision="ieee")
    else:
        m = _ones(t <= i, high)
        since = tl.dot(m, high, tl.dot(m, low))
        until = tl.minimum(z[None, :] - since, 0.0)  # wrong by 2^-12 at most
    return tl.exp2(since), tl.exp2(until), tl.exp2(z)


@triton.jit(do_not_specialize=["T"])
def _forward(
    q, k, g, scores_q, scores_k, reads_q, reads_k, fades, whole, T,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One chunk of one head: scores [C, C] in registers over a loop over blocks of channels."""
    dt = q.dtype.element_ty
    precision: tl.constexpr = "ieee" if dt == tl.float32 else "tf32"
    N = (T + C - 1) // C
    n, bh = tl.program_id(0) % N, tl.program_id(0) // N
    first = ((bh // H).to(tl.int64) * T + n * C) * H + bh % H  # row of [B T H, ..]
    i, t, c = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :], tl.arange(0, BK)
    alive = n * C + i < T
    row = ((bh // H).to(tl.int64) * N + n) * H + bh % H
    q, k, g, fades = q + first * K, k + first * K, g + first * K, fades + first * K
    reads_q, reads_k, whole = reads_q + first * K, reads_k + first * K, whole + row * K
    own_q = tl.zeros([C, C], tl.float32)
    own_k = tl.zeros([C, C], tl.float32)
    for c0 in range(0, K, BK):
        at = i * (H * K) + c0 + c[None, :]
        x = tl.load(q + at, alive, other=0.0)
        y = tl.load(k + at, alive, other=0.0)
        log = tl.maximum(tl.load(g + at, alive, other=0.0), FLOOR) * LOG2E
        if dt == tl.float32:
            high, low = log, log
        else:
            high, low = _pieces(log)
        same = tl.dot(x, tl.trans(y), input_precision=precision)
        own_q += tl.where(i == t, same, 0.0)
        x, y = x.to(tl.float32), y.to(tl.float32)
        since, until, over = _decays(i, t, log, high, low)
        tl.store(reads_q + at, (x * since).to(dt), alive)
        if PARTS == 2:
            tl.store(reads_k + at, (y * since).to(dt), alive)
        tl.store(fades + at, (y * until).to(dt), alive)
        tl.store(whole + c0 + c, over)
        h = C // 2
        while h >= 1:
            m = _ones(_between(i, t, h), high)
            f = tl.exp2(tl.dot(m, high, input_precision=precision))
            seen = _across(i, t, h, 1, 0)
            left = (y * f).to(dt)
            found = tl.dot((x * f).to(dt), tl.trans(left), input_precision=precision)
            own_q += tl.where(seen, found, 0.0)
            if PARTS == 2:
                found = tl.dot(left, tl.trans(left), input_precision=precision)
                own_k += tl.where(seen, found, 0.0)
            h = h // 2
    at = i * (H * C) + t
    tl.store(scores_q + first * C + at, own_q.to(dt), alive)
    if PARTS == 2:
        tl.store(scores_k + first * C + at, own_k.to(dt), alive)


@triton.jit(do_not_specialize=["T"])
def _backward(
    q, k, g, d_scores_q, d_scores_k, d_reads_q, d_reads_k, d_fades, d_whole, d_q, d_k, d_g, T,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One block of channels of one chunk of one head.

    With D and D' the gradients of the scores of q and k at the pairs of h,

        a = D (k F),  b = D^T (q F) + (D' + D'^T) (k F),  dq += F a,  dk += F b,
        dE = F (q a + k b),  dg += M^T dE
    """
    dt = q.dtype.element_ty
    precision: tl.constexpr = "ieee" if dt == tl.float32 else "tf32"
    N = (T + C - 1) // C
    block, chunk = tl.program_id(0) % (K // BK), tl.program_id(0) // (K // BK)
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
    log = tl.maximum(tl.load(g + at, alive, other=0.0), FLOOR) * LOG2E
    if dt == tl.float32:
        high, low = log, log
    else:
        high, low = _pieces(log)
    rows = i * (H * C) + t
    columns = t * (H * C) + i
    turned = n * C + t < T
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
    dg = tl.dot((t >= i).to(dt), d_since.to(dt), dg, input_precision=precision)
    dg = tl.dot((t < i).to(dt), (d * y).to(dt), dg, input_precision=precision)
    h = C // 2
    while h >= 1:
        m = _ones(_between(i, t, h), high)
        f = tl.exp2(tl.dot(m, high, input_precision=precision))
        xf, yf = x * f, y * f
        reader, key = xf.to(dt), yf.to(dt)
        # Loaded for each h, from the cache: in registers all the time, they would not fit.
        D = tl.load(d_scores_q + rows, alive, other=0.0)
        m = tl.where(_across(i, t, h, 1, 0), D, 0.0).to(dt)
        a = tl.dot(m, key, input_precision=precision)
        D = tl.load(d_scores_q + columns, turned, other=0.0)
        m = tl.where(_across(i, t, h, 0, 1), D, 0.0).to(dt)
        b = tl.dot(m, reader, input_precision=precision)
        if PARTS == 2:
            D = tl.load(d_scores_k + columns, turned, other=0.0)
            m = tl.where(_across(i, t, h, 0, 1), D, 0.0).to(dt)
            b = tl.dot(m, key, b, input_precision=precision)
            D = tl.load(d_scores_k + rows, alive, other=0.0)
            m = tl.where(_across(i, t, h, 1, 0), D, 0.0).to(dt)
            b = tl.dot(m, key, b, input_precision=precision)
        dx += a * f
        dy += b * f
        dE = (xf * a + yf * b).to(dt)
        dg = tl.dot(_around(i, t, h).to(dt), dE, dg, input_precision=precision)
        h = h // 2
    tl.store(d_q + at, dx.to(dt), alive)
    tl.store(d_k + at, dy.to(dt), alive)
    given = tl.load(g + at, alive, other=0.0)  # again: not to keep it through the loop
    tl.store(d_g + at, tl.where(given >= FLOOR, dg, 0.0), alive)
