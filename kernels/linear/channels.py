"""The recurrence with a decay per key channel, over what `vector` has prepared of the chunks.

With its scores A [C, C], reads = q e^G, fades = k e^(G_end - G) and whole = e^G_end [K], a
chunk is

    o = scale (reads S + A v),   S' = diag(whole) S + fades^T v.

Backward, with dS' of the state that the chunk leaves, and do times scale,

    d_reads = do S^T,   dA = do v^T,   dv = A^T do + fades dS',   d_fades = v dS'^T,
    d_whole = sum_v S dS',   dS = diag(whole) dS' + reads^T do.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .scan import place


@triton.jit(do_not_specialize=["T", "M", "slots"])
def scan(
    X, Y, Z, out, A, whole, states, last, kept, d_whole, scale, T, M, slots, H,
    R: tl.constexpr, C: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
    REVERSE: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As in `scan.scan`: a program keeps the tile [R, BC] of a state [R, C] over M chunks, and
    (x, y, z, out) are (reads, fades, v, o) and, in reverse, (fades, reads, do, dv).

    TRANSPOSED, the state is S^T, the channels with the decays are its columns, and A is not read:
    (do, v, fades, d_reads) forward, where A, or rather dA, is written, as are the states before
    the chunks, to kept [B, H, chunks, R, C]; (v, do, reads, d_fades) in reverse, where those are
    read, and d_whole is written. A: [B, T, H, BT]. whole, d_whole: [B, chunks, H, K].
    """
    blocks: tl.constexpr = C // BC
    dtype: tl.constexpr = X.dtype.element_ty
    K: tl.constexpr = C if TRANSPOSED else R
    block, bh = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    n = tl.program_id(1)
    chunks = (T + BT - 1) // BT
    b, h = (bh // H).to(tl.int64), bh % H
    first = b * T * H + h
    X += first * R
    Y += first * R
    Z += first * C
    out += first * C
    if A is not None:
        A += first * BT
    whole += (b * chunks * H + h) * K
    rows, cols = tl.arange(0, R), block * BC + tl.arange(0, BC)
    i = tl.arange(0, BT)
    state = place(rows, cols, R, C, TRANSPOSED)
    S = tl.load(states + (bh.to(tl.int64) * slots + n) * R * C + state)
    if TRANSPOSED:
        kept += bh.to(tl.int64) * chunks * R * C
    in_x = i[:, None] * (H * R) + rows[None, :]
    in_z = i[:, None] * (H * C) + cols[None, :]
    for m in range(M):
        c = n * M + (M - 1 - m if REVERSE else m)
        t = c * BT + i
        seen = t < T
        skip = (c * BT).to(tl.int64) * H
        x = tl.load(X + skip * R + in_x, mask=seen[:, None], other=0.0)
        y = tl.load(Y + skip * R + in_x, mask=seen[:, None], other=0.0)
        z = tl.load(Z + skip * C + in_z, mask=seen[:, None], other=0.0)
        o = tl.dot(x, S.to(dtype), input_precision=PRECISION)
        if REVERSE:
            z = (z * scale).to(dtype)
        if not TRANSPOSED:
            if REVERSE:
                at, there = i[None, :] * (H * BT) + i[:, None], seen[None, :]
            else:
                at, there = i[:, None] * (H * BT) + i[None, :], seen[:, None]
            scores = tl.load(A + skip * BT + at, mask=there, other=0.0)
            o = tl.dot(scores, z, o, input_precision=PRECISION)
        elif not REVERSE:
            if block == 0:
                at = i[:, None] * (H * BT) + i[None, :]
                d_scores = scale * tl.dot(x, tl.trans(y), input_precision=PRECISION)
                tl.store(A + skip * BT + at, d_scores.to(dtype), mask=seen[:, None])
        if not REVERSE:
            o *= scale
        tl.store(out + skip * C + in_z, o.to(out.dtype.element_ty), mask=seen[:, None])
        in_whole = c.to(tl.int64) * H * K + (cols if TRANSPOSED else rows)
        decay = tl.load(whole + in_whole, mask=(rows >= 0) & (c < chunks) if not TRANSPOSED
                        else (cols >= 0) & (c < chunks), other=1.0)  # fmt: skip
        if TRANSPOSED:
            tile = kept + c.to(tl.int64) * R * C + place(rows, cols, R, C, False)
            there = (rows[:, None] >= 0) & (c < chunks)
            if REVERSE:
                old = tl.load(tile, mask=there, other=0.0)
                at = d_whole + b * chunks * H * K + h * K + in_whole
                tl.store(at, tl.sum(old * S, 0), mask=(cols >= 0) & (c < chunks))
            else:
                tl.store(tile, S.to(kept.dtype.element_ty), mask=there)
            S *= decay[None, :]
        else:
            S *= decay[:, None]
        S = tl.dot(tl.trans(y), z, S, input_precision=PRECISION)
    if last is not None:
        if n == (0 if REVERSE else tl.num_programs(1) - 1):
            tl.store(last + bh.to(tl.int64) * R * C + state, S)


@triton.jit(do_not_specialize=["T", "M", "slots"])
def gather(
    Y, Z, whole, states, wholes, scale, T, M, slots, H,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `scan.gather`: what segments add to the state [K, V], and their decays, into wholes
    [B, H, slots, K]. (Y, Z) are (fades, v) and, in reverse, (reads, do)."""
    blocks: tl.constexpr = V // BV
    block, bh = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    n = tl.program_id(1) + (1 if REVERSE else 0)
    chunks = (T + BT - 1) // BT
    b, h = (bh // H).to(tl.int64), bh % H
    Y += (b * T * H + h) * K
    Z += (b * T * H + h) * V
    whole += (b * chunks * H + h) * K
    rows, cols = tl.arange(0, K), block * BV + tl.arange(0, BV)
    i = tl.arange(0, BT)
    S = tl.zeros((K, BV), tl.float32)
    total = tl.full((K,), 1.0, tl.float32)
    in_y = i[:, None] * (H * K) + rows[None, :]
    in_z = i[:, None] * (H * V) + cols[None, :]
    for m in range(M):
        c = n * M + (M - 1 - m if REVERSE else m)
        seen = c * BT + i < T
        skip = (c * BT).to(tl.int64) * H
        y = tl.load(Y + skip * K + in_y, mask=seen[:, None], other=0.0)
        z = tl.load(Z + skip * V + in_z, mask=seen[:, None], other=0.0)
        if REVERSE:
            z = (z * scale).to(y.dtype)
        in_whole = c.to(tl.int64) * H * K + rows
        decay = tl.load(whole + in_whole, mask=(rows >= 0) & (c < chunks), other=1.0)
        total *= decay
        S = tl.dot(tl.trans(y), z, S * decay[:, None], input_precision=PRECISION)
    slot = bh.to(tl.int64) * slots + n
    tl.store(states + slot * K * V + place(rows, cols, K, V, False), S)
    if block == 0:
        tl.store(wholes + slot * K + rows, total)
