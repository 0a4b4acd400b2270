"""A linear map trained while it reads, backward: one program goes back through one head's
mini-batches.

As in `mlp_backward`, with a = q k^T + 1 and D, G the gradients of W and S at the end:

    g = -d_f' E^T,  d_q = (g * L) k + sum_c c (d_f' B^T)
    d_E = -(L * a)^T d_f' - w (k D) - t (k G),   d_f from d_E through the loss
    d_k = (g * L)^T q - w (E D^T) - t (E G^T) + d_f W^T
    d_W = A_end D + (A q)^T d_f' + k^T d_f,      d_S = theta G + s_end D + (s q)^T d_f'
"""

# Types of Triton's language are not Python's:

from __future__ import annotations

import triton
import triton.language as tl

from .mlp_backward import rate_backward
from .parts import error, error_backward, masked, masked_t, norm_backward, normal


@triton.jit(do_not_specialize=["T", "first", "NB", "n"])
def linear_backward(
    q, k, v, rates, coef, ends, lam, gamma, beta, w, s, u, kept_f, kept_o, d_o,
    d_w, d_s, d_u, d_q, d_k, d_v, d_rates, d_coef, d_ends, d_lam, d_gamma, d_beta,
    turn, T, first, NB, n,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, VT: tl.constexpr,
    BIAS: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, L2: tl.constexpr,
    FULL: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """Arguments as of `mlp_backward`; d_w and d_s stay in the cache."""
    P: tl.constexpr = K * V + (V if BIAS else 0)
    N = tl.num_programs(0)
    r = tl.program_id(0).to(tl.int64)
    oc, ok, ov = tl.arange(0, C), tl.arange(0, K), tl.arange(0, V)
    DT: tl.constexpr = q.dtype.element_ty
    true = None if VT == V else (ov < VT)[None, :]
    pk = oc[:, None] * (H * K) + ok[None, :]
    pkt = oc[None, :] * (H * K) + ok[:, None]
    pv = oc[:, None] * (H * V) + ov[None, :]
    pc = oc[:, None] * V + ov[None, :]
    pct = oc[None, :] * V + ov[:, None]
    e_turn = turn + r * C * V
    o_turn = turn + (N + r) * C * V
    pw = ok[:, None] * V + ov[None, :]
    pb = K * V + ov
    inside = oc < n
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
        rate = tl.load(rates + cell * C + oc)
        A_end = tl.load(ends + cell * 4)
        w_in = w + (i * N + r) * P
        here = None if lam is None else lam + cell * C * C
        d_here = None if lam is None else d_lam + cell * C * C
        wr = (wl * rate)[:, None]
        d_A = tl.zeros([C], dtype=tl.float32)
        n_A, n_s, n_u, n_t = 0.0, 0.0, 0.0, 0.0

        # E and d_f', which products take both ways: through memory
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
        if BIAS and lam is not None:
            d_A += tl.sum(dfo * tl.load(w_in + pb)[None, :], 1)
        if s is not None:
            s_in = s + (i * N + r) * P
            cs, tl_ = tl.load(c + 2 * C), tl.load(c + 5 * C)
            s_end, theta = tl.load(ends + cell * 4 + 1), tl.load(ends + cell * 4 + 3)
            tr = (tl_ * rate)[:, None]
            d_cs = tl.zeros([C], dtype=tl.float32)
            if BIAS:
                d_cs += tl.sum(dfo * tl.load(s_in + pb)[None, :], 1)
        if u is not None:
            cu, u_end = tl.load(c + 3 * C), tl.load(ends + cell * 4 + 2)
            d_cu = tl.zeros([C], dtype=tl.float32)
            if BIAS:
                d_cu += tl.sum(dfo * tl.load(u + r * P + pb)[None, :], 1)
        f = tl.load(kept_f + (i * N + r) * C * V + pc)
        vv = tl.load(v + bv + pv, mask=inside[:, None], other=0.0).to(tl.float32)
        e = error(f, kk.to(tl.float32), vv, g, b, true, VT, NORM, RESIDUAL, L2)
        tl.store(e_turn + pc, e.to(DT))
        tl.debug_barrier()
        ec, dfc = tl.load(e_turn + pc), tl.load(o_turn + pc)

        # d_q, and of row, rate and Lam
        to = d_coef + cell * 6 * C + oc
        qf = tl.load(q + bk + pk, mask=inside[:, None], other=0.0).to(tl.float32)
        dq = tl.dot(dfc, tl.trans(tl.load(w_in + pw).to(DT)), input_precision=IP)
        if lam is not None:
            d_A += tl.sum(dq * qf, 1)
            dq *= cA[:, None]
        tl.store(to + C, d_A)
        if s is not None:
            m = tl.dot(dfc, tl.trans(tl.load(s_in + pw).to(DT)), input_precision=IP)
            tl.store(to + 2 * C, d_cs + tl.sum(m * qf, 1))
            dq += m * cs[:, None]
        else:
            tl.store(to + 2 * C, d_A * 0)
        if u is not None:
            m = tl.dot(dfc, tl.trans(tl.load(u + r * P + pw).to(DT)), input_precision=IP)
            tl.store(to + 3 * C, d_cu + tl.sum(m * qf, 1))
            dq += m * cu[:, None]
        else:
            tl.store(to + 3 * C, d_A * 0)
        p = -tl.dot(dfc, tl.load(e_turn + pct), input_precision=IP)
        a = tl.dot(qq, tl.trans(kk), input_precision=IP)
        if BIAS:
            a += 1
        d_row, d_rate = rate_backward(p * a, here, row, rate, d_here, oc, C, False)
        tl.store(to, d_row)
        p = (masked(p, here, row, oc, C) * rate[None, :]).to(DT)
        dq = tl.dot(p, kk, dq, input_precision=IP)
        if RESIDUAL:
            dq += tl.load(d_o + bv + pv, mask=inside[:, None], other=0.0).to(tl.float32)
        tl.store(d_q + bk + pk, dq, mask=inside[:, None])
        tl.debug_barrier()

        # d_E and d_k, but for d_f
        a = tl.dot(kk, tl.trans(qq), input_precision=IP)
        if BIAS:
            a += 1
        d_e = tl.dot(masked_t(a, here, row, oc, C).to(DT), dfc, input_precision=IP)
        d_e *= -rate[:, None]
        Dc = tl.load(d_w + r * P + pw).to(DT)
        m = tl.dot(kk, Dc, input_precision=IP)
        if BIAS:
            m += tl.load(d_w + r * P + pb)[None, :]
        ef = tl.load(e_turn + pc).to(tl.float32)
        d_e -= wr * m
        d_wr = -tl.sum(ef * m, 1)
        d_rate += d_wr * wl
        tl.store(to + 4 * C, d_wr * rate)
        p = -tl.dot(ec, tl.load(o_turn + pct), input_precision=IP)
        p = (masked_t(p, here, row, oc, C) * rate[:, None]).to(DT)
        dk = tl.dot(p, qq, input_precision=IP)
        dk = tl.dot((ef * -wr).to(DT), tl.trans(Dc), dk, input_precision=IP)
        if s is not None:
            Gc = tl.load(d_s + r * P + pw).to(DT)
            m = tl.dot(kk, Gc, input_precision=IP)
            if BIAS:
                m += tl.load(d_s + r * P + pb)[None, :]
            d_e -= tr * m
            d_tr = -tl.sum(ef * m, 1)
            dk = tl.dot((ef * -tr).to(DT), tl.trans(Gc), dk, input_precision=IP)
            d_rate += d_tr * tl_
            tl.store(to + 5 * C, d_tr * rate)
        else:
            tl.store(to + 5 * C, d_row * 0)
        tl.store(d_rates + cell * C + oc, d_rate)
        tl.debug_barrier()

        # d_f
        f = tl.load(kept_f + (i * N + r) * C * V + pc)
        vv = tl.load(v + bv + pv, mask=inside[:, None], other=0.0).to(tl.float32)
        if NORM:
            g, b = tl.load(gamma + r * V + ov), tl.load(beta + r * V + ov)
        kf = tl.load(k + bk + pk, mask=inside[:, None], other=0.0).to(tl.float32)
        d_f, d_y, d_g, d_b = error_backward(d_e, f, kf, vv, g, b, true, VT, NORM, RESIDUAL, L2)
        if NORM:
            old = tl.load(d_gamma + r * V + ov)
            tl.store(d_gamma + r * V + ov, old + d_g)
            if L2:
                old = tl.load(d_beta + r * V + ov)
                tl.store(d_beta + r * V + ov, old + d_b)
        tl.store(d_v + bv + pv, -d_y, mask=inside[:, None])
        if RESIDUAL and L2:
            dk += d_y
        d_fc = d_f.to(DT)
        dk = tl.dot(d_fc, tl.trans(tl.load(w_in + pw).to(DT)), dk, input_precision=IP)
        tl.store(d_k + bk + pk, dk, mask=inside[:, None])
        tl.debug_barrier()

        # the weights
        qt = tl.load(q + bk + pkt, mask=inside[None, :], other=0.0)
        kt = tl.load(k + bk + pkt, mask=inside[None, :], other=0.0)
        dfo = tl.load(o_turn + pc).to(tl.float32)
        new = tl.dot(kt, d_fc, input_precision=IP)
        new = tl.dot(qt, (dfo * cA[:, None]).to(DT), new, input_precision=IP)
        D = tl.load(d_w + r * P + pw)
        if FULL:
            if lam is not None:
                n_A += tl.sum(D * tl.load(w_in + pw))
            new += A_end * D
        if u is not None:
            n_u += tl.sum(D * tl.load(u + r * P + pw))
            m = tl.dot(qt, (dfo * cu[:, None]).to(DT), input_precision=IP)
            tl.store(d_u + r * P + pw, u_end * D + m)
        if s is not None:
            S = tl.load(s_in + pw)
            n_s += tl.sum(D * S)
            G = tl.load(d_s + r * P + pw)
            n_t += tl.sum(G * S)
            G = theta * G + s_end * D
            G += tl.dot(qt, (dfo * cs[:, None]).to(DT), input_precision=IP)
            tl.store(d_s + r * P + pw, G)
        tl.store(d_w + r * P + pw, new)
        if BIAS:
            Db = tl.load(d_w + r * P + pb)
            new_b = tl.sum(d_f, 0) + tl.sum(dfo * cA[:, None], 0)
            if FULL:
                if lam is not None:
                    n_A += tl.sum(Db * tl.load(w_in + pb))
                new_b += A_end * Db
            if u is not None:
                n_u += tl.sum(Db * tl.load(u + r * P + pb))
                tl.store(d_u + r * P + pb, u_end * Db + tl.sum(dfo * cu[:, None], 0))
            if s is not None:
                sb, Gb = tl.load(s_in + pb), tl.load(d_s + r * P + pb)
                n_s += tl.sum(Db * sb)
                n_t += tl.sum(Gb * sb)
                Gb = theta * Gb + s_end * Db + tl.sum(dfo * cs[:, None], 0)
                tl.debug_barrier()
                tl.store(d_s + r * P + pb, Gb)
            tl.debug_barrier()
            tl.store(d_w + r * P + pb, new_b)
        pe = d_ends + cell * 4
        tl.store(pe, n_A)
        tl.store(pe + 1, n_s)
        tl.store(pe + 2, n_u)
        tl.store(pe + 3, n_t)
        tl.debug_barrier()  # the mini-batch before reads what this one wrote
