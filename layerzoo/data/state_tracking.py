"""State tracking: the product of all group elements so far."""

from __future__ import annotations

import itertools
from functools import cache
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from torchmetrics import Metric

from layerzoo.data.random import below, bits
from layerzoo.data.task import SPLITS, Arrays, Task
from layerzoo.metrics import Accuracy, AccuracyBy, TokenLoss
from layerzoo.metrics.binned import octaves
from layerzoo.spec import require

Permutation = tuple[int, ...]


def symmetric(n: int) -> list[Permutation]:
    """All permutations of n points; the first is the identity."""
    return [*itertools.permutations(range(n))]


def cyclic(n: int) -> list[Permutation]:
    """The rotations of n points: the k-th takes i to i + k mod n."""
    return [tuple((i + k) % n for i in range(n)) for k in range(n)]


def even(permutation: Permutation) -> bool:
    inversions = sum(a > b for a, b in itertools.combinations(permutation, 2))
    return inversions % 2 == 0


def moved(permutation: Permutation) -> int:
    return sum(i != image for i, image in enumerate(permutation))


GROUPS = {
    "Z2": lambda: cyclic(2),
    "Z60": lambda: cyclic(60),
    "S3": lambda: symmetric(3),
    "A5": lambda: [*filter(even, symmetric(5))],
    "S5": lambda: symmetric(5),
}


@cache
def elements(group: str) -> list[Permutation]:
    """The permutations that the tokens 0, 1, .. of a group stand for; 0 is the identity."""
    return GROUPS[group]()


@cache
def multiplication(group: str) -> NDArray[np.int64]:
    """`[|G|, |G|]`: at a, b stands the product a b, which is first a, then b."""
    number = {element: n for n, element in enumerate(elements(group))}
    products = [[number[tuple(b[i] for i in a)] for b in elements(group)] for a in elements(group)]
    return np.array(products)


class StateTracking(Task):
    """State tracking, the word problem of a finite group: tokens are its elements, and the label
    at every position is the product of all tokens so far.

    y_1 = x_1,   y_t = y_{t-1} x_t

    The new token stands on the right. Elements are permutations, and a b is first a, then b, so
    that the tokens are moves in the order in which they are made. Z2 is parity. The groups Z60
    (abelian), S3 (solvable), A5 and S5 (not solvable) differ in how hard a product is to compute
    in parallel. Tokens are uniform, and so is every product, whatever all its tokens but one are:
    chance is 1 / |G| (the first label is its token, which a look-up answers). The annotation
    `position` counts from 1.

    Source: Merrill et al. 2024, arXiv 2404.08819; the swaps, and lengths of 40 for training and
    256 for testing (of parity), are of Grazzi et al. 2024, arXiv 2411.12537. Deviations: that
    paper's parity varies the length and is scored at the end of the row alone; here the length
    is fixed and every prefix is scored.
    """

    class Config(Task.Config):
        group: Literal["Z2", "Z60", "S3", "A5", "S5"] = "S5"
        """The tokens are the elements of this group."""
        length: int = 40
        """A sample has T tokens."""
        tokens: Literal["all", "swaps"] = "all"
        """Tokens are drawn from all elements, or from the swaps, which move at most two points
        (the identity is one). After a few swaps not every product can have been reached, so that
        a guess is better than chance at the first positions."""

        @property
        def drawn(self) -> list[int]:
            """The elements that are tokens."""
            found = enumerate(elements(self.group))
            return [n for n, element in found if self.tokens == "all" or moved(element) <= 2]

        def check(self) -> None:
            super().check()
            require(self.length >= 1, f"length: must be at least 1, got {self.length}")
            require(
                len(self.drawn) > 1,
                f"tokens: {self.group} has no swaps; take all, or one of Z2, S3, S5",
            )

    cases: ClassVar = tuple({"group": group} for group in GROUPS)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.group = config.group
        self.vocab_size, self.drawn = len(elements(self.group)), np.array(config.drawn)

    @property
    def chance(self) -> float:
        """The accuracy of guessing an element."""
        return 1 / self.vocab_size

    def metrics(self) -> list[Metric]:
        by_position = AccuracyBy("position", octaves(self.length))
        return [TokenLoss(), Accuracy(self.chance), by_position]

    def question(self, sample: Arrays) -> NDArray[np.bool_]:
        """Nothing: all is context."""
        return np.zeros(sample["tokens"].shape, bool)

    def sample(self, split: str, index: NDArray[np.int64]) -> Arrays:
        position = np.arange(self.length)
        random = bits(self.seed, SPLITS.index(split), index[:, None], position)
        tokens = self.drawn[below(len(self.drawn), random)]
        return {
            "tokens": tokens,
            "labels": products(self.group, tokens),
            "position": np.broadcast_to(1 + position, tokens.shape).copy(),
        }

    def solve(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """Make all moves so far, one after another."""
        points = np.arange(len(elements(self.group)[0]))
        number = {element: n for n, element in enumerate(elements(self.group))}
        answers = []
        for token in tokens:
            points = np.array(elements(self.group)[token])[points]
            answers.append(number[tuple(points.tolist())])
        return np.array(answers)


def products(group: str, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of all prefixes: `[B, T]` -> `[B, T]`."""
    table, out = multiplication(group), tokens.copy()
    for t in range(1, tokens.shape[1]):
        out[:, t] = table[out[:, t - 1], tokens[:, t]]
    return out
