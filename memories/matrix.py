"""Memories whose state is one matrix per head, S `[B, H, K, V]`, read by o = scale q S.

Their decays D_t (S_t = D_t S_{t-1} + ...), and the arithmetic of decays inside a chunk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerzoo.layer import Reduction, State, StateBytes
from layerzoo.ops import accumulator_dtype
from layerzoo.shell import Memory, Shell, Write
from layerzoo.spec import SpecError

if TYPE_CHECKING:
    from jaxtyping import Float

CHUNK = 64
CHUNK_VECTOR = 16
"""Per-channel ratios are held explicitly, `[C, C, K]` a chunk: exact at any decay, so short."""
FLOOR = -40.0
"""A chunk's log decays are clamped here: exp(-40) is below float64's resolution, and -inf, a
full reset, would make inf - inf."""


class MatrixConfig(Shell):
    """Fields that every matrix memory has.

    decay: D_t of S_t = D_t S_{t-1}: none is 1; constant is 1 - 2^-(5+h) for head h (RetNet);
        scalar is exp(-exp(A_h) softplus(x w + b)), one per head and token (Mamba-2);
        vector is the same per key channel, through a projection of rank 16.
    """

    decay: Literal["none", "constant", "scalar", "vector"] = "none"


class LogDecay(nn.Module):
    """log D_t = -exp(A) softplus(x W + b), per head (scalar) or per key channel (vector).

    The form is Mamba-2's (arXiv 2405.21060), and so is softplus(b) at the start, log-uniform in
    [0.001, 0.1]. Deviation: exp(A) starts at 1, not uniform in [1, 16], so that no head starts
    with a half-life below 7 tokens; with theirs recall is learned several times later.
    """

    def __init__(self, dim: int, heads: int, channels: int, rank: int | None = None) -> None:
        super().__init__()
        self.heads, size = heads, heads * channels
        if rank is None:
            self.x: nn.Module = nn.Linear(dim, size, bias=False)
        else:
            rank = min(rank, dim)
            self.x = nn.Sequential(
                nn.Linear(dim, rank, bias=False), nn.Linear(rank, size, bias=False)
            )
        self.A_log = nn.Parameter(torch.zeros(heads, 1))
        step = torch.empty(size).uniform_(-3, -1).mul(2.302585093).exp()
        self.bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # inverse of softplus

    def forward(self, x: Tensor) -> Tensor:
        wide = accumulator_dtype(x)
        rate = F.softplus(self.x(x).to(wide) + self.bias.to(wide))
        return -self.A_log.to(wide).exp() * rate.unflatten(-1, (self.heads, -1))


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

    def __init__(self, dim: int, config: MatrixConfig) -> None:
        super().__init__(dim, config)
        if config.decay == "constant":
            decay = 1 - 2.0 ** (-5 - torch.arange(self.heads, dtype=torch.float64))
            self.register_buffer("log_decay", decay.log().float(), persistent=False)
        elif config.decay == "scalar":
            self.log_decay = LogDecay(dim, self.heads, 1)
        elif config.decay == "vector":
            self.log_decay = LogDecay(dim, self.heads, self.key_dim, rank=16)

    def gates(self, x: Tensor) -> Write:
        if self.config.decay in ("none", "constant"):
            return {}
        log_decay = self.log_decay(x)
        return {"log_decay": log_decay[..., 0] if self.config.decay == "scalar" else log_decay}

    def constants(self) -> dict[str, Any]:
        """The op's arguments that no token writes."""
        decay = {"log_decay": self.log_decay} if self.config.decay == "constant" else {}
        return {**decay, "scale": self.scale, "impl": self.impl}

    def read(self, q: Tensor, state: State) -> Tensor:
        o = torch.einsum("bthk,bhkv->bthv", q.to(state.dtype) * self.scale, state)
        return o.to(q.dtype)

    def init_state(self, batch_size: int) -> State:
        return self.accumulator(batch_size, self.heads, self.key_dim, self.value_dim)

    def state_bytes(self, T: int) -> StateBytes:
        return StateBytes(4 * self.heads * self.key_dim * self.value_dim)


def prepare(k: Tensor, v: Tensor, log_decay: Tensor | None, state: State) -> State:
    """Check the decay's shape; return the state, zero by default."""
    B, T, H, K = k.shape
    shapes = ((H,), (B, T, H), (B, T, H, K))
    if log_decay is not None and tuple(log_decay.shape) not in shapes:
        raise SpecError(
            f"log_decay: shape {tuple(log_decay.shape)} is none of [H], [B, T, H], [B, T, H, K] "
            f"for k of shape {tuple(k.shape)}"
        )
    return k.new_zeros(B, H, K, v.shape[-1]) if state is None else state


def per_token(log_decay: Tensor | None, k: Tensor) -> Float[Tensor, "B T H K|1"]:
    """Any of the decays as `[B, T, H, K]` or `[B, T, H, 1]`."""
    B, T, H, _ = k.shape
    if log_decay is None:
        return k.new_zeros(()).expand(B, T, H, 1)
    if log_decay.dim() == 4:
        return log_decay
    return log_decay.expand(B, T, H).unsqueeze(-1)


def to_chunks(x: Tensor, size: int) -> Float[Tensor, "B H N C D"]:
    """`[B, T, H, D]` -> chunks of `size` tokens, one at least, zero-padded at the right."""
    T = x.shape[1]
    x = F.pad(x, (0, 0, 0, 0, 0, -T % size if T else size))
    return x.unflatten(1, (-1, size)).permute(0, 3, 1, 2, 4)


def from_chunks(x: Float[Tensor, "B H N C D"], T: int) -> Float[Tensor, "B T H D"]:
    return x.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :T]


def chunk_size(log_decay: Tensor) -> int:
    """Tokens a chunk, for a decay as of `per_token`; a short sequence is one chunk."""
    return max(1, min(CHUNK if log_decay.shape[-1] == 1 else CHUNK_VECTOR, log_decay.shape[1]))


class ChunkDecays(NamedTuple):
    """The decays of chunks `[..., C, K | 1]`, each the product of D over some tokens."""

    since_start: Tensor  # through token i, itself included: [..., C, K | 1]
    until_end: Tensor  # after token i through the last: [..., C, K | 1]
    whole: Tensor  # of the chunk, for the rows of S: [..., K | 1, 1]
    ratio: Tensor  # after token j through token i, 0 where j > i: [..., C, C, K | 1]


def chunk_decays(log_decay: Float[Tensor, "... C K|1"]) -> ChunkDecays:
    """Differences of cumulative sums are taken in float64, or mild decays after a strong one
    would lose the digits that it used up."""
    wide = torch.float32 if log_decay.device.type == "mps" else torch.float64  # it has none
    g, C = log_decay.to(wide).cumsum(-2), log_decay.shape[-2]
    above = torch.ones(C, C, dtype=torch.bool, device=g.device).triu(1).unsqueeze(-1)
    between = (g.unsqueeze(-2) - g.unsqueeze(-3)).to(log_decay.dtype)
    end = g[..., -1:, :]
    return ChunkDecays(
        since_start=g.to(log_decay.dtype).exp(),
        until_end=(end - g).to(log_decay.dtype).exp(),
        whole=end.to(log_decay.dtype).exp().mT,
        ratio=between.masked_fill(above, -torch.inf).exp(),
    )


def decayed_scores(a: Tensor, b: Tensor, ratio: Tensor) -> Float[Tensor, "... C C"]:
    """scores[i, j] = sum_c a_ic b_jc ratio_ijc for a, b `[..., C, K]`."""
    if ratio.shape[-1] == 1:
        return (a @ b.mT) * ratio.squeeze(-1)
    return torch.einsum("...ic,...jc,...ijc->...ij", a, b, ratio)
