"""Copying and induction: what the rows look like, and what a window can answer of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from layerzoo import SpecError
from layerzoo.data import Copying, Induction
from layerzoo.data.task import IGNORE
from layerzoo.model import LanguageModel


def test_a_string_a_separator_and_the_string_again() -> None:
    task = Copying(alphabet=5, length=20)
    batch = task.sample("train", np.arange(200))
    tokens, labels = batch["tokens"], batch["labels"]
    string = tokens[:, :10]
    assert string.min() == 1 and string.max() == 5 == task.vocab_size - 1
    assert (tokens[:, 10] == 0).all() and (tokens[:, 11:] == string[:, :-1]).all()
    assert (labels[:, :10] == IGNORE).all() and (labels[:, 10:] == string).all()
    assert (tokens[:, 11:] == labels[:, 10:-1]).all()  # teacher forced
    assert (batch["lag"][:, 10:] == 10).all()
    assert (batch["position"][:, 10:] == 1 + np.arange(10)).all()
    rows = np.arange(200)[:, None]
    assert (tokens[rows, (np.arange(20) - batch["lag"])[:, 10:]] == labels[:, 10:]).all()


def test_the_special_token_is_answered_by_what_followed_it() -> None:
    task = Induction(vocab_size=6, length=12)
    batch = task.sample("train", np.arange(2000))
    tokens, labels, lag = batch["tokens"], batch["labels"], batch["lag"]
    assert ((tokens == 0).sum(1) == 2).all() and (tokens[:, -1] == 0).all()
    first = (tokens == 0).argmax(1)
    assert np.allclose(np.bincount(first) / 2000, 1 / 9, atol=0.03) and first.max() == 8
    assert (labels[:, :-1] == IGNORE).all()
    assert (labels[:, -1] == tokens[np.arange(2000), first + 1]).all()
    assert (tokens[np.arange(2000), 11 - lag[:, -1]] == labels[:, -1]).all()
    assert np.allclose(np.bincount(labels[:, -1])[1:] / 2000, task.chance, atol=0.04)


def test_induction_has_a_ceiling_for_a_window() -> None:
    # The special token stands at most `reach` before the end: at one of 9 places in 4 of 9 cases.
    ceiling = Induction(vocab_size=6, length=12, reach=6, test_samples=3000).ceiling()
    assert ceiling == pytest.approx(4 / 9, abs=0.03)
    task = Induction(vocab_size=6, length=12)
    layers = [{"name": "sliding", "heads": 1, "window": 5}]
    task.attach(LanguageModel(vocab_size=6, dim=8, depth=1, conv=3, layers=layers))
    assert task.ceiling() == pytest.approx(4 / 9, abs=0.03)  # the model's own: 4 + 2


def test_copying_measures_positions_and_rows() -> None:
    task = Copying(alphabet=5, length=20)
    batch = task.batch("val", range(30))
    where = batch["labels"] != IGNORE
    logits = torch.nn.functional.one_hot(batch["labels"][where], 6).float()
    logits[9:200:10] = 0  # the last letter of 20 strings
    figures: dict[str, Any] = {}
    for metric in task.metrics():
        given = {name: batch[name].expand(30, 20)[where] for name in ("position", "answer")}
        metric.update(logits, batch["labels"][where], **given)
        figures |= metric.compute()
    assert figures["recall/answers"] == pytest.approx(1 / 3)
    assert figures["accuracy/all"] == pytest.approx(28 / 30)
    at = {edge: figures[f"accuracy_position/{edge}"] for edge in (1, 2, 4, 8)}
    assert at == pytest.approx({1: 1, 2: 1, 4: 1, 8: 7 / 9})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Copying(alphabet=1), "alphabet: must be at least 2"),
        (lambda: Copying(length=9), "need an even number of tokens, got 9"),
        (lambda: Copying(length=0), "got 0"),
        (lambda: Induction(vocab_size=2), "vocab_size: must be at least 3"),
        (lambda: Induction(length=3), "length: must be at least 4"),
    ],
)
def test_bad_options_are_one_clear_line(make: Any, message: str) -> None:
    with pytest.raises(SpecError) as error:
        make()
    assert message in str(error.value) and "\n" not in str(error.value)
