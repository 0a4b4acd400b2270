"""Cell: one training run of a grid, and its identity."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from layerzoo.layer import EXECUTION

from .configs import Tree

WITHOUT_EFFECT = {
    "trainer": (
        "logger",
        "enable_progress_bar",
        "enable_model_summary",
        "enable_checkpointing",
        "default_root_dir",
        "log_every_n_steps",
        "accelerator",
        "profiler",
    ),
    "model": EXECUTION,
    "data": (),
}
"""What of a training config does not change its results."""


class Seed(NamedTuple):
    """Of the initialisation, and of the data."""

    init: int
    data: int

    def __str__(self) -> str:
        return f"{self.init}" if self.init == self.data else f"{self.init}-data-{self.data}"


@dataclass(frozen=True)
class Cell:
    """An option of every axis that applies, and a seed.

    options: axis -> option. config: resolved, as `layerzoo fit --config` takes it.
    split: which held-out split it is measured on; a tuning run never sees the test split.
    tuned: tuning axis -> option: what a tuning run tries, and what a reported one was given.
    matched: what was solved for and reached, if the grid matches its models.
    digest: of what it reads, by option, see `layerzoo.train.trained_on.digests`; {} if that is
        nothing, or if it is not to be run.
    """

    options: dict[str, str]
    seed: Seed
    config: Tree
    split: Literal["test", "val"] = "test"
    tuned: dict[str, str] = field(default_factory=dict)
    matched: dict[str, Any] = field(default_factory=dict)
    digest: dict[str, str] = field(default_factory=dict)

    @property
    def arm(self) -> str:
        return ",".join(self.options.values())

    @property
    def identity(self) -> str:
        return identity_of(self.config, self.digest)

    @property
    def path(self) -> str:
        """Of its folder, in the grid's."""
        tuning = ("tune", self.arm, ",".join(self.tuned.values()))
        folder = self.arm if self.split == "test" else "/".join(tuning)
        return f"{folder}/seed-{self.seed}-{self.identity[:8]}"


def identity_of(config: Tree, digest: Mapping[str, str] | None = None) -> str:
    """The hash of what makes a run: the essence of its config; and what it reads, if anything."""
    tree = result_config(config)
    if digest:
        tree["digest"] = {**digest}
    text = json.dumps(tree, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def result_config(config: Tree) -> Tree:
    """A config but for where it logs, which checkpoints it keeps and how it is computed."""
    tree = copy.deepcopy(config)
    for section, names in WITHOUT_EFFECT.items():
        for name in names:
            tree.get(section, {}).pop(name, None)
    tree["data"].get("init_args", {}).pop("num_workers", None)
    callbacks = tree.get("trainer", {}).pop("callbacks", None) or []
    callbacks = [c for c in callbacks if not _is_checkpoint(c)]
    if callbacks:
        tree["trainer"]["callbacks"] = callbacks
    return tree


def _is_checkpoint(callback: Any) -> bool:
    name = callback if isinstance(callback, str) else callback.get("class_path", "")
    return name.rpartition(".")[2] == "ModelCheckpoint"
