"""Accuracy: over all answers, over whole samples, by an annotation, and what follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from layerzoo.metrics.binned import Binned
from layerzoo.metrics.wide import WideMetric, ratio, right


def scaled(accuracy: float, chance: float) -> float:
    """(accuracy - chance) / (1 - chance): 0 is a guess, 1 is all; nan if a guess is all."""
    return ratio(accuracy - chance, 1 - chance)


class Accuracy(WideMetric):
    """`accuracy/all`, the share of the labels that are predicted; `accuracy/scaled` =
    (accuracy - chance) / (1 - chance)."""

    counts: Tensor

    def __init__(self, chance: float) -> None:
        super().__init__()
        self.chance = chance
        self.add_counts("counts", 2)

    def update(self, logits: Tensor, labels: Tensor, **annotations: Any) -> None:
        self.counts[0] += right(logits, labels).sum()
        self.counts[1] += len(labels)

    def compute(self) -> dict[str, float]:
        accuracy = ratio(*self.counts.tolist())
        return {"accuracy/all": accuracy, "accuracy/scaled": scaled(accuracy, self.chance)}


class AccuracyBy(Binned):
    """Accuracy in bins of an annotation, `accuracy_<annotation>/edge` or another prefix."""

    def __init__(self, annotation: str, edges: Sequence[int], prefix: str = "") -> None:
        super().__init__(prefix or f"accuracy_{annotation}", annotation, edges)

    def value(self, logits: Tensor, labels: Tensor) -> Tensor:
        return right(logits, labels)


class Capacity(AccuracyBy):
    """The number of pairs that are recalled, by the annotation `pairs`.

    - `accuracy_pairs/D` is the accuracy with D pairs.
    - `capacity/d90` is the largest tested D with an accuracy of at least 90%, at every smaller D,
      too. It is 0 if the smallest has less.
    - `capacity/d90_interpolated` is where accuracy falls through 90% between that D and the next,
      linear in log D. It is absent if the capacity lies outside what was tested.
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


class SuccessRate(WideMetric):
    """The share of runs whose figure reaches a threshold; updated with figures of runs."""

    counts: Tensor

    def __init__(self, threshold: float = 0.9) -> None:
        super().__init__()
        self.threshold = threshold
        self.add_counts("counts", 2)

    def update(self, figures: Tensor) -> None:
        self.counts[0] += (figures >= self.threshold).sum()
        self.counts[1] += figures.numel()

    def compute(self) -> float:
        return ratio(*self.counts.tolist())


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
