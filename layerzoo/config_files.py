"""Config files: where they are, how they are read, and the module that they name."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError

from layerzoo.lit import LitModel
from layerzoo.module import TaskModule
from layerzoo.spec import SpecError, suggest

MODULE = f"{LitModel.__module__}.{LitModel.__qualname__}"
"""The module that is trained where no other is named."""


def named_configs() -> dict[str, Path]:
    """The configs that ship with the package, by name."""
    folder = Path(str(resources.files("layerzoo"))) / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def config_path(name: str) -> str:
    """The path of a config file, or of a shipped config by its name."""
    configs = named_configs()
    if Path(name).is_file():
        return name
    if name not in configs:
        raise SpecError(
            f"--config {name}: no such file or shipped config; {suggest(name, configs)}"
        )
    return str(configs[name])


def read_yaml(path: str | Path) -> Any:
    """A YAML file of fields, with OmegaConf's interpolations unresolved.

    Raises:
        SpecError: it cannot be read, or is not YAML, or holds no fields.
    """
    try:
        tree = OmegaConf.load(path)
    except OSError as error:
        raise SpecError(f"{path}: {error.strerror}") from None
    except (MarkedYAMLError, OmegaConfBaseException, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise SpecError(f"{path}{line}: {problem}") from None
    if not isinstance(tree, DictConfig) or not tree:
        raise SpecError(f"{path}: expected fields, key: value")
    return tree


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
