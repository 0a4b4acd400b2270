"""Element-wise kernels on the tokens of a chunk, between the matrix products of a gated network.

Rows r are tokens of all rows N and chunks; z = [g | u], `[R, 2 F]`, are the pre-activations of
gate and up, s = silu; lr `[R, M]` the rates of matrices 0, 1, 2 (M = 3), or one for all (M = 1).
Arithmetic is float32, memory of the inputs' dtype (rates and their gradients are float32).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import empty, launch, power_of_two


def settings(width: int, elements: int = 2048) -> dict[str, Any]:
    """A tile for four warps: 16 elements a thread (or 8, of kernels with many operands), in whole
    lines of memory."""
    columns = min(power_of_two(width), 128)
    return {"BR": max(4, elements // columns), "BF": columns, "num_warps": 4}


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


@triton.jit
def slopes(g):
    """s, s', s'' of silu."""
    p = tl.sigmoid(g)
    rest = 1 - p
    return g * p, p * (1 + g * rest), p * rest * (2 + g * (rest - p))


@triton.jit(do_not_specialize=["R"])
def gated_kernel(z, h, R, F: tl.constexpr, BR: tl.constexpr, BF: tl.constexpr):
    """h = s(g) u."""
    r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)[:, None]
    f = tl.program_id(1) * BF + tl.arange(0, BF)[None, :]
    mask = (r < R) & (f < F)
    g = tl.load(z + r * (2 * F) + f, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(z + r * (2 * F) + F + f, mask=mask, other=0.0).to(tl.float32)
    tl.store(h + r * F + f, (g * tl.sigmoid(g) * u).to(h.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["R"])
def backward_gated_kernel(z, dh, h, dz, R, F: tl.constexpr, BR: tl.constexpr, BF: tl.constexpr):
    """h = s(g) u again, and dz = [dh u s' | dh s]."""
    r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)[:, None]
    f = tl.program_id(1) * BF + tl.arange(0, BF)[None, :]
    mask = (r < R) & (f < F)
    at = r * (2 * F) + f
    g = tl.load(z + at, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(z + at + F, mask=mask, other=0.0).to(tl.float32)
    d = tl.load(dh + r * F + f, mask=mask, other=0.0).to(tl.float32)
    s, s1, _ = slopes(g)
    dtype = h.dtype.element_ty
    tl.store(h + r * F + f, (s * u).to(dtype), mask=mask)
    tl.store(dz + at, (d * u * s1).to(dtype), mask=mask)
    tl.store(dz + at + F, (d * s).to(dtype), mask=mask)


@triton.jit(do_not_specialize=["R"])
def error_kernel(
    y, k, v, lr, e, el, R, V: tl.constexpr, M: tl.constexpr, RESIDUAL: tl.constexpr,
    BR: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """e = y (+ k) - v, or -v where there is no y; el = -lr_1 e."""
    r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)[:, None]
    f = tl.program_id(1) * BF + tl.arange(0, BF)[None, :]
    mask = (r < R) & (f < V)
    at = r * V + f
    x = -tl.load(v + at, mask=mask, other=0.0).to(tl.float32)
    if y is not None:
        x += tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
        if RESIDUAL:
            x += tl.load(k + at, mask=mask, other=0.0).to(tl.float32)
    rate = tl.load(lr + r * M + M // 2, mask=r < R, other=0.0)
    tl.store(e + at, x.to(e.dtype.element_ty), mask=mask)
    tl.store(el + at, (-rate * x).to(el.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["R"])
def errors_kernel(
    z, d, lr, e, R, F: tl.constexpr, M: tl.constexpr, BR: tl.constexpr, BF: tl.constexpr
):
    """e = [-lr_0 d u s' | -lr_2 d s], d the error at h."""
    r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)[:, None]
    f = tl.program_id(1) * BF + tl.arange(0, BF)[None, :]
    mask = (r < R) & (f < F)
    at = r * (2 * F) + f
    g = tl.load(z + at, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(z + at + F, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(d + r * F + f, mask=mask, other=0.0).to(tl.float32)
    lr0 = tl.load(lr + r * M, mask=r < R, other=0.0)
    lr2 = tl.load(lr + r * M + M - 1, mask=r < R, other=0.0)
    s, s1, _ = slopes(g)
    dtype = e.dtype.element_ty
    tl.store(e + at, (-lr0 * x * u * s1).to(dtype), mask=mask)
    tl.store(e + at + F, (-lr2 * x * s).to(dtype), mask=mask)


@triton.jit(do_not_specialize=["R"])
def backward_errors_kernel(
    z, d, a, dh, lr, dd, dlr, dz, R, F: tl.constexpr, M: tl.constexpr, BR: tl.constexpr,
    BF: tl.constexpr,
):  # fmt: skip
    """The backward of `errors` and `gated`, from a = [a_0 | a_2], the gradient of its e: with
    E_m = -lr_m a_m of m = 0, 2, and dh the gradient of h,

        dd = E_0 u s' + E_2 s          dlr_0 = -sum a_0 d u s'     dlr_2 = -sum a_2 d s
        dz = [E_0 d u s'' + E_2 d s' + dh u s' | E_0 d s' + dh s]

    dd and dlr (columns 0 and 2 of 3), or dz, where they are not None. A program sums over all F.
    """
    r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)[:, None]
    lr0 = tl.load(lr + r * M, mask=r < R, other=0.0)
    lr2 = tl.load(lr + r * M + M - 1, mask=r < R, other=0.0)
    sum0 = tl.zeros((BR, BF), tl.float32)
    sum2 = tl.zeros((BR, BF), tl.float32)
    for start in range(0, F, BF):
        f = start + tl.arange(0, BF)[None, :]
        mask = (r < R) & (f < F)
        at = r * (2 * F) + f
        g = tl.load(z + at, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(z + at + F, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(d + r * F + f, mask=mask, other=0.0).to(tl.float32)
        a0 = tl.load(a + at, mask=mask, other=0.0).to(tl.float32)
        a2 = tl.load(a + at + F, mask=mask, other=0.0).to(tl.float32)
        s, s1, s2 = slopes(g)
        e0, e2 = -lr0 * a0, -lr2 * a2
        if dd is not None:
            sum0 -= a0 * x * u * s1
            sum2 -= a2 * x * s
            value = e0 * u * s1 + e2 * s
            tl.store(dd + r * F + f, value.to(dd.dtype.element_ty), mask=mask)
        if dz is not None:
            p = tl.load(dh + r * F + f, mask=mask, other=0.0).to(tl.float32)
            dg = x * (e0 * u * s2 + e2 * s1) + p * u * s1
            du = e0 * x * s1 + p * s
            tl.store(dz + at, dg.to(dz.dtype.element_ty), mask=mask)
            tl.store(dz + at + F, du.to(dz.dtype.element_ty), mask=mask)
    if dd is not None:
        tl.store(dlr + r * 3, tl.sum(sum0, 1)[:, None], mask=r < R)
        tl.store(dlr + r * 3 + 2, tl.sum(sum2, 1)[:, None], mask=r < R)


@triton.jit(do_not_specialize=["R"])
def backward_error_kernel(
    del_, back, e, lr, de, dlr, R, V: tl.constexpr, M: tl.constexpr, BR: tl.constexpr,
    BF: tl.constexpr,
):  # fmt: skip
    """de = back - lr_1 del, del the gradient of el = -lr_1 e; dlr_1 = -sum del e."""
    r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)[:, None]
    rate = tl.load(lr + r * M + M // 2, mask=r < R, other=0.0)
    total = tl.zeros((BR, BF), tl.float32)
    for start in range(0, V, BF):
        f = start + tl.arange(0, BF)[None, :]
        mask = (r < R) & (f < V)
        at = r * V + f
        x = tl.load(del_ + at, mask=mask, other=0.0).to(tl.float32)
        total -= x * tl.load(e + at, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(back + at, mask=mask, other=0.0).to(tl.float32) - rate * x
        tl.store(de + at, value.to(de.dtype.element_ty), mask=mask)
    tl.store(dlr + r * 3 + 1, tl.sum(total, 1)[:, None], mask=r < R)


def over_tiles(kernel: Any, R: int, width: int, *args: Any, **constants: Any) -> None:
    use = settings(width)
    launch(kernel, (cdiv(R, use["BR"]), cdiv(width, use["BF"])), *args, R, **constants, **use)


def over_rows(kernel: Any, R: int, width: int, *args: Any, **constants: Any) -> None:
    use = settings(width, 1024)
    launch(kernel, (cdiv(R, use["BR"]),), *args, R, **constants, **use)


def gated(z: Tensor) -> Tensor:
    *rows, F2 = z.shape
    h = empty((*rows, F2 // 2), like=z)
    over_tiles(gated_kernel, h[..., 0].numel(), F2 // 2, z, h, F=F2 // 2)
    return h


def backward_gated(z: Tensor, dh: Tensor) -> tuple[Tensor, Tensor]:
    """h and dz."""
    F, h, dz = dh.shape[-1], empty(dh.shape, like=dh), empty(z.shape, like=z)
    over_tiles(backward_gated_kernel, h[..., 0].numel(), F, z, dh, h, dz, F=F)
    return h, dz


def error(
    y: Tensor | None, k: Tensor, v: Tensor, lr: Tensor, residual: bool
) -> tuple[Tensor, Tensor]:
    """e and el."""
    e, el, V = empty(v.shape, like=v), empty(v.shape, like=v), v.shape[-1]
    constants = {"V": V, "M": lr.shape[-1], "RESIDUAL": residual}
    over_tiles(error_kernel, v[..., 0].numel(), V, y, k, v, lr, e, el, **constants)
    return e, el


def errors(z: Tensor, d: Tensor, lr: Tensor) -> Tensor:
    e, F = empty(z.shape, like=z), d.shape[-1]
    over_tiles(errors_kernel, d[..., 0].numel(), F, z, d, lr, e, F=F, M=lr.shape[-1])
    return e


def backward_errors(
    z: Tensor, d: Tensor, a: Tensor, lr: Tensor, dlr: Any, dh: Any, dz: Any
) -> Tensor | None:
    """dd, if dlr `[.., 3]` is there to be written to; fills dz, if dh is given."""
    dd = None if dlr is None else empty(d.shape, like=d)
    given, F = (z, d, a, dh, lr, dd, dlr, None if dh is None else dz), d.shape[-1]
    over_rows(backward_errors_kernel, d[..., 0].numel(), F, *given, F=F, M=lr.shape[-1])
    return dd


def backward_error(
    del_: Tensor, back: Tensor, e: Tensor, lr: Tensor, de: Tensor, dlr: Tensor
) -> None:
    """Fills de and a column of dlr."""
    V, given = e.shape[-1], (del_, back, e, lr, de, dlr)
    over_rows(backward_error_kernel, e[..., 0].numel(), V, *given, V=V, M=lr.shape[-1])


def outer(x: Tensor, y: Tensor) -> Tensor:
    """x^T y `[N, I, O]` of tokens, in float32: gradients of weights are summed there."""
    if x.dtype == torch.float32 or x.is_meta:
        return torch.bmm(x.mT, y).float()
    if x.is_cuda and torch.version.hip is None:
        return torch.bmm(x.mT, y, out_dtype=torch.float32)
    return torch.bmm(x.mT.float(), y.float())
