"""What a killed run goes on from, exactly: random state, atomic files, when to save."""

from __future__ import annotations

import io
import os
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from layerzoo.spec import Config, require
from layerzoo.support import internals
from layerzoo.support.configured import Configured


class Resume(Callback):
    """What Lightning lacks for a resumed run to be the uninterrupted one, bit by bit.

    The random state of torch (CPU and every CUDA device), NumPy and Python is in every checkpoint,
    one of each process. It is put back just before the first batch, because what starts a run
    draws random numbers, too."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.states: Sequence[dict[str, Any]] = []  # of an earlier run; a resumed one loads after

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        loop = trainer.fit_loop
        # The schedule asks how many steps there will be, which makes the loader before its state
        # is known. (The loader's pass has not begun yet.)
        internals.load_loader_states(loop)
        epochs = loop.epoch_progress.current
        if loop.restarted_mid_epoch and epochs.processed == epochs.ready:
            # It was saved after an epoch's last batch, so that another begins, and is counted.
            loop.reset_restart_stage()

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_rank < len(self.states):
            _set_random(self.states[trainer.global_rank])
        self.states = []

    def state_dict(self) -> dict[str, Any]:
        states = [_random()]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            states *= torch.distributed.get_world_size()
            torch.distributed.all_gather_object(states, states[0])
        return {"states": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.states = state_dict["states"]


def _random() -> dict[str, Any]:
    """In types that torch.load reads with weights_only."""
    numpy: Any = np.random.get_state(legacy=False)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": {**numpy, "state": {**numpy["state"], "key": numpy["state"]["key"].tolist()}},
        "python": random.getstate(),
    }


def _set_random(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    devices = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
    for device, cuda in zip(range(devices), state["cuda"], strict=False):
        torch.cuda.set_rng_state(cuda, device)
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])


class AtomicIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, down to the disk, and then renames it: whatever
    happens meanwhile, the place holds the old file or the new one, whole."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        if "://" in str(path):  # another file system than the disk's
            return super().save_checkpoint(checkpoint, path, storage_options)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        whole = io.BytesIO()
        torch.save(checkpoint, whole)  # into a full disk it would not raise the OSError
        try:
            with open(part, "wb") as file:
                file.write(whole.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


class Checkpoints(Configured, Checkpoint):
    """Saves what a killed run goes on from, and only where a resumed run does what an
    uninterrupted one does: after an optimiser step, and if a validation follows, after that.

    The end of training is always saved. A full disk is a warning; training goes on, with the older
    checkpoints.
    """

    class Config(Config):
        folder: str | None = None
        """The checkpoints `step=<N>.ckpt`, after N optimiser steps, lie in this folder; null is
        `checkpoints` beside the logs."""
        seconds: float = 60.0
        """A checkpoint is saved when the last one is this old."""
        steps: int | None = None
        """A checkpoint is also saved after every so many optimiser steps."""
        keep: int = 2
        """So many of the newest checkpoints stay."""

        def check(self) -> None:
            super().check()
            for name in ("steps", "keep"):
                value = getattr(self, name)
                require(value is None or value >= 1, f"{name}: must be at least 1, got {value}")

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.unlogged: dict[str, Any] = {}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        folder = self.config.folder or os.path.join(
            trainer.log_dir or trainer.default_root_dir, "checkpoints"
        )
        self.folder = Path(trainer.strategy.broadcast(str(folder)))
        if stage == "fit" and trainer.is_global_zero:
            for part in self.folder.glob(".step=*.ckpt.part"):  # of a process that was killed
                part.unlink()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.last, self.due, self.step = time.monotonic(), False, trainer.global_step

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        self.due |= trainer.strategy.broadcast(time.monotonic() - self.last >= self.config.seconds)
        steps = self.config.steps
        if steps is not None and not internals.accumulates(trainer.fit_loop):
            self.due |= step % steps == 0
        # What ends a run at `max_steps` also ends Lightning's epoch, which a longer run does not.
        self.due |= step == trainer.max_steps
        if self.due:
            self.save(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self.due:
            self.save(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.step != trainer.global_step:
            self._write(trainer, {})

    def state_dict(self) -> dict[str, Any]:
        return {"unlogged": self.unlogged}

    def save(self, trainer: Any) -> bool:
        """Save now, for a callback that asks in `on_train_batch_end` or `on_validation_end`.

        Returns:
            whether there is a checkpoint of this step. There is none where a resumed run would
            lose accumulated gradients or a validation that is due (ask again at the next of
            these hooks), nor if the disk is full.
        """
        if internals.accumulates(trainer.fit_loop.epoch_loop) or trainer.sanity_checking:
            return False
        if trainer.training and internals.validation_is_due(trainer):
            return False
        return self._write(trainer, _unlogged(trainer))

    def _write(self, trainer: Any, unlogged: dict[str, Any]) -> bool:
        path = self.folder / f"step={trainer.global_step}.ckpt"
        self.last, self.due, self.unlogged = time.monotonic(), False, unlogged
        try:
            trainer.save_checkpoint(path)
        except OSError as error:
            rank_zero_warn(f"checkpoint {path}: {error.strerror}: not saved; training goes on")
            trainer.strategy.barrier("Trainer.save_checkpoint")  # where the other processes wait
            return False
        self.step = trainer.global_step
        if trainer.is_global_zero:
            others = {file: file.stat().st_mtime_ns for file in self.folder.glob("step=*.ckpt")}
            del others[path]  # which is one of those that stay
            newest = sorted(others, key=others.__getitem__, reverse=True)
            for old in newest[self.config.keep - 1 :]:
                old.unlink()
        return True


def _unlogged(trainer: Any) -> dict[str, Any]:
    """What Lightning logs once the callbacks of a batch, or of a validation, have returned: a
    process that is killed before never does. {step, values}, or empty."""
    logs = internals.logged(trainer)
    if trainer.training and not logs.should_update_logs:
        return {}
    values = {name: float(value) for name, value in logs.metrics["log"].items()}
    step = internals.logged_step(trainer)
    return {"step": step, "values": {**values, "epoch": float(trainer.current_epoch)}}


def log_missing(checkpoint: Path, logger: TensorBoardLogger) -> None:
    """Log what the run that saved a checkpoint was killed before it could log, into the same
    folder."""
    unlogged = torch.load(checkpoint, weights_only=True)["callbacks"]["Checkpoints"]["unlogged"]
    if not unlogged:
        return
    events = EventAccumulator(logger.log_dir, size_guidance={"scalars": 0}).Reload()
    logged = {
        tag
        for tag in events.Tags()["scalars"]
        if unlogged["step"] in (event.step for event in events.Scalars(tag))
    }
    values = {tag: value for tag, value in unlogged["values"].items() if tag not in logged}
    logger.log_metrics(values, unlogged["step"])
    logger.save()


WORDS = ("last", "best", "hpc", "registry")
"""What Lightning takes for a checkpoint's path; the last two mean nothing here."""
