"""The tasks of MAD without a file of their own: selective copying and memorization."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torchmetrics import Metric

from layerzoo.data.mad_recall import Ints, MadTask
from layerzoo.data.random import below, bits
from layerzoo.data.task import IGNORE, SPLITS, Arrays, Task
from layerzoo.metrics import Accuracy, TokenLoss
from layerzoo.spec import require


class SelectiveCopying(MadTask):
    """Selective copying: N tokens between blanks, then a copy token and N blanks, at which the
    tokens are to be written in order.

    Tokens are 0..V-3, drawn with replacement, V-2 is the blank and V-1 the copy token. Each of
    the T - 2N - 1 blanks among the tokens stands before a token drawn uniformly, so the last
    token is right before the copy token. Labels are on the last N positions. Annotation `lag` =
    query position - position of the token; a query is `reachable` if the token is, whose number
    then follows from the tokens after it (in the sinks, before it). Chance is a guess among the
    V-2 tokens. Source: Poli et al. 2024, arXiv 2403.17844; the defaults are its baseline's.
    """

    class Config(MadTask.Config):
        vocab_size: int = 16
        """V counts the blank and the copy token, too."""
        length: int = 256
        """A sample has T tokens."""
        copies: int = 16
        """N tokens are to be copied."""

        def check(self) -> None:
            super().check()
            require(self.vocab_size >= 4, f"vocab_size: must be at least 4, got {self.vocab_size}")
            require(self.copies >= 1, f"copies: must be at least 1, got {self.copies}")
            need = 2 * self.copies + 1
            require(
                self.length >= need,
                f"length: {self.copies} copies need at least {need}, got {self.length}",
            )

    cases = ({"vocab_size": 6, "length": 32, "copies": 8},)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.copies = config.copies

    @property
    def chance(self) -> float:
        """The accuracy of guessing a token."""
        return 1 / (self.vocab_size - 2)

    def sample(self, split: str, index: NDArray[np.int64]) -> Arrays:
        B, T, N = len(index), self.length, self.copies
        key = (self.seed, SPLITS.index(split), index[:, None])
        rows, nth = np.arange(B)[:, None], np.arange(N)
        content = below(self.vocab_size - 2, bits(*key, 0, nth))
        before = below(N, bits(*key, 1, np.arange(T - 2 * N - 1)))  # each blank's token
        blanks = np.bincount((rows * N + before).ravel(), minlength=B * N).reshape(B, N)
        place, query = nth + blanks.cumsum(1), T - N + nth
        tokens, labels = np.full((B, T), self.vocab_size - 2), np.full((B, T), IGNORE)
        tokens[rows, place], tokens[:, T - N - 1] = content, self.vocab_size - 1
        labels[:, query] = content
        lag, reachable = np.zeros((B, T), np.int64), np.zeros((B, T), bool)
        lag[:, query], reachable[:, query] = query - place, self.reachable(query, place)
        return {"tokens": tokens, "labels": labels, "lag": lag, "reachable": reachable}

    def solve(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """The tokens that are no blanks, in order, at the end."""
        answers = tokens.copy()
        answers[-self.copies :] = tokens[tokens < self.vocab_size - 2][: self.copies]
        return answers


class Memorization(Task):
    """Memorization: keys and, after each, the insert token, at which the key's value is to be
    told; it stands nowhere in the context, and must be learned.

    Of the tokens 0..V-2 the first half are keys and the second half values; V-1 is the insert
    token. Each key has a value of its own by a table that only the seed decides, the same in all
    samples and splits. Labels are on the insert tokens. Chance is a guess among the values.
    Since no answer is in the context, there is none to shuffle: the control is the facts of
    another seed, which a trained model must answer by chance.
    Source: Poli et al. 2024, arXiv 2403.17844; the defaults are its baseline's.
    """

    class Config(Task.Config):
        vocab_size: int = 256
        """V counts the insert token, too."""
        length: int = 32
        """A sample has T tokens, an even number."""
        batch_size: int = 128
        train_samples: int = 256
        test_samples: int = 1_280

        def check(self) -> None:
            super().check()
            require(self.vocab_size >= 5, f"vocab_size: must be at least 5, got {self.vocab_size}")
            require(
                self.length >= 2 and self.length % 2 == 0,
                f"length: must be even and positive, got {self.length}",
            )

    cases = ({"vocab_size": 18, "length": 16},)
    in_context: ClassVar[bool] = False

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.keys = (self.vocab_size - 1) // 2
        self.values = self.vocab_size - 1 - self.keys

    @property
    def chance(self) -> float:
        """The accuracy of guessing a value."""
        return 1 / self.values

    def metrics(self) -> list[Metric]:
        return [TokenLoss(), Accuracy(self.chance)]

    def facts(self) -> Ints:
        """The value of each key."""
        order = np.argsort(bits(self.seed, len(SPLITS) + 1, np.arange(self.values)))
        return self.keys + order[: self.keys]

    def sample(self, split: str, index: NDArray[np.int64]) -> Arrays:
        key = (self.seed, SPLITS.index(split), index[:, None])
        keys = below(self.keys, bits(*key, 0, np.arange(self.length // 2)))
        tokens = np.full((len(index), self.length), self.vocab_size - 1)
        labels = np.full_like(tokens, IGNORE)
        tokens[:, ::2], labels[:, 1::2] = keys, self.facts()[keys]
        return {"tokens": tokens, "labels": labels}

    def question(self, sample: Arrays) -> NDArray[np.bool_]:
        """All of it."""
        return np.ones(sample["tokens"].shape, bool)

    def solve(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """The value after the key in training; of a key that is not there any value."""
        train = self.sample("train", np.arange(self.samples["train"]))
        table = np.full(self.vocab_size, self.keys)
        table[train["tokens"][:, ::2]] = train["labels"][:, 1::2]
        return table[np.roll(tokens, 1)]
