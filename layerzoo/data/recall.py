"""Recall: tasks whose answers stand in the context, so that a window has a ceiling."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torchmetrics import Metric

from layerzoo.data.task import IGNORE, Task
from layerzoo.layer import Reach
from layerzoo.metrics import Recall, RecallByLag, TokenLoss
from layerzoo.spec import require

if TYPE_CHECKING:
    from layerzoo.model import LanguageModel


class RecallTask(Task):
    """A task with the annotations `lag`, how many positions before the query the answer stands,
    and `reachable`, whether a model of limited reach can answer it at all: because all that the
    answer needs is at most `reach` positions back, or among the first `sinks` tokens.
    """

    class Config(Task.Config):
        reach: int | None = None
        """A query counts for `recall/ceiling` if its answer stands at most this many positions
        back. null takes the reach of the trained model, and a memory's is unbounded."""
        sinks: int = 0
        """Answers among the first tokens, as many as this, count for the ceiling too."""

        def check(self) -> None:
            super().check()
            require(self.sinks >= 0, f"sinks: must not be negative, got {self.sinks}")
            low = self.reach is not None and self.reach < 0
            require(not low, f"reach: must not be negative, got {self.reach}")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        reach, sinks = self.config.reach, self.config.sinks
        self.own_reach = None if reach is None else Reach(reach, sinks)  # not of any model
        self.reach = self.own_reach

    def attach(self, model: LanguageModel) -> None:
        super().attach(model)
        self.reach = model.reach() if self.own_reach is None else self.own_reach

    def metrics(self) -> list[Metric]:
        return [TokenLoss(), Recall(), RecallByLag(self.length, self.chance)]

    def reachable(
        self, query: ArrayLike, first: ArrayLike, last: ArrayLike | None = None
    ) -> NDArray[np.bool_]:
        """Whether a query can be answered whose answer needs the tokens at first..last (last
        defaults to first)."""
        query, first = np.asarray(query), np.asarray(first)
        last = first if last is None else np.asarray(last)
        if self.reach is None:
            return np.ones(np.broadcast_shapes(query.shape, first.shape), bool)
        return (query - first <= self.reach.back) | (last < self.reach.sinks)

    def ceiling(self, split: str = "test") -> float:
        """The share of a split's queries that a model of this reach can answer; of a split of
        several parts the mean of theirs."""
        parts = self.parts(split)
        if [*parts.values()] != [self]:
            shares = [
                part.ceiling(split) for part in parts.values() if isinstance(part, type(self))
            ]
            return sum(shares) / len(shares)
        total, reachable, labelled = self.samples[split], 0, 0
        for at in np.array_split(np.arange(total), -(-total // 1024)):
            sample = self.sample(split, at)
            where = sample["labels"] != IGNORE
            labelled += int(where.sum())
            reachable += int((where & sample["reachable"]).sum())
        return reachable / labelled
