"""Answers: whole ones, of several tokens, all of which must be right; and those amid text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
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


class MarkedAnswers(Answers):
    """Answers apart from other labels: `recall/accuracy` and `recall/loss` (nats) a token of
    those that the annotation `answer` marks, and `recall/answers`, of whole ones. All are absent
    if there are none.

    The labels of an answer stand in a row, and between two answers there is another label.
    """

    tokens: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("tokens", torch.zeros(2, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")

    def update(
        self, logits: Tensor, labels: Tensor, *, answer: Tensor, **annotations: Any
    ) -> None:
        answer = answer.bool()
        begins = answer & ~torch.cat([answer[:0].new_zeros(1), answer])[: len(answer)]
        number, logits, labels = begins.cumsum(0)[answer], logits[answer], labels[answer]
        super().update(logits, labels, answer=number)
        right = (logits.argmax(-1) == labels).sum()
        self.tokens += torch.stack([right, torch.tensor(len(labels)).to(labels)])
        self.total += F.cross_entropy(logits.float(), labels, reduction="sum")

    def compute(self) -> dict[str, Tensor]:
        right, count = self.tokens
        if count == 0:
            return {}
        return {
            "recall/accuracy": right / count,
            "recall/loss": self.total / count,
            **super().compute(),
        }
