"""`layerzoo ablate validate`: train the grids that claim published figures, and judge them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from layerzoo.spec import SpecError

from .cells.grid import Grid, load_grid, read_grid, shipped_grids
from .cells.source import Source
from .grid_run import RunOptions, run_grid
from .reporting.arm_rows import rows_by_arm
from .reporting.comparisons import Verdict, judge_claims
from .reporting.results import GridResults, read_results
from .running.folder import reason_of
from .running.pace import duration_text

LONGEST_MINUTES = 10.0
"""Minutes on 2 CPU cores: what takes longer runs only if it is asked for."""
INTERRUPTED_STATUS = 130


def grids_with_claims() -> dict[str, Grid]:
    """The shipped grids that claim anything, by name; their arms are not checked yet."""
    grids = {name: read_grid(Source(path)) for name, path in shipped_grids().items()}
    return {name: grid for name, grid in grids.items() if grid.claims}


def validate_grids(names: Sequence[str], options: RunOptions, everything: bool = False) -> int:
    """Run the unfinished cells of references, and judge all their claims in one table.

    Args:
        names: of shipped grids, or files; none means the references of up to LONGEST minutes.
        everything: all references, however long they take.

    Returns: the exit status, 0; 1 if a claim does not hold or cells failed; 130 if interrupted.

    Raises:
        SpecError: an unknown grid, or one that claims nothing.
    """
    known = grids_with_claims()
    if names and everything:
        raise SpecError("--all: runs every reference; drop it, or the names")
    skipped = {} if names or everything else {n: g for n, g in known.items() if not _is_brief(g)}
    grids = {name: load_grid(name) for name in names or known if name not in skipped}
    for name, grid in grids.items():
        if not grid.claims:
            raise SpecError(
                f"grid {name}: claims nothing (no expect); references: {', '.join(known)}"
            )
    statuses = []
    for name in grids:
        statuses.append(run_grid(name, options, tables=False))
        if statuses[-1] == INTERRUPTED_STATUS:
            return INTERRUPTED_STATUS
    found = {grid.name: read_results(options.out / grid.name) for grid in grids.values()}
    judged = {
        name: judge_claims(each.claims, rows_by_arm(each.cells)) for name, each in found.items()
    }
    console = Console(width=None if sys.stdout.isatty() else 160)
    if judged:
        console.print(_verdicts_table(judged))
    for line in (line for each in found.values() for line in lines_of_lost_cells(each)):
        console.print(line, markup=False, highlight=False)
    if skipped:
        console.print(_skipped_table(skipped))
    holds = all(verdict.holds for each in judged.values() for verdict in each)
    return 0 if holds and not any(statuses) else 1


def lines_of_lost_cells(results: GridResults) -> list[str]:
    """The cells that no claim is about, and why, in one line each."""
    lost = (cell for cell in results.cells if cell.state != "finished")
    lines = []
    for cell in lost:
        why = reason_of(results.root / cell.path)
        lines.append(f"{results.name}: without {cell.path}: {cell.state}{why and f': {why}'}")
    return lines


def _is_brief(grid: Grid) -> bool:
    minutes = grid.fields.minutes
    return minutes is not None and minutes <= LONGEST_MINUTES


def _verdicts_table(judged: Mapping[str, Sequence[Verdict]]) -> Table:
    out = Table(title="references, by the mean over seeds", box=SIMPLE_HEAD, padding=(0, 1))
    heads = ("reference", "claim", "metric", "published", "measured", "tolerance", "verdict")
    for head in heads:
        out.add_column(head, justify="right" if head in ("published", "measured") else "left")
    for name, each in judged.items():
        for n, v in enumerate(each):
            first = "" if n else name
            row = (first, v.claim.subject, v.claim.metric, *v.shown, v.tolerance, v.word)
            out.add_row(*row, end_section=n == len(each) - 1)
    return out


def _skipped_table(grids: Mapping[str, Grid]) -> Table:
    title = f"skipped: longer than {duration_text(60 * LONGEST_MINUTES)} on 2 CPU cores"
    out = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1))
    for head in ("reference", "time", "command"):
        out.add_column(head, justify="right" if head == "time" else "left", no_wrap=True)
    for name, grid in grids.items():
        minutes = grid.fields.minutes
        time = duration_text(None if minutes is None else 60 * minutes)
        out.add_row(name, time, f"layerzoo ablate validate {name}")
    return out
