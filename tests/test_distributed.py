"""Two processes equal one: what they see, what they learn and what they measure.

Each of the two runs `main`, once for all tests. They are forked where that is safe, for the
imports of a new one take longer than what it does.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer, seed_everything
from torch import Tensor
from torchmetrics import Metric

import layerzoo.metrics
from layerzoo.data import MQAR, Continual
from layerzoo.data.loading import IGNORE, Batches, ShareOfBatches
from layerzoo.data.task import Task
from layerzoo.metrics import (
    Accuracy,
    AccuracyBy,
    Answers,
    Binned,
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
from layerzoo.spec import Diverged
from layerzoo.train.command import quiet
from layerzoo.train.finite import Finite
from layerzoo.train.lit import LitModel

from .here import forks

WORLD = 2
CUT = 11
"""Process 0 has the first rows, process 1 the others."""
SMALL: dict[str, Any] = {"vocab_size": 12, "length": 16, "pairs": 3}
SIZES = {"val_samples": 18, "test_samples": 23, "train_samples": 16}
"""Held-out samples neither fill their batches of 4, nor these (in val) two processes. Those to
train on come around again within a phase of 3 steps of 8."""


def task(batch_size: int) -> MQAR:
    return MQAR(**SMALL, **SIZES, batch_size=batch_size, reach=9)


def phases(batch_size: int) -> Continual:
    tasks: list[Task] = [MQAR(**SMALL, keys=(1, 3)), MQAR(**SMALL, keys=(3, 5))]
    return Continual(tasks=tasks, updates=3, **SIZES, batch_size=batch_size)


class Recorder(LitModel):
    """Keeps the samples that it is trained on."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen.append(batch["tokens"].clone())
        return super().training_step(batch, batch_idx)


def model() -> Recorder:
    seed_everything(0, verbose=False)
    lit = Recorder(
        network=ModelConfig(vocab_size=12, layers=("gated_delta",), dim=16, depth=1), lr=0.01
    )
    lit.seen = []
    return lit


def trainer(world: int, **options: Any) -> Trainer:
    quiet()
    off = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    strategy, off = "ddp" if world > 1 else "auto", dict.fromkeys(off, False)
    how = {"accelerator": "cpu", "devices": world, "strategy": strategy, "precision": "64-true"}
    return Trainer(**how, **off, **options)


def evaluate(world: int) -> dict[str, dict[str, float]]:
    """The figures of an untrained model, which are what they are to the last count."""
    lit, data = model(), task(batch_size=4)
    (val,) = trainer(world).validate(lit, data, verbose=False)
    (test,) = trainer(world).test(lit, data, verbose=False)
    return {"val": dict(val), "test": dict(test)}


def train(world: int) -> dict[str, Any]:
    """Two phases, with as many samples a step whatever the number of processes."""
    lit, data = model(), phases(batch_size=8 // world)
    fitter = trainer(
        world, max_steps=6, val_check_interval=3, num_sanity_val_steps=-1, log_every_n_steps=1
    )
    fitter.fit(lit, data)
    return {
        "seen": torch.stack(lit.seen),
        "weights": {name: weight.detach() for name, weight in lit.named_parameters()},
        "matrix": data.state_dict()["matrix"],
        "figures": {name: float(value) for name, value in fitter.callback_metrics.items()},
    }


# Metrics, on answers with every annotation

METRICS: dict[str, Callable[[], Metric]] = {
    "Accuracy": lambda: Accuracy(0.2),
    "AccuracyBy": lambda: AccuracyBy("lag", (1, 3, 6)),
    "Answers": Answers,
    "Capacity": lambda: Capacity((2, 4)),
    "Collateral": Collateral,
    "ContinualMatrix": lambda: ContinualMatrix(2),
    "ErrorKinds": ErrorKinds,
    "LossByPosition": lambda: LossByPosition(8, 1),
    "MarkedAnswers": MarkedAnswers,
    "Recall": Recall,
    "RecallByLag": lambda: RecallByLag(8, 0.0),
    "SuccessRate": SuccessRate,
    "TokenLoss": lambda: TokenLoss(1),
}


def answers() -> dict[str, Tensor]:
    torch.manual_seed(0)
    N, V = 30, 6
    labels = torch.randint(V, (N,))
    return {
        "logits": torch.randn(N, V) + 2 * torch.nn.functional.one_hot(labels, V),
        "labels": labels,
        "reachable": torch.rand(N) < 0.5,
        "lag": torch.randint(1, 9, (N,)),
        "position": torch.randint(1, 9, (N,)),
        "pairs": 2 * torch.randint(1, 3, (N,)),
        "writes": torch.randint(1, 3, (N,)),
        "old": torch.randint(-1, V, (N, 2)),
        "answer": torch.arange(N) // 2 + (torch.arange(N) >= CUT),  # none in both processes
        "bound": torch.randint(V, (N, 4)),
    }


def update(name: str, metric: Metric, rows: slice) -> None:
    notes = {key: value[rows] for key, value in answers().items()}
    if name == "SuccessRate":
        metric.update(notes["logits"][:, 0])
    elif name == "ContinualMatrix":  # a row at 0, 5, 10 | 15
        for phase, row in ((0, 0), (1, 5), (2, 15)):
            if row in range(30)[rows]:
                metric.update(phase, answers()["logits"][row, :2])
    elif name == "MarkedAnswers":  # two of three labels; the cut is between two answers
        metric.update(**{**notes, "answer": (torch.arange(30) - CUT)[rows] % 3 > 0})
    else:
        metric.update(**notes)


def measure(*parts: slice) -> dict[str, dict[str, float]]:
    """The figures of each metric, after updates with some of the rows."""
    out = {}
    for name, make in METRICS.items():
        metric = make()
        for rows in parts:
            update(name, metric, rows)
        figures = metric.compute()
        figures = figures if isinstance(figures, dict) else {"": figures}
        out[name] = {key: float(value) for key, value in figures.items()}
    return out


def same_everywhere() -> dict[str, float]:
    """The matrix, updated in each process with figures that are already of all."""
    matrix = ContinualMatrix(2)
    for phase, row in enumerate(([0.1, 0.3], [0.7, 0.1], [0.6, 0.9])):
        matrix.update(phase, row)
    return matrix.compute()


class Uneven(Recorder):
    """Its loss is nan in one process alone."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss + float("nan") if batch_idx == 2 and self.global_rank == 1 else loss


def diverge() -> str:
    """What a process says of a loss that is nan in the other."""
    lit = model()
    lit.__class__ = Uneven
    try:
        trainer(WORLD, max_steps=6, limit_val_batches=0, callbacks=[Finite()]).fit(lit, task(2))
    except Diverged as error:
        return str(error)
    return "nothing"


def main(folder: Path, rank: int, environment: dict[str, str]) -> None:
    os.environ.update(environment, LOCAL_RANK=f"{rank}")
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = sys.stderr = open(1, "w", buffering=1)  # noqa: SIM115 (as long as the process)
    torch.set_num_threads(1)
    out: dict[str, Any] = {"evaluate": evaluate(WORLD), "train": train(WORLD)}
    assert torch.distributed.get_world_size() == WORLD
    mine = [slice(CUT), slice(CUT, None)][rank]
    nothing = slice(0, 0)  # as of a batch without labels
    out["measure"] = measure(mine, *[nothing] * rank)
    out["same"] = same_everywhere()
    out["diverged"] = diverge()
    torch.save(out, folder / f"{rank}.pt")
    torch.distributed.barrier()  # a process that goes first can take the other's threads with it
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}", "WORLD_SIZE": f"{WORLD}"}
    where |= {"NODE_RANK": "0", "OMP_NUM_THREADS": "1"}
    how: Any = multiprocessing.get_context("fork" if forks() else "spawn")
    processes = [how.Process(target=main, args=(folder, rank, where)) for rank in range(WORLD)]
    try:
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside other threads
            patch.syspath_prepend(Path(__file__).parents[1])  # where a new process finds `main`
            for process in processes:
                process.start()
        for rank, process in enumerate(processes):
            process.join(240)
            assert process.exitcode == 0, (folder / f"{rank}.log").read_text()
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def test_held_out_figures_are_those_of_one_process(ranks: list[dict[str, Any]]) -> None:
    one = evaluate(1)
    assert one["val"]["recall/queries"] == 18 * 3 and one["test"]["test/recall/queries"] == 23 * 3
    assert 0 < one["test"]["test/recall/accuracy"] < 1
    assert 0 < one["test"]["test/recall/ceiling"] < 1
    assert {"test/recall_lag/4", "test/loss/held_out"} <= one["test"].keys()
    for out in ranks:
        for split in ("val", "test"):
            assert out["evaluate"][split] == pytest.approx(one[split], rel=1e-6)


def test_training_is_that_of_one_process_with_batches_twice_as_large(
    ranks: list[dict[str, Any]],
) -> None:
    one = train(1)
    together = torch.cat([out["train"]["seen"] for out in ranks], 1)
    assert one["seen"].shape == (6, 8, 16)
    assert torch.equal(together, one["seen"])
    for out in ranks:
        found = out["train"]
        for name, weight in one["weights"].items():
            torch.testing.assert_close(found["weights"][name], weight, rtol=0, atol=1e-9)
        assert torch.tensor(found["matrix"]).isfinite().all()
        assert found["matrix"] == one["matrix"]
        held_out = {name: x for name, x in one["figures"].items() if name != "loss/train"}
        assert "continual/forward_transfer" in held_out
        for name, value in held_out.items():
            assert found["figures"][name] == pytest.approx(value, rel=1e-6, abs=1e-7), name


def test_every_metric_adds_up_over_processes(ranks: list[dict[str, Any]]) -> None:
    whole = measure(slice(None))
    for out in ranks:
        for name, figures in whole.items():
            assert out["measure"][name] == pytest.approx(figures, rel=1e-6), name
        assert out["same"] == same_everywhere()


def test_a_loss_that_is_nan_in_one_process_ends_both(ranks: list[dict[str, Any]]) -> None:
    """Else the others wait for its gradients."""
    assert [out["diverged"] for out in ranks] == ["loss nan at step 2"] * WORLD


def test_every_exported_metric_is_tried() -> None:
    exported = {name for name in layerzoo.metrics.__all__ if name != Binned.__name__}
    assert exported == METRICS.keys(), "add a new metric to METRICS"


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("samples", [3, 18, 23, 24])
def test_held_out_samples_are_dealt_once(world: int, samples: int) -> None:
    data = MQAR(**SMALL, batch_size=4, val_samples=samples)
    batches = Batches([data], "val", data.order()[: data.batches("val")])
    deals = [ShareOfBatches(batches, rank, world, training=False) for rank in range(world)]
    assert len({len(deal) for deal in deals}) == 1  # else a process waits for another
    scored = []
    for deal in deals:
        for batch in map(batches.__getitem__, deal):
            scored += batch["tokens"][(batch["labels"] != IGNORE).any(1)].tolist()
    assert sorted(scored) == sorted(data.batch("val", range(samples))["tokens"].tolist())


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_batches_of_training(world: int) -> None:
    """Each step has the samples of one process with larger batches; what is left is dropped."""

    def steps(batch_size: int, rank: int, world: int) -> list[list[Any]]:
        data = MQAR(**SMALL, batch_size=batch_size, train_samples=50)
        order = data.order()
        deal = ShareOfBatches(
            batches := Batches([data], "train", order), rank, world, training=True
        )
        return [batches[n]["tokens"].tolist() for n in deal]

    one = steps(4 * world, 0, 1)
    dealt = [steps(4, rank, world) for rank in range(world)]
    assert len(one) == 50 // (4 * world)
    together = [[row for part in step for row in part] for step in zip(*dealt, strict=True)]
    assert together == one
