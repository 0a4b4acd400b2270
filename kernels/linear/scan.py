"""The recurrence that the op and its gradients share, in chunks, and its split along T.

A kernel here computes, for rows x, y [T, R], z [T, C] and a state S [R, C],

    o_t = x_t S_t,   S_t = D_t S_{t-1} + y_t^T z_t,

forward in time, or in reverse: o_t = x_t S_t, S_t = D_{t+1} S_{t+1} + y_t^T z_t. The op itself is
(q, k, v); the gradient of q is (do, v, k) forward with S^T; those of v and k are (k, q, do) and,
with S^T, (v, do, q) in reverse. All x, y, z, o are [B, T, H, channels], contiguous.

Within a chunk of BT tokens, with G the cumulative log decay, since = e^G, until = e^(G_end - G)
and ratio[i, j] = e^(G_i - G_j) for i >= j, all at most 1:

    o = since (x S) + (x y^T ratio) z,   S' = e^G_end S + y^T (until z),

and in reverse the same with since and until exchanged and the ratio transposed.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ..tiles import LOG2E

FLOOR = tl.constexpr(-40.0)
"""Of log decays, as in memories/common/decays.py."""


@triton.jit
def sums(g):
    """Cumulative sums of g [C], and their ends, in two parts: of multiples of 2^-12, exact in
    float32, and of the rest. A strong decay does not cost the mild ones around it their digits."""
    coarse = tl.floor(g * 4096.0 + 0.5) * (1 / 4096.0)
    fine = g - coarse
    return tl.cumsum(coarse, 0), tl.cumsum(fine, 0), tl.sum(coarse, 0), tl.sum(fine, 0)


@triton.jit
def factors(g, REVERSE: tl.constexpr, EXACT: tl.constexpr):
    """(before, after, whole, more, ratio) of log decays g [C]: what is read from the state and
    what is written to it are multiplied by; the state, by whole + more; and the scores, without a
    mask. Not EXACT is for 16 bits, where the digits of one float32 sum are enough.

    more is what is below whole's last digit: under a constant decay it is the same in all chunks,
    and many small ones would add it up.
    """
    if EXACT:
        coarse, fine, end, rest = sums(g)
        since = tl.exp(coarse + fine)
        until = tl.exp((end - coarse) + (rest - fine))
        wide = tl.exp(end.to(tl.float64) + rest.to(tl.float64))
        whole = wide.to(tl.float32)
        more = (wide - whole.to(tl.float64)).to(tl.float32)
        log = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
        ratio = tl.exp(tl.minimum(-log if REVERSE else log, 0.0))
    else:
        total, end = tl.cumsum(g * LOG2E, 0), tl.sum(g * LOG2E, 0)
        since, until, whole = tl.exp2(total), tl.exp2(tl.minimum(end - total, 0.0)), tl.exp2(end)
        more = 0.0
        log = total[:, None] - total[None, :]
        ratio = tl.exp2(tl.minimum(-log if REVERSE else log, 0.0))
    return (until if REVERSE else since), (since if REVERSE else until), whole, more, ratio


@triton.jit
def log_decays(G, t, seen, gt):
    """The log decays of tokens t, at least FLOOR; 0 after the end."""
    g = tl.load(G + t * gt, mask=seen, other=0.0).to(tl.float32)
    return tl.maximum(g, FLOOR)


@triton.jit
def place(rows, cols, R: tl.constexpr, C: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Offsets of a tile of a state [R, C], or of one that lies in memory as [C, R]."""
    return cols[None, :] * R + rows[:, None] if TRANSPOSED else rows[:, None] * C + cols[None, :]


@triton.jit(do_not_specialize=["T", "gb", "M", "slots"])
def scan(
    X, Y, Z, out, G, states, last, W, kept, dG, gb, gt, gh, scale, T, M, slots, H,
    R: tl.constexpr, C: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
    REVERSE: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (block of BC columns of one b, h; segment of M chunks): the state tile [R, BC] stays
    in registers. states [B, H, slots, R, C]: those before the segments (after them in reverse).
    last: [B, H, R, C], where the state at the end goes, or None. Forward, o is multiplied by
    `scale`; in reverse y is. G: log decays, of strides gb, gt, gh, or None.

    With dG [C / BC, B, T, H], the gradient of the log decays is computed, in two launches. W is
    [B, T, H, C]: q in the forward one, for the gradient of q; then k, in reverse. kept
    [B, H, chunks, R, C] takes the states before the chunks from one to the other. g_t is in what
    the tokens from t on read, in the ratios of i >= t > j, in what is left of the tokens before t
    at the end of the chunk, and in what is left of the state; all are sums of such terms:

        dg_t = sum_{i>=t} W_i since_i (x_i S) + sum_{i>=t>j} scores_ij (W_i z_j)     (forward)
               + sum_{i<t} W_i until_i (x_i S) + e^G_end <kept, S>                   (reverse).
    """
    blocks: tl.constexpr = C // BC
    dtype: tl.constexpr = X.dtype.element_ty
    block, bh = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    n = tl.program_id(1)
    chunks = (T + BT - 1) // BT
    b, h = (bh // H).to(tl.int64), bh % H
    first = b * T * H + h
    X += first * R
    Y += first * R
    Z += first * C
    out += first * C
    rows, cols = tl.arange(0, R), block * BC + tl.arange(0, BC)
    i = tl.arange(0, BT)
    state = place(rows, cols, R, C, TRANSPOSED)
    S = tl.load(states + (bh.to(tl.int64) * slots + n) * R * C + state)
    if G is not None:
        G += b * gb + h * gh
    if dG is not None:
        W += first * C
        dG += block * (tl.num_programs(0) // (blocks * H)).to(tl.int64) * T * H + first
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
        scores = tl.dot(x, tl.trans(y), input_precision=PRECISION)
        if G is not None:
            g = log_decays(G, t, seen, gt)
            before, after, whole, more, ratio = factors(g, REVERSE, dtype == tl.float32)
            scores *= ratio
        # Masks of t, not i: of i they would be kept in registers from chunk to chunk.
        before_or_at = t[:, None] <= t[None, :]
        visible = before_or_at if REVERSE else t[:, None] >= t[None, :]
        scores = tl.where(visible, scores, 0.0)
        if REVERSE:
            scores *= scale
        if dG is not None:
            w = tl.load(W + skip * C + in_z, mask=seen[:, None], other=0.0)
            if not REVERSE:
                d_ratio = scores * tl.dot(w, tl.trans(z), input_precision=PRECISION)
                later = before_or_at.to(dtype)
                d_log = tl.dot(later, d_ratio.to(dtype), input_precision=PRECISION)
                dg = tl.sum(tl.where(before_or_at, 0.0, d_log), 1)
        p = scores.to(dtype)
        o = tl.dot(x, S.to(dtype), input_precision=PRECISION)
        if G is not None:
            o *= before[:, None]
        if dG is not None:
            own = tl.sum(o * w, 1)
        o = tl.dot(p, z, o, input_precision=PRECISION)
        if not REVERSE:
            o *= scale
        tl.store(out + skip * C + in_z, o.to(out.dtype.element_ty), mask=seen[:, None])
        if dG is not None:
            tile = kept + c.to(tl.int64) * R * C + place(rows, cols, R, C, False)
            tile_seen = (rows[:, None] >= 0) & (c < chunks)
            if REVERSE:
                old = tl.load(tile, mask=tile_seen, other=0.0)
                dg = tl.load(dG + t * H, mask=seen, other=0.0)
                dg += tl.sum(tl.where(before_or_at, 0.0, own[None, :]), 1)
                dg += whole * tl.sum(tl.sum(old * S, 1), 0)
                given = tl.load(G + t * gt, mask=seen, other=0.0)
                dg = tl.where(given >= FLOOR, dg, 0.0)  # a clamped one has none
            else:
                tl.store(tile, S.to(kept.dtype.element_ty), mask=tile_seen)
                dg += tl.cumsum(own, 0, reverse=True)
                dg *= scale
            tl.store(dG + t * H, dg, mask=seen)
        if G is not None:
            S = S * whole + S * more
            z = (z * (after * scale if REVERSE else after)[:, None]).to(dtype)
        elif REVERSE:
            z = (z * scale).to(dtype)
        S = tl.dot(tl.trans(y), z, S, input_precision=PRECISION)
    if last is not None:
        if n == (0 if REVERSE else tl.num_programs(1) - 1):
            tl.store(last + bh.to(tl.int64) * R * C + state, S)


@triton.jit(do_not_specialize=["T", "gb", "M", "slots"])
def gather(
    Y, Z, G, states, wholes, gb, gt, gh, scale, T, M, slots, H,
    R: tl.constexpr, C: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What each segment of M chunks adds to the state, into its slot of states, and its decay,
    into wholes [B, H, slots]. Programs as in `scan`, but for the last segment in the order of the
    recurrence, which no other needs."""
    blocks: tl.constexpr = C // BC
    dtype: tl.constexpr = Y.dtype.element_ty
    block, bh = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    n = tl.program_id(1) + (1 if REVERSE else 0)
    b, h = (bh // H).to(tl.int64), bh % H
    Y += (b * T * H + h) * R
    Z += (b * T * H + h) * C
    rows, cols = tl.arange(0, R), block * BC + tl.arange(0, BC)
    i = tl.arange(0, BT)
    S = tl.zeros((R, BC), tl.float32)
    total = 0.0
    if G is not None:
        G += b * gb + h * gh
    in_y = i[:, None] * (H * R) + rows[None, :]
    in_z = i[:, None] * (H * C) + cols[None, :]
    for m in range(M):
        c = n * M + (M - 1 - m if REVERSE else m)
        t = c * BT + i
        seen = t < T
        skip = (c * BT).to(tl.int64) * H
        y = tl.load(Y + skip * R + in_y, mask=seen[:, None], other=0.0)
        z = tl.load(Z + skip * C + in_z, mask=seen[:, None], other=0.0)
        if G is not None:
            g = log_decays(G, t, seen, gt)
            _, after, whole, more, _ = factors(g, REVERSE, dtype == tl.float32)
            S = S * whole + S * more
            total += tl.sum(g, 0)
            z = (z * (after * scale if REVERSE else after)[:, None]).to(dtype)
        elif REVERSE:
            z = (z * scale).to(dtype)
        S = tl.dot(tl.trans(y), z, S, input_precision=PRECISION)
    slot = bh.to(tl.int64) * slots + n
    tl.store(states + slot * R * C + place(rows, cols, R, C, False), S)
    if block == 0:
        tl.store(wholes + slot, tl.exp(total))


@triton.jit(do_not_specialize=["N", "slots"])
def chain(
    initial, states, wholes, N, slots, SIZE: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """From what the N segments add, the states before them, in place: S' = whole S + added.
    Program: BLOCK elements of one (b, h)'s states [slots, SIZE]; initial [B, H, SIZE]; wholes
    [B, H, slots, K], where K is 1 or the rows of a state."""
    blocks: tl.constexpr = SIZE // BLOCK
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    S = tl.load(initial + bh * SIZE + at)
    for m in range(N - 1):
        slot = bh * slots + (N - 1 - m if REVERSE else m)
        added = tl.load(states + slot * SIZE + at)
        tl.store(states + slot * SIZE + at, S)
        S = tl.load(wholes + slot * K + at // (SIZE // K)) * S + added
    slot = bh * slots + (0 if REVERSE else N - 1)
    tl.store(states + slot * SIZE + at, S)


def settings(R: int, C: int, itemsize: int, on: Any, heads: int) -> dict[str, int]:
    """Tiles of the scans and of `gather`, and the most segments that `heads` sequences are split
    into, to have some programs for every multiprocessor.

    float32's products are FMAs and hold their operands in registers: small tiles.
    """
    if itemsize == 4:
        BC = min(C, 32 if R <= 64 else 16)
        tiles = {"BT": 16, "BC": BC, "num_warps": 8, "num_stages": 1}
    else:
        BC = min(C, 64 if R <= 128 else 32)
        BT = 32 if on.backend == "hip" and R + BC > 128 else 64
        warps = 4 if R <= 128 or on.backend == "hip" else 8
        stages = 2 if R <= 128 and on.backend != "hip" else 1
        tiles = {"BT": BT, "BC": BC, "num_warps": warps, "num_stages": stages}
    programs = max(1, heads * C // tiles["BC"])
    few = programs < 2 * on.multiprocessors
    return {**tiles, "slots": min(64, 4 * on.multiprocessors // programs) if few else 1}
