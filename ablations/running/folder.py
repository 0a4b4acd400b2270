"""A cell's folder: its files, its lock, and what they say of the cell."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import yaml

from layerzoo.spec import SpecError

from ..cells.cell import Cell

CONFIG = "config.yaml"
"""What `layerzoo fit --config` takes."""
CELL = "cell.json"
"""Arm, options, seeds, identity, digests of what it reads. Written last when a folder is made:
without it there is none."""
METRICS = "metrics.json"
"""Figures of the held-out split and sizes; written last of all, so it means finished."""
RECORD = "record.json"
"""Versions, commit, implementations, device, seconds, digests of what it read."""
DIVERGED = "diverged.json"
"""The step at which the loss was not finite; the same run would diverge again."""
FAILED = "failed.json"
"""The reason of the last failure; the next run tries again."""
PROGRESS = "progress.json"
"""Step, loss and seconds spent, written about once a second while it runs."""
CELLS = "cells.json"
"""In the grid's folder: all its cells, each what CELL holds and its path."""
CHECKPOINTS, LOG, LOCK = "checkpoints", "log.txt", ".lock"

State = Literal["finished", "diverged", "running", "failed", "started", "pending"]
STATES: tuple[State, ...] = ("finished", "diverged", "running", "failed", "started", "pending")


def write_json(path: Path, tree: Any) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "w") as file:
            file.write(json.dumps(tree, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> dict[str, Any]:
    """What a file of `write_json` holds; {} if there is none."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}


def prepare(cell: Cell, out: Path) -> Path:
    """Make the cell's folder, unless it is there.

    Raises:
        SpecError: it is there, but is another's.
    """
    folder = out / cell.path
    about = read_json(folder / CELL)
    if about:
        if about["identity"] != cell.identity:
            raise SpecError(f"{folder}: is of another config; give another --out")
        return folder
    if folder.is_dir() and (entry := next(folder.iterdir(), None)) and entry.name != CONFIG:
        raise SpecError(f"{folder}: is not a cell's folder; give another --out")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(yaml.safe_dump(cell.config, sort_keys=False))
    write_json(folder / CELL, about_cell(cell))
    return folder


def about_cell(cell: Cell) -> dict[str, Any]:
    return {
        "arm": cell.arm,
        "options": cell.options,
        "seed": cell.seed._asdict(),
        "split": cell.split,
        "tuned": cell.tuned,
        "matched": cell.matched,
        "digest": cell.digest,
        "identity": cell.identity,
    }


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold the cell's lock; False if another process holds it. It goes with its process."""
    with open(folder / LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def state(folder: Path) -> State:
    """What the folder says of its cell; a lock that is held says that it runs."""
    if (folder / METRICS).is_file():
        return "finished"
    if (folder / DIVERGED).is_file():
        return "diverged"
    if _held(folder / LOCK):
        return "running"
    if (folder / FAILED).is_file():
        return "failed"
    return "started" if any((folder / CHECKPOINTS).glob("*.ckpt")) else "pending"


def _held(lock: Path) -> bool:
    """Whether a process holds the lock. Reading is enough to tell."""
    try:
        with open(lock) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
