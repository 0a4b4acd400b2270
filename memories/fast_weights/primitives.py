"""What a mini-batch is made of: functions with hand-written backward passes.

X `[N, n, I]` are the inputs of a matrix in the write pass and E `[N, n, O]` the errors at its
outputs, so that token j's gradient is X_j^T E_j. A coefficient broadcasts, `[N, n, 1]` (of tokens)
or `[N, 1, 1]` (of a row), or is None for 1. Products are scaled at their narrower side.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from layerzoo.ops import once_differentiable

if TYPE_CHECKING:
    from jaxtyping import Float

TINY = 1e-20
"""Products of gates below this are 0: else they become denormals, and arithmetic crawls."""


def scaled(c: Tensor | None, x: Tensor) -> Tensor:
    return x if c is None else x * c


def row_sum(x: Tensor, y: Tensor, like: Tensor) -> Tensor:
    """The gradient of a coefficient: the sum of x y over all along which it was broadcast."""
    if like.dim() == 0 or like.shape[-2] == 1:
        total = (x * y).sum((1, 2), keepdim=True)
    else:
        total = torch.linalg.vecdot(x, y).unsqueeze(-1)
    return total.sum_to_size(like.shape)


class Dual(torch.autograd.Function):
    """Reads and writes of n tokens at one matrix. Token i reads with its own weights
    W_i = sum_s c_s,i B_s - sum_j L_ij X_j^T E_j, which are never formed:

        o = sum_s c_s (z B_s) - (L * z X^T) E            (L is zero above its diagonal)
        end = sum_s end_s B_s - X^T (w E)
        S' = theta S - X^T (t E)                         (where there is a momentum S)

    The Bs are W, U (None at the start of a mini-batch) and S (None without momentum); W is in
    `end` only if `full`, which is then the next mini-batch's W, else U.
    """

    @staticmethod
    def forward(
        ctx: Any,
        full: bool,
        z: Any,
        X: Any,
        E: Any,
        L: Any,
        w: Any,
        t: Any,
        theta: Any,
        *parts: Any,
    ) -> Any:
        P = z @ X.mT
        o = torch.bmm((P * L).neg_(), E)
        narrow = X.shape[-1] <= E.shape[-1]
        end: Any = None
        products: list[Tensor] = []
        for n, (B, c, e) in enumerate(_parts(parts)):
            if B is None:
                continue
            if c is None or narrow:
                o.baddbmm_(scaled(c, z), B)
            else:
                products.append(z @ B)
                o.addcmul_(products[-1], c)
            if n or full:
                end = _add_scaled(end, e, B)
        end = _subtract_outer(end, X, E, w)
        S = None if theta is None else _subtract_outer(_parts(parts)[2][0] * theta, X, E, t)
        ctx.full, ctx.count = full, len(products)
        ctx.save_for_backward(z, X, E, L, w, t, theta, P, *products, *parts)
        return o, end, S

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        g, g_end, g_S = grad_outputs
        z, X, E, L, w, t, theta, P, *rest = ctx.saved_tensors
        products, parts = iter(rest[: ctx.count]), rest[ctx.count :]
        narrow = X.shape[-1] <= E.shape[-1]
        G = torch.bmm(g, E.mT).neg_()
        d_P = G * L
        d_z, d_X, d_E = d_P @ X, d_P.mT @ z, torch.bmm((P * L).neg_().mT, g)
        d_L = G.mul_(P)
        d_w = _outer_backward(g_end, X, E, w, d_X, d_E)
        d_t = d_theta = None
        if theta is not None:
            d_t = _outer_backward(g_S, X, E, t, d_X, d_E)
            d_theta = row_sum(g_S, parts[6], theta)
        grads = []
        for n, (B, c, e) in enumerate(_parts(parts)):
            if B is None:
                grads += [None, None, None]
                continue
            if c is None:
                left, right, d_c = z, g, None
                d_z.baddbmm_(g, B.mT)
            elif narrow:
                y = g @ B.mT
                d_z.addcmul_(y, c)
                left, right, d_c = z * c, g, row_sum(y, z, c)
            else:
                left, right, d_c = z, g * c, row_sum(next(products), g, c)
                d_z.baddbmm_(right, B.mT)
            d_e = None
            if n or ctx.full:
                if e is None:
                    d_B = torch.baddbmm(g_end, left.mT, right)
                else:
                    d_B, d_e = (g_end * e).baddbmm_(left.mT, right), row_sum(g_end, B, e)
            else:
                d_B = left.mT @ right
            if n == 2 and theta is not None:
                d_B.addcmul_(g_S, theta)
            grads += [d_B, d_c, d_e]
        return None, d_z, d_X, d_E, d_L.sum_to_size(L.shape), d_w, d_t, d_theta, *grads


def _parts(flat: Any) -> list[Any]:
    """(B, c, end) of W, U and S."""
    return [flat[0:3], flat[3:6], flat[6:9]]


def _add_scaled(total: Tensor | None, c: Tensor | None, B: Tensor) -> Tensor:
    if total is None:
        return B.clone() if c is None else B * c
    return total.add_(B) if c is None else total.addcmul_(B, c)


def _subtract_outer(total: Tensor | None, X: Tensor, E: Tensor, w: Tensor) -> Tensor:
    """total - X^T (w E), into `total`."""
    x, e = (X * w, E) if X.shape[-1] <= E.shape[-1] else (X, E * w)
    return torch.bmm(x.mT, e).neg_() if total is None else total.baddbmm_(x.mT, e, alpha=-1)


def _outer_backward(
    g: Tensor, X: Tensor, E: Tensor, w: Tensor, d_X: Tensor, d_E: Tensor
) -> Float[Tensor, "N n 1"]:
    """The gradients of -X^T (w E), from g: added to d_X and d_E; of w, returned."""
    if X.shape[-1] <= E.shape[-1]:
        y = E @ g.mT
        d_X.addcmul_(y, w, value=-1)
        d_E.baddbmm_(X * w, g, alpha=-1)
        return row_sum(X, y, w).neg()
    y = X @ g
    d_E.addcmul_(y, w, value=-1)
    d_X.baddbmm_(E * w, g.mT, alpha=-1)
    return row_sum(E, y, w).neg()


class AddGradients(torch.autograd.Function):
    """U - X^T (w E), U None for 0: the sum of a piece's gradients."""

    @staticmethod
    def forward(ctx: Any, X: Tensor, E: Tensor, w: Tensor, U: Tensor | None) -> Tensor:
        ctx.save_for_backward(X, E, w)
        return _subtract_outer(None if U is None else U.clone(), X, E, w)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (g,) = grad_outputs
        X, E, w = ctx.saved_tensors
        d_X, d_E = torch.zeros_like(X), torch.zeros_like(E)
        d_w = _outer_backward(g, X, E, w, d_X, d_E)
        return d_X, d_E, d_w, g if ctx.needs_input_grad[3] else None


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
        L = F.threshold(L, TINY, 0.0, inplace=True).tril_()
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
