"""Metrics against figures computed by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from layerzoo.metrics import (
    Accuracy,
    AccuracyBy,
    Capacity,
    Collateral,
    ErrorKinds,
    LossByPosition,
    Recall,
    RecallByLag,
    SuccessRate,
    TokenLoss,
)
from layerzoo.metrics.accuracy import extrapolation
from layerzoo.metrics.recall import half_life


def answer(tokens: list[int], vocab: int = 10) -> Tensor:
    """Logits whose argmax are these tokens."""
    return F.one_hot(torch.tensor(tokens), vocab).float()


def figures(metric: Metric, logits: Tensor, labels: list[int], **notes: Any) -> dict[str, float]:
    """Updated in two pieces, one of which is empty of labels in turn."""
    at = {name: torch.tensor(value) for name, value in notes.items()}
    for part in (slice(0, 2), slice(2, 2), slice(2, None)):
        here = {name: value[part] for name, value in at.items()}
        metric.update(logits[part], torch.tensor(labels)[part], **here)
    return {name: float(value) for name, value in metric.compute().items()}


RIGHT = answer([3, 1, 0, 1, 1])  # of 3, 1, 2, 0, 1: the first, second and last
LABELS = [3, 1, 2, 0, 1]


def test_recall_tells_what_a_window_can_answer() -> None:
    seen = [True, False, False, False, True]
    assert figures(Recall(), RIGHT, LABELS, reachable=seen) == pytest.approx(
        {
            "recall/accuracy": 0.6,
            "recall/ceiling": 0.4,
            "recall/queries": 5,
            "recall/beyond_window": 1 / 3,
        }
    )
    assert "recall/beyond_window" not in figures(Recall(), RIGHT, LABELS, reachable=[True] * 5)


def test_recall_by_lag_and_its_half_life() -> None:
    lag = [1, 4, 7, 9, 1]
    out = figures(RecallByLag(16), RIGHT, LABELS, lag=lag)
    assert out == {"recall_lag/1": 1.0, "recall_lag/4": 0.5, "recall_lag/8": 0.0}
    out = figures(RecallByLag(16, chance=0.0), RIGHT, LABELS, lag=lag)
    assert out["recall/half_life"] == pytest.approx(5.5)  # the mean lag of the second bin
    assert out["recall/half_life_censored"] == 0


def test_half_life_is_interpolated_in_log_lag_and_censored() -> None:
    assert half_life([(1, 0.8), (4, 0.6), (16, 0.2)]) == (pytest.approx(8), False)
    assert half_life([(1, 0.8), (4, 0.6), (16, 0.41)]) == (16, True)
    assert half_life([(2, 0.5)]) == (2, True)
    assert half_life([(1, -0.01), (4, 0.5)]) is None and half_life([]) is None
    # What is retained is above chance: 0.55 is half of 1 if 0.1 is chance.
    half = 0.55
    out = figures(RecallByLag(4, chance=0.1), answer([1, 1, 1, 1]), [1, 1, 1, 0], lag=[1, 1, 2, 2])
    share = (1 - 0.5) / (1 - (0.5 - 0.1) / 0.9)
    assert (0.5 - 0.1) / 0.9 < 0.5 < (half - 0.1) / 0.9 + 1e-9
    assert out["recall/half_life"] == pytest.approx(2**share)


def test_loss_by_position_in_nats_bits_and_perplexity() -> None:
    logits, position = torch.zeros(3, 8), [1, 2, 3]
    out = figures(LossByPosition(4, bytes_per_token=3), logits, [0, 1, 2], position=position)
    for edge in (1, 2):
        assert out[f"loss_at/{edge}"] == pytest.approx(math.log(8))
        assert out[f"perplexity_at/{edge}"] == pytest.approx(8)
        assert out[f"bits_per_byte_at/{edge}"] == pytest.approx(1)
    whole = figures(TokenLoss(3), logits, [0, 1, 2])
    assert whole == pytest.approx(
        {"loss/held_out": math.log(8), "loss/perplexity": 8, "loss/bits_per_byte": 1}
    )
    assert "loss/bits_per_byte" not in figures(TokenLoss(), logits, [0, 1, 2])


def test_accuracy_is_scaled_by_chance() -> None:
    out = figures(Accuracy(chance=0.2), RIGHT, LABELS)
    assert out == pytest.approx({"accuracy/all": 0.6, "accuracy/scaled": 0.5})
    by = figures(AccuracyBy("depth", [0, 50]), RIGHT, LABELS, depth=[0, 49, 50, 99, 51])
    assert by == pytest.approx({"accuracy_depth/0": 1, "accuracy_depth/50": 1 / 3})


def test_capacity_is_the_largest_size_before_the_first_failure() -> None:
    def capacity(right: list[int], pairs: list[int]) -> float:
        out = figures(Capacity([8, 2, 4]), answer(right), [1] * len(right), pairs=pairs)
        return out["capacity/d90"]

    assert capacity([1, 1, 1, 0], [2, 4, 8, 8]) == 4
    assert capacity([1, 0, 1, 1], [2, 4, 8, 8]) == 2  # 8 does not count after 4 failed
    assert capacity([0, 1, 1, 1], [2, 4, 8, 8]) == 0
    assert capacity([1] * 9 + [0], [8] * 10) == 8  # 90% is enough


def test_capacity_is_interpolated_inside_the_sizes() -> None:
    def at(*accuracies: int) -> float | None:
        right = [int(n < a) for a in accuracies for n in range(10)]
        pairs = [size for size in (2, 4, 8) for _ in range(10)]
        out = figures(Capacity([2, 4, 8]), answer(right), [1] * 30, pairs=pairs)
        return out.get("capacity/d90_interpolated")

    assert at(10, 8, 0) == pytest.approx(2 * 2**0.5)  # .9 is half way from 1 to .8
    assert at(10, 10, 6) == pytest.approx(4 * 2**0.25)
    assert at(10, 9, 8) == pytest.approx(4)
    assert at(10, 10, 9) is None and at(8, 10, 10) is None  # never, or before the first


def test_errors_are_stale_of_another_key_or_off_the_set() -> None:
    old = [[2, -1], [2, -1], [2, -1], [-1, -1], [-1, -1]]
    bound = [[2, 3, 4, 5]] * 5
    out = figures(
        ErrorKinds(), answer([2, 4, 9, 5, 3]), [3, 3, 3, 4, 3], old=old, bound=bound
    )  # stale; another key's; off; another key's; right
    assert out == pytest.approx(
        {
            "errors/stale": 1 / 4,
            "errors/other_key": 2 / 4,
            "errors/off_set": 1 / 4,
            "errors/stale_rate": 1 / 3,  # of the three queries that have an old value
        }
    )
    right = figures(ErrorKinds(), answer([3] * 5), [3] * 5, old=old, bound=bound)
    assert right == {"errors/stale_rate": 0}  # no errors, no shares


def test_collateral_gap_is_untouched_minus_updated() -> None:
    out = figures(Collateral(), RIGHT, LABELS, writes=[1, 1, 1, 4, 2])
    assert out == pytest.approx(
        {
            "recall/untouched": 2 / 3,
            "recall/updated": 1 / 2,
            "recall/untouched_minus_updated": 1 / 6,
        }
    )
    assert set(figures(Collateral(), RIGHT, LABELS, writes=[1] * 5)) == {"recall/untouched"}


def test_success_rate_is_the_share_of_runs_above_a_threshold() -> None:
    metric = SuccessRate(0.9)
    metric.update(torch.tensor([0.95, 0.9, 0.2]))
    metric.update(torch.tensor([0.1]))
    assert float(metric.compute()) == 0.5


def test_extrapolation_is_relative_to_the_training_length() -> None:
    accuracy = {"length=32": 0.8, "length=64": 0.4, "length=48": 0.5, "length=256": 0.2}
    results = {part: {"recall/accuracy": value} for part, value in accuracy.items()}
    assert extrapolation(results, 32) == {"extrapolation/2": 0.5, "extrapolation/8": 0.25}
    assert extrapolation(results, 16) == {}  # was not measured at the training length
    assert extrapolation({"length=16": {"accuracy/all": 0.0}}, 16) == {}


def test_a_loss_too_large_for_its_perplexity_gives_inf_and_nan_stays_nan() -> None:
    label, sure = [0, 0], torch.tensor([[-800.0, 0.0], [-800.0, 0.0]])
    for logits, loss, perplexity in (
        (sure, 800.0, math.inf),
        (sure * math.nan,) + (math.nan,) * 2,
    ):
        whole = figures(TokenLoss(1), logits, label)
        by = figures(LossByPosition(2, 1), logits, label, position=[1, 1])
        for found in (
            {**whole},
            {name.replace("_at/1", "/held_out"): x for name, x in by.items()},
        ):
            assert str(found["loss/held_out"]) == str(loss)
        assert str(whole["loss/perplexity"]) == str(by["perplexity_at/1"]) == str(perplexity)


def test_logits_that_are_no_numbers_answer_nothing() -> None:
    """The argmax of nan is its place, here 0, which is the label."""
    lost, label = torch.full((3, 4), math.nan), [0, 0, 0]
    assert figures(Accuracy(0.25), lost, label)["accuracy/all"] == 0
    assert figures(AccuracyBy("lag", [1]), lost, label, lag=[1] * 3) == {"accuracy_lag/1": 0}
    seen = figures(Recall(), lost, label, reachable=[True] * 3)
    assert seen["recall/accuracy"] == 0
    kinds = figures(ErrorKinds(), lost, label, old=[[0]] * 3, bound=[[0]] * 3)
    assert kinds["errors/off_set"] == 1 and kinds["errors/stale_rate"] == 0


def test_a_metric_of_nothing_is_no_number() -> None:
    nothing = torch.zeros(0, 4)
    for metric, notes in ((Accuracy(0.2), {}), (TokenLoss(1), {}), (Recall(), {"reachable": []})):
        at = {name: torch.zeros(0, dtype=torch.bool) for name in notes}
        metric.update(nothing, torch.zeros(0, dtype=torch.int64), **at)
        first, *_ = metric.compute().values()
        assert math.isnan(first)
    assert math.isnan(figures(Accuracy(1.0), RIGHT, LABELS)["accuracy/scaled"])  # a guess is all
