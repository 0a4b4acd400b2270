"""What happens inside fast weights: figures of every write, taken on request.

The engine calls a watcher at the end of every mini-batch, if it is given one. Figures are means
over mini-batches, rows and heads; norms are over all matrices of a network together.

loss_before, loss_after: the objective of the tokens that filled the mini-batch, at the weights at
    which their gradients were taken, and at those after the write.
write_norm, weight_norm: |W' - W| and |W'|.
retention: <W', W> / <W, W>, how much of the old weights is left, whatever made it less.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Log:
    """A watcher that collects."""

    def __init__(self) -> None:
        self.found: dict[str, list[Tensor]] = {}

    def __call__(self, engine: Any, before: Any, after: Any, k: Tensor, v: Tensor) -> None:
        old, new = (torch.cat([w.flatten(1) for w in weights], 1) for weights in (before, after))
        inner = torch.linalg.vecdot
        loss = engine.rule.objective.loss
        for name, value in (
            ("loss_before", loss(engine.read(before, k), v)),
            ("loss_after", loss(engine.read(after, k), v)),
            ("write_norm", (new - old).norm(dim=-1)),
            ("weight_norm", new.norm(dim=-1)),
            ("retention", inner(new, old) / inner(old, old)),
        ):
            self.found.setdefault(name, []).append(value.mean())

    def means(self) -> dict[str, float]:
        return {name: float(torch.stack(values).mean()) for name, values in self.found.items()}
