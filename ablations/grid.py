"""A grid: axes over a base config. Its cells are ordinary training runs."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from layerzoo.model import LanguageModel, ModelConfig
from layerzoo.spec import Config, SpecError, at, suggest
from layerzoo.training import config_path, read_yaml

from .claims import Claim


@dataclass(frozen=True)
class Cell:
    """One training run: an option of every axis, and a seed."""

    options: dict[str, str]
    seed: int
    config: DictConfig

    @property
    def arm(self) -> str:
        return arm_name(self.options)

    @property
    def path(self) -> str:
        return f"{self.arm}/seed-{self.seed}"


def arm_name(options: dict[str, str]) -> str:
    return ",".join(options.values())


class Grid(Config):
    """A grid file.

    name: of the grid and its folder of results.
    base: a shipped config's name, or a path relative to the grid file.
    axes: axis -> option -> overrides, dotted config keys and their values; the arms are the
        product of the axes.
    seeds: each arm runs once a seed, which sets initialisation (`seed_everything`) and data
        (`data.init_args.seed`), so that cells of one seed are paired.
    set: overrides for every cell.
    window_arm: axis -> option of the arm whose model's reach defines the ceiling of all.
    expect: claims about what the grid finds, the fields of `Claim`.
    """

    name: str
    base: str
    axes: dict[str, Any]
    seeds: tuple[int, ...] = (0, 1, 2)
    set: dict[str, Any] | None = None
    window_arm: dict[str, str] | None = None
    expect: tuple[dict[str, Any], ...] = ()

    @property
    def claims(self) -> list[Claim]:
        return [Claim.from_fields(fields) for fields in self.expect]

    @property
    def arms(self) -> list[dict[str, str]]:
        """The options of every arm, in order."""
        arms = itertools.product(*self.axes.values())
        return [dict(zip(self.axes, arm, strict=True)) for arm in arms]

    def check(self) -> None:
        if not self.axes or not all(self.axes.values()):
            raise SpecError("axes: needs at least one axis with one option")
        _folder_name("name", self.name)
        for axis, options in self.axes.items():
            for option, overrides in options.items():
                _folder_name(f"axes: {axis}", option)
                if not isinstance(overrides, dict):
                    raise SpecError(f"axes: {axis}: {option}: expected overrides, key: value")
        if not self.seeds or len({*self.seeds}) != len(self.seeds):
            raise SpecError(f"seeds: needs at least one, each once, got {list(self.seeds)}")
        if min(self.seeds) < 0:
            raise SpecError(f"seeds: must not be negative, got {list(self.seeds)}")
        for axis, option in (self.window_arm or {}).items():
            options = self.axes.get(axis)
            if options is None or option not in options:
                raise SpecError(
                    f"window_arm: {axis}: {option}; {suggest(option, options or self.axes)}"
                )
        arms = {arm_name(options) for options in self.arms}
        with at("expect"):
            for claim in self.claims:
                if claim.arm not in arms:
                    raise SpecError(f"arm: no '{claim.arm}'; {suggest(claim.arm, arms)}")


def shipped_grids() -> dict[str, Path]:
    folder = Path(str(resources.files("layerzoo.ablations"))) / "grids"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_grid(name: str) -> tuple[Grid, list[Cell]]:
    """Read a grid by its shipped name or its path, and check every cell's model before any runs.

    Raises:
        SpecError: no such grid, a wrong field, or a cell whose model does not build.
    """
    path = Path(name) if Path(name).is_file() else shipped_grids().get(name)
    if path is None:
        raise SpecError(f"no grid '{name}'; {suggest(name, shipped_grids())}")
    with at(f"grid {path}"):
        tree = OmegaConf.to_container(read_yaml(path), resolve=False)
        if not isinstance(tree, dict):
            raise SpecError("expected fields name, base, axes, ..")
        fields: dict[str, Any] = {str(key): value for key, value in tree.items()}
        if isinstance(fields.get("axes"), dict):
            fields["axes"] = dict(_axis(name, axis) for name, axis in fields["axes"].items())
        grid = Grid.from_fields(fields)
        local = path.parent / grid.base
        with at("base"):
            base = read_yaml(local if local.is_file() else config_path(grid.base))
            if isinstance(base.get("data"), str):
                raise SpecError("data: write it as class_path and init_args, which a grid sets")
        return grid, _cells(grid, base)


def _folder_name(place: str, name: str) -> None:
    if not re.fullmatch(r"\w[\w.+=-]*", name):
        raise SpecError(f"{place}: '{name}' is no folder name; use letters, digits and _.+=-")


def _axis(name: Any, options: Any) -> tuple[str, dict[str, Any]]:
    if not isinstance(options, dict):
        raise SpecError(f"axes: {name}: expected options, name: overrides, got {options!r}")
    return str(name), {str(option): value for option, value in options.items()}  # 16 is "16"


def _cells(grid: Grid, base: Any) -> list[Cell]:
    cells = []
    for seed, options in itertools.product(grid.seeds, grid.arms):
        config = base.copy()
        overrides = [
            grid.set or {},
            *(grid.axes[axis][option] for axis, option in options.items()),
        ]
        with at(arm_name(options)):
            for key, value in itertools.chain(*(part.items() for part in overrides)):
                _override(config, key, value)
        for key in ("seed_everything", "data.init_args.seed"):
            OmegaConf.update(config, key, seed, force_add=True)
        cells.append(Cell(options, seed, config))
    models = {cell.arm: _model(cell) for cell in cells if cell.seed == grid.seeds[0]}
    if grid.window_arm:
        arms = {c.arm for c in cells if grid.window_arm.items() <= c.options.items()}
        reaches = {models[arm].reach() for arm in arms}
        if len(reaches) > 1:
            raise SpecError(
                f"window_arm: its arms differ in reach ({'; '.join(sorted(arms))}); "
                f"name an option of more axes"
            )
        (reach,) = reaches
        if reach is None:
            raise SpecError("window_arm: this arm's reach is unbounded: it defines no ceiling")
        for cell in cells:
            OmegaConf.update(cell.config, "data.init_args.reach", reach.back, force_add=True)
            OmegaConf.update(cell.config, "data.init_args.sinks", reach.sinks, force_add=True)
    return cells


def _override(config: Any, key: str, value: Any) -> None:
    """Set a dotted key whose parent exists: a mistyped section is an error, not a new section."""
    parent, _, last = key.rpartition(".")
    section = OmegaConf.select(config, parent) if parent else config
    if not isinstance(section, DictConfig):
        known = suggest(parent, map(str, config))
        raise SpecError(f"{key}: the base config has no '{parent}'; {known}")
    OmegaConf.update(section, last, value, force_add=True, merge=False)


def _model(cell: Cell) -> LanguageModel:
    """The cell's model without memory for its weights."""
    with at(cell.arm):
        try:
            network = OmegaConf.to_container(cell.config.model.network, resolve=True)
        except OmegaConfBaseException as error:
            raise SpecError(str(error).splitlines()[0]) from None
        with at("model.network"), torch.device("meta"):
            assert isinstance(network, dict)
            return LanguageModel(ModelConfig.from_fields({str(k): v for k, v in network.items()}))
