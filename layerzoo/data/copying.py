"""Copying: of a whole string, and of the one token that followed another (induction)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torchmetrics import Metric

from layerzoo.data.random import below, bits
from layerzoo.data.recall import RecallTask
from layerzoo.data.task import IGNORE, SPLITS, Arrays, Task
from layerzoo.metrics import Accuracy, AccuracyBy, Answers, TokenLoss
from layerzoo.metrics.binned import octaves
from layerzoo.spec import require

MARK = 0
"""The separator of `Copying`, the special token of `Induction`; letters are the others."""


def letters(alphabet: int, random: NDArray[np.uint64]) -> NDArray[np.int64]:
    """1..alphabet, uniform."""
    return 1 + below(alphabet, random)


class Copying(Task):
    """Copying: a string of n letters, the separator 0, and the string again.

    x_1 .. x_n 0 x_1 .. x_{n-1}

    The label of each of the last n positions is the token that comes next, x_1 at the separator
    and x_n at the last position: the copy is teacher forced. Letters are independent, uniform
    and may repeat. Annotations: `lag`, from a label's position back to the token to copy, always
    n, so that a window copies all or nothing; `position` of that token in the string, from 1;
    `answer`, a number of each row's own. Chance is a guess among the letters.

    Source: Jelassi et al. 2024, arXiv 2402.01032. Deviations: strings of one length, no token
    for the end.
    """

    class Config(Task.Config):
        alphabet: int = 26
        """There are this many letters. The vocabulary has the separator, too."""
        length: int = 64
        """T = 2 n is even."""

        def check(self) -> None:
            super().check()
            require(self.alphabet >= 2, f"alphabet: must be at least 2, got {self.alphabet}")
            require(
                self.length >= 2 and self.length % 2 == 0,
                "length: string, separator and copy need an even number of tokens, got "
                f"{self.length}",
            )

    cases: ClassVar = ({"alphabet": 8, "length": 32},)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.vocab_size = config.alphabet + 1

    @property
    def chance(self) -> float:
        """The accuracy of guessing a letter."""
        return 1 / self.config.alphabet

    def metrics(self) -> list[Metric]:
        by_position = AccuracyBy("position", octaves(self.length // 2))
        return [TokenLoss(), Accuracy(self.chance), by_position, Answers()]

    def sample(self, split: str, index: NDArray[np.int64]) -> Arrays:
        B, n = len(index), self.length // 2
        key = (self.seed, SPLITS.index(split), index[:, None])
        string = letters(self.config.alphabet, bits(*key, np.arange(n)))
        first, last = np.zeros((B, n), np.int64), np.ones((B, n), np.int64)
        return {
            "tokens": np.concatenate([string, np.full((B, 1), MARK), string[:, :-1]], 1),
            "labels": np.concatenate([first + IGNORE, string], 1),
            "lag": np.concatenate([first, last * n], 1),
            "position": np.concatenate([first, last * np.arange(1, n + 1)], 1),
            "answer": index[:, None].copy(),
        }

    def solve(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """The token that stands half a row back."""
        return np.roll(tokens, self.length // 2)


class Induction(RecallTask):
    """Induction heads: letters, among them once, at a random place, the special token 0, which
    comes again at the end; the answer is the letter that followed it.

    x x x 0 y x x x x 0 -> y

    The label y is on the last position. The special token's first place is uniform in 0..T-4, so
    that at least one letter stands between y and the end. Letters are independent and uniform.
    Annotation `lag` = the last position - that of y. Chance is a guess among the letters.

    Source: Olsson et al. 2022, arXiv 2209.11895, in the form of Gu and Dao 2023, arXiv
    2312.00752: 16 tokens, trained at length 256, tested (by `lengths`) far beyond.
    """

    class Config(RecallTask.Config):
        vocab_size: int = 16
        """The vocabulary is the special token and the letters."""
        length: int = 256
        """A sample has T tokens."""

        def check(self) -> None:
            super().check()
            require(self.vocab_size >= 3, f"vocab_size: must be at least 3, got {self.vocab_size}")
            require(self.length >= 4, f"length: must be at least 4, got {self.length}")

    cases: ClassVar = ({"vocab_size": 9, "length": 24},)

    @property
    def chance(self) -> float:
        """The accuracy of guessing a letter."""
        return 1 / (self.vocab_size - 1)

    def sample(self, split: str, index: NDArray[np.int64]) -> Arrays:
        B, T = len(index), self.length
        key = (self.seed, SPLITS.index(split), index[:, None])
        tokens = letters(self.vocab_size - 1, bits(*key, 0, np.arange(T)))
        place = below(T - 3, bits(*key, 1))
        np.put_along_axis(tokens, place, MARK, 1)
        tokens[:, -1] = MARK
        labels, lag = np.full((B, T), IGNORE), np.zeros((B, T), np.int64)
        labels[:, -1:] = np.take_along_axis(tokens, place + 1, 1)
        lag[:, -1:] = T - 2 - place
        reachable = np.zeros((B, T), bool)
        reachable[:, -1:] = self.reachable(T - 1, place, place + 1)
        return {"tokens": tokens, "labels": labels, "lag": lag, "reachable": reachable}

    def solve(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """The letter after the first special token."""
        return np.full(len(tokens), tokens[tokens.argmin() + 1])
