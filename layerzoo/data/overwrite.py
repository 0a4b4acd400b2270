"""Overwrite: the last value of a key counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torchmetrics import Metric

from layerzoo.data.random import bits, choose, choose_weighted, shuffle, slot_weights
from layerzoo.data.recall import RecallTask
from layerzoo.data.task import IGNORE, SPLITS, Arrays
from layerzoo.metrics import AccuracyBy, Collateral, ErrorKinds
from layerzoo.spec import require


class Overwrite(RecallTask):
    """Overwriting, the last value wins: D keys, written several times each in random order, k v
    k v .., then each key again, once, to be answered with its last value.

    Keys are 1..V/2-1 and values V/2..V-1; all values of a sample differ, so that a value tells
    which write it is from. The j-th key is written `writes[j % len(writes)]` times, U in all.
    Queries stand in the (T - 2U) / 2 two-token slots behind the writes as in `MQAR`, but
    uniformly by default, so that lags spread; the rest is zero. Chance is a guess among V/2.

    Annotations at the queries: `lag` since the last write of the key; `writes` of the key;
    `between`, the writes of other keys since then; `old`, the key's earlier values, -1 where
    there are none; and of the row `bound`, all values written. A wrong answer is stale (an old
    value of the key), another key's value, or off the set (`errors/..`, see `ErrorKinds`); keys
    that are written once show what writes to others cost (`Collateral`).
    """

    class Config(RecallTask.Config):
        vocab_size: int = 8192
        """V is even. The lower half of the tokens are keys, and the upper half values."""
        length: int = 128
        """A sample has T tokens, an even number."""
        keys: int = 8
        """A sample has D keys."""
        writes: Sequence[int] = (1, 2, 4)
        """Keys are written this often: the first key takes the first number, and so on in
        turn."""
        alpha: float = 1.0
        """The smaller alpha is, the nearer to the writes the queries stand; 1 is uniform."""

        @property
        def times(self) -> list[int]:
            """How often each key is written."""
            return [self.writes[n % len(self.writes)] for n in range(self.keys)]

        def check(self) -> None:
            super().check()
            V, T, half = self.vocab_size, self.length, self.vocab_size // 2
            require(V % 2 == 0, f"vocab_size: must be even, got {V}")
            require(
                1 <= self.keys < half,
                f"keys: {self.keys}, but a vocabulary of {V} has {half - 1}",
            )
            require(
                self.writes and min(self.writes) >= 1,
                f"writes: must be 1 or more, got {[*self.writes]}",
            )
            total = sum(self.times)
            require(total <= half, f"writes: {total} in all, but there are {half} values to write")
            least = 2 * (total + self.keys)
            require(
                T % 2 == 0 and least <= T,
                f"length: {total} writes and {self.keys} queries need an even number of at least "
                f"{least}, got {T}",
            )
            require(0 < self.alpha <= 2, f"alpha: must be in (0, 2], got {self.alpha}")

    cases = (
        {"vocab_size": 64, "length": 64, "keys": 6},
        {"vocab_size": 64, "length": 40, "keys": 4, "writes": [1, 3], "alpha": 0.1},
    )

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.times = np.array(config.times)
        self.weights = slot_weights(self.length // 2 - sum(config.times), config.alpha)

    @property
    def chance(self) -> float:
        """The accuracy of guessing a value."""
        return 2 / self.vocab_size

    def metrics(self) -> list[Metric]:
        by = AccuracyBy("writes", sorted({*self.config.writes}), "recall_writes")
        return [*super().metrics(), by, ErrorKinds(), Collateral()]

    def sample(self, split: str, index: NDArray[np.int64]) -> Arrays:
        B, T, D, half = len(index), self.length, self.config.keys, self.vocab_size // 2
        U, rows = int(self.times.sum()), np.arange(B)[:, None]
        key = (self.seed, SPLITS.index(split), index[:, None])
        keys = 1 + choose(half - 1, D, bits(*key, 0, np.arange(D)))
        values = half + choose(half, U, bits(*key, 1, np.arange(U)))
        place = shuffle(bits(*key, 2, np.arange(U)))  # of each key's writes, key after key
        slots = choose_weighted(self.weights, D, bits(*key, 3, np.arange(D)))
        tokens = np.zeros((B, T), np.int64)
        tokens[rows, 2 * place] = np.repeat(keys, self.times, axis=1)
        tokens[:, 1 : 2 * U : 2] = values

        # The writes of a key in order, [B, D, most], the last one at the end and -1 in front.
        owner = np.repeat(np.arange(D), self.times)
        turn = np.arange(U) - np.repeat(self.times.cumsum() - self.times, self.times)
        history = np.full((B, D, self.times.max()), -1)
        history[:, owner, turn] = place
        history.sort(-1)
        old, last = history[..., :-1], history[..., -1]
        queries = 2 * U + 2 * slots
        tokens[rows, queries] = keys

        def at_queries(value: NDArray[Any], empty: int = 0) -> NDArray[Any]:
            out = np.full((B, T, *value.shape[2:]), empty, value.dtype)
            out[rows, queries] = value
            return out

        answers = np.take_along_axis(values, last, 1)
        before = np.where(old < 0, -1, values[rows[..., None], old])
        return {
            "tokens": tokens,
            "labels": at_queries(answers, IGNORE),
            "lag": at_queries(queries - 2 * last - 1),
            "writes": at_queries(np.broadcast_to(self.times, (B, D))),
            "between": at_queries(U - 1 - last),
            "old": at_queries(before, -1),
            "bound": values[:, None],
            "reachable": at_queries(self.reachable(queries, 2 * last, 2 * last + 1)),
        }

    def solve(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """A dictionary, in which a later value replaces an earlier one."""
        written = 2 * int(self.times.sum())
        value = dict(zip(tokens[:written:2], tokens[1:written:2], strict=True))
        return np.array([value.get(token, self.vocab_size // 2) for token in tokens])
