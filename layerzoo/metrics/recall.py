"""Recall: what a window cannot answer, how recall falls with lag, and when half of it is gone."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from layerzoo.metrics.accuracy import AccuracyBy, scaled
from layerzoo.metrics.binned import octaves
from layerzoo.metrics.wide import WideMetric, ratio, right


class Recall(WideMetric):
    """`recall/accuracy`; `recall/ceiling`, the share of queries that a model of limited reach
    can answer (the annotation `reachable`); `recall/beyond_window`, the accuracy on the others,
    absent if there are none; `recall/queries`, their number."""

    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_counts("counts", 2, 2)  # [reachable, correct]

    def update(
        self, logits: Tensor, labels: Tensor, *, reachable: Tensor, **annotations: Any
    ) -> None:
        index = 2 * reachable.long() + right(logits, labels).long()
        self.counts += torch.bincount(index, minlength=4).view(2, 2)

    def compute(self) -> dict[str, float]:
        beyond, reachable = self.counts.tolist()
        total = sum(beyond) + sum(reachable)
        out = {
            "recall/accuracy": ratio(beyond[1] + reachable[1], total),
            "recall/ceiling": ratio(sum(reachable), total),
            "recall/queries": float(total),
        }
        if sum(beyond):
            out["recall/beyond_window"] = beyond[1] / sum(beyond)
        return out


class RecallByLag(AccuracyBy):
    """Accuracy of the queries whose `lag` is in [2^n, 2^(n+1)), `recall_lag/2^n`, and how long it
    lasts.

    Retention is r(lag) = (accuracy - chance) / (1 - chance) at a bin's mean lag. The half-life
    `recall/half_life` is the first lag, interpolated between bins in log lag, at which r is at
    most half of r at the shortest lag. If it never is, it is right-censored: then it is the
    longest lag seen and `recall/half_life_censored` is 1, else 0. Both are absent if nothing is
    retained at the shortest lag.

    Args:
        length: the longest lag. chance: accuracy of guessing; None gives no half-life.
    """

    def __init__(self, length: int, chance: float | None = None) -> None:
        super().__init__("lag", octaves(length), "recall_lag")
        self.chance = chance

    def compute(self) -> dict[str, float]:
        out = super().compute()
        if self.chance is not None:
            points = [(lag, scaled(mean, self.chance)) for lag, mean in self.means().values()]
            if found := half_life(points):
                lag, censored = found
                out |= {"recall/half_life": lag, "recall/half_life_censored": float(censored)}
        return out


def half_life(points: list[tuple[float, float]]) -> tuple[float, bool] | None:
    """The half-life of retention by lag, `(lag, r)` ascending, and whether it is censored; None
    if nothing is retained at the shortest lag. See `RecallByLag`."""
    if not points or points[0][1] <= 0:
        return None
    half = points[0][1] / 2
    for (lag, r), (longer, less) in pairwise(points):
        if less <= half:
            share = (r - half) / (r - less)
            return math.exp(math.log(lag) + share * math.log(longer / lag)), False
    return points[-1][0], True
