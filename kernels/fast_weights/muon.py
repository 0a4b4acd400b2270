"""Muon's step and its backward, in float32 products: bfloat16 loses the small singular values,
which five iterations of Newton-Schulz amplify.

Gate and up are one tensor `[N, K, 2 F]` here, but two matrices, of a norm each.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEWTON_SCHULZ = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
"""a, b and c of every iteration; a test compares them with the portable form's."""


def matrices(x: Tensor, count: int) -> Tensor:
    """`[N, I, count O]` -> `[count N, rows, columns]`, wide."""
    x = torch.cat(x.chunk(count, -1)) if count > 1 else x
    return x.mT.contiguous() if x.shape[-2] > x.shape[-1] else x


def whole(x: Tensor, like: Tensor, count: int) -> Tensor:
    """The inverse of `matrices`, for a tensor of the shape of `like`."""
    x = x.mT if like.shape[-2] > like.shape[-1] // count else x
    return torch.cat(x.chunk(count), -1) if count > 1 else x.contiguous()


def steps(X: Tensor) -> list[Tensor]:
    """X of every iteration: X <- a X + (b P + c P^2) X, P = X X^T."""
    found = [X]
    for a, b, c in NEWTON_SCHULZ:
        P = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(P, P, P, beta=b, alpha=c), X, beta=a)
        found.append(X)
    return found


def direction(S: Tensor, count: int, eps: float) -> Tensor:
    X = matrices(S, count)
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + eps)
    return whole(steps(X)[-1], S, count)


def backward_direction(g: Tensor, S: Tensor, count: int, eps: float) -> Tensor:
    """The gradient of S, from the one of its direction."""
    Z, g = matrices(S, count), matrices(g, count)
    r = Z.norm(dim=(-2, -1), keepdim=True)
    found = steps(Z / (r + eps))
    for X, (a, b, c) in zip(found[-2::-1], NEWTON_SCHULZ[::-1], strict=True):
        P, d = X @ X.mT, g @ X.mT
        B = torch.baddbmm(P, P, P, beta=b, alpha=c)
        d_P = b * d + c * (d @ P + P @ d)
        g = a * g + B @ g + (d_P + d_P.mT) @ X
    inner = (g * Z).sum((-2, -1), keepdim=True)
    bend = torch.where(r > 0, inner / (r * (r + eps) ** 2), 0.0)
    return whole(g / (r + eps) - bend * Z, S, count)
