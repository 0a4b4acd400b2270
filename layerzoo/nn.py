"""Parts of layers and blocks: normalisation, decays, SwiGLU and the short convolution."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerzoo.ops import accumulator_dtype, transforming

if TYPE_CHECKING:
    from jaxtyping import Float


class UnitLength(torch.autograd.Function):
    """x / sqrt(|x|^2 + eps) over the last dimension, in two passes over x, and two backward: by
    parts it takes seven, which are most of a small layer's time on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        r = UnitLength.inverse(x, eps)
        ctx.eps = eps
        ctx.save_for_backward(x, r)
        return x * r

    @staticmethod
    def inverse(x: Tensor, eps: float) -> Tensor:
        return torch.rsqrt(torch.linalg.vecdot(x, x) + eps).unsqueeze(-1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (g,) = grad_outputs
        x, r = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative needs to see that r depends on x
            r = UnitLength.inverse(x, ctx.eps)
        along = torch.linalg.vecdot(x, g).unsqueeze(-1) * r * r
        return torch.addcmul(g, x, along, value=-1) * r, None


def unit_length(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(|x|^2 + eps) over the last dimension."""
    return x * UnitLength.inverse(x, eps) if transforming() else UnitLength.apply(x, eps)


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight, in the weight's dtype under autocast too."""

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[-1]
        unit = unit_length(x.to(self.weight.dtype), n * (self.eps or 0.0))
        return (unit * (self.weight * n**0.5)).to(x.dtype)


class Constant(nn.Module):
    """A tensor that nothing trains, saves or rounds, whatever dtype its module is cast to: it is
    called for its value in float32, or in float64 in a module of float64.

    exact: in float64.
    """

    value: Tensor

    def __init__(self, exact: Tensor) -> None:
        super().__init__()
        self.exact = exact
        self.register_buffer("value", exact.float(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.value = self.exact.to(self.value.device, accumulator_dtype(self.value))
        return self

    def forward(self) -> Tensor:
        return self.value


class SwiGLU(nn.Module):
    """y = (silu(x W_g) * (x W_u)) W_d, without biases (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class ShortConv(nn.Module):
    """Causal depthwise convolution with a residual: y_t = x_t + sum_j w_j x_{t-width+1+j}.

    Its state is the last width - 1 inputs, `[B, width - 1, D]`. With width 2 or more a token sees
    its predecessor, which is what binds a key to the value that follows it.
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(torch.empty(dim, width).uniform_(-1, 1) / width**0.5)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[1] == 0:
            return x, state
        past = torch.cat((state.to(x.dtype), x), dim=1)
        y = F.conv1d(past.mT, self.weight.to(x.dtype).unsqueeze(1), groups=x.shape[-1])
        # A view would keep the whole piece alive.
        return x + y.mT, past[:, past.shape[1] - self.width + 1 :].clone()

    def init_state(self, batch_size: int) -> Tensor:
        return self.weight.new_zeros(batch_size, self.width - 1, self.weight.shape[0])


def l2_normalise(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(|x|^2 + eps) over the last dimension; finite gradient at zero."""
    return unit_length(wide(x), eps).to(x.dtype)


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is float64."""
    return x if x.dtype == torch.float64 else x.float()


LOWEST = 5
"""A bounded gate stays above minus this (Kimi K3)."""


class LogDecay(nn.Module):
    """A gate that says how much of a memory each token leaves: its logarithm, which is at most 0.

    log D_t = -exp(A) softplus(z_t) or, bounded, log D_t = -5 sigmoid(exp(A) z_t)

    where z_t = x_t W + b, and A is one number per head.

    Args:
        dim: x has this width.
        heads: there are this many heads.
        channels: D_t has this many channels per head; None is one number per head.
        rank: W is a product of two matrices through this width; None is a full matrix.
        config: it has decay_gate, and the start in decay_rate and decay_step.

    Returns:
        `[B, T, heads]`, or `[B, T, heads, channels]`.

    Source: Mamba-2, arXiv 2405.21060; Kimi Linear, 2510.26692, for the bounded gate of Kimi K3.
    """

    def __init__(
        self, dim: int, heads: int, channels: int | None, rank: int | None, config: Any
    ) -> None:
        super().__init__()
        self.heads, self.channels, size = heads, channels, heads * (channels or 1)
        self.bounded = config.decay_gate == "bounded"
        if rank is None:
            self.x: nn.Module = nn.Linear(dim, size, bias=False)
        else:
            rank = min(rank, dim)
            self.x = nn.Sequential(
                nn.Linear(dim, rank, bias=False), nn.Linear(rank, size, bias=False)
            )
        rates = torch.empty(heads, 1).uniform_(*config.decay_rate)
        steps = torch.empty(size).uniform_(*map(math.log, config.decay_step)).exp()
        self.A_log = nn.Parameter(rates.log())
        if self.bounded:
            start = (rates * steps.view(heads, -1) / LOWEST).logit() / rates
            self.bias = nn.Parameter(start.flatten())
        else:
            self.bias = nn.Parameter(steps + torch.log(-torch.expm1(-steps)))  # softplus^-1

    def gate(self, x: Tensor) -> Float[Tensor, "B T H channels"]:
        """z = x W + b."""
        return (wide(self.x(x)) + wide(self.bias)).unflatten(-1, (self.heads, -1))

    def step(self, x: Tensor) -> Float[Tensor, "B T H channels"]:
        """softplus(z), which Mamba calls dt."""
        return F.softplus(self.gate(x))

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x)
        decay = log_decay(gate, self.A_log.to(gate.dtype), self.bounded)
        return decay if self.channels else decay[..., 0]


def log_decay(z: Tensor, A_log: Tensor, bounded: bool) -> Tensor:
    """-exp(A) softplus(z), or bounded -5 sigmoid(exp(A) z)."""
    rate = A_log.exp()
    return -LOWEST * (rate * z).sigmoid() if bounded else -rate * F.softplus(z)
