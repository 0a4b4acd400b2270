"""What a run is trained on: its checkpoints and its record hold it, and a resumed run has to have
the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback
from torch import Tensor

from layerzoo.data.task import Task
from layerzoo.spec import SpecError

TRAINED_ON = "trained_on"
"""The key of a checkpoint."""
UNSEEN = ("num_workers", "test_samples", "lengths")
"""Options of tasks that training never sees."""
TRAINER = (
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "limit_train_batches",
    "precision",
    "world_size",
)
"""What of a trainer changes how training goes on. (`max_steps` may be another: a run may go on for
longer.)"""


class TrainedOn(Callback):
    """Puts what a run is trained on into its checkpoints. seed: `seed_everything`."""

    seed: int | bool | None = None

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint[TRAINED_ON] = trained_on(trainer, pl_module, trainer.datamodule, self.seed)


def digests(module: Any, task: Any) -> dict[str, str]:
    """What the task and the module read, by option: data.files, model.init, .."""
    parts = {"data": task if isinstance(task, Task) else None, "model": module}
    return {
        f"{place}.{option}": digest
        for place, part in parts.items()
        if part is not None
        for option, digest in part.digest().items()
    }


def trained_on(trainer: Any, module: Any, task: Any, seed: Any) -> dict[str, Any]:
    """settings: by option, as it is written. digest: of what is read. In plain types."""
    settings = dict(_options("data", task)) if isinstance(task, Task) else {}
    settings["seed_everything"] = seed
    settings |= {f"trainer.{name}": _plain(getattr(trainer, name)) for name in TRAINER}
    return {"settings": settings, "digest": digests(module, task)}


def _options(place: str, task: Task) -> Iterator[tuple[str, Any]]:
    """The class of a task and its options, defaults too; of tasks of tasks those of each."""
    yield place, _path(task)
    values = task.given.with_setting().field_values()
    if (setting := getattr(task.given, "setting", None)) is not None:
        values["setting"] = setting
    for name, value in values.items():
        if name in UNSEEN:
            continue
        tasks = value if isinstance(value, list | tuple) else ()
        if tasks and all(isinstance(one, Task) for one in tasks):
            for n, one in enumerate(tasks, 1):
                yield from _options(f"{place}.{name}.{n}", one)
        else:
            yield f"{place}.{name}", _plain(value)


def _path(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _plain(value: Any) -> Any:
    """In types that torch.load reads with weights_only; of other objects their class."""
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return value if isinstance(value, bool | int | float | str | None) else _path(value)


def refuse_changed(now: Mapping[str, str], before: Mapping[str, str] | None) -> None:
    """Raise for the first thing read that is not what it was when a cell was made.

    Args:
        now, before: digests by option; before is None of a cell of an older version.

    Raises:
        SpecError: it has changed.
    """
    if before is None:
        return
    for name in sorted(before.keys() | now.keys()):
        if now.get(name) != before.get(name):
            new, old = (digest.get(name, "nothing")[:12] for digest in (now, before))
            raise SpecError(
                f"{name}: its contents are others here ({new}) than when the run began ({old}); "
                f"run the grid again"
            )


def digest_files(paths: Mapping[str, Path]) -> str:
    """Of files, by the names that they are known by; read in pieces."""
    whole = hashlib.sha256()
    for name in sorted(paths):
        with open(paths[name], "rb") as file:
            whole.update(f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()


def digest_weights(weights: Mapping[str, Tensor]) -> str:
    whole = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].detach().cpu().contiguous()
        whole.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        whole.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def first_difference(now: Any, before: Any, place: str) -> tuple[str, Any, Any] | None:
    """Where two trees of plain values differ first, and the values there."""
    if isinstance(now, Mapping) and isinstance(before, Mapping):
        pairs = [(f"{place}.{key}", now.get(key), before.get(key)) for key in {**before, **now}]
    elif isinstance(now, list) and isinstance(before, list) and len(now) == len(before):
        pairs = [(f"{place}[{n}]", a, b) for n, (a, b) in enumerate(zip(now, before, strict=True))]
    else:
        return None if now == before else (place, now, before)
    found = (first_difference(a, b, inner) for inner, a, b in pairs)
    return next((difference for difference in found if difference), None)
