"""Needles in a haystack: passkey, number, key-value pairs, and those of RULER."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from torchmetrics import Metric

from layerzoo.data.random import below, bits, choose
from layerzoo.data.recall import RecallTask
from layerzoo.data.task import IGNORE, SPLITS, Arrays
from layerzoo.metrics import AccuracyBy, Answers
from layerzoo.spec import plain, require

ASK = 0
"""The token before each key that is asked."""
BASE = 10
"""There are as many digits, the tokens 1..BASE; keys follow, and then the filler's words."""


class Needle(RecallTask):
    """Needle in a haystack: `key d1 .. dn`, a key and the digits of its value, hidden in filler;
    then the question, `ASK key d1 .. dn` for each key asked, with the last digit of all left out.

    Keys are distinct. Digits are uniform and independent, and neither they nor keys stand
    anywhere else. A key's values, if it has several, are asked in the order of their places. The
    labels are the digits of the answers: at the asked key the first, at each digit the next one,
    so that each is predicted given the true ones before it. Annotations: `lag`, from there back
    to where that digit stands; `depth`, at how many percent of the context its needle stands, 0
    is the beginning; `answer`, the number of the answer, for `recall/answers`. Reachable is a
    digit if it and the token before it are: a model that looks for what followed the current
    token needs no more. Chance is a guess among the digits, or, if digits repeat, of the digit
    before.

    Settings, with words for tokens and so without sentences around the needles:
    `passkey`, 5 digits in a phrase that repeats (Mohtashami & Jaggi 2023, arXiv 2305.16300);
    `number`, 10 digits, five of which repeat the one before: five are drawn, and five times one
    of them is doubled (retrieve.number of InfiniteBench, Zhang et al. 2024, arXiv 2402.13718, and
    its code);
    `key-value`, nothing but pairs, as many as fit; one is asked (Liu et al. 2023, arXiv
    2307.03172; there 75 to 300 pairs of UUIDs in JSON, whose punctuation is left out here);
    `niah_single`, `niah_multikey`, `niah_multivalue`, `niah_multiquery`, 7 digits, in a phrase
    that repeats if single, else in random words for RULER's essays (Hsieh et al. 2024, arXiv
    2404.06654; its numbers do not begin with 0).
    """

    class Config(RecallTask.Config):
        vocab_size: int = 64
        """The vocabulary has the question, ten digits, the keys, and at least one word."""
        length: int = 128
        """A sample has T tokens, with room for the needles and the question."""
        needles: int | None = 1
        """This many needles are hidden; with null, as many as fit."""
        queries: int = 1
        """This many keys are asked."""
        values: int = 1
        """Each key has this many needles, and all their values must be told."""
        digits: int = 5
        """A value has this many tokens."""
        repeats: int = 0
        """This many digits of a value repeat the digit before."""
        filler: Literal["random", "repeat"] = "random"
        """The needles are hidden in random words, or in a phrase of all words that repeats."""
        depth: int | Sequence[int] | None = None
        """The asked needle stands at this percentage of the context, and with null anywhere.
        Each sample takes the next depth of a list, so that all depths are equally frequent. The
        needle keeps clear of other needles, by up to half its length."""
        keys: int = 32
        """Keys are drawn from this many."""
        setting: str | None = None
        """This published setting sets needles, queries, values, digits, repeats and filler, which
        are left out then (key-value leaves digits open)."""

        settings: ClassVar = {
            name: {"needles": 1, "queries": 1, "values": 1, "repeats": 0, **options}
            for name, options in {
                "passkey": {"digits": 5, "filler": "repeat"},
                "number": {"digits": 10, "repeats": 5, "filler": "repeat"},
                "key-value": {"needles": None},
                "niah_single": {"digits": 7, "filler": "repeat"},
                "niah_multikey": {"needles": 4, "digits": 7, "filler": "random"},
                "niah_multivalue": {"needles": 4, "values": 4, "digits": 7, "filler": "random"},
                "niah_multiquery": {"needles": 4, "queries": 4, "digits": 7, "filler": "random"},
            }.items()
        }

        @property
        def size(self) -> int:
            """The tokens of a needle."""
            return 1 + self.digits

        @property
        def context(self) -> int:
            """The tokens before the question."""
            return self.length - self.queries * (2 + self.values * self.digits) + 1

        @property
        def fit(self) -> int:
            """The most needles that the context has room for."""
            return max(0, self.context // self.size // self.values * self.values)

        @property
        def hidden(self) -> int:
            """The needles that are hidden."""
            return self.fit if self.needles is None else self.needles

        @property
        def words(self) -> int:
            return self.vocab_size - 1 - BASE - self.keys

        @property
        def depths(self) -> Sequence[int] | None:
            return (self.depth,) if isinstance(self.depth, int) else self.depth

        def check(self) -> None:
            super().check()
            queries, values, digits = self.queries, self.values, self.digits
            for name in ("queries", "values", "digits"):
                number = getattr(self, name)
                require(number >= 1, f"{name}: must be at least 1, got {number}")
            possible = 0 <= self.repeats < digits
            require(possible, f"repeats: must be in 0..{digits - 1}, got {self.repeats}")
            needles = self.hidden
            least = max(needles, queries * values)
            require(
                least <= self.fit,
                f"length: {least} needles of {self.size} tokens and "
                f"{self.length - self.context} of question do not fit into {self.length}",
            )
            require(
                needles >= 1 and needles % values == 0,
                f"needles: must be a positive multiple of the {values} values of a key, got "
                f"{needles}",
            )
            hidden = needles // values
            require(
                queries <= hidden,
                f"queries: must be at most the {hidden} keys hidden, got {queries}",
            )
            require(
                self.keys >= hidden,
                f"keys: {hidden} different ones are hidden, but there are {self.keys}; set keys "
                "and vocab_size higher",
            )
            over = f"must be over {1 + BASE + self.keys} with {self.keys} keys"
            require(self.words >= 1, f"vocab_size: {over}")
            if self.depths is not None:
                inside = self.depths and all(0 <= d <= 100 for d in self.depths)
                require(inside, f"depth: must be percentages in 0..100, got {plain(self.depth)}")
                require(
                    queries == values == 1,
                    "depth: is of the one needle asked; leave it out with several queries or "
                    "values",
                )

    cases = (
        {"setting": "passkey", "length": 64, "depth": [0, 25, 50, 75, 100]},
        {"setting": "number", "length": 64},
        {"setting": "key-value", "length": 64, "digits": 3},
        {"setting": "niah_multikey", "length": 80, "depth": [20, 95]},
        {"setting": "niah_multivalue", "length": 160},
        {"setting": "niah_multiquery", "length": 96},
        {"length": 48, "needles": 6, "queries": 2, "values": 2, "digits": 1},
    )

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        config = self.config
        self.words = config.words
        self.needles, self.queries, self.values = config.hidden, config.queries, config.values
        self.digits, self.repeats, self.size = config.digits, config.repeats, config.size
        self.context, self.depth = config.context, config.depths

    @property
    def chance(self) -> float:
        """The accuracy of guessing a digit: the one before, where there is one. It is best even
        knowing how many have repeated so far, as any other is no likelier."""
        return (self.repeats + (self.digits - self.repeats) / BASE) / self.digits

    def metrics(self) -> list[Metric]:
        edges = sorted({*self.depth}) if self.depth else range(0, 100, 10)
        return [*super().metrics(), Answers(), AccuracyBy("depth", [*edges], "recall_depth")]

    def question(self, sample: Arrays) -> NDArray[np.bool_]:
        return np.arange(self.length) >= self.context

    def sample(self, split: str, index: NDArray[np.int64]) -> Arrays:
        B, T, C, V, N = len(index), self.length, self.context, self.values, self.needles
        Q, D, K = self.queries, self.digits, N // V
        key = (self.seed, SPLITS.index(split), index[:, None])
        keys = 1 + BASE + choose(self.config.keys, K, bits(*key, 0, np.arange(K)))
        values = 1 + self._values(key)
        # A key's values in the order of their places: [B, K, V].
        start = np.sort(self._starts(key, index).reshape(B, K, V), axis=-1)

        word = np.arange(T) if self.config.filler == "repeat" else bits(*key, 3, np.arange(T))
        word = (word % np.array(self.words, word.dtype)).astype(np.int64)
        tokens = np.broadcast_to(1 + BASE + self.config.keys + word, (B, T)).copy()
        named = np.broadcast_to(keys[:, :, None, None], (B, K, V, 1))
        at = start[..., None] + np.arange(self.size)
        needles = np.concatenate([named, values], axis=-1)
        np.put_along_axis(tokens, at.reshape(B, -1), needles.reshape(B, -1), 1)

        answers = values[:, :Q].reshape(B, Q, V * D)
        asked = np.concatenate([np.full((B, Q, 1), ASK), keys[:, :Q, None], answers], axis=-1)
        tokens[:, C:] = asked.reshape(B, -1)[:, :-1]
        # The labelled positions, and where the digit of each stands.
        where = (C + np.arange(Q)[:, None] * (2 + V * D) + 1 + np.arange(V * D)).ravel()
        digit = at[:, :Q, :, 1:].reshape(B, Q * V * D)
        if self.depth is None:
            depth = 100 * start[:, :Q] // max(1, C - self.size)
        else:
            depth = self._percent(index)[:, None]
        return {
            "tokens": tokens,
            **{
                name: self._scatter(where, values, blank)
                for name, values, blank in (
                    ("labels", answers.reshape(B, -1), IGNORE),
                    ("lag", where - digit, 0),
                    ("reachable", self.reachable(where, digit - 1, digit), False),
                    ("depth", np.repeat(depth.reshape(B, -1), D, axis=1), 0),
                    ("answer", np.repeat(index[:, None] * Q + np.arange(Q), V * D, axis=1), 0),
                )
            },
        }

    def _scatter(self, where: NDArray[Any], values: NDArray[Any], blank: Any) -> NDArray[Any]:
        """A row `[B, T]` with values at these positions, and blank elsewhere."""
        row = np.full((len(values), self.length), blank, values.dtype)
        row[:, where] = values
        return row

    def _values(self, key: tuple[Any, ...]) -> NDArray[np.int64]:
        """Digits 0..BASE-1: `[B, keys hidden, values, digits]`."""
        N, D, fresh = self.needles, self.digits, self.digits - self.repeats
        drawn = below(BASE, bits(*key, 1, np.arange(N * fresh))).reshape(-1, N, fresh)
        if self.repeats:
            # Doubling any digit of those that stand there, five times, makes each way to cut ten
            # digits into five runs as likely as any other (a Polya urn): draw where they are cut.
            order = bits(*key, 4, np.arange(N * (D - 1))).reshape(-1, N, D - 1)
            rank = order.argsort(-1, kind="stable").argsort(-1)
            run = np.pad((rank >= self.repeats).cumsum(-1), ((0, 0), (0, 0), (1, 0)))
            drawn = np.take_along_axis(drawn, run, -1)
        return drawn.reshape(-1, N // self.values, self.values, D)

    def _percent(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        assert self.depth is not None
        return np.array(self.depth)[index % len(self.depth)]

    def _starts(self, key: tuple[Any, ...], index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the needles start, `[B, needles]`: all ways to place them are equally likely; or
        the first one stands at its depth."""
        n, fixed = self.size, self.depth is not None
        others = self.needles - fixed
        filler = self.context - self.needles * n
        # Of filler and needles in a row, the items that are needles.
        item = choose(filler + others, others, bits(*key, 2, np.arange(others)))
        start = item + (n - 1) * item.argsort(1).argsort(1)
        if not fixed:
            return start
        last = self.context - n
        first = (self._percent(index) * last + 50)[:, None] // 100
        before = start + n // 2 <= first
        low = np.where(before, start + n, 0).max(1, keepdims=True, initial=0)
        high = np.where(before, last, start).min(1, keepdims=True, initial=last)
        return np.concatenate([first.clip(low, high), np.where(before, start, start + n)], axis=1)

    def solve(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """The digits after each place of the asked key; of what is not there, or goes on
        otherwise, the digit before once more."""
        out = np.clip(tokens, 1, BASE)
        for at in np.flatnonzero(tokens[self.context :] == ASK) + self.context + 1:
            places = np.flatnonzero(tokens[: self.context] == tokens[at])
            found = np.array([tokens[p + 1 : p + self.size] for p in places], int).ravel()
            for n, digit in enumerate(found[: self.length - at]):
                if (tokens[at + 1 : at + 1 + n] != found[:n]).any():
                    break
                out[at + n] = digit
        return out
