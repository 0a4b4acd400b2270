"""Multi-query associative recall."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from torchmetrics import Metric

from layerzoo.data.random import below, bits, choose, choose_weighted, slot_weights
from layerzoo.data.recall import RecallTask
from layerzoo.data.task import IGNORE, SPLITS, Arrays, Task
from layerzoo.metrics import Capacity

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

    Args:
        vocab_size: V. length: T, even.
        pairs: D, at most T / 4; of a list, samples take each in turn, and `capacity/d90` is the
            largest that is still answered (see `layerzoo.metrics.Capacity`).
        alpha: the smaller, the nearer to the pairs the queries stand.
        filler: what stands between the queries: zero, or random tokens of the vocabulary.
        keys: the first and the last key in use, for tasks with keys of their own; null is all.
        setting: a published setting, in place of length and pairs.
        See `RecallTask` and `Task` for the others.
    """

    cases = (
        {"vocab_size": 32, "length": 64, "pairs": 8},
        {"vocab_size": 32, "length": 40, "pairs": 6, "filler": "random", "keys": (4, 11)},
        {"vocab_size": 64, "length": 64, "pairs": [2, 4, 16]},
    )
    SETTINGS: ClassVar[dict[str, dict[str, Any]]] = {
        **{
            f"figure2/{length}x{pairs}": {"length": length, "pairs": pairs}
            for length, pairs in ((64, 4), (128, 8), (256, 16), (512, 64))
        },
        "recall-memory": {"length": TESTED[-1][0], "pairs": TESTED[-1][1]},
    }

    def __init__(
        self,
        vocab_size: int = 8192,
        length: int = 64,
        pairs: int | list[int] = 4,
        alpha: float = 0.01,
        filler: Literal["zero", "random"] = "zero",
        keys: tuple[int, int] | None = None,
        setting: str | None = None,
        **options: Any,
    ) -> None:
        chosen = self.preset(setting, length=length, pairs=pairs)
        length, pairs = chosen["length"], chosen["pairs"]
        super().__init__(**options)
        self.require(vocab_size % 2 == 0, f"vocab_size: must be even, got {vocab_size}")
        first, last = keys or (1, vocab_size // 2 - 1)
        self.require(
            1 <= first <= last < vocab_size // 2,
            f"keys: must be in 1..{vocab_size // 2 - 1}, got {keys}",
        )
        self.sizes = pairs if isinstance(pairs, list) else [pairs]
        self.require(len(self.sizes) > 0, "pairs: an empty list")
        low, high = min(self.sizes), max(self.sizes)
        self.require(
            low >= 1 and high <= last - first + 1,
            f"pairs: {pairs}, but a vocabulary of {vocab_size} has {last - first + 1} keys",
        )
        self.require(length % 2 == 0, f"length: must be even, got {length}")
        self.require(
            4 * high <= length,
            f"length: {high} pairs and as many queries need at least {4 * high}, got {length}",
        )
        self.require(0 < alpha <= 2, f"alpha: must be in (0, 2], got {alpha}")
        self.vocab_size, self.length, self.pairs, self.alpha = vocab_size, length, pairs, alpha
        self.filler, self.keys, self.setting = filler, (first, last), setting
        self.weights = {D: slot_weights(length // 2 - D, alpha) for D in self.sizes}

    @property
    def chance(self) -> float:
        """The accuracy of guessing a value."""
        return 2 / self.vocab_size

    def divide(self, split: str) -> dict[str, Task]:
        if self.setting != "recall-memory" or self.lengths:
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
        first, last = self.keys
        key = (self.seed, SPLITS.index(split), index[:, None])
        keys = first + choose(last - first + 1, D, bits(*key, 0, np.arange(D)))
        values = half + choose(half, D, bits(*key, 1, np.arange(D)))
        slots = choose_weighted(self.weights[D], D, bits(*key, 2, np.arange(D)))
        if self.filler == "zero":
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
