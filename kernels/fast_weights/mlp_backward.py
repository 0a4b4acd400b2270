"""A two-layer MLP trained while it reads, backward: one program goes back through one head's
mini-batches.

In the names of `mlp_forward`, with d a gradient, a1 = y X^T + 1, a0 = q k^T + 1, and D, G those
of the weights and of the momentum at the end of the mini-batch:

    g1 = -d_f' E1^T,  d_y = (g1 * L1) X + sum_c c (d_f' B1^T),  d_z = d_y act'
    g0 = -d_z E0^T,   d_q = (g0 * L0) k + sum_c c (d_z B0^T)
    d_E0 = -(L0 * a0)^T d_z - w (k D0) - t (k G0);   d_h = d_E0 act'(k W0)
    d_E1 = -(L1 * a1)^T d_f' - w (X D1) - t (X G1) + d_h W1
    d_X = (g1 * L1)^T y - w (E1 D1^T) - t (E1 G1^T) + d_f W1^T,   d_f from d_E1 through the loss
    d_W0 = A_end D0 + (A q)^T d_z + k^T (d_X act' + d_E0 h act''),   h = E1 W1^T
    d_W1 = A_end D1 + (A y)^T d_f' + d_h^T E1 + X^T d_f

The gradient of L is d_L = g * a, that of w in row j is -<E0_j, (k D0)_j> - <X_j, (E1 D1^T)_j>.
D and G are kept in place, float32 in the L2 cache. Three passes over the hidden tiles: d_z and y;
d_E1, and what of d_k needs no d_f; what needs d_f, and D and G. Registers are the limit, and so
left operands wait in memory (which also turns them), and so do d_z, y and d_h between passes.
"""

# Types of Triton's language are not Python's:

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .parts import (
    act_curve,
    act_slope,
    error,
    error_backward,
    masked,
    masked_t,
    norm_backward,
    normal,
)


@triton.jit
def rate_backward(dL, lam, row, rate, d_lam, oc, C: tl.constexpr, ADD: tl.constexpr):
    """Of L[i, j] = row_i Lam_ij rate_j: the gradients of row and rate, and of Lam to memory."""
    p = oc[:, None] * C + oc[None, :]
    x = dL * rate[None, :]
    if lam is None:
        x = tl.where(oc[:, None] >= oc[None, :], x, 0.0)
    else:
        y = x * row[:, None]
        if ADD:
            y += tl.load(d_lam + p)
        tl.store(d_lam + p, y)
        x *= tl.load(lam + p)
    return tl.sum(x, 1), tl.sum(masked(dL, lam, row, oc, C), 0)


@triton.jit
def backward_end(
    at, left, x, new, w, s, u, d_w, d_s, d_u, lam, A_end, s_end, u_end, theta, cs, cu,
    n_A, n_s, n_u, n_t, FULL: tl.constexpr, DT: tl.constexpr, IP: tl.constexpr,
) -> Any:  # fmt: skip
    """One tile of a matrix at the end of a mini-batch: from `new`, what its own products give, the
    gradients of W, S and U at its start, in place, and sums for those of A_end, s_end, u_end and
    theta."""
    D = tl.load(d_w + at)
    if FULL:
        if lam is not None:
            n_A += tl.sum(D * tl.load(w + at))
        new += A_end * D
    if s is not None:
        S, G = tl.load(s + at), tl.load(d_s + at)
        n_s += tl.sum(D * S)
        n_t += tl.sum(G * S)
        G = theta * G + s_end * D
        G += tl.dot(left, (x * cs[:, None]).to(DT), input_precision=IP)
        tl.store(d_s + at, G)
    if u is not None:
        n_u += tl.sum(D * tl.load(u + at))
        m = tl.dot(left, (x * cu[:, None]).to(DT), input_precision=IP)
        tl.store(d_u + at, u_end * D + m)
    tl.store(d_w + at, new)
    return n_A, n_s, n_u, n_t


@triton.jit(do_not_specialize=["T", "first", "NB", "n"])
def mlp_backward(
    q, k, v, rates, coef, ends, lam, gamma, beta, w, s, u, kept_f, kept_o, kept_a, d_o,
    d_w, d_s, d_u, d_q, d_k, d_v, d_rates, d_coef, d_ends, d_lam, d_gamma, d_beta,
    turn, turn_a, sums, hidden, wide, T, first, NB, n,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, F: tl.constexpr, C: tl.constexpr,
    FT: tl.constexpr, VT: tl.constexpr, M: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr,
    RESIDUAL: tl.constexpr, L2: tl.constexpr, TANH: tl.constexpr, FULL: tl.constexpr,
    IP: tl.constexpr,
):  # fmt: skip
    """Mini-batches first + NB - 1 .. first. w, s: `[slots, N, P]`, slot i of mini-batch
    first + i. d_w, d_s: at the end, becoming those at the start; d_u is written. d_gamma, d_beta
    `[N, V]`: added to. Scratch: turn `[3, N, C, V]`, turn_a `[4, N, C, C]`, sums `[N, C, C]`,
    hidden `[3, N, C, F]`, wide `[N, C, F]`."""
    P: tl.constexpr = (K + V) * F + (F + V if BIAS else 0)
    B0: tl.constexpr = (K + V) * F
    N = tl.num_programs(0)
    r = tl.program_id(0).to(tl.int64)
    oc, ok, ov, of = tl.arange(0, C), tl.arange(0, K), tl.arange(0, V), tl.arange(0, FT)
    DT: tl.constexpr = q.dtype.element_ty
    true = None if VT == V else (ov < VT)[None, :]
    pk = oc[:, None] * (H * K) + ok[None, :]
    pkt = oc[None, :] * (H * K) + ok[:, None]
    pv = oc[:, None] * (H * V) + ov[None, :]
    pc = oc[:, None] * V + ov[None, :]
    pct = oc[None, :] * V + ov[:, None]
    pa = oc[:, None] * C + oc[None, :]
    pat = oc[None, :] * C + oc[:, None]
    inside = oc < n
    e_turn = turn + r * C * V
    o_turn = turn + (N + r) * C * V
    f_turn = turn + (2 * N + r) * C * V
    sums += r * C * C
    turn_a += r * C * C
    each = N.to(tl.int64) * C * C
    d_w += r * P
    all_z = hidden + r * C * F
    all_y = hidden + (N + r) * C * F
    all_dh = hidden + (2 * N + r) * C * F
    wide += r * C * F
    if s is not None:
        d_s += r * P
    if u is not None:
        u += r * P
        d_u += r * P
    for step in range(0, NB):
        i = NB - 1 - step
        at = first + i
        x = ((r // H) * T + at * n) * H + r % H
        bk, bv = x * K, x * V
        kk = tl.load(k + bk + pk, mask=inside[:, None], other=0.0)
        qq = tl.load(q + bk + pk, mask=inside[:, None], other=0.0)
        cell = at.to(tl.int64) * N + r
        c = coef + cell * 6 * C + oc
        row, cA, wl = tl.load(c), tl.load(c + C), tl.load(c + 4 * C)
        rate0 = tl.load(rates + cell * M * C + oc)
        rate1 = tl.load(rates + cell * M * C + (M - 1) * C + oc)
        A_end = tl.load(ends + cell * 4)
        w_in = w + (i * N + r) * P
        here = None if lam is None else lam + cell * C * C
        d_here = None if lam is None else d_lam + cell * C * C
        w0s, w1s = (wl * rate0)[:, None], (wl * rate1)[:, None]

        vv = tl.load(v + bv + pv, mask=inside[:, None], other=0.0).to(tl.float32)
        dfo = tl.load(d_o + bv + pv, mask=inside[:, None], other=0.0).to(tl.float32)
        if NORM:
            g, b = tl.load(gamma + r * V + ov), tl.load(beta + r * V + ov)
            xo, ro = normal(tl.load(kept_o + (i * N + r) * C * V + pc), true, VT)
            old = tl.load(d_gamma + r * V + ov)
            tl.store(d_gamma + r * V + ov, old + tl.sum(dfo * xo, 0))
            old = tl.load(d_beta + r * V + ov)
            tl.store(d_beta + r * V + ov, old + tl.sum(dfo, 0))
            dfo = norm_backward(dfo * g[None, :], xo, ro, true, VT)
        else:
            g, b = None, None
        tl.store(o_turn + pc, dfo.to(DT))
        f = tl.load(kept_f + (i * N + r) * C * V + pc)
        e1 = error(f, kk.to(tl.float32), vv, g, b, true, VT, NORM, RESIDUAL, L2)
        tl.store(e_turn + pc, e1.to(DT))
        d_A = tl.zeros([C], dtype=tl.float32)
        d_w0, d_w1 = tl.zeros([C], dtype=tl.float32), tl.zeros([C], dtype=tl.float32)
        n_A, n_s, n_u, n_t = 0.0, 0.0, 0.0, 0.0
        s_in, s_end, theta, cs, u_end, cu = None, None, None, None, None, None
        if s is not None:
            s_in = s + (i * N + r) * P
            cs, tl_ = tl.load(c + 2 * C), tl.load(c + 5 * C)
            s_end, theta = tl.load(ends + cell * 4 + 1), tl.load(ends + cell * 4 + 3)
            t0s, t1s = (tl_ * rate0)[:, None], (tl_ * rate1)[:, None]
            d_cs = tl.zeros([C], dtype=tl.float32)
            d_t0, d_t1 = tl.zeros([C], dtype=tl.float32), tl.zeros([C], dtype=tl.float32)
        if u is not None:
            cu, u_end = tl.load(c + 3 * C), tl.load(ends + cell * 4 + 2)
            d_cu = tl.zeros([C], dtype=tl.float32)
        if BIAS:
            pb1 = B0 + F + ov
            b1, Dv = tl.load(w_in + pb1), tl.load(d_w + pb1)
            d_w1 -= tl.sum(e1 * Dv[None, :], 1)
            end = tl.sum(dfo * cA[:, None], 0)
            if lam is not None:
                d_A += tl.sum(dfo * b1[None, :], 1)
            if FULL:
                end += A_end * Dv
                n_A += tl.sum(Dv * b1)
            if s is not None:
                sv, Gv = tl.load(s_in + pb1), tl.load(d_s + pb1)
                d_cs += tl.sum(dfo * sv[None, :], 1)
                d_t1 -= tl.sum(e1 * Gv[None, :], 1)
                n_s += tl.sum(Dv * sv)
                n_t += tl.sum(Gv * sv)
                end_s = tl.sum(dfo * cs[:, None], 0) + theta * Gv + s_end * Dv
            if u is not None:
                uv = tl.load(u + pb1)
                d_cu += tl.sum(dfo * uv[None, :], 1)
                n_u += tl.sum(Dv * uv)
                tl.store(d_u + pb1, tl.sum(dfo * cu[:, None], 0) + u_end * Dv)
        tl.debug_barrier()
        if BIAS:
            tl.store(d_w + pb1, end)
            if s is not None:
                tl.store(d_s + pb1, end_s)
        e1c, dfc = tl.load(e_turn + pc), tl.load(o_turn + pc)

        a1 = tl.load(kept_a + (i * N + r) * C * C + pa)
        g1 = -tl.dot(dfc, tl.load(e_turn + pct), input_precision=IP)
        if BIAS:
            a1 += 1
        d_row, d_rate1 = rate_backward(g1 * a1, here, row, rate1, d_here, oc, C, False)
        tl.store(turn_a + pa, (masked(g1, here, row, oc, C) * rate1[None, :]).to(DT))
        g1t = -tl.dot(e1c, tl.load(o_turn + pct), input_precision=IP)
        tl.store(turn_a + each + pa, masked_t(g1t, here, row, oc, C).to(DT))
        a0 = tl.dot(qq, tl.trans(kk), input_precision=IP)
        a0t = tl.dot(kk, tl.trans(qq), input_precision=IP)
        if BIAS:
            a0 += 1
            a0t += 1
        a0 = masked(a0, here, row, oc, C) * rate0[None, :]
        tl.store(turn_a + 2 * each + pa, a0.to(DT))
        tl.store(turn_a + 3 * each + pa, masked_t(a0t, here, row, oc, C).to(DT))
        tl.debug_barrier()

        d_a1, a0c = tl.load(turn_a + pa), tl.load(turn_a + 2 * each + pa)
        dq = tl.zeros([C, K], dtype=tl.float32)
        g0 = tl.zeros([C, C], dtype=tl.float32)
        if s is not None:
            dqS = tl.zeros([C, K], dtype=tl.float32)
        if u is not None:
            dqU = tl.zeros([C, K], dtype=tl.float32)
        for j in range(0, F, FT):
            p0 = ok[:, None] * F + (j + of)[None, :]
            p1 = K * F + ov[:, None] * F + (j + of)[None, :]
            ph = oc[:, None] * F + (j + of)[None, :]
            pb = B0 + j + of
            w0c, w1c = tl.load(w_in + p0).to(DT), tl.load(w_in + p1).to(DT)
            z = tl.dot(kk, w0c, input_precision=IP)
            y = tl.dot(qq, w0c, input_precision=IP)
            if BIAS:
                b0 = tl.load(w_in + pb)
                z += b0[None, :]
                y += b0[None, :]
            y *= cA[:, None]
            if s is not None:
                s0c, s1c = tl.load(s_in + p0).to(DT), tl.load(s_in + p1).to(DT)
                m = tl.dot(qq, s0c, input_precision=IP)
                if BIAS:
                    sb = tl.load(s_in + pb)
                    m += sb[None, :]
                y += m * cs[:, None]
            if u is not None:
                u0c, u1c = tl.load(u + p0).to(DT), tl.load(u + p1).to(DT)
                m = tl.dot(qq, u0c, input_precision=IP)
                if BIAS:
                    ub = tl.load(u + pb)
                    m += ub[None, :]
                y += m * cu[:, None]
            xx, slope = act_slope(z, TANH)
            e0 = tl.dot(e1c, w1c, input_precision=IP) * slope
            e0c = e0.to(DT)
            y -= tl.dot(a0c, e0c, input_precision=IP)
            y, slope = act_slope(y, TANH)
            tl.store(all_y + ph, y.to(DT))
            dz = tl.dot(d_a1, xx.to(DT), input_precision=IP)
            m = tl.dot(dfc, w1c, input_precision=IP)
            if lam is not None:
                d_A += tl.sum(m * y, 1)
            dz += m if lam is None else m * cA[:, None]
            if s is not None:
                m = tl.dot(dfc, s1c, input_precision=IP)
                d_cs += tl.sum(m * y, 1)
                dz += m * cs[:, None]
            if u is not None:
                m = tl.dot(dfc, u1c, input_precision=IP)
                d_cu += tl.sum(m * y, 1)
                dz += m * cu[:, None]
            dz *= slope
            dzc = dz.to(DT)
            tl.store(all_z + ph, dzc)
            g0 -= tl.dot(dzc, tl.trans(e0c), input_precision=IP)
            dq = tl.dot(dzc, tl.trans(w0c), dq, input_precision=IP)
            if s is not None:
                dqS = tl.dot(dzc, tl.trans(s0c), dqS, input_precision=IP)
            if u is not None:
                dqU = tl.dot(dzc, tl.trans(u0c), dqU, input_precision=IP)
            if BIAS:
                if lam is not None:
                    d_A += tl.sum(dz * b0[None, :], 1)
                if s is not None:
                    d_cs += tl.sum(dz * sb[None, :], 1)
                if u is not None:
                    d_cu += tl.sum(dz * ub[None, :], 1)
        tl.store(sums + pa, g0)
        to = d_coef + cell * 6 * C + oc
        qf = tl.load(q + bk + pk, mask=inside[:, None], other=0.0).to(tl.float32)
        if lam is not None:
            d_A += tl.sum(dq * qf, 1)
            dq *= cA[:, None]
        tl.store(to + C, d_A)
        if s is not None:
            tl.store(to + 2 * C, d_cs + tl.sum(dqS * qf, 1))
            dq += dqS * cs[:, None]
        else:
            tl.store(to + 2 * C, d_A * 0)
        if u is not None:
            tl.store(to + 3 * C, d_cu + tl.sum(dqU * qf, 1))
            dq += dqU * cu[:, None]
        else:
            tl.store(to + 3 * C, d_A * 0)
        a0 = tl.dot(qq, tl.trans(kk), input_precision=IP)
        if BIAS:
            a0 += 1
        more, d_rate0 = rate_backward(g0 * a0, here, row, rate0, d_here, oc, C, True)
        tl.store(to, d_row + more)
        g0 = masked(g0, here, row, oc, C)
        dq = tl.dot(g0.to(DT), (kk * rate0[:, None]).to(DT), dq, input_precision=IP)
        if RESIDUAL:
            dq += tl.load(d_o + bv + pv, mask=inside[:, None], other=0.0).to(tl.float32)
        tl.store(d_q + bk + pk, dq, mask=inside[:, None])
        tl.debug_barrier()

        d_e1 = tl.load(kept_a + (i * N + r) * C * C + pat)
        if BIAS:
            d_e1 += 1
        d_e1 = masked_t(d_e1, here, row, oc, C).to(DT)
        d_e1 = tl.dot(d_e1, dfc, input_precision=IP) * -rate1[:, None]
        if BIAS:
            d_e1 -= w1s * Dv[None, :]
            if s is not None:
                d_e1 -= t1s * Gv[None, :]
        g0t = masked_t(tl.load(sums + pat), here, row, oc, C).to(DT)
        dk = tl.dot(g0t, qq, input_precision=IP) * rate0[:, None]
        d_a1t, a0t = tl.load(turn_a + each + pa), tl.load(turn_a + 3 * each + pa)
        for j in range(0, F, FT):
            p0 = ok[:, None] * F + (j + of)[None, :]
            p1 = K * F + ov[:, None] * F + (j + of)[None, :]
            ph = oc[:, None] * F + (j + of)[None, :]
            pb = B0 + j + of
            w0c, D0c = tl.load(w_in + p0).to(DT), tl.load(d_w + p0).to(DT)
            z = tl.dot(kk, w0c, input_precision=IP)
            kD = tl.dot(kk, D0c, input_precision=IP)
            if BIAS:
                b0, Db = tl.load(w_in + pb), tl.load(d_w + pb)
                z += b0[None, :]
                kD += Db[None, :]
            xx, slope, curve = act_curve(z, TANH)
            w1c, D1c = tl.load(w_in + p1).to(DT), tl.load(d_w + p1).to(DT)
            h = tl.dot(e1c, w1c, input_precision=IP)
            e0 = h * slope
            h *= curve
            dz, y = tl.load(all_z + ph), tl.load(all_y + ph)
            d_w0 -= tl.sum(e0 * kD, 1)
            d_e0 = tl.dot(a0t, dz, input_precision=IP) * -rate0[:, None] - w0s * kD
            dk = tl.dot((e0 * -w0s).to(DT), tl.trans(D0c), dk, input_precision=IP)
            if s is not None:
                G0c = tl.load(d_s + p0).to(DT)
                kG = tl.dot(kk, G0c, input_precision=IP)
                if BIAS:
                    sb, Gb = tl.load(s_in + pb), tl.load(d_s + pb)
                    kG += Gb[None, :]
                d_t0 -= tl.sum(e0 * kG, 1)
                d_e0 -= t0s * kG
                dk = tl.dot((e0 * -t0s).to(DT), tl.trans(G0c), dk, input_precision=IP)
            dh = (d_e0 * slope).to(DT)
            d_e1 = tl.dot(dh, tl.trans(w1c), d_e1, input_precision=IP)
            m = tl.dot(e1c, D1c, input_precision=IP)
            d_w1 -= tl.sum(xx * m, 1)
            dx = tl.dot(d_a1t, y, input_precision=IP) * rate1[:, None] - w1s * m
            d_e1 = tl.dot((xx * -w1s).to(DT), tl.trans(D1c), d_e1, input_precision=IP)
            if s is not None:
                G1c = tl.load(d_s + p1).to(DT)
                m = tl.dot(e1c, G1c, input_precision=IP)
                d_t1 -= tl.sum(xx * m, 1)
                dx -= t1s * m
                d_e1 = tl.dot((xx * -t1s).to(DT), tl.trans(G1c), d_e1, input_precision=IP)
            tl.store(wide + ph, dx * slope + d_e0 * h)

            tl.store(all_dh + ph, dh)

        d_rate0 += d_w0 * wl
        d_rate1 += d_w1 * wl
        tl.store(to + 4 * C, d_w0 * rate0 + d_w1 * rate1)
        if s is not None:
            tl.store(to + 5 * C, d_t0 * rate0 + d_t1 * rate1)
            d_rate0 += d_t0 * tl_
            d_rate1 += d_t1 * tl_
        else:
            tl.store(to + 5 * C, d_w0 * 0)
        pr = d_rates + cell * M * C + oc
        if M == 1:
            tl.store(pr, d_rate0 + d_rate1)
        else:
            tl.store(pr, d_rate0)
            tl.store(pr + C, d_rate1)
        f = tl.load(kept_f + (i * N + r) * C * V + pc)
        vv = tl.load(v + bv + pv, mask=inside[:, None], other=0.0).to(tl.float32)
        if NORM:
            g, b = tl.load(gamma + r * V + ov), tl.load(beta + r * V + ov)
        kf = tl.load(k + bk + pk, mask=inside[:, None], other=0.0).to(tl.float32)
        d_f, d_y, d_g, d_b = error_backward(d_e1, f, kf, vv, g, b, true, VT, NORM, RESIDUAL, L2)
        if NORM:
            old = tl.load(d_gamma + r * V + ov)
            tl.store(d_gamma + r * V + ov, old + d_g)
            if L2:
                old = tl.load(d_beta + r * V + ov)
                tl.store(d_beta + r * V + ov, old + d_b)
        tl.store(d_v + bv + pv, -d_y, mask=inside[:, None])
        tl.store(f_turn + pc, d_f.to(DT))
        if RESIDUAL and L2:
            dk += d_y
        if BIAS:
            end = tl.load(d_w + pb1) + tl.sum(d_f, 0)
        tl.debug_barrier()
        if BIAS:
            tl.store(d_w + pb1, end)
        d_fc, ft = tl.load(f_turn + pc), tl.load(f_turn + pct)
        et, dft = tl.load(e_turn + pct), tl.load(o_turn + pct)
        qt = tl.load(q + bk + pkt, mask=inside[None, :], other=0.0)
        kt = tl.load(k + bk + pkt, mask=inside[None, :], other=0.0)
        for j in range(0, F, FT):
            p0 = ok[:, None] * F + (j + of)[None, :]
            p1 = K * F + ov[:, None] * F + (j + of)[None, :]
            ph = oc[:, None] * F + (j + of)[None, :]
            pb = B0 + j + of
            w0c, w1c = tl.load(w_in + p0).to(DT), tl.load(w_in + p1).to(DT)
            z = tl.dot(kk, w0c, input_precision=IP)
            if BIAS:
                z += tl.load(w_in + pb)[None, :]
            xx, slope = act_slope(z, TANH)
            dk_z = tl.load(wide + ph) + tl.dot(d_fc, w1c, input_precision=IP) * slope
            dkc = dk_z.to(DT)
            dk = tl.dot(dkc, tl.trans(w0c), dk, input_precision=IP)
            dz, y, dh = tl.load(all_z + ph), tl.load(all_y + ph), tl.load(all_dh + ph)
            new0 = tl.dot(qt, dz if lam is None else (dz * cA[:, None]).to(DT), input_precision=IP)
            new0 = tl.dot(kt, dkc, new0, input_precision=IP)
            n_A, n_s, n_u, n_t = backward_end(
                p0, qt, dz, new0, w_in, s_in, u, d_w, d_s, d_u, lam, A_end, s_end, u_end, theta,
                cs, cu, n_A, n_s, n_u, n_t, FULL, DT, IP,
            )  # fmt: skip
            new1 = tl.dot(dft, y if lam is None else (y * cA[:, None]).to(DT), input_precision=IP)
            new1 = tl.dot(et, dh, new1, input_precision=IP)
            new1 = tl.dot(ft, xx.to(DT), new1, input_precision=IP)
            n_A, n_s, n_u, n_t = backward_end(
                p1, dft, y, new1, w_in, s_in, u, d_w, d_s, d_u, lam, A_end, s_end, u_end, theta,
                cs, cu, n_A, n_s, n_u, n_t, FULL, DT, IP,
            )  # fmt: skip
            if BIAS:
                dz = dz.to(tl.float32)
                b0, Db = tl.load(w_in + pb), tl.load(d_w + pb)
                if s is not None:
                    sb, Gb = tl.load(s_in + pb), tl.load(d_s + pb)
                tl.debug_barrier()  # every thread has read them
                new = tl.sum(dz * cA[:, None] + dk_z, 0)
                if FULL:
                    n_A += tl.sum(Db * b0)
                    new += A_end * Db
                if s is not None:
                    n_s += tl.sum(Db * sb)
                    n_t += tl.sum(Gb * sb)
                    Gb = theta * Gb + s_end * Db + tl.sum(dz * cs[:, None], 0)
                    tl.store(d_s + pb, Gb)
                if u is not None:
                    ub = tl.load(u + pb)
                    n_u += tl.sum(Db * ub)
                    tl.store(d_u + pb, u_end * Db + tl.sum(dz * cu[:, None], 0))
                tl.store(d_w + pb, new)
        pe = d_ends + cell * 4
        tl.store(pe, n_A)
        tl.store(pe + 1, n_s)
        tl.store(pe + 2, n_u)
        tl.store(pe + 3, n_t)
        tl.store(d_k + bk + pk, dk, mask=inside[:, None])
        tl.debug_barrier()  # the mini-batch before reads what this one wrote
