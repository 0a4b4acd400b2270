"""Whole answers: of several tokens, all of which must be right."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class Answers(Metric):
    """`recall/answers`, the share of answers whose tokens are all predicted, each given the true
    ones before it: what greedy decoding gets right, for it goes on from its own tokens only while
    they are the true ones.

    The labels of an answer have the same number in the annotation `answer`, and no other answer
    has it. They come in one update, as they stand in one row, so that the counts of several
    processes add up.
    """

    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(2, dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self, logits: Tensor, labels: Tensor, *, answer: Tensor, **annotations: Any
    ) -> None:
        numbers, which = answer.unique(return_inverse=True)
        wrong = torch.zeros_like(numbers).index_add_(
            0, which, (logits.argmax(-1) != labels).to(numbers.dtype)
        )
        self.counts += torch.stack([(wrong == 0).sum(), torch.tensor(len(numbers)).to(labels)])

    def compute(self) -> dict[str, Tensor]:
        return {"recall/answers": self.counts[0] / self.counts[1]}
