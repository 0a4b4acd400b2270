"""Attention within segments, with memory in front of them (memory as a context)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerzoo.attend import append, attend_one, dot_product_attention
from layerzoo.layer import State, StateBytes
from layerzoo.memory import Memory
from layerzoo.model.compose import ChildrenConfig, Composition
from layerzoo.nn import RMSNorm, l2_normalise
from layerzoo.ops import Op
from layerzoo.rotary import rotary
from layerzoo.spec import SpecError, divide

OP = Op("prefix_attention")


@OP.register("recurrent")
def _recurrent(q, k, v, memory_k, memory_v, first_k, first_v, *, scale):
    """q `[B, n, H, K]` of the last n tokens of a segment; k, v of all its m tokens `[B, m, H, K]`;
    memory_k, memory_v of what was retrieved for them; first_k, first_v `[P, H, K]`. Token i sees
    all of first, and of the others those up to its own."""
    B, n = q.shape[:2]
    outputs = []
    for i in range(n):
        seen = k.shape[1] - n + i + 1
        keys, values = (
            torch.cat((first.expand(B, *first.shape), retrieved[:, :seen], own[:, :seen]), 1)
            for first, retrieved, own in ((first_k, memory_k, k), (first_v, memory_v, v))
        )
        outputs.append(attend_one(q[:, i], keys, values, scale))
    return torch.stack(outputs, 1) if outputs else torch.zeros_like(q)


@OP.register("chunked", upcast=False, transformable=True)
def _chunked(q, k, v, memory_k, memory_v, first_k, first_v, *, scale):
    B, n, m = *q.shape[:2], k.shape[1]
    if n == 0:
        return torch.zeros_like(q)
    keys, values = (
        torch.cat([first.expand(B, *first.shape), retrieved, own], 1).to(q.dtype).transpose(1, 2)
        for first, retrieved, own in ((first_k, memory_k, k), (first_v, memory_v, v))
    )
    causal = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
    mask = torch.cat((causal.new_ones(n, len(first_k)), causal, causal), 1)
    o = dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=mask, scale=scale)
    return o.transpose(1, 2)


class Prefix(Composition, name="prefix"):
    """Segments of tokens x_1 .. x_S, each behind learned tokens and what a memory M knows of it.

    r_i = M(q(x_i)), with M as the last segment left it,
    y_i = softmax attention of x_i over [p_1 .. p_P, r_1 .. r_i, x_1 .. x_i],
    output_i = y_i * sigmoid(M_i(y_i)), with M_i after it has been written y_1 .. y_i

    where

    - x_i is the i-th of the S tokens of a segment, and M the memory, which is the child;
    - p_1 .. p_P are learned keys and values, without positions;
    - r_i is what was retrieved for x_i.

    Rotary positions are those in the segment, i for x_i and r_i. A retrieved r_j is visible to x_i
    only from i = j on: seen from the start, as the paper draws it, it would tell of tokens that
    have not come. The paper leaves open how y and the last read meet; sigmoid keeps y's scale. The
    state holds M of the last segment, M now, and keys and values of the segment's tokens so far.
    """

    class Config(ChildrenConfig):
        heads: int = 4
        """The attention has this many heads."""
        segment: int = 64
        """A segment has S tokens."""
        persistent: int = 4
        """P learned tokens stand in front of every segment."""
        rotary: float | None = 10000.0
        """The rotary positions have this base; with null there are no positions."""
        qk_norm: Literal["l2", "rms", "none"] = "rms"
        """The attention's q and k are normalised as in other attention layers: l2, rms or none."""

        count = 1

        def check(self) -> None:
            ChildrenConfig.check(self)
            for name, least in (("heads", 1), ("segment", 1), ("persistent", 0)):
                if getattr(self, name) < least:
                    got = getattr(self, name)
                    raise SpecError(f"{name}: must be at least {least}, got {got}")

    source = "Titans, Behrouz et al. 2025, arXiv 2501.00663, MAC"
    op = OP
    cases = (
        {
            "children": [{"name": "titans", "heads": 2, "mini_batch": 5}],
            "heads": 2,
            "segment": 6,
            "persistent": 2,
        },
        {
            "children": [{"name": "gated_delta", "heads": 3}],
            "heads": 3,
            "segment": 4,
            "persistent": 0,
            "rotary": None,
            "qk_norm": "l2",
        },
    )

    def __init__(self, dim: int, config: Prefix.Config) -> None:
        super().__init__(dim, config)
        (self.memory,) = memory = self.children_layers()
        if not isinstance(memory[0], Memory):
            raise SpecError(f"children[0]: {memory[0].name} is no memory")
        self.head_dim = divide(dim, config.heads, "heads")
        if config.rotary and self.head_dim % 2:
            raise SpecError(f"rotary: needs an even dim / heads, got {self.head_dim}; or null")
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        shape = (config.persistent, config.heads, self.head_dim)
        self.first_k = nn.Parameter(torch.randn(shape))
        self.first_v = nn.Parameter(torch.randn(shape) * dim**-0.5)
        if config.qk_norm == "rms":
            self.q_norm, self.k_norm = (RMSNorm(self.head_dim, eps=1e-6) for _ in range(2))
        elif config.qk_norm == "l2":  # as in `Attention`; K^1/2 is the length of first_k
            self.temperature = nn.Parameter(torch.ones(config.heads, 1))

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        state = self.init_state(len(x)) if state is None else state
        past, S, outputs = int(state["position"]), self.config.segment, []
        first = S - past % S
        sizes = [min(first, x.shape[1])]
        sizes += [S] * ((x.shape[1] - sizes[0]) // S)
        sizes.append(x.shape[1] - sum(sizes))
        for piece in x.split(sizes, 1):
            y, state = self._piece(piece, state)
            outputs.append(y)
        return torch.cat(outputs, 1), state

    def _piece(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Tokens of one segment."""
        memory: Any = self.memory
        start = int(state["position"])
        q, _ = memory.project(x, start)
        retrieved = memory.merge(memory.read(q, memory.inside(state["retrieve"])), x)
        place = start % self.config.segment
        new = {"k": self._keys(x, place), "v": self._heads(self.v(x))}
        new |= {"memory_k": self._keys(retrieved, place)}
        new |= {"memory_v": self._heads(self.v(retrieved))}
        cache = {name: append(state[name], t) for name, t in new.items()}
        q = self._queries(x, place)
        scale = self.head_dim**-0.5
        o = OP(self.impl, q, *cache.values(), self.first_k, self.first_v, scale=scale)
        y = self.out(o.flatten(-2))
        o, written = memory.mix(*memory.project(y, start), state["memory"])
        y = y * memory.merge(o, y).sigmoid()
        full = place + x.shape[1] == self.config.segment
        if full:
            cache = {name: t[:, :0].clone() for name, t in cache.items()}
        return y, {
            "memory": written,
            "retrieve": written if full else state["retrieve"],
            **cache,
            "position": state["position"] + x.shape[1],
        }

    def _queries(self, x: Tensor, place: int) -> Tensor:
        """`[B, n, D]` -> `[B, n, H, K]`, normalised and rotated."""
        q = self._heads(self.q(x))
        if self.config.qk_norm == "rms":
            q = self.q_norm(q)
        elif self.config.qk_norm == "l2":
            q = l2_normalise(q) * (self.head_dim**0.5 * self.temperature).to(q.dtype)
        return self._turned(q, place)

    def _keys(self, x: Tensor, place: int) -> Tensor:
        k = self._heads(self.k(x))
        if self.config.qk_norm == "rms":
            k = self.k_norm(k)
        elif self.config.qk_norm == "l2":
            k = self.head_dim**0.5 * l2_normalise(k)
        return self._turned(k, place)

    def _turned(self, x: Tensor, place: int) -> Tensor:
        return x if self.config.rotary is None else rotary(x, place, self.config.rotary)

    def _heads(self, x: Tensor) -> Tensor:
        """`[B, n, D]` -> `[B, n, H, K]`."""
        return x.unflatten(-1, (self.config.heads, -1))

    def init_state(self, batch_size: int) -> State:
        memory: Any = self.memory
        none = self.first_k.new_empty(batch_size, 0, self.config.heads, self.head_dim)
        return {
            "memory": memory.init_state(batch_size),
            "retrieve": memory.init_state(batch_size),
            **dict.fromkeys(("k", "v", "memory_k", "memory_v"), none),
            "position": torch.zeros((), dtype=torch.int64, device="cpu"),
        }

    def state_bytes(self, T: int) -> StateBytes:
        memory: Any = self.memory
        now, last = memory.state_bytes(T), memory.state_bytes(T - T % self.config.segment)
        cache = 4 * 4 * self.dim * (T % self.config.segment)
        return StateBytes(now.memory, now.buffers + last.total + cache + 8)

    def rule_flops(self, T: int) -> float:
        """The memory's reads and writes, and the attention."""
        S, c = self.config.segment, self.config
        places = [T // S + (i < T % S) for i in range(S)]  # how many tokens have place i
        seen = sum(n * (c.persistent + 2 * (i + 1)) for i, n in enumerate(places))
        memory: Any = self.memory
        attention = 4 * self.dim * seen / max(1, T)
        return attention + memory.rule_flops(T) + memory.read_flops

    def flops_per_token(self, T: int) -> float:
        """x and y both go through the memory's projections, x and r through k and v."""
        twice = [m for m in self.memory.modules() if isinstance(m, nn.Linear)]
        again = sum(2 * m.in_features * m.out_features for m in (*twice, self.k, self.v))
        return super().flops_per_token(T) + again

    def cautions(self, T: int) -> list[str]:
        S = self.config.segment
        if T > S:
            return super().cautions(T)
        return [
            f"{self.name}: a segment of {S} covers all of a sequence of {T} tokens, so nothing is "
            f"ever retrieved from an earlier one; set segment to {max(1, T // 4)} or less",
            *super().cautions(T),
        ]
