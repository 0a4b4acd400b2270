"""Memory: a layer that writes the past into a state of constant size."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from layerzoo.layer import Inner, State, StateBytes
from layerzoo.shell import QKV, Headed, Shell, next_position
from layerzoo.spec import SpecError

if TYPE_CHECKING:
    from jaxtyping import Float


class KeyValue(NamedTuple):
    """What each token writes into a memory without gates."""

    k: Float[Tensor, "B T H K"]
    v: Float[Tensor, "B T H V"]


class Memory(Headed):
    """A layer that writes every token into a state of constant size, and reads from it.

    `forward` runs three steps: q, write = project(x);  o, state = mix(q, write, state);
    y = merge(o, x).

    A subclass defines `rule`, which writes and reads, with as many queries as writes. A rule with
    gates defines `write`, too. Its state is one matrix `[K, V]` per head, read by o = scale q S; a
    rule with another state defines `read`, `rule_state` and `rule_bytes`. A composition that reads
    one stream and writes another calls `mix`.

    The state of the layer is the state of the rule. With rotary positions it is {rule, position},
    and the position counts the tokens that were written.
    """

    class Config(Shell):
        """What is read is scaled by K^-1/2 with qk_norm none, and by 1 / K with rms."""

        key_heads: int | None = None
        """Queries and keys have this many heads, a divisor of heads; null means heads. heads /
        key_heads values share each of them, and have states and gates of their own
        (Qwen3-Next)."""
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
        self.shared = config.heads // config.groups
        # With rms |q| = |k| = sqrt(K) at the start, so 1 / K makes <q, k> as large as with l2.
        self.scale = {"l2": 1.0, "rms": 1 / self.key_dim, "none": self.key_dim**-0.5}[
            config.qk_norm
        ]

    def project(self, x: Tensor, start: int = 0, qkv: QKV | None = None) -> tuple[Tensor, Any]:
        """Project x `[B, T, D]` to the queries q `[B, T, H, K]` and to what each token writes.

        Args:
            start: position of the first token.
            qkv: projections that another layer has made; they replace this layer's own.
        """
        q, k, v = self.split(x, start, qkv)
        if self.shared > 1:
            q, k = (t.repeat_interleave(self.shared, 2) for t in (q, k))
        return q, self.write(x, k, v)

    def write(self, x: Tensor, k: Tensor, v: Tensor) -> Any:
        """What each token of x `[B, T, D]` writes: k `[B, T, H, K]`, v `[B, T, H, V]` and the
        gates that depend on x.

        It is a NamedTuple whose fields are `[B, T, ...]`, or None where a rule lacks one. A
        composition cuts them along T.
        """
        return KeyValue(k, v)

    def mix(self, q: Tensor, write: Any, state: State) -> tuple[Tensor, State]:
        """Run the rule on q `[B, Tq, H, K]` and write `[B, Tw, ...]`, whose last tokens coincide.

        If there are fewer writes than queries, the first queries read the incoming state. If
        there are fewer queries than writes, the first writes are not read at once. Both may be
        empty.
        """
        inner = state["rule"] if self.config.rotary else state
        early = q.shape[1] - write.k.shape[1]
        if early == 0:
            o, inner = self.rule(q, write, inner)
        elif early < 0:
            o, inner = self.rule(F.pad(q, (0, 0, 0, 0, -early, 0)), write, inner)
            o = o[:, -early:]
        else:
            first = self.read(q[:, :early], inner)
            o, inner = self.rule(q[:, early:], write, inner)
            o = torch.cat((first, o), dim=1)
        if not self.config.rotary:
            return o, inner
        return o, {"rule": inner, "position": state["position"] + write.k.shape[1]}

    def rule(self, q: Tensor, write: Any, state: State) -> tuple[Tensor, State]:
        """Run the op on as many queries as writes. Whether a token reads what it has just written
        is up to the rule."""
        raise NotImplementedError

    def read(self, q: Tensor, state: State) -> Tensor:
        """Read the rule's state with q `[B, T, H, K]`, and leave it as it is -> `[B, T, H, V]`."""
        o = torch.einsum("bthk,bhkv->bthv", q.to(state.dtype) * self.scale, state)
        return o.to(q.dtype)

    def forward(
        self, x: Tensor, state: State = None, qkv: QKV | None = None
    ) -> tuple[Tensor, State]:
        state = self.init_state(x.shape[0]) if state is None else state
        # int() of a position breaks a compiled graph, so it is read only where rotary needs it.
        start = int(state["position"]) if self.config.rotary else 0
        q, write = self.project(x, start, qkv)
        o, state = self.mix(q, write, state)
        return self.merge(o, x), state

    def inner(self, x: Tensor, state: State = None) -> Inner:
        q, write = self.project(x, next_position(state) if self.config.rotary else 0)

        def fn(tensors: dict[str, Tensor], state: State) -> tuple[Tensor, State]:
            given = dict(tensors)
            q = given.pop("q")
            state = self.init_state(len(q)) if state is None else state
            return self.mix(q, write._replace(**given), state)

        return Inner(fn, {"q": q, **present(write)})

    def inside(self, state: State) -> State:
        """The state of the rule within the state of the layer."""
        return state["rule"] if self.config.rotary else state

    def init_state(self, batch_size: int) -> State:
        rule = self.rule_state(batch_size)
        if not self.config.rotary:
            return rule
        return {"rule": rule, "position": torch.zeros((), dtype=torch.int64, device="cpu")}

    def matrix(self) -> tuple[int, int]:
        """The rows and columns of the matrix S of a head."""
        return self.key_dim, self.value_dim

    def rule_state(self, batch_size: int) -> State:
        """The state of the rule before the first token."""
        return self.accumulator(batch_size, self.heads, *self.matrix())

    def state_bytes(self, T: int) -> StateBytes:
        memory, buffers = self.rule_bytes(T)
        return StateBytes(memory, buffers + (8 if self.config.rotary else 0))

    def rule_bytes(self, T: int) -> StateBytes:
        """Bytes of the state of the rule after T tokens, for one sequence in float32."""
        rows, columns = self.matrix()
        return StateBytes(4 * self.heads * rows * columns)

    @functools.cached_property
    def read_flops(self) -> float:
        """FLOPs of the matrix products of a read without a write, counted on one token."""
        from torch.utils.flop_counter import FlopCounterMode  # it imports triton

        q, _ = self.project(next(self.parameters()).new_zeros(1, 1, self.dim))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self.read(q, self.rule_state(1))
        return counter.get_total_flops()

    def accumulator(self, *shape: int) -> Tensor:
        """Zeros for a state, on the layer's device: float64 in a float64 layer, else float32."""
        weight: Any = self.q.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return torch.zeros(shape, dtype=dtype, device=weight.device)


def map_write(fn: Callable[[Tensor], Tensor], write: Any) -> Any:
    """The write with fn(tensor) in the place of each of its tensors."""
    return write._replace(**{name: fn(tensor) for name, tensor in present(write).items()})


def present(write: Any) -> dict[str, Tensor]:
    """The tensors of a write, by name, without the fields that are None."""
    return {name: tensor for name, tensor in write._asdict().items() if tensor is not None}
