"""Continual learning: the matrix against figures by hand, and phases end to end."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from layerzoo import SpecError
from layerzoo.cli import main
from layerzoo.data import MQAR, Continual, Text
from layerzoo.metrics import ContinualMatrix
from layerzoo.model import LanguageModel
from layerzoo.support.yaml_files import config_path
from layerzoo.train.command import TrainCLI

R = [
    [0.90, 0.20, 0.30],  # the baseline; task 1 is better here than ever after
    [0.80, 0.30, 0.40],
    [0.85, 0.90, 0.50],
    [0.70, 0.50, 0.95],
]
FORWARD = ((0.30 - 0.20) + (0.50 - 0.30)) / 2
SUMMARY = {
    "continual/forgetting_max_minus_last/task=1": 0.85 - 0.70,
    "continual/forgetting_max_minus_last/task=2": 0.90 - 0.50,
    "continual/forgetting_max_minus_last": 0.275,
    "continual/backward_transfer": ((0.70 - 0.80) + (0.50 - 0.90)) / 2,
    "continual/average_accuracy": (0.70 + 0.50 + 0.95) / 3,
}


def figures(*phases: int, rows: Any = R) -> dict[str, float]:
    matrix = ContinualMatrix(3)
    for phase in phases:
        matrix.update(phase, rows[phase])
    return matrix.compute()


def entries(*phases: int) -> dict[str, float]:
    return {f"continual_matrix/phase={i}/task={j + 1}": R[i][j] for i in phases for j in range(3)}


def test_the_matrix_by_hand() -> None:
    known = {**entries(0, 1, 2, 3), **SUMMARY, "continual/forward_transfer": FORWARD}
    assert figures(0, 1, 2, 3) == pytest.approx(known)
    assert figures(3, 0, 2, 0, 1) == figures(0, 1, 2, 3)  # the order of updates does not matter
    with pytest.raises(ValueError, match="phases: must be at least 2"):
        ContinualMatrix(1)


def test_a_figure_is_there_once_all_of_it_is_known() -> None:
    assert figures(1, 2, 3) == pytest.approx({**entries(1, 2, 3), **SUMMARY})
    assert figures(1) == pytest.approx(entries(1))
    known = {**entries(0, 1, 2), "continual/forward_transfer": FORWARD}
    assert figures(0, 1, 2) == pytest.approx(known)
    last = {"continual/average_accuracy": SUMMARY["continual/average_accuracy"]}
    assert figures(0, 3) == pytest.approx({**entries(0, 3), **last})
    holed = [row.copy() for row in R]
    holed[2][0] = math.nan  # max over i is not known for task 1, nor the mean over tasks
    out = figures(0, 1, 2, 3, rows=holed)
    assert "continual_matrix/phase=2/task=1" not in out and "continual/backward_transfer" in out
    names = [name for name in out if "forgetting" in name]
    assert names == ["continual/forgetting_max_minus_last/task=2"]


def test_what_is_not_measured_leaves_what_is_known() -> None:
    matrix = ContinualMatrix(2)
    matrix.update(1, torch.tensor([0.5, math.nan]))
    matrix.update(1, torch.tensor([math.nan, 0.25]))
    matrix.update(1, torch.tensor([0.75, math.nan]))
    assert matrix.compute() == {
        "continual_matrix/phase=1/task=1": 0.75,
        "continual_matrix/phase=1/task=2": 0.25,
    }


# The task

SMALL: dict[str, Any] = {"length": 16, "pairs": 2}


def children() -> list[Any]:
    return [
        MQAR(vocab_size=32, keys=(1, 7), **SMALL),
        MQAR(vocab_size=32, keys=(8, 15), **SMALL),
        MQAR(vocab_size=64, length=24, pairs=3),
    ]


def continual(**options: Any) -> Continual:
    return Continual(**{"tasks": children(), "updates": 4, "batch_size": 8, **options})


def test_every_task_has_as_many_updates_in_every_order() -> None:
    orders = {name: continual(order=name).order() for name in ("phases", "interleaved", "joint")}
    for order in orders.values():
        assert np.bincount(order).tolist() == [4, 4, 4]
    assert orders["phases"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert orders["interleaved"].tolist() == [0, 1, 2] * 4
    assert len({tuple(order) for order in orders.values()}) == 3
    assert continual(order="joint").order().tolist() == orders["joint"].tolist()
    assert continual(order="joint", seed=1).order().tolist() != orders["joint"].tolist()
    assert continual(only=2).order().tolist() == [0] * 4


@pytest.mark.parametrize("order", ["phases", "interleaved", "joint"])
def test_an_update_is_of_one_task_in_all_processes(order: Any) -> None:
    task, alone = continual(order=order), continual(order=order)
    task.trainer = SimpleNamespace(world_size=2, accumulate_grad_batches=3)  # type: ignore[assignment]
    updates = task.order().reshape(-1, 6)
    assert (updates == updates[:, :1]).all()
    assert updates[:, 0].tolist() == alone.order().tolist()


def test_runs_of_one_seed_are_paired() -> None:
    def tokens(task: Continual, j: str) -> torch.Tensor:
        return task.parts("train")[f"task={j}"].batch("train", range(8))["tokens"]

    first = continual()
    for arm in (continual(), continual(order="joint"), continual(only=2)):
        assert torch.equal(tokens(arm, "2"), tokens(first, "2"))
    assert not torch.equal(tokens(continual(seed=1), "2"), tokens(first, "2"))
    same = continual(tasks=[MQAR(vocab_size=32, **SMALL)] * 3)
    seeds = {part.seed for part in same.parts("train").values()}
    seeds |= {part.seed for part in continual(seed=1).parts("train").values()}
    assert len(seeds) == 6  # j of one seed is never j - 1 of the next


def test_what_the_tasks_have_in_common() -> None:
    task = continual(val_samples=5, shuffled=True)
    assert (task.vocab_size, task.length) == (64, 24)
    assert task.chance == pytest.approx((2 / 32 + 2 / 32 + 2 / 64) / 3)
    for part in task.parts("val").values():
        assert part.batch_size == 8 and part.samples["val"] == 5 and part.shuffled
    assert task.parts("val")["task=3"].length == 24
    counts = [len(batch["tokens"]) for batch in continual(test_samples=9).predict_dataloader()]
    assert counts == [8, 1] * 3
    preset = continual(tasks=[MQAR(setting="figure2/128x8"), MQAR(setting="figure2/64x4")])
    assert [part.length for part in preset.parts("train").values()] == [128, 64]


class Sized(MQAR):
    """Has a batch size of its own by default, which is not one that the user asks for."""

    class Config(MQAR.Config):
        batch_size: int = 3


class Headed(MQAR):
    def readout(self, model: LanguageModel) -> nn.Module | None:
        return nn.Identity()


def test_a_tasks_own_default_is_no_contradiction() -> None:
    task = continual(tasks=[Sized(), Sized(batch_size=8)])
    assert [part.batch_size for part in task.parts("train").values()] == [8, 8]
    with pytest.raises(SpecError, match=r"tasks: 2: batch_size: 4; set it for all tasks"):
        continual(tasks=[Sized(), Sized(batch_size=4)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": []}, "tasks: needs at least two, one a phase, got 0"),
        ({"tasks": children()[:1]}, "tasks: needs at least two"),
        ({"updates": 0}, "updates: must be at least 1"),
        ({"only": 4}, r"only: must be in 1..3, got 4"),
        ({"only": 1, "order": "joint"}, "only: one task has no order, got joint"),
        ({"lengths": [16]}, "lengths: not for phases"),
        ({"tasks": [MQAR(), MQAR(lengths=[64])]}, "tasks: 2: MQAR is of several parts"),
        ({"tasks": [MQAR(setting="recall-memory"), MQAR()]}, "tasks: 1: MQAR is of several parts"),
        ({"tasks": [MQAR(), continual()]}, "tasks: 2: phases cannot have phases"),
        ({"tasks": [MQAR(), Headed()]}, "tasks: 2: Headed trains a head of its own"),
        ({"tasks": [MQAR(), MQAR(seed=1)]}, "tasks: 2: seed: 1; set it for all tasks"),
    ],
)
def test_bad_input_is_one_clear_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=f"data: Continual: {message}") as error:
        continual(**options)
    assert "\n" not in str(error.value)


def at(fn: str, step: int, checked: int | None = None) -> Any:
    """A trainer in a validation, or in a sanity check of so many batches of three a task."""
    return SimpleNamespace(
        state=SimpleNamespace(fn=fn),
        global_step=step,
        sanity_checking=checked is not None,
        num_sanity_val_batches=[checked] * 3,
        num_val_batches=[3] * 3,
    )


@pytest.mark.parametrize(
    ("trainer", "split", "row"),
    [
        (at("fit", 4), "val", 1),
        (at("fit", 12), "val", 3),
        (at("fit", 6), "val", None),  # in the middle of a phase
        (at("fit", 0, checked=3), "val", 0),
        (at("fit", 0, checked=2), "val", None),
        (at("fit", 0), "val", None),
        (at("validate", 4), "val", None),  # of a model that may be any
        (at("test", 4), "test", None),
    ],
)
def test_an_evaluation_is_a_row_or_none(trainer: Any, split: str, row: int | None) -> None:
    task = continual()
    task.trainer = trainer
    figures = task.summary(
        split, {f"task={j}": {"recall/accuracy": torch.ones(())} for j in (1, 2, 3)}
    )
    rows = {
        int(name.split("/")[1].removeprefix("phase="))
        for name in figures
        if name.startswith("continual_matrix")
    }
    assert rows == ({row} - {None})
    assert figures["recall/accuracy"] == 1


def test_a_task_without_accuracy_is_refused_when_it_is_evaluated() -> None:
    task = continual(tasks=[MQAR(**SMALL), Text()])
    task.trainer = at("fit", 4)
    results = {
        "task=1": {"recall/accuracy": torch.tensor(0.5)},
        "task=2": {"loss": torch.tensor(1.0)},
    }
    with pytest.raises(SpecError, match="tasks: 2: has no accuracy, only loss"):
        task.summary("val", results)


def test_a_second_run_begins_with_an_empty_matrix() -> None:
    task = continual()
    task.matrix.update(3, [0.1, 0.2, 0.3])
    task.setup("test")
    assert task.matrix.update_called
    task.setup("fit")
    assert not task.matrix.update_called and task.matrix.accuracies.max() == -math.inf


def test_a_checkpoint_of_other_phases_is_refused() -> None:
    with pytest.raises(SpecError, match="tasks: 3, but the checkpoint is of 2"):
        continual().load_state_dict({"matrix": [[0.0, 0.0]] * 3})


# End to end

QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
TINY = [
    *("--data.init_args.updates", "4", "--trainer.max_steps", "12"),
    *("--data.init_args.batch_size", "8", "--data.init_args.val_samples", "20"),
    *("--data.init_args.test_samples", "20", "--data.init_args.train_samples", "24"),
    *("--model.network.dim", "16", "--model.network.depth", "1"),
    *("--trainer.callbacks.init_args.save_top_k", "-1"),
]


def run(folder: Path, *options: str, command: str = "fit") -> dict[str, list[float]]:
    """What a run logs, by name."""
    where = ["--trainer.logger.init_args.save_dir", str(folder)]
    where += ["--trainer.logger.init_args.name", "", "--trainer.logger.init_args.version", ""]
    assert main([command, "--config", "continual", *TINY, *where, *QUIET, *options]) == 0
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def matrix(checkpoint: Path) -> list[list[float]]:
    return torch.load(checkpoint, weights_only=True)["Continual"]["matrix"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[float]]]:
    folder = tmp_path_factory.mktemp("whole")
    return folder / "checkpoints", run(folder)


def test_rows_are_the_evaluations_at_the_ends_of_the_phases(whole: Any, tmp_path: Path) -> None:
    checkpoints, logged = whole
    rows = matrix(checkpoints / "last.ckpt")
    assert len(rows) == 4 and np.isfinite(rows).all()
    for i in (1, 2, 3):
        assert rows[i] == pytest.approx(
            [logged[f"recall/accuracy/task={j}"][i - 1] for j in (1, 2, 3)]
        )
        for j in (1, 2, 3):  # known from the end of phase i on
            assert logged[f"continual_matrix/phase={i}/task={j}"] == pytest.approx(
                [rows[i][j - 1]] * (4 - i)
            )
    assert logged["continual_matrix/phase=0/task=1"] == pytest.approx([rows[0][0]] * 3)
    by_hand = ContinualMatrix(3)
    for i, row in enumerate(rows):
        by_hand.update(i, row)
    for name, value in by_hand.compute().items():
        assert logged[name][-1] == pytest.approx(value, abs=1e-6)
    assert len(logged["continual/forgetting_max_minus_last"]) == 1
    assert len(logged["continual/forward_transfer"]) == 2
    # What a later look at the model says, which itself leaves the matrix alone.
    options = ("--ckpt_path", str(checkpoints / "epoch=0-step=8.ckpt"))
    again = run(tmp_path, *options, command="validate")
    assert [again[f"recall/accuracy/task={j}"] for j in (1, 2, 3)] == [
        pytest.approx([value]) for value in rows[2]
    ]
    assert again["continual_matrix/phase=2/task=1"] == pytest.approx([rows[2][0]])
    assert "continual_matrix/phase=3/task=1" not in again


def test_the_matrix_goes_on_in_a_resumed_run(whole: Any, tmp_path: Path) -> None:
    checkpoints, _ = whole
    assert matrix(checkpoints / "epoch=0-step=4.ckpt")[2] == [-math.inf] * 3
    run(tmp_path, "--ckpt_path", str(checkpoints / "epoch=0-step=4.ckpt"))
    again = matrix(tmp_path / "checkpoints" / "last.ckpt")
    assert again == matrix(checkpoints / "last.ckpt")


def test_test_logs_the_matrix_of_training_beside_its_own_figures(
    whole: Any, tmp_path: Path
) -> None:
    checkpoints, logged = whole
    options = ("--ckpt_path", str(checkpoints / "last.ckpt"), "--data.init_args.test_samples", "1")
    tested = run(tmp_path, *options, command="test")
    names = [name for name in logged if name.startswith("continual")]
    assert len(names) == 12 + 3 + 3
    for name in names:
        assert tested[f"test/{name}"] == [pytest.approx(logged[name][-1])], name
    own = [tested[f"test/recall/accuracy/task={j}"][0] for j in (1, 2, 3)]
    assert all(4 * value == round(4 * value) for value in own)  # of one sample's four queries
    assert tested["test/recall/accuracy"] == [pytest.approx(np.mean(own))]


def test_options_under_the_cli_are_each_tasks_own() -> None:
    args = ["--config", config_path("continual"), "--data.init_args.batch_size", "16"]
    task = TrainCLI(args, run=False).datamodule
    assert type(task.given) is type(continual().given)
    assert [part.vocab_size for part in task.parts("val").values()] == [32, 64, 128]
    args = ["--config", config_path("mqar"), "--data.init_args.lengths", "32,64"]
    task = TrainCLI(args, run=False).datamodule
    assert [part.length for part in task.parts("test").values()] == [32, 64]


def test_controls_fill_the_same_matrix(tmp_path: Path) -> None:
    only = (
        "--data.init_args.only",
        "2",
        "--trainer.max_steps",
        "4",
        "--trainer.log_every_n_steps",
        "4",
    )
    logged = run(tmp_path / "only", *only)
    names = {name for name in logged if name.startswith("continual")}
    assert names == {"continual_matrix/phase=0/task=2", "continual_matrix/phase=2/task=2"}
    assert logged["continual_matrix/phase=2/task=2"] == logged["recall/accuracy/task=2"]
    assert logged["recall/accuracy/task=2"] == logged["recall/accuracy"]
    logged = run(tmp_path / "joint", "--data.init_args.order", "joint")
    assert (
        "continual/forgetting_max_minus_last" in logged
        and "continual_matrix/phase=3/task=3" in logged
    )
    assert not [name for name in logged if "transfer" in name]


@pytest.mark.parametrize(
    ("options", "way_out"),
    [
        ({"max_steps": 13}, "3 phases are 12 steps; set trainer.max_steps to 12, got 13"),
        ({"val_check_interval": 3}, "set trainer.val_check_interval to 4 batches, got 3"),
        ({"val_check_interval": 1.0}, "set trainer.val_check_interval to 4 batches, got 1.0"),
        ({"val_check_interval": 2}, ""),
        ({"val_check_interval": 8, "accumulate_grad_batches": 2}, ""),
        (
            {"val_check_interval": 5, "accumulate_grad_batches": 3},
            "set trainer.val_check_interval to 12 batches, got 5",
        ),
        ({"max_steps": 1, "fast_dev_run": 1}, ""),
    ],
)
def test_the_trainer_must_fit(options: dict[str, Any], way_out: str) -> None:
    task = continual()
    fits = {"max_steps": 12, "val_check_interval": 4, "accumulate_grad_batches": 1}
    task.trainer = SimpleNamespace(**{**fits, "fast_dev_run": 0, **options})  # type: ignore[assignment]
    task.setup("test")
    if not way_out:
        task.setup("fit")
        return
    with pytest.raises(SpecError, match="data: Continual: updates: ") as error:
        task.setup("fit")
    assert str(error.value).endswith(way_out)
