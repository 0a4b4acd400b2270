"""Memory: a layer that writes the past into a state of constant size, in a shell shared by all.

The shell is everything around the rule: projections, heads, norms, output gate. Its defaults are
the same for every memory, so that a grid compares rules and not shells.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerzoo.layer import Inner, Layer, State
from layerzoo.nn import RMSNorm, l2_normalise
from layerzoo.spec import Config, SpecError, divide

Write = dict[str, Tensor]
"""What a memory stores for each token, `[B, T, ...]` tensors named as the op's arguments."""

QKV = tuple[Tensor, Tensor, Tensor]
GATES = {"silu": F.silu, "sigmoid": torch.sigmoid}


class Shell(Config):
    """Fields that every memory has.

    heads: number of heads H.
    key_dim, value_dim: per head, K and V; null means dim / heads.
    qk_norm: of q and k, per head: l2 (unit length), rms, or none (then q is scaled by K^-1/2).
    key_bias: k = x W + b, before its norm; keys that lean one way are told apart by it.
    out_norm: RMS norm of the read-out per head, or none.
    out_gate: the read-out is multiplied by this function of a projection of x, or none.
    """

    heads: int = 4
    key_dim: int | None = None
    value_dim: int | None = None
    qk_norm: Literal["l2", "rms", "none"] = "l2"
    key_bias: bool = False
    out_norm: Literal["rms", "none"] = "rms"
    out_gate: Literal["none", "silu", "sigmoid"] = "none"

    def check(self) -> None:
        for name in ("heads", "key_dim", "value_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SpecError(f"{name}: must be at least 1, got {value}")


class Memory(Layer):
    """forward = project(x) -> q, write; mix(q, write, state) -> o, state; merge(o, x) -> y.

    A rule defines `rule` (as many queries as writes) and `read` (queries alone), and for its
    gates, if any, `gates`. Compositions that read one stream and write another call `mix`.
    """

    Config: ClassVar[Any] = Shell
    kind = "memory"

    def __init__(self, dim: int, config: Shell) -> None:
        super().__init__(dim, config)
        H = self.heads = config.heads
        even = "heads (or give key_dim and value_dim)"
        self.key_dim = K = config.key_dim or divide(dim, H, even)
        self.value_dim = V = config.value_dim or divide(dim, H, even)
        self.scale = K**-0.5 if config.qk_norm == "none" else 1.0
        self.q = nn.Linear(dim, H * K, bias=False)
        self.k = nn.Linear(dim, H * K, bias=False)
        self.v = nn.Linear(dim, H * V, bias=False)
        self.out = nn.Linear(H * V, dim, bias=False)
        if config.key_bias:
            self.key_bias = nn.Parameter(torch.zeros(H, K))
        if config.qk_norm == "rms":
            self.q_norm, self.k_norm = RMSNorm(K, eps=1e-6), RMSNorm(K, eps=1e-6)
            self.scale = K**-1.0  # |q| = |k| = sqrt(K) at the start: as if both were unit
        if config.out_norm == "rms":
            self.out_norm = RMSNorm(V, eps=1e-6)
        if config.out_gate != "none":
            self.gate = nn.Linear(dim, H * V, bias=False)

    def qkv(self, x: Tensor) -> QKV:
        """The projections of x, `[B, T, H K]`, `[B, T, H K]` and `[B, T, H V]`."""
        return self.q(x), self.k(x), self.v(x)

    def project(self, x: Tensor, qkv: QKV | None = None) -> tuple[Tensor, Write]:
        """x `[B, T, D]` -> q `[B, T, H, K]` and what each token writes. qkv: of another layer."""
        q, k, v = (p.unflatten(-1, (self.heads, -1)) for p in qkv or self.qkv(x))
        if self.config.key_bias:
            k = k + self.key_bias.to(k.dtype)
        if self.config.qk_norm == "l2":
            q, k = l2_normalise(q), l2_normalise(k)
        elif self.config.qk_norm == "rms":
            q, k = self.q_norm(q), self.k_norm(k)
        return q, {"k": k, "v": v, **self.gates(x)}

    def gates(self, x: Tensor) -> Write:
        """The rule's input-dependent gates, named as its op's arguments."""
        return {}

    def mix(self, q: Tensor, write: Write, state: State) -> tuple[Tensor, State]:
        """Run the rule on q `[B, Tq, H, K]` and write `[B, Tw, ...]`, aligned at the right end.

        With fewer writes than queries the earlier queries read the incoming state; with fewer
        queries than writes the earlier writes are not read. Either may be empty.
        """
        early = q.shape[1] - write["k"].shape[1]
        if early == 0:
            return self.rule(q, write, state)
        if early < 0:
            o, state = self.rule(F.pad(q, (0, 0, 0, 0, -early, 0)), write, state)
            return o[:, -early:], state
        head = self.read(q[:, :early], state)
        o, state = self.rule(q[:, early:], write, state)
        return torch.cat((head, o), dim=1), state

    def rule(self, q: Tensor, write: Write, state: State) -> tuple[Tensor, State]:
        """The memory's op: as many queries as writes, each token reads after its write."""
        raise NotImplementedError

    def read(self, q: Tensor, state: State) -> Tensor:
        """Read q `[B, T, H, K]` from a state that does not change -> `[B, T, H, V]`."""
        raise NotImplementedError

    def merge(self, o: Tensor, x: Tensor) -> Tensor:
        """Read-out `[B, T, H, V]` -> y `[B, T, D]`."""
        if self.config.out_norm == "rms":
            o = self.out_norm(o)
        o = o.flatten(-2)
        if self.config.out_gate != "none":
            o = o * GATES[self.config.out_gate](self.gate(x))
        return self.out(o)

    def forward(
        self, x: Tensor, state: State = None, qkv: QKV | None = None
    ) -> tuple[Tensor, State]:
        q, write = self.project(x, qkv)
        state = self.init_state(x.shape[0]) if state is None else state
        o, state = self.mix(q, write, state)
        return self.merge(o, x), state

    def inner(self, x: Tensor, state: State = None) -> Inner:
        def fn(tensors: Write, state: State) -> tuple[Tensor, State]:
            write = dict(tensors)
            q = write.pop("q")
            return self.mix(q, write, self.init_state(len(q)) if state is None else state)

        q, write = self.project(x)
        return Inner(fn, {"q": q, **write})

    def accumulator(self, *shape: int) -> Tensor:
        """A zero state tensor: float32, or float64 in a float64 layer, on the layer's device."""
        weight: Any = self.q.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return torch.zeros(shape, dtype=dtype, device=weight.device)
