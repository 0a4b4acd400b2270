"""Variable tracking and words to count: what is asked, and what is the answer."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from layerzoo import SpecError
from layerzoo.data import CommonWords, FrequentWords, Task, VariableTracking
from layerzoo.data.task import IGNORE
from layerzoo.data.tracking import ASK, SET
from layerzoo.data.words import FIRST, NOISE


@pytest.mark.parametrize("chains", [1, 3])
def test_the_names_told_are_all_that_hold_the_value(chains: int) -> None:
    task = VariableTracking(length=96, chains=chains, hops=3, reach=60)
    batch = task.batch("train", range(50))
    for row, labels, lag, hop, reachable in zip(
        *(batch[name] for name in ("tokens", "labels", "lag", "hop", "reachable")), strict=True
    ):
        tokens = row.tolist()
        value: dict[int, int] = {}  # runs the program
        order = []
        for at, token in enumerate(tokens[: task.context]):
            if token == SET:
                name, source = tokens[at - 1], tokens[at + 1]
                assert name not in value
                assert source in value or 2 <= source < 2 + task.values
                value[name] = value.get(source, source)
                order.append(name)
        assert len(value) == 4 * chains and len({*value.values()}) == chains
        assert tokens[task.context] == ASK
        answer = [name for name in order if value[name] == tokens[task.context + 1]]
        at = (labels != IGNORE).nonzero().flatten()
        assert labels[at].tolist() == answer and tokens[task.context + 2 :] == answer[:-1]
        assert at.tolist() == [*range(task.context + 1, 96)] and hop[at].tolist() == [0, 1, 2, 3]
        assert torch.equal(row[at - lag[at]], labels[at])
        assert (row[at - lag[at] + 1] == SET).all()
        assert torch.equal(reachable[at], lag[at] <= 60)


def test_frequent_words_are_told_by_frequency() -> None:
    task = FrequentWords(length=128)
    assert task.counts[:4].tolist() == [19, 8, 4, 3]  # floor(124 / r^2 / sum) from rank 2 on
    batch = task.batch("train", range(50))
    for tokens, labels in zip(batch["tokens"], batch["labels"], strict=True):
        counts = Counter(tokens[:124].tolist())
        (noise, _), *words = counts.most_common(4)
        assert noise == NOISE and min(word for word, _ in words) >= FIRST
        assert labels[labels != IGNORE].tolist() == [word for word, _ in words]
        assert [count for _, count in words] == [19, 8, 4]


def test_common_words_are_told_as_they_appeared() -> None:
    task = CommonWords(length=96, answers=4, times=8, others=2)
    batch = task.batch("train", range(50))
    for tokens, labels in zip(batch["tokens"], batch["labels"], strict=True):
        context = tokens[:91].tolist()
        counts = Counter(context)
        assert sorted(counts.values(), reverse=True) == [8] * 4 + [2] * 29 + [1]
        assert min(counts) >= FIRST
        common = [word for word in dict.fromkeys(context) if counts[word] == 8]
        assert labels[labels != IGNORE].tolist() == common
        assert tokens[-3:].tolist() == common[:-1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VariableTracking(chains=9), "names: 9 chains of 5 need 45 names, got 24"),
        (lambda: VariableTracking(chains=17, hops=0), "values: 17 chains need as many"),
        (lambda: VariableTracking(length=20), "length: 1 chains of 5 need at least 21"),
        (lambda: VariableTracking(vocab_size=42), "vocab_size: must be over 42"),
        (lambda: FrequentWords(length=20), "length: 20 is too short for the 3 most frequent"),
        (lambda: FrequentWords(vocab_size=6), "vocab_size: 3 answers need at least 7, got 6"),
        (lambda: CommonWords(length=36), "length: 4 words of 8 need at least 37, got 36"),
        (lambda: CommonWords(length=256), "vocab_size: 114 different words need at least 117"),
        (lambda: CommonWords(times=2), "others: must be in 1..1, below times, got 2"),
    ],
)
def test_bad_input_is_one_clear_line(make, message: str) -> None:
    with pytest.raises(SpecError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("task", [FrequentWords, CommonWords, VariableTracking])
def test_the_smallest_sizes_that_are_not_refused_run(task: type[Task]) -> None:
    smallest = {
        FrequentWords: {"vocab_size": 7, "length": 128},
        CommonWords: {"length": 37},
        VariableTracking: {"length": 21, "vocab_size": 43},
    }[task]
    made = task(**smallest)
    batch = made.batch("val", range(20))
    for tokens, labels in zip(batch["tokens"], batch["labels"], strict=True):
        said = torch.from_numpy(made.solve(tokens.numpy()))
        assert torch.equal(said[labels != IGNORE], labels[labels != IGNORE])
