"""`layerzoo ablate run`: from a grid file to its results."""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from layerzoo.spec import SpecError
from layerzoo.support.json_files import floats

from .cells.cell import Cell
from .cells.grid import Grid, load_grid
from .cells.tune import Choice, RunMetrics
from .reporting.report_files import compare
from .reporting.results import GRID_FILE
from .running import runner
from .running.display import Display
from .running.executor import Executor, Outcome
from .running.folder import (
    CELLS,
    ENDED,
    LOG,
    METRICS,
    cell_facts,
    cell_state,
    prepare_folder,
    read_json,
    reason_of,
    write_json,
)
from .running.local import LocalExecutor, default_slots
from .running.on_ray import RayExecutor, run_task

TUNING_FILE = "tuning.json"
"""In the grid's folder: what was tried for each arm, and what was chosen."""
SAVE_SECONDS = 15.0
"""Seconds that running cells get to save a checkpoint when a run is interrupted."""


@dataclass(frozen=True)
class RunOptions:
    """How to run a grid; nothing of it changes a result.

    jobs: cells at a time. threads: of the CPU, a cell; a number of its own, for the last digits
    of a result depend on it. shard: part i of n. retries: of a cell that fails. limit: cells to
    run at most. every: seconds between a cell's checkpoints.
    """

    out: Path = Path("runs") / "ablations"
    jobs: int | None = None
    threads: int = 1
    executor: Literal["local", "ray"] = "local"
    shard: tuple[int, int] = (1, 1)
    retries: int = 1
    limit: int | None = None
    every: float = 30.0


class GridRun:
    """One call of `layerzoo ablate run`."""

    def __init__(self, grid: Grid, options: RunOptions, console: Console) -> None:
        self.grid, self.options, self.console = grid, options, console
        self.out = options.out / grid.name
        self.budget = options.limit
        self.folders: list[Path] = []
        self.ends: dict[Path, Outcome] = {}
        self._executor: Executor | None = None

    def stage(self, title: str, cells: Sequence[Cell]) -> None:
        """Run the cells that have not ended."""
        folders = [prepare_folder(cell, self.out) for cell in self._shard(cells)]
        self.folders += folders
        states = {folder: cell_state(folder) for folder in folders}
        done = [f for f, now in states.items() if now in ENDED]
        todo = [f for f, now in states.items() if now not in ENDED]
        todo = todo[: self.budget]
        if self.budget is not None:
            self.budget -= len(todo)
        part = "" if len(folders) == len(cells) else f" of this shard ({len(cells)} in all)"
        text = f"{title}: {len(todo)} of {len(folders)} cells{part} to run"
        if not todo:
            self.console.print(text, highlight=False)
            return
        executor = self.executor()
        slots = min(executor.slots, len(todo))
        self.console.print(f"{text}, {slots} at a time", highlight=False)
        display = Display(self.console, self.out, len(folders), done, slots)
        with display.bars:
            self.ends |= runner.run_folders(todo, executor, self.options.retries, display)

    def executor(self) -> Executor:
        """One for all stages: its processes are kept."""
        if self._executor is None:
            options = self.options
            if options.executor == "ray":
                task = partial(run_task, every=options.every, threads=options.threads)
                self._executor = RayExecutor(task, options.jobs, options.threads)
            else:
                slots = options.jobs or default_slots(options.threads)
                self._executor = LocalExecutor(slots, options.threads, options.every)
        return self._executor

    def close(self) -> None:
        if self._executor is not None:
            self._executor.close(SAVE_SECONDS)

    def _shard(self, cells: Sequence[Cell]) -> Sequence[Cell]:
        """Every n-th cell; of a grid that tunes, arm, so that an arm is tuned where it runs."""
        part, parts = self.options.shard
        if self.grid.tuning is None:
            return cells[part - 1 :: parts]
        arms = [*dict.fromkeys(cell.arm for cell in cells)][part - 1 :: parts]
        return [cell for cell in cells if cell.arm in arms]

    @property
    def failed(self) -> dict[str, str]:
        """The reasons by path, also of cells that failed before and were not tried again. (Of a
        full disk there is none in the folder.)"""
        now = {
            folder: reason_of(folder) for folder in self.folders if cell_state(folder) == "failed"
        }
        now |= {folder: o.reason for folder, o in self.ends.items() if o.end == "failed"}
        return {folder.relative_to(self.out).as_posix(): why for folder, why in now.items()}

    @property
    def full(self) -> bool:
        return any(map(runner.disk_full, self.ends.values()))


def run_grid(name: str, options: RunOptions, size: str | None = None, tables: bool = True) -> int:
    """Run the unfinished cells of a grid, then compare all that have ended.

    Args:
        size: one of the sizes in the grid file.
        tables: print what they say together; it is written down in any case.

    Returns: the exit status, 0; 1 if cells failed, or a claim does not hold; 130 if interrupted.
    """
    grid = load_grid(name, size, digests=True)
    out = options.out / grid.name
    console = Console(width=None if sys.stdout.isatty() else 160)
    grid_run = GridRun(grid, options, console)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cluster's, as ^C
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / GRID_FILE).write_text(grid.source.copy, encoding="utf-8")
        return _run_stages(grid_run, tables)
    except KeyboardInterrupt:
        with suppress(KeyboardInterrupt):
            console.print("interrupted; saving checkpoints (^C again: at once, without)")
            grid_run.close()
        console.print("the same command goes on where this one stopped")
        return 130
    except OSError as error:
        raise SpecError(f"--out {out}: {error.strerror}; the same command goes on") from None
    finally:
        grid_run.close()
        signal.signal(signal.SIGTERM, before)


def _run_stages(grid_run: GridRun, tables: bool) -> int:
    grid, out = grid_run.grid, grid_run.out
    tuning = grid.tune_cells()
    choices: dict[str, Choice] = {}
    if tuning:
        _write_cell_list([*tuning, *grid.cells(grid.choose(ended_metrics(tuning, out)))], out)
        grid_run.stage(f"{grid.name}, tuning", tuning)
    if tuning and not grid_run.full:
        choices = grid.choose(ended_metrics(tuning, out))
        arms = [*dict.fromkeys(cell.arm for cell in tuning)]
        for line in tuning_lines(choices, arms, read_json(out / TUNING_FILE)):
            grid_run.console.print(line, markup=False, highlight=False, soft_wrap=True)
        write_json(out / TUNING_FILE, {arm: asdict(choice) for arm, choice in choices.items()})
    holds = True
    cells = [] if grid_run.full else grid.cells(choices)
    if not grid_run.full:
        _write_cell_list([*tuning, *cells], out)
    if cells:  # some arms are tuned
        grid_run.stage(grid.name, cells)
        holds = compare(out, grid_run.console if tables else Console(quiet=True))
    for path, why in grid_run.failed.items():
        print(f"failed: {path}: {why} (see {out / path / LOG})", file=sys.stderr)
    if grid_run.full:
        print("the disk is full: free some space; the same command goes on", file=sys.stderr)
    return 0 if holds and not grid_run.failed else 1


def _write_cell_list(cells: Sequence[Cell], out: Path) -> None:
    write_json(out / CELLS, [{"path": cell.path, **cell_facts(cell)} for cell in cells])


def tuning_lines(
    choices: Mapping[str, Choice], arms: Sequence[str], before: Mapping[str, Any]
) -> list[str]:
    """What was chosen for each arm, without which runs, and where there is reason to doubt it.

    Args:
        before: what an earlier call wrote of its choices.
    """
    lines = []
    for arm in arms:
        choice = choices.get(arm)
        if choice is None:
            lines.append(f"{arm}: is not tuned yet, its cells wait")
            continue
        for trial in choice.trials:
            options = ", ".join(trial.options.values())
            lines += [f"{arm}: {options}, seed {n}: {why}" for n, why in trial.lost.items()]
        if choice.best is None:
            lines.append(f"{arm}: every tuning run diverged or failed, it has no cells")
            continue
        edges = "".join(f"; {axis} is at its edge, try more" for axis in choice.edges)
        was = (before.get(arm, {}).get("best") or {}).get("options", choice.best.options)
        other = was != choice.best.options
        changed = f"; was {', '.join(was.values())}, its cells are others now" if other else ""
        lines.append(f"{arm}: tuned to {', '.join(choice.best.options.values())}{edges}{changed}")
    return lines


def ended_metrics(cells: Sequence[Cell], out: Path) -> RunMetrics:
    """The figures of the cells that ended, or why there are none: they diverged or failed."""
    found = dict[str, Mapping[str, Any] | str]()
    for cell in cells:
        folder = out / cell.path
        now = cell_state(folder)
        if now == "finished":
            found[cell.path] = floats(read_json(folder / METRICS))
        elif now in ("diverged", "failed"):
            found[cell.path] = f"{now}: {reason_of(folder)}"
    return found
