"""Layers one after another, as one layer (memory as a layer)."""

from __future__ import annotations

from torch import Tensor

from layerzoo.layer import Reach, State

from .base import ChildrenConfig, Composition


class Sequential(Composition, name="sequential"):
    """Children one after another.

    y = child_n(.. child_1(x)), or with `residual` z_1 = x, z_(n+1) = z_n + child_n(z_n),
    y = sum_n child_n(z_n)

    where

    - child_1, child_2, .. are the children in their order;
    - z_n is what child n reads; the block adds x itself to y.

    Titans calls a memory in front of a window memory as a layer (MAL).
    """

    class Config(ChildrenConfig):
        residual: bool = False
        """If true, each child reads x plus what the children before it have added."""

    source = "Titans, Behrouz et al. 2025, arXiv 2501.00663, MAL"
    cases = (
        {
            "children": [
                {"name": "gated_delta", "heads": 2},
                {"name": "sliding", "heads": 2, "window": 4},
            ]
        },
        {
            "children": [{"name": "sliding", "heads": 2, "window": 3}, "linear", "linear"],
            "residual": True,
        },
    )

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        states = [None] * len(self.layers) if state is None else state
        y, total, new = x, None, []
        for layer, s in zip(self.layers, states, strict=True):
            y, s = layer(y, s)
            new.append(s)
            if self.config.residual:
                total = y if total is None else total + y
                y = x + total
        return (y if total is None else total), new

    def reach(self) -> Reach | None:
        """One behind the other: what reaches back adds up."""
        reaches = [layer.reach() for layer in self.children_layers()]
        if any(reach is None for reach in reaches):
            return None
        back, sinks = zip(*filter(None, reaches), strict=True)
        return Reach(sum(back), max(sinks))
