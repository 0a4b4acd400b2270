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

from .cells.cell import Cell
from .cells.grid import Grid, load_grid
from .cells.tune import Choice
from .reporting.compare import compare
from .reporting.results import GRID
from .running import runner
from .running.display import Display
from .running.executor import Executor, Outcome
from .running.folder import (
    CELLS,
    DIVERGED,
    LOG,
    METRICS,
    about_cell,
    prepare,
    read_json,
    state,
    write_json,
)
from .running.local import LocalExecutor, default_slots
from .running.on_ray import RayExecutor, run_task

TUNING = "tuning.json"
"""In the grid's folder: what was tried for each arm, and what was chosen."""
PATIENCE = 15.0
"""Seconds that running cells get to save a checkpoint when a run is interrupted."""


@dataclass(frozen=True)
class How:
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


class Run:
    """One call of `layerzoo ablate run`."""

    def __init__(self, grid: Grid, how: How, console: Console) -> None:
        self.grid, self.how, self.console = grid, how, console
        self.out = how.out / grid.name
        self.budget = how.limit
        self.ends: dict[Path, Outcome] = {}
        self._executor: Executor | None = None

    def stage(self, title: str, cells: Sequence[Cell]) -> None:
        """Run the cells that have not ended."""
        folders = [prepare(cell, self.out) for cell in self._shard(cells)]
        states = {folder: state(folder) for folder in folders}
        done = [f for f, now in states.items() if now in ("finished", "diverged")]
        todo = [f for f, now in states.items() if now not in ("finished", "diverged")]
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
            self.ends |= runner.run(todo, executor, self.how.retries, display)

    def executor(self) -> Executor:
        """One for all stages: its processes are kept."""
        if self._executor is None:
            how = self.how
            if how.executor == "ray":
                task = partial(run_task, every=how.every, threads=how.threads)
                self._executor = RayExecutor(task, how.jobs, how.threads)
            else:
                slots = how.jobs or default_slots(how.threads)
                self._executor = LocalExecutor(slots, how.threads, how.every)
        return self._executor

    def close(self) -> None:
        if self._executor is not None:
            self._executor.close(PATIENCE)

    def _shard(self, cells: Sequence[Cell]) -> Sequence[Cell]:
        """Every n-th cell; of a grid that tunes, arm, so that an arm is tuned where it runs."""
        part, parts = self.how.shard
        if self.grid.tuning is None:
            return cells[part - 1 :: parts]
        arms = [*dict.fromkeys(cell.arm for cell in cells)][part - 1 :: parts]
        return [cell for cell in cells if cell.arm in arms]

    @property
    def failed(self) -> dict[str, str]:
        """The reasons by path."""
        return {
            folder.relative_to(self.out).as_posix(): outcome.reason
            for folder, outcome in self.ends.items()
            if outcome.end == "failed"
        }


def run(name: str, how: How, size: str | None = None, tables: bool = True) -> int:
    """Run the unfinished cells of a grid, then compare all that have ended.

    Args:
        size: of those that the grid file has.
        tables: print what they say together; it is written down in any case.

    Returns: the exit status, 0; 1 if cells failed, or a claim does not hold; 130 if interrupted.
    """
    grid = load_grid(name, size, digests=True)
    out = how.out / grid.name
    console = Console(width=None if sys.stdout.isatty() else 160)
    this = Run(grid, how, console)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cluster's, as ^C
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / GRID).write_text(grid.source.copy)
        return _run(this, tables)
    except KeyboardInterrupt:
        with suppress(KeyboardInterrupt):
            console.print("interrupted; saving checkpoints (^C again: at once, without)")
            this.close()
        console.print("the same command goes on where this one stopped")
        return 130
    except OSError as error:
        raise SpecError(f"--out {out}: {error.strerror}; the same command goes on") from None
    finally:
        this.close()
        signal.signal(signal.SIGTERM, before)


def _run(this: Run, tables: bool) -> int:
    grid, out = this.grid, this.out
    tuning = grid.tune_cells()
    choices: dict[str, Choice] = {}
    if tuning:
        _list(tuning, out)
        this.stage(f"{grid.name}, tuning", tuning)
        figures = {cell.path: figures_of(out / cell.path) for cell in tuning}
        choices = grid.choose({path: found for path, found in figures.items() if found != {}})
        write_json(out / TUNING, {arm: asdict(choice) for arm, choice in choices.items()})
        for line in said(choices, [*dict.fromkeys(cell.arm for cell in tuning)]):
            this.console.print(line, markup=False, highlight=False)
    cells = grid.cells(choices)
    _list([*tuning, *cells], out)
    holds = True
    if cells:  # some arms are tuned
        this.stage(grid.name, cells)
        holds = compare(out, this.console if tables else Console(quiet=True))
    for path, reason in this.failed.items():
        print(f"failed: {path}: {reason} (see {out / path / LOG})", file=sys.stderr)
    if any(map(runner.disk_full, this.ends.values())):
        print("the disk is full: free some space; the same command goes on", file=sys.stderr)
    return 0 if holds and not this.failed else 1


def _list(cells: Sequence[Cell], out: Path) -> None:
    write_json(out / CELLS, [{"path": cell.path, **about_cell(cell)} for cell in cells])


def said(choices: Mapping[str, Choice], arms: Sequence[str]) -> list[str]:
    """What was chosen for each arm, and where there is reason to doubt it."""
    lines = []
    for arm in arms:
        choice = choices.get(arm)
        if choice is None:
            lines.append(f"{arm}: is not tuned yet, its cells wait")
        elif choice.best is None:
            lines.append(f"{arm}: every tuning run diverged, it has no cells")
        else:
            edges = "".join(f"; {axis} is at its edge, try more" for axis in choice.edges)
            lines.append(f"{arm}: tuned to {', '.join(choice.best.options.values())}{edges}")
    return lines


def figures_of(folder: Path) -> Mapping[str, Any] | None:
    """The figures of a finished cell, None of one that diverged, {} of one that has not ended."""
    if (folder / METRICS).is_file():
        return read_json(folder / METRICS)
    return None if (folder / DIVERGED).is_file() else {}
