"""Kernels on weights `[N, IN, OUT]`: the write at the end of a mini-batch, and its backward.

A matrix set, gate and up side by side or down alone, has a master M in float32. What tokens are
written at is mapped = c M, with a factor c of every output: c = n / (|M| + eps) where a norm acts,
n `[N, OUT]` the initial norms, else 1. The next master is A base + step, base = mapped or M, with
S' = mean S + U and step = S' (or what Muon makes of it, given as U, without S). A program has
BO outputs of one matrix and runs over its inputs, twice where a norm must be known first.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..launch import empty, launch, power_of_two


class Settings(NamedTuple):
    BI: int
    BO: int
    num_warps: int


def settings(inputs: int, outputs: int) -> Settings:
    """Few outputs make more programs: there are N OUT / BO."""
    return Settings(min(32, power_of_two(inputs)), min(32, power_of_two(outputs)), 4)


@triton.jit(do_not_specialize=["N"])
def advance_kernel(
    M, c, U, S, A, mean, n, M2, S2, c2, G, R, N, eps,
    IN: tl.constexpr, OUT: tl.constexpr, BASE: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """M2 = A base + S2, S2 = mean S + U, where there is a U; else only of M itself:
    c2 = n / (|M2| + eps), G = c2 M2 and R = M2 in the products' dtype. BASE: base = mapped.
    Any of S, A, n, R may be None. N: rows of n, which repeats for chunks on top of each other."""
    row = tl.program_id(0)
    o = tl.program_id(1) * BO + tl.arange(0, BO)[None, :]
    base = row.to(tl.int64) * (IN * OUT)
    live = o < OUT
    total = tl.zeros((BI, BO), tl.float32)
    factor = tl.full((1, BO), 1.0, tl.float32)
    if A is not None:
        factor *= tl.load(A + row)
    if BASE:
        factor *= tl.load(c + row * OUT + o, mask=live, other=0.0)
    for start in range(0, IN, BI):
        i = start + tl.arange(0, BI)[:, None]
        mask = live & (i < IN)
        at = base + i * OUT + o
        x = tl.load(M + at, mask=mask, other=0.0)
        if U is not None:
            step = tl.load(U + at, mask=mask, other=0.0)
            if S is not None:
                step += tl.load(mean + row) * tl.load(S + at, mask=mask, other=0.0)
                tl.store(S2 + at, step, mask=mask)
            x = x * factor + step
            tl.store(M2 + at, x, mask=mask)
        total += x * x
    scale = tl.full((1, BO), 1.0, tl.float32)
    if n is not None:
        norm = tl.where(live, tl.sqrt(tl.sum(total, 0))[None, :], 1.0)
        scale = tl.load(n + (row % N) * OUT + o, mask=live, other=1.0) / (norm + eps)
        tl.store(c2 + row * OUT + o, scale, mask=live)
    if U is not None:
        tl.debug_barrier()  # M2 is read by other threads than have written it
    for start in range(0, IN, BI):
        i = start + tl.arange(0, BI)[:, None]
        mask = live & (i < IN)
        at = base + i * OUT + o
        if U is not None:
            x = tl.load(M2 + at, mask=mask, other=0.0)
        else:
            x = tl.load(M + at, mask=mask, other=0.0)
        tl.store(G + at, (x * scale).to(G.dtype.element_ty), mask=mask)
        if R is not None:
            tl.store(R + at, x.to(R.dtype.element_ty), mask=mask)


@triton.jit
def backward_step_kernel(
    D, step, dS, M, c, S, A, mean, dU, wide, dS0, dA, dmean,
    IN: tl.constexpr, OUT: tl.constexpr, BLOCKS: tl.constexpr, FIRST: tl.constexpr,
    BASE: tl.constexpr, BI: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """The backward of the write: from D, the gradient of the next master, step, the one of its
    step (D but for Muon), and dS, the one of the next S:

        dU = step + dS      dS0 = mean dU      dmean = sum dU S      dA = sum D base

    dU in the products' dtype and, if `wide` is there, in float32. dmean and dA `[N, BLOCKS]`: a
    program's part of a sum goes to column FIRST + its own."""
    row = tl.program_id(0)
    block = tl.program_id(1)
    o = block * BO + tl.arange(0, BO)[None, :]
    base = row.to(tl.int64) * (IN * OUT)
    live = o < OUT
    sum_A = tl.zeros((BI, BO), tl.float32)
    sum_m = tl.zeros((BI, BO), tl.float32)
    scale = tl.full((1, BO), 1.0, tl.float32)
    if BASE:
        scale = tl.load(c + row * OUT + o, mask=live, other=0.0)
    for start in range(0, IN, BI):
        i = start + tl.arange(0, BI)[:, None]
        mask = live & (i < IN)
        at = base + i * OUT + o
        g = tl.load(step + at, mask=mask, other=0.0)
        if S is not None:
            g += tl.load(dS + at, mask=mask, other=0.0)
            tl.store(dS0 + at, g * tl.load(mean + row), mask=mask)
            sum_m += g * tl.load(S + at, mask=mask, other=0.0)
        tl.store(dU + at, g.to(dU.dtype.element_ty), mask=mask)
        if wide is not None:
            tl.store(wide + at, g, mask=mask)
        if A is not None:
            x = tl.load(M + at, mask=mask, other=0.0) * scale
            sum_A += x * tl.load(D + at, mask=mask, other=0.0)
    if S is not None:
        tl.store(dmean + row * BLOCKS + FIRST + block, tl.sum(sum_m))
    if A is not None:
        tl.store(dA + row * BLOCKS + FIRST + block, tl.sum(sum_A))


@triton.jit
def backward_map_kernel(
    D, A, tokens, more, reads, M, n, out, dn, eps,
    IN: tl.constexpr, OUT: tl.constexpr, BASE: tl.constexpr, READ: tl.constexpr,
    BI: tl.constexpr, BO: tl.constexpr,
):  # fmt: skip
    """The gradient of a master M. At mapped arrive `tokens` and `more`, at what queries met
    `reads` (mapped if READ, else M), at the base A D (mapped if BASE, else M). With P all that
    arrives at mapped = c M, summed, and c = n / (r + eps), r = |M|,

        out = rest + c P - M c sum(P M) / (r (r + eps))      dn += sum(P M) / (r + eps)
    """
    row = tl.program_id(0)
    o = tl.program_id(1) * BO + tl.arange(0, BO)[None, :]
    base = row.to(tl.int64) * (IN * OUT)
    live = o < OUT
    scale = tl.full((1, BO), 1.0, tl.float32)
    bend = tl.zeros((1, BO), tl.float32)
    factor = 1.0
    if A is not None:
        factor = tl.load(A + row)
    square = tl.zeros((BI, BO), tl.float32)
    along = tl.zeros((BI, BO), tl.float32)
    for twice in tl.static_range(2):
        if twice == 1 or n is not None:
            for start in range(0, IN, BI):
                i = start + tl.arange(0, BI)[:, None]
                mask = live & (i < IN)
                at = base + i * OUT + o
                P = tl.zeros((BI, BO), tl.float32)
                rest = tl.zeros((BI, BO), tl.float32)
                if tokens is not None:
                    P += tl.load(tokens + at, mask=mask, other=0.0)
                if more is not None:
                    P += tl.load(more + at, mask=mask, other=0.0)
                if reads is not None:
                    if READ:
                        P += tl.load(reads + at, mask=mask, other=0.0)
                    else:
                        rest += tl.load(reads + at, mask=mask, other=0.0)
                if BASE:
                    P += factor * tl.load(D + at, mask=mask, other=0.0)
                else:
                    rest += factor * tl.load(D + at, mask=mask, other=0.0)
                if twice == 0:
                    x = tl.load(M + at, mask=mask, other=0.0)
                    square += x * x
                    along += P * x
                else:
                    value = rest + scale * P
                    if n is not None:
                        value -= bend * tl.load(M + at, mask=mask, other=0.0)
                    tl.store(out + at, value, mask=mask)
        if twice == 0 and n is not None:
            r = tl.where(live, tl.sqrt(tl.sum(square, 0))[None, :], 1.0)
            total = tl.sum(along, 0)[None, :]
            initial = tl.load(n + row * OUT + o, mask=live, other=0.0)
            scale = initial / (r + eps)
            bend = scale * total / (tl.where(r > 0, r, 1.0) * (r + eps))  # of no weights: 0
            here = row * OUT + o
            before = tl.load(dn + here, mask=live, other=0.0)
            tl.store(dn + here, before + total / (r + eps), mask=live)


def grid(IN: int, OUT: int, rows: int) -> tuple[Settings, tuple[int, int]]:
    use = settings(IN, OUT)
    return use, (rows, -(-OUT // use.BO))


def programs(M: Tensor) -> int:
    """Programs that share a matrix of a set."""
    return grid(M.shape[-2], M.shape[-1], 1)[1][1]


class Set(NamedTuple):
    """A set of matrices and its initial norms n `[N, OUT]`, None where it keeps no norm. base: the
    base of a write is the mapped set."""

    n: Tensor | None
    eps: float
    base: bool

    def advance(self, M: Tensor, c: Any, U: Any, S: Any, A: Any, mean: Any, to: Any) -> Any:
        """to: (M2, S2, G, R), written to; M2, S2 with a U alone. Returns c2."""
        *chunks, IN, OUT = M.shape
        rows = M.numel() // max(1, IN * OUT)
        use, size = grid(IN, OUT, rows)
        c2 = None if self.n is None else empty((*chunks, OUT), like=M)
        M2, S2, G, R = to
        N = rows if self.n is None else len(self.n)
        base = self.base and self.n is not None and c is not None
        given = (M, c, U, S, A, mean, self.n, M2, S2, c2, G, R, N, self.eps)
        launch(advance_kernel, size, *given, IN=IN, OUT=OUT, BASE=base, **use._asdict())
        return c2

    def backward_step(
        self, D: Tensor, step: Tensor, dS: Any, M: Tensor, c: Any, S: Any, A: Any, mean: Any,
        dU: Tensor, wide: bool, dA: Any, dmean: Any, first: int,
    ) -> Any:  # fmt: skip
        """dU in float32 (if wide) and dS0; fills dU, and dA and dmean from column `first` on."""
        N, IN, OUT = M.shape
        use, size = grid(IN, OUT, N)
        full = empty(M.shape, like=M) if wide else None
        dS0 = None if S is None else empty(M.shape, like=M)
        base = self.base and c is not None
        given = (D, step, dS, M, c, S, A, mean, dU, full, dS0, dA, dmean)
        columns = next((x.shape[-1] for x in (dA, dmean) if x is not None), 1)
        constants = {"IN": IN, "OUT": OUT, "BLOCKS": columns, "FIRST": first, "BASE": base}
        launch(backward_step_kernel, size, *given, **constants, **use._asdict())
        return full, dS0

    def backward_map(
        self, D: Tensor, A: Any, tokens: Any, more: Any, reads: Any, M: Tensor, dn: Any,
        mapped: bool, base: bool, read: bool,
    ) -> Tensor:  # fmt: skip
        N, IN, OUT = M.shape
        use, size = grid(IN, OUT, N)
        out = empty(M.shape, like=M)
        n, dn = (self.n, dn) if mapped else (None, None)
        given = (D, A, tokens, more, reads, M, n, out, dn, self.eps)
        constants = {"IN": IN, "OUT": OUT, "BASE": base, "READ": read}
        launch(backward_map_kernel, size, *given, **constants, **use._asdict())
        return out
