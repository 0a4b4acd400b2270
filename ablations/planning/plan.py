"""`layerzoo ablate plan`: what a grid would run, how large it is, and how long it takes."""

from __future__ import annotations

import dataclasses
import heapq
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from layerzoo.spec import error_at
from layerzoo.support.json_files import dumps

from ..cells.cell import Cell
from ..cells.confounds import Confounds
from ..cells.grid import load_grid
from ..cells.sizes import Sizes, sizes_of
from ..running.local import default_slots
from ..running.pace import duration_text
from .cautions import cautions, planned_confounds, show_confounds
from .probe import Speed, probe_speeds, training_shape
from .work import work_of

PROCESS_SECONDS, CELL_SECONDS = 6.0, 1.0
"""Seconds that a worker process takes to start, and a cell beside its updates and measurements:
to read its config, build, log and save. Measured on one core of a server."""


@dataclass(frozen=True)
class PlanRow:
    """An arm, or the tuning runs of one; sizes are None where its runs differ.

    cells: runs. updates: of one. flops_per_token: of the forward pass. training_flops: of all
    its runs, 3 times the forward passes. deviation: from what its size is matched to. solved:
    what was changed for that. seconds: of one run; None if nothing was probed. probed: or else
    scaled from another's speed.
    """

    arm: str
    tuning: bool
    cells: int
    updates: int
    parameters: int | None
    flops_per_token: float | None
    state_bytes: int | None
    training_flops: float
    deviation: float | None
    solved: dict[str, float]
    seconds: float | None
    probed: bool


@dataclass(frozen=True)
class Plan:
    """Of a grid: its rows, and totals. seconds: from start to end, `jobs` cells at a time.
    confounds: of what it compares, None if that is not known."""

    grid: str
    rows: list[PlanRow]
    cells: int
    updates: int
    training_flops: float
    jobs: int
    seconds: float | None
    warnings: list[str]
    confounds: Confounds | None = None


@dataclass(frozen=True)
class PlannedRun:
    """What is known of a cell, whatever its seed."""

    updates: int
    sizes: Sizes
    training_flops: float
    seconds: float | None
    probed: bool


def make_plan(
    grid: str,
    cells: Sequence[Cell],
    tune_cells: Sequence[Cell] = (),
    *,
    probe: bool = True,
    jobs: int = 1,
    threads: int = 1,
    compared: bool = True,
) -> Plan:
    """What the cells of a grid are and cost. It trains nothing but for the probe.

    Args:
        tune_cells: the tuning runs, which come first.
        probe: time a few updates of each shape of training, on this machine.
        jobs: cells at a time. threads: of the CPU, a cell.
        compared: whether the grid compares arms, or claims anything of them.

    Raises:
        SpecError: a cell whose training has no end.
    """
    kinds = {_kind_of(cell): cell for cell in (*tune_cells, *cells)}
    known = probe_speeds((cell.config for cell in kinds.values()), threads) if probe else {}
    runs = {kind: _planned_run(cell, known) for kind, cell in kinds.items()}
    rows, seconds = [], 0.0
    for stage in (tune_cells, cells):
        each = [(cell, runs[_kind_of(cell)]) for cell in stage]
        arms: dict[str, list[tuple[Cell, PlannedRun]]] = {}
        for cell, run in each:
            arms.setdefault(cell.arm, []).append((cell, run))
        rows += [_plan_row(arm, those) for arm, those in arms.items()]
        seconds += makespan([run.seconds or 0.0 for _, run in each], jobs)
    return Plan(
        grid=grid,
        rows=rows,
        cells=sum(row.cells for row in rows),
        updates=sum(runs[_kind_of(cell)].updates for cell in (*tune_cells, *cells)),
        training_flops=sum(row.training_flops for row in rows),
        jobs=jobs,
        seconds=seconds if probe else None,
        warnings=cautions(cells, compared),
    )


def _kind_of(cell: Cell) -> tuple[str, ...]:
    """Cells of one kind differ in their seeds alone."""
    return (cell.split, cell.arm, *cell.tuned.values())


def _planned_run(cell: Cell, known: Mapping[str, Speed]) -> PlannedRun:
    with error_at(cell.arm):
        todo = work_of(cell)
    size = sizes_of(cell.config)
    forward = sum(n * sizes_of(cell.config, T).flops for T, n in todo.tokens.items())
    seconds, speed = None, known.get(training_shape(cell.config))
    if speed is not None:
        batches = sum(
            n * T * sizes_of(cell.config, T).flops / (size.length * size.flops)
            for T, n in todo.held_out.items()
        )
        seconds = CELL_SECONDS + todo.updates * speed.update + batches * speed.held_out
    return PlannedRun(todo.updates, size, 3 * forward, seconds, speed is None or speed.probed)


def _plan_row(arm: str, runs: Sequence[tuple[Cell, PlannedRun]]) -> PlanRow:
    (cell, first), each = runs[0], [run for _, run in runs]
    sizes = first.sizes if len({run.sizes for run in each}) == 1 else None
    return PlanRow(
        arm=arm,
        tuning=cell.split == "val",
        cells=len(each),
        updates=first.updates,
        parameters=sizes and sizes.parameters,
        flops_per_token=sizes and sizes.flops,
        state_bytes=sizes and sizes.state_bytes,
        training_flops=sum(run.training_flops for run in each),
        deviation=cell.matched.get("deviation"),
        solved=cell.matched.get("solved", {}),
        seconds=None if first.seconds is None else fmean(run.seconds or 0.0 for run in each),
        probed=all(run.probed for run in each),
    )


def makespan(seconds: Sequence[float], jobs: int) -> float:
    """From start to end, if runs of so many seconds start in order, `jobs` at a time."""
    if not seconds:
        return 0.0
    ends = [PROCESS_SECONDS] * min(jobs, len(seconds))
    for one in seconds:
        heapq.heapreplace(ends, ends[0] + one)
    return max(ends)


# Shown


def plan_command(
    name: str, probe: bool, jobs: int | None, as_json: bool, size: str | None = None
) -> int:
    """`layerzoo ablate plan`."""
    grid = load_grid(name, size)
    compared = bool(grid.claims or (grid.report and grid.report.contrasts))
    cells = grid.cells()
    found = make_plan(
        grid.name,
        cells,
        grid.tune_cells(),
        probe=probe,
        jobs=jobs or default_slots(1),
        compared=compared,
    )
    found = dataclasses.replace(found, confounds=planned_confounds(grid, cells))
    if as_json:
        print(dumps(dataclasses.asdict(found)))
    else:
        show_plan(found, Console(width=None if sys.stdout.isatty() else 160))
    return 0


PLAN_HEADS = (
    "arm",
    "cells",
    "updates",
    "parameters",
    "FLOPs/token",
    "training FLOPs",
    "state bytes",
)


def show_plan(found: Plan, console: Console) -> None:
    """Print a plan as a table, its totals and its warnings."""
    matched = any(row.deviation is not None for row in found.rows)
    heads = [*PLAN_HEADS, *(["matched"] if matched else [])]
    heads += [] if found.seconds is None else ["time a cell"]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for n, head in enumerate(heads):
        table.add_column(head, justify="right" if n else "left", no_wrap=True)
    for row in found.rows:
        cells = [_deviation_text(row)] if matched else []
        if row.seconds is not None:
            cells.append(("" if row.probed else "~") + duration_text(row.seconds))
        table.add_row(
            f"{row.arm} (tuning)" if row.tuning else row.arm,
            f"{row.cells}",
            f"{row.updates:,}",
            *map(_size_text, (row.parameters, row.flops_per_token)),
            f"{row.training_flops:.2e}",
            _size_text(row.state_bytes),
            *cells,
        )
    console.print(table)
    time = (
        ""
        if found.seconds is None
        else f", {duration_text(found.seconds)} at {found.jobs} at a time"
    )
    console.print(
        f"{found.grid}: {found.cells} cells, {found.updates:,} updates, "
        f"{found.training_flops:.2e} training FLOPs{time}",
        highlight=False,
    )
    if not all(row.probed for row in found.rows):
        console.print("~ scaled by FLOPs from the nearest arm that was probed")
    if found.confounds is not None:
        show_confounds(found.confounds, console)
    for line in (*found.warnings, *(found.confounds.warnings if found.confounds else ())):
        console.print(f"warning: {line}", highlight=False, soft_wrap=True, markup=False)


def _deviation_text(row: PlanRow) -> str:
    """+1.2%, and what was changed for it: +0.1% dim=128."""
    if row.deviation is None:
        return ""
    return " ".join([f"{row.deviation:+.1%}", *(f"{n}={v:g}" for n, v in row.solved.items())])


def _size_text(value: float | None) -> str:
    return "varies" if value is None else f"{value:,.0f}"
