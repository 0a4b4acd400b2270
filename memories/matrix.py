"""Memories whose state is one matrix per head, S `[B, H, K, V]`, read by o = scale q S.

Their config, decays D_t (S_t = D_t S_{t-1} + ...), state and read-out.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerzoo.layer import Reduction, State, StateBytes
from layerzoo.nn import Constant
from layerzoo.ops import accumulator_dtype
from layerzoo.shell import Memory, Shell, Write

if TYPE_CHECKING:
    from jaxtyping import Float


class MatrixConfig(Shell):
    """Fields that every matrix memory has.

    decay: D_t of S_t = D_t S_{t-1}: none is 1; constant is 1 - 2^-(5+h) for head h (RetNet);
        scalar is exp(-exp(A_h) softplus(x w + b)), one per head and token (Mamba-2);
        vector is the same per key channel, through a projection of rank 16.
    """

    decay: Literal["none", "constant", "scalar", "vector"] = "none"


class LogDecay(nn.Module):
    """log D_t = -exp(A) softplus(x W + b), per head (scalar) or per key channel (vector).

    The form is Mamba-2's (arXiv 2405.21060). At the start exp(A) is uniform in `rate` and
    softplus(b) log-uniform in `step`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        channels: int,
        rank: int | None = None,
        *,
        rate: tuple[float, float],
        step: tuple[float, float],
    ) -> None:
        super().__init__()
        self.heads, size = heads, heads * channels
        if rank is None:
            self.x: nn.Module = nn.Linear(dim, size, bias=False)
        else:
            rank = min(rank, dim)
            self.x = nn.Sequential(
                nn.Linear(dim, rank, bias=False), nn.Linear(rank, size, bias=False)
            )
        self.A_log = nn.Parameter(torch.empty(heads, 1).uniform_(*rate).log())
        steps = torch.empty(size).uniform_(*map(math.log, step)).exp()
        self.bias = nn.Parameter(steps + torch.log(-torch.expm1(-steps)))  # softplus^-1

    def step(self, x: Tensor) -> Float[Tensor, "B T H channels"]:
        """softplus(x W + b), Mamba's dt."""
        wide = accumulator_dtype(x)
        rate = F.softplus(self.x(x).to(wide) + self.bias.to(wide))
        return rate.unflatten(-1, (self.heads, -1))

    def forward(self, x: Tensor) -> Float[Tensor, "B T H channels"]:
        step = self.step(x)
        return -self.A_log.to(step.dtype).exp() * step


def silence_decay(layer: Any) -> None:
    """Set a scalar or vector decay to its neutral value, D_t = 1."""
    nn.init.constant_(layer.log_decay.A_log, -torch.inf)


class MatrixMemory(Memory):
    """Shell, decay, state and read-out of the matrix memories; a rule adds its op."""

    Config: ClassVar[Any] = MatrixConfig
    reductions = (
        Reduction({"decay": "scalar"}, {"decay": "none"}, silence_decay),
        Reduction({"decay": "vector"}, {"decay": "none"}, silence_decay),
    )
    log_decay: Any  # a module, of a config with a decay
    decay_rate = (1.0, 1.0)
    decay_step = (1e-3, 1e-1)
    """Where `LogDecay` starts. The step is Mamba-2's; the rate is not (theirs is in [1, 16]), so
    that no head starts with a half-life below 7 tokens: with theirs recall is learned several
    times later."""
    log_decay: Any
    """A `LogDecay`, or a `Constant`; absent without a decay."""

    def __init__(self, dim: int, config: MatrixConfig) -> None:
        super().__init__(dim, config)
        start: Any = {"rate": self.decay_rate, "step": self.decay_step}
        if config.decay == "constant":
            decay = 1 - 2.0 ** (-5 - torch.arange(self.heads, dtype=torch.float64))
            self.log_decay = Constant(decay.log())
        elif config.decay == "scalar":
            self.log_decay = LogDecay(dim, self.heads, 1, **start)
        elif config.decay == "vector":
            channels, _ = self.matrix()
            self.log_decay = LogDecay(dim, self.heads, channels, rank=16, **start)

    def matrix(self) -> tuple[int, int]:
        """Rows and columns of a head's S."""
        return self.key_dim, self.value_dim

    def gates(self, x: Tensor) -> Write:
        if self.config.decay in ("none", "constant"):
            return {}
        log_decay = self.log_decay(x)
        return {"log_decay": log_decay[..., 0] if self.config.decay == "scalar" else log_decay}

    def constants(self) -> dict[str, Any]:
        """The op's arguments that no token writes."""
        decay = {"log_decay": self.log_decay()} if self.config.decay == "constant" else {}
        return {**decay, "scale": self.scale, "impl": self.impl}

    def read(self, q: Tensor, state: State) -> Tensor:
        o = torch.einsum("bthk,bhkv->bthv", q.to(state.dtype) * self.scale, state)
        return o.to(q.dtype)

    def init_state(self, batch_size: int) -> State:
        return self.accumulator(batch_size, self.heads, *self.matrix())

    def state_bytes(self, T: int) -> StateBytes:
        rows, columns = self.matrix()
        return StateBytes(4 * self.heads * rows * columns)


def zero_state(k: Tensor, v: Tensor) -> Float[Tensor, "B H K V"]:
    B, _, H, K = k.shape
    return k.new_zeros(B, H, K, v.shape[-1])


def per_token(log_decay: Tensor | None, k: Tensor) -> Float[Tensor, "B T H K|1"]:
    """Any of the decays as `[B, T, H, K]` or `[B, T, H, 1]`."""
    B, T, H, _ = k.shape
    if log_decay is None:
        return k.new_zeros(()).expand(B, T, H, 1)
    if log_decay.dim() == 4:
        return log_decay
    return log_decay.expand(B, T, H).unsqueeze(-1)
