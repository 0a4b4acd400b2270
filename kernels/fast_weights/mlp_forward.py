"""A two-layer MLP trained while it reads, forward: one program works off one head's mini-batches.

With c = (A, s, u) the tokens' coefficients of W, S and U, X = act(k W0 + b0), f = X W1 + b1:

    E1 = dLoss/df,   E0 = (E1 W1^T) act'(k W0 + b0)
    y = act(sum_c c (q B0 + b0) - (L0 * (q k^T + 1)) E0)          (B: W, S, U; the 1 with biases)
    f' = sum_c c (y B1 + b1) - (L1 * (y X^T + 1)) E1,   o = [q +] [LN] f'
    W0' = A_end W0 + s_end S0 + u_end U0 - k^T (w E0),   S0' = theta S0 - k^T (t E0),   1 alike

The float32 weights of a head are one row of P numbers in global memory, which stays in the L2
cache: W0 `[K, F]`, W1^T `[V, F]`, b0 `[F]`, b1 `[V]`. The hidden dimension is tiled, and always
last: so that no product needs the transpose of a product as its left operand, which
Triton gets wrong on Hopper.
"""

# Types of Triton's language are not Python's:

from __future__ import annotations

import triton
import triton.language as tl

from .parts import act, act_slope, error, masked, normal


@triton.jit(do_not_specialize=["T", "first", "NB", "STEP", "n"])
def mlp_forward(
    q, k, v, rates, coef, ends, lam, gamma, beta, w, s, u, o, turn,
    kept_f, kept_o, kept_a, T, first, NB, STEP, n,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, F: tl.constexpr, C: tl.constexpr,
    FT: tl.constexpr, VT: tl.constexpr, M: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr,
    RESIDUAL: tl.constexpr, L2: tl.constexpr, TANH: tl.constexpr, FULL: tl.constexpr,
    GUARD: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """Mini-batches first .. first + NB - 1 of n tokens each. w, s: `[slots, N, P]`: the weights
    are read from slot 0 and written to slot 1 at first, then to STEP slots further each time. u:
    `[N, P]`, None at the start of a mini-batch. kept: f, f' and y X^T of every mini-batch, for
    the backward pass, or None. Scratch: turn `[N, C (3 V + 2 K + C)]`."""
    P: tl.constexpr = (K + V) * F + (F + V if BIAS else 0)
    B0: tl.constexpr = (K + V) * F
    N = tl.num_programs(0)
    r = tl.program_id(0).to(tl.int64)
    slot = N.to(tl.int64) * P
    oc, ok, ov, of = tl.arange(0, C), tl.arange(0, K), tl.arange(0, V), tl.arange(0, FT)
    DT: tl.constexpr = q.dtype.element_ty
    true = None if VT == V else (ov < VT)[None, :]
    pk = oc[:, None] * (H * K) + ok[None, :]
    pv = oc[:, None] * (H * V) + ov[None, :]
    pc = oc[:, None] * V + ov[None, :]
    pct = oc[None, :] * V + ov[:, None]
    pa = oc[:, None] * C + oc[None, :]
    pd = oc[:, None] * K + ok[None, :]
    pdt = oc[None, :] * K + ok[:, None]
    e_turn = turn + r * (C * (3 * V + 2 * K + C))
    k_turn = e_turn + 3 * C * V
    a_turn = k_turn + 2 * C * K
    inside = oc < n
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
        cell = at.to(tl.int64) * N + r
        c = coef + cell * 6 * C + oc
        row, cA, wl = tl.load(c), tl.load(c + C), tl.load(c + 4 * C)
        rate0 = tl.load(rates + cell * M * C + oc)
        rate1 = tl.load(rates + cell * M * C + (M - 1) * C + oc)
        A_end = tl.load(ends + cell * 4)

        # Left operands of the loops over hidden tiles wait in memory: loaded, they come from
        # shared memory, and computed ones would fill registers. Tokens' rates scale them: E0 and X
        # enter their products as they are, rounded and laid out once.
        w0s, w1s = (wl * rate0)[:, None], (wl * rate1)[:, None]
        tl.store(k_turn + pd, (kk * w0s).to(DT))
        if s is not None:
            cs, tl_ = tl.load(c + 2 * C), tl.load(c + 5 * C)
            t0s, t1s = (tl_ * rate0)[:, None], (tl_ * rate1)[:, None]
            tl.store(k_turn + C * K + pd, (kk * t0s).to(DT))
        here = None if lam is None else lam + cell * C * C
        p = tl.dot(qq, tl.trans(kk), input_precision=IP)
        if BIAS:
            p += 1
        tl.store(a_turn + pa, (masked(p, here, row, oc, C) * rate0[None, :]).to(DT))

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
        if NORM:
            g, b = tl.load(gamma + r * V + ov), tl.load(beta + r * V + ov)
        else:
            g, b = None, None
        e1 = error(f, kk.to(tl.float32), vv, g, b, true, VT, NORM, RESIDUAL, L2)
        if kept_f is not None:
            tl.store(kept_f + (i * N + r) * C * V + pc, f)
        tl.store(e_turn + pc, e1.to(DT))
        tl.store(e_turn + C * V + pc, (e1 * w1s).to(DT))
        if s is not None:
            tl.store(e_turn + 2 * C * V + pc, (e1 * t1s).to(DT))
        tl.debug_barrier()
        e1c, etw = tl.load(e_turn + pc), tl.load(e_turn + C * V + pct)
        ktw, a0 = tl.load(k_turn + pdt), tl.load(a_turn + pa)
        if s is not None:
            ett, ktt = tl.load(e_turn + 2 * C * V + pct), tl.load(k_turn + C * K + pdt)
            s_end, theta = tl.load(ends + cell * 4 + 1), tl.load(ends + cell * 4 + 3)
        if u is not None:
            cu, u_end = tl.load(c + 3 * C), tl.load(ends + cell * 4 + 2)

        out = tl.zeros([C, V], dtype=tl.float32)
        a1 = tl.zeros([C, C], dtype=tl.float32)
        if BIAS:
            pb1 = B0 + F + ov
            b1 = tl.load(w_in + pb1)
            out += b1[None, :] if lam is None else cA[:, None] * b1[None, :]
            end = -tl.sum(e1 * w1s, 0)
            if FULL:
                end += A_end * b1
            if s is not None:
                sv = tl.load(s_in + pb1)
                out += cs[:, None] * sv[None, :]
                end += s_end * sv
                mom1 = theta * sv - tl.sum(e1 * t1s, 0)
            if u is not None:
                uv = tl.load(u + pb1)
                out += cu[:, None] * uv[None, :]
                end += u_end * uv
            tl.debug_barrier()
            tl.store(w_out + pb1, end)
            if s is not None:
                tl.store(s_out + pb1, mom1)
        for j in range(0, F, FT):
            p0 = ok[:, None] * F + (j + of)[None, :]
            p1 = K * F + ov[:, None] * F + (j + of)[None, :]
            pb = B0 + j + of
            w0c, w1c = tl.load(w_in + p0).to(DT), tl.load(w_in + p1).to(DT)
            z = tl.dot(kk, w0c, input_precision=IP)
            if BIAS:
                b0 = tl.load(w_in + pb)
                z += b0[None, :]
            y = tl.dot(qq, w0c, input_precision=IP)
            if BIAS:
                y += b0[None, :]
            if lam is not None:  # else A is 1
                y *= cA[:, None]
            if s is not None:
                s1c = tl.load(s_in + p1).to(DT)
                m = tl.dot(qq, tl.load(s_in + p0).to(DT), input_precision=IP)
                if BIAS:
                    sb = tl.load(s_in + pb)
                    m += sb[None, :]
                y += m * cs[:, None]
            if u is not None:
                m = tl.dot(qq, tl.load(u + p0).to(DT), input_precision=IP)
                if BIAS:
                    ub = tl.load(u + pb)
                    m += ub[None, :]
                y += m * cu[:, None]
            xx, slope = act_slope(z, TANH)
            xc = xx.to(DT)
            e0 = tl.dot(e1c, w1c, input_precision=IP) * slope
            e0c = e0.to(DT)
            y = act(y - tl.dot(a0, e0c, input_precision=IP), TANH)
            a1 = tl.dot(y.to(DT), tl.trans(xc), a1, input_precision=IP)
            yA = y if lam is None else y * cA[:, None]
            out = tl.dot(yA.to(DT), tl.trans(w1c), out, input_precision=IP)
            if s is not None:
                out = tl.dot((y * cs[:, None]).to(DT), tl.trans(s1c), out, input_precision=IP)
            if u is not None:
                u1c = tl.load(u + p1).to(DT)
                out = tl.dot((y * cu[:, None]).to(DT), tl.trans(u1c), out, input_precision=IP)

            # All of the tile is read before it is written, maybe in place: on NVIDIA's it has gone
            # through shared memory, behind its barriers; one more would keep the next tile from
            # being loaded meanwhile. Each thread reads again what it writes: float32 weights
            # would fill the registers.
            if GUARD:
                tl.debug_barrier()
            new = -tl.dot(ktw, e0c, input_precision=IP)
            if FULL:
                new += A_end * tl.load(w_in + p0)
            if u is not None:
                new += u_end * tl.load(u + p0)
            if s is not None:
                old = tl.load(s_in + p0)
                new += s_end * old
                mom = theta * old - tl.dot(ktt, e0c, input_precision=IP)
                tl.store(s_out + p0, mom)
            tl.store(w_out + p0, new)
            new = -tl.dot(etw, xc, input_precision=IP)
            if FULL:
                new += A_end * tl.load(w_in + p1)
            if u is not None:
                new += u_end * tl.load(u + p1)
            if s is not None:
                old = tl.load(s_in + p1)
                new += s_end * old
                mom = theta * old - tl.dot(ett, xc, input_precision=IP)
                tl.store(s_out + p1, mom)
            tl.store(w_out + p1, new)
            if BIAS:
                end0 = -tl.sum(e0 * w0s, 0)
                if FULL:
                    end0 += A_end * b0
                if u is not None:
                    end0 += u_end * ub
                if s is not None:
                    end0 += s_end * sb
                    tl.store(s_out + pb, theta * sb - tl.sum(e0 * t0s, 0))
                tl.store(w_out + pb, end0)
        if kept_a is not None:
            tl.store(kept_a + (i * N + r) * C * C + pa, a1)
        if BIAS:
            a1 += 1
        e1r = (e1c * rate1[:, None]).to(DT)
        out -= tl.dot(masked(a1, here, row, oc, C).to(DT), e1r, input_precision=IP)
        if kept_o is not None:
            tl.store(kept_o + (i * N + r) * C * V + pc, out)
        if o is not None:
            if NORM:
                g, b = tl.load(gamma + r * V + ov), tl.load(beta + r * V + ov)
                out, _ = normal(out, true, VT)
                out = out * g[None, :] + b[None, :]
            if RESIDUAL:
                out += tl.load(q + bv + pv, mask=inside[:, None], other=0.0).to(tl.float32)
            tl.store(o + bv + pv, out.to(DT), mask=inside[:, None])
        w_in = w_out
        w_out += STEP * slot
        if s is not None:
            s_in = s_out
            s_out += STEP * slot
        tl.debug_barrier()  # the next mini-batch reads what this one wrote
