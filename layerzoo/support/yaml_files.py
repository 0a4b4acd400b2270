"""YAML files: the configs that ship with the package, and reading one."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError

from layerzoo.spec import SpecError, suggest


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
