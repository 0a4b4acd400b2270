"""What forward and backward of chunk.py share: matrix products of the library in the inputs'
dtype, and fused kernels between them.

Forward, of a piece of n tokens with all rows N = B H at once; z = k G0 | k G2, h = silu gate * up:

    e = h G1 (+ k) - v, or -v      d = e G1^T      E0, E2 from z, d (epilogues.py)
    U0, U2 -= k^T lr E             U1 -= h^T lr e       (one product for 0 and 2, side by side)

and, when the mini-batch is full, the write (weights.py). G are the weights of that mini-batch in
the products' dtype; masters, S and U are float32. Queries read all chunks of a group in one batch
of products, since the writes do not wait for them. For the backward the master and S of every
mini-batch are kept, in float32, since the maps of norms are differentiated at them; all that is
of tokens is computed again, for a group of chunks at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..launch import empty
from . import muon
from .epilogues import error, errors, gated
from .weights import Set

GROUP = 1 << 24
"""Elements of a hidden activation that are held at once, at most, if a chunk is not more."""
Pair = list[Any]
"""Of gate and up side by side `[N, K, 2 F]`, and of down `[N, F, V]`."""


class Rules(NamedTuple):
    """What of a rule matters here. muon: its eps, or 0. place: end, start, view; `end` where
    nothing is mapped."""

    C: int
    place: str
    residual: bool
    l2: bool
    muon: float
    eps: float


class ChunkPart(NamedTuple):
    """g pieces of n tokens from token t; slot: the first one's mini-batch in this call."""

    t: int
    n: int
    g: int
    slot: int
    full: bool


def plan(T: int, start: int, C: int, size: int) -> Iterator[ChunkPart]:
    """size: elements of a hidden activation that belong to a token."""
    t = slot = 0
    while t < T:
        n = min(C - start, T - t)
        g = 1 if n < C else max(1, min((T - t) // C, GROUP // (size * C)))
        full = start + n == C
        yield ChunkPart(t, n, g, slot, full)
        t, slot, start = t + g * n, slot + g * full, (start + n) % C


def slots(T: int, C: int) -> int:
    """Mini-batches that a call may meet, wherever it starts, and the one after them."""
    return (T + C - 1) // C + 1


def part_rows(x: Tensor, part: ChunkPart) -> Tensor:
    """`[B, T, H, ..]` -> `[g, B H, n, ..]`."""
    B, _, H, *last = x.shape
    x = x[:, part.t : part.t + part.g * part.n].reshape(B, part.g, part.n, H, *last)
    x = x.permute(1, 0, 3, 2, *range(4, x.dim())).contiguous()
    return x.view(part.g, B * H, part.n, *last)


def write_part(x: Tensor, part: ChunkPart, to: Tensor) -> None:
    """The inverse, into its place in `to`."""
    B, _, H, *last = to.shape
    rest = range(4, 4 + len(last))
    x = x.reshape(part.g, B, H, part.n, *last).permute(1, 0, 3, 2, *rest)
    to[:, part.t : part.t + part.g * part.n].unflatten(1, (part.g, part.n)).copy_(x)


class Chunked:
    """One call: what forward and backward share."""

    def __init__(self, rules: Rules, n: Pair, start: int, first: bool) -> None:
        self.rules, self.start, self.first = rules, start, first
        self.norm = n[0] is not None
        self.apart = rules.place == "start" and self.norm
        """Queries read the masters, not what they are mapped to."""
        base = rules.place != "view"
        self.plain: Any = [Set(None, 0.0, False)] * 2
        self.sets: Any = [Set(x, rules.eps, base) for x in n] if self.norm else self.plain

    def maps(self, slot: int) -> bool:
        """Whether the weights of this mini-batch are mapped."""
        return self.norm and (slot > 0 or not (self.rules.place == "end" or self.first))

    def at(self, slot: int) -> Any:
        return self.sets if self.maps(slot) else self.plain

    def buffers(self, M: Pair, q: Tensor, g: int) -> tuple[Pair, Pair]:
        """Weights that keys and queries meet, of g mini-batches; the same where they may be."""
        shapes = [(g, *m.shape[-3:]) for m in M]
        pairs = [[empty(shape, like=q) for shape in shapes] for _ in range(2 if self.apart else 1)]
        return pairs[0], pairs[-1]

    def cast(self, slot: int, M: Pair, G: Pair, R: Pair) -> Pair:
        """Fills G and R from masters `[.., N, I, O]`; the factors c."""
        nothing = (None,) * 5
        return [
            s.advance(M[m], *nothing, (None, None, G[m], R[m] if self.apart else None))
            for m, s in enumerate(self.at(slot))
        ]

    def write(
        self, M: Pair, c: Pair, U: Pair, S: Pair, A: Any, mean: Any, M2: Pair, S2: Pair, G: Pair,
        R: Pair,
    ) -> Pair:  # fmt: skip
        """The end of a mini-batch, into M2, S2, G and R; the next factors."""
        found = []
        for m, s in enumerate(self.sets):
            u, old = U[m], S[m]
            if self.rules.muon:
                if old is not None:
                    u = torch.addcmul(u, old, mean[:, None, None], out=S2[m])
                    old = None
                u = muon.direction(u, 2 - m, self.rules.muon)
            to = (M2[m], S2[m], G[m], R[m] if self.apart else None)
            found.append(s.advance(M[m], c[m], u, old, A, mean, to))
        return found

    def tokens(self, k: Tensor, v: Tensor, lr: Tensor, G: Pair) -> tuple[Any, ...]:
        """z, h, e, el, d, E of pieces `[N, n, ..]`."""
        z = torch.bmm(k, G[0])
        h = gated(z)
        y = torch.bmm(h, G[1]) if self.rules.l2 else None
        e, el = error(y, k, v, lr, self.rules.residual)
        d = torch.bmm(e, G[1].mT)
        return z, h, e, el, d, errors(z, d, lr)

    def read(self, q: Tensor, R: Pair) -> Tensor:
        h = gated(torch.bmm(q, R[0]))
        return torch.baddbmm(q, h, R[1]) if self.rules.residual else torch.bmm(h, R[1])


def gates(
    momentum: Any, retention: Any, part: ChunkPart, past: Pair, C: int
) -> tuple[Any, Any, Any]:
    """(A, sum of momentum, its mean over a full mini-batch) of every piece, `[g, N]`; past: the
    first two before the call, or None."""
    A = None if retention is None else part_rows(retention, part).prod(-1)
    m = None if momentum is None else part_rows(momentum, part).sum(-1)
    if part.slot == 0 and past[0] is not None and A is not None:
        A[0] *= past[0]
    if part.slot == 0 and past[1] is not None and m is not None:
        m[0] += past[1]
    return A, m, None if m is None else m / C


def each(x: Any, j: int) -> Any:
    """Mini-batch j of a tensor, or of the tensors of a list."""
    if isinstance(x, list):
        return [each(y, j) for y in x]
    return None if x is None else x[j]
