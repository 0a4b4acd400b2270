"""State tracking: the groups are groups, and labels are the products of all tokens so far."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from layerzoo import SpecError
from layerzoo.data import StateTracking
from layerzoo.data.state_tracking import GROUPS, elements, multiplication

SIZES = {"Z2": 2, "Z60": 60, "S3": 6, "A5": 60, "S5": 120}


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_is_a_group(group: str) -> None:
    table = multiplication(group)
    n = SIZES[group]
    everything = np.arange(n)
    assert table.shape == (n, n) and len({*elements(group)}) == n
    # Closed, with an inverse on either side: each row and column holds each element once.
    assert (np.sort(table, 0) == everything[:, None]).all()
    assert (np.sort(table, 1) == everything).all()
    assert (table[0] == everything).all() and (table[:, 0] == everything).all()
    a, b, c = np.ix_(everything, everything, everything)
    assert (table[table[a, b], c] == table[a, table[b, c]]).all()


def test_groups_are_told_apart_by_their_structure() -> None:
    assert {group: len(elements(group)) for group in GROUPS} == SIZES
    commutative = {
        group for group in GROUPS if (multiplication(group) == multiplication(group).T).all()
    }
    assert commutative == {"Z2", "Z60"}
    # Commutators generate S3's rotations, a smaller group; but all of A5, which is not solvable.
    assert {group: len(commutators(group)) for group in ("S3", "A5", "S5")} == {
        "S3": 3,
        "A5": 60,
        "S5": 60,
    }
    table, power, order = multiplication("Z60"), 1, 1
    while power:
        power, order = table[power, 1], order + 1
    assert order == 60


def commutators(group: str) -> set[int]:
    """The a^-1 b^-1 a b of a group; in these groups they are a subgroup."""
    table = multiplication(group)
    inverse = (table == 0).argmax(1)
    a, b = np.ix_(range(len(table)), range(len(table)))
    return {*table[table[inverse[a], inverse[b]], table[a, b]].flatten().tolist()}


@pytest.mark.parametrize("options", [*StateTracking.cases, {"group": "S5", "tokens": "swaps"}])
def test_labels_are_the_products_of_all_tokens_so_far(options: dict[str, Any]) -> None:
    task = StateTracking(**options, length=17)
    batch = task.sample("train", np.arange(50))
    assert batch["tokens"].shape == batch["labels"].shape == (50, 17)
    moves = elements(task.group)
    for tokens, labels in zip(batch["tokens"], batch["labels"], strict=True):
        points = moves[0]
        for token, label in zip(tokens, labels, strict=True):
            points = tuple(moves[token][point] for point in points)  # the next move, on the last
            assert moves[label] == points
        assert (task.solve(tokens) == labels).all()
    assert (batch["position"] == 1 + np.arange(17)).all()


def test_parity_and_the_side_of_the_product() -> None:
    parity = StateTracking(group="Z2", length=64).sample("val", np.arange(100))
    assert (parity["labels"] == parity["tokens"].cumsum(1) % 2).all()
    rotations = StateTracking(group="Z60", length=64).sample("val", np.arange(100))
    assert (rotations["labels"] == rotations["tokens"].cumsum(1) % 60).all()
    # First swap the points 0 and 1, then 1 and 2: what was at 0 is at 2 in the end.
    first, then = elements("S3").index((1, 0, 2)), elements("S3").index((0, 2, 1))
    assert elements("S3")[multiplication("S3")[first, then]] == (2, 0, 1)


@pytest.mark.parametrize("group", GROUPS)
def test_tokens_and_products_are_uniform(group: str) -> None:
    task = StateTracking(group=group, length=20)  # type: ignore[arg-type]
    batch, n = task.sample("train", np.arange(6000)), SIZES[group]
    assert task.chance == 1 / n and task.vocab_size == n
    for values in (batch["tokens"], batch["labels"][:, 0], batch["labels"][:, -1]):
        share = np.bincount(values.flatten(), minlength=n) / values.size
        assert np.abs(share - 1 / n).max() < 5 * np.sqrt(1 / n / values.size)


def test_swaps_move_two_points_or_none() -> None:
    tokens = {
        *StateTracking(group="S5", tokens="swaps")
        .sample("train", np.arange(50))["tokens"]
        .flatten()
    }
    moved = [sum(i != p for i, p in enumerate(elements("S5")[token])) for token in tokens]
    assert sorted(moved) == [0] + 10 * [2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "length: must be at least 1"),
        ({"group": "M11"}, "group: expected one of 'Z2', 'Z60', 'S3', 'A5', 'S5', got 'M11'"),
        ({"group": "A5", "tokens": "swaps"}, "tokens: A5 has no swaps"),
        ({"tokens": "some"}, "tokens: expected one of 'all', 'swaps', got 'some'"),
    ],
)
def test_bad_options_are_one_clear_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as error:
        StateTracking(**options)
    assert message in str(error.value) and "\n" not in str(error.value)
