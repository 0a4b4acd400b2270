"""Memory: a layer that writes the past into a state of constant size."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from layerzoo.layer import Inner, State, StateBytes
from layerzoo.shell import QKV, Headed, Shell, next_position
from layerzoo.spec import SpecError

Write = dict[str, Tensor]
"""What a memory stores for each token, `[B, T, ...]` tensors named as the op's arguments."""


class Memory(Headed):
    """forward = project(x) -> q, write; mix(q, write, state) -> o, state; merge(o, x) -> y.

    A rule defines `rule` (as many queries as writes) and `read` (queries alone), both on the state
    that `rule_state` makes, `rule_bytes`, and for its gates, if any, `gates`. Compositions that
    read one stream and write another call `mix`. The layer's state is the rule's; with rotary
    positions {rule, position}, where the position counts the writes.
    """

    class Config(Shell):
        """key_heads: heads of queries and keys, each shared by heads / key_heads values with
        states and gates of their own (Qwen3-Next); a divisor of heads, null means heads.

        With qk_norm none, q is scaled by K^-1/2; with rms, q k by 1 / K.
        """

        key_heads: int | None = None
        qk_norm: Literal["l2", "rms", "none"] = "l2"
        out_norm: Literal["rms", "none"] = "rms"

        grouped = "key_heads"

        def check(self) -> None:
            super().check()
            scaling = self.scaling()
            if scaling is not None and scaling.magnitude() != 1:
                raise SpecError(
                    "rotary_scaling: lengthens queries and keys, which a memory's rule depends "
                    "on; give attention: 1.0"
                )

    kind = "memory"

    def __init__(self, dim: int, config: Any) -> None:
        super().__init__(dim, config, config.groups, config.groups, config.heads)
        # With rms |q| = |k| = sqrt(K) at the start: as if both were unit.
        self.scale = {"l2": 1.0, "rms": 1 / self.key_dim, "none": self.key_dim**-0.5}[
            config.qk_norm
        ]

    def project(self, x: Tensor, start: int = 0, qkv: QKV | None = None) -> tuple[Tensor, Write]:
        """x `[B, T, D]` from position `start` on -> q `[B, T, H, K]` and what each token writes.
        qkv: of another layer."""
        q, k, v = self.split(x, start, qkv)
        if (shared := self.heads // self.config.groups) > 1:
            q, k = (t.repeat_interleave(shared, 2) for t in (q, k))
        return q, {"k": k, "v": v, **self.gates(x)}

    def gates(self, x: Tensor) -> Write:
        """The rule's input-dependent gates, named as its op's arguments."""
        return {}

    def mix(self, q: Tensor, write: Write, state: State) -> tuple[Tensor, State]:
        """Run the rule on q `[B, Tq, H, K]` and write `[B, Tw, ...]`, aligned at the right end.

        With fewer writes than queries the earlier queries read the incoming state; with fewer
        queries than writes the earlier writes are not read. Either may be empty.
        """
        o, rule = self._aligned(q, write, self.inside(state))
        if not self.config.rotary:
            return o, rule
        return o, {"rule": rule, "position": state["position"] + write["k"].shape[1]}

    def _aligned(self, q: Tensor, write: Write, state: State) -> tuple[Tensor, State]:
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
        """Read q `[B, T, H, K]` from a rule's state, which does not change -> `[B, T, H, V]`."""
        raise NotImplementedError

    def forward(
        self, x: Tensor, state: State = None, qkv: QKV | None = None
    ) -> tuple[Tensor, State]:
        state = self.init_state(x.shape[0]) if state is None else state
        # Without rotary the position is not read, nor a graph broken.
        q, write = self.project(x, next_position(state) if self.config.rotary else 0, qkv)
        o, state = self.mix(q, write, state)
        return self.merge(o, x), state

    def inner(self, x: Tensor, state: State = None) -> Inner:
        def fn(tensors: Write, state: State) -> tuple[Tensor, State]:
            write = dict(tensors)
            q = write.pop("q")
            return self.mix(q, write, self.init_state(len(q)) if state is None else state)

        q, write = self.project(x, next_position(state) if self.config.rotary else 0)
        return Inner(fn, {"q": q, **write})

    def inside(self, state: State) -> State:
        """The rule's part of a state."""
        return state["rule"] if self.config.rotary else state

    def init_state(self, batch_size: int) -> State:
        rule = self.rule_state(batch_size)
        if not self.config.rotary:
            return rule
        return {"rule": rule, "position": torch.zeros((), dtype=torch.int64, device="cpu")}

    def rule_state(self, batch_size: int) -> State:
        """The rule's state before the first token."""
        raise NotImplementedError

    def state_bytes(self, T: int) -> StateBytes:
        memory, buffers = self.rule_bytes(T)
        return StateBytes(memory, buffers + (8 if self.config.rotary else 0))

    def rule_bytes(self, T: int) -> StateBytes:
        """Bytes of the rule's state after T tokens, for batch size 1 in float32."""
        raise NotImplementedError

    def accumulator(self, *shape: int) -> Tensor:
        """A zero state tensor: float32, or float64 in a float64 layer, on the layer's device."""
        weight: Any = self.q.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return torch.zeros(shape, dtype=dtype, device=weight.device)
