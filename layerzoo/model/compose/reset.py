"""The control that every memory must beat: the same layer, made to forget."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from layerzoo.layer import Reach, State, StateBytes
from layerzoo.shell import QKV
from layerzoo.spec import SpecError

from .base import ChildrenConfig, Composition


class Reset(Composition, name="reset"):
    """A child whose state starts anew at every `every`-th token: y = child(x of its segment).

    A memory that is trained and tested so can adapt to its segment, but remembers nothing of
    earlier segments. What a hybrid still achieves with it is not due to long memory.

    Attributes:
        every: The config's every, until it is set, which it may be after training (see
            `layerzoo.callbacks.Controls`).
    """

    class Config(ChildrenConfig):
        every: int | None = 64
        """A segment has this many tokens; with null the state never starts anew."""

        count = 1

        def check(self) -> None:
            ChildrenConfig.check(self)
            if self.every is not None and self.every < 1:
                raise SpecError(f"every: must be at least 1 or null, got {self.every}")

    source = "a control"
    cases = (
        {"children": [{"name": "gated_delta", "heads": 2}], "every": 6},
        {"children": [{"name": "sliding", "heads": 2, "window": 4, "sinks": 1}], "every": 7},
        {"children": [{"name": "ttt_linear", "heads": 2, "mini_batch": 4}], "every": None},
    )

    def __init__(self, dim: int, config: Reset.Config) -> None:
        super().__init__(dim, config)
        self.every: int | None = config.every

    def init_state(self, batch_size: int) -> State:
        position = torch.zeros((), dtype=torch.int64, device="cpu")
        return {"child": self.children_layers()[0].init_state(batch_size), "position": position}

    def forward(
        self, x: Tensor, state: State = None, qkv: QKV | None = None
    ) -> tuple[Tensor, State]:
        """qkv: the child's projections of x, if another layer has made them."""
        B, T, _ = x.shape
        (child,) = self.children_layers()
        given = self.init_state(B) if state is None else state
        past, s = int(given["position"]), given["child"]
        every = self.every or past + T + 1
        outputs, t = [], 0
        while t < T:
            place = (past + t) % every
            whole = (T - t) // every if place == 0 else 0
            if whole:  # segments that know nothing of each other are rows of one batch
                n = whole * every
                parts = segment(x, qkv, t, t + n, every)
                y, s = child(parts.pop("x"), child.init_state(B * whole), **parts)
                s = tree_map(lambda leaf, k=whole: last_of(leaf, k), s)
                y = y.reshape(B, n, -1)
            else:
                n = min(every - place, T - t)
                s = child.init_state(B) if place == 0 else s
                parts = segment(x, qkv, t, t + n, n)
                y, s = child(parts.pop("x"), s, **parts)
            outputs.append(y)
            t += n
        y = torch.cat(outputs, 1) if outputs else child(x, s)[0]
        return y, {"child": s, "position": given["position"] + T}

    def _segments(self, T: int) -> tuple[int, int, int]:
        """(whole segments, their length, tokens of the last one), which is never empty but for
        T = 0."""
        every = self.every or max(1, T)
        whole = max(0, T - 1) // every
        return whole, every, T - whole * every

    def state_bytes(self, T: int) -> StateBytes:
        size = self.children_layers()[0].state_bytes(self._segments(T)[2])
        return size._replace(buffers=size.buffers + 8)

    def rule_flops(self, T: int) -> float:
        (child,) = self.children_layers()
        whole, every, rest = self._segments(T)
        total = rest * child.rule_flops(rest)
        if whole:
            total += whole * every * child.rule_flops(every)
        return total / max(1, T)

    def cautions(self, T: int) -> list[str]:
        return self.children_layers()[0].cautions(min(T, self.every or T))

    def reach(self) -> Reach | None:
        return Reach(self.every - 1) if self.every else self.children_layers()[0].reach()


def segment(x: Tensor, qkv: QKV | None, start: int, end: int, size: int) -> dict[str, Any]:
    """Tokens start .. end of a child's inputs, by name, as rows of `size` tokens."""

    def cut(t: Tensor) -> Tensor:
        return t[:, start:end].unflatten(1, (-1, size)).flatten(0, 1)

    return {"x": cut(x)} if qkv is None else {"x": cut(x), "qkv": tuple(map(cut, qkv))}


def last_of(leaf: Tensor, segments: int) -> Tensor:
    """Of the state of B x segments rows the B of the last segments; a position stays."""
    return leaf.unflatten(0, (-1, segments))[:, -1].clone() if leaf.dim() else leaf
