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
D and G are kept in place, float32 in the L2 cache. A first pass over the hidden tiles ends with
all of d_E1, and the second does what needs d_f. Left operands that must be turned go
through `turn` in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .parts import act_curve, act_slope, error, error_pull, norm_pull, normal, write_table


@triton.jit
def rate_pull(
    dL, lam, row, rate, d_lam, oc, C: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Of L[i, j] = row_i Lam_ij rate_j: the gradients of row and rate, and of Lam to memory."""
    if lam is None:
        x = tl.where(oc[:, None] >= oc[None, :], dL, 0.0)
    else:
        p = oc[:, None] * C + oc[None, :]
        x = dL * tl.load(lam + p)
        y = dL * row[:, None] * rate[None, :]
        if ADD:
            y += tl.load(d_lam + p)
        tl.store(d_lam + p, y)
    return tl.sum(x * rate[None, :], 1), tl.sum(x * row[:, None], 0)


@triton.jit(do_not_specialize=["T", "first", "NB"])
def mlp_backward(
    q, k, v, rates, coef, ends, lam, gamma, beta, w, s, u, kept_f, kept_o, kept_a, d_o,
    d_w, d_s, d_u, d_q, d_k, d_v, d_rates, d_coef, d_ends, d_lam, d_gamma, d_beta,
    turn, turn_a, hidden, T, first, NB, n,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, F: tl.constexpr, C: tl.constexpr,
    FT: tl.constexpr, VT: tl.constexpr, M: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr,
    RESIDUAL: tl.constexpr, L2: tl.constexpr, TANH: tl.constexpr, FULL: tl.constexpr,
    IP: tl.constexpr,
):  # fmt: skip
    """Mini-batches first + NB - 1 .. first. w, s: `[slots, N, P]`, slot i of mini-batch
    first + i. d_w, d_s: at the end, becoming those at the start; d_u is written. d_gamma, d_beta
    `[N, V]`: added to. turn `[3, N, C, V]`, turn_a `[N, C, C]`, hidden `[N, C, F]`: scratch."""
    P: tl.constexpr = (K + V) * F + (F + V if BIAS else 0)
    B0: tl.constexpr = (K + V) * F
    N = tl.num_programs(0)
    r = tl.program_id(0).to(tl.int64)
    oc, ok, ov, of = tl.arange(0, C), tl.arange(0, K), tl.arange(0, V), tl.arange(0, FT)
    DT: tl.constexpr = q.dtype.element_ty
    true = (ov < VT)[None, :]
    pk = oc[:, None] * (H * K) + ok[None, :]
    pkt = oc[None, :] * (H * K) + ok[:, None]
    pv = oc[:, None] * (H * V) + ov[None, :]
    inside = oc < n
    if NORM:
        g, b = tl.load(gamma + r * V + ov), tl.load(beta + r * V + ov)
    else:
        g, b = None, None
    pc = oc[:, None] * V + ov[None, :]
    pct = oc[None, :] * V + ov[:, None]
    pa = oc[:, None] * C + oc[None, :]
    pat = oc[None, :] * C + oc[:, None]
    e_turn = turn + r * C * V
    o_turn = turn + (N + r) * C * V
    f_turn = turn + (2 * N + r) * C * V
    turn_a += r * C * C
    d_w += r * P
    hidden += r * C * F
    if s is not None:
        d_s += r * P
    if u is not None:
        u += r * P
        d_u += r * P
    for step in range(0, NB):
        i = NB - 1 - step
        at = first + i
        x = ((r // H) * T + at * n) * H + r % H
        bk, bv = x * K, x * V  # the tile's first number; within it 32 bits do
        kk = tl.load(k + bk + pk, mask=inside[:, None], other=0.0)
        qq = tl.load(q + bk + pk, mask=inside[:, None], other=0.0)
        vv = tl.load(v + bv + pv, mask=inside[:, None], other=0.0).to(tl.float32)
        do = tl.load(d_o + bv + pv, mask=inside[:, None], other=0.0).to(tl.float32)
        qt = tl.load(q + bk + pkt, mask=inside[None, :], other=0.0)
        cell = at.to(tl.int64) * N + r
        c = coef + cell * 6 * C + oc
        row, cA, wl = tl.load(c), tl.load(c + C), tl.load(c + 4 * C)
        rate0 = tl.load(rates + cell * M * C + oc)
        rate1 = tl.load(rates + cell * M * C + (M - 1) * C + oc)
        A_end = tl.load(ends + cell * 4)
        w_in = w + (i * N + r) * P
        here = None if lam is None else lam + cell * C * C
        d_here = None if lam is None else d_lam + cell * C * C

        f = tl.load(kept_f + (i * N + r) * C * V + pc)
        e1 = error(f, kk.to(tl.float32), vv, g, b, true, VT, NORM, RESIDUAL, L2)
        e1c = e1.to(DT)
        if NORM:
            fo = tl.load(kept_o + (i * N + r) * C * V + pc)
            xo, ro = normal(fo, true, VT)
            old = tl.load(d_gamma + r * V + ov)
            tl.store(d_gamma + r * V + ov, old + tl.sum(do * xo, 0))
            old = tl.load(d_beta + r * V + ov)
            tl.store(d_beta + r * V + ov, old + tl.sum(do, 0))
            dfo = norm_pull(do * g[None, :], xo, ro, true, VT)
        else:
            dfo = do
        dfc = dfo.to(DT)
        tl.store(e_turn + pc, e1c)
        tl.store(o_turn + pc, dfc)
        tl.debug_barrier()
        et, dft = tl.load(e_turn + pct), tl.load(o_turn + pct)

        a1 = tl.load(kept_a + (i * N + r) * C * C + pa)
        a1t = tl.load(kept_a + (i * N + r) * C * C + pat)
        if BIAS:
            a1 += 1
            a1t += 1
        g1 = -tl.dot(dfc, et, input_precision=IP)
        g1t = -tl.dot(e1c, dft, input_precision=IP)
        table_t = write_table(here, row, rate1, oc, C, True)
        d_a1 = (g1 * write_table(here, row, rate1, oc, C, False)).to(DT)
        d_a1t = (g1t * table_t).to(DT)
        d_row, d_rate1 = rate_pull(g1 * a1, here, row, rate1, d_here, oc, C, False)
        d_e1 = -tl.dot((a1t * table_t).to(DT), dfc, input_precision=IP)
        a0t = tl.dot(kk, tl.trans(qq), input_precision=IP)
        if BIAS:
            a0t += 1
        a0t = (a0t * write_table(here, row, rate0, oc, C, True)).to(DT)

        w0s, w1s = (wl * rate0)[:, None], (wl * rate1)[:, None]
        qA = (qt * cA[None, :]).to(DT)
        oA = (dft * cA[None, :]).to(DT)
        d_A = tl.zeros([C], dtype=tl.float32)
        d_w0, d_w1 = tl.zeros([C], dtype=tl.float32), tl.zeros([C], dtype=tl.float32)
        n_A, n_s, n_u, n_t = 0.0, 0.0, 0.0, 0.0
        dqA = tl.zeros([C, K], dtype=tl.float32)
        dk = tl.zeros([C, K], dtype=tl.float32)
        g0 = tl.zeros([C, C], dtype=tl.float32)
        if s is not None:
            s_in = s + (i * N + r) * P
            cs, tl_ = tl.load(c + 2 * C), tl.load(c + 5 * C)
            s_end, theta = tl.load(ends + cell * 4 + 1), tl.load(ends + cell * 4 + 3)
            t0s, t1s = (tl_ * rate0)[:, None], (tl_ * rate1)[:, None]
            qS, oS = (qt * cs[None, :]).to(DT), (dft * cs[None, :]).to(DT)
            d_cs = tl.zeros([C], dtype=tl.float32)
            d_t0, d_t1 = tl.zeros([C], dtype=tl.float32), tl.zeros([C], dtype=tl.float32)
            dqS = tl.zeros([C, K], dtype=tl.float32)
        if u is not None:
            cu, u_end = tl.load(c + 3 * C), tl.load(ends + cell * 4 + 2)
            qU, oU = (qt * cu[None, :]).to(DT), (dft * cu[None, :]).to(DT)
            d_cu = tl.zeros([C], dtype=tl.float32)
            dqU = tl.zeros([C, K], dtype=tl.float32)
        if BIAS:
            pv1 = B0 + F + ov
            b1, Dv = tl.load(w_in + pv1), tl.load(d_w + pv1)
            d_A += tl.sum(dfo * b1[None, :], 1)
            d_e1 -= w1s * Dv[None, :]
            d_w1 -= tl.sum(e1 * Dv[None, :], 1)
            end = tl.sum(dfo * cA[:, None], 0)
            if FULL:
                end += A_end * Dv
                n_A += tl.sum(Dv * b1)
            if s is not None:
                sv, Gv = tl.load(s_in + pv1), tl.load(d_s + pv1)
                d_cs += tl.sum(dfo * sv[None, :], 1)
                d_e1 -= t1s * Gv[None, :]
                d_t1 -= tl.sum(e1 * Gv[None, :], 1)
                n_s += tl.sum(Dv * sv)
                n_t += tl.sum(Gv * sv)
                end_s = tl.sum(dfo * cs[:, None], 0) + theta * Gv + s_end * Dv
            if u is not None:
                uv = tl.load(u + pv1)
                d_cu += tl.sum(dfo * uv[None, :], 1)
                n_u += tl.sum(Dv * uv)
                tl.store(d_u + pv1, tl.sum(dfo * cu[:, None], 0) + u_end * Dv)
            tl.debug_barrier()
            tl.store(d_w + pv1, end)
            if s is not None:
                tl.store(d_s + pv1, end_s)

        for j in range(0, F, FT):
            p0 = ok[:, None] * F + (j + of)[None, :]
            p1 = K * F + ov[:, None] * F + (j + of)[None, :]
            pb = B0 + j + of
            w0, w1 = tl.load(w_in + p0), tl.load(w_in + p1)
            D0, D1 = tl.load(d_w + p0), tl.load(d_w + p1)
            w0c, w1c, D0c, D1c = w0.to(DT), w1.to(DT), D0.to(DT), D1.to(DT)
            z = tl.dot(kk, w0c, input_precision=IP)
            y = tl.dot(qq, w0c, input_precision=IP)
            kD = tl.dot(kk, D0c, input_precision=IP)
            if BIAS:
                b0, Db = tl.load(w_in + pb), tl.load(d_w + pb)
                z += b0[None, :]
                y += b0[None, :]
                kD += Db[None, :]
            xx, slope, curve = act_curve(z, TANH)
            xc = xx.to(DT)
            h = tl.dot(e1c, w1c, input_precision=IP)
            e0 = h * slope
            e0c = e0.to(DT)
            y *= cA[:, None]
            if s is not None:
                s0, s1 = tl.load(s_in + p0), tl.load(s_in + p1)
                G0, G1 = tl.load(d_s + p0), tl.load(d_s + p1)
                s0c, s1c, G0c, G1c = s0.to(DT), s1.to(DT), G0.to(DT), G1.to(DT)
                m = tl.dot(qq, s0c, input_precision=IP)
                kG = tl.dot(kk, G0c, input_precision=IP)
                if BIAS:
                    sb, Gb = tl.load(s_in + pb), tl.load(d_s + pb)
                    m += sb[None, :]
                    kG += Gb[None, :]
                y += m * cs[:, None]
            if u is not None:
                u0, u1 = tl.load(u + p0), tl.load(u + p1)
                u0c, u1c = u0.to(DT), u1.to(DT)
                m = tl.dot(qq, u0c, input_precision=IP)
                if BIAS:
                    ub = tl.load(u + pb)
                    m += ub[None, :]
                y += m * cu[:, None]
            # a0t is the transpose of what the forward pass multiplies by: its own product
            a0 = tl.dot(qq, tl.trans(kk), input_precision=IP)
            if BIAS:
                a0 += 1
            a0 = (a0 * write_table(here, row, rate0, oc, C, False)).to(DT)
            y, slope_y = act_slope(y - tl.dot(a0, e0c, input_precision=IP), TANH)
            yc = y.to(DT)

            m = tl.dot(dfc, w1c, input_precision=IP)
            d_A += tl.sum(m * y, 1)
            dy = tl.dot(d_a1, xc, input_precision=IP) + m * cA[:, None]
            if s is not None:
                m = tl.dot(dfc, s1c, input_precision=IP)
                d_cs += tl.sum(m * y, 1)
                dy += m * cs[:, None]
            if u is not None:
                m = tl.dot(dfc, u1c, input_precision=IP)
                d_cu += tl.sum(m * y, 1)
                dy += m * cu[:, None]
            dz = dy * slope_y
            dzc = dz.to(DT)
            g0 -= tl.dot(dzc, tl.trans(e0c), input_precision=IP)
            dqA = tl.dot(dzc, tl.trans(w0c), dqA, input_precision=IP)
            d_w0 -= tl.sum(e0 * kD, 1)
            d_e0 = -tl.dot(a0t, dzc, input_precision=IP) - w0s * kD
            m = tl.dot(e1c, D1c, input_precision=IP)
            d_w1 -= tl.sum(xx * m, 1)
            dx = tl.dot(d_a1t, yc, input_precision=IP) - w1s * m
            dk = tl.dot((e0 * -w0s).to(DT), tl.trans(D0c), dk, input_precision=IP)
            d_e1 = tl.dot((xx * -w1s).to(DT), tl.trans(D1c), d_e1, input_precision=IP)
            if s is not None:
                dqS = tl.dot(dzc, tl.trans(s0c), dqS, input_precision=IP)
                d_t0 -= tl.sum(e0 * kG, 1)
                d_e0 -= t0s * kG
                m = tl.dot(e1c, G1c, input_precision=IP)
                d_t1 -= tl.sum(xx * m, 1)
                dx -= t1s * m
                dk = tl.dot((e0 * -t0s).to(DT), tl.trans(G0c), dk, input_precision=IP)
                d_e1 = tl.dot((xx * -t1s).to(DT), tl.trans(G1c), d_e1, input_precision=IP)
            if u is not None:
                dqU = tl.dot(dzc, tl.trans(u0c), dqU, input_precision=IP)
            dhc = (d_e0 * slope).to(DT)
            d_e1 = tl.dot(dhc, tl.trans(w1c), d_e1, input_precision=IP)
            tl.store(
                hidden + oc[:, None] * F + (j + of)[None, :], dx * slope + d_e0 * h * curve
            )
            new0 = tl.dot(qA, dzc, input_precision=IP)
            new1 = tl.dot(oA, yc, input_precision=IP) + tl.dot(et, dhc, input_precision=IP)
            if FULL:
                new0 += A_end * D0
                new1 += A_end * D1
                n_A += tl.sum(D0 * w0) + tl.sum(D1 * w1)
            if s is not None:
                n_s += tl.sum(D0 * s0) + tl.sum(D1 * s1)
                n_t += tl.sum(G0 * s0) + tl.sum(G1 * s1)
                G0 = theta * G0 + s_end * D0 + tl.dot(qS, dzc, input_precision=IP)
                G1 = theta * G1 + s_end * D1 + tl.dot(oS, yc, input_precision=IP)
            if u is not None:
                n_u += tl.sum(D0 * u0) + tl.sum(D1 * u1)
                tl.store(d_u + p0, u_end * D0 + tl.dot(qU, dzc, input_precision=IP))
                tl.store(d_u + p1, u_end * D1 + tl.dot(oU, yc, input_precision=IP))
            if BIAS:
                d_A += tl.sum(dz * b0[None, :], 1)
                new = tl.sum(dz * cA[:, None], 0)
                if FULL:
                    n_A += tl.sum(Db * b0)
                    new += A_end * Db
                if s is not None:
                    d_cs += tl.sum(dz * sb[None, :], 1)
                    n_s += tl.sum(Db * sb)
                    n_t += tl.sum(Gb * sb)
                    Gb = theta * Gb + s_end * Db + tl.sum(dz * cs[:, None], 0)
                if u is not None:
                    d_cu += tl.sum(dz * ub[None, :], 1)
                    n_u += tl.sum(Db * ub)
                    tl.store(d_u + pb, u_end * Db + tl.sum(dz * cu[:, None], 0))
            tl.debug_barrier()  # all of the tile is read before it is written in place
            tl.store(d_w + p0, new0)
            tl.store(d_w + p1, new1)
            if BIAS:
                tl.store(d_w + pb, new)
            if s is not None:
                tl.store(d_s + p0, G0)
                tl.store(d_s + p1, G1)
                if BIAS:
                    tl.store(d_s + pb, Gb)

        d_f, d_y, d_g, d_b = error_pull(
            d_e1, f, kk.to(tl.float32), vv, g, b, true, VT, NORM, RESIDUAL, L2
        )
        if NORM:
            old = tl.load(d_gamma + r * V + ov)
            tl.store(d_gamma + r * V + ov, old + d_g)
            if L2:
                old = tl.load(d_beta + r * V + ov)
                tl.store(d_beta + r * V + ov, old + d_b)
        tl.store(d_v + bv + pv, -d_y, mask=inside[:, None])
        d_fc = d_f.to(DT)
        tl.store(f_turn + pc, d_fc)
        tl.store(turn_a + pa, g0)
        tl.debug_barrier()
        ft = tl.load(f_turn + pct)
        g0t = tl.load(turn_a + pat)
        kt = tl.load(k + bk + pkt, mask=inside[None, :], other=0.0)
        a0 = tl.dot(qq, tl.trans(kk), input_precision=IP)
        if BIAS:
            a0 += 1
        more, d_rate0 = rate_pull(g0 * a0, here, row, rate0, d_here, oc, C, True)
        d_row += more
        d_a0 = (g0 * write_table(here, row, rate0, oc, C, False)).to(DT)
        d_a0t = (g0t * write_table(here, row, rate0, oc, C, True)).to(DT)
        qf = qq.to(tl.float32)
        d_A += tl.sum(dqA * qf, 1)
        dq = tl.dot(d_a0, kk, input_precision=IP) + dqA * cA[:, None]
        dk = tl.dot(d_a0t, qq, dk, input_precision=IP)
        if RESIDUAL:
            dq += do
            if L2:
                dk += d_y
        to = d_coef + cell * 6 * C + oc
        d_rate0 += d_w0 * wl
        d_rate1 += d_w1 * wl
        if s is not None:
            dq += dqS * cs[:, None]
            tl.store(to + 2 * C, d_cs + tl.sum(dqS * qf, 1))
            tl.store(to + 5 * C, d_t0 * rate0 + d_t1 * rate1)
            d_rate0 += d_t0 * tl_
            d_rate1 += d_t1 * tl_
        else:
            tl.store(to + 2 * C, d_row * 0)
            tl.store(to + 5 * C, d_row * 0)
        if u is not None:
            dq += dqU * cu[:, None]
            tl.store(to + 3 * C, d_cu + tl.sum(dqU * qf, 1))
        else:
            tl.store(to + 3 * C, d_row * 0)
        tl.store(to, d_row)
        tl.store(to + C, d_A)
        tl.store(to + 4 * C, d_w0 * rate0 + d_w1 * rate1)
        pr = d_rates + cell * M * C + oc
        if M == 1:
            tl.store(pr, d_rate0 + d_rate1)
        else:
            tl.store(pr, d_rate0)
            tl.store(pr + C, d_rate1)
        pe = d_ends + cell * 4
        tl.store(pe, n_A)
        tl.store(pe + 1, n_s)
        tl.store(pe + 2, n_u)
        tl.store(pe + 3, n_t)
        tl.store(d_q + bk + pk, dq, mask=inside[:, None])

        for j in range(0, F, FT):
            p0 = ok[:, None] * F + (j + of)[None, :]
            p1 = K * F + ov[:, None] * F + (j + of)[None, :]
            w0c, w1c = tl.load(w_in + p0).to(DT), tl.load(w_in + p1).to(DT)
            z = tl.dot(kk, w0c, input_precision=IP)
            if BIAS:
                z += tl.load(w_in + B0 + j + of)[None, :]
            xx, slope = act_slope(z, TANH)
            dz = tl.load(hidden + oc[:, None] * F + (j + of)[None, :])
            dz += tl.dot(d_fc, w1c, input_precision=IP) * slope
            dzc = dz.to(DT)
            dk = tl.dot(dzc, tl.trans(w0c), dk, input_precision=IP)
            new0 = tl.load(d_w + p0) + tl.dot(kt, dzc, input_precision=IP)
            new1 = tl.load(d_w + p1) + tl.dot(ft, xx.to(DT), input_precision=IP)
            if BIAS:
                new = tl.load(d_w + B0 + j + of) + tl.sum(dz, 0)
            tl.debug_barrier()
            tl.store(d_w + p0, new0)
            tl.store(d_w + p1, new1)
            if BIAS:
                tl.store(d_w + B0 + j + of, new)
        if BIAS:
            pv1 = B0 + F + ov
            end = tl.load(d_w + pv1) + tl.sum(d_f, 0)
            tl.debug_barrier()
            tl.store(d_w + pv1, end)
        tl.store(d_k + bk + pk, dk, mask=inside[:, None])
        tl.debug_barrier()  # the mini-batch before reads what this one wrote
