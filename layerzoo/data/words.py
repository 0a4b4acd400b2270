"""Words to count: the most common ones, the most frequent ones."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torchmetrics import Metric

from layerzoo.data.random import bits, choose, shuffle
from layerzoo.data.task import IGNORE, SPLITS, Arrays, Task
from layerzoo.metrics import Accuracy, AccuracyBy, Answers, TokenLoss
from layerzoo.spec import require

ASK, ANSWER, NOISE = 0, 1, 2
"""The question, after which nothing is said of the context any more, and where its answer begins
(so that the last word before the question does not give it away); what stands between words."""
FIRST = 3
"""The first word."""


def guess_distinct(population: int, count: int) -> float:
    """The accuracy of guessing `count` distinct ones in turn, knowing those before."""
    return sum(1 / (population - n) for n in range(count)) / count


class _Words(Task):
    """Words in random order, `ASK ANSWER`, and some of the words. A subclass sets `counts`, how
    often each word is there, and says in which order the first `answers` of them are told."""

    counts: NDArray[np.int64]

    class Config(Task.Config):
        vocab_size: int = 64
        """The tokens from 3 on are words."""
        length: int = 128
        """A sample has T tokens."""
        answers: int
        """This many words are asked."""

        @property
        def words(self) -> int:
            """The words that there are."""
            return self.vocab_size - FIRST

        @property
        def context(self) -> int:
            """The tokens before the question."""
            return self.length - self.answers - 1

        def check(self) -> None:
            super().check()
            require(self.answers >= 1, f"answers: must be at least 1, got {self.answers}")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        config = self.config
        self.answers, self.words, self.context = config.answers, config.words, config.context

    @property
    def chance(self) -> float:
        """The accuracy of guessing a word not yet told."""
        return guess_distinct(self.words, self.answers)

    def metrics(self) -> list[Metric]:
        by_rank = AccuracyBy("rank", range(self.answers))
        return [TokenLoss(), Accuracy(self.chance), Answers(), by_rank]

    def question(self, sample: Arrays) -> NDArray[np.bool_]:
        return np.arange(self.length) >= self.context

    def _draw(
        self, split: str, index: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Which of the counted words stands where, `[B, context]`, the last number for noise; and
        the words' tokens, `[B, len(counts) + 1]`."""
        key = (self.seed, SPLITS.index(split), index[:, None])
        R = len(self.counts)
        words = FIRST + choose(self.words, R, bits(*key, 0, np.arange(R)))
        words = np.pad(words, ((0, 0), (0, 1)), constant_values=NOISE)
        noise = self.context - self.counts.sum()
        which = np.repeat(np.arange(R + 1), [*self.counts, noise])
        return which[shuffle(bits(*key, 1, np.arange(self.context)))], words

    def _ask(
        self, index: NDArray[np.int64], context: NDArray[np.int64], answers: NDArray[np.int64]
    ) -> Arrays:
        B, T = len(index), self.length
        ask = np.broadcast_to([ASK, ANSWER], (B, 2))
        labels = np.full((B, T), IGNORE)
        labels[:, self.context + 1 :] = answers
        rank = np.broadcast_to(np.arange(T) - self.context - 1, (B, T)).clip(0)
        tokens = np.concatenate([context, ask, answers[:, :-1]], axis=1)
        return {"tokens": tokens, "labels": labels, "rank": rank, "answer": index[:, None]}

    def _tell(self, tokens: NDArray[np.int64], answers: list[int]) -> NDArray[np.int64]:
        out = np.zeros_like(tokens)
        out[self.context + 1 :] = answers
        return out


class FrequentWords(_Words):
    """Frequent words: words in random order, `ASK ANSWER`, and then the most frequent ones, in
    this order.

    The word of rank r = 1, 2, .. stands there in proportion to r^-alpha, rounded down; but the
    first rank, and what is left, is noise, the same token in all samples. The labels: at
    `ANSWER` the first, at each answer the next one. Annotations: `rank` of the answer, from 0,
    and `answer`, see `Answers`. Chance is a guess among the words not yet told. RULER asks for
    three words, of several tokens each, with alpha = 2 (Hsieh et al. 2024, arXiv 2404.06654).
    """

    class Config(_Words.Config):
        length: int = 128
        """A sample has T tokens. Each word that is asked must occur more often than the next."""
        answers: int = 3
        alpha: float = 2.0
        """The larger alpha is, the fewer words there are, and the less alike in number."""

        @property
        def counts(self) -> NDArray[np.int64]:
            """How often the word of each rank stands there."""
            ranks = np.arange(1, self.words + 2, dtype=np.float64)
            # Integers, so that a rounding of the power cannot change a count elsewhere.
            share = np.rint(2.0**32 * ranks**-self.alpha).astype(np.int64)
            return (self.context * share // share.sum())[1:]

        def check(self) -> None:
            super().check()
            answers = self.answers
            require(0 < self.alpha <= 8, f"alpha: must be in (0, 8], got {self.alpha}")
            require(
                self.words > answers,
                f"vocab_size: {answers} answers need at least {answers + 1 + FIRST}, got "
                f"{self.vocab_size}",
            )
            differ = self.context > 0 and (np.diff(self.counts[: answers + 1]) < 0).all()
            require(
                differ,
                f"length: {self.length} is too short for the {answers} most frequent words to "
                "differ",
            )

    cases = (
        {"length": 128},
        {"vocab_size": 32, "length": 100, "answers": 2, "alpha": 1.5},
    )

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        counts = config.counts
        self.counts = counts[counts > 0]

    def sample(self, split: str, index: NDArray[np.int64]) -> Arrays:
        which, words = self._draw(split, index)
        context = np.take_along_axis(words, which, 1)
        return self._ask(index, context, words[:, : self.answers])

    def solve(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """The words by how often they stand there."""
        times = np.bincount(tokens[: self.context], minlength=self.vocab_size)
        times[NOISE] = 0
        order = np.argsort(-times, kind="stable")
        return self._tell(tokens, order[: self.answers].tolist())


class CommonWords(_Words):
    """Common words: words in random order, `ASK ANSWER`, and then those that stand there often, in
    the order in which they first appeared.

    Each of the common words stands there `times` times, all others `others` times (the last one
    possibly less). The labels: at `ANSWER` the first, at each answer the next one.
    Annotations: `rank` of the answer, from 0, and `answer`, see `Answers`. Chance is a guess among
    the words not yet told.

    Setting `ruler`: 10 common words, 30 times each, the others 3 times (Hsieh et al. 2024, arXiv
    2404.06654; there they may be told in any order).
    """

    class Config(_Words.Config):
        length: int = 128
        """A sample has T tokens. All words that fit into it must be different."""
        answers: int = 4
        """There are this many common words, and all are asked."""
        times: int = 8
        """Each common word stands there this often."""
        others: int = 2
        """Each other word stands there this often."""
        setting: str | None = None
        """This published setting sets answers, times and others, which are left out then."""

        settings: ClassVar = {"ruler": {"answers": 10, "times": 30, "others": 3}}

        @property
        def rest(self) -> int:
            """The tokens that are left for other words."""
            return self.context - self.answers * self.times

        def check(self) -> None:
            super().check()
            answers, times, others = self.answers, self.times, self.others
            below = 1 <= others < times
            require(below, f"others: must be in 1..{times - 1}, below times, got {others}")
            require(
                self.rest >= 0,
                f"length: {answers} words of {times} need at least {answers * (times + 1) + 1}, "
                f"got {self.length}",
            )
            different = answers + -(-self.rest // others)
            require(
                self.words >= different,
                f"vocab_size: {different} different words need at least {different + FIRST}, "
                f"got {self.vocab_size}",
            )

    cases = ({"length": 96}, {"vocab_size": 160, "length": 500, "setting": "ruler"})

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        config = self.config
        times, others, rest = config.times, config.others, config.rest
        left = [rest % others] if rest % others else []
        self.counts = np.array([times] * self.answers + [others] * (rest // others) + left)

    def sample(self, split: str, index: NDArray[np.int64]) -> Arrays:
        which, words = self._draw(split, index)
        first = np.stack([(which == n).argmax(1) for n in range(self.answers)], axis=1)
        order = np.take_along_axis(words, first.argsort(1), 1)
        return self._ask(index, np.take_along_axis(words, which, 1), order)

    def solve(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """The most common words, by their first places."""
        words, first, times = np.unique(
            tokens[: self.context], return_index=True, return_counts=True
        )
        common = np.argsort(-times, kind="stable")[: self.answers]
        return self._tell(tokens, words[common[first[common].argsort()]].tolist())
