"""The mean of a value in bins of an annotation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from layerzoo.metrics.wide import WideMetric


class Binned(WideMetric):
    """The mean of one value, in bins of an annotation, as `prefix/edge`: the bin [edge, next).

    Args:
        prefix: of the names. annotation: what is binned, numbers from the first edge on; what is
            below or unlabelled counts to the first bin.
        edges: the lower edges, ascending.
    """

    total: Tensor
    count: Tensor
    at: Tensor
    edges: Tensor

    def __init__(self, prefix: str, annotation: str, edges: Sequence[int]) -> None:
        super().__init__()
        self.prefix, self.annotation = prefix, annotation
        self.register_buffer("edges", torch.tensor(edges), persistent=False)
        self.add_sums("total", len(edges))  # of the values
        self.add_counts("count", len(edges))
        self.add_sums("at", len(edges))  # of the annotation

    def value(self, logits: Tensor, labels: Tensor) -> Tensor:
        raise NotImplementedError

    def update(self, logits: Tensor, labels: Tensor, **annotations: Any) -> None:
        at = annotations[self.annotation]
        bins = (torch.bucketize(at, self.edges, right=True) - 1).clamp(min=0)
        self.total.index_add_(0, bins, self.value(logits, labels).to(self.total.dtype))
        self.count.index_add_(0, bins, torch.ones_like(bins))
        self.at.index_add_(0, bins, at.to(self.at.dtype))

    def means(self) -> dict[int, tuple[float, float]]:
        """By the edges of the bins that hold anything: the mean annotation and the mean value."""
        lists = (self.edges, self.at, self.total, self.count)
        rows = zip(*(values.tolist() for values in lists), strict=True)
        return {edge: (at / count, total / count) for edge, at, total, count in rows if count}

    def compute(self) -> dict[str, float]:
        return {f"{self.prefix}/{edge}": mean for edge, (_, mean) in self.means().items()}


def octaves(longest: int) -> list[int]:
    """1, 2, 4, .. up to longest."""
    return [2**n for n in range(max(1, longest.bit_length()))]
