"""What matrix memories share: the decay D_t in S_t = D_t S_{t-1} + .., and its options."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from layerzoo.layer import Reduction
from layerzoo.memory import Memory
from layerzoo.nn import LOWEST, Constant, LogDecay
from layerzoo.spec import SpecError

if TYPE_CHECKING:
    from jaxtyping import Float

DecayKind = Literal["none", "constant", "scalar", "vector"]


class MatrixConfig(Memory.Config):
    """Fields that every matrix memory has."""

    decay: DecayKind = "none"
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
    """A memory whose state is one matrix per head, with a decay.

    Attributes:
        log_decay: a `LogDecay` of x, or a `Constant`, or None without a decay.
        gated: whether the decay depends on x, and so is a part of what a token writes.
    """

    Config: ClassVar[Any] = MatrixConfig
    reductions = (
        Reduction({"decay": "scalar"}, {"decay": "none"}, silence_decay),
        Reduction({"decay": "vector"}, {"decay": "none"}, silence_decay),
        Reduction({"decay": "vector", "decay_gate": "bounded"}, {"decay": "none"}, silence_decay),
    )

    def __init__(self, dim: int, config: MatrixConfig) -> None:
        super().__init__(dim, config)
        self.log_decay: Any = None
        self.gated = config.decay in ("scalar", "vector")
        if config.decay == "constant":
            decay = 1 - 2.0 ** (-5 - torch.arange(self.heads, dtype=torch.float64))
            self.log_decay = Constant(decay.log())
        elif config.decay == "scalar":
            self.log_decay = LogDecay(dim, self.heads, None, None, config)
        elif config.decay == "vector":
            channels, _ = self.matrix()
            self.log_decay = LogDecay(dim, self.heads, channels, 16, config)


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
