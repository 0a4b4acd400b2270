"""Overwrite: annotations against a slow reading of the tokens."""

from __future__ import annotations

import pytest

from layerzoo import SpecError
from layerzoo.data import Overwrite
from layerzoo.data.task import IGNORE


@pytest.mark.parametrize("writes", [[1, 2, 4], [3], [1, 5]])
def test_annotations_are_what_the_tokens_say(writes: list[int]) -> None:
    task = Overwrite(vocab_size=128, length=80, keys=6, writes=writes)
    batch = task.batch("train", range(40))
    written = 2 * sum((writes * 6)[:6])
    for row, tokens in enumerate(batch["tokens"].tolist()):
        pairs = list(zip(tokens[:written:2], tokens[1:written:2], strict=True))
        assert all(1 <= key < 64 <= value < 128 for key, value in pairs)
        values = [value for _, value in pairs]
        assert len({*values}) == len(values)
        assert batch["bound"][row, 0].tolist() == values
        history: dict[int, list[int]] = {}
        for n, (key, _) in enumerate(pairs):
            history.setdefault(key, []).append(n)
        assert sorted(map(len, history.values())) == sorted((writes * 6)[:6])
        asked = (batch["labels"][row] != IGNORE).nonzero().flatten().tolist()
        assert sorted(tokens[at] for at in asked) == sorted(history)  # each key once
        for at in asked:
            times = history[tokens[at]]
            here = {
                name: value[row, at].tolist() for name, value in batch.items() if name != "bound"
            }
            assert here["labels"] == values[times[-1]]
            assert here["lag"] == at - 2 * times[-1] - 1
            assert here["writes"] == len(times)
            assert here["between"] == len(values) - 1 - times[-1]
            old = [value for value in here["old"] if value >= 0]
            assert old == [values[n] for n in times[:-1]]


def test_writes_are_in_random_order_and_queries_spread() -> None:
    batch = Overwrite(vocab_size=128, length=128, keys=6).batch("train", range(500))
    first = batch["tokens"][:, 0]
    assert first.unique().numel() > 50  # not the keys in order of their writes
    lag = batch["lag"][batch["labels"] != IGNORE].float()
    assert lag.quantile(0.1) < 30 and lag.quantile(0.9) > 85


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 63}, "vocab_size: must be even"),
        ({"vocab_size": 8, "keys": 4}, "a vocabulary of 8 has 3"),
        ({"writes": []}, "writes: must be 1 or more"),
        ({"writes": [0, 1]}, r"writes: must be 1 or more, got \[0, 1\]"),
        ({"vocab_size": 32, "keys": 8, "writes": [4]}, "writes: 32 in all, but there are 16"),
        ({"length": 40, "keys": 8}, "17 writes and 8 queries need an even number of at least 50"),
        ({"alpha": 0.0}, "alpha: must be in"),
        ({"reach": -1}, "reach: must not be negative"),
    ],
)
def test_bad_options_are_one_clear_line(options: dict, message: str) -> None:
    with pytest.raises(SpecError, match=message) as error:
        Overwrite(**options)
    assert "\n" not in str(error.value)
