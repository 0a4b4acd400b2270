"""Needles: what stands where, at which depth, and when a whole answer is right."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from layerzoo import SpecError
from layerzoo.data import Needle
from layerzoo.data.needle import ASK, BASE
from layerzoo.data.task import IGNORE
from layerzoo.metrics import Answers


def digits(task: Needle, tokens: list[int], keys: range) -> dict[int, list[list[int]]]:
    """What follows each place of each key in the context."""
    book: dict[int, list[list[int]]] = {}
    for at, token in enumerate(tokens[: task.context]):
        if token in keys:
            book.setdefault(token, []).append(tokens[at + 1 : at + 1 + task.digits])
    return book


@pytest.mark.parametrize("case", Needle.cases, ids=str)
def test_the_answers_stand_after_the_keys_asked_and_nowhere_else(case: dict) -> None:
    task = Needle(**case)
    keys = range(1 + BASE, 1 + BASE + task.config.keys)
    batch = task.batch("train", range(50))
    for tokens, labels, lag in zip(batch["tokens"], batch["labels"], batch["lag"], strict=True):
        row = tokens.tolist()
        book = digits(task, row, keys)
        assert len(book) == task.needles // task.values
        assert all(len(values) == task.values for values in book.values())
        hidden = [d for values in book.values() for value in values for d in value]
        context = row[: task.context]
        assert all(1 <= d <= BASE for d in hidden) and ASK not in context
        assert sum(1 <= token <= BASE for token in context) == len(hidden)  # none in the filler
        question = iter([*row[task.context :], int(labels[-1])])
        asked = []
        for token in question:
            assert token == ASK
            asked.append(next(question))
            answer = [next(question) for _ in range(task.values * task.digits)]
            assert answer == [d for value in book[asked[-1]] for d in value]
        assert len({*asked}) == len(asked) == task.queries
        at = (labels != IGNORE).nonzero().flatten()
        assert at.numel() == task.queries * task.values * task.digits
        assert tokens[at[0] - 1] == ASK  # the first label is at the key
        assert torch.equal(tokens[at - lag[at]], labels[at])
        assert (at - lag[at] < task.context).all()


def test_answers_of_several_values_are_told_in_the_order_of_their_places() -> None:
    task = Needle(length=48, needles=4, queries=2, values=2, digits=2)
    batch = task.batch("train", range(20))
    where = batch["labels"] != IGNORE
    at = np.flatnonzero(where[0])
    assert at.tolist() == [38, 39, 40, 41, 44, 45, 46, 47]  # at the key and at three digits
    stands = at - batch["lag"][where].view(20, 2, 2, 2).numpy().reshape(20, 8)
    stands = stands.reshape(20, 2, 2, 2)
    assert (np.diff(stands[:, :, :, 0], axis=2) >= 3).all()  # key d d, then the next
    assert (np.diff(stands, axis=3) == 1).all()
    assert batch["answer"][where].view(20, 8)[3].tolist() == [6, 6, 6, 6, 7, 7, 7, 7]


@pytest.mark.parametrize("needles", [1, 4])
def test_each_depth_has_as_many_samples_and_the_needle_stands_there(needles: int) -> None:
    grid = [0, 10, 50, 100]
    task = Needle(length=200, needles=needles, digits=5, depth=grid)
    batch = task.batch("test", range(400))
    where = batch["labels"] != IGNORE
    depth = batch["depth"][where].view(400, 5)
    assert (depth == depth[:, :1]).all()
    assert depth[:, 0].bincount().nonzero().flatten().tolist() == grid
    assert (depth[:, 0].bincount()[grid] == 100).all()
    start = where.nonzero()[::5, 1] - batch["lag"][where][::5] - 1
    last = task.context - task.size
    off = start - depth[:, 0] * last / 100
    assert off.abs().max() <= (0.5 if needles == 1 else task.size / 2)
    if needles > 1:  # the others are anywhere, on both sides
        others = (batch["tokens"][:, : task.context] > BASE) & (
            batch["tokens"][:, : task.context] <= BASE + task.config.keys
        )
        before = [int(row[:s].sum()) for row, s in zip(others, start.tolist(), strict=True)]
        assert {*before} == {0, 1, 2, 3}


def test_without_a_depth_the_needle_stands_anywhere() -> None:
    task = Needle(length=120, digits=5)
    batch = task.batch("test", range(6000))
    depth = batch["depth"][batch["labels"] != IGNORE][::5]
    assert depth.min() == 0 and depth.max() == 100
    assert np.allclose(np.bincount(depth // 10)[:10] / 6000, 0.1, atol=0.02)
    (by_depth,) = [m for m in task.metrics() if getattr(m, "annotation", "") == "depth"]
    assert by_depth.edges.tolist() == [*range(0, 100, 10)]  # type: ignore[union-attr]


def test_a_number_has_five_doubled_digits_of_each_pattern_alike() -> None:
    task = Needle(setting="number", length=64)
    batch = task.batch("test", range(5000))
    numbers = batch["labels"][batch["labels"] != IGNORE].view(5000, 10)
    same = numbers[:, 1:] == numbers[:, :-1]
    assert (same.sum(1) >= 5).all()
    # Five of nine, and one in ten of the others: so is the chance of guessing the digit before.
    assert same.float().mean(0).numpy() == pytest.approx(np.full(9, 0.6), abs=0.025)
    guess = (9 * float(same.float().mean()) + 0.1) / 10
    assert task.chance == pytest.approx(0.55) and guess == pytest.approx(0.55, abs=0.01)
    assert Needle(digits=5).chance == 0.1


def test_a_setting_holds_at_other_lengths() -> None:
    task = Needle(setting="passkey", length=64, lengths="48,96", depth=[0, 100])
    parts = task.parts("test")
    assert [part.length for part in parts.values()] == [48, 96]
    for part in parts.values():
        assert isinstance(part, Needle)
        assert (part.config.filler, part.digits, part.depth) == ("repeat", 5, (0, 100))
    pairs = Needle(setting="key-value", length=64, lengths="64,128").parts("test")
    assert [p.needles for p in pairs.values() if isinstance(p, Needle)] == [9, 20]


def test_reachable_is_a_digit_with_the_token_before_it() -> None:
    task = Needle(length=80, digits=3, reach=20, sinks=4, depth=[0, 100, 40])
    batch = task.batch("test", range(3))
    where = batch["labels"] != IGNORE
    reachable = batch["reachable"][where].view(3, 3)
    assert reachable.tolist() == [[True] * 3, [True] * 3, [False] * 3]  # sinks, window, neither
    assert task.varied(sinks=3).batch("test", [0])["reachable"][0].sum() == 2
    for reach in (4, 5):  # the last needle's digits are at lag 4, and what is before them at 5
        last = task.varied(reach=reach, sinks=0, depth=100).batch("test", [0])
        assert last["lag"].max() == 4 and last["reachable"].sum() == (3 if reach == 5 else 0)


def test_an_answer_is_right_if_all_its_tokens_are() -> None:
    labels = torch.tensor([1, 2, 1, 2, 3, 0])
    said = torch.tensor([1, 2, 1, 0, 3, 0])  # the second token of answer 9 is wrong
    answer = torch.tensor([4, 4, 9, 9, 2, 7])
    logits = torch.eye(4)[said]
    metric = Answers()
    metric.update(logits, labels, answer=answer, lag=answer)
    assert metric.compute() == {"recall/answers": torch.tensor(0.75)}
    metric.update(logits[2:4], labels[2:4], answer=answer[2:4])
    metric.update(logits[:0], labels[:0], answer=answer[:0])  # a process without a batch
    assert metric.compute()["recall/answers"] == pytest.approx(3 / 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 11}, "length: 1 needles of 6 tokens and 6 of question do not fit into 11"),
        ({"length": 6, "setting": "key-value"}, "do not fit"),
        ({"needles": 3, "values": 2}, "needles: must be a positive multiple of the 2 values"),
        ({"needles": 2, "queries": 3}, "queries: must be at most the 2 keys hidden"),
        ({"length": 999, "setting": "key-value"}, "set keys and vocab_size higher"),
        ({"vocab_size": 43}, "vocab_size: must be over 43 with 32 keys"),
        ({"depth": [0, 101]}, "depth: must be percentages"),
        ({"depth": []}, "depth: must be percentages"),
        ({"depth": 5, "needles": 2, "queries": 2}, "depth: is of the one needle asked"),
        ({"digits": 5, "repeats": 5}, r"repeats: must be in 0\.\.4"),
        ({"setting": "passkey", "digits": 4}, "digits: 4, but setting passkey has 5"),
    ],
)
def test_bad_input_is_one_clear_line(options: dict, message: str) -> None:
    with pytest.raises(SpecError, match=message) as error:
        Needle(**options)
    assert "\n" not in str(error.value)
