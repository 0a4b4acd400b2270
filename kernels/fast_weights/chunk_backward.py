"""The backward pass of chunk.py: mini-batches in reverse, from what the forward kept of each.

In what follows a is the gradient of E0 | E2 (with the rates in them), x' the gradient of x:

    a = k U02'      h' = el U1'^T (+ y' G1^T)      el' = h U1'      d' from a (epilogues.py)
    e' = d' G1 - lr el'      y' = e' (l2)      v' = -e'      z' from a, h'
    G02' = k^T z'      G1' = d'^T e + h^T y'      k' = E U02'^T + z' G02^T (+ y')
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..launch import empty
from . import muon
from .chunk_parts import Chunked, ChunkPart, Pair, Rules, each, gates, part_rows, plan, write_part
from .epilogues import backward_error, backward_errors, backward_gated, outer
from .weights import programs


class Gradients:
    """Of everything that is given; those of tokens are filled part by part."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, lr: Tensor, *rest: Any) -> None:
        def make(x: Any) -> Any:
            return None if x is None else empty(x.shape, like=x)

        self.q, self.k, self.v, self.lr = make(q), make(k), make(v), make(lr)
        self.momentum, self.retention = map(make, rest)


def backward(
    g_o: Tensor, g_W: Pair, g_U: Pair, g_S: Pair, g_A: Any, g_m: Any,
    q: Tensor, k: Tensor, v: Tensor, lr: Tensor, momentum: Any, retention: Any, U: Pair, A: Any,
    m: Any, n: Pair, kept: Pair, kept_S: Pair, past: int, rules: Rules,
) -> tuple[Any, ...]:  # fmt: skip
    """g_*: gradients of what `forward` returns. The gradients of q, k, v, lr, momentum, retention,
    W, U, S, A, m, n."""
    C, T, start = rules.C, q.shape[1], past % rules.C
    call = Chunked(rules, n, start, past < C)
    if not start:
        A = m = None
    to = Gradients(q, k, v, lr, momentum, retention)
    d_n = [None if x is None else torch.zeros_like(x) for x in n]
    parts = list(plan(T, start, C, kept[0].shape[1] * kept[1].shape[2]))
    last = parts[-1].slot + parts[-1].g * parts[-1].full
    g_M, g_S = g_W, [None if x is None else x.clone() for x in g_S]  # what is returned is new
    if parts[-1].full:  # no mini-batch is pending: its master is the last one's result
        mapped = call.maps(last) and rules.place == "end"
        g_M = [
            s.backward_map(
                g_W[i], None, None, None, None, kept[i][last], d_n[i], mapped, True, True
            )
            for i, s in enumerate(call.sets)
        ]
    d_A0 = d_m0 = None
    d_U: Pair = [None, None]
    for part in reversed(parts):
        step = Step(call, part, kept, kept_S, U, q, k, v, lr)
        step.reads(g_o, to)
        A_end, _, mean = gates(momentum, retention, part, [A, m], C)
        sums = step.sums(A_end, mean)
        for j in range(part.g - 1, -1, -1):
            D, factor = g_W, None
            if part.full:
                D, factor = g_M, each(A_end, j)
                d_U, g_S = step.write(j, g_M, g_S, factor, each(mean, j), each(sums, j))
            else:
                d_U = [x.clone() for x in g_U]
                for i in range(2):
                    step.dU[i][0].copy_(g_U[i])
            g_M = step.tokens(j, D, factor, d_n)
        if part.full:
            d_A, d_m = (None if x is None else x.sum(-1) for x in sums)
            d_m = None if d_m is None else d_m / C
        else:
            d_A, d_m = (None if x is None else x.unsqueeze(0).clone() for x in (g_A, g_m))
        d_A0, d_m0 = backward_gates(d_A, d_m, retention, part, A, to)
        step.finish(to)
    return (
        to.q, to.k, to.v, to.lr, to.momentum, to.retention, g_M, d_U if start else [None, None],
        g_S, d_A0 if start else None, d_m0 if start else None, d_n,
    )  # fmt: skip


def backward_gates(
    d_A: Any, d_m: Any, retention: Any, part: ChunkPart, A: Any, to: Gradients
) -> Any:
    """From the gradients of `gates`, `[g, N]`: those of the state's A and m, if this is the part
    that they enter."""
    d_A0 = None
    if d_A is not None:
        x = part_rows(retention, part)
        one = torch.ones_like(x[..., :1])
        before = torch.cat((one, x[..., :-1].cumprod(-1)), -1)
        after = torch.cat((one, x[..., 1:].flip(-1).cumprod(-1)), -1).flip(-1)
        d_A0 = d_A[0] * x[0].prod(-1)
        if part.slot == 0 and A is not None:
            d_A[0] *= A
        write_part(before * after * d_A.unsqueeze(-1), part, to.retention)
    if d_m is not None:
        g, N = d_m.shape
        write_part(d_m.unsqueeze(-1).expand(g, N, part.n), part, to.momentum)
    return d_A0, None if d_m is None else d_m[0]


class Step:
    """A part: its weights and activations again, for all its chunks at once."""

    def __init__(
        self, call: Chunked, part: ChunkPart, kept: Pair, kept_S: Pair, U: Pair, q: Tensor,
        *tokens: Tensor,
    ) -> None:  # fmt: skip
        self.call, self.part, self.U = call, part, U
        pick = slice(part.slot, part.slot + part.g)
        self.M = [x[pick] for x in kept]
        self.S = [None if x is None else x[pick] for x in kept_S]
        self.following = kept_S
        self.q, *found = (part_rows(x, part) for x in (q, *tokens))
        self.k, self.v, self.lr = found
        self.G, self.R = call.buffers(kept, q, part.g)
        self.c = self.cast()
        self.dU = [torch.empty_like(g) for g in self.G]
        flat = [x.flatten(0, 1) for x in (*found, *self.G)]
        kf, vf, lf, *weights = flat
        made = call.tokens(kf, vf, lf, weights)
        shape = (part.g, -1)
        z, h, e, el, d, E = (x.unflatten(0, shape) for x in made)
        self.z, self.h, self.e, self.el, self.d, self.E = z, h, e, el, d, E
        self.d_z, self.d_e = empty(z.shape, like=z), empty(e.shape, like=e)
        self.d_lr = empty((*self.lr.shape[:-1], 3), like=self.lr)

    def cast(self) -> Pair:
        """Of all chunks at once, but for one that is not mapped."""
        call, slot, g = self.call, self.part.slot, self.part.g
        if call.maps(slot) or not call.norm or g == 1:
            found = call.cast(slot, self.M, self.G, self.R)
            return [[None] * g if x is None else x for x in found]
        call.cast(slot, each(self.M, 0), each(self.G, 0), each(self.R, 0))
        M, G, R = ([x[1:] for x in y] for y in (self.M, self.G, self.R))
        return [[None, *x] for x in call.cast(slot + 1, M, G, R)]

    def next_S(self, i: int, j: int) -> Tensor:
        """What Muon's step was taken of."""
        kept = self.following[i]
        if kept is not None:
            return kept[self.part.slot + j + 1]
        x, e = (self.k[j], self.E[j]) if i == 0 else (self.h[j], self.el[j])
        begun = self.part.slot + j == 0 and self.call.start > 0
        return outer(x, e) + self.U[i] if begun else outer(x, e)

    def sums(self, A: Any, mean: Any) -> Pair:
        """Memory for partial sums of the gradients of A and the mean, `[g, N, programs]`."""
        columns = sum(map(programs, self.M))
        return [None if x is None else empty((*x.shape, columns), like=x) for x in (A, mean)]

    def write(
        self, j: int, g_M: Pair, g_S: Pair, A: Any, mean: Any, sums: Pair
    ) -> tuple[Pair, Pair]:
        """The backward of the write after piece j: gradients of U and S; fills dU and sums."""
        d_U: Pair = [None, None]
        d_S: Pair = [None, None]
        wide = self.part.slot + j == 0 and self.call.start > 0
        eps, first = self.call.rules.muon, 0
        for i, s in enumerate(self.call.sets):
            D, M, S, c = g_M[i], self.M[i][j], each(self.S[i], j), self.c[i][j]
            if eps:
                D = muon.backward_direction(D, self.next_S(i, j), 2 - i, eps)
            given: Any = (g_M[i], D, g_S[i], M, c, S, A, mean, self.dU[i][j], wide, *sums, first)
            d_U[i], d_S[i] = s.backward_step(*given)
            first += programs(M)
        return d_U, d_S

    def reads(self, g_o: Tensor, to: Gradients) -> None:
        """Of all chunks at once: d_R, and the gradient of q."""
        part, residual = self.part, self.call.rules.residual
        R: Any = [x.flatten(0, 1) for x in self.R]
        q, g = (x.flatten(0, 1) for x in (self.q, part_rows(g_o, part)))
        h, d_z = backward_gated(torch.bmm(q, R[0]), torch.bmm(g, R[1].mT))
        self.d_R = [x.unflatten(0, (part.g, -1)) for x in (outer(q, d_z), outer(h, g))]
        d_q = torch.baddbmm(g, d_z, R[0].mT) if residual else torch.bmm(d_z, R[0].mT)
        write_part(d_q, part, to.q)

    def tokens(self, j: int, D: Pair, factor: Any, d_n: Pair) -> Pair:
        """Piece j, from dU: fills its d_z, d_e and d_lr; the gradient of its master."""
        rules, (U02, U1), G1 = self.call.rules, each(self.dU, j), self.G[1][j]
        k, z, h, d, lr = self.k[j], self.z[j], self.h[j], self.d[j], self.lr[j]
        a, d_h = torch.bmm(k, U02), torch.bmm(self.el[j], U1.mT)
        d_z, d_e, d_lr = self.d_z[j], self.d_e[j], self.d_lr[j]
        d_d = backward_errors(z, d, a, lr, d_lr, None if rules.l2 else d_h, d_z)
        assert d_d is not None
        backward_error(torch.bmm(h, U1), torch.bmm(d_d, G1), self.e[j], lr, d_e, d_lr)
        more = None
        if rules.l2:
            backward_errors(z, d, a, lr, None, d_h.baddbmm_(d_e, G1.mT), d_z)
            more = outer(h, d_e)
        tokens = (outer(k, d_z), outer(d_d, self.e[j]))
        slot, place = self.part.slot + j, rules.place
        base = place != "view" if self.part.full else place == "end"
        flags: Any = (self.call.maps(slot), base, place != "start")
        return [
            s.backward_map(D[i], factor, tokens[i], more if i else None, self.d_R[i][j],
                       self.M[i][j], d_n[i], *flags)
            for i, s in enumerate(self.call.sets)
        ]  # fmt: skip

    def finish(self, to: Gradients) -> None:
        """Gradients of k, v and lr, of all chunks at once."""
        part, rules = self.part, self.call.rules
        E, d_z, U02, G02 = (x.flatten(0, 1) for x in (self.E, self.d_z, self.dU[0], self.G[0]))
        d_k = torch.bmm(E, U02.mT).baddbmm_(d_z, G02.mT)
        if rules.l2 and rules.residual:
            d_k += self.d_e.flatten(0, 1)
        write_part(d_k, part, to.k)
        write_part(self.d_e.neg(), part, to.v)
        d_lr = self.d_lr if self.lr.shape[-1] == 3 else self.d_lr.sum(-1, keepdim=True)
        write_part(d_lr, part, to.lr)
