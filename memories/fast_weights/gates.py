"""The coefficients of `update: token`: what n tokens' gates make of the state and the writes."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from .primitives import products


class Gates(NamedTuple):
    """The coefficients of a piece, of `update: token`; None is 1, or 0 where there is no S.

    A, u, s: of W, U and S in what a token reads, `[N, n, 1]`. L: of the tokens' gradients, one a
    matrix or one for all, `[N, n, n]`. u_end, s_end, w: of U, S and the gradients in U at the end.
    theta, t: of S and the gradients in S at the end.
    """

    A: Tensor | None
    u: Tensor | None
    s: Tensor | None
    L: tuple[Tensor, ...]
    u_end: Tensor | None
    s_end: Tensor | None
    w: tuple[Tensor, ...]
    theta: Tensor | None
    t: tuple[Tensor, ...] | None


def token_gates(
    lr: Tensor, momentum: Tensor | None, retention: Tensor | None, row: Tensor | None
) -> list[Gates]:
    """The coefficients of a group of pieces, batched over it: lr `[g, N, n, M]`, momentum and
    retention `[g, N, n]`, row `[n]`."""
    n = lr.shape[-2]
    rates = lr.unsqueeze(-1).unbind(-2)  # [g, N, n, 1], one a matrix, or one for all
    A = s = theta = t = None
    L = lr.new_ones(n, n).tril()
    if retention is not None:
        L = products(retention)
        A = retention[..., :1, None] * L[..., :1]
    if momentum is not None:
        since = products(momentum)
        first = momentum[..., :1, None] * since[..., :1]
        s, L = L @ first, L @ since
        theta, last = first[..., -1:, :], since[..., -1, :, None]
        t = tuple(last * rate for rate in rates)
    u_end = None if A is None else A[..., -1:, :]
    s_end = None if s is None else s[..., -1:, :]
    last = L[..., -1, :, None]
    w = tuple(last * rate for rate in rates)
    u = A
    if row is not None:
        row = row.unsqueeze(-1)
        L, u, s = row * L, row if A is None else row * A, None if s is None else row * s
    Ls = tuple(L * rate.mT for rate in rates)

    def each(x: Any) -> Any:
        """One of each for every piece of the group."""
        if isinstance(x, tuple):
            return list(zip(*map(each, x), strict=True))
        return [x] * len(lr) if x is None or x.dim() == 2 else x.unbind(0)

    found = Gates(A, u, s, Ls, u_end, s_end, w, theta, t)
    return [Gates(*x) for x in zip(*map(each, found), strict=True)]
