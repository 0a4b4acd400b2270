"""What compositions share: children, given as specs or as built layers, and their states."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from layerzoo.layer import Layer, Reach, State, StateBytes
from layerzoo.registry import build, check_spec, full_spec
from layerzoo.spec import Config, SpecError, error_at


class ChildrenConfig(Config):
    """Fields that every composition has."""

    children: tuple[Any, ...]
    """The children are specs of layers, or built layers."""

    count: ClassVar[int | None] = None
    """How many children there must be; None is any number from 1."""

    def check(self) -> None:
        if not self.children:
            raise SpecError("children: needs at least one layer")
        if self.count not in (None, len(self.children)):
            raise SpecError(f"children: needs {self.count}, got {len(self.children)}")
        for n, child in enumerate(self.children):
            with error_at(f"children[{n}]"):
                check_spec(child)

    def to_fields(self) -> dict[str, Any]:
        children = [full_spec(child) for child in self.children]
        return {**super().to_fields(), "children": children}


class Composition(Layer):
    """Builds its children; its state is the list of theirs."""

    Config: ClassVar[Any] = ChildrenConfig
    kind = "composition"

    def __init__(self, dim: int, config: ChildrenConfig) -> None:
        super().__init__(dim, config)
        self.layers = nn.ModuleList()
        for n, child in enumerate(self.child_specs()):
            with error_at(f"children[{n}]"):
                self.layers.append(build(child, dim=dim))

    def child_specs(self) -> list[Any]:
        """The specs that are built: the config's."""
        return list(self.config.children)

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

    def reach(self) -> Reach | None:
        """How far the child reaches that reaches furthest; children stand side by side."""
        reaches = [layer.reach() for layer in self.children_layers()]
        if any(reach is None for reach in reaches):
            return None
        return Reach(*(max(column) for column in zip(*filter(None, reaches), strict=True)))
