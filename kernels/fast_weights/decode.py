"""One token without a gradient: a step of a program a head, of matrix-vector products in float32.

With the gates themselves in place of coefficients (r = 1 - decay, a = r A, m momentum, p row):

    y = act(a (q W0) + p r (q U0) + p m (q S0) - p lr0 (q.k + 1) E0)
    f' = a (y W1) + p r (y U1) + p m (y S1) - p lr1 (y.X + 1) E1
    U' = r U + S',  S' = m S - lr X^T E;   at the end of a mini-batch W' = a W + p U'

Weights are as in the state, `[N, I, O]`, with the bias as a last row. W is read twice, the second
time from the L2 cache; the rest once.
"""

# Types of Triton's language are not Python's:

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch
from .parts import act, act_slope, error, normal


@triton.jit
def gates_of(lr, momentum, decay, row, A, r, M: tl.constexpr):
    """lr of both matrices, m, r, a and p of the token; 0 and 1 where there are none."""
    lr0, lr1 = tl.load(lr + r * M), tl.load(lr + r * M + M - 1)
    m, keep, a, p = 0.0, 1.0, 1.0, 1.0
    if momentum is not None:
        m += tl.load(momentum + r)
    if decay is not None:
        keep -= tl.load(decay + r)
        a = keep
        if A is not None:
            a *= tl.load(A + r)
    if row is not None:
        p *= tl.load(row)
    return lr0, lr1, m, keep, a, p


@triton.jit
def entry(w, u, s, new, new_s, at, mask, x, e, lr, m, keep, a, p, FULL: tl.constexpr):
    """Writes of U' (W' if FULL) and S', for gradients x e."""
    step = -lr * x * e
    if s is not None:
        step += m * tl.load(s + at, mask=mask, other=0.0)
        tl.store(new_s + at, step, mask=mask)
    if u is not None:
        step += keep * tl.load(u + at, mask=mask, other=0.0)
    if FULL:
        step = p * step + a * tl.load(w + at, mask=mask, other=0.0)
    tl.store(new + at, step, mask=mask)


@triton.jit
def mlp_step(
    q, k, v, lr, momentum, decay, row, A, gamma, beta, w0, w1, u0, u1, s0, s1, o,
    n0, n1, m0, m1,
    K: tl.constexpr, V: tl.constexpr, F: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr,
    FT: tl.constexpr, M: tl.constexpr, BIAS: tl.constexpr, NORM: tl.constexpr,
    RESIDUAL: tl.constexpr, L2: tl.constexpr, TANH: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    ok, ov, of = tl.arange(0, KP), tl.arange(0, VP), tl.arange(0, FT)
    in_k, in_v = ok < K, ov < V
    true = None if VP == V else in_v[None, :]
    kk = tl.load(k + r * K + ok, mask=in_k, other=0.0).to(tl.float32)
    qq = tl.load(q + r * K + ok, mask=in_k, other=0.0).to(tl.float32)
    vv = tl.load(v + r * V + ov, mask=in_v, other=0.0).to(tl.float32)[None, :]
    g, b = None, None
    if NORM:
        g = tl.load(gamma + r * V + ov, mask=in_v, other=0.0)
        b = tl.load(beta + r * V + ov, mask=in_v, other=0.0)
    kv, qv = None, None
    if RESIDUAL:
        kv = tl.load(k + r * K + ov, mask=in_v, other=0.0).to(tl.float32)[None, :]
        qv = tl.load(q + r * K + ov, mask=in_v, other=0.0).to(tl.float32)[None, :]
    lr0, lr1, m, keep, a, p = gates_of(lr, momentum, decay, row, A, r, M)
    P0: tl.constexpr = (K + BIAS) * F
    P1: tl.constexpr = (F + BIAS) * V
    w0 += r * P0
    w1 += r * P1
    n0 += r * P0
    n1 += r * P1
    if u0 is not None:
        u0 += r * P0
        u1 += r * P1
    if s0 is not None:
        s0 += r * P0
        s1 += r * P1
        m0 += r * P0
        m1 += r * P1

    f = tl.zeros([VP], dtype=tl.float32)
    for j in range(0, F, FT):
        in_f = j + of < F
        a0 = ok[:, None] * F + (j + of)[None, :]
        a1 = (j + of)[:, None] * V + ov[None, :]
        W0 = tl.load(w0 + a0, mask=in_k[:, None] & in_f[None, :], other=0.0)
        W1 = tl.load(w1 + a1, mask=in_f[:, None] & in_v[None, :], other=0.0)
        z = tl.sum(W0 * kk[:, None], 0)
        if BIAS:
            z += tl.load(w0 + K * F + j + of, mask=in_f, other=0.0)
        f += tl.sum(W1 * act(z, TANH)[:, None], 0)
    if BIAS:
        b1 = tl.load(w1 + F * V + ov, mask=in_v, other=0.0)
        f += b1
    e1 = error(f[None, :], kv, vv, g, b, true, V, NORM, RESIDUAL, L2)
    e1 = tl.sum(e1, 0)

    out = tl.zeros([VP], dtype=tl.float32)
    c0 = tl.sum(qq * kk, 0)
    c1 = 0.0
    if BIAS:
        c0 += 1
        c1 += 1
    for j in range(0, F, FT):
        in_f = j + of < F
        a0 = ok[:, None] * F + (j + of)[None, :]
        a1 = (j + of)[:, None] * V + ov[None, :]
        in0, in1 = in_k[:, None] & in_f[None, :], in_f[:, None] & in_v[None, :]
        W0 = tl.load(w0 + a0, mask=in0, other=0.0)
        W1 = tl.load(w1 + a1, mask=in1, other=0.0)
        z, y = tl.sum(W0 * kk[:, None], 0), tl.sum(W0 * qq[:, None], 0)
        pb = K * F + j + of
        if BIAS:
            b0 = tl.load(w0 + pb, mask=in_f, other=0.0)
            z += b0
            y += b0
        x, slope = act_slope(z, TANH)
        e0 = tl.sum(W1 * e1[None, :], 1) * slope
        y *= a
        if u0 is not None:
            U0 = tl.load(u0 + a0, mask=in0, other=0.0)
            y += p * keep * tl.sum(U0 * qq[:, None], 0)
            if BIAS:
                y += p * keep * tl.load(u0 + pb, mask=in_f, other=0.0)
        if s0 is not None:
            S0 = tl.load(s0 + a0, mask=in0, other=0.0)
            y += p * m * tl.sum(S0 * qq[:, None], 0)
            if BIAS:
                y += p * m * tl.load(s0 + pb, mask=in_f, other=0.0)
        y = act(y - p * lr0 * c0 * e0, TANH)
        c1 += tl.sum(x * y, 0)
        out += a * tl.sum(W1 * y[:, None], 0)
        if u0 is not None:
            U1 = tl.load(u1 + a1, mask=in1, other=0.0)
            out += p * keep * tl.sum(U1 * y[:, None], 0)
        if s0 is not None:
            S1 = tl.load(s1 + a1, mask=in1, other=0.0)
            out += p * m * tl.sum(S1 * y[:, None], 0)
        entry(w0, u0, s0, n0, m0, a0, in0, kk[:, None], e0[None, :], lr0, m, keep, a, p, FULL)
        entry(w1, u1, s1, n1, m1, a1, in1, x[:, None], e1[None, :], lr1, m, keep, a, p, FULL)
        if BIAS:
            entry(w0, u0, s0, n0, m0, pb, in_f, 1.0, e0, lr0, m, keep, a, p, FULL)
    if BIAS:
        pb = F * V + ov
        out += a * b1
        if u0 is not None:
            out += p * keep * tl.load(u1 + pb, mask=in_v, other=0.0)
        if s0 is not None:
            out += p * m * tl.load(s1 + pb, mask=in_v, other=0.0)
        entry(w1, u1, s1, n1, m1, pb, in_v, 1.0, e1, lr1, m, keep, a, p, FULL)
    out -= p * lr1 * c1 * e1
    finish(out, qv, g, b, true, o + r * V, in_v, V, NORM, RESIDUAL)


@triton.jit
def finish(
    out, qv, g, b, true, o, in_v, V: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr
):
    """The output, [q +] [LN] out."""
    y = out[None, :]
    if NORM:
        y, _ = normal(y, true, V)
        y = y * g[None, :] + b[None, :]
    if RESIDUAL:
        y += qv
    ov = tl.arange(0, out.shape[0])
    tl.store(o + ov, tl.sum(y, 0).to(o.dtype.element_ty), mask=in_v)


@triton.jit
def linear_step(
    q, k, v, lr, momentum, decay, row, A, gamma, beta, w, u, s, o, new, new_s,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr,
    BIAS: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr, L2: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    ok, ov = tl.arange(0, KP), tl.arange(0, VP)
    in_k, in_v = ok < K, ov < V
    true = None if VP == V else in_v[None, :]
    kk = tl.load(k + r * K + ok, mask=in_k, other=0.0).to(tl.float32)
    qq = tl.load(q + r * K + ok, mask=in_k, other=0.0).to(tl.float32)
    vv = tl.load(v + r * V + ov, mask=in_v, other=0.0).to(tl.float32)[None, :]
    g, b = None, None
    if NORM:
        g = tl.load(gamma + r * V + ov, mask=in_v, other=0.0)
        b = tl.load(beta + r * V + ov, mask=in_v, other=0.0)
    kv, qv = None, None
    if RESIDUAL:
        kv = tl.load(k + r * K + ov, mask=in_v, other=0.0).to(tl.float32)[None, :]
        qv = tl.load(q + r * K + ov, mask=in_v, other=0.0).to(tl.float32)[None, :]
    rate, _, m, keep, a, p = gates_of(lr, momentum, decay, row, A, r, 1)
    P: tl.constexpr = (K + BIAS) * V
    at = ok[:, None] * V + ov[None, :]
    inside = in_k[:, None] & in_v[None, :]
    pb = K * V + ov
    w += r * P
    new += r * P
    W = tl.load(w + at, mask=inside, other=0.0)
    f, out = tl.sum(W * kk[:, None], 0), tl.sum(W * qq[:, None], 0)
    c = tl.sum(qq * kk, 0)
    if BIAS:
        bias = tl.load(w + pb, mask=in_v, other=0.0)
        f += bias
        out += bias
        c += 1
    out *= a
    e = tl.sum(error(f[None, :], kv, vv, g, b, true, V, NORM, RESIDUAL, L2), 0)
    if u is not None:
        u += r * P
        out += p * keep * tl.sum(tl.load(u + at, mask=inside, other=0.0) * qq[:, None], 0)
        if BIAS:
            out += p * keep * tl.load(u + pb, mask=in_v, other=0.0)
    if s is not None:
        s += r * P
        new_s += r * P
        out += p * m * tl.sum(tl.load(s + at, mask=inside, other=0.0) * qq[:, None], 0)
        if BIAS:
            out += p * m * tl.load(s + pb, mask=in_v, other=0.0)
    entry(w, u, s, new, new_s, at, inside, kk[:, None], e[None, :], rate, m, keep, a, p, FULL)
    if BIAS:
        entry(w, u, s, new, new_s, pb, in_v, 1.0, e, rate, m, keep, a, p, FULL)
    out -= p * rate * c * e
    finish(out, qv, g, b, true, o + r * V, in_v, V, NORM, RESIDUAL)


def step(
    q: Tensor, k: Tensor, v: Tensor, lr: Tensor, momentum: Any, decay: Any, row: Any,
    layer_norm: Any, rule: Any, state: dict[str, Any],
) -> tuple[Tensor, dict[str, Any]]:  # fmt: skip
    """`_run` of T = 1."""
    B, _, H, K = q.shape
    V, network, C = v.shape[-1], rule.network, rule.mini_batch
    past = int(state["position"]) if "position" in state else 0
    begun, full = past % C > 0, (past + 1) % C == 0

    def rows(weights: Any) -> list[Tensor]:
        return [w.float().contiguous() for w in weights]

    W = rows(state["weights"])
    U = rows(state["updates"]) if begun else [None] * len(W)
    S = rows(state["momentum"]) if "momentum" in state else [None] * len(W)
    new = [launch.empty(w.shape, like=w) for w in W]
    new_S = [launch.empty(w.shape, like=w) if "momentum" in state else None for w in W]
    o = launch.empty(v.shape, like=q)
    flat = (None if x is None else x.float().contiguous() for x in (lr, momentum, decay))
    A = state["retention"].float().contiguous() if begun and "retention" in state else None
    norm = (None, None)
    if layer_norm is not None:
        norm = tuple(x.float().contiguous() for x in layer_norm)
    part = None if row is None else row[past % C : past % C + 1].float().clone()
    common = {
        "K": K, "V": V, "KP": launch.power_of_two(K), "VP": launch.power_of_two(V),
        "BIAS": network.bias, "NORM": network.layer_norm, "RESIDUAL": network.residual,
        "L2": rule.objective.name == "l2", "FULL": full,
    }  # fmt: skip
    given = [*(x.contiguous() for x in (q, k, v)), *flat, part, A, *norm]
    kernel = linear_step
    if len(W) == 2:
        kernel, F = mlp_step, W[0].shape[-1]
        common |= {"F": F, "FT": min(64, launch.power_of_two(F)), "M": lr.shape[3],
                   "TANH": network.activation == "gelu_tanh"}  # fmt: skip
    launch.launch(
        kernel, (B * H,), *given, *W, *U, *S, o, *new, *new_S, num_warps=8, num_stages=2, **common
    )
    like = state["weights"]
    after = dict(state)
    after["weights" if full else "updates"] = tuple(new)
    if full and "updates" in state:
        after["updates"] = tuple(map(torch.zeros_like, like))
    if "momentum" in state:
        after["momentum"] = tuple(new_S)
    if "retention" in state:
        if full:
            after["retention"] = torch.ones_like(state["retention"])
        else:
            keep = 1 - decay.float()[:, 0]
            after["retention"] = keep if A is None else keep * A
    if "position" in state:
        after["position"] = torch.full_like(state["position"], past + 1)
    return o, after
