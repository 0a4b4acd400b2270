"""A cell's folder: its files, its lock, and what they say of the cell."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import yaml
from portalocker import AlreadyLocked, LockFlags, lock

from layerzoo.spec import SpecError
from layerzoo.support.json_files import write_json

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
"""The reason: step and tensor that was not finite. The same run would diverge again."""
FAILED = "failed.json"
"""The reason of the last failure; the next run tries again."""
PROGRESS = "progress.json"
"""Step, loss and seconds spent, written about once a second while it runs."""
CELLS = "cells.json"
"""In the grid's folder: all its cells, each what CELL holds and its path."""
CHECKPOINTS, LOG, LOCK = "checkpoints", "log.txt", ".lock"

State = Literal["finished", "diverged", "running", "failed", "started", "pending"]
STATES: tuple[State, ...] = ("finished", "diverged", "running", "failed", "started", "pending")
"""Every end of a cell is one of these, whatever ended it; README.md says who sets which."""
ENDED: tuple[Literal["finished"], Literal["diverged"]] = ("finished", "diverged")
"""For good: no run tries these again."""


def read_json(path: Path) -> dict[str, Any]:
    """What a file of `write_json` holds; {} if there is none, or it is damaged: what it said is
    found out again. Of figures, `floats` makes numbers again."""
    return _read_whole(path) or {}


def _read_whole(path: Path) -> dict[str, Any] | None:
    """A file's tree; None of one that is missing or damaged."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return tree if isinstance(tree, dict) else None


def prepare_folder(cell: Cell, out: Path) -> Path:
    """Make the cell's folder, or what it has lost of its first two files.

    Raises:
        SpecError: it is there, but is another's.
    """
    folder = out / cell.path
    about = read_json(folder / CELL)
    if about and about["identity"] != cell.identity:
        raise SpecError(f"{folder}: is of another config; give another --out")
    if not about and folder.is_dir() and not all(_is_ours(path.name) for path in folder.iterdir()):
        raise SpecError(f"{folder}: is not a cell's folder; give another --out")
    folder.mkdir(parents=True, exist_ok=True)
    if not about or not (folder / CONFIG).is_file():
        (folder / CONFIG).write_text(
            yaml.safe_dump(cell.config, sort_keys=False), encoding="utf-8"
        )
    if not about:
        write_json(folder / CELL, cell_facts(cell))
    return folder


def _is_ours(name: str) -> bool:
    """Whether a file is one that cells have."""
    known = (CONFIG, CELL, METRICS, RECORD, DIVERGED, FAILED, PROGRESS, CHECKPOINTS, LOG, LOCK)
    logged = name == "hparams.yaml" or name.startswith("events.") or name.endswith(".png")
    return name in known or logged or name.endswith(".part")


def cell_facts(cell: Cell) -> dict[str, Any]:
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
def cell_lock(folder: Path) -> Iterator[bool]:
    """Hold the cell's lock; False if another process holds it. It goes with its process."""
    with open(folder / LOCK, "w", encoding="utf-8") as file:
        try:
            lock(file, LockFlags.EXCLUSIVE | LockFlags.NON_BLOCKING)
        except AlreadyLocked:
            yield False
            return
        yield True


def cell_state(folder: Path) -> State:
    """What the folder says of its cell; a lock that is held says that it runs."""
    if _read_whole(folder / METRICS) is not None:
        return "finished"
    if _read_whole(folder / DIVERGED) is not None:
        return "diverged"
    if _is_held(folder / LOCK):
        return "running"
    if (folder / FAILED).is_file():
        return "failed"
    return "started" if any((folder / CHECKPOINTS).glob("*.ckpt")) else "pending"


def reason_of(folder: Path) -> str:
    """Why its cell has no figures; empty if it has, or has not ended."""
    name = {"diverged": DIVERGED, "failed": FAILED}.get(cell_state(folder))
    return str(read_json(folder / name).get("reason", "unknown")) if name else ""


def _is_held(path: Path) -> bool:
    """Whether a process holds the lock. Reading is enough to tell."""
    try:
        with open(path, encoding="utf-8") as file:
            lock(file, LockFlags.SHARED | LockFlags.NON_BLOCKING)
    except FileNotFoundError:
        return False
    except AlreadyLocked:
        return True
    return False
