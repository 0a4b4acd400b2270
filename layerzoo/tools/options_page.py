"""docs/options.md: every option of networks, training, tasks, layers and grids."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

from layerzoo.registry import get_layer, list_layers
from layerzoo.spec import Config
from layerzoo.support.field_docs import field_rows

WRITTEN = (
    "Written by `layerzoo list --options --write docs/options.md` from the fields' docstrings."
)
GRID = (
    ("schema", "Fields", "The fields of a grid file."),
    ("match", "Match", "`match` makes the arms' models equally large."),
    ("tune", "Tune", "`tune` tries every arm with the product of some axes."),
    ("report_options", "Report", "`report` says what cells are compared by."),
    ("report_options", "ScalingLaw", "An item of `report.scaling` is a law."),
    ("claims", "Claim", "An item of `expect` is a claim."),
)


def markdown() -> str:
    """The page: a section for each config, with a table of the fields that it adds."""
    lines = ["# Options", "", WRITTEN, ""]
    for level, title, text, config, bases in _sections():
        lines += [f"{'#' * level} {title}", ""] + ([text, ""] if text else [])
        lines += [*_table(config, bases), ""] if config else []
    return "\n".join(lines)


Section = tuple[int, str, str, type[Config] | None, tuple[type[Config], ...]]
"""Level and title of a heading, a sentence, a config, and bases whose fields are left out."""


def _sections() -> Iterator[Section]:
    from layerzoo.data import RecallTask, Task, list_tasks
    from layerzoo.hf.distil import Distil
    from layerzoo.model import ModelConfig
    from layerzoo.train.callbacks import Controls
    from layerzoo.train.checkpoints import Checkpoints
    from layerzoo.train.lit import LitModel
    from layerzoo.train.module import TaskModule

    network = "`model.network` of a training config."
    yield 2, "The network", network, ModelConfig, ()
    yield 2, "Training", "`model` of a training config.", TaskModule.Config, ()
    only = "{} has these options, too."
    yield 3, "Language models", only.format("`LitModel`"), LitModel.Config, (TaskModule.Config,)
    yield 3, "Distillation", only.format("`Distil`"), Distil.Config, (TaskModule.Config,)
    text = "An item of `trainer.callbacks` of a training config has these options."
    yield 2, "Callbacks", text, None, ()
    yield 3, "layerzoo.checkpoints.Checkpoints", "", Checkpoints.Config, ()
    yield 3, "layerzoo.callbacks.Controls", "", Controls.Config, ()
    yield 2, "Tasks", "`data.init_args` of a training config. Every task has:", Task.Config, ()
    yield 3, "Recall tasks", only.format("`RecallTask`"), RecallTask.Config, (Task.Config,)
    for task in list_tasks():
        if not task.__module__.startswith("layerzoo."):
            continue
        base = RecallTask if issubclass(task, RecallTask) else Task
        above = "recall tasks" if base is RecallTask else "all tasks"
        yield 3, task.__name__, f"It also has the options of {above}.", task.Config, (base.Config,)
    yield from _of_layers()
    yield 2, "Grids", "", None, ()
    for module, name, text in GRID:
        found = importlib.import_module(f"layerzoo.ablations.cells.{module}")
        yield 3, name if name != "Fields" else "A grid file", text, getattr(found, name), ()


def _of_layers() -> Iterator[Section]:
    """The configs that layers extend, and then every layer."""
    known = {name: get_layer(name) for name in list_layers()}
    ours = {name: cls for name, cls in known.items() if cls.__module__.startswith("layerzoo.")}
    own: dict[type[Config], str] = {cls.Config: name for name, cls in ours.items()}
    bases = {base for config in own for base in config.__mro__ if _is_config(base)} - own.keys()
    order = sorted(bases, key=lambda base: (len(base.__mro__), base.__qualname__))
    titles = {base: base.__qualname__.removesuffix(".Config") for base in order} | own
    yield 2, "Layers", "The spec of a layer has its name and these options.", None, ()
    for config, title in titles.items():
        above = tuple(base for base in config.__bases__ if _is_config(base))
        names = " and ".join(f"`{titles[base]}`" for base in above)
        also = f"It also has the options of {names}." if above else ""
        yield 3, f"`{title}`", also, config, above


def _is_config(cls: type) -> bool:
    return issubclass(cls, Config) and cls is not Config


def _table(config: type[Config], bases: Sequence[type[Config]]) -> list[str]:
    known = [row for base in bases for row in field_rows(base)]
    rows = [row for row in field_rows(config) if row not in known]
    if not rows:
        return ["It has no options of its own."]
    return [
        "| option | type | default | meaning |",
        "| --- | --- | --- | --- |",
        *("| " + " | ".join(_cells(row)) + " |" for row in rows),
    ]


def _cells(row: dict[str, Any]) -> Sequence[str]:
    default = "required" if row["required"] else f"`{_default(row['default'])}`"
    cells = (f"`{row['name']}`", f"`{row['type']}`", default, row["doc"])
    return [cell.replace("|", "\\|") for cell in cells]


def _default(value: Any) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
