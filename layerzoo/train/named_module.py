"""The module that a config file or a command line names."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from layerzoo.spec import SpecError, suggest
from layerzoo.support.yaml_files import read_yaml
from layerzoo.train.module import TaskModule

MODULE = "layerzoo.lit.LitModel"
"""The module that is trained where no other is named."""


def named_module(args: Sequence[str]) -> type[TaskModule]:
    """The class that command-line arguments name with `--module`, or a config file with its key
    `module`: the last of them, as for every option.

    Raises:
        SpecError: it cannot be imported, or is no `TaskModule`.
    """
    path: Any = MODULE
    words = [part for arg in args for part in split_option(arg)]
    for option, value in pairwise(words):
        if option in ("-c", "--config"):
            path = read_yaml(value).get("module", path)
        elif option == "--module":
            path = value
    return module_class(path)


def split_option(arg: str) -> list[str]:
    """`--config=FILE` in two, and so `--module=PATH`."""
    return arg.split("=", 1) if arg.startswith(("--config=", "--module=")) else [arg]


def module_class(path: Any) -> type[TaskModule]:
    """The subclass of `TaskModule` at an import path.

    Raises:
        SpecError: there is none.
    """
    place, _, name = str(path).rpartition(".")
    if not place:
        raise SpecError(f"module: expected an import path such as {MODULE}, got {path!r}")
    try:
        file = importlib.import_module(place)
    except ImportError as error:
        raise SpecError(f"module: {path} cannot be imported: {error}") from None
    known = {
        n: x for n, x in vars(file).items() if isinstance(x, type) and issubclass(x, TaskModule)
    }
    if not hasattr(file, name):
        raise SpecError(f"module: {place} has no '{name}'; {suggest(name, known)}")
    if known.get(name, TaskModule) is TaskModule:
        raise SpecError(f"module: {path} is no subclass of layerzoo.module.TaskModule")
    return known[name]
