"""A linear map trained while it reads, forward: one program works off one head's mini-batches.

    E = dLoss/df at f = k W + b
    f' = sum_c c (q B + b) - (L * (q k^T + 1)) E,   o = [q +] [LN] f'     (B: W, S, U)
    W' = A_end W + s_end S + u_end U - k^T (w E),   S' = theta S - k^T (t E)

Weights as in `mlp_forward`: one row a head, W `[K, V]`, b `[V]`.
"""

# Types of Triton's language are not Python's:

from __future__ import annotations

import triton
import triton.language as tl

from .parts import error, masked, normal


@triton.jit(do_not_specialize=["T", "first", "NB", "STEP", "n"])
def linear_forward(
    q, k, v, rates, coef, ends, lam, gamma, beta, w, s, u, o, kept_f, kept_o,
    T, first, NB, STEP, n,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, VT: tl.constexpr,
    BIAS: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, L2: tl.constexpr,
    FULL: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """Arguments as of `mlp_forward`."""
    P: tl.constexpr = K * V + (V if BIAS else 0)
    N = tl.num_programs(0)
    r = tl.program_id(0).to(tl.int64)
    slot = N.to(tl.int64) * P
    oc, ok, ov = tl.arange(0, C), tl.arange(0, K), tl.arange(0, V)
    DT: tl.constexpr = q.dtype.element_ty
    true = None if VT == V else (ov < VT)[None, :]
    pk = oc[:, None] * (H * K) + ok[None, :]
    pkt = oc[None, :] * (H * K) + ok[:, None]
    pv = oc[:, None] * (H * V) + ov[None, :]
    inside = oc < n
    pw = ok[:, None] * V + ov[None, :]
    w_out = w + r * P + slot
    W = tl.load(w + r * P + pw)
    if BIAS:
        bias = tl.load(w + r * P + K * V + ov)
    if s is not None:
        s_out = s + r * P + slot
        S = tl.load(s + r * P + pw)
        if BIAS:
            sb = tl.load(s + r * P + K * V + ov)
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
        rate = tl.load(rates + cell * C + oc)
        A_end = tl.load(ends + cell * 4)
        Wc = W.to(DT)
        f = tl.dot(kk, Wc, input_precision=IP)
        out = tl.dot(qq, Wc, input_precision=IP)
        if BIAS:
            f += bias[None, :]
            out += bias[None, :]
        out *= cA[:, None]
        if NORM:
            g, b = tl.load(gamma + r * V + ov), tl.load(beta + r * V + ov)
        else:
            g, b = None, None
        e = error(f, kk.to(tl.float32), vv, g, b, true, VT, NORM, RESIDUAL, L2)
        if kept_f is not None:
            tl.store(kept_f + (i * N + r) * C * V + oc[:, None] * V + ov[None, :], f)
        new = -tl.dot(kt, (e * (wl * rate)[:, None]).to(DT), input_precision=IP)
        if FULL:
            new += A_end * W
        if BIAS:
            new_b = -tl.sum(e * (wl * rate)[:, None], 0)
            if FULL:
                new_b += A_end * bias
        if s is not None:
            cs, tl_ = tl.load(c + 2 * C), tl.load(c + 5 * C)
            s_end, theta = tl.load(ends + cell * 4 + 1), tl.load(ends + cell * 4 + 3)
            m = tl.dot(qq, S.to(DT), input_precision=IP)
            new += s_end * S
            S = theta * S - tl.dot(kt, (e * (tl_ * rate)[:, None]).to(DT), input_precision=IP)
            if BIAS:
                m += sb[None, :]
                new_b += s_end * sb
                sb = theta * sb - tl.sum(e * (tl_ * rate)[:, None], 0)
            out += m * cs[:, None]
        if u is not None:
            cu, u_end = tl.load(c + 3 * C), tl.load(ends + cell * 4 + 2)
            U = tl.load(u + r * P + pw)
            m = tl.dot(qq, U.to(DT), input_precision=IP)
            new += u_end * U
            if BIAS:
                ub = tl.load(u + r * P + K * V + ov)
                m += ub[None, :]
                new_b += u_end * ub
            out += m * cu[:, None]
        here = None if lam is None else lam + cell * C * C
        p = tl.dot(qq, tl.trans(kk), input_precision=IP)
        if BIAS:
            p += 1
        er = (e * rate[:, None]).to(DT)
        out -= tl.dot(masked(p, here, row, oc, C).to(DT), er, input_precision=IP)
        if kept_o is not None:
            tl.store(kept_o + (i * N + r) * C * V + oc[:, None] * V + ov[None, :], out)
        if o is not None:
            if NORM:
                out, _ = normal(out, true, VT)
                out = out * g[None, :] + b[None, :]
            if RESIDUAL:
                out += tl.load(q + bv + pv, mask=inside[:, None], other=0.0).to(tl.float32)
            tl.store(o + bv + pv, out.to(DT), mask=inside[:, None])
        W = new
        if BIAS:
            bias = new_b
        if (STEP > 0) | (i == NB - 1):
            tl.store(w_out + pw, W)
            if BIAS:
                tl.store(w_out + K * V + ov, bias)
            w_out += STEP * slot
            if s is not None:
                tl.store(s_out + pw, S)
                if BIAS:
                    tl.store(s_out + K * V + ov, sb)
                s_out += STEP * slot
