"""The shell of a layer with heads: all that stands around its rule, the same for attention and for
memories, so that a grid compares rules and not shells."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerzoo.layer import Layer
from layerzoo.nn import RMSNorm, l2_normalise
from layerzoo.rotary import RotaryConfig
from layerzoo.spec import SpecError, divide

QKV = tuple[Tensor, Tensor, Tensor]
GATES = {"silu": F.silu, "sigmoid": torch.sigmoid}


class Shell(RotaryConfig):
    """Fields that every layer with heads has, memory or attention.

    heads: number of read-outs H, each a row of the output projection.
    key_dim, value_dim: per head, K of queries and keys, V of values; null means dim / heads.
    qk_norm: of q and k, per head: l2 (unit length), rms (a learned weight per channel), or none.
    key_bias: k = x W + b, before its norm; keys that lean one way are told apart by it.
    out_norm: RMS norm of the read-out per head, or none.
    out_gate: the read-out is multiplied by this function of a projection of x, or none.
    """

    heads: int = 4
    key_dim: int | None = None
    value_dim: int | None = None
    qk_norm: Literal["l2", "rms", "none"]
    key_bias: bool = False
    out_norm: Literal["rms", "none"]
    out_gate: Literal["none", "silu", "sigmoid"] = "none"

    grouped: ClassVar[str]
    """The field that says how many heads share; its layers define it."""

    @classmethod
    def from_fields(cls, fields: Any) -> Any:
        for name, way in RENAMED.items():
            if name in fields and (name == "head_dim" or isinstance(fields[name], bool)):
                raise SpecError(f"{name}: {way}")
        return super().from_fields(fields)

    def check(self) -> None:
        for name in ("heads", "key_dim", "value_dim", self.grouped):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SpecError(f"{name}: must be at least 1, got {value}")
        super().check()
        if groups := getattr(self, self.grouped):
            divide(self.heads, groups, self.grouped)

    @property
    def groups(self) -> int:
        """Heads that share what the others repeat."""
        return getattr(self, self.grouped) or self.heads


RENAMED = {
    "head_dim": "is now key_dim and value_dim, one for each",
    "qk_norm": "true is now rms, and false none",
    "out_gate": "true is now sigmoid, and false none",
}
"""What attention layers had before they had this shell, and the way out."""


class Headed(Layer):
    """Projections, norms, positions, gate and output of a layer with heads.

    queries, keys, values: how many heads each have. maps: queries and keys of each of these.
    """

    config: Any
    maps = 1

    def __init__(self, dim: int, config: Shell, queries: int, keys: int, values: int) -> None:
        super().__init__(dim, config)
        H = self.heads = config.heads
        even = "heads (or give key_dim and value_dim)"
        self.key_dim = K = config.key_dim or divide(dim, self.maps * H, even)
        self.value_dim = V = config.value_dim or divide(dim, H, even)
        self.make_projections(dim, self.maps * queries, self.maps * keys, values)
        self.out = nn.Linear(H * V, dim, bias=False)
        if config.key_bias:
            self.key_bias = nn.Parameter(torch.zeros(self.maps * keys, K))
        if config.qk_norm == "rms":
            self.q_norm, self.k_norm = RMSNorm(K, eps=1e-6), RMSNorm(K, eps=1e-6)
        if config.out_norm == "rms":
            self.out_norm = RMSNorm(V, eps=1e-6)
        if config.out_gate != "none":
            self.gate = nn.Linear(dim, H * V, bias=False)

    def make_projections(self, dim: int, queries: int, keys: int, values: int) -> None:
        """Make the projections of x, for so many heads."""
        self.config.check_channels(self.key_dim, "key_dim")
        self.q = nn.Linear(dim, queries * self.key_dim, bias=False)
        self.k = nn.Linear(dim, keys * self.key_dim, bias=False)
        self.v = nn.Linear(dim, values * self.value_dim, bias=False)

    def qkv(self, x: Tensor) -> QKV:
        """The projections of x, `[B, T, heads K]` twice and `[B, T, heads V]`."""
        return self.q(x), self.k(x), self.v(x)

    def split(self, x: Tensor, start: int, qkv: QKV | None = None) -> QKV:
        """x `[B, T, D]` from position `start` on -> q, k `[B, T, heads, K]` and v
        `[B, T, heads, V]`, normalised and rotated. qkv: projections of another layer."""
        q, k, v = qkv or self.qkv(x)
        q, k = (t.unflatten(-1, (-1, self.key_dim)) for t in (q, k))
        v = v.unflatten(-1, (-1, self.value_dim))
        if self.config.key_bias:
            k = k + self.key_bias.to(k.dtype)
        if self.config.qk_norm == "l2":
            q, k = l2_normalise(q), l2_normalise(k)
        elif self.config.qk_norm == "rms":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (self.config.rotate(t, start) for t in (q, k))
        return q, k, v

    def merge(self, o: Tensor, x: Tensor) -> Tensor:
        """Read-out `[B, T, H, V]` -> y `[B, T, D]`."""
        if self.config.out_norm == "rms":
            o = self.out_norm(o)
        o = o.flatten(-2)
        if self.config.out_gate != "none":
            o = o * GATES[self.config.out_gate](self.gate(x))
        return self.out(o)


def next_position(state: Any) -> int:
    """The position of the next token, of a state that holds one: 0 before the first."""
    return 0 if state is None else int(state["position"])
