"""Questions put into real text, as tokens: a needle at a depth, the question at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from layerzoo.data.questions import DRAWS, KINDS, Question, answers
from layerzoo.data.random import U64, below, bits
from layerzoo.data.task import IGNORE
from layerzoo.data.tokenizer import Tokenizer
from layerzoo.spec import SpecError, suggest

Tokens = NDArray[np.integer[Any]]


class Encoded(NamedTuple):
    """The tokens of a `Question`; those of question and answer are those of their text."""

    needle: Tokens
    question: Tokens
    answer: Tokens


def draw(kind: str, random: U64) -> Question:
    """A question of a kind, made of `[DRAWS]` random bits.

    Raises:
        SpecError: no such kind.
    """
    if kind not in KINDS:
        raise SpecError(f"kinds: no '{kind}'; {suggest(kind, KINDS)}")
    return KINDS[kind](random.tolist())


def encode(asked: Question, tokenizer: Tokenizer) -> Encoded:
    """Tokens such that question + answer are the tokens of the joint text. The space between them
    belongs to the question if the tokenizer leaves it alone there (before digits, of many), so
    that it is no part of what is scored, else to the answer.

    Raises:
        SpecError: the tokenizer joins the end of the question and the answer to one token.
    """
    whole = tokenizer.encode_short(f"{asked.question} {asked.answer}")
    for text in (f"{asked.question} ", asked.question):
        question = tokenizer.encode_short(text)
        if len(question) < len(whole) and np.array_equal(whole[: len(question)], question):
            needle = tokenizer.encode_short(asked.needle)
            return Encoded(needle, question, whole[len(question) :])
    raise SpecError(
        f"tokenizer: it joins the answer '{asked.answer}' to the question before it; take one "
        "that splits text at spaces"
    )


def plant(
    text: Tokens, tokenizer: Tokenizer, kind: str, depth: float, random: U64
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Put a question into a window of text.

    The needle overwrites the text at the depth: at 0 it is the beginning, at 1 it ends where the
    question begins. Question and answer overwrite the end, so that the last token is the
    answer's. What the text says is not looked at: a short answer may stand in it by chance.

    Args:
        text: `[T + 1]` tokens, the filler. depth: 0 to 1. random: `[DRAWS]` bits.

    Returns:
        tokens and labels, `[T]` each: labels are aligned with the tokens that must predict them
        and are `IGNORE` but for the answer's, at the end. The answer's last token is a label
        only.

    Raises:
        SpecError: no such kind, a depth out of range, a text that is too short, or a tokenizer
            that will not do (see `encode`).
    """
    if not 0 <= depth <= 1:
        raise SpecError(f"depth: must be in [0, 1], got {depth}")
    needle, question, answer = encode(draw(kind, random), tokenizer)
    end = len(text) - len(question) - len(answer)
    room = end - len(needle)
    if room < 0:
        raise SpecError(
            f"length: a question of kind {kind} takes {len(text) - room} tokens and does not fit "
            f"into {len(text)}"
        )
    whole = text.astype(np.int64)
    start = int(depth * room + 0.5)
    whole[start : start + len(needle)] = needle
    whole[end:] = np.concatenate([question, answer])
    labels = np.full(len(text) - 1, IGNORE, np.int64)
    labels[-len(answer) :] = answer
    return whole[:-1], labels


def longest(kind: str, tokenizer: Tokenizer, draws: int = 32) -> int:
    """The most tokens that needle, question and answer take, of some."""
    random = bits(np.arange(draws)[:, None], np.arange(DRAWS))
    return max(sum(map(len, encode(draw(kind, row), tokenizer))) for row in random)


def grid(
    corpus: Tokens,
    tokenizer: Tokenizer,
    kind: str,
    length: int,
    depths: Sequence[float],
    samples: int,
    seed: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """A batch of questions for each depth, in their order: tokens and labels,
    `[samples, length]`, as of `plant`. A pure function of its arguments.

    Sample n is the same window of the corpus and the same question at each depth, so that depths
    are compared on the same text.

    Args:
        corpus: `[N]` tokens of held-out text in a row, such as `task.tokens("test")` of a `Text`.

    Raises:
        SpecError: see `plant`; the corpus is shorter than a sample.
    """
    if len(corpus) <= length:
        raise SpecError(
            f"length: the text has {len(corpus)} tokens, a sample needs {length + 1}; give more "
            "text or a smaller length"
        )
    number = np.arange(samples)
    first = below(len(corpus) - length, bits(seed, number, 0))
    random = bits(seed, number[:, None], 1, np.arange(DRAWS))
    for depth in depths:
        rows = [
            plant(corpus[at : at + length + 1], tokenizer, kind, depth, own)
            for at, own in zip(first, random, strict=True)
        ]
        tokens, labels = (np.stack(part) for part in zip(*rows, strict=True))
        yield torch.from_numpy(tokens), torch.from_numpy(labels)


def chance(kind: str, tokenizer: Tokenizer) -> float:
    """The accuracy per token of the best guess that has not read the needle, but knows the
    question and the answer's true tokens so far. It is counted over all answers.

    With SmolLM2's tokenizer it is 1/10 of `passkey` and `key_value` (a token is a digit) and 1/16
    of `needle` (a token is a word); a tokenizer that splits words makes their later tokens easy.
    Of `key_value` a model that copies any of the numbers in the block, whatever their keys, is
    above that: it has 1 of `PAIRS` whole answers, and more of their later digits, for given the
    first ones few numbers are left. Read whole answers there.
    """
    right = total = 0
    for group in answers(kind):
        # After a word, as in the question: at a text's beginning tokens may differ. What all of
        # them begin with, that word and perhaps a space, is no part of the answers.
        texts = [f"is {answer}".encode() for answer in group]
        rows = [tokens.tolist() for tokens in tokenizer.encode(texts)]
        known = next(n for n, at in enumerate(zip(*rows, strict=False)) if len({*at}) > 1)
        seen = Counter(tuple(row[:n]) for row in rows for n in range(known + 1, len(row) + 1))
        best: dict[tuple[int, ...], int] = {}
        for start, count in seen.items():
            best[start[:-1]] = max(count, best.get(start[:-1], 0))
        right += sum(best.values())
        total += seen.total()
    return right / total
