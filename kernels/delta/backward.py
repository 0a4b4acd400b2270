"""The delta rule's backward kernels: the scan of the state's gradient, and what chunks then do.

With dS the gradient of the state after a chunk (S the one before it), and y = scale do:

    du = scores^T y + (k until) dS,   z = solve^T (beta du) = dv,
    dS before = whole dS + (q since)^T y - (k since)^T z,
    d scores = y u^T,   d A = -z u^T,   d(q since) = y S^T,   d(k since) = -z S^T,
    d(k until) = u dS^T,   d beta = sum over V of r (du - A^T z).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import FLOOR, load_gate, load_rows, ratios, store_gate, store_rows, sums


@triton.jit(do_not_specialize=["T", "N", "B"])
def reverse_scan(
    q, k, fade, beta, scores, solve, gates, whole, do, d_end, dv, d_state, d_states,
    scale, T, N, B,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BV: tl.constexpr, DECAY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program takes BV columns of the state's gradient of one head, transposed as in `scan`,
    through all chunks from the end. Writes dv `[B, T, H, V]`, the transposed gradients of the
    states after the chunks `[B, N, H, V, K]`, and that of the state given."""
    blocks: tl.constexpr = V // BV
    bh = tl.program_id(0) // blocks
    b, h = (bh // H).to(tl.int64), bh % H
    d = tl.arange(0, K)
    c = (tl.program_id(0) % blocks) * BV + tl.arange(0, BV)
    i = tl.arange(0, C)
    place = (b * H + h) * K * V + d[:, None] * V + c[None, :]
    low = q.dtype.element_ty
    untils = gates + (b * 0 + B) * T * H
    dS = tl.trans(tl.load(d_end + place).to(tl.float32))
    for m in range(0, N):
        n = N - 1 - m
        first = n * C
        row = (b * T + first) * H + h
        chunk = (b * N + n) * H + h
        if DECAY == 1:
            kept = tl.load(whole + chunk)
        ks = load_rows(k, row, first, T, d, H, K, C)
        qs = load_rows(q, row, first, T, d, H, K, C)
        ys = load_rows(do, row, first, T, c, H, V, C)
        M = load_rows(solve, row, first, T, i, H, C, C)
        s = load_rows(scores, row, first, T, i, H, C, C)
        strength = load_gate(beta, row, first, T, H, C)
        after = dS.to(low)
        tl.store(d_states + chunk * K * V + c[:, None] * K + d[None, :], after)
        fs = load_rows(fade, row, first, T, d, H, K, C) if DECAY == 2 else ks
        y = tl.trans(ys)
        du = tl.dot(after, tl.trans(fs), input_precision=PRECISION)
        if DECAY == 1:
            since = load_gate(gates, row, first, T, H, C)
            du *= load_gate(untils, row, first, T, H, C)[None, :]
        scaled = y.to(tl.float32) * scale
        du = tl.dot(scaled.to(low), s, du, input_precision=PRECISION)
        du *= strength[None, :]
        z = tl.dot(du.to(low), M, input_precision=PRECISION)
        store_rows(dv, row, first, T, c, tl.trans(z.to(low)), H, V, C)
        if DECAY == 1:
            scaled *= since[None, :]
            z *= since[None, :]
            dS *= kept
        elif DECAY == 2:
            dS *= tl.load(whole + chunk * K + d)[None, :]
        dS = tl.dot(scaled.to(low), qs, dS, input_precision=PRECISION)
        dS = tl.dot((-z).to(low), ks, dS, input_precision=PRECISION)
    tl.store(d_state + place, tl.trans(dS))


@triton.jit
def onto(x, y, out, FRESH: tl.constexpr, PRECISION: tl.constexpr):
    """out + x y. FRESH: out is zero, and takes no registers."""
    if FRESH:
        out = tl.dot(x, y, input_precision=PRECISION)
    else:
        out = tl.dot(x, y, out, input_precision=PRECISION)
    return out


@triton.jit
def products(
    x, y, row, first, T,
    H: tl.constexpr, D: tl.constexpr, MOST: tl.constexpr, C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`[C, C]`: x y^T of a chunk."""
    BD: tl.constexpr = D if D < MOST else MOST
    out = tl.zeros([C, C], tl.float32)
    for p in range(0, D // BD):
        d = p * BD + tl.arange(0, BD)
        xs = load_rows(x, row, first, T, d, H, D, C)
        ys = load_rows(y, row, first, T, d, H, D, C)
        out = tl.dot(xs, tl.trans(ys), out, input_precision=PRECISION)
    return out


@triton.jit
def across(pairs, strength, C: tl.constexpr):
    """Sums over i >= t > j of pairs_ij strength_j."""
    i = tl.arange(0, C)
    pairs = tl.cumsum(pairs * strength[None, :], 0, reverse=True)
    return tl.sum(tl.where(i[:, None] > i[None, :], pairs, 0.0), 1)


@triton.jit(do_not_specialize=["T", "N", "B"])
def gradients(
    q, k, fade, beta, g, scores, A, gates, whole, do, r, z, states, d_states,
    dq, dk, d_beta, dg, d_scores, dA, d_fade, d_whole, scale, T, N, B,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, INNER: tl.constexpr, DECAY: tl.constexpr,
    PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """A program does one chunk of one head: first what is `[C, C]`, then BK key channels at a
    time.

    With DECAY = 2, q and k are given as they read (times since), with both scores, and the
    gradients of those are written (dq, dk, d_scores, dA, d_fade, d_whole); else dq and dk are
    those of q and k themselves, and dg that of the log decay of a token.

    dg_t has the pairs of i >= t > j, what is read from t on, what is left of the tokens before t,
    and what is left of the state. With EXACT the first are summed as they are; else as those of
    i >= t less those of j >= t.

    d_scores and dA are written in any case, and read again for their transposes: on sm_90 a
    product's result, transposed, is no safe operand of another.
    """
    n, bh = tl.program_id(0) % N, tl.program_id(0) // N
    b, h = (bh // H).to(tl.int64), bh % H
    first = n * C
    row = (b * T + first) * H + h
    place = ((b * N + n) * H + h) * K * V
    i = tl.arange(0, C)
    seen = i[:, None] >= i[None, :]
    before = i[:, None] > i[None, :]
    WHOLE: tl.constexpr = K <= INNER and V <= INNER
    ONCE: tl.constexpr = WHOLE and K == BK and V == BV
    if WHOLE:  # all at once: memory is slow to answer
        if DECAY != 2:
            k0 = load_rows(k, row, first, T, tl.arange(0, K), H, K, C)
            q0 = load_rows(q, row, first, T, tl.arange(0, K), H, K, C)
        r0 = load_rows(r, row, first, T, tl.arange(0, V), H, V, C)
        y0 = load_rows(do, row, first, T, tl.arange(0, V), H, V, C)
        z0 = load_rows(z, row, first, T, tl.arange(0, V), H, V, C)
    strength = load_gate(beta, row, first, T, H, C)
    if DECAY == 1:
        log = load_gate(g, row, first, T, H, C)
        coarse, fine = sums(log)
    # One square after the other, for their registers.
    if DECAY == 2:
        s = load_rows(scores, row, first, T, i, H, C, C).to(tl.float32)
    elif WHOLE:
        s = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
    else:
        s = products(q, k, row, first, T, H, K, INNER, C, PRECISION)
    if WHOLE:
        dy = tl.dot(y0, tl.trans(r0), input_precision=PRECISION)
    else:
        dy = products(do, r, row, first, T, H, V, INNER, C, PRECISION)
    dy = tl.where(seen, dy * scale, 0.0)
    if DECAY == 1:
        dy *= ratios(coarse, fine)
    pairs = dy * s
    store_rows(d_scores, row, first, T, i, dy * strength[None, :], H, C, C)
    if DECAY == 2:
        s = load_rows(A, row, first, T, i, H, C, C).to(tl.float32)
    elif WHOLE:
        s = tl.dot(k0, tl.trans(k0), input_precision=PRECISION)
    else:
        s = products(k, k, row, first, T, H, K, INNER, C, PRECISION)
    if WHOLE:
        dz = tl.dot(z0, tl.trans(r0), input_precision=PRECISION)
    else:
        dz = products(z, r, row, first, T, H, V, INNER, C, PRECISION)
    own = tl.sum(tl.where(i[:, None] == i[None, :], dz, 0.0), 1)  # z r of every token
    dz = tl.where(before, -dz, 0.0)
    if DECAY == 1:
        dz *= ratios(coarse, fine)
    store_rows(dA, row, first, T, i, dz * strength[None, :], H, C, C)
    pairs += dz * s
    of_beta = tl.sum(pairs, 0)
    if DECAY == 1:
        if EXACT:
            total = across(pairs, strength, C)
        else:
            total = tl.sum(pairs * strength[None, :], 1) - of_beta * strength
    if DECAY != 2:
        tl.debug_barrier()
        if DECAY == 1:
            since = load_gate(gates, row, first, T, H, C)
            until = load_gate(gates + (b * 0 + B) * T * H, row, first, T, H, C)
        yk = load_rows(d_scores, row, first, T, i, H, C, C)
        zk = load_rows(dA, row, first, T, i, H, C, C)
    strength = load_gate(beta, row, first, T, H, C)  # again, for registers meanwhile
    left = tl.zeros([C], tl.float32)
    read = tl.zeros([C], tl.float32)
    kept = 0.0
    for m in range(0, K // BK):
        d = m * BK + tl.arange(0, BK)
        dqs = tl.zeros([C, BK], tl.float32)
        dks = tl.zeros([C, BK], tl.float32)
        dfs = tl.zeros([C, BK], tl.float32)
        inner = tl.zeros([BK], tl.float32)
        for p in range(0, V // BV):
            c = p * BV + tl.arange(0, BV)
            at = place + c[:, None] * K + d[None, :]
            S = tl.load(states + at)
            dS = tl.load(d_states + at)
            ys = y0 if ONCE else load_rows(do, row, first, T, c, H, V, C)
            rs = r0 if ONCE else load_rows(r, row, first, T, c, H, V, C)
            zs = z0 if ONCE else load_rows(z, row, first, T, c, H, V, C)
            dqs = onto(ys, S, dqs, V == BV, PRECISION)
            dks = onto(zs, S, dks, V == BV, PRECISION)
            dfs = onto(rs, dS, dfs, V == BV, PRECISION)
            if DECAY == 1:
                kept += tl.sum(S.to(tl.float32) * dS.to(tl.float32))
            elif DECAY == 2:
                inner += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 0)
        dqs *= scale
        if DECAY == 2:
            fs = load_rows(fade, row, first, T, d, H, K, C)
            left += tl.sum(dfs * fs.to(tl.float32), 1)
            store_rows(dq, row, first, T, d, dqs, H, K, C)
            store_rows(dk, row, first, T, d, -dks, H, K, C)
            store_rows(d_fade, row, first, T, d, dfs * strength[:, None], H, K, C)
            tl.store(d_whole + ((b * N + n) * H + h) * K + d, inner)
        else:
            ks = k0 if ONCE else load_rows(k, row, first, T, d, H, K, C)
            qs = q0 if ONCE else load_rows(q, row, first, T, d, H, K, C)
            if DECAY == 1:
                dqs *= since[:, None]
                dks *= since[:, None]
                dfs *= until[:, None]
                read += tl.sum(dqs * qs.to(tl.float32) - dks * ks.to(tl.float32), 1)
            left += tl.sum(dfs * ks.to(tl.float32), 1)
            dqs = tl.dot(yk, ks, dqs, input_precision=PRECISION)
            store_rows(dq, row, first, T, d, dqs, H, K, C)
            dks = dfs * strength[:, None] - dks
            dks = tl.dot(zk, ks, dks, input_precision=PRECISION)
            dks = tl.dot(tl.trans(zk), ks, dks, input_precision=PRECISION)
            dks = tl.dot(tl.trans(yk), qs, dks, input_precision=PRECISION)
            store_rows(dk, row, first, T, d, dks, H, K, C)
    # As z = beta (du - A^T z), by division where beta is not small: equal keys cancel in the rest.
    large = strength > 0.0625
    by_z = own / tl.where(large, strength, 1.0)
    store_gate(d_beta, row, first, T, tl.where(large, by_z, of_beta + left), H, C)
    if DECAY == 1:
        left *= strength
        if EXACT:
            total += tl.cumsum(read, 0, reverse=True)
            total += tl.sum(tl.where(before, left[None, :], 0.0), 1)
        else:  # what is left before t as all less that from t on
            total = tl.cumsum(total + read - left, 0, reverse=True) + tl.sum(left, 0)
        total += kept * tl.load(whole + (b * N + n) * H + h)
        store_gate(dg, row, first, T, tl.where(log >= FLOOR, total, 0.0), H, C)
