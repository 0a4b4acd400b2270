"""Layers side by side: a memory beside a window, and what AllMem, LaCT and AHN make of it."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from layerzoo.layer import State, StateBytes
from layerzoo.memory import Memory, present
from layerzoo.model.compose.sharing import share, spread
from layerzoo.spec import SpecError, error_at

from .base import ChildrenConfig, Composition

Writes = dict[str, Tensor]
"""What waits in the state, by the names of a memory's write."""

PROJECTIONS = {"none": "", "qkv": ("q", "k", "v"), "qkvo": ("q", "k", "v", "out")}


class Parallel(Composition, name="parallel"):
    """Children side by side, each but the first times a learned scale per channel.

    y = child_0(x) + sum_{n >= 1} scale_n * child_n(x)

    where

    - child_0 is the first child, usually a window, and child_n a memory beside it;
    - scale_n `[D]` is learned and starts at scale_init.

    With `scale_init: 0` the layer starts as exactly its first child, which is how a memory is
    grafted onto a pretrained window (AllMem). A memory's own `out_norm` and `out_gate` normalise
    and gate its heads, also in front of a shared output projection (LaCT, 2505.23884).

    With `write: evicted` a memory takes a token when it leaves the window of the first child, and
    not at once, so that each token is in one of the two (Fang et al. 2025, arXiv 2510.07318): at
    token i the memory has read tokens up to i - window. Sinks never leave. What waits is in the
    state.

    Attributes:
        off: These children are left out, as a control at test time.
        drop: The config's drop, until it is set.
    """

    class Config(ChildrenConfig):
        scale_init: float = 1.0
        """Every scale_n starts at this value."""
        share: Literal["none", "qkv", "qkvo"] = "none"
        """The other children use the first child's projections of q, k and v (qkv), and of the
        output, too (qkvo). The projections must have the same shapes, except that grouped keys and
        values are repeated."""
        write: Literal["all", "evicted"] = "all"
        """The other children take every token at once (all), or when it leaves the window of the
        first child (evicted)."""
        drop: float = 0.0
        """In training a row goes without the first child with this probability, so that a memory
        learns what a window knows."""

        def check(self) -> None:
            ChildrenConfig.check(self)
            if not 0 <= self.drop < 1:
                raise SpecError(f"drop: must be in [0, 1), got {self.drop}")

    source = "AllMem, arXiv 2602.13680"
    cases = (
        {
            "children": [
                {"name": "sliding", "heads": 2, "window": 4},
                {"name": "linear", "heads": 2},
            ]
        },
        {
            "children": ["softmax", {"name": "gated_delta", "heads": 2}, {"name": "linear"}],
            "scale_init": 0.0,
        },
        {
            "children": [
                {"name": "sliding", "heads": 2, "window": 5, "sinks": 2},
                {"name": "gated_delta", "heads": 2},
                {"name": "titans", "heads": 3, "mini_batch": 4},
            ],
            "write": "evicted",
        },
        {
            "children": [
                {"name": "sliding", "heads": 4, "window": 4},
                {"name": "allmem", "heads": 2, "mini_batch": 3, "out_gate": "silu"},
            ],
            "share": "qkvo",
            "write": "evicted",
        },
        {
            "children": [
                {"name": "sliding", "heads": 4, "kv_heads": 2, "window": 4},
                {
                    "name": "reset",
                    "children": [{"name": "ttt_linear", "mini_batch": 4}],
                    "every": 7,
                },
            ],
            "share": "qkvo",
        },
        {
            "children": [
                {"name": "softmax", "heads": 2},
                {"name": "mamba2", "heads": 3},
                {"name": "sliding", "heads": 4, "window": 5},
            ],
            "share": "qkv",
        },
    )

    def __init__(self, dim: int, config: Parallel.Config) -> None:
        super().__init__(dim, config)
        self.off: tuple[int, ...] = ()
        self.drop = config.drop
        self.scales = nn.Parameter(
            torch.full((len(config.children) - 1, dim), float(config.scale_init))
        )
        first, *others = self.children_layers()
        for n, child in enumerate(others, 1):
            with error_at(f"children[{n}]"):
                for name in PROJECTIONS[config.share]:
                    share(name, first, child)
                if config.write == "evicted" and not isinstance(child, Memory):
                    raise SpecError(f"{child.name}: write 'evicted' is for memories")
        if config.write == "evicted":
            reach = first.reach()
            if reach is None:
                raise SpecError(f"children[0]: {first.name}: write 'evicted' needs a window")
            self.window, self.sinks = reach.back + 1, reach.sinks

    @property
    def evicts(self) -> bool:
        return self.config.write == "evicted"

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        layers: list[Any] = self.children_layers()
        first, *others = layers
        given = self.init_state(len(x)) if state is None else state
        qkv = None if self.config.share == "none" else first.qkv(x)
        y, s = first(x, given[0], **({} if qkv is None else {"qkv": qkv}))
        new, waiting = [s], []
        y = self._dropped(y)
        past = int(given[-1]["position"]) if self.evicts else 0
        for n, (child, scale) in enumerate(zip(others, self.scales, strict=True), 1):
            shared = {} if qkv is None else {"qkv": spread(qkv, child)}
            if self.evicts:
                waits = given[-1]["writes"][n - 1]
                o, s, wait = self._late(child, x, given[n], waits, shared, past)
                waiting.append(wait)
            else:
                o, s = child(x, given[n], **shared)
            new.append(s)
            if n not in self.off:
                y = y + scale.to(o.dtype) * o
        if self.evicts:
            new.append({"writes": waiting, "position": given[-1]["position"] + x.shape[1]})
        return y, new

    def _dropped(self, y: Tensor) -> Tensor:
        """The first child's output, without the rows that training drops, or if it is off."""
        if 0 in self.off:
            return torch.zeros_like(y)
        if not (self.training and self.drop):
            return y
        stays = torch.rand(len(y), 1, 1, device=y.device) >= self.drop
        return y * stays.to(y.dtype)

    def _late(
        self, child: Any, x: Tensor, state: State, waits: Writes, shared: Any, past: int
    ) -> tuple[Tensor, State, Writes]:
        """A memory's output and state, and the writes that wait: those of the window's tokens.
        past: tokens before x."""
        q, write = child.project(x, past, **shared)
        sinks = max(0, self.sinks - past)
        found = {name: join(waits[name], w[:, sinks:]) for name, w in present(write).items()}
        tokens = found["k"].shape[1]
        leave = tokens - min(self.window, tokens)
        left = write._replace(**{name: w[:, :leave] for name, w in found.items()})
        o, state = child.mix(q, left, state)
        # A view would keep what has left alive.
        return child.merge(o, x), state, {n: w[:, leave:].clone() for n, w in found.items()}

    def init_state(self, batch_size: int) -> State:
        states = super().init_state(batch_size)
        if self.evicts:
            writes = [self._writes(child, batch_size, 0) for child in self.children_layers()[1:]]
            states.append(
                {"writes": writes, "position": torch.zeros((), dtype=torch.int64, device="cpu")}
            )
        return states

    def _writes(self, child: Any, batch_size: int, T: int) -> Writes:
        with torch.no_grad():
            return present(child.project(self.scales.new_zeros(batch_size, T, self.dim))[1])

    def _evicted(self, T: int) -> tuple[int, int]:
        """(writes that wait after T tokens, that have left the window)."""
        taken = max(0, T - self.sinks)
        return min(self.window, taken), max(0, taken - self.window)

    def state_bytes(self, T: int) -> StateBytes:
        if not self.evicts:
            return super().state_bytes(T)
        first, *memories = self.children_layers()
        wait, written = self._evicted(T)
        a_token = [w for child in memories for w in self._writes(child, 1, 1).values()]
        sizes = [first.state_bytes(T), *(child.state_bytes(written) for child in memories)]
        buffers = 8 + 4 * wait * sum(w.numel() for w in a_token)
        return StateBytes(sum(s.memory for s in sizes), sum(s.buffers for s in sizes) + buffers)

    def rule_flops(self, T: int) -> float:
        if not self.evicts:
            return super().rule_flops(T)
        first, *memories = self.children_layers()
        _, written = self._evicted(T)
        total = T * first.rule_flops(T)
        for child in memories:
            memory: Any = child
            total += (T - written) * memory.read_flops
            total += written * child.rule_flops(written) if written else 0
        return total / max(1, T)

    def flops_per_token(self, T: int) -> float:
        total = super().flops_per_token(T)
        if self.config.share == "qkvo":  # one matrix, but a product for every child
            first: Any = self.layers[0]
            total += 2.0 * first.out.weight.numel() * len(self.scales)
        return total

    def cautions(self, T: int) -> list[str]:
        if not self.evicts:
            return super().cautions(T)
        first, *memories = self.children_layers()
        _, written = self._evicted(T)
        if not written:
            return [
                f"{self.name}: no token ever leaves a window of {self.window} in sequences of {T} "
                f"tokens, so the memory beside it stays empty; set a shorter window"
            ]
        return first.cautions(T) + [line for m in memories for line in m.cautions(written)]


def join(past: Tensor, new: Tensor) -> Tensor:
    """Tokens behind those that wait, in the dtype of these."""
    return torch.cat((past, new.to(past.dtype)), 1) if past.shape[1] else new
