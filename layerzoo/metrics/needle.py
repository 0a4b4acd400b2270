"""Answers of several tokens, which count only if all tokens are right, alone or amid text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from layerzoo.metrics.wide import WideMetric, nats, ratio, right


class Answers(WideMetric):
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
        self.add_counts("counts", 2)

    def update(
        self, logits: Tensor, labels: Tensor, *, answer: Tensor, **annotations: Any
    ) -> None:
        numbers, which = answer.unique(return_inverse=True)
        wrong = torch.zeros_like(numbers).index_add_(
            0, which, (~right(logits, labels)).to(numbers.dtype)
        )
        self.counts[0] += (wrong == 0).sum()
        self.counts[1] += len(numbers)

    def compute(self) -> dict[str, float]:
        return {"recall/answers": ratio(*self.counts.tolist())}


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
        self.add_counts("tokens", 2)
        self.add_sums("total")

    def update(
        self, logits: Tensor, labels: Tensor, *, answer: Tensor, **annotations: Any
    ) -> None:
        answer = answer.bool()
        begins = answer & ~torch.cat([answer[:0].new_zeros(1), answer])[: len(answer)]
        number, logits, labels = begins.cumsum(0)[answer], logits[answer], labels[answer]
        super().update(logits, labels, answer=number)
        self.tokens[0] += right(logits, labels).sum()
        self.tokens[1] += len(labels)
        self.total += nats(logits, labels).sum(dtype=self.total.dtype)

    def compute(self) -> dict[str, float]:
        found, count = self.tokens.tolist()
        if count == 0:
            return {}
        return {
            "recall/accuracy": found / count,
            "recall/loss": self.total.item() / count,
            **super().compute(),
        }
