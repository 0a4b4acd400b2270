"""Two layers, mixed by a gate (memory as a gate)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from layerzoo.layer import State

from .base import ChildrenConfig, Composition


class Gated(Composition, name="gated"):
    """Two children a and b side by side, mixed per token and channel by a gate.

    sigmoid: y = s(g) a(x) + (1 - s(g)) b(x);   tanh: y = a(x) + tanh(g) b(x);   g = x W + c

    where

    - a and b are the children, and s is the sigmoid;
    - W `[D, D]` and c `[D]` are learned.

    With sigmoid the start is half of each (c = 0, W as torch's Linear). With tanh W = 0 and c = 0,
    so that the layer starts as exactly a.

    Titans calls the first form, of a window and a memory, memory as a gate (MAG); it normalises
    both outputs before, which memories here do by themselves (`out_norm`). tanh is the zero start
    of Flamingo (Alayrac et al. 2022, arXiv 2204.14198).
    """

    class Config(ChildrenConfig):
        gate: Literal["sigmoid", "tanh"] = "sigmoid"
        """s is this function of g. It also decides the form of the mixture."""

        count = 2

    source = "Titans, Behrouz et al. 2025, arXiv 2501.00663, MAG"
    cases = (
        {
            "children": [
                {"name": "sliding", "heads": 2, "window": 4},
                {"name": "titans", "heads": 2, "mini_batch": 5},
            ]
        },
        {"children": [{"name": "linear", "heads": 2}, "softmax"], "gate": "tanh"},
    )

    def __init__(self, dim: int, config: Gated.Config) -> None:
        super().__init__(dim, config)
        self.gate = nn.Linear(dim, dim)
        nn.init.zeros_(self.gate.bias)
        if config.gate == "tanh":
            nn.init.zeros_(self.gate.weight)

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        states = [None, None] if state is None else state
        (a, b), new = zip(
            *(layer(x, s) for layer, s in zip(self.layers, states, strict=True)), strict=True
        )
        g = self.gate(x)
        if self.config.gate == "tanh":
            return a + g.tanh() * b, list(new)
        return torch.lerp(b, a, g.sigmoid().to(a.dtype)), list(new)
