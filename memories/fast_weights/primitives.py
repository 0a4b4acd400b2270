"""What a mini-batch is made of: three functions with hand-written backward passes.

X `[N, n, I]` are the inputs of a matrix in the write pass and E `[N, n, O]` the errors at its
outputs, so that token j's gradient is X_j^T E_j. A coefficient is a tensor that broadcasts, `[N, n, 1]`
(of tokens) or `[N, 1, 1]` (of rows), or None for 1. Products are scaled at their narrower side.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..chunks import once_differentiable

if TYPE_CHECKING:
    from jaxtyping import Float

Terms = list[tuple[Tensor | None, Tensor]]
"""Coefficients and the matrices `[N, I, O]` that they weigh."""

TINY = 1e-20
"""Products of gates below this are 0: else they become denormals, and arithmetic crawls."""


def scaled(c: Tensor | None, x: Tensor) -> Tensor:
    return x if c is None else x * c


def pairs(flat: tuple[Any, ...] | list[Any]) -> Iterable[tuple[Any, Any]]:
    return zip(flat[::2], flat[1::2], strict=True)


def dot(x: Tensor, y: Tensor) -> Float[Tensor, "N 1 1"]:
    """Sum of x y over a row's matrix."""
    return torch.bmm(x.flatten(1).unsqueeze(1), y.flatten(1).unsqueeze(2))


def read(z: Tensor, X: Tensor, E: Tensor, L: Tensor, terms: Terms) -> Float[Tensor, "N n O"]:
    """o_i = z_i W_i with every token's own W_i = sum_s c_s,i B_s - sum_j L_ij X_j^T E_j, which are
    never formed: o = sum_s c_s (z B_s) - (L * z X^T) E. (L is zero above its diagonal.)"""
    return Read.apply(z, X, E, L, *(x for term in terms for x in term))


class Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, X: Tensor, E: Tensor, L: Tensor, *terms: Any) -> Tensor:
        P = z @ X.mT
        o = torch.bmm(P * L, E).neg_()
        narrow_in, products = z.shape[-1] <= E.shape[-1], []
        for c, B in pairs(terms):
            if c is None or narrow_in:
                o.baddbmm_(scaled(c, z), B)
            else:
                products.append(z @ B)
                o.addcmul_(products[-1], c)
        ctx.narrow_in, ctx.count = narrow_in, len(products)
        ctx.save_for_backward(z, X, E, L, P, *products, *terms)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (g,) = grad_outputs
        z, X, E, L, P, *rest = ctx.saved_tensors
        products, terms = iter(rest[: ctx.count]), rest[ctx.count :]
        G = torch.bmm(g, E.mT).neg_()
        d_P = G * L
        d_z = d_P @ X
        d_terms = []
        for c, B in pairs(terms):
            d_c = None
            if c is None:
                d_z.baddbmm_(g, B.mT)
                d_B = z.mT @ g
            elif ctx.narrow_in:
                y = g @ B.mT
                d_z.addcmul_(y, c)
                d_B, d_c = (z * c).mT @ g, (y * z).sum(-1, keepdim=True)
            else:
                y = g * c
                d_z.baddbmm_(y, B.mT)
                d_B, d_c = z.mT @ y, (next(products) * g).sum(-1, keepdim=True)
            d_terms += [reduced(d_c, c), d_B]
        d_E = torch.bmm((P * L).mT, g).neg_()
        return d_z, d_P.mT @ z, d_E, reduced(G.mul_(P), L), *d_terms


def reduced(grad: Tensor | None, like: Tensor | None) -> Tensor | None:
    """The gradient of a coefficient, summed where it was broadcast."""
    return None if grad is None or like is None else grad.sum_to_size(like.shape)


def write(X: Tensor, E: Tensor, c: Tensor, terms: Terms) -> Float[Tensor, "N I O"]:
    """sum_s c_s B_s - X^T (c E): matrices after the writes of n tokens."""
    return Write.apply(X, E, c, *(x for term in terms for x in term))


class Write(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, X: Tensor, E: Tensor, c: Tensor, *terms: Any) -> Tensor:
        ctx.save_for_backward(X, E, c, *terms)
        x, e = (X * -c, E) if X.shape[-1] <= E.shape[-1] else (X, E * -c)
        if not terms:
            return x.mT @ e
        (a, B), *more = pairs(terms)
        W = torch.baddbmm(B, x.mT, e) if a is None else (B * a).baddbmm_(x.mT, e)
        for a, B in more:
            W = W.add_(B) if a is None else W.addcmul_(B, a)
        return W

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (g,) = grad_outputs
        X, E, c, *terms = ctx.saved_tensors
        if X.shape[-1] <= E.shape[-1]:
            y, x = E @ g.mT, X * -c
            d_X, d_E, d_c = y * -c, x @ g, (X * y).sum(-1, keepdim=True).neg_()
        else:
            y, e = X @ g, E * -c
            d_X, d_E, d_c = e @ g.mT, y * -c, (E * y).sum(-1, keepdim=True).neg_()
        d_terms = []
        for a, B in pairs(terms):
            d_terms += [None, g] if a is None else [reduced(dot(g, B), a), g * a]
        return d_X, d_E, reduced(d_c, c), *d_terms


def products(x: Float[Tensor, "... n"]) -> Float[Tensor, "... n n"]:
    """L[i, j] = x_(j+1) .. x_i for j <= i, else 0. (Never a ratio of running products, which is
    0 / 0 where a gate is 0; nor the exponential of sums of logarithms.) x in [0, 1]."""
    return Products.apply(x)


class Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        n = x.shape[-1]
        below = torch.ones(n, n, dtype=torch.bool, device=x.device).tril(-1)
        L = torch.where(below, x.unsqueeze(-1), 1).cumprod(-2)
        L = L.masked_fill_(L < TINY, 0.0).tril_()
        ctx.save_for_backward(L)
        return L

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """x_l is in L[i, j] for j < l <= i, times L[i, l] L[l-1, j]."""
        (g,) = grad_outputs
        (L,) = ctx.saved_tensors
        below = (L.mT @ g).tril_(-1)
        d_x = torch.zeros_like(L[..., 0])
        torch.linalg.vecdot(below[..., 1:, :], L[..., :-1, :], out=d_x[..., 1:])
        return d_x
