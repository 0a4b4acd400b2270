"""The recall tasks of MAD: in-context, noisy and fuzzy recall."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from layerzoo.data.random import below, bits
from layerzoo.data.recall import RecallTask
from layerzoo.data.task import IGNORE, SPLITS, Arrays
from layerzoo.spec import require

Ints = NDArray[np.int64]


class MadTask(RecallTask):
    """A recall task with the batches and splits of MAD's baseline (Poli et al. 2024, arXiv
    2403.17844)."""

    class Config(RecallTask.Config):
        batch_size: int = 128
        train_samples: int = 12_800
        test_samples: int = 1_280


class InContextRecall(MadTask):
    """In-context recall: k1 v1 k2 v2 .., keys drawn with replacement, to be answered when they
    come again.

    Keys are 0..V/2-1 and values V/2..V-1. Every key has one value in each sample, drawn with
    replacement: keys may share it. The label, its value, is on a key that stood earlier in the
    sample, and on no other; the last key did. Annotation `lag` = query position - the nearest
    earlier position of its value; a query is `reachable` if that key and value are, or the first
    ones. Chance is a guess among the values.

    Source: Poli et al. 2024, arXiv 2403.17844, and its code (mad-lab); the defaults are its
    baseline's. There training is scored at every token; here at the labels alone, which are all
    that can be predicted. There the row lacks its last value, and the last key is drawn from the
    distinct keys seen; here from all earlier pairs.
    """

    class Config(MadTask.Config):
        vocab_size: int = 16
        """The first half of the V tokens are keys, and the second half values."""
        length: int = 128
        """A sample has T tokens, an even number."""

        @property
        def free(self) -> int:
            """The tokens that are keys or values."""
            return self.vocab_size

        def check(self) -> None:
            super().check()
            need = 4 + self.vocab_size - self.free
            enough = self.free >= 4
            require(enough, f"vocab_size: must be at least {need}, got {self.vocab_size}")
            self.check_length()

        def check_length(self) -> None:
            require(self.length % 2 == 0, f"length: must be even, got {self.length}")
            require(self.length >= 4, f"length: must be at least 4, got {self.length}")

    cases: ClassVar[tuple[dict[str, Any], ...]] = ({"vocab_size": 8, "length": 32},)

    motif = 1
    """The most tokens of a key, and of a value."""
    noise, noise_tokens = 0.0, 0

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.keys, self.values = config.free // 2, config.free - config.free // 2

    @property
    def chance(self) -> float:
        """The accuracy of guessing a value."""
        return 1 / self.values

    def sample(self, split: str, index: NDArray[np.int64]) -> Arrays:
        B, T, M = len(index), self.length, self.motif
        shortest = 1 if split == "train" else M  # of the keys
        N = (T - 2 * M) // (shortest + 1)  # the most pairs that leave room for the last one
        key = (self.seed, SPLITS.index(split), index[:, None])
        each = (*key[:2], index[:, None, None])
        pair, token = np.arange(N), np.arange(M)

        k_size = shortest + below(M - shortest + 1, bits(*key, 0, pair))
        k = below(self.keys, bits(*each, 1, pair[:, None], token))
        digits = np.where(token < k_size[..., None], k + 1, 0)
        name = digits @ (self.keys + 1) ** token  # equal for equal keys, whose values are, too
        v_size = 1 + below(M, bits(*key, 2, name))
        v = self.keys + below(self.values, bits(*each, 3, name[..., None], token))
        fits = (k_size + v_size).cumsum(1) <= T - 2 * M
        last = below(fits.sum(1, keepdims=True), bits(*key, 4))  # the pair that comes again
        # Integers, so that a rounding of the share cannot change a draw elsewhere.
        noise = below(2**32, bits(*key, 5, pair)) < round(self.noise * 2**32)
        noise &= pair != last

        order = np.concatenate([np.broadcast_to(pair, (B, N)), last], 1)
        k_size, v_size, name = (np.take_along_axis(x, order, 1) for x in (k_size, v_size, name))
        noise, fits = (np.take_along_axis(x, order, 1) for x in (noise, fits))
        kv = np.take_along_axis(np.concatenate([k, v], 2), order[..., None], 1)
        if self.noise_tokens:
            other = bits(*each, 6, np.arange(N + 1)[:, None], np.arange(2 * M))
            first = self.keys + self.values
            kv = np.where(noise[..., None], first + below(self.noise_tokens, other), kv)
        return self._row(fits & ~noise, name, k_size * fits, v_size * fits, kv)

    def _row(self, known: NDArray[np.bool_], name: Ints, k: Ints, v: Ints, kv: Ints) -> Arrays:
        """Rows of the pairs `kv`, of k and v tokens, behind padding; the `known` ones of equal
        name are asked, but for the first."""
        B, T, M, N = len(kv), self.length, self.motif, kv.shape[1]
        token, start = np.arange(M), (k + v).cumsum(1) - k - v
        used = np.concatenate([token < k[..., None], token < v[..., None]], 2)
        begin = T - (k + v).sum(1, keepdims=True)
        inside = np.arange(T) >= begin
        tokens, slot = np.full((B, T), self.vocab_size - 1), np.zeros((B, T), np.int64)
        tokens[inside] = kv[used]
        slot[inside] = np.broadcast_to(np.arange(N)[:, None], used.shape)[used]

        first, previous = occurrences(np.where(known, name, -1 - np.arange(N)))

        def since(earlier: Ints) -> Ints:
            """How many tokens ago the earlier pair stood, at each token but the first."""
            gap = start - np.take_along_axis(start, earlier, 1)
            return np.take_along_axis(gap, slot[:, 1:], 1)

        gap, whole, value = since(previous), since(first), np.arange(1, T)
        pair = begin + np.take_along_axis(start, slot[:, 1:], 1)  # where the pair begins
        asked = (gap > 0) & (tokens[:, 1:] >= self.keys)
        reachable = self.reachable(value - 1, pair - gap, value - gap)
        reachable |= self.reachable(value - 1, pair - whole, value - whole)
        labels, lag = np.full((B, T), IGNORE), np.zeros((B, T), np.int64)
        labels[:, :-1] = np.where(asked, tokens[:, 1:], IGNORE)
        lag[:, :-1] = np.where(asked, gap - 1, 0)
        where = np.zeros((B, T), bool)
        where[:, :-1] = asked & reachable
        return {"tokens": tokens, "labels": labels, "lag": lag, "reachable": where}

    def question(self, sample: Arrays) -> NDArray[np.bool_]:
        """The keys that are asked. (A value's first tokens, though labelled, tell of the next
        time that it is asked.)"""
        keys = sample["tokens"] < self.keys
        question = keys & (sample["labels"] != IGNORE)
        for _ in range(self.motif - 1):
            question[:, :-1] |= keys[:, :-1] & question[:, 1:]
        return question

    def solve(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """The next token of what followed the key before; else any value."""
        answers = np.full(len(tokens), self.keys)
        book: dict[tuple[int, ...], tuple[int, ...]] = {}
        key = value = ()
        for t, token in enumerate(tokens.tolist()):
            is_value = self.keys <= token < self.keys + self.values
            if value and not is_value:  # the pair is over
                book[key], key, value = value, (), ()
            if is_value:
                value += (token,)
            else:
                key = (*key, token) if token < self.keys else ()
            known = book.get(key, ())
            if len(value) < len(known):
                answers[t] = known[len(value)]
        return answers


class NoisyRecall(InContextRecall):
    """In-context recall with noise: some pairs are of two noise tokens, and bind nothing.

    The last `noise_tokens` tokens of the vocabulary are noise; of the others the first half are
    keys and the second half values. Each pair but the last, and but the one that the last
    repeats, is noise with probability `noise`. Otherwise as `InContextRecall`.
    """

    class Config(InContextRecall.Config):
        vocab_size: int = 32
        """V counts the noise tokens, too."""
        noise_tokens: int = 16
        """The last tokens of the vocabulary, as many as this, are noise."""
        noise: float = 0.2
        """A pair is noise with this probability, except the last one and the one that it
        repeats."""

        @property
        def free(self) -> int:
            return self.vocab_size - self.noise_tokens

        def check(self) -> None:
            least = self.noise_tokens >= 1
            require(least, f"noise_tokens: must be at least 1, got {self.noise_tokens}")
            super().check()
            require(0 <= self.noise <= 1, f"noise: must be in [0, 1], got {self.noise}")

    cases = ({"vocab_size": 12, "length": 32, "noise_tokens": 4},)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.noise_tokens, self.noise = config.noise_tokens, config.noise


class FuzzyRecall(InContextRecall):
    """In-context recall of motifs: a key and a value are of 1 to `motif` tokens each.

    Rows are padded at the left with V-1; of the other tokens the first half are keys and the
    second half values. A key's label is on its last token, and the labels of its value's further
    tokens are on the value; `lag` and `reachable` are of that token of the value, and of the
    key's first. In val and test all keys are of `motif` tokens. Few of those come again by
    chance, so there the last key makes up most of the labels. Otherwise as `InContextRecall`.
    There the tokens of a motif are distinct; here not, so that chance is the same for all.
    """

    class Config(InContextRecall.Config):
        vocab_size: int = 16
        """V counts the padding, too."""
        length: int = 128
        """A sample has T tokens."""
        motif: int = 3
        """A key has at most this many tokens, and so has a value."""

        @property
        def free(self) -> int:
            return self.vocab_size - 1

        def check(self) -> None:
            super().check()
            require(
                (self.free // 2 + 1) ** self.motif < 2**63,  # the keys' names are integers
                f"motif: {self.motif} tokens of {self.free // 2} make too many keys; take a "
                "smaller motif",
            )

        def check_length(self) -> None:
            require(self.motif >= 1, f"motif: must be at least 1, got {self.motif}")
            need = 4 * self.motif
            require(self.length >= need, f"length: must be at least {need}, got {self.length}")

    cases = (
        {"vocab_size": 9, "length": 64},
        {"vocab_size": 8, "length": 41, "motif": 2},
    )

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.motif = config.motif


def occurrences(names: Ints) -> tuple[Ints, Ints]:
    """For each entry of a row `[B, N]`: where its name stands first, and where last before it,
    which for the first is itself."""
    n = np.arange(names.shape[1])
    order = np.argsort(names, 1, kind="stable")
    ranked = np.take_along_axis(names, order, 1)
    same = np.pad(ranked[:, 1:] == ranked[:, :-1], ((0, 0), (1, 0)))
    heads = np.maximum.accumulate(np.where(same, 0, n), 1)
    first, previous = np.empty_like(order), np.empty_like(order)
    np.put_along_axis(first, order, np.take_along_axis(order, heads, 1), 1)
    np.put_along_axis(previous, order, np.take_along_axis(order, n - same, 1), 1)
    return first, previous
