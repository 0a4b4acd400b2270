"""The chunked form of all fast weights: a mini-batch is a handful of matrix products.

Token j of a mini-batch has the gradient g_j = X_j^T E_j (of each matrix: X its inputs, E the
errors at its outputs), at the weights W_0 from before the mini-batch. With `update: token`

    S_j = momentum_j S_(j-1) - lr_j g_j,  U_j = keep_j U_(j-1) + S_j,  W_j = A_j W_0 + row_j U_j

is linear in the g_j, so that a read with W_i is a product with W_0, U and S from before and one
with the tokens' X and E (the dual form), matrix after matrix of the network. `update: chunk` is

    U_j = U_(j-1) - lr_j g_j;  when it is full  S = mean(momentum) S + U,  W = A W + direction(S).

A mini-batch is worked off in pieces: all of it, or what a call holds of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from ..common.chunks import SEGMENT, chunk_views, join_heads
from .compiled import compiled_piece
from .gates import Gates, token_gates
from .networks import with_bias
from .primitives import AddGradients, Dual, scaled
from .rule import Rule
from .state import PENDING, WeightsState, from_rows, position, to_rows

Weights = tuple[Tensor, ...]
Watch = Callable[..., None]
"""Called at the end of a mini-batch, see diagnostics.py."""
MAX_PIECE = 128
"""Tokens: a longer mini-batch is worked off in pieces, which stay in the cache."""


class Running(NamedTuple):
    """The state between two pieces, with rows N = B H; None is what it is at the start of a
    mini-batch: U = 0, A = 1, m = 0. mapped: the weights at which gradients are taken."""

    W: Weights
    mapped: Weights
    U: Weights | None
    S: Weights | None
    A: Tensor | None
    m: Tensor | None


class Engine:
    """One call: what its pieces share."""

    def __init__(
        self,
        rule: Rule,
        initial: Weights,
        row: Any,
        layer_norm: Any,
        watch: Watch | None = None,
        compiled: bool = False,
    ) -> None:
        self.rule, self.initial, self.row, self.watch = rule, initial, row, watch
        self.layer_norm, self.compiled = layer_norm, compiled
        self.matrices = range(len(initial))

    def phi(self, weights: Weights, *places: str) -> Weights:
        """The forgetting map, if the rule has it at one of these places."""
        rule = self.rule
        if not rule.forgetting.nonlinear or rule.place not in places:
            return weights
        pairs = zip(weights, self.initial, strict=True)
        return tuple(rule.forgetting.phi(w, first) for w, first in pairs)

    def begin(self, W: Weights, S: Weights | None, first: bool = False) -> Running:
        """A mini-batch; first: of the sequence."""
        spare = first and self.rule.spares_initial
        mapped = W if spare else self.phi(W, "start", "view")
        return Running(W, mapped, None, S, None, None)

    def gradients(
        self, anchor: Weights, k: Tensor, v: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs X and errors E of every matrix, at weights that all tokens share."""
        rule, X = self.rule, [k] * len(anchor)

        def times(m: int, x: Tensor) -> Tensor:
            X[m] = with_bias(rule.network, x)
            return X[m] @ anchor[m]

        def times_transposed(m: int, e: Tensor) -> Tensor:
            return e @ (anchor[m][:, :-1] if rule.network.bias else anchor[m]).mT

        y, backward = rule.network.forward(times, k, self.layer_norm)
        return X, backward(rule.objective.error(y, v), times_transposed)

    def read(self, weights: Weights, q: Tensor) -> Tensor:
        network = self.rule.network
        times = lambda m, z: with_bias(network, z) @ weights[m]  # noqa: E731
        return network.forward(times, q, self.layer_norm)[0]

    def token_piece(
        self, now: Running, q: Tensor, k: Tensor, v: Tensor, gates: Gates, full: bool
    ) -> tuple[Tensor, Running]:
        """full: this piece ends the mini-batch."""
        X, E = self.gradients(now.mapped, k, v)
        A = gates.A if now.A is None else scaled(gates.A, now.A)
        A_end = None if A is None else A[:, -1:]
        u_end, s_end = gates.u_end, gates.s_end
        w = gates.w
        if full and self.row is not None:  # the row factor of its last token, which U is without
            last = self.row[-1]
            u_end = last if u_end is None else last * u_end
            s_end = None if s_end is None else last * s_end
            w = tuple(last * x for x in w)
        end, momenta = list(now.W), list(now.W)

        def times(m: int, z: Tensor) -> Tensor:
            r = m % len(w)
            o, end[m], momenta[m] = Dual.apply(
                full,
                *(with_bias(self.rule.network, z), X[m], E[m], gates.L[r], w[r]),
                *(None if gates.t is None else gates.t[r], gates.theta),
                *(now.W[m], A, A_end),
                *(now.U and now.U[m], gates.u, u_end),
                *(now.S and now.S[m], gates.s, s_end),
            )
            return o

        o, _ = self.rule.network.forward(times, q, self.layer_norm)
        S = None if now.S is None else tuple(momenta)
        if not full:
            return o, now._replace(U=tuple(end), S=S, A=A_end)
        return o, self.end(now, tuple(end), S, k, v)

    def chunk_piece(
        self,
        now: Running,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: tuple[Tensor, Tensor | None, Tensor | None],
        full: bool,
    ) -> tuple[Tensor, Running]:
        """gates: lr `[N, n, M]`, momentum and retention `[N, n]`."""
        rule, (lr, momentum, retention) = self.rule, gates
        o = self.read(now.mapped if rule.place == "view" else now.W, q)
        X, E = self.gradients(now.mapped, k, v)
        rates = lr.unsqueeze(-1).unbind(-2)
        U = tuple(
            AddGradients.apply(
                X[m], E[m], rates[m % len(rates)], None if now.U is None else now.U[m]
            )
            for m in self.matrices
        )
        A, m = now.A, now.m
        if retention is not None:
            A = scaled(A, retention.prod(-1)[:, None, None])
        if momentum is not None:
            total = momentum.sum(-1)[:, None, None]
            m = total if m is None else m + total
        if not full:
            return o, now._replace(U=U, A=A, m=m)
        S = now.S
        if S is not None:
            assert m is not None
            mean = m / rule.mini_batch
            U = S = tuple(torch.addcmul(u, s, mean) for u, s in zip(U, S, strict=True))
        base = now.W if rule.place == "view" else now.mapped
        W = tuple(scaled(A, w) + rule.optimiser.direction(u) for w, u in zip(base, U, strict=True))
        return o, self.end(now, W, S, k, v)

    def end(self, now: Running, W: Weights, S: Any, k: Tensor, v: Tensor) -> Running:
        """The end of a mini-batch."""
        new = self.begin(self.phi(W, "end"), S)
        if self.watch is not None:
            view = self.rule.place == "view"
            self.watch(self, now.mapped, new.mapped if view else new.W, k, v)
        return new

    def group(self, now: Running, start: int, n: int, *seq: Tensor | None) -> Any:
        """Pieces of n tokens each, `[B, g n, H, ..]`, from position `start` of a mini-batch."""
        found: Any = (None if x is None else join_heads(x) for x in chunk_views(n, *seq))
        q, k, v, lr, *rest = found
        momentum, decay = (None if x is None else x.squeeze(-1) for x in rest)
        retention = None if decay is None else 1 - decay
        C, row, outputs = self.rule.mini_batch, self.row, []
        if self.rule.update == "token":
            part = None if row is None else row[start : start + n]
            gates: Any = token_gates(lr, momentum, retention, part)
            piece: Any = Engine.token_piece
        else:
            each = lambda x: [None] * len(lr) if x is None else x.unbind(0)  # noqa: E731
            gates = zip(lr.unbind(0), each(momentum), each(retention), strict=True)
            piece = Engine.chunk_piece
        if self.compiled and n == min(C, MAX_PIECE):
            piece = compiled_piece(piece, self.rule)
        for x in zip(q.unbind(0), k.unbind(0), v.unbind(0), gates, strict=True):
            start += n
            o, now = piece(self, now, *x, full=start % C == 0)
            outputs.append(o)
        return outputs, now


def plan(T: int, start: int, C: int, rows: int) -> Iterator[tuple[int, int, int]]:
    """(position in the mini-batch, tokens a piece, pieces) of every group; a piece stays in one
    mini-batch, and a group is short enough for the cache."""
    while T:
        left = min(C - start, T)
        n = min(left, MAX_PIECE)
        whole = T // C if start == 0 and n == C else left // n
        g = max(1, min(whole, SEGMENT // (rows * n)))
        yield start, n, g
        T, start = T - g * n, (start + g * n) % C


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    momentum: Tensor | None,
    decay: Tensor | None,
    row: Tensor | None,
    layer_norm: tuple[Tensor, Tensor] | None,
    initial: Weights,
    *,
    rule: Rule,
    state: WeightsState,
    checkpoint: bool,
    compiled: bool,
    watch: Watch | None,
) -> tuple[Tensor, WeightsState]:
    """See `fast_weights`. initial: weights `[N, I, O]`; layer_norm: `[N, 1, V]` each."""
    B, T, H, _ = q.shape
    if T == 0:
        return torch.zeros_like(v), state
    engine = Engine(rule, initial, row, layer_norm, watch, compiled and watch is None)
    flat = {name: to_rows(x) for name, x in state.items() if name != "position"}
    past, C = position(state), rule.mini_batch
    start = past % C
    now = engine.begin(flat["weights"], flat.get("momentum"), first=past < C)
    if start:
        A, m = (None if (x := flat.get(n)) is None else x[:, None, None] for n in PENDING)
        now = now._replace(U=flat["updates"], A=A, m=m)
    groups = list(plan(T, start, C, B * H))
    sizes = [n * g for _, n, g in groups]
    gates = (None if x is None else x.unsqueeze(-1) for x in (momentum, decay))
    parts = [
        [None] * len(sizes) if x is None else x.split(sizes, 1) for x in (q, k, v, lr, *gates)
    ]
    outputs = []
    for (begin, n, _), *seq in zip(groups, *parts, strict=True):
        if checkpoint and torch.is_grad_enabled():
            o, now = recompute(engine.group, now, begin, n, *seq, use_reentrant=False)
        else:
            o, now = engine.group(now, begin, n, *seq)
        outputs += o
    o = torch.cat(outputs, 1).unflatten(0, (B, H)).transpose(1, 2)
    return o, from_rows(now, state, past + T, (B, H))


def read_only(
    q: Tensor,
    row: Tensor | None,
    layer_norm: tuple[Tensor, Tensor] | None,
    initial: Weights,
    *,
    rule: Rule,
    state: WeightsState,
) -> Tensor:
    """What q `[B, T, H, K]` reads from a state, which does not change."""
    B, _, H, _ = q.shape
    engine = Engine(rule, initial, row, layer_norm)
    W, past = to_rows(state["weights"]), position(state)
    if rule.update == "chunk":
        now = engine.begin(W, None, first=past < rule.mini_batch)
        weights = now.mapped if rule.place == "view" else W
    elif (start := past % rule.mini_batch) == 0:
        weights = W
    else:
        A = None if "retention" not in state else to_rows(state["retention"])[:, None, None]
        factor = None if row is None else row[start - 1]
        U = to_rows(state["updates"])
        weights = tuple(scaled(A, w) + scaled(factor, u) for w, u in zip(W, U, strict=True))
    o = engine.read(weights, q.transpose(1, 2).flatten(0, 1))
    return o.unflatten(0, (B, H)).transpose(1, 2)
