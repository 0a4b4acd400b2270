"""How much there is to do in a cell: updates, tokens and held-out batches, without doing it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from layerzoo.data import Task
from layerzoo.spec import SpecError

from ..cells import configs
from ..cells.cell import Cell

TrainerOptions = Mapping[str, Any]


class Work(NamedTuple):
    """updates: of the optimiser. tokens: trained on, by the length of their sequences. held_out:
    batches that are measured, by length; all validations count."""

    updates: int
    tokens: dict[int, float]
    held_out: dict[int, int]


def work_of(cell: Cell) -> Work:
    """What Lightning makes of the cell's `trainer` options, on one device.

    Raises:
        SpecError: training has no end.
    """
    options, task = cell.config.get("trainer") or {}, configs.task_of(cell.config)
    order = task.order()
    epoch = _limited(options.get("limit_train_batches"), len(order))
    accumulate = options.get("accumulate_grad_batches") or 1
    an_epoch = -(-epoch // accumulate)
    updates = _updates(options, an_epoch) if epoch else 0
    whole, rest = divmod(updates, max(1, an_epoch))
    batches = whole * epoch + min(epoch, rest * accumulate)
    share = np.bincount(order[: min(batches, epoch)], minlength=1) / max(1, min(batches, epoch))
    tokens = Counter[int]()
    for part, of_all in zip(task.parts("train").values(), share, strict=False):
        tokens[part.length] += of_all * batches * task.batch_size * part.length
    val = _held_out(task, "val", options.get("limit_val_batches"))
    sanity = options.get("num_sanity_val_steps")
    sanity = 2 if sanity is None else sanity  # Lightning's default
    last = _held_out(task, cell.split, options.get(f"limit_{cell.split}_batches"))
    held_out = Counter[int]()
    for length, count in val:
        held_out[length] += count * _validations(options, batches, epoch)
        held_out[length] += count if sanity == -1 else min(sanity, count)
    for length, count in last:
        held_out[length] += count
    return Work(updates, dict(tokens), dict(held_out))


def _limited(limit: float | None, batches: int) -> int:
    """Lightning's limit: a number of batches, or a share of them."""
    if isinstance(limit, int):
        return min(limit, batches)
    return batches if limit is None else int(limit * batches)


def _held_out(task: Task, split: str, limit: float | None) -> list[tuple[int, int]]:
    """(length, batches) of every part of a split."""
    parts = task.parts(split).values()
    return [(part.length, _limited(limit, part.batches(split))) for part in parts]


def _updates(options: TrainerOptions, an_epoch: int) -> int:
    steps, epochs = options.get("max_steps", -1), options.get("max_epochs")
    if epochs is None and steps == -1:
        epochs = 1000  # Lightning's default
    ends = [steps] if steps != -1 else []
    if epochs not in (None, -1):
        ends.append(epochs * an_epoch)
    if not ends:
        raise SpecError("trainer: training has no end; set max_steps")
    return min(ends)


def _validations(options: TrainerOptions, batches: int, epoch: int) -> int:
    """How often training stops to validate."""
    interval, every = options.get("val_check_interval"), options.get("check_val_every_n_epoch", 1)
    if not isinstance(interval, int | float | None):  # Lightning's, of time
        raise SpecError(f"trainer.val_check_interval: {interval}, but a cell counts batches")
    if not batches:
        return 0
    if every is None:  # the interval counts batches of all epochs
        return int(batches // interval) if interval else 0
    step = interval if isinstance(interval, int) else max(1, int(epoch * (interval or 1.0)))
    epochs, rest = divmod(batches, epoch)
    in_last = rest // step if (epochs + 1) % every == 0 else 0
    return epochs // every * (epoch // step) + in_last
