"""`layerzoo ablate run GRID` and `layerzoo ablate list`."""

from __future__ import annotations

import argparse
import fcntl
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from layerzoo.spec import SpecError

from .claims import claims_table, judge
from .grid import Cell, Grid, load_grid, shipped_grids
from .plot import plot
from .report import notes, read_rows, table, write_summary
from .runner import Pool, prepare
from .tensorboard import write_hparams


class Display:
    """A bar for the grid and one for each running cell; without a terminal, a line a cell."""

    def __init__(self, console: Console, total: int) -> None:
        self.console, self.failed = console, dict[str, str]()
        self.bars = Progress(
            TextColumn("{task.description}", justify="right"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.all = self.bars.add_task("cells", total=total, note="")
        self.running: dict[str, Any] = {}

    def finished(self, count: int) -> None:
        self.bars.update(self.all, completed=count)

    def report(self, cell: Cell, answer: dict[str, Any]) -> None:
        if cell.path not in self.running:
            self.running[cell.path] = self.bars.add_task(cell.path, total=None, note="")
        bar = self.running[cell.path]
        if "step" in answer:
            note = f"loss {answer['loss']:.3f}"
            self.bars.update(bar, completed=answer["step"], total=answer["steps"], note=note)
            return
        self.bars.remove_task(self.running.pop(cell.path))
        self.bars.advance(self.all)
        if "failed" in answer:
            self.failed[cell.path] = answer["failed"]
            self.console.print(f"failed: {cell.path}: {answer['failed']}", markup=False)
        elif not self.console.is_terminal:
            done = self.bars.tasks[0]
            self.console.print(
                f"[{done.completed:.0f}/{done.total:.0f}] {cell.path}", markup=False
            )


def run(name: str, out: Path | None, jobs: int | None) -> int:
    """Run the unfinished cells of a grid, then compare all of them."""
    grid, cells = load_grid(name)
    out = (out or Path("runs") / "ablations") / grid.name
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "w")  # noqa: SIM115 (the with statement is below)
    except OSError as error:
        raise SpecError(f"--out {out}: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SpecError(f"--out {out}: another run uses it; wait, or give another") from None
        return _run(grid, cells, out, jobs, f"layerzoo ablate run {name}")


def _run(grid: Grid, cells: list[Cell], out: Path, jobs: int | None, command: str) -> int:
    todo = [cell for cell in cells if prepare(cell, out)]
    console = Console(width=None if sys.stdout.isatty() else 120)
    display = Display(console, len(cells))
    display.finished(len(cells) - len(todo))
    workers = max(1, min(jobs or os.cpu_count() or 1, len(todo)))
    pace = f", {workers} at a time" if todo else ""
    console.print(f"{grid.name}: {len(todo)} of {len(cells)} cells to run{pace}")
    try:
        with display.bars:
            Pool(todo, out, workers, display.report).run()
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on where this one stopped")
        return 130
    rows = read_rows(cells, out)
    verdicts = judge(grid.claims, rows)
    write_summary(grid, rows, verdicts, display.failed, command, out / "summary.json")
    write_hparams(rows, out)
    reach = cells[0].config.data.init_args.get("reach")
    drawn = plot(f"{grid.name} ({command})", rows, reach, out / "plot.png")
    console.print(table(grid, rows))
    for line in notes(rows):
        console.print(line, markup=False)
    if verdicts:
        console.print(claims_table(verdicts))
    if drawn:
        console.print(f"plot:        {out / 'plot.png'}", markup=False)
    console.print(f"summary:     {out / 'summary.json'}", markup=False)
    console.print(f"tensorboard: tensorboard --logdir {out}", markup=False)
    for path, reason in display.failed.items():
        print(f"failed: {path}: {reason} (see {out / path / 'log.txt'})", file=sys.stderr)
    return 1 if display.failed or not all(verdict.holds for verdict in verdicts) else 0


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("layerzoo ablate", description="Grids of training runs.")
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="run a grid's unfinished cells and compare all")
    runner.add_argument("grid", help="a shipped grid's name, or a YAML file")
    runner.add_argument("--out", type=Path, help="folder of results (default runs/ablations)")
    runner.add_argument("--jobs", type=int, help="runs at a time (default one a core)")
    commands.add_parser("list", help="list the shipped grids")
    options = parser.parse_args(argv)
    if options.command == "list":
        for name, path in shipped_grids().items():
            print(f"{name}: {path.read_text().splitlines()[0].removeprefix('# ')}")
        return 0
    if options.jobs is not None and options.jobs < 1:
        raise SpecError(f"--jobs: must be at least 1, got {options.jobs}")
    return run(options.grid, options.out, options.jobs)
