"""Accuracy of whole rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class WholeRows(Metric):
    """`accuracy/rows`, the share of the rows whose labels are all predicted.

    Args:
        labels: of each row, the same number in all.
    """

    counts: Tensor

    def __init__(self, labels: int) -> None:
        super().__init__()
        self.labels = labels
        self.add_state("counts", torch.zeros(2, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor, **annotations: Any) -> None:
        whole = (logits.argmax(-1) == labels).view(-1, self.labels).all(1)
        self.counts += torch.stack([whole.sum(), torch.tensor(len(whole)).to(labels)])

    def compute(self) -> dict[str, Tensor]:
        return {"accuracy/rows": self.counts[0] / self.counts[1]}
