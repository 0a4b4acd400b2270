"""A two-layer MLP trained while it reads, forward: one program works off one head's mini-batches.

With c = (A, s, u) the tokens' coefficients of W, S and U, X = act(k W0 + b0), f = X W1 + b1:

    E1 = dLoss/df,   E0 = (E1 W1^T) act'(k W0 + b0)
    y = act(sum_c c (q B0 + b0) - (L0 * (q k^T + 1)) E0)          (B: W, S, U; the 1 with biases)
    f' = sum_c c (y B1 + b1) - (L1 * (y X^T + 1)) E1,   o = [q +] [LN] f'
    W0' = A_end W0 + s_end S0 + u_end U0 - k^T (w E0),   S0' = theta S0 - k^T (t E0);  W1', S1' alike

The float32 weights of a head are one row of P numbers in global memory, which stays in the L2
cache: W0 `[K, F]`, W1^T `[V, F]`, b0 `[F]`, b1 `[V]`. The hidden dimension is tiled, and always
last: so that no product needs the transpose of a product as its left operand, which
Triton gets wrong on Hopper.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .parts import act, act_slope, error, normal, write_table


@triton.jit(do_not_specialize=["T", "first", "NB", "STEP"])
def mlp_forward(
    q, k, v, rates, coef, ends, lam, gamma, beta, w, s, u, o, turn,
    kept_f, kept_o, kept_a, T, first, NB, STEP, n,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, F: tl.constexpr, C: tl.constexpr,
    FT: tl.constexpr, VT: tl.constexpr, M: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr,
    RESIDUAL: tl.constexpr, L2: tl.constexpr, TANH: tl.constexpr, FULL: tl.constexpr,
    IP: tl.constexpr,
):  # fmt: skip
    """Mini-batches first .. first + NB - 1 of n tokens each. w, s: `[slots, N, P]`: the weights
    are read from slot 0 and written to slot 1 at first, then to STEP slots further each time. u:
    `[N, P]`, None at the start of a mini-batch. turn `[N, C, V]` turns a tile. kept: f, f' and
    y X^T of every mini-batch, for the backward pass, or None."""
    P: tl.constexpr = (K + V) * F + (F + V if BIAS else 0)
    B0: tl.constexpr = (K + V) * F
    N = tl.num_programs(0)
    r = tl.program_id(0).to(tl.int64)
    slot = N.to(tl.int64) * P
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
    w_in = w + r * P
    w_out = w_in + slot
    if s is not None:
        s_in = s + r * P
        s_out = s_in + slot
    if u is not None:
        u += r * P
    for i in range(0, NB):
        at = first + i
        x = ((r // H) * T + at * n) * H + r % H
        bk, bv = x * K, x * V  # the tile's first number; within it 32 bits do
        kk = tl.load(k + bk + pk, mask=inside[:, None], other=0.0)
        qq = tl.load(q + bk + pk, mask=inside[:, None], other=0.0)
        vv = tl.load(v + bv + pv, mask=inside[:, None], other=0.0).to(tl.float32)
        kt = tl.load(k + bk + pkt, mask=inside[None, :], other=0.0)
        cell = at.to(tl.int64) * N + r
        c = coef + cell * 6 * C + oc
        row, cA, wl = tl.load(c), tl.load(c + C), tl.load(c + 4 * C)
        rate0 = tl.load(rates + cell * M * C + oc)
        rate1 = tl.load(rates + cell * M * C + (M - 1) * C + oc)
        A_end = tl.load(ends + cell * 4)

        f = tl.zeros([C, V], dtype=tl.float32)
        for j in range(0, F, FT):
            w0 = tl.load(w_in + ok[:, None] * F + (j + of)[None, :]).to(DT)
            w1 = tl.load(w_in + K * F + ov[:, None] * F + (j + of)[None, :]).to(DT)
            z = tl.dot(kk, w0, input_precision=IP)
            if BIAS:
                z += tl.load(w_in + B0 + j + of)[None, :]
            f = tl.dot(act(z, TANH).to(DT), tl.trans(w1), f, input_precision=IP)
        if BIAS:
            f += tl.load(w_in + B0 + F + ov)[None, :]
        e1 = error(f, kk.to(tl.float32), vv, g, b, true, VT, NORM, RESIDUAL, L2)
        if kept_f is not None:
            tl.store(kept_f + (i * N + r) * C * V + oc[:, None] * V + ov[None, :], f)
        e1c = e1.to(DT)
        tl.store(turn + r * C * V + oc[:, None] * V + ov[None, :], e1c)
        tl.debug_barrier()
        et = tl.load(turn + r * C * V + oc[None, :] * V + ov[:, None])
        kw0 = (kt * (wl * rate0)[None, :]).to(DT)
        ew1 = (et * (wl * rate1)[None, :]).to(DT)
        if s is not None:
            cs, tl_ = tl.load(c + 2 * C), tl.load(c + 5 * C)
            kt0 = (kt * (tl_ * rate0)[None, :]).to(DT)
            et1 = (et * (tl_ * rate1)[None, :]).to(DT)
            s_end, theta = tl.load(ends + cell * 4 + 1), tl.load(ends + cell * 4 + 3)
        if u is not None:
            cu, u_end = tl.load(c + 3 * C), tl.load(ends + cell * 4 + 2)
        here = None if lam is None else lam + cell * C * C
        table = write_table(here, row, rate0, oc, C, False)
        p = tl.dot(qq, tl.trans(kk), input_precision=IP)
        if BIAS:
            p += 1
        a0 = (p * table).to(DT)

        out = tl.zeros([C, V], dtype=tl.float32)
        a1 = tl.zeros([C, C], dtype=tl.float32)
        for j in range(0, F, FT):
            p0 = ok[:, None] * F + (j + of)[None, :]
            p1 = K * F + ov[:, None] * F + (j + of)[None, :]
            w0, w1 = tl.load(w_in + p0), tl.load(w_in + p1)
            w0c, w1c = w0.to(DT), w1.to(DT)
            z = tl.dot(kk, w0c, input_precision=IP)
            y = tl.dot(qq, w0c, input_precision=IP)
            if BIAS:
                b0 = tl.load(w_in + B0 + j + of)
                z += b0[None, :]
                y += b0[None, :]
            xx, slope = act_slope(z, TANH)
            xc = xx.to(DT)
            e0 = tl.dot(e1c, w1c, input_precision=IP) * slope
            e0c = e0.to(DT)
            y *= cA[:, None]
            if s is not None:
                s0, s1 = tl.load(s_in + p0), tl.load(s_in + p1)
                m = tl.dot(qq, s0.to(DT), input_precision=IP)
                if BIAS:
                    m += tl.load(s_in + B0 + j + of)[None, :]
                y += m * cs[:, None]
            if u is not None:
                u0, u1 = tl.load(u + p0), tl.load(u + p1)
                m = tl.dot(qq, u0.to(DT), input_precision=IP)
                if BIAS:
                    m += tl.load(u + B0 + j + of)[None, :]
                y += m * cu[:, None]
            y = act(y - tl.dot(a0, e0c, input_precision=IP), TANH)
            a1 = tl.dot(y.to(DT), tl.trans(xc), a1, input_precision=IP)
            out = tl.dot((y * cA[:, None]).to(DT), tl.trans(w1c), out, input_precision=IP)
            new0 = -tl.dot(kw0, e0c, input_precision=IP)
            new1 = -tl.dot(ew1, xc, input_precision=IP)
            if FULL:
                new0 += A_end * w0
                new1 += A_end * w1
            if s is not None:
                out = tl.dot((y * cs[:, None]).to(DT), tl.trans(s1.to(DT)), out, input_precision=IP)
                new0 += s_end * s0
                new1 += s_end * s1
                mom0 = theta * s0 - tl.dot(kt0, e0c, input_precision=IP)
                mom1 = theta * s1 - tl.dot(et1, xc, input_precision=IP)
            if u is not None:
                out = tl.dot((y * cu[:, None]).to(DT), tl.trans(u1.to(DT)), out, input_precision=IP)
                new0 += u_end * u0
                new1 += u_end * u1
            tl.debug_barrier()  # all of the tile is read before it is written, maybe in place
            tl.store(w_out + p0, new0)
            tl.store(w_out + p1, new1)
            if s is not None:
                tl.store(s_out + p0, mom0)
                tl.store(s_out + p1, mom1)
            if BIAS:
                pb = B0 + j + of
                new = -tl.sum(e0 * (wl * rate0)[:, None], 0)
                if FULL:
                    new += A_end * b0
                if s is not None:
                    sb = tl.load(s_in + pb)
                    new += s_end * sb
                    mom = theta * sb - tl.sum(e0 * (tl_ * rate0)[:, None], 0)
                if u is not None:
                    new += u_end * tl.load(u + pb)
                tl.debug_barrier()
                tl.store(w_out + pb, new)
                if s is not None:
                    tl.store(s_out + pb, mom)
        if kept_a is not None:
            tl.store(kept_a + (i * N + r) * C * C + oc[:, None] * C + oc[None, :], a1)
        if BIAS:
            pb = B0 + F + ov
            b1 = tl.load(w_in + pb)
            a1 += 1
            out += cA[:, None] * b1[None, :]
            new = -tl.sum(e1 * (wl * rate1)[:, None], 0)
            if FULL:
                new += A_end * b1
            if s is not None:
                sb = tl.load(s_in + pb)
                out += cs[:, None] * sb[None, :]
                new += s_end * sb
                mom = theta * sb - tl.sum(e1 * (tl_ * rate1)[:, None], 0)
            if u is not None:
                ub = tl.load(u + pb)
                out += cu[:, None] * ub[None, :]
                new += u_end * ub
            tl.debug_barrier()
            tl.store(w_out + pb, new)
            if s is not None:
                tl.store(s_out + pb, mom)
        table = write_table(here, row, rate1, oc, C, False)
        out -= tl.dot((a1 * table).to(DT), e1c, input_precision=IP)
        if kept_o is not None:
            tl.store(kept_o + (i * N + r) * C * V + oc[:, None] * V + ov[None, :], out)
        if o is not None:
            if NORM:
                out, _ = normal(out, true, VT)
                out = out * g[None, :] + b[None, :]
            if RESIDUAL:
                out += qq.to(tl.float32)
            tl.store(o + bv + pv, out.to(DT), mask=inside[:, None])
        w_in = w_out
        w_out += STEP * slot
        if s is not None:
            s_in = s_out
            s_out += STEP * slot
        tl.debug_barrier()  # the next mini-batch reads what this one wrote
