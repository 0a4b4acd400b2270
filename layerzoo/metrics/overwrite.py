"""What a memory answers instead of the last value of a key."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class ErrorKinds(Metric):
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
        self.add_state("counts", torch.zeros(4, dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self, logits: Tensor, labels: Tensor, *, old: Tensor, bound: Tensor, **annotations: Any
    ) -> None:
        answer = logits.argmax(-1)
        wrong = answer != labels
        stale = (old == answer[:, None]).any(1)
        other = (bound == answer[:, None]).any(1) & ~stale
        kinds = [wrong & stale, wrong & other, wrong & ~stale & ~other, (old >= 0).any(1)]
        self.counts += torch.stack([kind.sum() for kind in kinds])

    def compute(self) -> dict[str, Tensor]:
        wrong, could = self.counts[:3].sum(), self.counts[3]
        out = {}
        if wrong > 0:
            names = ("errors/stale", "errors/other_key", "errors/off_set")
            out |= dict(zip(names, self.counts[:3] / wrong, strict=True))
        if could > 0:
            out["errors/stale_rate"] = self.counts[0] / could
        return out


class Collateral(Metric):
    """Recall of keys written once, `recall/untouched`, and more often, `recall/updated`, and
    their difference, `recall/untouched_minus_updated`; what is absent was not asked. Annotation
    `writes`."""

    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        zero = torch.zeros(2, 2, dtype=torch.int64)  # [updated, correct]
        self.add_state("counts", zero, dist_reduce_fx="sum")

    def update(
        self, logits: Tensor, labels: Tensor, *, writes: Tensor, **annotations: Any
    ) -> None:
        index = 2 * (writes > 1).long() + (logits.argmax(-1) == labels).long()
        self.counts += torch.bincount(index, minlength=4).view(2, 2)

    def compute(self) -> dict[str, Tensor]:
        names = ("recall/untouched", "recall/updated")
        recall = self.counts[:, 1] / self.counts.sum(1)
        out = {name: recall[n] for n, name in enumerate(names) if self.counts[n].sum() > 0}
        if len(out) == 2:
            out["recall/untouched_minus_updated"] = recall[0] - recall[1]
        return out
