"""A grid: axes over a base config. Its cells are ordinary training runs."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from layerzoo.layer import Reach
from layerzoo.spec import SpecError, suggest
from layerzoo.support.field_docs import read_config

from .arms import Arm, arm_name, passes, read_arm_filter, read_arms
from .axes import Axis, Override, read_axes, read_overrides
from .cell import Cell, Seed
from .claims import Claim, read_claims
from .config_builder import MAX_STEPS, SEED_KEYS, ConfigBuilder
from .configs import Tree, forget_tasks, task_of
from .match import Match, match_models
from .report_options import Report, read_report
from .schema import Fields, read_seeds
from .source import Source, shipped_grids
from .tune import Choice, RunMetrics, Tuning, choose_options, read_tuning


@dataclass(frozen=True)
class Grid:
    """A grid file as read and checked; `load_grid` makes it.

    arms: the options of each, in order. tuning, match, report: None if the file has none. digests:
    whether its cells are of the data that they would read now, as cells that are run have to be.
    """

    source: Source
    fields: Fields
    builder: ConfigBuilder
    axes: dict[str, Axis]
    arms: list[Arm]
    seeds: tuple[Seed, ...]
    tuning: Tuning | None
    match: Match | None
    report: Report | None
    claims: list[Claim]
    digests: bool = False

    @property
    def name(self) -> str:
        """Of the grid and its folder; a size but the first of the file's adds its own."""
        return grid_name(self.source)

    def cells(self, choices: Mapping[str, Choice] | None = None) -> list[Cell]:
        """The reported cells, seed by seed.

        Args:
            choices: of a grid that tunes, by arm, see `choose`: without, its cells are as they
                are before tuning; with, arms that have no choice are left out.
        """
        if self.tuning is None or choices is None:
            return [*self._untuned]
        best = {arm: choice.best.options for arm, choice in choices.items() if choice.best}
        return self._cells(best, self.seeds, "test")

    def tune_cells(self) -> list[Cell]:
        """The tuning runs: every arm with every option of the tuning axes and tuning seed."""
        return [*self._tuning_runs]

    def choose(self, figures: RunMetrics) -> dict[str, Choice]:
        """What the tuning runs say is best for each arm, see `choose`."""
        return (
            {} if self.tuning is None else choose_options(self.tuning, self._tuning_runs, figures)
        )

    @cached_property
    def _untuned(self) -> list[Cell]:
        return self._cells({arm_name(arm): {} for arm in self.arms}, self.seeds, "test")

    @cached_property
    def _tuning_runs(self) -> list[Cell]:
        if self.tuning is None:
            return []
        each = (
            self._cells({arm_name(arm): options for arm in self.arms}, self.tuning.seeds, "val")
            for options in self.tuning.options
        )
        return [*itertools.chain(*each)]

    def _cells(
        self,
        tuned: Mapping[str, dict[str, str]],
        seeds: tuple[Seed, ...],
        split: Literal["test", "val"],
    ) -> list[Cell]:
        """The cells of the arms in `tuned`, with their tuning options. All arms are built, because
        the reach of one arm may define the ceiling of all."""
        budget = self.budget(split)
        steps = budget.value if budget else None
        drafts, trees = {}, {}
        for arm in self.arms:
            name = arm_name(arm)
            overrides = [*self._overrides(arm, tuned.get(name, {})), *([budget] if budget else [])]
            drafts[name], trees[name] = self.builder.checked(overrides, seeds[0], steps)
        for name, (network, _) in self._matched.items():
            trees[name]["model"]["network"] = copy.deepcopy(network)
        reach = self._ceiling(trees)
        cells = []
        for seed, arm in itertools.product(seeds, self.arms):
            if (name := arm_name(arm)) not in tuned:
                continue
            tree = trees[name]
            if seed != seeds[0]:
                tree = self.builder.reseeded(drafts[name], tree, seed, steps)
                tree["model"]["network"] = copy.deepcopy(trees[name]["model"]["network"])
            if reach:
                tree["data"]["init_args"] |= {"reach": reach.back, "sinks": reach.sinks}
            _, record = self._matched.get(name, (None, {}))
            digest = self.builder.digest(tree) if self.digests else {}
            cells.append(Cell(arm, seed, tree, split, tuned[name], record, digest))
        self._refuse_twins(cells[: len(tuned)])
        return cells

    def budget(self, split: Literal["test", "val"]) -> Override | None:
        """The updates of a reported or a tuning run, if the grid sets them."""
        own = self.tuning.fields.budget if self.tuning and split == "val" else None
        if own is not None:
            return Override(("tune", "budget"), MAX_STEPS, own)
        steps = self.fields.budget
        return None if steps is None else Override(("budget",), MAX_STEPS, steps)

    def _overrides(self, arm: Arm, tuned: Mapping[str, str]) -> list[Override]:
        common = read_overrides(self.source, "set") if self.fields.set is not None else ()
        options = (self.axes[axis].options[label].overrides for axis, label in arm.items())
        tuning = self.tuning.overrides(tuned) if self.tuning else ()
        return [*common, *itertools.chain(*options), *tuning]

    @cached_property
    def _matched(self) -> dict[str, tuple[Tree, dict[str, Any]]]:
        """The networks of a grid that matches them, and the records, by arm."""
        if self.match is None:
            return {}
        arms = {arm_name(arm): arm for arm in self.arms}
        trees = {
            name: self.builder.checked(self._overrides(arm, {}), self.seeds[0], None)[1]
            for name, arm in arms.items()
        }
        with self.source.locating("match"):
            solved = match_models(self.match, trees, arms)
        return {
            name: (tree["model"]["network"], record) for name, (tree, record) in solved.items()
        }

    def _ceiling(self, trees: Mapping[str, Tree]) -> Reach | None:
        """The reach of the window arms, if the grid has any; every task takes it."""
        if self.fields.window_arm is None:
            return None
        where = read_arm_filter(self.source, self.axes, "window_arm")
        names = [arm_name(arm) for arm in self.arms if passes(arm, where)]
        with self.source.locating("window_arm"):
            reaches = {self.builder.reach(trees[name]) for name in names}
            if len(reaches) != 1:
                arms = "; ".join(names)
                fault = f"its arms differ in reach ({arms}); name an option of more axes"
                raise SpecError(fault if names else "matches no arm; correct it, or drop it")
            (reach,) = reaches
            if reach is None:
                raise SpecError("this arm's reach is unbounded: it defines no ceiling")
            for tree in trees.values():
                data = copy.deepcopy(tree["data"])
                data["init_args"] |= {"reach": reach.back, "sinks": reach.sinks}
                task_of({**tree, "data": data})
        return reach

    def _refuse_twins(self, cells: Sequence[Cell]) -> None:
        """Refuse two arms that are the same run."""
        seen: dict[str, Cell] = {}
        for cell in cells:
            other = seen.setdefault(cell.identity, cell)
            if other is not cell:
                (axis, option), *_ = cell.options.items() - other.options.items()
                tuned = f", both with {','.join(cell.tuned.values())}" if cell.tuned else ""
                raise self.source.error(
                    self.axes[axis].options[option].place,
                    f"arm {cell.arm} is the same run as {other.arm}{tuned}; drop one, or set "
                    f"what tells them apart",
                )


def grid_name(source: Source) -> str:
    name, first = source.tree["name"], next(iter(source.sizes), None)
    return name if source.size == first else f"{name}-{source.size}"


def load_grid(name: str, size: str | None = None, digests: bool = False) -> Grid:
    """Read a grid by its shipped name or its path, and check every arm before any runs: that its
    model and task build, and fit each other.

    Args:
        size: of the file's `sizes`, by default the first.
        digests: read the data of its cells, which are part of what they are.

    Raises:
        SpecError: no such grid, or a fault in it, at its line.
    """
    path = Path(name) if Path(name).is_file() else shipped_grids().get(name)
    if path is None:
        raise SpecError(f"no grid '{name}'; {suggest(name, shipped_grids())}")
    grid = replace(read_grid(Source(path, size)), digests=digests)
    grid.cells()
    grid.tune_cells()
    return grid


def read_grid(source: Source) -> Grid:
    forget_tasks()
    with source.locating():
        fields: Fields = read_config(Fields, source.tree)
    builder = ConfigBuilder(source)
    axes, seeds = read_axes(source, "axes"), read_seeds(source, "seeds")
    arms = read_arms(source, axes, fields.design)
    names = [arm_name(arm) for arm in arms]
    grid = Grid(
        source,
        fields,
        builder,
        axes,
        arms,
        seeds,
        tuning=None if fields.tune is None else read_tuning(source, axes, seeds),
        match=None if fields.match is None else _read_match(source, axes),
        report=None if fields.report is None else read_report(source, axes, arms),
        claims=read_claims(source, names),
    )
    _refuse_reserved(grid)
    return grid


def _read_match(source: Source, axes: Mapping[str, Axis]) -> Match:
    fields = {**source.value("match")}
    if isinstance(fields.get("to"), dict):
        where = read_arm_filter(source, axes, "match", "to")
        fields["to"] = {axis: options[0] for axis, options in where.items()}
    with source.locating("match"):
        return read_config(Match, fields)


def _refuse_reserved(grid: Grid) -> None:
    """Overrides of what other fields set."""
    common = read_overrides(grid.source, "set") if grid.fields.set is not None else ()
    options = [o for axis in grid.axes.values() for o in axis.options.values()]
    own = [*common, *itertools.chain(*(option.overrides for option in options))]
    tried = grid.tuning.every_override if grid.tuning else []
    for overrides, budget in ((own, grid.budget("test")), (tried, grid.budget("val"))):
        for place, key, _ in overrides:
            if key in SEED_KEYS:
                raise grid.source.error(place, "the grid's seeds set it; drop it")
            if key == MAX_STEPS and budget:
                raise grid.source.error(place, "budget sets it; drop one of the two")
    for place, key, _ in tried if grid.match else ():
        if f"{key}.".startswith("model.network.") or key == "model":
            raise grid.source.error(place, "a network that is matched is not tuned; drop one")
