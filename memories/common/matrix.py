"""Memories whose state is one matrix S `[K, V]` per head, which is read by o = scale q S.

Here are their config, their decays D_t (S_t = D_t S_{t-1} + ...), their state and their read-out.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerzoo.layer import Reduction, State, StateBytes
from layerzoo.memory import Memory, Write
from layerzoo.nn import Constant
from layerzoo.ops import accumulator_dtype
from layerzoo.spec import SpecError

if TYPE_CHECKING:
    from jaxtyping import Float


class MatrixConfig(Memory.Config):
    """Fields that every matrix memory has."""

    decay: Literal["none", "constant", "scalar", "vector"] = "none"
    """This is the factor D_t in S_t = D_t S_{t-1}. none is 1. constant is 1 - 2^-(5+h) in head h
    (RetNet). scalar is exp(g_t), with a gate g_t per head and token (Mamba-2). vector has a gate
    per key channel and token, through a projection of rank 16."""
    decay_gate: Literal["softplus", "bounded"] = "softplus"
    """g_t follows from z_t = x_t W + b. softplus is -exp(A) softplus(z_t). bounded is -5
    sigmoid(exp(A) z_t), which is never below -5 (Kimi K3)."""
    decay_rate: tuple[float, ...] = (1.0, 1.0)
    """exp(A) is drawn from this range at the start, uniformly."""
    decay_step: tuple[float, ...] = (1e-3, 1e-1)
    """softplus(b) is drawn from this range at the start, uniformly in its logarithm. Half of what
    is written is gone after ln 2 / (rate step) tokens. A bounded gate starts with the same
    decays."""

    def check(self) -> None:
        super().check()
        for name in ("decay_rate", "decay_step"):
            value = getattr(self, name)
            if len(value) != 2 or not 0 < value[0] <= value[1]:
                raise SpecError(f"{name}: expected a range, 0 < low <= high, got {[*value]}")
        if self.decay_gate == "bounded" and self.decay_rate[1] * self.decay_step[1] >= LOWEST:
            raise SpecError(
                f"decay_gate: bounded is above -{LOWEST}, and cannot start at a rate x step of "
                f"{self.decay_rate[1] * self.decay_step[1]:g}; lower decay_rate or decay_step"
            )


LOWEST = 5
"""A bounded gate stays above minus this (Kimi K3)."""


class LogDecay(nn.Module):
    """log D_t = -exp(A) softplus(z_t) or, bounded, -5 sigmoid(exp(A) z_t), where z_t = x_t W + b.

    Args:
        dim: width of x.
        heads, channels: log D_t is `[B, T, heads, channels]`; one channel is a decay per head.
        rank: of W; None is a full matrix.
        config: the gate and its start.

    Source: Mamba-2, arXiv 2405.21060; Kimi Linear, 2510.26692, for the bounded gate of Kimi K3.
    """

    def __init__(
        self, dim: int, heads: int, channels: int, rank: int | None, config: MatrixConfig
    ) -> None:
        super().__init__()
        self.heads, size = heads, heads * channels
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
        wide = accumulator_dtype(x)
        return (self.x(x).to(wide) + self.bias.to(wide)).unflatten(-1, (self.heads, -1))

    def step(self, x: Tensor) -> Float[Tensor, "B T H channels"]:
        """softplus(z), which Mamba calls dt."""
        return F.softplus(self.gate(x))

    def forward(self, x: Tensor) -> Float[Tensor, "B T H channels"]:
        gate = self.gate(x)
        return log_decay(gate, self.A_log.to(gate.dtype), self.bounded)


def log_decay(z: Tensor, A_log: Tensor, bounded: bool) -> Tensor:
    """-exp(A) softplus(z), or bounded -5 sigmoid(exp(A) z)."""
    rate = A_log.exp()
    return -LOWEST * (rate * z).sigmoid() if bounded else -rate * F.softplus(z)


def strength(dim: int, heads: int, bias: float | None) -> nn.Linear:
    """The argument of beta's sigmoid per head: x w + b, where b starts at `bias`; None is x w."""
    made = nn.Linear(dim, heads, bias=bias is not None)
    if bias is not None:
        nn.init.constant_(made.bias, bias)
    return made


def silence_decay(layer: Any) -> None:
    """Set a scalar or vector decay to D_t = 1, which changes nothing."""
    gate = layer.log_decay
    nn.init.constant_(gate.bias if gate.bounded else gate.A_log, -torch.inf)


class MatrixMemory(Memory):
    """The part that all matrix memories share: decay, state and read-out. A rule adds its op."""

    Config: ClassVar[Any] = MatrixConfig
    reductions = (
        Reduction({"decay": "scalar"}, {"decay": "none"}, silence_decay),
        Reduction({"decay": "vector"}, {"decay": "none"}, silence_decay),
        Reduction({"decay": "vector", "decay_gate": "bounded"}, {"decay": "none"}, silence_decay),
    )
    log_decay: Any
    """A `LogDecay`, or a `Constant`; absent without a decay."""

    def __init__(self, dim: int, config: MatrixConfig) -> None:
        super().__init__(dim, config)
        if config.decay == "constant":
            decay = 1 - 2.0 ** (-5 - torch.arange(self.heads, dtype=torch.float64))
            self.log_decay = Constant(decay.log())
        elif config.decay == "scalar":
            self.log_decay = LogDecay(dim, self.heads, 1, None, config)
        elif config.decay == "vector":
            channels, _ = self.matrix()
            self.log_decay = LogDecay(dim, self.heads, channels, 16, config)

    def matrix(self) -> tuple[int, int]:
        """The rows and columns of S."""
        return self.key_dim, self.value_dim

    def gates(self, x: Tensor) -> Write:
        if self.config.decay in ("none", "constant"):
            return {}
        log_decay = self.log_decay(x)
        return {"log_decay": log_decay[..., 0] if self.config.decay == "scalar" else log_decay}

    def constants(self) -> dict[str, Any]:
        """The arguments of the op that do not depend on the tokens."""
        decay = {"log_decay": self.log_decay()} if self.config.decay == "constant" else {}
        return {**decay, "scale": self.scale, "impl": self.impl}

    def read(self, q: Tensor, state: State) -> Tensor:
        o = torch.einsum("bthk,bhkv->bthv", q.to(state.dtype) * self.scale, state)
        return o.to(q.dtype)

    def rule_state(self, batch_size: int) -> State:
        return self.accumulator(batch_size, self.heads, *self.matrix())

    def rule_bytes(self, T: int) -> StateBytes:
        rows, columns = self.matrix()
        return StateBytes(4 * self.heads * rows * columns)


def zero_state(k: Tensor, v: Tensor) -> Float[Tensor, "B H K V"]:
    B, _, H, K = k.shape
    return k.new_zeros(B, H, K, v.shape[-1])


def per_token(log_decay: Tensor | None, k: Tensor) -> Float[Tensor, "B T H K|1"]:
    """Any form of decay as `[B, T, H, K]` or `[B, T, H, 1]`."""
    B, T, H, _ = k.shape
    if log_decay is None:
        return k.new_zeros(()).expand(B, T, H, 1)
    if log_decay.dim() == 4:
        return log_decay
    return log_decay.expand(B, T, H).unsqueeze(-1)
