"""The activations of the inner networks, with first and second derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from layerzoo.ops import once_differentiable


class Activation(NamedTuple):
    """f(x); `times_slope(g, x)` = g f'(x), of one fused kernel; `curvature(x)` = f''(x)."""

    f: Callable[[Tensor], Tensor]
    times_slope: Callable[[Tensor, Tensor], Tensor]
    curvature: Callable[[Tensor], Tensor]

    def times_derivative(self, g: Tensor, x: Tensor) -> Tensor:
        """g f'(x), differentiable in both."""
        return Slope.apply(g, x, self)


class Slope(torch.autograd.Function):
    """g f'(x). Autograd through f' would keep and pass over five more tensors."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(g, x)
        ctx.activation = activation
        return activation.times_slope(g, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (d,) = grad_outputs
        g, x = ctx.saved_tensors
        need_g, need_x, _ = ctx.needs_input_grad
        d_g = ctx.activation.times_slope(d, x) if need_g else None
        d_x = ctx.activation.curvature(x).mul_(g).mul_(d) if need_x else None
        return d_g, d_x, None


def _gelu_curvature(x: Tensor) -> Tensor:
    """(2 - x^2) phi(x), phi the normal density."""
    square = x * x
    phi = (square * -0.5).exp_().mul_(1 / math.sqrt(2 * math.pi))
    return square.neg_().add_(2).mul_(phi)


def _gelu_tanh_curvature(x: Tensor) -> Tensor:
    """Of x (1 + tanh u) / 2 with u = a (x + b x^3)."""
    a, b = math.sqrt(2 / math.pi), 0.044715
    square = x * x
    t = torch.tanh(a * x * (b * square + 1))
    bend = square.mul_(3 * a * b)
    slope = bend + a
    return (slope + bend).sub_(slope * slope * x * t).mul_(1 - t * t)


def _silu_curvature(x: Tensor) -> Tensor:
    """s (1 - s) (2 + x (1 - 2 s)), s the sigmoid."""
    s = torch.sigmoid(x)
    return (1 - 2 * s).mul_(x).add_(2).mul_(s).mul_(1 - s)


_aten: Any = torch.ops.aten
GELU = Activation(F.gelu, lambda g, x: _aten.gelu_backward(g, x), _gelu_curvature)
GELU_TANH = Activation(
    lambda x: F.gelu(x, approximate="tanh"),
    lambda g, x: _aten.gelu_backward(g, x, approximate="tanh"),
    _gelu_tanh_curvature,
)
SILU = Activation(F.silu, lambda g, x: _aten.silu_backward(g, x), _silu_curvature)
