"""The heads of one layer, split between rules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from layerzoo.layer import Layer, State
from layerzoo.registry import check_spec
from layerzoo.spec import SpecError, divide, error_at

from .base import ChildrenConfig, Composition

WIDTHS = ("key_dim", "value_dim")


class Heads(Composition, name="heads"):
    """Some heads attend, others remember: H heads in all, each dim / H wide.

    y = [o_1, .., o_N] W = sum_n o_n W_n

    where

    - o_n are the heads of child n, H_n of the H heads;
    - W is one output projection, and W_n are the rows of it that o_n meets.

    So one output projection shared by all heads is the sum of the children's own, which is how it
    is computed. Deviations from Hymba: there is no scale per child beside the weights of W_n, and
    only memories normalise their heads before it (`out_norm`).

    The children are specs of layers with heads; their `heads` add up to H. Their widths follow.
    """

    class Config(ChildrenConfig):
        def check(self) -> None:
            ChildrenConfig.check(self)
            for n, child in enumerate(self.children):
                with error_at(f"children[{n}]"):
                    cls, config = check_spec(child)
                    if isinstance(child, Layer):
                        raise SpecError("is built; give its spec, for its width follows from H")
                    if not hasattr(config, "heads"):
                        raise SpecError(f"{cls.name} has no heads")
                    for name in WIDTHS:
                        if getattr(config, name, None) is not None:
                            raise SpecError(f"{name}: leave it out; it is dim / all heads")

    source = "Hymba, Dong et al. 2024, arXiv 2411.13676"
    cases = (
        {
            "children": [
                {"name": "sliding", "heads": 2, "window": 4},
                {"name": "gated_delta", "heads": 2},
            ]
        },
        {
            "children": [
                {"name": "titans", "heads": 1, "mini_batch": 5},
                {"name": "softmax", "heads": 2, "kv_heads": 1},
                {"name": "linear", "heads": 1},
            ]
        },
    )

    def child_specs(self) -> list[Any]:
        configs: list[tuple[Any, Any]] = [check_spec(child) for child in self.config.children]
        width = divide(self.dim, sum(config.heads for _, config in configs), "heads of all")
        specs = []
        for cls, config in configs:
            fields = config.to_fields()
            widths = {name: width for name in WIDTHS if name in fields}
            specs.append({"name": cls.name, **fields, **widths})
        return specs

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        states = [None] * len(self.layers) if state is None else state
        outs, new = zip(
            *(layer(x, s) for layer, s in zip(self.layers, states, strict=True)), strict=True
        )
        return torch.stack(outs).sum(0), list(new)
