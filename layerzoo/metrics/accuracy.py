"""Accuracy: over all answers, over whole samples, by an annotation, and what follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from layerzoo.metrics.binned import Binned


def scaled(accuracy: Any, chance: float) -> Any:
    """(accuracy - chance) / (1 - chance): 0 is a guess, 1 is all."""
    return (accuracy - chance) / (1 - chance)


class Accuracy(Metric):
    """`accuracy/all`, the share of the labels that are predicted; `accuracy/scaled` =
    (accuracy - chance) / (1 - chance)."""

    counts: Tensor

    def __init__(self, chance: float) -> None:
        super().__init__()
        self.chance = chance
        self.add_state("counts", torch.zeros(2, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor, **annotations: Any) -> None:
        correct = logits.argmax(-1) == labels
        self.counts += torch.stack([correct.sum(), torch.tensor(len(labels)).to(labels)])

    def compute(self) -> dict[str, Tensor]:
        accuracy = self.counts[0] / self.counts[1]
        return {"accuracy/all": accuracy, "accuracy/scaled": scaled(accuracy, self.chance)}


class AccuracyBy(Binned):
    """Accuracy in bins of an annotation, `accuracy_<annotation>/edge` or another prefix."""

    def __init__(self, annotation: str, edges: Sequence[int], prefix: str = "") -> None:
        super().__init__(prefix or f"accuracy_{annotation}", annotation, edges)

    def value(self, logits: Tensor, labels: Tensor) -> Tensor:
        return logits.argmax(-1) == labels


class Capacity(AccuracyBy):
    """`capacity/d90`, the largest number of pairs D of those tested at which accuracy is still at
    least 90%, and at every smaller one, too (0 if at none); with the accuracy at each,
    `accuracy_pairs/D`. Annotation `pairs`.

    `capacity/d90_interpolated` is where accuracy falls through 90% from there to the next size,
    linear in log D; it is absent if it does so at no size, or before the first: then the capacity
    lies outside what was tested.
    """

    def __init__(self, sizes: Sequence[int], threshold: float = 0.9) -> None:
        super().__init__("pairs", sorted(sizes))
        self.threshold = threshold

    def compute(self) -> dict[str, float]:
        name = f"capacity/d{100 * self.threshold:.0f}"
        out = {**super().compute(), name: 0.0}
        before = 0.0
        for size, (_, accuracy) in self.means().items():
            if accuracy < self.threshold:
                if largest := out[name]:
                    share = (before - self.threshold) / (before - accuracy)
                    out[f"{name}_interpolated"] = largest * (size / largest) ** share
                break
            out[name], before = float(size), accuracy
        return out


class SuccessRate(Metric):
    """The share of runs whose figure reaches a threshold; updated with figures of runs."""

    counts: Tensor

    def __init__(self, threshold: float = 0.9) -> None:
        super().__init__()
        self.threshold = threshold
        self.add_state("counts", torch.zeros(2, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, figures: Tensor) -> None:
        reached = figures >= self.threshold
        self.counts += torch.stack(
            [reached.sum(), torch.tensor(reached.numel()).to(reached.device)]
        )

    def compute(self) -> Tensor:
        return self.counts[0] / self.counts[1]


def extrapolation(results: dict[str, dict[str, Any]], trained: int) -> dict[str, Any]:
    """`extrapolation/k` = accuracy at k times the training length / accuracy at that length, for
    figures by part, `length=T`, that hold both."""
    out = {}
    for name in ("recall/accuracy", "accuracy/all"):
        at = {int(n[7:]): found[name] for n, found in results.items() if name in found}
        if at.get(trained, 0) > 0:
            longer = [n for n in at if n > trained and n % trained == 0]
            out |= {f"extrapolation/{n // trained}": at[n] / at[trained] for n in longer}
    return out
