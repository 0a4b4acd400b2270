"""Continual learning: tasks one after another, and what is left of the first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from layerzoo.data.random import bits
from layerzoo.data.task import SPLITS, Task
from layerzoo.metrics import ContinualMatrix
from layerzoo.spec import require

if TYPE_CHECKING:
    from layerzoo.model import LanguageModel

ACCURACY = ("recall/accuracy", "accuracy/all")
"""What R is made of: the first of these that a task has."""
SHARED = [field.name for field in Task.Config.fields()]
"""The options that all tasks have."""


class Continual(Task):
    """K tasks, each for as many updates, without replay; after each phase all are evaluated.

    Held-out figures are each task's, `figure/task=j` for j = 1..K, their means, and those of the
    matrix R[i, j], the accuracy on task j after i phases (see `ContinualMatrix`). A phase ends
    every `updates` steps; validate there (`trainer.val_check_interval: <updates>`,
    `trainer.max_steps: <K * updates>`). Row 0, the untrained model, is measured by a whole sanity
    check (`trainer.num_sanity_val_steps: -1`); one of a few batches does not count. R is part of
    the checkpoint: `validate` and `test` log it, as training left it on the validation split,
    beside each task's figures on their own split, and do not change it.

    Controls, on the same samples: `interleaved` and `joint`, in which a phase is only a span of
    updates: there is forgetting, but no transfer, because no task has a phase of its own; and
    `only`, which trains and evaluates a single task, so that R holds the baseline and what its
    phase reaches when no other came before, at the same place [j, j].
    """

    class Config(Task.Config):
        tasks: Sequence[Task]
        """Each phase is one of these tasks. They take batch_size, the numbers of samples,
        shuffled and num_workers from here, and seeds hashed from this seed and j, so that runs
        of one seed are paired."""
        updates: int = 200
        """A phase has this many optimiser steps."""
        order: Literal["phases", "interleaved", "joint"] = "phases"
        """One task follows another (phases), the tasks take turns, an update each (interleaved),
        or the same updates are shuffled (joint)."""
        only: int | None = None
        """The model is trained on the task of this number, counted from 1, alone, for `updates`
        steps."""

        def check(self) -> None:
            super().check()
            K = len(self.tasks)
            require(K >= 2, f"tasks: needs at least two, one a phase, got {K}")
            require(self.updates >= 1, f"updates: must be at least 1, got {self.updates}")
            if self.only is not None:
                require(1 <= self.only <= K, f"only: must be in 1..{K}, got {self.only}")
                phases = self.order == "phases"
                require(phases, f"only: one task has no order, got {self.order}")
            require(not self.lengths, "lengths: not for phases; give each task its length")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        tasks, only = config.tasks, config.only
        for j, task in enumerate(tasks, 1):
            self._check(f"tasks: {j}", task)
        self.tasks = {f"task={j}": self._own(j, task) for j, task in enumerate(tasks, 1)}
        if only is not None:
            self.tasks = {f"task={only}": self.tasks[f"task={only}"]}
        self.updates, self.sequence, self.only = config.updates, config.order, only
        self.vocab_size = max(task.vocab_size for task in tasks)
        self.length = max(task.length for task in tasks)
        # Each process updates it with figures that are of all already.
        self.matrix = ContinualMatrix(len(tasks), sync_on_compute=False)

    def _check(self, place: str, task: Task) -> None:
        name = type(task).__name__
        self.require(not isinstance(task, Continual), f"{place}: phases cannot have phases")
        self.require(
            all([*task.parts(split).values()] == [task] for split in SPLITS),
            f"{place}: {name} is of several parts here (lengths, or a setting that is a mix); "
            "a phase is of one",
        )
        self.require(
            type(task).readout is Task.readout,
            f"{place}: {name} trains a head of its own, which the phases cannot share",
        )
        defaults = {field.name: field.default for field in task.Config.fields()}
        for option in SHARED:
            given = getattr(task.given, option)
            self.require(
                given in (defaults[option], getattr(self.config, option)),
                f"{place}: {option}: {given}; set it for all tasks, beside tasks",
            )

    def _own(self, j: int, task: Task) -> Task:
        """The j-th task, with the options of all and a seed of its own."""
        shared = {option: getattr(self.config, option) for option in SHARED}
        seed = int(bits(self.seed, j)[0] >> np.uint64(32))
        return type(task)(**{**task.given.field_values(), **shared, "seed": seed})

    @property
    def chance(self) -> float | None:
        """The mean over the tasks, if each has one."""
        chances = [task.chance for task in self.tasks.values()]
        known = [chance for chance in chances if chance is not None]
        return sum(known) / len(known) if len(known) == len(chances) else None

    def divide(self, split: str) -> dict[str, Task]:
        return self.tasks

    def digest(self) -> dict[str, str]:
        """Of all tasks that are trained: `tasks.<j>.<option>`."""
        return {
            f"tasks.{part.removeprefix('task=')}.{option}": found
            for part, task in self.tasks.items()
            for option, found in task.digest().items()
        }

    def order(self) -> NDArray[np.int64]:
        """The part of each training batch; the batches of an update, in all processes, are of
        one part."""
        K = len(self.tasks)
        steps = np.repeat(np.arange(K), self.updates)
        if self.sequence == "interleaved":
            steps = np.tile(np.arange(K), self.updates)
        elif self.sequence == "joint":
            steps = steps[np.argsort(bits(self.seed, len(SPLITS), np.arange(len(steps))))]
        return np.repeat(steps, self._batches_an_update())

    def _batches_an_update(self) -> int:
        trainer = self.trainer
        return trainer.world_size * trainer.accumulate_grad_batches if trainer else 1

    def setup(self, stage: str | None = None) -> None:
        for task in self.tasks.values():
            task.setup(stage or "fit")
        trainer: Any = self.trainer
        if stage == "fit":
            self.matrix.reset()  # of an earlier run; a resumed one loads its own after this
        if stage == "fit" and trainer is not None and not trainer.fast_dev_run:
            self._check_trainer(trainer)

    def _check_trainer(self, trainer: Any) -> None:
        steps = len(self.tasks) * self.updates
        self.require(
            trainer.max_steps == steps,
            f"updates: {self.updates} in each of {len(self.tasks)} phases are {steps} steps; set "
            f"trainer.max_steps to {steps}, got {trainer.max_steps}",
        )
        phase = self.updates * trainer.accumulate_grad_batches
        interval = trainer.val_check_interval
        self.require(
            isinstance(interval, int) and phase % interval == 0,
            f"updates: every phase ends with a validation; set trainer.val_check_interval to "
            f"{phase} batches, got {interval}",
        )

    def attach(self, model: LanguageModel) -> None:
        super().attach(model)
        for task in self.tasks.values():
            task.attach(model)

    def summary(
        self, split: str, results: dict[str, dict[str, Tensor]]
    ) -> dict[str, Tensor | float]:
        """Each task's figures, their means, and the matrix's."""
        phase = self._phase(split)
        if phase is not None:
            self.matrix.update(phase, self._row(results))
        out = super().summary(split, results)
        if len(results) == 1:
            out |= {f"{name}/task={self.only}": value for name, value in out.items()}
        figures = self.matrix.compute() if self.matrix.update_called else {}
        if self.sequence != "phases":
            figures = {name: x for name, x in figures.items() if not name.endswith("_transfer")}
        return {**out, **figures}

    def _phase(self, split: str) -> int | None:
        """The row of the matrix that a validation now belongs to, if to any."""
        trainer = self.trainer
        if trainer is None or split != "val" or trainer.state.fn != "fit":
            return None
        if trainer.sanity_checking:
            whole = trainer.num_sanity_val_batches == trainer.num_val_batches
            return 0 if whole else None
        phase, rest = divmod(trainer.global_step, self.updates)
        if rest or not phase:
            return None
        return phase if self.only is None else self.only

    def _row(self, results: dict[str, dict[str, Tensor]]) -> list[float]:
        row = [math.nan] * self.matrix.phases
        for part, figures in results.items():
            j = int(part.removeprefix("task="))
            known = [float(figures[name]) for name in ACCURACY if name in figures]
            self.require(bool(known), f"tasks: {j}: has no accuracy, only {', '.join(figures)}")
            row[j - 1] = known[0]
        return row

    def state_dict(self) -> dict[str, Any]:
        return {"matrix": self.matrix.accuracies.tolist()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        rows = state_dict["matrix"]
        self.require(
            len(rows) == self.matrix.phases + 1,
            f"tasks: {self.matrix.phases}, but the checkpoint is of {len(rows) - 1}",
        )
        self.matrix.reset()
        for phase, row in enumerate(rows):
            self.matrix.update(phase, row)

    def predict_dataloader(self) -> DataLoader[Any]:
        """The test splits of all tasks, one after another."""
        parts = [*self.parts("test").values()]
        counts = [part.batches("test") for part in parts]
        return self._loader(parts, "test", np.repeat(np.arange(len(parts)), counts))
