"""What a memory answers instead of the last value of a key."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from layerzoo.metrics.wide import WideMetric, right


class ErrorKinds(WideMetric):
    """Where wrong answers come from, as shares of all wrong answers, `errors/..`; absent if there
    are none.

    `errors/stale`: an old value of the asked key (annotation `old`, `[N, n]`, -1 for none);
    `errors/other_key`: another value that is bound in the context (`bound`, `[N, m]`);
    `errors/off_set`: anything else. `errors/stale_rate` is stale answers / all queries of keys
    that have an old value.
    """

    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        # stale, another key's, off the set, queries that could be answered stale
        self.add_counts("counts", 4)

    def update(
        self, logits: Tensor, labels: Tensor, *, old: Tensor, bound: Tensor, **annotations: Any
    ) -> None:
        wrong, answer = ~right(logits, labels), logits.argmax(-1)[:, None]
        answered = ~logits.isnan().any(1, keepdim=True)
        stale = (answered & (old == answer)).any(1)
        other = (answered & (bound == answer)).any(1) & ~stale
        kinds = [wrong & stale, wrong & other, wrong & ~stale & ~other, (old >= 0).any(1)]
        self.counts += torch.stack([kind.sum() for kind in kinds])

    def compute(self) -> dict[str, float]:
        *kinds, could = self.counts.tolist()
        out = {}
        if wrong := sum(kinds):
            names = ("errors/stale", "errors/other_key", "errors/off_set")
            out |= {name: kind / wrong for name, kind in zip(names, kinds, strict=True)}
        if could:
            out["errors/stale_rate"] = kinds[0] / could
        return out


class Collateral(WideMetric):
    """Recall of keys written once, `recall/untouched`, and more often, `recall/updated`, and
    their difference, `recall/untouched_minus_updated`; what is absent was not asked. Annotation
    `writes`."""

    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_counts("counts", 2, 2)  # [updated, correct]

    def update(
        self, logits: Tensor, labels: Tensor, *, writes: Tensor, **annotations: Any
    ) -> None:
        index = 2 * (writes > 1).long() + right(logits, labels).long()
        self.counts += torch.bincount(index, minlength=4).view(2, 2)

    def compute(self) -> dict[str, float]:
        names = ("recall/untouched", "recall/updated")
        counts = zip(names, self.counts.tolist(), strict=True)
        out = {name: found / (wrong + found) for name, (wrong, found) in counts if wrong + found}
        if len(out) == 2:
            untouched, updated = out.values()
            out["recall/untouched_minus_updated"] = untouched - updated
        return out
