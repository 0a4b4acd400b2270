"""Runs cells: `run_cell`, and a process that runs those whose folders it reads.

The process reads a folder a line from standard input and answers a line of JSON each on standard
output. When its input ends, its runner is gone or has had enough: it saves a checkpoint and goes.
A cell that raises ends it: the traceback is in the cell's log.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import queue
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from lightning import Callback
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

from layerzoo.spec import Diverged
from layerzoo.support import internals
from layerzoo.train.callbacks import record
from layerzoo.train.checkpoints import Checkpoints, log_missing
from layerzoo.train.command import TrainCLI
from layerzoo.train.find_checkpoint import first_step, newest_checkpoint
from layerzoo.train.finite import refuse_held_out
from layerzoo.train.resumed import check_cell

from .executor import Outcome
from .folder import (
    CELL,
    CHECKPOINTS,
    CONFIG,
    DIVERGED,
    ENDED,
    FAILED,
    LOG,
    METRICS,
    PROGRESS,
    RECORD,
    cell_lock,
    cell_state,
    read_json,
    reason_of,
    write_json,
)

RECORDED_SIZES = ("parameters", "state_bytes", "state_bytes_memory", "flops_per_token", "length")
MEASURED_SUFFIX = ".measured"
"""Ends the name of the events of the last measurement."""


class Stopped(Exception):
    """The runner asked to stop; a checkpoint is saved."""


class ProgressWatch(Callback):
    """Writes the cell's progress about once a second; ends a run that must stop."""

    def __init__(
        self, folder: Path, spent: float, checkpoints: Checkpoints, stop: Callable[[], bool]
    ) -> None:
        self.folder, self.checkpoints, self.stop = folder, checkpoints, stop
        self.last, self.spent, self.started = 0.0, spent, time.monotonic()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.since, self.first = time.monotonic(), trainer.global_step

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        steps, step = trainer.estimated_stepping_batches, trainer.global_step
        if time.monotonic() - self.last > 1:
            self.last = time.monotonic()
            progress = {
                "step": step,
                "steps": steps,
                "loss": float(outputs["loss"]),
                "first": self.first,
                "seconds": self.last - self.since,
                "spent": self.spent + self.last - self.started,
                "host": socket.gethostname(),
            }
            with suppress(OSError):  # a full disk is told by what matters
                write_json(self.folder / PROGRESS, progress)
        self._stop(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn == "fit":
            self._stop(trainer)

    def _stop(self, trainer: Any) -> None:
        """Stop where a checkpoint can be, if asked to."""
        if self.stop() and self.checkpoints.save(trainer):
            raise Stopped


def run_cell(
    folder: Path, every: float, threads: int, stop: Callable[[], bool] = lambda: False
) -> Outcome:
    """Train a cell from where it is, measure it, and write its figures, last of all.

    Args:
        every: seconds between checkpoints. threads: of the CPU.
        stop: asked after each update; if true, a checkpoint is saved and the run ends.

    Raises:
        whatever the cell's code raises.
    """
    torch.set_num_threads(threads)
    with cell_lock(folder) as free:
        if not free:
            return Outcome("busy")
        ended = cell_state(folder)
        if ended in ENDED:  # in another process, meanwhile
            return Outcome(ended, reason_of(folder))
        with _logging_to(folder / LOG):
            try:
                _train_and_measure(folder, every, stop)
                return Outcome("finished")
            except Diverged as error:
                write_json(folder / DIVERGED, {"reason": str(error)})
                return Outcome("diverged", str(error))
            except Stopped:
                return Outcome("stopped")
            finally:
                gc.collect()  # the trainer and its model are cycles


def _train_and_measure(folder: Path, every: float, stop: Callable[[], bool]) -> None:
    started, about = time.monotonic(), read_json(folder / CELL)
    spent = read_json(folder / PROGRESS).get("spent", 0.0)  # by runs that were killed
    checkpoints = folder / CHECKPOINTS
    resume = newest_checkpoint(checkpoints)
    quiet = ("logger", "enable_progress_bar", "enable_model_summary")
    options = (f"--config={folder / CONFIG}", *(f"--trainer.{name}=false" for name in quiet))
    cli = TrainCLI(options, run=False)
    check_cell(cli, about.get("digest"), resume)
    trainer: Any = cli.trainer
    trainer.logger = logger = _logger(folder, purge_step=first_step(resume))
    if resume is not None:
        log_missing(resume, logger)
    keep = Checkpoints(folder=str(checkpoints), seconds=every)
    ours = (Checkpoint, SaveConfigCallback)
    trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, ours)]
    trainer.callbacks += [ProgressWatch(folder, spent, keep, stop), keep]
    trainer.fit(cli.model, cli.datamodule, ckpt_path=resume)
    for stale in folder.glob(
        f"events.*{MEASURED_SUFFIX}"
    ):  # of a run that was killed while it measured
        stale.unlink()
    trainer.logger = _logger(folder, filename_suffix=MEASURED_SUFFIX)
    # The step of what is logged now, which a run that was killed after its training lacks.
    internals.set_logged_step(trainer, trainer.global_step)
    measure = trainer.test if about["split"] == "test" else trainer.validate
    figures, *_ = measure(cli.model, cli.datamodule, verbose=False)  # each part has all
    figures = {name.removeprefix("test/"): value for name, value in figures.items()}
    refuse_held_out(figures, trainer.global_step)
    if not (folder / CELL).is_file():  # a checkpoint may have made the folder again
        raise FileNotFoundError(f"{folder}: was removed while it ran")
    facts = record(cli.model.model, trainer)
    write_json(folder / RECORD, {**facts, "seconds": spent + time.monotonic() - started})
    write_json(
        folder / METRICS,
        {
            **figures,
            "steps": trainer.global_step,
            "chance": getattr(cli.datamodule, "chance", None),
            **{name: facts[name] for name in RECORDED_SIZES},
        },
    )
    last = checkpoints / f"step={trainer.global_step}.ckpt"
    older = [path for path in checkpoints.glob("*.ckpt") if path != last and last.is_file()]
    for path in (folder / FAILED, folder / PROGRESS, *older):
        path.unlink(missing_ok=True)


def _logger(folder: Path, **options: Any) -> TensorBoardLogger:
    return TensorBoardLogger(str(folder), name="", version="", default_hp_metric=False, **options)


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """Everything that the run prints, from any library, goes into its log, tracebacks too."""
    kept = [os.dup(fd) for fd in (1, 2)]
    with open(path, "ab", buffering=0) as log:
        for fd in (1, 2):
            os.dup2(log.fileno(), fd)
    try:
        yield
    finally:
        if sys.exception() is not None:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        for fd, old in zip((1, 2), kept, strict=True):
            os.dup2(old, fd)
            os.close(old)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--every", type=float, required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    folders: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    ended = threading.Event()

    # Raw, and not as sys.stdin: a loader's process closes that when it is forked, and would wait
    # for the lock with which a thread here reads.
    commands = os.fdopen(os.dup(0), "rb", buffering=0)

    def read() -> None:
        for line in commands:
            folders.put(line.decode().rstrip("\n"))
        ended.set()
        folders.put(None)

    threading.Thread(target=read, daemon=True).start()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    with (
        open(os.devnull, encoding="utf-8") as sys.stdin,
        open(os.devnull, "w", encoding="utf-8") as nothing,
    ):
        os.dup2(nothing.fileno(), 1)  # what a library prints between cells is no answer
        while (folder := folders.get()) is not None:
            outcome = run_cell(Path(folder), options.every, options.threads, ended.is_set)
            print(json.dumps(outcome), file=answers, flush=True)


if __name__ == "__main__":
    main()
