"""Real text in which some samples end in a question about what stands far back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field, replace
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from torchmetrics import Metric

from layerzoo.data.questions import DRAWS, KINDS
from layerzoo.data.random import below, bits
from layerzoo.data.retrieval import longest, plant
from layerzoo.data.task import IGNORE, SPLITS
from layerzoo.data.text import Text
from layerzoo.metrics import LossByPosition, MarkedAnswers, TokenLoss
from layerzoo.spec import error_at, require, suggest

GRAIN = 10**6
"""Depths and the share of questions are drawn in such parts, as integers."""


class RecallText(Text):
    """Text, and in a share of the samples a needle at a random depth and a question at the end
    that only the needle answers: what trains a memory to keep details of real text.

    The other samples are those of `Text`, and in all of them each next token is a label, so that
    the loss is that of a language model; in a sample with a question this holds of the needle,
    the question and the answer, too. The annotation `answer` says whether a label is a token of
    the answer. `recall/accuracy` and `recall/loss` are over these tokens, `recall/answers` over
    whole answers, and `loss/held_out` over all labels. There are no bits a byte, unless `recall`
    is 0, because not all tokens are the text's. Whether a sample has a question, its kind and its
    depth are hashed from seed, split and index, in the held-out splits likewise.

    Kinds: `passkey`, a number of five digits in a sentence (as Mohtashami & Jaggi 2023, arXiv
    2305.16300, but in real text); `needle`, one of 16 words that ends a made-up fact;
    `key_value`, one of eight numbers in lines of JSON, by its key (as Liu et al. 2023, arXiv
    2307.03172). `layerzoo.data.retrieval` makes them, says their chance, and has a grid of depths
    for evaluation. With `documents`, a sample with a question is one document.

    Raises:
        SpecError: see `Text`; no tokenizer; no such kind; `length` is less than twice what a
            question takes with its needle.
    """

    class Config(Text.Config):
        tokenizer: str = field()
        """A tokenizer.json, a folder that holds one, or a Hugging Face id names the tokenizer,
        which is needed here."""
        recall: float = 0.15
        """This share of the samples, 0 to 1, has a question."""
        kinds: Sequence[str] | None = None
        """Questions are of these kinds, each as likely; null is all kinds."""

        reasons: ClassVar[Any] = {"tokenizer": "its questions are of tokens; give one"}

        def check(self) -> None:
            require(self.tokenizer, f"tokenizer: {self.reasons['tokenizer']}")
            require(0 <= self.recall <= 1, f"recall: must be in [0, 1], got {self.recall}")
            known = f"give some of {', '.join(KINDS)}, or leave it out"
            require(self.kinds != (), f"kinds: {known}")
            for kind in self.kinds or ():
                require(kind in KINDS, f"kinds: no '{kind}'; {suggest(kind, KINDS)}")
            super().check()

        def with_setting(self) -> Self:
            return self if self.kinds is not None else replace(self, kinds=tuple(KINDS))

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        assert self.tokenizer is not None
        self.recall, self.kinds = config.recall, self.config.kinds
        for kind in self.kinds if self.recall else ():
            with error_at(f"data: {type(self).__name__}"):
                size = longest(kind, self.tokenizer)
            self.require(
                self.length >= 2 * size,
                f"length: a question of kind {kind} takes some {size} tokens, and as many of "
                f"text: at least {2 * size}, got {self.length}",
            )

    def metrics(self) -> list[Metric]:
        size = 0 if self.recall else self.bytes_per_token
        return [TokenLoss(size), LossByPosition(self.length, size), MarkedAnswers()]

    def sample(self, split: str, index: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        assert self.tokenizer is not None
        out = super().sample(split, index)
        out["answer"] = np.zeros(out["tokens"].shape, bool)
        key = (self.seed, SPLITS.index(split), index)
        asked = np.flatnonzero(below(GRAIN, bits(*key, 0)) < round(self.recall * GRAIN))
        kind = below(len(self.kinds), bits(*key, 1))
        depth = below(GRAIN + 1, bits(*key, 2)) / GRAIN
        random = bits(self.seed, SPLITS.index(split), index[:, None], 3, np.arange(DRAWS))
        text = self.tokens(split)[self.places(split, index[asked])]
        for row, filler in zip(asked, text, strict=True):
            tokens, labels = plant(
                filler, self.tokenizer, self.kinds[kind[row]], depth[row], random[row]
            )
            out["tokens"][row] = tokens
            out["labels"][row] = np.append(tokens[1:], labels[-1])
            out["answer"][row] = labels != IGNORE
            if self.documents:
                out["documents"][row] = 0
        return out
