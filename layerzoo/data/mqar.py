"""Multi-query associative recall."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from torchmetrics import Metric

from layerzoo.data.random import bits, choose, choose_weighted
from layerzoo.data.task import IGNORE, SPLITS, Task
from layerzoo.layer import Reach
from layerzoo.metrics import Recall, RecallByLag, TokenLoss

if TYPE_CHECKING:
    from layerzoo.model import LanguageModel


class MQAR(Task):
    """Multi-query associative recall: k1 v1 .. kD vD, then each key again, once, to be answered.

    Keys are 1..V/2-1 and values V/2..V-1, all distinct within a sample. The other (T - 2D) / 2
    two-token slots hold the D queries: the j-th key takes the j-th slot drawn without
    replacement, slot i with probability ~ i^(alpha - 1). The label, the key's value, is on the
    query's position. Source: Arora et al. 2023, arXiv 2312.04927, and its code (zoology).

    Annotations at the queries: `lag` = query position - value position; `reachable`, whether a
    model of limited reach can answer it at all, because the key is at most `reach` positions
    back, or key and value are among the first `sinks` tokens.

    Args:
        vocab_size: V. length: T, even. pairs: D, at most T / 4.
        alpha: the smaller, the nearer to the pairs the queries stand.
        filler: what stands between the queries: zero, or random tokens of the vocabulary.
        reach, sinks: of the model that defines `recall/ceiling`; null takes the trained model's
            own, which for a memory is unbounded.
        See `Task` for the others.
    """

    def __init__(
        self,
        vocab_size: int = 8192,
        length: int = 64,
        pairs: int = 4,
        alpha: float = 0.01,
        filler: Literal["zero", "random"] = "zero",
        reach: int | None = None,
        sinks: int = 0,
        batch_size: int = 64,
        seed: int = 0,
        train_samples: int = 100_000,
        val_samples: int = 1000,
        test_samples: int = 3000,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            seed=seed,
            train_samples=train_samples,
            val_samples=val_samples,
            test_samples=test_samples,
            num_workers=num_workers,
        )
        self.require(vocab_size % 2 == 0, f"vocab_size: must be even, got {vocab_size}")
        self.require(
            1 <= pairs <= vocab_size // 2 - 1,
            f"pairs: {pairs}, but a vocabulary of {vocab_size} has {vocab_size // 2 - 1} keys",
        )
        self.require(length % 2 == 0, f"length: must be even, got {length}")
        self.require(
            4 * pairs <= length,
            f"length: {pairs} pairs and as many queries need at least {4 * pairs}, got {length}",
        )
        self.vocab_size, self.length, self.pairs, self.alpha = vocab_size, length, pairs, alpha
        self.filler = filler
        self.require(0 < alpha <= 2, f"alpha: must be in (0, 2], got {alpha}")
        self.require(sinks >= 0, f"sinks: must not be negative, got {sinks}")
        self.require(reach is None or reach >= 0, f"reach: must not be negative, got {reach}")
        self.own_reach = None if reach is None else Reach(reach, sinks)  # not of any model
        self.reach = self.own_reach
        slots = np.arange(1, (length - 2 * pairs) // 2 + 1, dtype=np.float64)
        # Integers, so that a rounding of the power cannot change a draw elsewhere.
        self.weights = np.rint(2.0**32 * slots ** (alpha - 1)).astype(np.int64)

    @property
    def chance(self) -> float:
        """The accuracy of guessing a value."""
        return 2 / self.vocab_size

    def attach(self, model: LanguageModel) -> None:
        super().attach(model)
        self.reach = model.reach() if self.own_reach is None else self.own_reach

    def metrics(self) -> list[Metric]:
        return [TokenLoss(), Recall(), RecallByLag(self.length)]

    def sample(self, split: str, index: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        B, T, D, half = len(index), self.length, self.pairs, self.vocab_size // 2
        key = (self.seed, SPLITS.index(split), index[:, None])
        keys = 1 + choose(half - 1, D, bits(*key, 0, np.arange(D)))
        values = half + choose(half, D, bits(*key, 1, np.arange(D)))
        slots = choose_weighted(self.weights, D, bits(*key, 2, np.arange(D)))
        if self.filler == "zero":
            tokens = np.zeros((B, T), np.int64)
        else:
            noise = bits(*key, 3, np.arange(T)) % np.uint64(self.vocab_size)
            tokens = noise.astype(np.int64)
        tokens[:, 0 : 2 * D : 2], tokens[:, 1 : 2 * D : 2] = keys, values
        queries, value_at = 2 * D + 2 * slots, np.arange(D) * 2 + 1
        rows = np.arange(B)[:, None]
        tokens[rows, queries] = keys
        labels, lag = np.full((B, T), IGNORE), np.zeros((B, T), np.int64)
        labels[rows, queries] = values
        lag[rows, queries] = queries - value_at
        reachable = np.zeros((B, T), bool)
        reachable[rows, queries] = self._reachable(queries, value_at)
        return {"tokens": tokens, "labels": labels, "lag": lag, "reachable": reachable}

    def _reachable(self, queries: NDArray[Any], value_at: NDArray[Any]) -> NDArray[np.bool_]:
        if self.reach is None:
            return np.ones(queries.shape, bool)
        key_at = value_at - 1
        return (queries - key_at <= self.reach.back) | (value_at < self.reach.sinks)

    def ceiling(self, split: str = "test") -> float:
        """The share of a split's queries that a model of this reach can answer."""
        total = self.samples[split]
        parts = np.array_split(np.arange(total), -(-total // 1024))
        reachable = sum(int(self.sample(split, part)["reachable"].sum()) for part in parts)
        return reachable / (total * self.pairs)
