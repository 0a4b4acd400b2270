"""torchmetrics metrics of sequence models: token loss, loss by position, recall and its lag.

Every metric is updated with the logits and labels of the labelled positions, `[N, vocab]` and
`[N]`, and the task's annotations at the same positions, and computes a dict of scalars.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric


class TokenLoss(Metric):
    """Mean cross entropy: `loss/held_out` in nats a token, `loss/bits_per_byte` for bytes."""

    total: Tensor
    count: Tensor

    def __init__(self, bytes: bool = False) -> None:
        super().__init__()
        self.bytes = bytes
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor, **annotations: Any) -> None:
        self.total += F.cross_entropy(logits.float(), labels, reduction="sum")
        self.count += labels.numel()

    def compute(self) -> dict[str, Tensor]:
        loss = self.total / self.count
        bits = {"loss/bits_per_byte": loss / math.log(2)} if self.bytes else {}
        return {"loss/held_out": loss, **bits}


class Binned(Metric):
    """A mean of one value in bins [2^n, 2^(n+1)) of an annotation."""

    total: Tensor
    count: Tensor

    def __init__(self, prefix: str, annotation: str, longest: int) -> None:
        super().__init__()
        self.prefix, self.annotation = prefix, annotation
        bins = max(1, longest.bit_length())
        self.add_state("total", torch.zeros(bins), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(bins, dtype=torch.int64), dist_reduce_fx="sum")

    def value(self, logits: Tensor, labels: Tensor) -> Tensor:
        raise NotImplementedError

    def update(self, logits: Tensor, labels: Tensor, **annotations: Tensor) -> None:
        at = annotations[self.annotation].clamp(min=1)
        bins = torch.frexp(at.float()).exponent.long() - 1  # floor(log2), exact
        bins = bins.clamp(max=self.total.numel() - 1)
        value = self.value(logits, labels).to(self.total.dtype)
        self.total.index_add_(0, bins, value)
        self.count.index_add_(0, bins, torch.ones_like(bins))

    def compute(self) -> dict[str, Tensor]:
        mean = self.total / self.count
        seen = self.count.nonzero().flatten().tolist()
        return {f"{self.prefix}/{2**n}": mean[n] for n in seen}


class LossByPosition(Binned):
    """Mean loss of the tokens at positions [2^n, 2^(n+1)), counted from 1, as `loss_at/2^n`."""

    def __init__(self, length: int) -> None:
        super().__init__("loss_at", "position", length)

    def value(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels, reduction="none")


class RecallByLag(Binned):
    """Accuracy of the queries whose lag is in [2^n, 2^(n+1)), as `recall_lag/2^n`."""

    def __init__(self, length: int, chance: float | None = None) -> None:
        super().__init__("recall_lag", "lag", length)

    def value(self, logits: Tensor, labels: Tensor) -> Tensor:
        return logits.argmax(-1) == labels


class Recall(Metric):
    """`recall/accuracy`; `recall/ceiling`, the share of queries that a model of limited reach
    can answer (the annotation `reachable`); `recall/beyond_window`, the accuracy on the others,
    absent if there are none; `recall/queries`, their number."""

    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        zero = torch.zeros(2, 2, dtype=torch.int64)  # [reachable, correct]
        self.add_state("counts", zero, dist_reduce_fx="sum")

    def update(
        self, logits: Tensor, labels: Tensor, *, reachable: Tensor, **annotations: Any
    ) -> None:
        correct = logits.argmax(-1) == labels
        index = 2 * reachable.long() + correct.long()
        self.counts += torch.bincount(index, minlength=4).view(2, 2)

    def compute(self) -> dict[str, Tensor]:
        total, beyond = self.counts.sum(), self.counts[0].sum()
        out = {
            "recall/accuracy": self.counts[:, 1].sum() / total,
            "recall/ceiling": self.counts[1].sum() / total,
            "recall/queries": total,
        }
        if beyond > 0:
            out["recall/beyond_window"] = self.counts[0, 1] / beyond
        return {name: value.float() for name, value in out.items()}


def extrapolation(results: dict[str, dict[str, Tensor]], trained: int) -> dict[str, Tensor]:
    """`extrapolation/k` = accuracy at k times the training length / accuracy at that length, for
    results by length that hold both."""
    out = {}
    for name in ("recall/accuracy", "accuracy/all"):
        at = {int(n): figures[name] for n, figures in results.items() if name in figures}
        if at.get(trained, 0) > 0:
            out |= {
                f"extrapolation/{n // trained}": at[n] / at[trained]
                for n in at
                if n > trained and n % trained == 0
            }
    return out
