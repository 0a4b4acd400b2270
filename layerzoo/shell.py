"""The shell of a layer with heads: projections, norms, positions, gate and output.

Attention and memories share it, so that a grid compares rules and not shells.
"""

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
    """Fields that every layer with heads has, memory or attention."""

    heads: int = 4
    """The layer has this many heads, H."""
    key_dim: int | None = None
    """A query and a key have K channels per head; null means dim / heads."""
    value_dim: int | None = None
    """A value has V channels per head; null means dim / heads."""
    qk_norm: Literal["l2", "rms", "none"]
    """q and k are normalised per head. l2 gives them unit length, rms has a learned weight per
    channel, and none leaves them as they are."""
    key_bias: bool = False
    """If true, a learned vector is added to each key before its norm, so that keys which point in
    nearly the same direction can be told apart."""
    out_norm: Literal["rms", "none"]
    """rms normalises what each head reads; none does not."""
    out_gate: Literal["none", "silu", "sigmoid"] = "none"
    """The read-out is multiplied by this function of a projection of x; with none it is not."""

    grouped: ClassVar[str]
    """The name of the field that sets how many heads are not repeated: key_heads in a memory,
    kv_heads in attention."""

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
        """How many heads of the grouped kind are projected; the other heads repeat them."""
        return getattr(self, self.grouped) or self.heads


RENAMED = {
    "head_dim": "is now key_dim and value_dim, one for each",
    "qk_norm": "true is now rms, and false none",
    "out_gate": "true is now sigmoid, and false none",
}
"""Fields that attention layers once had, or whose values have changed, and what to write now."""


class Headed(Layer):
    """A layer with heads: the modules and the arithmetic of its shell.

    Args:
        dim: width D of x.
        config: its fields.
        queries, keys, values: how many heads of each are projected.

    Attributes:
        maps: how many queries and keys a head has; two in differential attention.

    Raises:
        SpecError: `dim` cannot be divided among the heads.
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
        """Make the linear maps from x to so many heads of queries, keys and values."""
        self.config.check_channels(self.key_dim, "key_dim")
        self.q = nn.Linear(dim, queries * self.key_dim, bias=False)
        self.k = nn.Linear(dim, keys * self.key_dim, bias=False)
        self.v = nn.Linear(dim, values * self.value_dim, bias=False)

    def qkv(self, x: Tensor) -> QKV:
        """The projections of x, `[B, T, heads K]` twice and `[B, T, heads V]`."""
        return self.q(x), self.k(x), self.v(x)

    def split(self, x: Tensor, start: int, qkv: QKV | None = None) -> QKV:
        """Project, normalise and rotate: x `[B, T, D]` -> q, k `[B, T, heads, K]`, v
        `[B, T, heads, V]`.

        Args:
            start: position of the first token.
            qkv: projections that another layer has made; they replace this layer's own.
        """
        q, k, v = qkv or self.qkv(x)
        q, k = (t.unflatten(-1, (-1, self.key_dim)) for t in (q, k))
        v = v.unflatten(-1, (-1, self.value_dim))
        if self.config.key_bias:
            k = k + self.key_bias.to(k.dtype)
        if self.config.qk_norm == "l2":
            q, k = l2_normalise(q), l2_normalise(k)
        elif self.config.qk_norm == "rms":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.config.rotary:
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
    """The position of the next token, which the state counts; 0 without a state."""
    return 0 if state is None else int(state["position"])
