"""How long updates take: a few of each shape of training are made, and timed."""

from __future__ import annotations

import json
import logging
import math
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

import torch
from lightning import Callback, Trainer

from layerzoo.layer import EXECUTION
from layerzoo.model import ModelConfig
from layerzoo.train.lit import LitModel

from ..cells import configs
from ..cells.configs import Tree
from ..cells.sizes import layer_names, sizes_of

MOST_SHAPES, MOST_SECONDS = 20, 60.0
"""How many shapes are probed, and for how long in all."""
ENOUGH_SECONDS = 0.5
"""Seconds of updates, if there are at least two, that tell how long one takes."""
HELD_OUT_BATCHES = 3
"""Held-out batches of a probe."""
TRAINER_OPTIONS = (
    "max_steps",
    "max_epochs",
    "val_check_interval",
    "check_val_every_n_epoch",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "precision",
    "accelerator",
)
"""What a probe takes of the trainer's options."""


class Speed(NamedTuple):
    """Seconds an update, and a held-out batch at the task's length. probed: or else scaled by
    FLOPs from the nearest shape that was."""

    update: float
    held_out: float
    probed: bool = True


class ProbeClock(Callback):
    """Ends of updates and of held-out batches; stops training when it has enough of them."""

    def __init__(self) -> None:
        self.updates: list[float] = []
        self.held_out: list[float] = []
        self.step = 0

    def _now(self, trainer: Any) -> float:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            return  # gradients accumulate
        self.step = trainer.global_step
        self.updates.append(self._now(trainer))
        if len(self.updates) > 1 and self.updates[-1] - self.updates[0] > ENOUGH_SECONDS:
            trainer.should_stop = True

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.held_out.append(self._now(trainer))

    def on_validation_batch_end(
        self,
        trainer: Any,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.held_out.append(self._now(trainer))


def probe_speed(config: Tree, threads: int = 1) -> Speed:
    """Train the config's model for half a second, or two updates, and measure a few batches."""
    options = {name: value for name, value in config["model"].items() if name != "init"}
    network = ModelConfig.from_fields(options.pop("network"))
    task = configs.task_of(config).varied()  # the trainer attaches it to a model
    trainer: dict[str, Any] = {
        name: value
        for name, value in (config.get("trainer") or {}).items()
        if name in TRAINER_OPTIONS
    }
    trainer |= {"logger": False, "num_sanity_val_steps": 0}
    for part in ("checkpointing", "progress_bar", "model_summary"):
        trainer[f"enable_{part}"] = False
    clock, before = ProbeClock(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with _quiet():
            started = time.perf_counter()
            model = LitModel(network=network, **options)
            Trainer(**trainer, limit_val_batches=0, callbacks=[clock]).fit(model, task)
            measure = Trainer(**trainer, limit_val_batches=HELD_OUT_BATCHES, callbacks=[clock])
            measure.validate(model, task, verbose=False)
    finally:
        torch.set_num_threads(before)
    return Speed(_typical_span([started, *clock.updates]), _typical_span(clock.held_out))


def _typical_span(times: list[float]) -> float:
    """The median span, without the first, which warms up, if there are others."""
    spans = [after - before for before, after in pairwise(times)]
    return median(spans[1:] or spans)


@contextmanager
def _quiet() -> Iterator[None]:
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


# Shapes


def training_shape(config: Tree) -> str:
    """What the time of an update depends on: not the seeds, the learning rate and such."""
    data, model = config["data"], config["model"]
    trainer = config.get("trainer") or {}
    counts = ("seed", "train_samples", "val_samples", "test_samples", "lengths", "reach", "sinks")
    options = {n: v for n, v in (data.get("init_args") or {}).items() if n not in counts}
    parts = [
        {name: model[name] for name in ("network", *EXECUTION) if name in model},
        {"class_path": data["class_path"], **options},
        {name: trainer[name] for name in TRAINER_OPTIONS[4:] if name in trainer},
    ]
    return json.dumps(parts, sort_keys=False, default=str)


def _update_flops(config: Tree) -> float:
    """Of an update's forward pass."""
    task, accumulate = (
        configs.task_of(config),
        (config.get("trainer") or {}).get(TRAINER_OPTIONS[4]) or 1,
    )
    return accumulate * task.batch_size * task.length * sizes_of(config).flops


def probe_speeds(each: Iterable[Tree], threads: int = 1) -> dict[str, Speed]:
    """The speed of every shape. Of each set of layers, one shape is probed before another is, and
    the small ones first; what does not fit into SHAPES and SECONDS is scaled."""
    shapes = {training_shape(config): config for config in each}
    flops = {key: _update_flops(config) for key, config in shapes.items()}
    groups: dict[tuple[str, ...], list[str]] = {}
    for key in sorted(shapes, key=flops.__getitem__):
        groups.setdefault(layer_names(shapes[key]), []).append(key)
    turns = {key: (n, flops[key]) for keys in groups.values() for n, key in enumerate(keys)}
    names = {key: name for name, keys in groups.items() for key in keys}
    found: dict[str, Speed] = {}

    def scaled(key: str) -> Speed:
        near = min(
            found,
            key=lambda k: (names[k] != names[key], abs(math.log(flops[k] / flops[key]))),
        )
        update, held_out, _ = found[near]
        ratio = flops[key] / flops[near]
        return Speed(update * ratio, held_out * ratio, probed=False)

    since = time.perf_counter()
    for key in sorted(shapes, key=turns.__getitem__)[:MOST_SHAPES]:
        left = MOST_SECONDS - (time.perf_counter() - since)
        if found and left < 3 * scaled(key).update:
            continue
        found[key] = probe_speed(shapes[key], threads)
    return found | {key: scaled(key) for key in shapes if key not in found}
