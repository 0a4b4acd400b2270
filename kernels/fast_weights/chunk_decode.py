"""One token of `update: chunk` that does not fill its mini-batch, without gradients: one kernel.

It reads the weights for o = M_W(q) and the key's gradient, and U for U + the gradient, which is
new memory. A program has one row n of N = B H, and runs over the hidden dimension in tiles, twice:
the error at the output needs all of it. Gate, up and down are read once from memory, down once
more from the cache; U is read and written once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import empty, launch, power_of_two

WIDEST = 256
"""Channels of K and V at most: tiles of a program are K x BF and BF x V."""


class Settings(NamedTuple):
    BK: int
    BV: int
    BF: int
    num_warps: int


def settings(K: int, V: int, F: int) -> Settings:
    BK, BV = power_of_two(K), power_of_two(V)
    wide = max(BK, BV)
    return Settings(BK, BV, min(power_of_two(F), max(16, 4096 // wide)), 4 if wide <= 128 else 8)


@triton.jit
def decode_kernel(
    q, k, v, lr, W0, W1, W2, U0, U1, U2, n0, n1, n2, o, Y0, Y1, Y2, scratch, eps,
    K: tl.constexpr, V: tl.constexpr, F: tl.constexpr, M: tl.constexpr, RESIDUAL: tl.constexpr,
    L2: tl.constexpr, READ: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """o, and Y = U - lr g. U is None for 0. n: initial norms where the weights are mapped, which
    scales the outputs of a product; READ: for the query, too. scratch: [g | u] of the key."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BK)
    j = tl.arange(0, BV)
    up = row * (K * F)
    down = row * (F * V)
    x = tl.load(q + row * K + i, mask=i < K, other=0.0).to(tl.float32)
    key = tl.load(k + row * K + i, mask=i < K, other=0.0).to(tl.float32)
    out = tl.zeros((BV,), tl.float32)
    y = tl.zeros((BV,), tl.float32)
    square = tl.zeros((BV,), tl.float32)
    for start in range(0, F, BF):
        f = start + tl.arange(0, BF)
        at = up + i[:, None] * F + f[None, :]
        mask = (i < K)[:, None] & (f < F)[None, :]
        w0 = tl.load(W0 + at, mask=mask, other=0.0)
        w2 = tl.load(W2 + at, mask=mask, other=0.0)
        w1 = tl.load(
            W1 + down + f[:, None] * V + j[None, :],
            mask=(f < F)[:, None] & (j < V)[None, :], other=0.0,
        )  # fmt: skip
        gq, uq = tl.sum(w0 * x[:, None], 0), tl.sum(w2 * x[:, None], 0)
        gk, uk = tl.sum(w0 * key[:, None], 0), tl.sum(w2 * key[:, None], 0)
        if n0 is not None:
            c0 = tl.load(n0 + row * F + f, mask=f < F, other=0.0)
            c2 = tl.load(n2 + row * F + f, mask=f < F, other=0.0)
            c0 /= tl.where(f < F, tl.sqrt(tl.sum(w0 * w0, 0)) + eps, 1.0)
            c2 /= tl.where(f < F, tl.sqrt(tl.sum(w2 * w2, 0)) + eps, 1.0)
            gk *= c0
            uk *= c2
            if READ:
                gq *= c0
                uq *= c2
            square += tl.sum(w1 * w1, 0)
        out += tl.sum(w1 * (gq * tl.sigmoid(gq) * uq)[:, None], 0)
        y += tl.sum(w1 * (gk * tl.sigmoid(gk) * uk)[:, None], 0)
        tl.store(scratch + row * (2 * F) + f, gk, mask=f < F)
        tl.store(scratch + row * (2 * F) + F + f, uk, mask=f < F)
    scale = tl.full((BV,), 1.0, tl.float32)
    if n1 is not None:
        scale = tl.load(n1 + row * V + j, mask=j < V, other=0.0)
        scale /= tl.where(j < V, tl.sqrt(square) + eps, 1.0)
        if READ:
            out *= scale
    error = -tl.load(v + row * V + j, mask=j < V, other=0.0).to(tl.float32)
    if RESIDUAL:
        out += tl.load(q + row * K + j, mask=j < K, other=0.0).to(tl.float32)
    if L2:
        error += y * scale
        if RESIDUAL:
            error += tl.load(k + row * K + j, mask=j < K, other=0.0).to(tl.float32)
    tl.store(o + row * V + j, out.to(o.dtype.element_ty), mask=j < V)
    lr0 = tl.load(lr + row * M)
    lr1 = tl.load(lr + row * M + M // 2)
    lr2 = tl.load(lr + row * M + M - 1)
    tl.debug_barrier()  # scratch is read by other threads than have written it
    for start in range(0, F, BF):
        f = start + tl.arange(0, BF)
        at = up + i[:, None] * F + f[None, :]
        mask = (i < K)[:, None] & (f < F)[None, :]
        below = down + f[:, None] * V + j[None, :]
        live = (f < F)[:, None] & (j < V)[None, :]
        w1 = tl.load(W1 + below, mask=live, other=0.0)
        d = tl.sum(w1 * (error * scale)[None, :], 1)
        g = tl.load(scratch + row * (2 * F) + f, mask=f < F, other=0.0)
        u = tl.load(scratch + row * (2 * F) + F + f, mask=f < F, other=0.0)
        p = tl.sigmoid(g)
        s = g * p
        e0 = -lr0 * d * u * p * (1 + g * (1 - p))
        e2 = -lr2 * d * s
        y0 = key[:, None] * e0[None, :]
        y2 = key[:, None] * e2[None, :]
        y1 = (s * u)[:, None] * (-lr1 * error)[None, :]
        if U0 is not None:
            y0 += tl.load(U0 + at, mask=mask, other=0.0)
            y2 += tl.load(U2 + at, mask=mask, other=0.0)
            y1 += tl.load(U1 + below, mask=live, other=0.0)
        tl.store(Y0 + at, y0, mask=mask)
        tl.store(Y2 + at, y2, mask=mask)
        tl.store(Y1 + below, y1, mask=live)


@torch.library.custom_op(
    "layerzoo::fast_weights_chunk_decode",
    mutates_args=(),
    schema="""(Tensor q, Tensor k, Tensor v, Tensor lr, Tensor W0, Tensor W1, Tensor W2,
    Tensor? U0, Tensor? U1, Tensor? U2, Tensor? n0, Tensor? n1, Tensor? n2, bool read, float eps,
    bool residual, bool l2) -> (Tensor, Tensor, Tensor, Tensor)""",
)
def step(
    q: Tensor, k: Tensor, v: Tensor, lr: Tensor, W0: Tensor, W1: Tensor, W2: Tensor, U0: Any,
    U1: Any, U2: Any, n0: Any, n1: Any, n2: Any, read: bool, eps: float, residual: bool, l2: bool,
) -> Any:  # fmt: skip
    """Rows `[N, ..]` -> o, U0, U1, U2."""
    N, K, F = W0.shape
    V = v.shape[-1]
    use = settings(K, V, F)
    o = empty(v.shape, like=v)
    Y = [empty(w.shape, like=w) for w in (W0, W1, W2)]
    scratch = empty((N, 2 * F), like=W0)
    given = (q, k, v, lr, W0, W1, W2, U0, U1, U2, n0, n1, n2, o, *Y, scratch, eps)
    constants = {"K": K, "V": V, "F": F, "M": lr.shape[-1], "RESIDUAL": residual, "L2": l2}
    launch(decode_kernel, (N,), *given, **constants, READ=read, **use._asdict())
    return o, *Y


@step.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, lr: Tensor, *weights: Any) -> Any:
    return v.new_empty(v.shape), *(w.new_empty(w.shape) for w in weights[:3])


def decode(
    q: Tensor, k: Tensor, v: Tensor, lr: Tensor, momentum: Any, retention: Any, flat: Any,
    norms: Any, state: Any, fresh: bool, place: str, eps: float, residual: bool, l2: bool,
) -> tuple[Tensor, Any]:  # fmt: skip
    """o and the state after one token. flat: the state as rows. norms: Nones where nothing is
    mapped. fresh: nothing is pending yet."""
    B, _, H, _ = q.shape
    rows = [x.flatten(0, 2).contiguous() for x in (q, k, v, lr)]
    W = [w.contiguous() for w in flat["weights"]]
    U = [None] * 3 if fresh else [u.contiguous() for u in flat["updates"]]
    o, *Y = torch.ops.layerzoo.fast_weights_chunk_decode(
        *rows, *W, *U, *norms, place != "start", eps, residual, l2
    )
    new = dict(state)
    new["updates"] = tuple(y.unflatten(0, (B, H)) for y in Y)
    if retention is not None:
        new["retention"] = retention[:, 0] if fresh else state["retention"] * retention[:, 0]
    if momentum is not None:
        new["momentum_sum"] = momentum[:, 0] if fresh else state["momentum_sum"] + momentum[:, 0]
    new["position"] = state["position"] + 1
    return o.view(B, 1, H, -1), new
