"""Multi-query associative recall."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from torchmetrics import Metric

from layerzoo.data.random import below, bits, choose, choose_weighted, slot_weights
from layerzoo.data.recall import RecallTask
from layerzoo.data.task import IGNORE, SPLITS, Arrays, Task
from layerzoo.metrics import Capacity
from layerzoo.spec import plain, require

TRAINED = {(64, 4): 100_000, (128, 8): 20_000} | {(256, d): 20_000 for d in (16, 32, 64)}
TESTED = ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))
"""The (length, pairs) of the mix `recall-memory`, and how many samples it is trained on."""


class MQAR(RecallTask):
    """Multi-query associative recall: k1 v1 .. kD vD, then each key again, once, to be answered.

    Keys are 1..V/2-1 and values V/2..V-1, all distinct within a sample. The other (T - 2D) / 2
    two-token slots hold the D queries: the j-th key takes the j-th slot drawn without
    replacement, slot i with probability ~ i^(alpha - 1). The label, the key's value, is on the
    query's position; its annotations are `lag` = query position - value position and, of the row,
    `pairs`. Chance is a guess among the V/2 values. Source: Arora et al. 2023, arXiv 2312.04927,
    and its code (zoology).

    Settings: `figure2/64x4`, `128x8`, `256x16`, `512x64` of that paper; `recall-memory`, the mix
    of lengths and pairs of Arora et al. 2024, arXiv 2402.18668, figure 2: trained on five sets
    (a batch is of one of them), tested on seven, with figures for each and their mean; there
    train_samples and test_samples are of all sets together, 180,000 and 7,000 in the paper.
    """

    class Config(RecallTask.Config):
        vocab_size: int = 8192
        """V is even. The lower half of the tokens are keys, and the upper half values."""
        length: int = 64
        """A sample has T tokens, an even number."""
        pairs: int | Sequence[int] = 4
        """A sample has D pairs, at most T / 4. Samples take the numbers of a list in turn, and
        `capacity/d90` is then the largest D up to which accuracy is at least 90%."""
        alpha: float = 0.01
        """The smaller alpha is, the nearer to the pairs the queries stand."""
        filler: Literal["zero", "random"] = "zero"
        """The positions between the queries hold token 0 (zero), or random tokens of the
        vocabulary (random)."""
        keys: tuple[int, int] | None = None
        """Only keys from the first to the last of these are used; null uses all. Tasks can so
        have keys of their own."""
        setting: str | None = None
        """This published setting sets length and pairs, which are left out then."""

        settings: ClassVar = {
            **{
                f"figure2/{length}x{pairs}": {"length": length, "pairs": pairs}
                for length, pairs in ((64, 4), (128, 8), (256, 16), (512, 64))
            },
            "recall-memory": {"length": TESTED[-1][0], "pairs": TESTED[-1][1]},
        }

        @property
        def sizes(self) -> tuple[int, ...]:
            """The numbers of pairs that samples have."""
            return (self.pairs,) if isinstance(self.pairs, int) else tuple(self.pairs)

        @property
        def used_keys(self) -> tuple[int, int]:
            return self.keys or (1, self.vocab_size // 2 - 1)

        def check(self) -> None:
            super().check()
            V, T = self.vocab_size, self.length
            require(V % 2 == 0, f"vocab_size: must be even, got {V}")
            first, last = self.used_keys
            possible = 1 <= first <= last < V // 2
            require(possible, f"keys: must be in 1..{V // 2 - 1}, got {self.keys}")
            require(self.sizes, "pairs: an empty list")
            low, high, keys = min(self.sizes), max(self.sizes), last - first + 1
            require(
                low >= 1 and high <= keys,
                f"pairs: {plain(self.pairs)}, but a vocabulary of {V} has {keys} keys",
            )
            require(T % 2 == 0, f"length: must be even, got {T}")
            require(
                4 * high <= T,
                f"length: {high} pairs and as many queries need at least {4 * high}, got {T}",
            )
            require(0 < self.alpha <= 2, f"alpha: must be in (0, 2], got {self.alpha}")

    cases = (
        {"vocab_size": 32, "length": 64, "pairs": 8},
        {"vocab_size": 32, "length": 40, "pairs": 6, "filler": "random", "keys": (4, 11)},
        {"vocab_size": 64, "length": 64, "pairs": [2, 4, 16]},
    )

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        config = self.config
        self.sizes = config.sizes
        free = {D: self.length // 2 - D for D in self.sizes}
        self.weights = {D: slot_weights(slots, config.alpha) for D, slots in free.items()}

    @property
    def chance(self) -> float:
        """The accuracy of guessing a value."""
        return 2 / self.vocab_size

    def divide(self, split: str) -> dict[str, Task]:
        if self.given.setting != "recall-memory" or self.lengths:
            return super().divide(split)
        sizes = {size: self.samples[split] // len(TESTED) for size in TESTED}
        if split == "train":
            share = self.samples[split] / sum(TRAINED.values())
            sizes = {size: round(share * count) for size, count in TRAINED.items()}
        return {
            f"set={length}x{pairs}": self.varied(
                length=length, pairs=pairs, **{f"{split}_samples": max(1, count)}
            )
            for (length, pairs), count in sizes.items()
        }

    def metrics(self) -> list[Metric]:
        capacity = [Capacity(self.sizes)] if len(self.sizes) > 1 else []
        return [*super().metrics(), *capacity]

    def sample(self, split: str, index: NDArray[np.int64]) -> Arrays:
        """Those of several sizes take turns."""
        turn = index % len(self.sizes)
        if len(self.sizes) == 1:
            return self._sample(self.sizes[0], split, index)
        whole: Arrays = {}
        for n, D in enumerate(self.sizes):
            for name, part in self._sample(D, split, index[turn == n]).items():
                out = whole.setdefault(name, np.empty((len(index), *part.shape[1:]), part.dtype))
                out[turn == n] = part
        return whole

    def _sample(self, D: int, split: str, index: NDArray[np.int64]) -> Arrays:
        B, T, half = len(index), self.length, self.vocab_size // 2
        first, last = self.config.used_keys
        key = (self.seed, SPLITS.index(split), index[:, None])
        keys = first + choose(last - first + 1, D, bits(*key, 0, np.arange(D)))
        values = half + choose(half, D, bits(*key, 1, np.arange(D)))
        slots = choose_weighted(self.weights[D], D, bits(*key, 2, np.arange(D)))
        if self.config.filler == "zero":
            tokens = np.zeros((B, T), np.int64)
        else:
            tokens = below(self.vocab_size, bits(*key, 3, np.arange(T)))
        tokens[:, 0 : 2 * D : 2], tokens[:, 1 : 2 * D : 2] = keys, values
        queries, value_at = 2 * D + 2 * slots, np.arange(D) * 2 + 1
        rows = np.arange(B)[:, None]
        tokens[rows, queries] = keys
        labels, lag = np.full((B, T), IGNORE), np.zeros((B, T), np.int64)
        labels[rows, queries] = values
        lag[rows, queries] = queries - value_at
        reachable = np.zeros((B, T), bool)
        reachable[rows, queries] = self.reachable(queries, value_at - 1, value_at)
        return {
            "tokens": tokens,
            "labels": labels,
            "lag": lag,
            "reachable": reachable,
            "pairs": np.full((B, 1), D),
        }

    def solve(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """The first value that follows a key; of an unknown key any value."""
        half, value = self.vocab_size // 2, dict[int, int]()
        for key, after in zip(tokens[::2].tolist(), tokens[1::2].tolist(), strict=True):
            if after >= half:
                value.setdefault(key, after)
        return np.array([value.get(token, half) for token in tokens.tolist()])
