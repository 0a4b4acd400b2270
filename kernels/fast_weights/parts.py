"""Functions of Triton that the fast-weight kernels share: activations, LayerNorm, coefficients.

Tiles of tokens are `[C, ..]`. Columns of V beyond the true width VT are zero, in and out.
"""

# Types of Triton's language are not Python's:

from __future__ import annotations

import triton
import triton.language as tl

HALF = tl.constexpr(0.7071067811865476)
DENSITY = tl.constexpr(0.3989422804014327)
TANH_A = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi): gelu_tanh is x sigmoid(A (x + B x^3))
TANH_B = tl.constexpr(0.044715)
LOG_A = tl.constexpr(-2.302208198)  # -A log2(e)
LOG_AB = tl.constexpr(-0.1029432396)


@triton.jit
def tanh_sigmoid(x):
    """sigmoid(A (x + B x^3)). The square of 1 / sqrt is one instruction, and a division ten."""
    t = tl.math.rsqrt(1 + tl.exp2(x * (x * x * LOG_AB + LOG_A)))
    return t * t


@triton.jit
def act(x, TANH: tl.constexpr):
    """GELU, exact or by tanh."""
    if TANH:
        return x * tanh_sigmoid(x)
    else:
        return x * 0.5 * (1 + tl.erf(x * HALF))


@triton.jit
def act_slope(x, TANH: tl.constexpr):
    """GELU and its derivative."""
    if TANH:
        s = tanh_sigmoid(x)
        y = x * s
        return y, s + (y - y * s) * (x * x * (3 * TANH_A * TANH_B) + TANH_A)
    else:
        c = 0.5 * (1 + tl.erf(x * HALF))
        return x * c, c + x * tl.exp(-0.5 * x * x) * DENSITY


@triton.jit
def act_curve(x, TANH: tl.constexpr):
    """GELU and its first two derivatives."""
    if TANH:
        s = tanh_sigmoid(x)
        g = (x * x * (3 * TANH_B) + 1) * TANH_A
        d = s * (1 - s)
        bend = d * (2 * g + x * ((1 - 2 * s) * g * g + x * (6 * TANH_A * TANH_B)))
        return x * s, s + x * d * g, bend
    else:
        c = 0.5 * (1 + tl.erf(x * HALF))
        p = tl.exp(-0.5 * x * x) * DENSITY
        return x * c, c + x * p, (2 - x * x) * p


@triton.jit
def normal(f, true, VT: tl.constexpr):
    """(f - mean) / std over the true columns, and 1 / std `[C, 1]`. true: None if all are."""
    d = f - (tl.sum(f, 1) / VT)[:, None]
    if true is not None:
        d = tl.where(true, d, 0.0)
    r = tl.math.rsqrt(tl.sum(d * d, 1) / VT + 1e-6)[:, None]
    return d * r, r


@triton.jit
def norm_backward(g, x, r, true, VT: tl.constexpr):
    """The gradient of f, of g at the normal x = normal(f)."""
    mean = (tl.sum(g, 1) / VT)[:, None]
    slope = (tl.sum(g * x, 1) / VT)[:, None]
    y = r * (g - mean - x * slope)
    if true is not None:
        y = tl.where(true, y, 0.0)
    return y


@triton.jit
def error(
    f,
    k,
    v,
    gamma,
    beta,
    true,
    VT: tl.constexpr,
    NORM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    L2: tl.constexpr,
):
    """The error at f of the loss of M(k) = [k +] [LN] f against v."""
    if NORM:
        x, r = normal(f, true, VT)
        e = -v
        if L2:
            e += x * gamma[None, :] + beta[None, :]
            if RESIDUAL:
                e += k
        return norm_backward(e * gamma[None, :], x, r, true, VT)
    else:
        e = -v
        if L2:
            e += f
            if RESIDUAL:
                e += k
        return e


@triton.jit
def error_backward(
    d,
    f,
    k,
    v,
    gamma,
    beta,
    true,
    VT: tl.constexpr,
    NORM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    L2: tl.constexpr,
):
    """The gradients of f, of [k +] .. - v, of gamma and of beta, from d at the error.

    With x = normal(f), r = 1 / std, e = M(k) - v, g = gamma e, the error is
    E = r (g - mean(g) - x mean(g x)), which is linear in g by a symmetric map."""
    if NORM:
        x, r = normal(f, true, VT)
        e = -v
        if L2:
            e += x * gamma[None, :] + beta[None, :]
            if RESIDUAL:
                e += k
        g = e * gamma[None, :]
        E = norm_backward(g, x, r, true, VT)
        d_g = norm_backward(d, x, r, true, VT)
        d_e = d_g * gamma[None, :]
        gx = (tl.sum(g * x, 1) / VT)[:, None]
        dx = (tl.sum(d * x, 1) / VT)[:, None]
        d_x = -r * (d * gx + g * dx)
        d_gamma = tl.sum(d_g * e, 0)
        if L2:
            d_x += d_e * gamma[None, :]
            d_gamma += tl.sum(d_e * x, 0)
        d_f = norm_backward(d_x, x, r, true, VT) - r * x * (tl.sum(d * E, 1) / VT)[:, None]
        return d_f, d_e, d_gamma, tl.sum(d_e, 0)
    else:
        zero = tl.sum(d, 0) * 0
        if L2:
            return d, d, zero, zero
        else:
            return d * 0, d, zero, zero


@triton.jit
def masked(x, lam, row, oc, C: tl.constexpr):
    """x[i, j] row_i Lam_ij: what token i reads of j's gradient, but for j's rate. lam: a pointer
    to Lam `[C, C]`, None for ones on and below the diagonal."""
    if lam is None:
        return tl.where(oc[:, None] >= oc[None, :], x * row[:, None], 0.0)
    else:
        return x * tl.load(lam + oc[:, None] * C + oc[None, :]) * row[:, None]


@triton.jit
def masked_t(x, lam, row, oc, C: tl.constexpr):
    """x[j, i] row_i Lam_ij."""
    if lam is None:
        return tl.where(oc[:, None] <= oc[None, :], x * row[None, :], 0.0)
    else:
        return x * tl.load(lam + oc[None, :] * C + oc[:, None]) * row[None, :]
