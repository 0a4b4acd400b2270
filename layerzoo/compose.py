"""Layers made of layers; children are given as specs or as built layers."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from layerzoo.layer import Layer, Reach, State, StateBytes, build, check_spec
from layerzoo.spec import Config, SpecError, at


class ChildrenConfig(Config):
    """children: specs of layers, or built layers."""

    children: tuple[Any, ...]

    def check(self) -> None:
        if not self.children:
            raise SpecError("children: needs at least one layer")
        for n, child in enumerate(self.children):
            with at(f"children[{n}]"):
                check_spec(child)


class Composition(Layer):
    """Builds its children; its state is the list of theirs."""

    Config: ClassVar[Any] = ChildrenConfig
    kind = "composition"

    def __init__(self, dim: int, config: ChildrenConfig) -> None:
        super().__init__(dim, config)
        self.layers = nn.ModuleList()
        for n, child in enumerate(config.children):
            with at(f"children[{n}]"):
                self.layers.append(build(child, dim=dim))

    def children_layers(self) -> list[Layer]:
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    def init_state(self, batch_size: int) -> State:
        return [layer.init_state(batch_size) for layer in self.children_layers()]

    def state_bytes(self, T: int) -> StateBytes:
        sizes = [layer.state_bytes(T) for layer in self.children_layers()]
        return StateBytes(sum(s.memory for s in sizes), sum(s.buffers for s in sizes))

    def cautions(self, T: int) -> list[str]:
        return [line for layer in self.children_layers() for line in layer.cautions(T)]

    def rule_flops(self, T: int) -> float:
        return sum(layer.rule_flops(T) for layer in self.children_layers())


class Parallel(Composition, name="parallel"):
    """Children side by side, each but the first times a learned scale per channel.

    y = child_0(x) + sum_{n >= 1} scale_n * child_n(x),   scale_n: [D]

    With `scale_init: 0` the layer starts as exactly its first child, which is how a memory is
    grafted onto a pretrained window.

    scale_init: start of every scale_n. children: specs of layers, or built layers.
    """

    class Config(ChildrenConfig):
        scale_init: float = 1.0

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
    )

    def __init__(self, dim: int, config: Parallel.Config) -> None:
        super().__init__(dim, config)
        rest = len(config.children) - 1
        self.scales = nn.Parameter(torch.full((rest, dim), float(config.scale_init)))

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        states = [None] * len(self.layers) if state is None else state
        outs, states = zip(
            *(layer(x, s) for layer, s in zip(self.layers, states, strict=True)), strict=True
        )
        y = outs[0]
        for scale, out in zip(self.scales, outs[1:], strict=True):
            y = y + scale.to(out.dtype) * out
        return y, list(states)

    def reach(self) -> Reach | None:
        reaches = [layer.reach() for layer in self.children_layers()]
        if any(reach is None for reach in reaches):
            return None
        return Reach(*(max(column) for column in zip(*filter(None, reaches), strict=True)))
