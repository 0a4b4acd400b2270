"""Accumulators stay wide, whatever precision the model has."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from lightning import Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from transformers import LlamaConfig, LlamaForCausalLM

from layerzoo import build, list_layers
from layerzoo.data import MQAR, Task
from layerzoo.hf import convert
from layerzoo.metrics import (
    Accuracy,
    AccuracyBy,
    Answers,
    Capacity,
    Collateral,
    ContinualMatrix,
    ErrorKinds,
    LossByPosition,
    MarkedAnswers,
    Recall,
    RecallByLag,
    SuccessRate,
    TokenLoss,
)
from layerzoo.model import ModelConfig
from layerzoo.registry import get_layer
from layerzoo.train.command import quiet
from layerzoo.train.lit import LitModel

CASTS: dict[str, Callable[[nn.Module], Any]] = {
    "to": lambda module: module.to(torch.bfloat16),
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "double": lambda module: module.double(),
    "type": lambda module: module.type(torch.float16),
}
METRICS: list[Callable[[], Metric]] = [
    *(lambda: Accuracy(0.2), lambda: AccuracyBy("lag", (1, 3)), Answers, Collateral, ErrorKinds),
    *(lambda: Capacity((2, 4)), lambda: ContinualMatrix(2), lambda: LossByPosition(8, 1)),
    *(MarkedAnswers, Recall, lambda: RecallByLag(8, 0.0), SuccessRate, lambda: TokenLoss(1)),
]


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("make", METRICS)
def test_no_cast_of_the_module_changes_the_dtype_of_a_state(
    make: Callable[[], Metric], cast: str
) -> None:
    metric = make()
    before = dict(metric.metric_state)
    CASTS[cast](nn.ModuleList([metric]))
    after = dict(metric.metric_state)
    metric.reset()  # to defaults, which a cast reaches too
    for states in (after, metric.metric_state):
        for name, state in before.items():
            assert state.dtype in (torch.int64, torch.float64)  # type: ignore[union-attr]
            assert states[name].dtype == state.dtype  # type: ignore[union-attr]


def test_a_cast_does_not_round_what_is_summed_already() -> None:
    metric = AccuracyBy("lag", [1, 2, 4])
    module = nn.ModuleList([metric])
    many = 10_000
    one = torch.ones(many, dtype=torch.int64)
    metric.update(F.one_hot(one, 3), one, lag=one)
    module.to(torch.bfloat16)
    assert metric.compute() == {"accuracy_lag/1": 1.0}


def test_metrics_go_with_their_module_to_another_device() -> None:
    metric = nn.ModuleList([AccuracyBy("lag", [1, 2])]).to("meta", torch.bfloat16)[0]
    assert isinstance(metric, AccuracyBy)
    assert metric.total.is_meta and metric.edges.is_meta
    assert (metric.total.dtype, metric.count.dtype) == (torch.float64, torch.int64)


BIG = 2**30 + 1
"""Not a float32."""


@pytest.mark.filterwarnings("ignore:The ``compute`` method")  # nothing was updated but the states
def test_counts_and_what_is_made_of_them_are_exact_beyond_float32() -> None:
    recall = Recall()
    recall.counts += torch.tensor([[1, 0], [0, BIG - 1]])
    assert recall.compute() == {
        "recall/accuracy": (BIG - 1) / BIG,
        "recall/ceiling": (BIG - 1) / BIG,
        "recall/queries": BIG,
        "recall/beyond_window": 0,
    }
    accuracy = Accuracy(0.0)
    accuracy.counts += torch.tensor([BIG - 1, BIG])
    assert accuracy.compute()["accuracy/all"] == (BIG - 1) / BIG
    rate, answers = SuccessRate(), Answers()
    for metric in (rate, answers):
        metric.counts += torch.tensor([BIG - 1, BIG])
    assert rate.compute() == answers.compute()["recall/answers"] == (BIG - 1) / BIG
    by = AccuracyBy("lag", [1])
    by.total += 2**53 - 1
    by.count += 2**53
    assert by.compute() == {"accuracy_lag/1": 1 - 2.0**-53}
    kinds = ErrorKinds()
    kinds.counts += torch.tensor([1, BIG - 1, 0, BIG])
    assert kinds.compute()["errors/other_key"] == (BIG - 1) / BIG


def test_a_loss_is_summed_without_loss() -> None:
    """Of many small terms after a large one, which float32 drops."""
    loss, by = TokenLoss(), LossByPosition(1)
    marked = MarkedAnswers()
    metrics: list[Any] = [loss, by, marked]
    for metric in metrics:
        metric.total += 2.0**24
    notes = {"position": torch.ones(1).long(), "answer": torch.ones(1).long()}
    logits = torch.tensor([[0.0, math.log(math.e**0.5 - 1)]])  # half a nat
    for metric in metrics:
        for _ in range(4):
            metric.update(logits, torch.zeros(1).long(), **notes)
        assert float(metric.total) == pytest.approx(2**24 + 2, rel=1e-12)


def test_logits_in_float64_give_a_loss_in_float64() -> None:
    logits = torch.tensor([[0.0, 1e-12]], dtype=torch.float64)
    label = torch.zeros(1).long()
    notes = {"position": torch.ones(1).long(), "answer": torch.ones(1).long()}
    want = math.log(2) + 5e-13
    for metric, name in (
        (TokenLoss(), "loss/held_out"),
        (LossByPosition(1), "loss_at/1"),
        (MarkedAnswers(), "recall/loss"),
    ):
        metric.update(logits, label, **notes)
        assert metric.compute()[name] == pytest.approx(want, rel=1e-14)


def test_accuracies_of_phases_are_kept_in_float64() -> None:
    matrix = ContinualMatrix(2)
    for phase in range(3):
        matrix.update(phase, [0.1, 1 / 3])
    assert matrix.compute()["continual_matrix/phase=1/task=2"] == 1 / 3


class Sure(LitModel):
    """Answers the queries of an odd lag, and no other; each with a nat."""

    def labelled(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        logits, labels, annotations = super().labelled(batch)
        said = torch.where(annotations["lag"] % 2 == 1, labels, (labels + 1) % 64)
        return F.one_hot(said, 64).to(logits), labels, annotations


class Counted(MQAR):
    """With a metric of another library."""

    def metrics(self) -> list[Any]:
        return [*super().metrics(), Ones()]


class Ones(Metric):
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor, **annotations: Any) -> None:
        for _ in labels:
            self.total += 1

    def compute(self) -> dict[str, Tensor]:
        return {"own/ones": self.total}


def found_by_testing(precision: Any) -> tuple[dict[str, float], Task]:
    quiet()
    task = Counted(vocab_size=64, length=32, pairs=4, test_samples=700, batch_size=100)
    network = ModelConfig.from_fields(
        {"vocab_size": 64, "dim": 8, "depth": 1, "layers": ["linear"]}
    )
    lit = Sure(network=network)
    quietly: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", logger=False, precision=precision, **quietly)
    (found,) = trainer.test(lit, task, verbose=False)
    return dict(found), task


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "16-true", "bf16-mixed", "64-true"])
def test_figures_agree_with_each_other_in_every_precision(precision: str) -> None:
    found, task = found_by_testing(precision)
    lags = task.batch("test", range(700))["lag"]
    lag = lags[lags > 0]
    assert len(lag) == found["test/recall/queries"] == found["test/own/ones"] == 2800
    assert found["test/recall/accuracy"] == float(Fraction(int((lag % 2).sum()), 2800))
    for edge in (4, 8, 16):
        own = lag[(lag >= edge) & (lag < 2 * edge)]
        assert len(own) > 256
        assert found[f"test/recall_lag/{edge}"] == int((own % 2).sum()) / len(own)
    share = found["test/recall/accuracy"]
    want = math.log(63 + math.e) - share
    assert found["test/loss/held_out"] == pytest.approx(want, rel=1e-6)


# What a layer holds and does not learn


@pytest.mark.parametrize("name", list_layers())
def test_a_cast_rounds_no_constant_of_a_layer(name: str) -> None:
    for case in get_layer(name).cases:
        layer = build(name, dim=24, **case)
        before = [buffer.clone() for buffer in layer.buffers()]
        for cast in (torch.bfloat16, torch.float16, torch.float32):
            layer.to(cast)
            torch.testing.assert_close([*layer.buffers()], before, rtol=0, atol=0)


@pytest.mark.parametrize("cast", [torch.float64, torch.bfloat16])
def test_retention_decays_by_what_its_equation_says(cast: torch.dtype) -> None:
    layer: Any = build("retention", dim=24, heads=4).to(torch.bfloat16).to(cast)
    got = layer.log_decay()
    want = (1 - 2.0 ** -(5 + torch.arange(4, dtype=torch.float64))).log()
    torch.testing.assert_close(got, want.to(got.dtype), rtol=0, atol=0)
    assert got.dtype == (torch.float64 if cast == torch.float64 else torch.float32)


def test_places_in_a_mini_batch_are_counted_beyond_bfloat16() -> None:
    layer: Any = build("ttt_linear", dim=16, heads=1, mini_batch=300).to(torch.bfloat16)
    want = 1 / torch.arange(1, 301)
    torch.testing.assert_close(layer.constants()["row"], want, rtol=0, atol=0)


def test_a_cast_rounds_no_rotary_frequency_of_a_converted_model() -> None:
    sizes: dict[str, Any] = {"vocab_size": 16, "hidden_size": 32, "intermediate_size": 16}
    heads: dict[str, Any] = {"num_attention_heads": 1, "num_key_value_heads": 1}
    source = LlamaForCausalLM(LlamaConfig(**sizes, **heads, num_hidden_layers=1))
    want = source.model.rotary_emb.inv_freq.clone()
    model: Any = convert(source, "retention", window=8).bfloat16()
    assert model.lm_head.weight.dtype == torch.bfloat16
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, want, rtol=0, atol=0)
