"""Variable tracking: which names hold a value, through chains of assignments."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torchmetrics import Metric

from layerzoo.data.random import below, bits, choose
from layerzoo.data.recall import RecallTask
from layerzoo.data.task import IGNORE, SPLITS, Arrays
from layerzoo.data.words import guess_distinct
from layerzoo.metrics import AccuracyBy, Answers
from layerzoo.spec import require

ASK, SET = 0, 1
"""The question; `name SET source`, an assignment."""


class VariableTracking(RecallTask):
    """Variable tracking: assignments `x1 SET value`, `x2 SET x1`, `x3 SET x2`, .. hidden in
    random words; then `ASK value`, and all the names that hold this value are the answer, in the
    order in which they got it.

    There are several chains of assignments, each in its order, mixed with one another; names and
    values are distinct. The labels: at the asked value the first name of its chain, at each name
    the next one. Annotations: `lag`, from there back to where that name is set; `hop`, how many
    names the value has been through by then; `answer`, see `Answers`. Reachable is a name if the
    whole assignment is: given the names before it, it is one step. Chance is a guess among the
    names not yet told.

    Source: Hsieh et al. 2024, arXiv 2404.06654 (RULER), with one chain of 4 hops, and more for
    harder tasks; there the noise is a phrase that repeats, and values are numbers.
    """

    class Config(RecallTask.Config):
        vocab_size: int = 64
        """The vocabulary has names, values, two signs, and at least one word."""
        length: int = 128
        """A sample has T tokens."""
        chains: int = 1
        """A sample has this many chains, and one is asked."""
        hops: int = 4
        """A chain has this many assignments after the first."""
        names: int = 24
        """Names are drawn from this many."""
        values: int = 16
        """Values are drawn from this many."""

        @property
        def links(self) -> int:
            """The assignments of a chain."""
            return self.hops + 1

        @property
        def words(self) -> int:
            return self.vocab_size - 2 - self.values - self.names

        def check(self) -> None:
            super().check()
            for name, least in (("chains", 1), ("hops", 0)):
                number = getattr(self, name)
                require(number >= least, f"{name}: must be at least {least}, got {number}")
            chains, links, names, values = self.chains, self.links, self.names, self.values
            require(values >= chains, f"values: {chains} chains need as many values, got {values}")
            require(
                names >= chains * links,
                f"names: {chains} chains of {links} need {chains * links} names, got {names}",
            )
            require(
                self.words >= 1,
                f"vocab_size: must be over {2 + values + names} with {names} names and {values} "
                f"values, got {self.vocab_size}",
            )
            least = (3 * chains + 1) * links + 1
            require(
                self.length >= least,
                f"length: {chains} chains of {links} need at least {least}, got {self.length}",
            )

    cases = (
        {"length": 64},
        {"length": 64, "chains": 3, "hops": 2},
    )

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.names, self.values, self.words = config.names, config.values, config.words
        self.chains, self.links = config.chains, config.links
        self.context = self.length - 1 - self.links

    @property
    def chance(self) -> float:
        """The accuracy of guessing a name not yet told."""
        return guess_distinct(self.names, self.links)

    def metrics(self) -> list[Metric]:
        by_hop = AccuracyBy("hop", range(self.links), "recall_hop")
        return [*super().metrics(), Answers(), by_hop]

    def question(self, sample: Arrays) -> NDArray[np.bool_]:
        return np.arange(self.length) >= self.context

    def sample(self, split: str, index: NDArray[np.int64]) -> Arrays:
        B, T, C, N, L = len(index), self.length, self.context, self.chains, self.links
        key = (self.seed, SPLITS.index(split), index[:, None])
        values = 2 + choose(self.values, N, bits(*key, 0, np.arange(N)))
        names = 2 + self.values + choose(self.names, N * L, bits(*key, 1, np.arange(N * L)))
        names = names.reshape(B, N, L)
        sources = np.concatenate([values[:, :, None], names[:, :, :-1]], axis=-1)
        # Of words and assignments in a row, the items that are assignments; all ways are alike.
        item = choose(C - 2 * N * L, N * L, bits(*key, 2, np.arange(N * L)))
        start = item + 2 * item.argsort(1).argsort(1)
        start = np.sort(start.reshape(B, N, L), axis=-1)

        tokens = 2 + self.values + self.names + below(self.words, bits(*key, 3, np.arange(T)))
        lines = np.stack([names, np.full_like(names, SET), sources], axis=-1)
        at = start[..., None] + np.arange(3)
        np.put_along_axis(tokens, at.reshape(B, -1), lines.reshape(B, -1), 1)
        tokens[:, C], tokens[:, C + 1] = ASK, values[:, 0]
        tokens[:, C + 2 :] = names[:, 0, :-1]

        where, stands = np.arange(C + 1, T), start[:, 0]
        labels, lag = np.full((B, T), IGNORE), np.zeros((B, T), np.int64)
        labels[:, where], lag[:, where] = names[:, 0], where - stands
        reachable = np.zeros((B, T), bool)
        reachable[:, where] = self.reachable(where, stands, stands + 2)
        hop = np.broadcast_to(np.arange(T) - C - 1, (B, T)).clip(0)
        return {
            "tokens": tokens,
            "labels": labels,
            "lag": lag,
            "reachable": reachable,
            "hop": hop,
            "answer": index[:, None],
        }

    def solve(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """The name that is set to the token; of an unknown one a name not yet told."""
        sets = np.flatnonzero(tokens[: self.context] == SET)
        holder = dict(zip(tokens[sets + 1], tokens[sets - 1], strict=True))
        first, told, out = 2 + self.values, set(), np.zeros_like(tokens)
        for at in range(self.context + 1, self.length):
            told.add(tokens[at])
            guess = next(n for n in range(first, self.vocab_size) if n not in told)
            out[at] = holder.get(tokens[at], guess)
        return out
